"""Image paths from another machine: the file that is meant is found, or the reason names the file and the fix."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.config import TrainConfig
from lora_blip.data import annotations, image_paths
from lora_blip.data.image_paths import SEVERAL, ImageFinder
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """cat/1.png, cat/2.png, dog/1.png, train/cat/3.png, top.png and sub/deep/4.png in a folder `data`."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "train/cat/3.png", "top.png", "sub/deep/4.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(path)
    return tmp_path / "data"


FOUND = {  # path as written → path under the root
    "cat/1.png": "cat/1.png",
    "cat\\1.png": "cat/1.png",
    "C:\\Users\\Me\\data\\cat\\1.png": "cat/1.png",
    "C:/Users/Me/other/dog/1.png": "dog/1.png",
    "/content/drive/MyDrive/cat/2.png": "cat/2.png",
    "\\\\server\\share\\cat\\2.png": "cat/2.png",
    "data/dog/1.png": "dog/1.png",
    "images/dog/1.png": "dog/1.png",
    "2.png": "cat/2.png",
    "/content/data/top.png": "top.png",
    "photos/top.png": "top.png",
    "deep/4.png": "sub/deep/4.png",
    "/mnt/deep/4.png": "sub/deep/4.png",
    "/content/ds/train/cat/3.png": "train/cat/3.png",
}
MISSING = {  # path as written → part of the reason
    "fish/1.png": "another folder has a file of this name: 'cat/1.png' or 'dog/1.png'",
    "fish/2.png": "does not exist; another folder has a file of this name: 'cat/2.png'",
    "/content/fish/2.png": "does not exist",
    "/content/val/cat/3.png": "does not exist; another folder has a file of this name: 'train/cat/3.png'",
    "1.png": "'1.png' may be 'cat/1.png' or 'dog/1.png'; write its folder too. If all images are in one of these",
    "cat/11.png": "does not exist; the nearest existing name is 'cat/1.png'",
    "../cat/9.png": "does not exist",
    "C:\\": "does not exist",
}


@pytest.mark.parametrize("written", FOUND)
def test_the_longest_ending_decides(root, written):
    path, reason = ImageFinder(root).find(written)
    assert not reason and Path(path).relative_to(root).as_posix() == FOUND[written]


@pytest.mark.parametrize("written", MISSING)
def test_a_folder_that_differs_or_a_name_of_several_files_is_no_match(root, written):
    path, reason = ImageFinder(root).find(written)
    assert not path and MISSING[written] in reason


def test_only_one_leading_folder_is_replaced_by_another(root):
    """/a → sub fits both lines; /b would make two different folders one."""
    finder = ImageFinder(root)
    assert finder.find("/a/deep/4.png")[0] == str(root / "sub/deep/4.png")
    assert "does not exist" in finder.find("/b/deep/4.png")[1]


def test_two_paths_cannot_be_one_file_by_its_name_alone(root):
    finder = ImageFinder(root)
    assert finder.find("a/top.png")[0] and not finder.find("b/top.png")[0]


def test_home_and_variables_are_expanded_in_lines_and_settings(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    for written in ("~/cat/1.png", "$HOME/cat/1.png", "${HOME}/cat/1.png"):
        assert ImageFinder(root / "dog").find(written)[0] == str(root / "cat/1.png")
        assert TrainConfig(annotations=written).annotations == str(root / "cat/1.png")
        assert PrepareConfig(source=f"{written},{written}").source == ",".join([str(root / "cat/1.png")] * 2)
    assert TrainConfig(prompt="~ $HOME").prompt == "~ $HOME"


def test_only_the_first_missing_images_get_a_suggestion(root, monkeypatch):
    monkeypatch.setattr(image_paths, "SUGGESTED", 1)
    finder = ImageFinder(root)
    assert [("nearest" in finder.find(f"cat/1{n}.png")[1]) for n in range(3)] == [True, False, False]


@pytest.mark.parametrize("decode", [True, False])
def test_training_and_prepare_report_how_many_paths_they_resolved(root, tmp_path, capsys, decode):
    names = ("C:\\x\\cat\\1.png", "C:\\x\\cat\\2.png", "dog/1.png")
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"image": name, "text": "a"}) + "\n" for name in names))
    examples, _ = annotations.read(source, root, decode=decode)
    assert [e.file for e in examples] == [str(root / name) for name in ("cat/1.png", "cat/2.png", "dog/1.png")]
    message = f"2 image paths were found in {root} by the last parts: 'C:\\\\x\\\\cat\\\\1.png' is cat/1.png"
    assert message in capsys.readouterr().out
    out = prepare(PrepareConfig(source=str(source), images=str(root), output_dir=str(tmp_path / "out"), splits="1"))["train"]
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == [e.file for e in examples]
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("blue_1.jpg", "blue_0001.jpg"),  # difflib alone finds blue_0160.jpg
        ("blue_00160.jpg", "blue_0160.jpg"),
        ("blue_0159.jpg", "blue_0160.jpg"),
        ("captions.jpg", ""),  # captions.jpg.txt is not an image
        ("mask.jpg", ""),  # only the suffix is similar
        ("orbit.png", ""),  # and only the kind of the suffix
    ],
)
def test_the_nearest_name_has_the_same_number_and_is_similar_without_its_suffix(tmp_path, written, near):
    for name in ("blue_0001.jpg", "blue_0160.jpg", "line.jpg", "singing.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "captions.jpg.txt").touch()
    (tmp_path / "x.jsonl").write_text(f'{{"image": "line.jpg", "text": "a"}}\n{{"image": "{written}", "text": "b"}}\n')
    with pytest.raises(DataError, match="does not exist") as error:
        annotations.read(tmp_path / "x.jsonl")
    assert (
        (f"the nearest existing name is {near!r}" in str(error.value))
        if near
        else ("the nearest existing name" not in str(error.value))
    )


def test_a_missing_image_is_named_with_its_line_and_its_neighbour(root, tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text('{"image": "cat/1.png", "text": "a"}\n{"image": "cat/12.png", "text": "b"}\n')
    for read in (
        lambda: annotations.read(source, root),
        lambda: prepare(PrepareConfig(source=str(source), images=str(root), output_dir=str(tmp_path / "out"))),
    ):
        with pytest.raises(DataError, match=r"x\.jsonl:2: .*cat/12\.png does not exist; the nearest existing name is 'cat/"):
            read()


@pytest.mark.parametrize(
    ("name", "content", "fixed"),
    [
        ("x.jsonl", '{"image": "img\\0.jpg", "text": "x"}\n', '{"image": "img/0.jpg", "text": "x"}'),
        ("x.jsonl", '{"image": "img\\new.jpg", "text": "x"}\n', '{"image": "img/new.jpg", "text": "x"}'),
        ("x.jsonl", '{"image": "C:\\Users\\b.jpg", "text": "é"}\n', '{"image": "C:/Users/b.jpg", "text": "é"}'),
        ("x.json", '[{"image": "img\\0.jpg", "text": "x"}]', '[{"image": "img/0.jpg", "text": "x"}]'),
        ("x.json", '[\n{"text": "x",\n "image": "img\\0.jpg"\n}]', '"image": "img/0.jpg"'),
    ],
)
def test_unescaped_backslashes_give_the_corrected_line(tmp_path, name, content, fixed):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="the backslashes of the image path are not escaped; write: ") as error:
        annotations.read(tmp_path / name)
    assert fixed in str(error.value)


@pytest.mark.parametrize(
    ("line", "fixed"),
    [
        ('{"image": "img\\0.jpg", "text": "x",}', '{"image": "img/0.jpg", "text": "x"}'),
        ("{'image': 'img\\0.jpg', 'text': 'a \"red\" cube', 'new': None,}",
         '{"image": "img/0.jpg", "text": "a \\"red\\" cube", "new": null}'),
        ("{'image': \"a's.jpg\", 'text': 'it\\'s C:\\dir \\u00e9', 'tags': [True, False, ], },",
         '{"image": "a\'s.jpg", "text": "it\'s C:\\\\dir \\u00e9", "tags": [true, false ] }'),
        ('{"image": "a.jpg", "text": "True, None, ,}", "seen": True},',
         '{"image": "a.jpg", "text": "True, None, ,}", "seen": true}'),
    ],
)  # fmt: skip
def test_several_faults_of_a_line_give_the_corrected_line(tmp_path, line, fixed):
    """Single quotes, words of Python, needless commas and lone backslashes, in any combination; texts are unchanged."""
    (tmp_path / "x.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1: it is not valid JSON") as error:
        annotations.read(tmp_path / "x.jsonl")
    assert f"write: {fixed}\n" in str(error.value) and json.loads(fixed)
    (tmp_path / "x.json").write_text(f"[\n{line.rstrip(',')},\n{line.rstrip(',')}\n]")
    with pytest.raises(DataError, match="other line") as error:
        annotations.read(tmp_path / "x.json")
    assert f"(and correct 1 other line in the same way): {fixed}" in str(error.value)


@pytest.mark.parametrize(
    "line", ["{'image': 'a.jpg', 'text': 'it's'}", '{"image": "a.jpg", "text": ', "{'image': 'a.jpg', 'image': 'b.jpg',}"]
)
def test_a_line_that_cannot_be_corrected_is_quoted(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match="it is not valid JSON") as error:
        annotations.read(tmp_path / "x.jsonl")
    assert "write" not in str(error.value) and line[:20] in str(error.value)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        ("image,text\na.jpg,a red cube\n", ".csv"), ("image\ttext\na.jpg\ta red cube\n", ".csv"),
        ('[\n{"image": "a.jpg", "text": "x"},\n]\n', ".json"),
    ],
)  # fmt: skip
def test_a_table_or_a_list_that_is_called_jsonl_gives_the_command_that_renames_it(tmp_path, content, suffix):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        annotations.read(path)
    assert str(error.value).splitlines()[-1].endswith(f"rename it: mv {path} {path.with_suffix(suffix)}")


@pytest.mark.parametrize("content", ["no line\n", "{\n", 'x, y\n{"image": "a.jpg", "text": 1}\n'])
def test_another_invalid_file_is_not_to_be_renamed(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        annotations.read(tmp_path / "x.jsonl")
    assert "rename" not in str(error.value) and "ON_BAD_DATA" in str(error.value)


def test_a_name_without_a_suffix_is_the_image_of_this_name(tmp_path):
    """Tables of ROCO, ImageCLEF and Kaggle name images without a suffix."""
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.v2.png", "c.txt"):
        (tmp_path / "images" / name).write_bytes(b"")
    finder = ImageFinder(tmp_path)
    assert [Path(finder.find(name)[0]).name for name in ("a", "b.v2", "c")] == ["a.jpg", "b.v2.png", ""]


def test_a_path_that_differs_in_capital_letters_is_found(root):
    finder = ImageFinder(root)
    assert finder.find("Cat/1.PNG") == (str(root / "cat/1.png"), "")
    assert finder.find("C:\\data\\DOG\\1.PNG") == (str(root / "dog/1.png"), "")
    assert finder.find("1.PNG")[1].endswith("may be 'cat/1.png' or 'dog/1.png'" + SEVERAL + str(root / "cat"))


def test_two_paths_cannot_be_one_file_in_different_capital_letters(root):
    finder = ImageFinder(root)
    assert finder.find("a/top.png")[0] and not finder.find("b/TOP.png")[0] and not finder.find("b/top.png")[0]
    finder = ImageFinder(root)
    assert finder.find("a/TOP.png")[0] and not finder.find("b/top.png")[0]


def test_a_file_address_is_a_path(root):
    (root / "my photos").mkdir()
    path = root / "my photos/é 1.png"
    path.touch()
    assert ImageFinder(root).find(path.as_uri()) == (str(path), "")
    assert ImageFinder(root).find("file:///C:/Users/me/my%20photos/%C3%A9%201.png") == (str(path), "")
