"""The table that training and `prepare` print: what was read, what was left out and why, and three samples."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.summary import Sample, spread, summary
from lora_blip.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    return tmp_path


def table(command: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command prints about a file. Both leave out invalid lines."""
    if command == "train":
        annotations.read(path, on_bad_data="skip")
    else:
        prepare(PrepareConfig(source=str(path), splits="1", output_dir=str(path.parent / "out"), on_bad_data="skip"))
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_the_table_of_a_csv_names_delimiter_encoding_counts_and_samples(folder, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = folder / "x.csv"
    rows = "1.png;un café\r\n1.png;deux\r\n2.png;\r\n3.png;fin\r\n"
    path.write_bytes(f"image;caption\r\n{rows}".encode("cp1252"))
    out = table(command, path, capsys)
    assert f"read      {path}: 4 entries (csv, a semicolon between columns), images in {folder}" in out
    assert f"{path} is read as Windows-1252" in out
    assert "\nimages    2\n" in out and "\ncaptions  3\n" in out and "\nleft out  1 line\n" in out
    assert f"{path}:4: the text is empty" in out
    shown = out[out.index("samples") :].splitlines()[:3]
    assert [line[10:].rpartition("/")[2] for line in shown] == ["1.png → un café", "1.png → deux", "3.png → fin"]
    assert all(len(line) <= 80 for line in shown)


def image_in(command: str, folder: Path, name: str) -> str:
    """Return the path of an image as the table shows it. The images are not below the output folder of `prepare`."""
    return name if command == "train" else str(folder / name)


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_the_table_of_questions_counts_the_left_out_entries_by_their_reasons(folder, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    good = [{"image": f"{n}.png", "question": "what?", "answers": ["a", "a", "b"]} for n in (1, 2)]
    path = folder / "x.json"
    path.write_text(json.dumps([*good, {"image": "3.png", "question": "why?", "answers": []}, {"image": "3.png"}]))
    out = table(command, path, capsys)
    assert f"{path}: 4 entries (json), images in {folder}" in out and "between columns" not in out
    assert "\nquestions 2\n" in out and "captions  " not in out
    assert "\nleft out  2 lines\n" in out and "[2]: " in out and "[3]: " in out
    assert f"{image_in(command, folder, '1.png')} → what? → a | b" in out


def test_missing_and_broken_images_are_counted_together(folder, capsys, monkeypatch):
    """Direct reading has one row for all missing images, as `prepare` has, and not one for each path."""
    monkeypatch.setenv("COLUMNS", "400")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    (folder / "bad2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 60)
    names = ["1.png", *(f"gone{n}.png" for n in range(30)), "bad.png", "2.png", "bad2.png"]
    path = folder / "x.csv"
    path.write_text("image,caption\n" + "".join(f"{name},a\n" for name in names) + "3.png,\n3.png,\n")
    out = table("train", path, capsys)
    rows = [line.strip() for line in out[out.index("left out") : out.index("samples")].splitlines()]
    assert rows[0] == "left out  34 lines" and len(rows) == 4
    assert rows[1].startswith(f"30 × an image that does not exist, first {path}:3: {folder / 'gone0.png'} does not exist")
    assert any(row.startswith(f"2 × an image that cannot be decoded, first {path}:33: ") for row in rows)
    assert f"2 × such as {path}:36: the text is empty" in rows


def test_both_commands_count_the_entries_that_are_left_out(folder, capsys):
    """The row of a file counts all entries of a file, also those that its data set marks as rejected."""
    images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2, 3)]
    texts = [{"image_id": n, "caption": "a", "is_rejected": n == 2} for n in (1, 2, 3)]
    path = folder / "x.json"
    path.write_text(json.dumps({"images": images, "annotations": texts}))
    for command in ("train", "prepare"):
        assert f"{path}: 3 entries (coco)" in table(command, path, capsys)


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_hostile_texts_are_escaped_and_cut_to_one_line(folder, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    path = folder / "x.json"
    texts = ["\x1b[2J\x1b]0;title\x07", "a\u202eb", "long " * 100]
    path.write_text(json.dumps([{"image": "1.png", "text": text} for text in texts]))
    out = table(command, path, capsys)
    shown = out[out.index("samples") :].splitlines()[:3]
    assert all(line.isprintable() and len(line) <= 90 for line in shown) and "\x1b" not in out and "\u202e" not in out
    assert shown[2].endswith("…")


def test_a_sample_with_line_breaks_is_one_line():
    text = summary(["a\nb"], 1, {"captions": 1}, 1, ["c\nd"], [Sample("e\nf", "g\r\nh")])
    assert len(text.splitlines()) == 6 and r"e\nf → g\r\nh" in text


def test_samples_are_spread_over_the_data():
    assert [spread(count) for count in (0, 1, 2, 3, 101)] == [[], [0], [0, 1], [0, 1, 2], [0, 50, 100]]


def test_one_problem_of_all_lines_is_one_line(folder):
    """Paths and corrected lines may differ. `prepare` does not decode images, so only training finds broken ones."""

    def prepared(path: Path) -> None:
        prepare(PrepareConfig(source=str(path), output_dir=str(folder / "out")))

    for name in "123":
        (folder / f"{name}.jpg").write_text("<html>")
    unescaped = "".join(f'{{"image": "D:\\data\\{n}.png", "text": "a"}}\n' for n in range(1, 4))
    broken = "".join(f'{{"image": "{n}.jpg", "text": "a"}}\n' for n in range(1, 4))
    for read, content, reason in (
        (annotations.read, unescaped, "are not escaped; write: "),
        (prepared, unescaped, "are not escaped; write: "),
        (annotations.read, broken, "is not a usable image"),
    ):
        (folder / "x.jsonl").write_text(content)
        with pytest.raises(DataError, match=rf"x\.jsonl:1: .*{reason}.* \(all 3 lines have this problem\)") as error:
            read(folder / "x.jsonl")
        assert "x.jsonl:2" not in str(error.value)


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_lines_that_repeat_an_image_and_its_text_are_counted(folder, command, capsys):
    path = folder / "x.csv"
    path.write_text("image,caption\n1.png,a\n1.png,b\n2.png,a\n")
    assert "repeated" not in table(command, path, capsys)
    shutil.rmtree(folder / "out", ignore_errors=True)
    path.write_text("image,caption\n1.png,a\n1.png,b\n2.png,a\n1.png,a\n1.png,a\n")
    assert "\ncaptions  5\nrepeated  2\n" in table(command, path, capsys)


def test_tiny_images_are_named_with_their_sizes(tmp_path, capsys):
    """A side of 4 pixels is enough for a test image, and one pixel is probably a tracking image or a damaged export."""
    for name, size in (("a.png", (1, 1)), ("b.png", (2000, 1)), ("c.png", (4, 4))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "x.csv").write_text("image,caption\na.png,a\nb.png,b\nc.png,c\n")
    assert len(annotations.read(tmp_path / "x.csv")[0]) == 3
    names = f"{tmp_path / 'a.png'} (1 × 1), {tmp_path / 'b.png'} (2000 × 1); remove"
    assert f"warning: 2 images with fewer than 4 pixels in a row or a column: {names}" in capsys.readouterr().out


def test_the_folder_of_the_images_is_relative_if_it_is_below_the_current_one(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "x.csv").write_text("image,caption\n1.png,a\n")
    annotations.read("x.csv", folder)
    assert "images in .\n" in capsys.readouterr().out


def test_the_answer_of_a_long_question_is_shown():
    """Before, the line was cut at its end, so a short answer was hidden by its question."""
    line = Sample("1.jpg", "", "what color is the cube that is on top of the other one?", ("blue", "blue", "navy")).shown(60)
    assert line.endswith("… → blue | navy") and len(line) <= 60
