"""IMAGE_ROOT: it serves all annotations, is not used for folders with captions, and never changes images silently."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError

COLORS = {"train": "red", "val": "blue"}


def photos(folder: Path, color: str, start: int = 0, count: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(start, start + count):
        Image.new("RGB", (4, 4), color).save(folder / f"{n}.png")
    return folder


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of images and a folder of annotations, as COCO has them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations").mkdir()
    for start, (split, color) in zip((0, 5), COLORS.items(), strict=True):
        photos(tmp_path / f"{split}2017", color, start)
        document = {
            "images": [{"id": n, "file_name": f"{n}.png"} for n in range(start, start + 5)],
            "annotations": [{"image_id": n, "caption": f"{color} {n}"} for n in range(start, start + 5)],
        }
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(document))
    return tmp_path / "annotations"


def test_the_root_of_one_split_gives_the_folder_of_all_images(coco):
    """Before, the fix for the validation file made the images of the training file missing."""
    with pytest.raises(
        DataError, match=r"none of its images \(5\) is in .*train2017; '5\.png' does not exist there; these images"
    ) as error:
        annotations.read(coco / "captions_val2017.json", "train2017")
    assert "set IMAGE_ROOT to '.', which contains both (--image-root .)" in str(error.value)
    for split, color in COLORS.items():
        examples = annotations.read(coco / f"captions_{split}2017.json", ".")[0]
        assert len(examples) == 5 and all(example.text.startswith(color) for example in examples)


def test_images_that_are_nowhere_get_the_usual_fix(coco):
    (coco.parent / "val2017").rename(coco.parent / ".elsewhere")
    with pytest.raises(DataError, match=r"set IMAGE_ROOT \(--image-root\) to the folder of the images$"):
        annotations.read(coco / "captions_val2017.json", "train2017")


@pytest.mark.parametrize("root", ["train", ".", "val"])
def test_texts_beside_their_images_keep_them_whatever_the_root_is(tmp_path, monkeypatch, root):
    """Before, the texts of a folder were paired with images of the same names in IMAGE_ROOT."""
    monkeypatch.chdir(tmp_path)
    for split, color in COLORS.items():
        for image in photos(tmp_path / split, color).glob("*.png"):
            image.with_suffix(".txt").write_text(f"a {color} picture")
    messages: list[str] = []
    examples = annotations.read("val", root, report=messages.append)[0]
    assert {example.image.parent.name for example in examples} == {"val"} and len(examples) == 5
    unused = "val: IMAGE_ROOT is not used, because the images are in this folder"
    assert (unused in messages) == (root != "val")
    files = prepare(PrepareConfig(source="val", images=root, output_dir="out", splits="1"))
    images = [json.loads(line)["image"] for line in files["train"].read_text().splitlines()]
    assert len(images) == 5 and all(image.split("/")[-2] == "val" for image in images)


def test_other_images_of_the_same_names_are_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, color in COLORS.items():
        photos(tmp_path / split, color)
        (tmp_path / split / "captions.csv").write_text("image,text\n" + "".join(f"{n}.png,{color}\n" for n in range(5)))
    messages: list[str] = []
    annotations.read("val/captions.csv", "train", report=messages.append)
    (warning,) = [message for message in messages if isinstance(message, str) and "WARNING" in message]
    assert f"{tmp_path / 'val'} has images of the same names, and IMAGE_ROOT is used instead: {tmp_path / 'train'}." in warning
    (tmp_path / "both.csv").write_text("image,text\n0.png,a\n")
    with pytest.raises(
        DataError, match=r"set IMAGE_ROOT to it, such as --image-root train\b"
    ):  # relative to the working folder
        annotations.read("both.csv")
    with pytest.raises(
        DataError, match=r"'0\.png' may be 'train/0\.png' or 'val/0\.png'; these images are in .*set IMAGE_ROOT to ''"
    ):
        annotations.read("val/captions.csv", ".")
    for root in ("val", ""):
        messages.clear()
        annotations.read("val/captions.csv", root, report=messages.append)
        assert not [message for message in messages if isinstance(message, str) and "WARNING" in message]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_names_in_a_list_are_found_in_the_folders_beside_it(tmp_path, suffix):
    """`Flickr_8k.testImages.txt` lists names only, and the images are in Images/. Before, only annotations were searched."""
    photos(tmp_path / "Images", "red")
    names = [f"{n}.png" for n in (3, 1)]
    path = tmp_path / f"list{suffix}"
    path.write_text("".join(f"{name}\n" if suffix == ".txt" else f'{{"image": "{name}"}}\n' for name in names))
    source = ImageSource(path)
    assert [example.image for example in source] == [tmp_path / "Images" / name for name in names]
    assert source.moved_line == f"{path}: 2 image paths were found in {tmp_path} by the last parts: '3.png' is Images/3.png"
    (tmp_path / "lists").mkdir()
    moved = path.rename(tmp_path / "lists" / path.name)
    source = ImageSource(moved, str(tmp_path / "Images"))
    assert [open_example(example).getpixel((0, 0)) for example in source] == [(255, 0, 0)] * 2
    assert not source.moved_line
    assert [example.image for example in ImageSource(moved)] == [tmp_path / "lists" / name for name in names]  # missing


@pytest.mark.parametrize("kind", ["captions.txt", "Flickr8k.token.txt", "results.csv"])
def test_flickr_files_in_another_encoding_are_read_and_reported(tmp_path, capsys, kind):
    """Before, Kaggle's captions.txt was read as Windows-1252 without a message, and the others were refused."""
    photos(tmp_path / "Images", "red", count=2)
    lines = {
        "captions.txt": ["image,caption", "0.png,un café", "1.png,a cube"],
        "Flickr8k.token.txt": ["0.png#0\tun café", "1.png#0\ta cube"],
        "results.csv": ["image_name| comment_number| comment", "0.png| 0| un café", "1.png| 0| a cube"],
    }[kind]
    (tmp_path / kind).write_bytes("\n".join(lines).encode("cp1252"))
    examples = annotations.read(tmp_path / kind)[0]
    assert [example.text for example in examples] == ["un café", "a cube"]
    assert f"{kind} is read as Windows-1252, and not UTF-8" in capsys.readouterr().out
    split = tmp_path / "Flickr_8k.trainImages.txt"
    split.write_text("0.png\n")
    fix = (
        "write an image"
        if kind == "results.csv"
        else f"give the file with the texts, which uses this list as a split: {tmp_path / kind}"
    )
    with pytest.raises(DataError, match=re.escape(f"{split} is a list of images without texts; {fix}")):
        annotations.read(split)
