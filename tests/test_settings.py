"""The settings of train.py and infer.py: lines, groups, help texts and paths, and a Python without the libraries."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.script_settings import SCRIPTS, rewritten
from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
from lora_blip.errors import ConfigError
from lora_blip.flags import parse
from lora_blip.runtime.settings import settings_of
from tests.support import tiny

ROOT = Path(__file__).resolve().parent.parent


def without_libraries(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that has only the standard library."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-S", str(ROOT / script), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_lines_of_a_script_are_written_from_the_config(script):
    """Names, order, defaults, groups and comments come from config.py. Each setting is one line that is not too long."""
    source, kind = (ROOT / script).read_text(encoding="utf-8"), SCRIPTS[script]
    assert source == rewritten(source, kind), "run: python -m benchmarks.studies.script_settings"
    capitals = {name: value for name, value in runpy.run_path(str(ROOT / script)).items() if name.isupper()}
    assert list(capitals.items()) == [(entry.name.upper(), entry.default) for entry in settings_of(kind)]
    lines = [line for line in source.splitlines() if re.match("[A-Z_]+ = ", line)]
    assert len(lines) == len(capitals) and all(re.search(r"  # .{6,}", line) and len(line) <= 128 for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_the_groups_and_texts_of_the_script(script):
    """Same groups, same order, same texts, except that flags replace names in capitals. No library is imported for it."""
    done = without_libraries(script, "--help")
    assert done.returncode == 0, done.stderr
    source = (ROOT / script).read_text(encoding="utf-8")
    printed = done.stdout.partition("show this help message and exit")[2]
    expected = re.findall(r"^(?:# (.+)|([A-Z_]+) = )", source, re.MULTILINE)
    headings = re.findall(r"^(?:(\w.*):|  --([a-z-]+) )", printed, re.MULTILINE)
    assert headings == [(group, name.lower().replace("_", "-")) for group, name in expected]
    words = "".join(printed.split())  # argparse also breaks lines at hyphens
    for entry in settings_of(SCRIPTS[script]):
        doc = re.sub(r"[A-Z]+_[A-Z_]+|PATIENCE", lambda name: f"--{name[0].lower().replace('_', '-')}", entry.metadata["doc"])
        assert "".join(doc.split()) in words, entry.name


def test_the_twenty_most_used_settings_come_first():
    first = list(takewhile(lambda entry: not entry.metadata["group"].startswith("More"), settings_of(TrainConfig)))
    assert len(first) == 20 and {"model", "annotations", "targets", "r", "alpha", "epochs", "batch_size", "lr"} <= {
        entry.name for entry in first
    }
    for kind in (TrainConfig, InferConfig, EvaluateConfig):
        assert settings_of(kind)[0].metadata["group"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_libraries_a_script_prints_the_command_that_installs_them(script):
    """The error is one line with this Python and this folder, instead of a traceback. A line about loading comes before it."""
    done = without_libraries(script)
    *before, error = done.stderr.splitlines()
    assert done.returncode == 2 and len(before) <= 1 and "Traceback" not in done.stderr, done.stderr
    command = f"install it: {sys.executable} -m pip install -e {ROOT}"
    assert re.match(r"error: \w+ is not installed; ", error) and command in error


def test_another_missing_module_keeps_its_traceback(capsys):
    """Only a missing dependency has the advice to install it: for a fault of ours it would be wrong."""
    from lora_blip.cli import report_errors

    def run() -> None:
        raise ModuleNotFoundError("No module named 'torch.gone'", name="torch.gone")

    with pytest.raises(ModuleNotFoundError):
        report_errors(run)
    assert "pip install" not in capsys.readouterr().err


def test_paths_of_a_script_are_relative_to_its_folder(tmp_path, monkeypatch):
    """Flags are relative to the current folder, as in every command. Hub names, texts and keywords stay as they are."""
    folder, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (folder / "base").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "texts.txt").write_text("a\nb\n")
    monkeypatch.chdir(elsewhere)
    script = {"__file__": str(folder / "train.py"), "MODEL": "base", "VAL_ANNOTATIONS": "val.jsonl", "IMAGE_ROOT": "/photos"}
    config = parse(TrainConfig, script, ["--annotations", "lines.jsonl"])
    assert (config.model, config.val_annotations) == (str(folder / "base"), str(folder / "val.jsonl"))
    assert (config.output_dir, config.resume) == (str(folder / "lora_blip_output"), "auto")
    assert (config.annotations, config.image_root) == ("lines.jsonl", "/photos")
    assert parse(TrainConfig, {"__file__": script["__file__"]}, []).model == "assets/tiny-blip"  # adapters record this name
    assert parse(TrainConfig, script | {"MODEL": "Salesforce/blip"}, []).model == "Salesforce/blip"
    script = {"__file__": str(folder / "infer.py"), "IMAGES": "shards/{00..09}.tar", "QUESTION": "what is it?"}
    config = parse(InferConfig, script | {"TEXTS": "texts.txt"}, [])
    assert (config.images, config.texts) == (str(folder / "shards/{00..09}.tar"), str(folder / "texts.txt"))
    assert (config.question, config.adapter, config.output_dir) == ("what is it?", "latest", "")
    assert config.runs == str(folder / "lora_blip_output")
    monkeypatch.chdir(folder)
    assert parse(InferConfig, script, []) == InferConfig(images="shards/{00..09}.tar", question="what is it?")


def test_every_file_of_a_list_is_relative_to_the_folder_of_the_script(tmp_path, monkeypatch):
    """Before, only the first one was: `python /project/train.py` did not find the others."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "one, two.csv").write_text("a file whose name contains a comma")
    monkeypatch.chdir(tmp_path)
    script: dict[str, Any] = {"__file__": str(folder / "train.py"), "VAL_ANNOTATIONS": "one, two.csv"}
    a, b, c = str(folder / "a.jsonl"), str(folder / "sub" / "b.csv"), str(tmp_path / "c.csv")
    for written in (f"a.jsonl,sub/b.csv,{c}", f"a.jsonl, sub/b.csv, {c}", ["a.jsonl", Path("sub/b.csv"), c]):
        config = parse(TrainConfig, script | {"ANNOTATIONS": written}, [])
        assert config.annotations.split(",") == [a, b, c] and config.val_annotations == str(folder / "one, two.csv")
    config = parse(InferConfig, {"__file__": str(folder / "infer.py"), "REFERENCES": "a.jsonl,$HOME/x.csv"}, [])
    assert config.references.split(",") == [a, os.path.expandvars("$HOME/x.csv")]
    question = "which one, ~5 or $HOME,  $6?"  # a setting that may be a path, but not a list
    assert parse(InferConfig, {"__file__": str(folder / "infer.py"), "QUESTION": question}, []).question == question


def test_a_list_of_files_or_columns_is_a_setting_too():
    config = TrainConfig(annotations=["a.jsonl", Path("b.csv")], image_key=["Bild", "Foto"], targets=["vit", "text"])
    assert (config.annotations, config.image_key, config.targets) == ("a.jsonl,b.csv", "Bild|Foto", "vit,text")
    assert InferConfig(references=("a.jsonl",)).references == "a.jsonl"
    assert TrainConfig(targets=["vit.q,vit.v", "text"]).targets == "vit.q,vit.v,text"
    for wrong in (["a,b.jsonl", "c.jsonl"], ["a.jsonl", 3], []):
        with pytest.raises(ConfigError, match="expected a text"):
            TrainConfig(annotations=wrong)
    with pytest.raises(ConfigError, match="expected a text"):
        TrainConfig(model=["a", "b"])


def test_scripts_run_from_another_folder(checkpoints, tmp_path, monkeypatch):
    """`python /project/train.py`, then `python /project/infer.py`: data, runs and "latest" are beside the scripts."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    source = tiny.write_photos(project, 4)
    (project / "photos").rename(project / "image_test")
    source.write_text(source.read_text().replace("photos/", "image_test/"))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    flags = {
        "train.py": ["--model", str(checkpoints["blip"]), "--max-steps", "1", "--num-workers", "0", "--max-new-tokens", "4"],
        "infer.py": ["--max-new-tokens", "4"],
    }
    for script, own in flags.items():
        shutil.copy(ROOT / script, project)
        monkeypatch.setattr(sys, "argv", [script, *own, "--device", "cpu"])
        runpy.run_path(str(project / script), run_name="__main__")
    assert list(elsewhere.iterdir()) == []
    (path,) = project.glob("lora_blip_output/predictions_*/predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {Path(line["image"]) for line in lines} == {project / "image_test" / f"{number}.png" for number in range(4)}
    assert {field.name for field in fields(InferConfig)} - {entry.name for entry in settings_of(InferConfig)} == {"runs"}


def test_a_path_and_a_device_of_torch_are_settings_too():
    config = TrainConfig(annotations=Path("a/b.jsonl"), device=torch.device("cpu"))
    assert (config.annotations, config.device) == (str(Path("a/b.jsonl")), "cpu")
    with pytest.raises(ConfigError, match="annotations = 3: expected a text"):
        TrainConfig(annotations=3)
