"""Folders and published files in the layouts of other tools: each gives its captions, or one error with the fix."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import Mock

import pytest
from PIL import Image

from lora_blip.config import EvaluateConfig, TrainConfig
from lora_blip.data import annotations
from lora_blip.data.prepare import detection
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.splits import trained_test_folders
from lora_blip.errors import DataError
from lora_blip.evaluation import comparison
from lora_blip.evaluation.leak_search import search_leaks
from lora_blip.inference import questions
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.training.examples import read_examples, read_file
from lora_blip.training.setup import how_to_hold_out

Lines = list[dict]


def photos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(folder / name, format="png")
    return folder


def write(path: Path, content: str | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path: Path):
    """run(source, …) → the lines of train.jsonl."""

    def run(source: Path, **settings: object) -> Lines:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        files = prepare(PrepareConfig(source=str(source), output_dir=str(output), splits="1", **settings))
        return [json.loads(line) for line in files["train"].read_text().splitlines()]

    return run


def pairs(lines: Lines) -> list[tuple[str, str]]:
    return [(Path(line["image"]).name, line["text"]) for line in lines]


def read_directly(source: Path) -> list[tuple[str, str]]:
    return [(Path(example.name).name, example.text) for example in annotations.read(source)[0]]


# ---------------------------------------------------------------- folders


def test_a_caption_file_in_windows_1252_is_read_and_reported(run, tmp_path, capsys):
    """A file with one damaged byte among letters of UTF-8 is an error."""
    folder = photos(tmp_path / "set", "1.png", "2.png")
    (folder / "1.txt").write_bytes("un café à Paris – 5 €".encode("cp1252"))
    write(folder / "2.txt", "drei Hühner")
    expected = [("1.png", "un café à Paris – 5 €"), ("2.png", "drei Hühner")]
    for read_all in (lambda: pairs(run(folder)), lambda: read_directly(folder)):
        assert sorted(read_all()) == expected
        assert capsys.readouterr().out.count("1 text file, such as '1.txt': read as Windows-1252") == 1
    (folder / "1.txt").write_bytes("é à ü".encode() + b"\xe9")
    with pytest.raises(DataError, match=r"1\.txt: it is not UTF-8"):
        read_directly(folder)


def test_a_caption_file_with_several_lines_is_one_caption_and_is_reported(run, tmp_path, capsys):
    """Other tools write a caption in each line. A line break at the end is not another line."""
    folder = photos(tmp_path / "set", "1.png", "2.png")
    write(folder / "1.txt", "a red cube\n\na toy\n")
    write(folder / "2.txt", "a cone\n")
    for read_all in (lambda: pairs(run(folder)), lambda: read_directly(folder)):
        assert sorted(read_all()) == [("1.png", "a red cube a toy"), ("2.png", "a cone")]
        note = (
            "1 text file with several lines, such as '1.txt': each file is one caption; if each line is a caption, write JSONL"
        )
        assert capsys.readouterr().out.count(note) == 1


def test_each_image_has_the_caption_of_the_text_file_next_to_it(run, tmp_path):
    """kohya's layout: .txt or .caption, nested, with spaces in the names. Training reads it directly."""
    photos(tmp_path / "set", "10_sks dog/img 1.png", "10_sks dog/img 2.jpg", "b/c/3.webp", "b/4.png")
    write(tmp_path / "set" / "10_sks dog" / "img 1.txt", "sks dog,\n sitting\n")
    write(tmp_path / "set" / "10_sks dog" / "img 2.caption", "\ufeffa dog")
    write(tmp_path / "set" / "b" / "c" / "3.txt", "drei Hühner")
    write(tmp_path / "set" / "b" / "4.png.txt", "four")
    write(tmp_path / "set" / "README.txt", "this is no caption")
    expected = [("img 1.png", "sks dog, sitting"), ("img 2.jpg", "a dog"), ("4.png", "four"), ("3.webp", "drei Hühner")]
    assert sorted(pairs(run(tmp_path / "set"))) == sorted(expected) == sorted(read_directly(tmp_path / "set"))


def test_a_text_file_without_its_image_is_reported(run, tmp_path, capsys):
    photos(tmp_path / "set", "a.png")
    write(tmp_path / "set" / "a.txt", "one")
    write(tmp_path / "set" / "b.txt", "two")
    assert pairs(run(tmp_path / "set")) == [("a.png", "one")]
    assert "a text file without an image" in capsys.readouterr().out
    assert read_directly(tmp_path / "set") == [("a.png", "one")]
    assert "a text file without an image" in capsys.readouterr().out


def test_an_image_without_its_text_file_is_an_error_with_the_name_of_that_file(run, tmp_path):
    photos(tmp_path / "set", "a.png", "b.png", "c.png")
    write(tmp_path / "set" / "a.txt", "one")
    write(tmp_path / "set" / "c.txt", "")
    with pytest.raises(DataError, match=r"b\.png: it has no caption; write one to b\.txt") as error:
        run(tmp_path / "set")
    assert "c.txt: this file cannot be read (it is empty); it should contain the caption of c.png" in str(error.value)
    assert pairs(run(tmp_path / "set", on_bad_data="skip")) == [("a.png", "one")]


def test_kohya_s_metadata_is_read_as_a_file_and_in_a_folder_without_text_files(run, tmp_path):
    photos(tmp_path / "set", "d/1.png", "d/2.png")
    meta = write(
        tmp_path / "set" / "meta_cap.json", {"d/1.png": {"caption": "one", "tags": "x"}, "d/2.png": {"tags": "two, 2"}}
    )
    assert pairs(run(meta)) == pairs(run(tmp_path / "set")) == [("1.png", "one"), ("2.png", "two, 2")]


def test_img2dataset_s_failed_downloads_are_counted_and_left_out(run, tmp_path, capsys):
    folder = photos(tmp_path / "set", "00000/000000000.jpg")
    for number, status in ((0, "success"), (1, "failed_to_download"), (2, "failed_to_download")):
        write(folder / "00000" / f"00000000{number}.json", {"status": status, "caption": f"photo {number}"})
        write(folder / "00000" / f"00000000{number}.txt", f"photo {number}")
    write(folder / "00000_stats.json", {"count": 3})
    assert pairs(run(folder)) == [("000000000.jpg", "photo 0")] == read_directly(folder)
    out = capsys.readouterr().out
    message = r"2 × .*img2dataset did not download this image \(failed_to_download\)"
    assert len(re.findall(message, out)) == 2  # by prepare, and by the direct reading


@pytest.mark.parametrize("name", ["{}.jpg.json", "{}.json", "{}.jpg.supplemental-metadata.json", "{}.jpg.supplemental-me.json"])
@pytest.mark.parametrize("key", ["description", "caption", "content", "title"])
def test_a_json_file_next_to_each_image_has_its_caption(run, tmp_path, name, key, capsys):
    """Google Takeout's title is the name of the file. Photos without a description are counted and left out."""
    folder = photos(tmp_path / "set", "a/1.jpg", "a/b.jpg", "a/3.jpg")
    for stem, text in (("1", "a cube"), ("b", "two"), ("3", " ")):
        write(folder / "a" / name.format(stem), {"title": f"{stem}.jpg", "likes": 3} | {key: text})
    assert sorted(pairs(run(folder))) == [("1.jpg", "a cube"), ("b.jpg", "two")] == sorted(read_directly(folder))
    assert "its JSON file has no description, caption or title" in capsys.readouterr().out


def test_a_damaged_json_file_next_to_an_image_is_named_and_other_json_files_are_no_captions(run, tmp_path):
    folder = photos(tmp_path / "set", "1.jpg", "2.jpg")
    write(folder / "1.json", {"shapes": [], "imagePath": "1.jpg"})  # labelme
    write(folder / "2.json", {"version": "1"})
    with pytest.raises(DataError, match=r"without captions; .*exiftool -csv -r -Description \. > captions\.csv"):
        run(folder)
    write(folder / "1.json", {"description": "a cube"})
    write(folder / "2.json", '{"description": ')
    with pytest.raises(DataError, match=r"2\.json: it is not valid JSON .* the caption of 2\.jpg"):
        run(folder)
    write(folder / "captions.csv", "SourceFile,Description\n./1.jpg,a cube\n")  # written by exiftool
    assert pairs(run(folder / "captions.csv")) == [("1.jpg", "a cube")] == read_directly(folder / "captions.csv")


def test_class_folders_need_a_template(run, tmp_path):
    folder = photos(tmp_path / "set", "red_fox/1.png", "cat/1.png")
    with pytest.raises(DataError, match=re.escape('--template "a photo of a {class}"')) as error:
        run(folder)
    assert "cat/1.png is then" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="--template"):
        annotations.read(folder)
    lines = run(folder, template="a photo of a {class}")
    assert [line["text"] for line in lines] == ["a photo of a cat", "a photo of a red fox"]
    with pytest.raises(DataError, match=r"several folders .*--template"):
        run(folder, template="a photo")


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("10_sks dog/1.png", "10_sks dog/2.png")])
def test_a_template_without_a_class_is_the_caption_of_all_images_of_one_folder(run, tmp_path, names):
    folder = photos(tmp_path / "set", *names)
    assert [line["text"] for line in run(folder, template="a photo of sks dog")] == ["a photo of sks dog"] * 2
    if "/" in names[0]:
        assert run(folder, template="a {class}")[0]["text"] == "a sks dog"  # without kohya's number of repeats
    else:
        with pytest.raises(DataError, match=r'without captions; .*--template "\{name\}"'):
            run(folder, template="a {class}")


def test_a_template_of_the_file_name_gives_captions(run, tmp_path):
    folder = photos(tmp_path / "set", "a red dog_001.png", "b/a_cat_2.png", "b/7.png", "b/{class}.png")
    texts = sorted(line["text"] for line in run(folder, template="{name}"))
    assert texts == ["7", "a cat", "a red dog", "{class}"]


@pytest.mark.parametrize("loose", [["x.png"], ["x.png", "y.png", "z.png"]])
def test_an_image_beside_class_folders_is_the_reason_why_a_template_cannot_be_used(run, tmp_path, loose):
    """Before, the error asked for text files with captions, and did not name the images without a class."""
    folder = photos(tmp_path / "set", "cat/a.png", "dog/b.png", *loose)
    count = "3 images are" if len(loose) > 1 else "1 image is"
    with pytest.raises(
        DataError, match=re.escape(f"{count} directly in {folder}, such as x.png, so the class is unknown; move")
    ):
        run(folder, template="a photo of a {class}")
    for name in loose:
        (folder / name).unlink()
    assert [line["text"] for line in run(folder, template="a photo of a {class}")] == ["a photo of a cat", "a photo of a dog"]


def test_train_and_val_above_class_folders_are_splits(tmp_path):
    photos(tmp_path / "set", "train/cat/1.png", "val/cat/2.png", "train/dog/3.png")
    config = PrepareConfig(source=str(tmp_path / "set"), output_dir=str(tmp_path / "o"), template="a {class}")
    files = prepare(config)
    assert [len(files[side].read_text().splitlines()) for side in ("train", "val")] == [2, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train/1", "train/2", "test/3", "valid/4"), {"train": 2, "test": 1, "val": 1}),
        (("Train/a/1", "test/a/1"), {"train": 1, "test": 1}),
        (("train/1", "car/2"), {}),  # pictures of trains
        (("train/1", "test/2", "3"), {"train": 1, "test": 1}),  # one stray image
        (("train/1", "test/2", "3", "4", "5"), {}),
        (("train/1", "train/2"), {}),
        (("val/1", "test/2"), {}),
    ],
)
def test_folders_of_splits_above_images_with_text_files_are_splits(tmp_path, capsys, names, expected):
    """Before, a training learned from the images in test/, too."""
    folder = photos(tmp_path / "set", *(f"{name}.png" for name in names))
    for name in names:
        (folder / f"{name}.txt").write_text(f"a picture of {name[-1]}")
    splits: dict[str, Any] = {}
    examples, _ = annotations.read(folder, splits=splits)
    assert len(examples) == len(names) and {name: len(some) for name, some in splits.items()} == expected
    assert "ignored" not in capsys.readouterr().out
    annotations.read(folder)  # as references, without splits
    assert "ignored" not in capsys.readouterr().out
    if expected:
        files = prepare(PrepareConfig(source=str(folder), output_dir=str(tmp_path / "o")))
        assert {side: len(files[side].read_text().splitlines()) for side in expected} == expected


def split_folder(folder: Path) -> Path:
    """Return a folder with train/0.png, train/1.png, val/2.png, test/3.png and their text files."""
    names = [f"{split}/{n}" for n, split in enumerate(("train", "train", "val", "test"))]
    for n, name in enumerate(names):
        photos(folder, f"{name}.png")
        Image.new("RGB", (9, 9), (60 * n, 0, 255 - 60 * n)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {n}")
    return folder


def test_the_case_of_a_text_file_does_not_matter_if_its_image_is_clear(tmp_path):
    """Cameras and DOS write IMG_1.TXT beside IMG_1.JPG. An exact name comes first, and an unclear one is not used."""
    names = ("IMG_1.JPG", "b.png", "c.png", "C.png", "d.png", "e.png", "E.png", "F/1.png")
    texts = {
        "IMG_1.TXT": "one", "B.Txt": "two", "c.TXT": "unclear", "d.txt": "four", "D.TXT": "other", "e.txt": "five",
        "F/1.PNG.txt": "six",
    }  # fmt: skip
    for name in names:
        photos(tmp_path, name)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    lines, problems = annotations.read(tmp_path, on_bad_data="skip")
    assert {e.name: e.text for e in lines} == {
        "IMG_1.JPG": "one",
        "b.png": "two",
        "d.png": "four",
        "e.png": "five",
        "F/1.png": "six",
    }
    assert sorted(str(problem.line) for problem in problems) == ["C.png", "E.png", "c.png"]


def split_files(folder: Path, files: dict[str, int]) -> Path:
    """Write tables with as many images as given, and return their folder. The images are in the folder photos beside it."""
    (photos := folder.with_name("photos")).mkdir()
    for name, count in files.items():
        table = folder / name
        table.parent.mkdir(parents=True, exist_ok=True)
        rows = [f"{table.parent.name}_{table.stem}_{n}.png" for n in range(count)]
        for row in rows:
            Image.new("RGB", (9, 9), (37 * len(row) % 256, 60 + 9 * int(row[-5]), sum(map(ord, row)) % 256)).save(photos / row)
        table.write_text("image,text\n" + "".join(f"{row},{row}\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"train_1.csv": 3, "train_2.csv": 2, "val.csv": 2, "test.csv": 1},
        {"train/a.csv": 3, "train/b.csv": 2, "val/a.csv": 2, "test/c.csv": 1},
    ],
)
def test_listed_files_have_the_splits_of_their_names(tmp_path, make, files):
    """Before, the splits were ignored if the rest of the names differed: test images were trained on."""
    folder, photos = split_files(tmp_path / "set", files), str(tmp_path / "photos")
    with pytest.raises(DataError, match=r"contains several files \(.*\); give all of them: --annotations") as error:
        annotations.read(folder)
    source = shlex.split(str(error.value).partition("--annotations ")[2])[0]
    config = TrainConfig(annotations=source, image_root=photos)
    training, validation, drawn, _ = read_examples(config, CaptionTask(make("blip")))
    assert (len(training), len(validation), drawn) == (5, 2, False)
    written = prepare(PrepareConfig(source=source, images=photos, output_dir=str(tmp_path / "out")))
    assert {split: len(path.read_text().splitlines()) for split, path in written.items()} == {"train": 5, "val": 2, "test": 1}
    for image in Path(photos).iterdir():
        image.rename(folder / image.name)
    with pytest.raises(DataError, match="if these files contain the captions: --annotations ") as error:
        annotations.read(folder)
    listed = shlex.split(str(error.value).partition("the captions: --annotations ")[2].partition(";")[0])[0]
    assert sorted(listed.split(",")) == sorted(source.split(","))


def test_a_listed_file_without_a_split_beside_files_with_splits_is_an_error(tmp_path):
    folder = split_files(tmp_path / "set", {"train.csv": 2, "extra.csv": 2, "test.csv": 1})
    source = ",".join(str(folder / name) for name in ("train.csv", "extra.csv", "test.csv"))
    with pytest.raises(DataError, match=r"the name of .*extra\.csv has no split, .* train_extra\.csv if it is for training"):
        annotations.read(source)
    lines, _ = annotations.read(",".join(str(folder / name) for name in ("train.csv", "extra.csv")), tmp_path / "photos")
    assert len(lines) == 4
    with pytest.raises(DataError, match=r"give one of them: --annotations .*/(extra|train)\.csv$"):  # and not the test file
        annotations.read(folder)


def test_lines_of_an_unknown_split_are_counted_apart(tmp_path, capsys, make):
    """Before, they were counted with those of the test."""
    splits = ["Training"] * 5 + ["Validierung"] * 2 + ["Test"]
    photos(tmp_path, *(f"{n}.png" for n in range(8)))
    (tmp_path / "x.csv").write_text(
        "image,text,split\n" + "".join(f"{n}.png,a {n},{split}\n" for n, split in enumerate(splits))
    )
    read_examples(TrainConfig(annotations=str(tmp_path / "x.csv"), val_fraction=0.2), CaptionTask(make("blip")))
    numbers = "5 train, 0 val, 1 test (left out), 2 lines left out: the split is none of train, val and test\n"
    printed = capsys.readouterr().out
    assert f"its splits are used: {numbers}" in printed
    assert "these keys are ignored: 'split = Validierung' (2 lines, first line 7)\n" in printed


@pytest.mark.parametrize(
    ("splits", "file", "expected"),
    [
        ("0,1", "val.jsonl", 'next: train with VAL_ANNOTATIONS = "out/val.jsonl" (--val-annotations out/val.jsonl)'),
        ("0,0,1", "test.jsonl", "next: lora-blip evaluate --references out/test.jsonl"),
    ],
)
def test_validation_and_test_images_are_not_trained_on(tmp_path, capsys, monkeypatch, splits, file, expected):
    """Before, an error advised `--splits 1` for a validation file, and the next line trained on its images."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "a.csv").write_text("image,text\n" + "".join(f"{n}.png,a {n}\n" for n in range(4)))
    prepare(PrepareConfig(source="a.csv", output_dir="out", splits=splits))
    assert [path.name for path in Path("out").iterdir()] == [file] and len(Path("out", file).read_text().splitlines()) == 4
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_the_next_command_keeps_the_validation_file_if_only_train_is_wanted(tmp_path, capsys, monkeypatch):
    """The command that converts ANNOTATIONS writes no validation file. Before, the next command removed VAL_ANNOTATIONS."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "train.py").write_text('import lora_blip\nVAL_ANNOTATIONS = "prepared_val/val.jsonl"\n')
    (tmp_path / "a.csv").write_text("image,text\n" + "".join(f"{n}.png,a {n}\n" for n in range(4)))
    for number, (splits, expected) in enumerate((("1", False), ("0.5,0,0.5", True))):
        prepare(PrepareConfig(source="a.csv", output_dir=f"out{number}", splits=splits))
        assert ("--val-annotations ''" in capsys.readouterr().out) == expected


@pytest.mark.parametrize("table", [True, False])
def test_a_folder_test_without_a_folder_train_is_a_warning(tmp_path, make, capsys, table):
    """Before, its images were for training without a line. A source of only such folders is the choice of the user."""
    for folder in ("lunes", "test"):
        (tmp_path / "a" / folder).mkdir(parents=True)
        photos(tmp_path / "a" / folder, *(f"{n}.png" for n in range(4)))
        for number in range(4):
            (tmp_path / "a" / folder / f"{number}.txt").write_text(f"a {number}")
    rows = "".join(f"{folder}/{n}.png,a {n}\n" for folder in ("lunes", "test") for n in range(4))
    (tmp_path / "a" / "x.csv").write_text(f"image,text\n{rows}")
    source = tmp_path / "a" / "x.csv" if table else tmp_path / "a"
    if not table:
        (tmp_path / "a" / "x.csv").unlink()
    config = TrainConfig(annotations=str(source), val_fraction=0.2)
    lines = read_examples(config, CaptionTask(make("blip")))
    assert len(lines.training) + len(lines.validation) == 8
    warning = "warning: 4 lines of 8 with an image in a folder that is named as a split, such as 'test/"
    assert warning in capsys.readouterr().out
    prepare(PrepareConfig(str(source), output_dir=str(tmp_path / "out")))
    assert warning in capsys.readouterr().out
    assert not trained_test_folders(["test/1.png", "test/2.png"]) and not trained_test_folders(["a/1.png", "2.png"])
    assert not trained_test_folders(["train/1.png", "test/2.png"])


def test_the_next_command_of_prepare_trains_on_questions(tmp_path, capsys, monkeypatch):
    """Before, it had no task, and the training asked for one."""
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    photos(tmp_path, *(f"{n}.png" for n in range(8)))
    rows = "".join(f"{n}.png,what is it?,a {n}\n" for n in range(8))
    (tmp_path / "x.csv").write_text(f"image,question,answer\n{rows}")
    prepare(PrepareConfig(source=str(tmp_path / "x.csv"), output_dir=str(tmp_path / "out")))
    next_line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    assert next_line.endswith("val.jsonl --task vqa")
    (tmp_path / "x.csv").write_text("image,text\n" + "".join(f"{n}.png,a {n}\n" for n in range(8)))
    prepare(PrepareConfig(source=str(tmp_path / "x.csv"), output_dir=str(tmp_path / "captions")))
    assert "--task" not in capsys.readouterr().out


def test_images_to_hold_out_are_not_moved_into_a_list_of_files(tmp_path):
    (tmp_path / "a.csv").touch()
    assert f"to {tmp_path / 'val.csv'}" in how_to_hold_out(str(tmp_path / "a.csv"), [])
    assert how_to_hold_out(f"{tmp_path}/a.csv,{tmp_path}/b.csv", []).startswith("hold them out in a file of their own")


def test_references_that_are_questions_name_the_task_of_a_retrieval_adapter(tmp_path, make):
    """Before, the fix was for a training."""
    photos(tmp_path, "1.png")
    (tmp_path / "q.jsonl").write_text('{"image": "1.png", "question": "what?", "answers": ["a"]}\n')
    adapter: Any = Mock(path=Path("run/adapter.safetensors"), task={"name": "retrieval"})
    with pytest.raises(DataError, match=r"it is a question, and retrieval needs texts; the adapter run/.* is for the task ret"):
        comparison.read_references(EvaluateConfig(references=str(tmp_path / "q.jsonl")), RetrievalTask(make("itm")), adapter)


def test_lines_of_other_splits_are_not_trained_on_if_there_is_a_validation_file(tmp_path, capsys, make):
    folder = split_folder(tmp_path / "set")
    config = TrainConfig(annotations=str(folder), val_annotations=str(folder / "val"))
    training, validation, drawn, scored = read_examples(config, CaptionTask(make("blip")))
    assert not drawn and scored == "test"  # the split that the last line of the training names
    assert [sorted(e.text for e in lines) for lines in (training, validation)] == [["picture 0", "picture 1"], ["picture 2"]]
    assert "its splits are used: 2 train, 2 left out; the validation lines are those of" in capsys.readouterr().out
    both = replace(config, val_annotations=config.annotations)
    _, validation, _, _ = read_examples(both, CaptionTask(make("blip")))
    assert [example.text for example in validation] == ["picture 2"]
    assert f"{folder}: its split val is used: 1 line, 3 lines left out; " in capsys.readouterr().out


def test_images_of_the_test_split_are_no_leaks(tmp_path):
    folder = split_folder(tmp_path / "set")
    for part, leaks in (("test", 0), ("val", 0), ("train", 2)):
        examples, _ = annotations.read(folder / part)
        found = search_leaks(
            EvaluateConfig(model="x", adapter="none", references="x", train_annotations=str(folder)), None, examples
        )
        assert len(found.leaks) == leaks and "among the 2 images" in found.note


def test_images_without_captions_say_what_to_do(run, tmp_path):
    folder = photos(tmp_path / "set", "a.png")
    write(folder / "words.json", [])
    write(folder / "x.json", [])  # the only file would be read
    with pytest.raises(
        DataError, match=r"without captions; write .*a\.txt for a\.png.*words\.json contains the captions: --source "
    ):
        run(folder)


@pytest.mark.parametrize("setting", ["annotations", "val_annotations", "references", "question"])
def test_a_table_in_a_folder_of_photos_is_given_by_the_flag_of_the_command(tmp_path, setting):
    """`prepare` has --source; the other commands have their own flags. Only `prepare` has --template."""
    folder = photos(tmp_path / "set", "a.png")
    for name in ("words.json", "x.json"):
        write(folder / name, [])
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(DataError, match=f"^{setting}: .*words.json contains the captions: {flag} .*words.json;") as error:
        annotations.read(folder, setting=setting)
    for option, template in re.findall(r"(\S+ \S+) --template (\S+)", str(error.value)):
        assert option == f'--source "{folder}"' and template
    with pytest.raises(DataError, match=f"or a folder: {flag} captions.csv"):
        annotations.read("a.csv,b.csv", setting=setting)


def test_a_table_beside_the_folder_of_photos_is_suggested(tmp_path):
    folder = photos(tmp_path / "photos", "a.png")
    write(tmp_path / "captions.jsonl", "")
    with pytest.raises(DataError, match=r"; if .*/captions\.jsonl contains the captions: --annotations .*/captions\.jsonl;"):
        annotations.read(folder)


def test_each_command_gives_its_setting_to_the_reader(tmp_path, monkeypatch):
    def read(*_: object, setting: str = "", **__: object) -> None:
        raise DataError(setting)

    monkeypatch.setattr(annotations, "read", read)
    task = Mock()
    config = TrainConfig(annotations="a.jsonl", val_annotations="b.jsonl")
    for setting, call in {
        "annotations": lambda: read_file(config, task, "a.jsonl", None),
        "val_annotations": lambda: read_file(config, task, "b.jsonl", None),
        "references": lambda: comparison.read_references(EvaluateConfig(references="a.jsonl"), task),
        "references ": lambda: questions.read_references("a.jsonl", "", []),
        "question": lambda: questions.examples_to_predict(
            Mock(takes_question=True), [], "q.jsonl", {}, [], annotations.NO_KEYS
        ),
    }.items():
        (tmp_path / "q.jsonl").touch()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=f"^{setting.strip()}$"):
            call()


# ---------------------------------------------------------------- published files


def test_flickr30k_s_three_formats_give_the_same_captions(run, tmp_path, capsys):
    """One row of results.csv lacks its second separator: it is named and counted, and no error."""
    folder = photos(tmp_path / "f", "flickr30k_images/1.jpg", "flickr30k_images/2.jpg")
    rows = [("1.jpg", 0, "A man , in black ."), ("1.jpg", 1, 'A "dog"'), ("2.jpg", 0, "Two .")]
    expected = [("1.jpg", "A man, in black."), ("1.jpg", 'A "dog"'), ("2.jpg", "Two.")]
    table = write(
        folder / "results.csv",
        "image_name| comment_number| comment\n" + "".join(f"{a}| {n}| {t}\n" for a, n, t in rows) + "2.jpg| 4   A dog runs .\n",
    )
    assert pairs(run(table)) == expected == read_directly(table)
    out = capsys.readouterr().out
    assert out.count(f"1 × {table}:5: the row has 2 columns instead of 3") == 2  # by prepare, and by the direct reading
    quoted = "".join('{},{}," {}"\n'.format(a, n, t.replace('"', '""')) for a, n, t in rows)
    assert pairs(run(write(folder / "captions.txt", f"image_name,comment_number,comment\n{quoted}"))) == expected
    write(folder / "results_20130124.token", "".join(f"{a}#{n}\t{t}\n" for a, n, t in rows))
    assert pairs(run(folder)) == expected


def test_vizwiz_s_rejected_and_canned_captions_are_counted_and_left_out(run, tmp_path, capsys):
    folder = photos(tmp_path / "v", "train/V_1.jpg", "val/V_2.jpg")
    for side, number in (("train", 1), ("val", 2)):
        flags = {"is_rejected": False, "is_precanned": False}
        captions = [{"caption": "good"} | flags, {"caption": "spam"} | flags | {"is_rejected": True}]
        captions += [{"caption": "Quality issues"} | flags | {"is_precanned": True}]
        document = {"images": [{"id": number, "file_name": f"V_{number}.jpg"}]}
        write(folder / "annotations" / f"{side}.json", document | {"annotations": [c | {"image_id": number} for c in captions]})
    assert pairs(run(folder)) == [("V_1.jpg", "good")]
    out = capsys.readouterr().out
    assert "2 × " in out and "rejected" in out and "standard caption" in out and "4 are not usable examples" in out
    assert read_directly(folder / "annotations" / "train.json") == [("V_1.jpg", "good")]


def test_textcaps_is_read(run, tmp_path):
    folder = photos(tmp_path / "t", "train/b0.jpg")
    entry = {
        "caption_str": "a clock",
        "image_id": "b0",
        "image_path": "train/b0.jpg",
        "set_name": "train",
        "reference_strs": [],
    }
    write(folder / "TextCaps_0.1_train.json", {"data": [entry, entry | {"caption_str": "noon"}]})
    assert pairs(run(folder)) == [("b0.jpg", "a clock"), ("b0.jpg", "noon")]
    with pytest.raises(DataError, match=r"data\[1\]: expected an object with the texts image_path and caption_str"):
        run(write(folder / "x.json", {"data": [entry, {"image_path": 3}]}))


def test_llava_s_conversations_give_each_question_with_its_answer(run, tmp_path, capsys):
    folder = photos(tmp_path / "l", "a.jpg")
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "a cat"), ("human", "And\n<image>"), ("gpt", "no")]
    talk = [{"from": role, "value": text} for role, text in turns]
    lines = run(write(folder / "llava.json", [{"id": "0", "image": "a.jpg", "conversations": talk}, {"conversations": talk}]))
    assert [(line["question"], line["answers"]) for line in lines] == [("What is it?", ["a cat"]), ("And", ["no"])]
    assert "the conversation has no image" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"\[0\]\.conversations\[0\]: this answer has no question before it"):
        run(write(folder / "bad.json", [{"image": "a.jpg", "conversations": talk[1:]}]))


def test_label_studio_s_full_and_min_exports_give_the_same_captions(run, tmp_path, capsys):
    """The image is found without Label Studio's own address. Skipped and empty tasks are counted."""
    folder = photos(tmp_path / "s", "images/0.jpg", "images/1.jpg")

    def task(image: str, *texts: str, **more: object) -> dict:
        result = [{"value": {"text": list(texts)}, "type": "textarea"}] if texts else []
        return {"id": 1, "annotations": [{"result": result} | more], "data": {"image": image}}

    full = [
        task("/data/upload/1/0.jpg", "one", "uno"),
        task("/data/upload/7/0a1b2c3d-1.jpg", "two"),
        task("/data/local-files/?d=images/1.jpg", "three"),
        task("/data/upload/1/1.jpg"),
        task("/data/upload/1/1.jpg", "skipped", was_cancelled=True),
    ]
    expected = [("0.jpg", "one"), ("0.jpg", "uno"), ("1.jpg", "two"), ("1.jpg", "three")]
    path = write(folder / "full.json", full)
    assert pairs(run(path)) == expected
    assert "2 × " in capsys.readouterr().out
    assert [example.text for example in annotations.read(path)[0]] == ["one", "uno", "two", "three"]
    base = {"annotator": 1, "annotation_id": 0}
    short = [
        base | {"image": "/data/upload/1/0.jpg", "caption": {"text": ["one", "uno"]}},
        base | {"image": "/data/upload/7/0a1b2c3d-1.jpg", "caption": "two"},
        base | {"image": "/data/local-files/?d=images/1.jpg", "caption": "three"},
        base | {"image": "/data/upload/1/1.jpg"},
    ]
    assert pairs(run(write(folder / "min.json", short))) == expected


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        (
            "cc3m.tsv",
            "a bus\thttp://x.com/a.JPG?m=800\na cat\thttp://y/1\n",
            "--input_format tsv --url_col url --caption_col caption",
        ),
        ("laion.csv", "caption,link\na bus,https://x/1.jpg\n", "--input_format csv --url_col link --caption_col caption"),
        ("sbu.json", {"image_urls": ["http://a/1.jpg"], "captions": ["a"]}, "--url_col image_urls --caption_col captions"),
        ("list.json", [{"image": "https://a/1.jpg", "text": "a"}], "--input_format json --url_col image --caption_col text"),
        ("x.jsonl", '{"url": "https://a/1.jpg", "caption": "a"}\n', "--input_format jsonl --url_col url --caption_col caption"),
    ],
)
def test_web_addresses_instead_of_files_are_one_error_with_img2dataset_s_command(run, tmp_path, name, content, command):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match="web addresses instead of image paths") as error:
        run(path)
    assert command in str(error.value)
    assert str(error.value).endswith(f"lora-blip prepare --source {path.stem}_images")
    assert ("printf 'caption\\turl\\n'" in str(error.value)) == (name == "cc3m.tsv")


def test_the_setting_format_accepts_each_format_that_is_detected():
    assert {*get_args(get_type_hints(PrepareConfig)["format"])} == {"auto", *detection.FORMATS}


def test_a_column_of_addresses_beside_file_names_is_no_error(run, tmp_path):
    photos(tmp_path, "a.jpg")
    assert pairs(run(write(tmp_path / "x.csv", "image,caption,source\na.jpg,one,https://x/1.jpg\n"))) == [("a.jpg", "one")]
    lines = write(tmp_path / "x.jsonl", '{"image": "a.jpg", "text": "one", "url": "https://x/1"}\n')
    assert pairs(run(lines)) == [("a.jpg", "one")]


def test_lines_without_a_split_beside_those_of_the_test_are_for_training(tmp_path, capsys, make):
    """Before, the lines of the test were trained on, and `prepare` drew new splits."""
    photos(tmp_path, *(f"{n}.png" for n in range(8)))
    source = tmp_path / "x.csv"
    source.write_text("image,text,split\n" + "".join(f"{n}.png,a {n},{'test' if n < 2 else ''}\n" for n in range(8)))
    config = TrainConfig(annotations=str(source), val_fraction=0.2)
    training, validation, _, scored = read_examples(config, CaptionTask(make("blip")))
    assert sorted(e.text for e in [*training, *validation]) == [f"a {n}" for n in range(2, 8)] and scored == "test"
    printed = capsys.readouterr().out
    assert f"{source}: no line has the split train; 6 lines without a known split are used for training\n" in printed
    assert "its splits are used: 6 train, 0 val, 2 test (left out)\n" in printed
    lines, _ = annotations.read(source, only=("test", "val"))
    assert [e.text for e in lines] == ["a 0", "a 1"]
    search = EvaluateConfig(model="x", adapter="none", references="x", train_annotations=str(source))
    assert "among the 6 images" in search_leaks(search, None, lines).note
    with pytest.raises(DataError, match=r'it has no split, but other lines have a split; set "split": "train"'):
        prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out")))
    source.write_text(source.read_text().replace(",\n", ",trainn\n"))
    with pytest.raises(DataError, match=r"its split is .*, but other lines have a split"):
        prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out")))
    source.write_text(source.read_text().replace(",trainn\n", ",test\n"))
    training, validation, _, scored = read_examples(config, CaptionTask(make("blip")))  # all lines are of one split
    assert len(training) + len(validation) == 8 and not scored


def test_only_the_lines_and_images_of_one_split_are_checked(tmp_path, capsys):
    """An invalid line stops only if it is of this split, or if its split is unknown."""
    photos(tmp_path, "1.png", "2.png")
    source = tmp_path / "x.csv"

    def read(*rows):
        source.write_text("image,text,split\n" + "".join(f"{row}\n" for row in rows))
        return [e.text for e in annotations.read(source, only=("test", "val"))[0]]

    valid = ["1.png,a,train", "2.png,b,test"]
    assert read(*valid, "gone.png,c,train", "1.png,,train", "gone.png,d,Val") == ["b"]
    assert "its split test is used: 1 line, 3 lines left out; " in capsys.readouterr().out
    for wrong in ("gone.png,c,test", "1.png,,test", "1.png,,", "1.png,a,test,more"):
        with pytest.raises(DataError, match=r"x\.csv:4: "):
            read(*valid, wrong)


def test_a_column_whose_values_are_splits_is_reported(tmp_path, capsys, make):
    """Before, it was only listed among the ignored keys, and the lines of the test were trained on."""
    photos(tmp_path, *(f"{n}.png" for n in range(6)))
    (tmp_path / "x.csv").write_text(
        "image,text,Used for,place\n" + "".join(f"{n}.png,a {n},{'train' if n < 4 else 'Test'},lab\n" for n in range(6))
    )
    read_examples(TrainConfig(annotations=str(tmp_path / "x.csv"), val_fraction=0.2), CaptionTask(make("blip")))
    warning = "\nwarning: the values of 'used_for' are splits, and are not used; rename it to split\n"
    assert warning in capsys.readouterr().out
    (tmp_path / "x.csv").write_text((tmp_path / "x.csv").read_text().replace("4.png,a 4,Test", "4.png,a 4,kitchen"))
    read_examples(TrainConfig(annotations=str(tmp_path / "x.csv"), val_fraction=0.2), CaptionTask(make("blip")))
    assert "are splits" not in capsys.readouterr().out


@pytest.mark.parametrize("others", [0, 1, 20])
def test_the_folders_of_the_images_are_the_splits_of_a_table_at_the_root(tmp_path, capsys, make, others):
    """As for a metadata.csv. Before, the images of the test were trained on. Images in no such folder are left out."""
    names = [f"{split}/{n}.png" for split, count in (("train", 4), ("val", 2), ("test", 2)) for n in range(count)]
    names += [f"other/{n}.png" for n in range(others)]
    photos(tmp_path, *names)
    rows = "".join(f"{tmp_path / name if n else name},a {name}\n" for n, name in enumerate(names))  # absolute paths too
    (tmp_path / "labels.csv").write_text(f"image,caption\n{rows}")
    config = TrainConfig(annotations=str(tmp_path / "labels.csv"), val_fraction=0.25)
    training, validation, _, scored = read_examples(config, CaptionTask(make("blip")))
    assert (len(training), len(validation), scored) == ((21, 7, "") if others == 20 else (4, 2, "test"))
    numbers = "its splits are used: 4 train, 2 val, 2 test (left out)"
    numbers += ", 1 line left out: the split is none of train, val and test" * (others == 1)
    assert (f"{numbers}\n" in capsys.readouterr().out) is (others < 20)


def test_files_with_the_name_of_a_split_are_not_divided_by_the_folders_of_their_images(tmp_path, make):
    """Such as those of `prepare`. prepare itself keeps the folders as splits."""
    names = [f"{split}/{n}.png" for split in ("train", "val", "test") for n in range(3)]
    photos(tmp_path, *names)
    rows = "".join(f"{name},a {name}\n" for name in names)
    for file in ("train.csv", "my_test.csv"):
        (tmp_path / file).write_text(f"image,caption\n{rows}")
    assert len(annotations.read(tmp_path / "my_test.csv", only=("test", "val"))[0]) == 9
    config = TrainConfig(annotations=str(tmp_path / "train.csv"), val_fraction=0.3)
    training, validation, _, _ = read_examples(config, CaptionTask(make("blip")))
    assert len(training) + len(validation) == 9
    (tmp_path / "labels.csv").write_text(f"image,caption\n{rows}")
    prepare(PrepareConfig(source=str(tmp_path / "labels.csv"), output_dir=str(tmp_path / "out")))
    for split in ("train", "val", "test"):
        lines = [json.loads(line) for line in (tmp_path / f"out/{split}.jsonl").read_text().splitlines()]
        assert sorted(line["text"] for line in lines) == [f"a {split}/{n}.png" for n in range(3)]
