"""References with other names of columns: the same keys in inference as in training."""

import json
from pathlib import Path

from PIL import Image

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.formats import keys_of
from lora_blip.data.image_sources import ImageSource
from lora_blip.inference.questions import read_references


def test_references_are_read_by_the_names_of_the_columns(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    (tmp_path / "x.csv").write_text("Datei;Beschreibung\n1.png;ein Hund\n")
    for kind, more in ((InferConfig, {"model": "m"}), (EvaluateConfig, {"references": "x.csv"})):
        keys = keys_of(kind(image_key="Datei", text_key="Beschreibung", **more))
        (lines,) = read_references(str(tmp_path / "x.csv"), "", ImageSource(tmp_path), keys).values()
        assert [(line.name, line.text) for line in lines] == [("1.png", "ein Hund")]


def test_lines_whose_images_are_not_predicted_are_counted(tmp_path: Path, capsys):
    for name in ("1.png", "2.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    lines = [json.dumps({"image": name, "text": "a dog"}) + "\n" for name in ("1.png", "2.png", "2.png")]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert len(read_references(str(tmp_path / "a.jsonl"), "", ImageSource(tmp_path / "1.png"))) == 1
    assert "a.jsonl: 2 lines of 3 not used: their images are not in IMAGES" in capsys.readouterr().out
    assert len(read_references(str(tmp_path / "a.jsonl"), "", ImageSource(tmp_path))) == 2
    assert "not used" not in capsys.readouterr().out
