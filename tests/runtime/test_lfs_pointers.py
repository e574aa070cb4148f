"""A clone without Git LFS contains pointers in place of the large files: each of them is an error that says so."""

import shutil
import sys
from pathlib import Path

import pytest

from lora_blip.cli import main
from tests.support import tiny
from tests.support.runs import adapter_of

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
PULL = "it is a pointer of Git LFS, not the file; install Git LFS, and run in its folder: git lfs pull"


@pytest.fixture
def here(checkpoints, tmp_path, monkeypatch) -> Path:
    """Return the working folder, with the folders base, run, and photos, and photos.jsonl."""
    monkeypatch.chdir(tmp_path)
    source = tiny.write_photos(tmp_path, 4, ["a red cube", "a blue cube"] * 2)
    shutil.copytree(checkpoints["blip"], tmp_path / "base")
    shutil.copytree(adapter_of(checkpoints["blip"], tmp_path / "trained").parent, tmp_path / "run")
    source.rename("photos.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("photos/0.png", "caption photos/0.png --adapter none --model base"),
        ("photos/0.png", "train --annotations photos.jsonl --model base --max-steps 1"),
        ("photos.jsonl", "train --annotations photos.jsonl --model base --max-steps 1"),
        ("photos.jsonl", "prepare --source photos.jsonl --output-dir out"),
        ("photos.csv", "prepare --source photos.csv --output-dir out"),
        ("photos.parquet", "prepare --source photos.parquet --output-dir out"),
        ("run/adapter.safetensors", "caption photos/0.png --adapter run --model base"),
        ("run/adapter.safetensors", "inspect run"),
        ("base/model.safetensors", "caption photos/0.png --adapter none --model base"),
        ("base/config.json", "caption photos/0.png --adapter none --model base"),
        ("base/tokenizer.json", "caption photos/0.png --adapter none --model base"),
    ],
)
def test_a_pointer_of_git_lfs_is_an_error_with_the_command_that_gets_the_file(here, monkeypatch, capsys, file, command):
    """Before, such an image had "no supported format", and such a table "only one column"."""
    (here / file).write_text(POINTER)
    monkeypatch.setattr(sys, "argv", ["lora-blip", *command.split()])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert PULL in error and Path(file).name in error and "Traceback" not in error
