"""A wrong path is one error before torch is imported, with the text that the later code has, and the nearest existing name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import lora_blip
from lora_blip.cli import main
from lora_blip.config import InferConfig, TrainConfig
from lora_blip.data import annotations
from lora_blip.data.column_check import refuse_unknown_columns
from lora_blip.data.formats import NO_KEYS, Keys
from lora_blip.data.several_files import of_several_files
from lora_blip.errors import DataError, LoraBlipError
from lora_blip.inference.setup import read_inputs
from lora_blip.models.loading import locate_model
from lora_blip.runtime import runs
from lora_blip.runtime.runs import ADAPTER_NAME, CHECKPOINTS_NAME
from lora_blip.runtime.user_paths import nearest_path, require_annotations
from lora_blip.training import checkpoint
from tests.support import tiny

ROOT = Path(__file__).resolve().parent.parent
RUN = "2026-11-28_120000_caption_tiny-blip_vit"
BASE = ["--adapter", "none", "--model", "assets/tiny-blip"]
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from lora_blip.cli import main
errors = []
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(SystemExit):
        main()
    errors.append(stderr.getvalue())
print(json.dumps(errors))
"""
CASES: list[tuple[list[str], str, Callable[[], object]]] = [  # arguments, the suggestion, and the code that finds it later
    (["train", "--annotations", "annotation.jsonl"], "'annotations.jsonl'",
     lambda: lora_blip.train(TrainConfig(annotations="annotation.jsonl"))),
    (["train", "--val-annotations", "Annotations.json"], "'annotations.jsonl'",
     lambda: lora_blip.train(TrainConfig(val_annotations="Annotations.json"))),
    (["train", "--image-root", "fotos"], "'photos'", lambda: lora_blip.train(TrainConfig(image_root="fotos"))),
    (["train", "--model", "assets/tiny-blp"], "'assets/tiny-blip'", lambda: locate_model("assets/tiny-blp")),
    (["train", "--model", "./my_bse"], "'my_base'", lambda: locate_model("./my_bse")),
    (["train", "--model", "models/blip/base"], "", lambda: locate_model("models/blip/base")),
    (["train", "--resume", f"lora_blip_output/{RUN[:-4]}"], f"'lora_blip_output/{RUN}'",
     lambda: checkpoint.locate(Path(f"lora_blip_output/{RUN[:-4]}"))),
    (["train", "--output-dir", "annotations.jsonl"], "", lambda: lora_blip.train(TrainConfig(output_dir="annotations.jsonl"))),
    (["infer", "--images", "fotos"], "'photos'", lambda: read_inputs(InferConfig(images="fotos"))),
    (["infer", "--images", "photos", "--adapter", RUN], f"'lora_blip_output/{RUN}'", lambda: runs.locate(RUN)),
    (["infer", "--images", "photos", "--texts", "words.txt", *BASE], "",
     lambda: read_inputs(InferConfig(images="photos", texts="words.txt"))),
    (["infer", "--images", "photos", "--references", "refs.jsonl", *BASE], "",
     lambda: read_inputs(InferConfig(images="photos", references="refs.jsonl"))),
    (["evaluate", "--references", "anotations.jsonl", *BASE], "'annotations.jsonl'",
     lambda: read_inputs(InferConfig(images="photos", references="anotations.jsonl"))),
    (["train", "--init-adapter", RUN[:-4]], f"'lora_blip_output/{RUN}'", lambda: runs.locate_initial(RUN[:-4])),
    (["evaluate", "--references", "annotations.jsonl", "--adapter", "lora_blip_outputs"], "'lora_blip_output'",
     lambda: runs.locate("lora_blip_outputs")),
    (["caption", "photos/0.pgn", *BASE], "'photos/0.png'", lambda: None),
    (["ask", "photos/00.png", "what is it?", *BASE], "'photos/0.png'", lambda: None),
    (["rank", "photos/0.png", "a", "b", "--adapter", "runs"], "", lambda: None),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in ("photos", "my_base", f"lora_blip_output/{RUN}/{CHECKPOINTS_NAME}"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "photos" / "0.png")
    (folder / "annotations.jsonl").write_text('{"image": "photos/0.png", "text": "a cube"}\n')
    (folder / "lora_blip_output" / RUN / ADAPTER_NAME).touch()
    return folder


@pytest.fixture(scope="module")
def errors(folder: Path) -> list[str]:
    """Return the stderr of each case, from a Python that cannot import torch."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = json.dumps([case[0] for case in CASES])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=arguments, cwd=folder, env=environment, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    result: list[str] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_wrong_path_is_found_before_torch_is_imported(number, errors, folder, monkeypatch):
    """It is one line, with a suggestion if a name is similar. The code that needs the path raises the same text."""
    _, near, later = CASES[number]
    message = errors[number]
    assert message.startswith("error: ") and message.count("\n") == 1 and "torch" not in message, message
    assert f"did you mean {near}? Otherwise " in message if near else "did you mean" not in message
    monkeypatch.chdir(folder)
    try:
        later()
    except LoraBlipError as error:
        assert message == f"error: {error}\n"
    else:
        assert number >= len(CASES) - 3


def test_a_missing_image_among_others_is_reported_beside_their_captions(folder, monkeypatch, capsys):
    """And with --json it is an object, even if it is the only one."""
    monkeypatch.chdir(folder)
    for arguments in (["photos/0.png", "gone.png"], ["gone.png", "--json"]):
        monkeypatch.setattr(sys, "argv", ["lora-blip", "caption", *arguments, "--device", "cpu", *BASE])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert stopped.value.code == 1 and printed.out.count("\n") == 1, printed


def test_under_torchrun_the_processes_end_together(folder, monkeypatch):
    """The main process does not end before it has joined the others: they would wait for it."""
    monkeypatch.chdir(folder)
    called = []
    monkeypatch.setattr("lora_blip.training.loop.train", lambda config: called.append(config.annotations))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["lora-blip", "train", "--annotations", "gone.jsonl"])
    main()
    assert called == ["gone.jsonl"]


def test_the_nearest_path_replaces_one_part(folder):
    """Of a deeper path, the rest must exist. Hidden and different names are never suggested."""
    assert nearest_path(folder / "Photo" / "0.png") == str(folder / "photos" / "0.png")
    assert nearest_path(folder / "Photo" / "1.png") == nearest_path(folder / "zebra") == nearest_path(folder / "photos") == ""
    assert nearest_path("photoz", ["a photo", "photos"]) == "photos"
    assert nearest_path(folder / "photo.jsonl") == ""  # a file, and photos is a folder
    assert nearest_path(folder / "photos.csv") == str(folder / "photos")
    assert nearest_path(folder / "annotations", folders=True) == ""
    assert nearest_path(folder / "Photo" / ("x" * 300)) == ""  # too long for a file name


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (("train", "--annotations", "gone.jsonl"), "annotations"),
        (("train", "--val-annotations", "gone.jsonl"), "val_annotations"),
        (("train", "--init-adapter", "gone"), "init_adapter"),
        (("train", "--image-root", "gone"), "image_root"),
        (("train", "--model", "./gone"), "model"),
        (("train", "--resume", "gone"), "resume"),
        (("train", "--output-dir", "annotations.jsonl"), "output_dir"),
        (("infer", "--images", "gone"), "images"),
        (("infer", "--images", "photos", "--adapter", "gone"), "adapter"),
        (("infer", "--images", "photos", "--texts", "gone.txt", *BASE), "texts"),
        (("infer", "--images", "photos", "--question", "gone.jsonl", *BASE), "question"),
        (("infer", "--images", "photos", "--references", "gone.jsonl", *BASE), "references"),
        (("evaluate", "--references", "gone.jsonl", *BASE), "references"),
    ],
)
def test_the_error_for_a_missing_path_names_the_setting(folder, monkeypatch, capsys, words, setting):
    """A user with several paths in train.py knows which one to correct."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lora-blip", *words])
    with pytest.raises(SystemExit):
        main()
    message = capsys.readouterr().err
    names = (f"{setting} = ", f"--{setting.replace('_', '-')}", f"{setting} folder ", f"{setting} '", f"no {setting} at ")
    assert "gone" in message or setting == "output_dir"
    assert any(name in message for name in names), message


def test_unknown_columns_are_found_before_torch_is_imported(tmp_path, monkeypatch):
    """The text is that of the later code. A table with known columns gives no error."""
    (tmp_path / "a.csv").write_text("Datei;Wort\n1.png;a cat\n")
    (tmp_path / "b.csv").write_text("image;caption\n1.png;a cat\n")
    commands = [["train", "--annotations", "a.csv"], ["train", "--annotations", "b.csv", "--val-annotations", "a.csv"]]
    commands += [["evaluate", "--references", "a.csv", *BASE]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(commands), cwd=tmp_path, text=True, capture_output=True,
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as later:
        annotations.read("a.csv")
    with pytest.raises(DataError) as of_validation, of_several_files(NO_KEYS):
        annotations.read("a.csv")
    errors = [f"error: {error.value}" for error in (later, of_validation, later)]
    assert [message.strip() for message in json.loads(done.stdout)] == errors
    refuse_unknown_columns("b.csv", NO_KEYS)
    refuse_unknown_columns("a.csv", Keys("Datei", "Wort"))


def test_a_setting_of_annotations_that_is_empty_is_named():
    """The current folder is not empty: it may have the annotations."""
    with pytest.raises(DataError, match=r"^annotations is empty; give a \.jsonl file"):
        require_annotations("")
    require_annotations(".")


@pytest.mark.parametrize(
    "name", ['a"b', "it's", "x; did you mean --x-key y", "a \\ b", "$(id)", "--text-key", "did you mean --text-key 'z"]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_strange_names_of_columns_end_in_one_error(tmp_path, monkeypatch, name, kind):
    """Their text is in the message that is searched for flags."""
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 1)
    for keys in ({}, {"image": "Datei"}):
        if kind == "csv":
            (tmp_path / "b.csv").write_text('"{}";Bild\na;0.png\n'.format(name.replace('"', '""')))
        else:
            (tmp_path / "b.jsonl").write_text(json.dumps({name: "a", "Bild": "0.png"}) + "\n")
        with pytest.raises(DataError), of_several_files(Keys(**keys)):
            annotations.read(f"b.{kind}", "photos", keys=Keys(**keys))
