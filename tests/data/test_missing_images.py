"""Images that are missing, and folders with one table: the same result in `prepare` and in training."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError

NAMES = ("img/0.png", "img/1.png", "img/2.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    return tmp_path


def documents(names: tuple[str, ...]) -> dict[str, object]:
    """Return the formats that users write or export, with a text for each image."""
    entries = [{"image": name, "caption": "a"} for name in names]
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    return {
        "json": entries,
        "data": {"data": entries},
        "by name": {name: ["a", "b"] for name in names},
        "coco": {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": number, "caption": "a"} for number in range(len(names))],
        },
        "llava": [{"image": name, "conversations": conversation} for name in names],
        "kohya": {name: {"caption": "a"} for name in names},
        "labelstudio": [{"data": {"image": name}, "annotations": [{"result": [{"value": {"text": ["a"]}}]}]} for name in names],
        "labelstudio_min": [{"image": name, "caption": "a", "annotator": 1, "annotation_id": 1} for name in names],
    }


@pytest.mark.parametrize("kind", documents(()))
def test_a_missing_image_of_a_list_is_an_error_with_its_place_and_the_nearest_name(folder, kind):
    """`prepare` once left it out and called the list a published data set."""
    path = folder / "x.json"
    path.write_text(json.dumps(documents((*NAMES, "img/01.png"))[kind]))
    settings = PrepareConfig(source=str(path), output_dir=str(folder / "out"), splits="1")
    for read in (lambda: prepare(settings), lambda: annotations.read(path)):
        with pytest.raises(
            DataError, match=r"x\.json: .*img/01\.png does not exist; the nearest existing name is 'img/"
        ) as error:
            read()
        assert "--on-bad-data skip" in str(error.value) and not (folder / "out").exists()
    prepare(PrepareConfig(**{**vars(settings), "on_bad_data": "skip"}))
    dropped = [json.loads(line) for line in (folder / "out" / "dropped.jsonl").read_text().splitlines()]
    assert {line["why"] for line in dropped} == {"fault"}


def test_a_missing_image_of_coco_s_own_files_is_left_out_and_counted(folder, capsys):
    path = folder / "captions_train2017.json"
    path.write_text(json.dumps(documents((*NAMES, "img/gone.png"))["coco"]))
    prepare(PrepareConfig(source=str(path), output_dir=str(folder / "out"), splits="1"))
    assert "1 have no image file" in capsys.readouterr().out


def test_if_all_images_are_missing_one_error_names_the_setting(folder):
    path = folder / "x.jsonl"
    path.write_text("".join(f'{{"image": "{name}", "text": "a"}}\n' for name in ("a.png", "b.png", "c.png")))
    with pytest.raises(
        DataError, match=r"none of its images \(3\) is in .*'a\.png' does not exist there; set IMAGE_ROOT"
    ) as error:
        annotations.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["captions.csv", "data.jsonl", "labels.json", "x.tsv"])
def test_the_only_table_of_a_folder_is_read_whatever_its_name(folder, name):
    lines = {
        ".csv": "image,caption\n" + "".join(f"{name},a\n" for name in NAMES),
        ".tsv": "".join(f"{name}\ta\n" for name in NAMES),
        ".jsonl": "".join(json.dumps({"image": name, "text": "a"}) + "\n" for name in NAMES),
        ".json": json.dumps(documents(NAMES)["json"]),
    }
    (folder / name).write_text(lines[Path(name).suffix])
    assert [(e.name, e.text) for e in annotations.read(folder)[0]] == [(image, "a") for image in NAMES]
    files = prepare(PrepareConfig(source=str(folder), output_dir=str(folder / "out"), splits="1"))
    assert len(files["train"].read_text().splitlines()) == 3
    (folder / "other.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="image"):
        annotations.read(folder)


@pytest.mark.parametrize(
    ("name", "content"), [("t.tsv", "a cat\thttp://x.org/1.jpg\n"), ("s.json", '{"image_urls": [], "captions": []}')]
)
def test_a_folder_with_a_list_of_addresses_recommends_img2dataset(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for read in (lambda: annotations.read(tmp_path), lambda: prepare(PrepareConfig(source=str(tmp_path)))):
        with pytest.raises(DataError, match="pip install img2dataset"):
            read()


def test_questions_and_answers_in_two_files_are_read_by_either_name_and_by_both(tmp_path):
    name = "COCO_val2014_000000000042.jpg"
    Image.new("RGB", (2, 2)).save(tmp_path / name)
    question = {"image_id": 42, "question": "is it red?", "question_id": 1}
    answer = {"question_id": 1, "answers": [{"answer": "yes"}, {"answer": "no"}]}
    (tmp_path / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))
    (tmp_path / "annotations.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": [answer]}))
    first, second = tmp_path / "questions.json", tmp_path / "annotations.json"
    for source in (first, second, f"{first},{second}", tmp_path):
        (example,) = annotations.read(source)[0]
        assert (example.name, example.question, example.answers) == (name, "is it red?", ("yes", "no"))


def test_a_list_of_images_without_texts_says_so(tmp_path):
    (tmp_path / "x.txt").write_text("a.jpg\nb.jpg\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"x\.txt is a list of images without texts; write an image, a tab and its text"):
        annotations.read(tmp_path / "x.txt")


@pytest.mark.parametrize(("count", "fix"), [(1, "give --splits 1"), (2, "give --splits 1, and for two parts --splits 0.8,0.2")])
def test_too_few_images_for_the_splits_give_the_flag(folder, count, fix):
    (folder / "x.tsv").write_text("".join(f"{name}\ta\n" for name in NAMES[:count]))
    with pytest.raises(DataError, match=fix + "$"):
        prepare(PrepareConfig(source=str(folder / "x.tsv"), output_dir=str(folder / "out"), splits="0.8,0.1,0.1"))


@pytest.mark.parametrize(("count", "parts"), [(1, "train.jsonl"), (2, "train.jsonl and val.jsonl"), (3, "")])
def test_the_default_splits_of_one_or_two_images_have_fewer_parts(folder, count, parts, capsys):
    (folder / "x.tsv").write_text("".join(f"{name}\ta\n" for name in NAMES[:count]))
    files = prepare(PrepareConfig(source=str(folder / "x.tsv"), output_dir=str(folder / "out")))
    assert list(files) == ["train", "val", "test"][:count]
    assert all(len(path.read_text().splitlines()) == 1 for path in files.values())
    out = capsys.readouterr().out
    images = "1 image is" if count == 1 else f"{count} images are"
    assert (f"{images} too few for train, val and test, so the output is only {parts}\n" in out) == bool(parts)
    assert " 1 caption of 1 image " in out


def test_names_whose_zeros_and_suffix_a_spreadsheet_removed_give_the_nearest_name(tmp_path):
    """Before, the fix was the folder of the images, which was right."""
    for n in range(1, 5):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{n:04}.jpg")
    (tmp_path / "x.csv").write_text("image,text\n" + "".join(f"{n},a\n" for n in range(1, 5)))
    with pytest.raises(DataError, match=r"the nearest name there is '0001\.jpg'; correct the names, or set IMAGE_ROOT"):
        annotations.read(tmp_path / "x.csv")
