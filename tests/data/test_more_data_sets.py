"""Data sets as other tools lay them out, read by `prepare` and directly."""

import io
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError

GENOME = [{"id": 7, "regions": [{"region_id": 1, "image_id": 7, "phrase": "the clock", "x": 1}, {"phrase": "a wall"}]}]
GQA = {"0412": {"imageId": "7", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is."}}
A_OKVQA = [{"split": "train", "image_id": 7, "question_id": "q", "question": "What?", "direct_answers": ["a", "b"]}]


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), "red").save(path)
    return path


@pytest.mark.parametrize("layout", ["project", "export"])
def test_via_2_gives_the_attribute_of_each_file(tmp_path, layout):
    attributes = [{"caption": "a cat", "by": "me"}, {"words": "a dog"}, {}]
    images = {}
    for number, each in enumerate(attributes):
        photo(tmp_path / f"{number}.jpg")
        images[f"{number}.jpg{number}"] = {"filename": f"{number}.jpg", "size": number, "regions": [], "file_attributes": each}
    document = {"_via_settings": {}, "_via_img_metadata": images} if layout == "project" else images
    (tmp_path / "x.json").write_text(json.dumps(document))
    examples, _ = annotations.read(tmp_path / "x.json")
    assert [(e.name, e.text) for e in examples] == [("0.jpg", "a cat"), ("1.jpg", "a dog")]
    images["2.jpg2"]["file_attributes"] = {"one": "a", "two": "b"}
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"2\.jpg2: it has the file attributes 'one', 'two'; rename the one"):
        annotations.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("name", "fix"),
    [("a.xml", "CSV or JSON"), ("a b.yaml", "yaml"), ("a.ods", "save it as"), ("a.zip", "unpack it"), ("a.sqlite", "export")],
)
def test_a_file_of_annotations_in_an_unreadable_format_is_named(tmp_path, name, fix):
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04" if name.endswith(("ods", "zip")) else b"- image: 1.jpg\n  text: a cat\n")
    with pytest.raises(DataError, match=f"is an? .*{fix}"):
        annotations.read(path)


def test_the_command_that_converts_yaml_works(tmp_path):
    pytest.importorskip("yaml")
    photo(tmp_path / "1.jpg")
    path = tmp_path / "a b.yaml"
    path.write_text("- image: 1.jpg\n  text: a cat\n")
    with pytest.raises(DataError) as error:
        annotations.read(path)
    words = shlex.split(str(error.value).partition("convert it: ")[2])
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert [(e.name, e.text) for e in annotations.read(path.with_suffix(".json"))[0]] == [("1.jpg", "a cat")]


@pytest.mark.parametrize(
    ("document", "image", "expected"),
    [
        (GENOME, "VG_100K/7.jpg", [("the clock", "", ()), ("a wall", "", ())]),
        (GQA, "images/7.jpg", [("", "Is it red?", ("yes",))]),
        (A_OKVQA, "coco/train2017/000000000007.jpg", [("", "What?", ("a", "b"))]),
    ],
)
def test_visual_genome_gqa_and_a_okvqa_are_read(tmp_path, document, image, expected):
    photo(tmp_path / image)
    (tmp_path / "x.json").write_text(json.dumps(document))
    examples, _ = annotations.read(tmp_path / "x.json")
    assert [(e.text, e.question, e.answers) for e in examples] == expected and {e.image.name for e in examples} == {
        Path(image).name
    }
    files = prepare(PrepareConfig(source=str(tmp_path / "x.json"), output_dir=str(tmp_path / "out"), splits="1"))
    assert len(files["train"].read_text().splitlines()) == len(expected)


@pytest.mark.parametrize(
    "document",
    [
        [{"id": 7, "regions": None}, {"id": 7, "regions": [3, {"phrase": None}]}, 5],
        {"1": {"imageId": "7", "question": "q"}, "2": 3},
        [{"image_id": -1, "direct_answers": []}, {"image_id": True, "direct_answers": 3}, None],
    ],
)
def test_a_damaged_entry_is_a_reason(tmp_path, document):
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"x\.json: .*expected"):
        annotations.read(tmp_path / "x.json")


@pytest.mark.parametrize("key", ["caption", "text", "description"])
def test_a_shard_s_json_may_have_any_common_name_of_the_text(tmp_path, key):
    image = photo(tmp_path / "1.jpg").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in (("1.jpg", image), ("1.json", json.dumps({key: "a cube"}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    files = prepare(PrepareConfig(source=str(tmp_path / "0.tar"), output_dir=str(tmp_path / "out"), splits="1"))
    assert json.loads(files["train"].read_text())["text"] == "a cube"
