"""The format of peft, in both directions: with the same files, logits equal those of `peft`."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import peft_cases

pytest.importorskip("peft")


def cases() -> Iterator[Any]:
    """Yield each case. A third of them run always, each kind with each variant, kind with shape and variant with shape."""
    kinds, variants, shapes = peft_cases.KINDS, peft_cases.VARIANTS, [*peft_cases.SHAPES]
    for kind, variant, shape in peft_cases.CASES:
        often = shapes.index(shape) == (kinds.index(kind) + variants.index(variant)) % len(shapes)
        yield pytest.param(kind, variant, shape, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize("direction", peft_cases.DIRECTIONS)
@pytest.mark.parametrize(("kind", "variant", "shape"), [*cases()])
def test_outputs_equal_those_of_peft(make, tmp_path, kind, variant, shape, direction):
    """The relative difference is at most 1e-6: as peft loads it, as we read the folder, and as a converted file."""
    differences = peft_cases.MEASURES[direction](make, kind, variant, shape, tmp_path)
    assert max(differences) <= 1e-6
