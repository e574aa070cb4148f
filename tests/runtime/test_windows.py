"""What differs on Windows: worker processes without fork, names that its file systems refuse, and long paths."""

import json
import re
from datetime import datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_blip.data import annotations
from lora_blip.data.dataset import ImageDataset
from lora_blip.data.disk_cache import image_digest
from lora_blip.data.images import open_image
from lora_blip.data.loader import close, loader
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import LoraBlipError
from lora_blip.runtime import system_errors
from lora_blip.runtime.runs import LONGEST_PART, run_name
from tests.support import tiny

RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@pytest.mark.slow
def test_loader_workers_that_are_spawned_give_the_same_batches(make, tmp_path):
    """Windows and macOS start workers by spawn: the data set is sent to a new Python, and no memory is inherited."""
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 5), "", "stop")
    processor = make("blip").image_processor

    def batches(workers: int) -> tuple[list[torch.Tensor], list[str]]:
        data_loader = loader(ImageDataset(examples, processor, True, 3), 2, True, 3, workers, pin=False)
        if workers:
            data_loader.multiprocessing_context = "spawn"
        try:
            pixels = [batch.pixel_values for batch in data_loader]
            return pixels, [type(worker).__name__ for worker in getattr(data_loader._iterator, "_workers", ())]
        finally:
            close(data_loader)

    (expected, _), (spawned, kinds) = batches(0), batches(1)
    assert kinds == ["SpawnProcess"] and len(spawned) == len(expected) == 3 and all(map(torch.equal, spawned, expected))


@given(base=st.text(max_size=60), targets=st.text(max_size=60))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_the_name_of_a_run_is_valid_on_every_system(base, targets):
    """No character that Windows refuses, no reserved name, no dot or space at the end, and at most 255 bytes."""
    name = run_name("caption", base, targets, datetime(2026, 1, 2))
    assert re.fullmatch(r"[A-Za-z0-9._-]+", name) and not RESERVED.fullmatch(name) and not name.endswith((".", " "))
    assert len(name) <= 40 + 2 * LONGEST_PART


@pytest.mark.parametrize("part", ["con", "aux.txt", "C:\\models\\nul", "a:b", "x" * 400, "..", "é/红"])
def test_a_base_with_a_name_that_windows_refuses_has_a_run_folder(tmp_path, part):
    name = run_name("caption", part, part, datetime(2026, 1, 2))
    (tmp_path / name).mkdir()
    assert not set('<>:"/\\|?*') & set(name) and not RESERVED.fullmatch(name)


@pytest.mark.parametrize("length", [259, 260])
def test_a_path_that_is_too_long_for_windows_has_its_own_fix(tmp_path, monkeypatch, length):
    """Windows reports a file with a longer path as missing: images, annotations and outputs name the length and the fix."""
    monkeypatch.setattr(system_errors, "WINDOWS", True)
    image = tmp_path / ("x" * (length - len(str(tmp_path)) - 5) + ".jpg")
    assert len(str(image)) == length
    fix = f"the path has {length} characters, and Windows finds at most 259; use a folder with a shorter path, or allow long"
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": image.name, "text": "a"}))
    for refused in (
        lambda: open_image(image),
        lambda: image_digest(image),
        lambda: annotations.read(tmp_path / "a.jsonl"),
        lambda: prepare(PrepareConfig(source=str(tmp_path / "a.jsonl"), output_dir=str(tmp_path / "out"))),
    ):
        with pytest.raises(LoraBlipError, match="does not exist") as error:
            refused()
        assert (fix in str(error.value)) == (length == 260)
    error = system_errors.file_error(FileNotFoundError(2, "No such file"), image, "written")
    assert (system_errors.ALLOW_LONG in str(error)) == (length == 260)
