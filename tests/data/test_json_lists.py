"""JSON that users write: lists of captions, lists under a key, captions by name; and lines with their own split."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.config import TrainConfig
from lora_blip.data import annotations, summary
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError
from lora_blip.training.examples import split_by_column

TWO = [("1.png", "a one"), ("1.png", "a two"), ("2.png", "a one"), ("2.png", "a two")]
LISTED = [{"image": name, "captions": ["a one", "a two"]} for name in ("1.png", "2.png")]
DOCUMENTS = {
    "a list": LISTED,
    "another key": [{"image": entry["image"], "caption": entry["captions"]} for entry in LISTED],
    "objects": [{"image": entry["image"], "sentences": [{"raw": text} for text in entry["captions"]]} for entry in LISTED],
    "data": {"version": 1, "data": LISTED},
    "annotations": {"info": {}, "annotations": LISTED},
    "items": {"items": LISTED},
    "by name": {entry["image"]: entry["captions"] for entry in LISTED},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_an_image_and_a_text_may_be_objects(folder, name):
    """`datasets` writes {"bytes": null, "path": …}. Other values of the image are named."""
    lines = [{"image": {"bytes": None, "path": "1.png"}, "caption": {"text": "a cat", "lang": "en"}}]
    lines.append({"image": {"path": "2.png", "width": 3}, "caption": "a dog"})
    path = folder / name
    path.write_text(json.dumps(lines) if name == "x.json" else "".join(json.dumps(line) + "\n" for line in lines))
    assert [(e.name, e.text) for e in annotations.read(path)[0]] == [("1.png", "a cat"), ("2.png", "a dog")]
    for value, shown in ((None, "null"), ({"width": 3}, r"\{'width': 3\}"), (7, "7"), ("", "empty")):
        path.write_text(
            json.dumps([{"image": value, "text": "a"}]) if name == "x.json" else json.dumps({"image": value, "text": "a"})
        )
        with pytest.raises(DataError, match=f"no image: 'image' is {shown}; expected the path of an image"):
            annotations.read(path)


def test_the_correction_of_a_comma_at_the_end_of_a_list_names_its_line(folder):
    (folder / "x.json").write_text('[\n{"image": "1.png", "text": "a"},\n{"image": "2.png", "text": "b"},\n]\n')
    with pytest.raises(DataError, match=r'write in line 3: \{"image": "2\.png", "text": "b"\}$'):
        annotations.read(folder / "x.json")


def test_a_list_of_images_of_an_unknown_layout_is_not_named_as_incomplete(folder):
    (folder / "x.json").write_text(json.dumps({"images": [{"file": {"name": "1.png"}, "notes": [{"caption": "a"}]}]}))
    with pytest.raises(DataError, match="the format of this JSON file is unknown"):
        annotations.read(folder / "x.json")


@pytest.mark.parametrize("kind", [*DOCUMENTS, "lines", "indented"])
def test_a_list_of_captions_gives_a_line_for_each_in_training_and_in_prepare(folder, kind):
    path = folder / ("x.jsonl" if kind == "lines" else "x.json")
    content = "".join(json.dumps(entry) + "\n" for entry in LISTED) if kind == "lines" else ""
    path.write_text(content or json.dumps(DOCUMENTS.get(kind, LISTED), indent=2 if kind == "indented" else None))
    assert [(e.name, e.text) for e in annotations.read(path)[0]] == TWO
    lines = prepare(PrepareConfig(source=str(path), splits="1", output_dir=str(folder / "out")))["train"].read_text()
    assert [(Path(one["image"]).name, one["text"]) for one in map(json.loads, lines.splitlines())] == TWO


def test_a_caption_by_name_and_one_object_per_line_in_brackets_are_read(folder):
    (folder / "x.json").write_text('{"1.png": "a", "2.png": "b"}')
    assert [(e.name, e.text, e.line) for e in annotations.read(folder / "x.json")[0]] == [
        ("1.png", "a", "1.png"),
        ("2.png", "b", "2.png"),
    ]
    (folder / "x.json").write_text('[\n{"image": "1.png", "text": "a"},\n{"image": "2.png", "text": "b"}\n]\n')
    assert [(e.name, e.text) for e in annotations.read(folder / "x.json")[0]] == [("1.png", "a"), ("2.png", "b")]


@pytest.mark.parametrize("texts", [[], [3.5, None], [["a"]]])
def test_a_list_without_texts_is_a_reason(folder, texts):
    (folder / "x.json").write_text(json.dumps([{"image": "1.png", "captions": texts}, {"image": "2.png", "text": "b"}]))
    examples, problems = annotations.read(folder / "x.json", on_bad_data="skip")
    assert examples[-1].text == "b" and "expected a text" in problems[0].reason


def test_a_document_without_images_is_refused_with_its_keys(folder):
    (folder / "x.json").write_text('{"rows": [{"a": 1}], "x": 2}')
    with pytest.raises(DataError, match=r"the format of this JSON file is unknown \(it has the keys rows, x\)"):
        annotations.read(folder / "x.json")


SPLIT = [("1.png", "train"), ("2.png", "Validation"), ("3.png", "test"), ("3.png", "other")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_the_split_of_a_line_decides_between_training_and_validation(folder, suffix, capsys):
    path = folder / f"x.{suffix}"
    entries = [{"image": name, "text": "a", "split": split} for name, split in SPLIT]
    path.write_text(
        json.dumps(entries)
        if suffix == "json"
        else "".join(json.dumps(entry) + "\n" for entry in entries)
        if suffix == "jsonl"
        else "image,text,split\n" + "".join(f"{name},a,{split}\n" for name, split in SPLIT)
    )
    sides: dict[str, list] = {}
    examples, _ = annotations.read(path, splits=sides, report=print)
    assert {side: [e.name for e in some] for side, some in sides.items()} == {
        "train": ["1.png"],
        "val": ["2.png"],
        "test": ["3.png"],
    }
    assert len(examples) == 4 and "ignored: 'split = other' (1 line," in capsys.readouterr().out
    training, validation = split_by_column(TrainConfig(annotations=str(path)), sides, len(examples))
    assert ([e.name for e in training], [e.name for e in validation]) == (["1.png"], ["2.png"])
    assert "1 train, 1 val, 1 test (left out), 1 line left out" in capsys.readouterr().out


def test_without_a_val_split_the_validation_images_are_drawn_from_train(folder):
    (folder / "x.csv").write_text("image,text,split\n1.png,a,train\n2.png,b,train\n3.png,c,test\n")
    sides: dict[str, list] = {}
    examples, _ = annotations.read(folder / "x.csv", splits=sides)
    training, validation = split_by_column(TrainConfig(val_fraction=0.5), sides, len(examples))
    assert len(training) == len(validation) == 1 and {e.name for e in training + validation} == {"1.png", "2.png"}


def test_a_list_of_problems_with_long_paths_is_bounded():
    """Twenty problems have at most 450 characters each. A single problem is complete, because its end contains the fix."""
    problems = [annotations.Problem(Path("a.json"), number, "x" * 3000 + " fix") for number in range(25)]
    lines = summary.listing(problems).splitlines()
    assert len(lines) == 21 and max(map(len, lines)) <= 450 and all(line.endswith(" fix") for line in lines[:20])
    assert "x" * 3000 in summary.listing(problems[:1])


def test_a_long_advice_is_written_once_in_a_list_of_problems():
    advice, other = "; choose a checkpoint" + ", or another one" * 9, "; shorten it"
    problems = [annotations.Problem(Path("a.json"), line, f"the text {line} is unknown{advice}") for line in range(3)]
    problems += [annotations.Problem(Path("a.json"), line, f"the text {line} is too long{other}") for line in (3, 4)]
    lines = summary.listing(problems).splitlines()
    assert lines[:3] == [f"a.json:{n}: the text {n} is unknown" for n in range(3)]
    assert [line.endswith(other) for line in lines[3:]] == [True, True, False] and lines[5] == advice[2:]
