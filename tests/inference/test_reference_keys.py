"""References with other names of columns: the same keys in inference as in training."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.formats import keys_of
from lora_blip.data.image_sources import ImageSource
from lora_blip.errors import DataError
from lora_blip.inference.questions import read_references
from lora_blip.inference.setup import Inputs, open_inputs
from lora_blip.tasks.registry import TASKS


def test_references_are_read_by_the_names_of_the_columns(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    (tmp_path / "x.csv").write_text("Datei;Beschreibung\n1.png;ein Hund\n")
    for kind, more in ((InferConfig, {"model": "m"}), (EvaluateConfig, {"references": "x.csv"})):
        keys = keys_of(kind(image_key="Datei", text_key="Beschreibung", **more))
        (lines,) = read_references(str(tmp_path / "x.csv"), "", ImageSource(tmp_path), keys).values()
        assert [(line.name, line.text) for line in lines] == [("1.png", "ein Hund")]


@pytest.mark.parametrize(("name", "image"), [("1.png", "photos/1.png"), ("a/1.png", "photos/a/1.png")])
def test_references_that_fit_no_image_give_the_setting_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, image):
    """IMAGE_ROOT if IMAGES has files with the paths of the references; --images if the file's own images exist."""
    monkeypatch.chdir(tmp_path)
    for path in (Path(image), Path("copies", name)):  # two files fit, so lora_blip chooses none
        path.parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(path)
    Path("x.csv").write_text(f"image,text\n{name},a dog\n")
    root = re.escape(str(tmp_path / "photos"))
    with pytest.raises(DataError, match=rf'; set IMAGE_ROOT = "{root}" \(--image-root {root}\)$'):
        read_references("x.csv", "", ImageSource("photos"))
    assert read_references("x.csv", "photos", ImageSource("photos"))
    Path("others").mkdir()
    Image.new("RGB", (2, 2)).save("others/2.png")
    Path("others/x.csv").write_text("image,text\n2.png,a dog\n")
    with pytest.raises(DataError, match=r"; to use the images of the file: --images others$"):
        read_references("others/x.csv", "", ImageSource("photos"))
    Path("y.csv").write_text("image,text\n3.png,a dog\n")
    with pytest.raises(DataError, match=r"; set IMAGES .*, or IMAGE_ROOT \(--image-root\) to the folder that its"):
        read_references("y.csv", "", ImageSource("photos"))


def test_lines_whose_images_are_not_predicted_are_counted(tmp_path: Path, capsys):
    for name in ("1.png", "2.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    lines = [json.dumps({"image": name, "text": "a dog"}) + "\n" for name in ("1.png", "2.png", "2.png")]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert len(read_references(str(tmp_path / "a.jsonl"), "", ImageSource(tmp_path / "1.png"))) == 1
    assert "a.jsonl: 2 lines of 3 not used: their images are not in IMAGES" in capsys.readouterr().out
    assert len(read_references(str(tmp_path / "a.jsonl"), "", ImageSource(tmp_path))) == 2
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("missing", [63, 64, 300])
@pytest.mark.parametrize("first", ["", "1.png,a dog\n"])
def test_references_of_another_machine_are_found_after_many_missing_images(tmp_path: Path, capsys, missing, first):
    """Before, the first 64 lines decided if paths are searched: the score was that of the other images, or there was none."""
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    lost = "".join(f"old/gone_{n}.png,a cat\n" for n in range(missing))
    (tmp_path / "x.csv").write_text(f"image,text\n{first}{lost}D:\\old\\2.png,a dog\nold/3.png,a dog\n")
    found = read_references(str(tmp_path / "x.csv"), "", ImageSource(tmp_path))
    assert sorted(path.name for path in found) == ["1.png"] * bool(first) + ["2.png", "3.png"]
    assert ("has no line for 1 of 3 images: they have no score" in capsys.readouterr().out) == (not first)


def test_a_file_of_questions_is_read_with_the_image_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make):
    """Before, the message asked for --image-root, which had no effect."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Image.new("RGB", (30, 30)).save("photos/1.png")
    Path("lists").mkdir()
    Path("lists/q.jsonl").write_text('{"image": "1.png", "question": "what is it?"}\n')
    config = InferConfig(model="m", adapter="none", images="photos", question="lists/q.jsonl", image_root="photos")
    task = TASKS["vqa"](make("vqa"))
    monkeypatch.setattr("lora_blip.inference.setup.open_task", lambda *_: (task, "fp32"))
    _, _, examples, _ = open_inputs(config, Inputs(ImageSource("photos"), {}, [], None))
    assert [(str(e.image), e.question) for e in examples] == [("photos/1.png", "what is it?")]
