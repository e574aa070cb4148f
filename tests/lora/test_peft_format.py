"""The format of peft, in both directions: with the same files, logits equal those of `peft`."""

import pytest

from tests.support import peft_cases

pytest.importorskip("peft")


@pytest.mark.parametrize("direction", peft_cases.DIRECTIONS)
@pytest.mark.parametrize(("kind", "variant", "shape"), peft_cases.CASES)
def test_outputs_equal_those_of_peft(make, tmp_path, kind, variant, shape, direction):
    """The relative difference is at most 1e-6: as peft loads it, as we read the folder, and as a converted file."""
    differences = peft_cases.MEASURES[direction](make, kind, variant, shape, tmp_path)
    assert max(differences) <= 1e-6
