"""Which weights of a run are used."""

import os
from pathlib import Path

import pytest

from lora_blip.errors import AdapterError
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, locate


def test_the_best_weights_of_the_newest_run_are_used_also_if_it_was_killed(tmp_path: Path) -> None:
    """A killed run has only its best weights. Those in the checkpoints are another copy."""
    for time, name in enumerate(("older", "newer"), 1):
        (tmp_path / name / "checkpoints" / "one").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "one" / BEST_NAME).touch()
        with pytest.raises(AdapterError, match="no adapter at"):
            locate(tmp_path / name)
        (tmp_path / name / BEST_NAME).touch()
        assert locate(tmp_path / name) == tmp_path / name / BEST_NAME
        (tmp_path / name / ADAPTER_NAME).touch()
        os.utime(tmp_path / name / ADAPTER_NAME, (time, time))
    assert locate("latest", tmp_path) == tmp_path / "newer" / BEST_NAME
    (tmp_path / "newer" / BEST_NAME).unlink()
    assert locate("latest", tmp_path) == tmp_path / "newer" / ADAPTER_NAME
