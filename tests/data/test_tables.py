"""Tables that Excel, pandas and other tools write: the delimiter, the quoting, the encoding and the columns are detected."""

import csv
import shlex
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.entries import IMAGE_KEYS, TEXT_KEYS
from lora_blip.data.formats import Keys
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.tables import csv_entries, tsv_entries
from lora_blip.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / name)
    return tmp_path


def read(path: Path, content: str | bytes, keys: Keys = Keys()) -> list[tuple[str, str]]:  # noqa: B008  # it is frozen
    """Write a file, and return (name, text) of its examples."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(e.name, e.text) for e in annotations.read(path, keys=keys, report=print)[0]]


BOTH = [("1.png", "a cat"), ("2.png", 'a "red", old; dog|x')]


@pytest.mark.parametrize("delimiter", list(",;\t|"))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_delimiter_is_detected_in_a_csv(folder, delimiter, mark):
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        csv.writer(file, delimiter=delimiter).writerows([("image", "caption"), *BOTH])
    assert [(e.name, e.text) for e in annotations.read(folder / "x.csv")[0]] == BOTH


@pytest.mark.parametrize("image", IMAGE_KEYS)
def test_each_common_name_of_the_image_is_known_in_any_case(folder, image):
    for name in (image, image.upper(), image.replace("_", " ").title(), f" {image} "):
        assert read(folder / "x.csv", f"{name},caption\n1.png,a\n") == [("1.png", "a")]


@pytest.mark.parametrize("text", TEXT_KEYS)
def test_each_common_name_of_the_text_is_known_in_any_case(folder, text):
    for name in (text, text.upper(), text.replace("_", " ").title()):
        assert read(folder / "x.csv", f"id,image,{name}\n7,1.png,a\n") == [("1.png", "a")]
    assert read(folder / "x.jsonl", f'{{"image": "1.png", "{text}": "a"}}\n') == [("1.png", "a")]


def test_a_header_of_unknown_names_lists_the_columns_and_the_flags_to_paste(folder):
    content = "Datei;Nr;Beschreibung\n1.png;17;eine Katze\n2.png;18;ein Hund\n"
    with pytest.raises(DataError) as error:
        read(folder / "x.csv", content)
    assert str(error.value).splitlines() == [
        f"{folder / 'x.csv'}:1: no column has a known name for the image; the columns are:",
        "  'Datei': '1.png'",
        "  'Nr': '17'",
        "  'Beschreibung': 'eine Katze'",
        'name the columns: --image-key "Datei" --text-key "Beschreibung"',
    ]
    assert read(folder / "x.csv", content, Keys("Datei", "Beschreibung")) == [("1.png", "eine Katze"), ("2.png", "ein Hund")]
    with pytest.raises(DataError, match="no column has the name 'Bild'; the columns are:\n  'Datei'") as error:
        read(folder / "x.csv", content, Keys("Bild"))
    assert str(error.value).endswith('\ndid you mean --image-key "Datei"?')  # by its content


@pytest.mark.parametrize(
    "wrong", ["Beschriftung", "beschriftung (deutsch", "Beschrifttung (deutsch)", "Die Beschriftung (deutsch)"]
)
def test_a_wrong_name_of_a_column_gives_the_flag_of_the_similar_one(folder, wrong):
    content = "Datei;Nr;Beschriftung (deutsch)\n1.png;17;eine Katze\n2.png;18;ein Hund\n"
    with pytest.raises(DataError) as error:
        read(folder / "x.csv", content, Keys("Datei", wrong))
    assert str(error.value).splitlines()[-1] == 'did you mean --text-key "Beschriftung (deutsch)"?'


def test_unknown_columns_of_questions_get_the_flags_of_questions(folder):
    content = "Datei;Nr;Frage;Antwort\n1.png;17;Welche Farbe?;rot\n2.png;18;Wie viele?;zwei\n"
    with pytest.raises(DataError) as error:
        read(folder / "x.csv", content)
    assert (
        str(error.value).splitlines()[-1]
        == 'name the columns: --image-key "Datei" --question-key "Frage" --answer-key "Antwort"'
    )
    (line,) = annotations.read(folder / "x.csv", keys=Keys("Datei", "", "Frage", "Antwort"))[0][:1]
    assert (line.question, line.answers) == ("Welche Farbe?", ("rot",))


def test_keys_name_the_columns_of_questions_and_the_keys_of_json(folder):
    keys = Keys("F", "", "Q", "A")
    for name, content in (
        ("x.csv", "F,Q,A\n1.png,what?,a|b\n"),
        ("x.tsv", "F\tQ\tA\n1.png\twhat?\ta|b\n"),
        ("x.jsonl", '{"F": "1.png", "Q": "what?", "A": ["a", "b"]}\n'),
        ("x.json", '[{"F": "1.png", "Q": "what?", "A": ["a", "b"]}]'),
    ):
        (folder / name).write_text(content)
        (example,) = annotations.read(folder / name, keys=keys)[0]
        assert (example.name, example.question, example.answers) == ("1.png", "what?", ("a", "b")), name
        settings = {"image_key": "F", "question_key": "Q", "answer_key": "A", "output_dir": str(folder / f"out {name}")}
        assert (
            '"question": "what?"'
            in prepare(PrepareConfig(source=str(folder / name), splits="1", **settings))["train"].read_text()
        )


def test_a_named_text_column_replaces_a_common_name(folder):
    assert read(folder / "x.csv", "image,text,long\n1.png,a,b\n", Keys(text="long")) == [("1.png", "b")]
    assert read(folder / "x.jsonl", '{"image": "1.png", "text": "a", "long": "b"}\n', Keys(text="long")) == [("1.png", "b")]


def test_lines_of_an_image_a_comma_and_a_text_are_read_from_a_text_file(folder):
    assert read(folder / "x.txt", "1.png, a cat\n2.png, a dog\n") == [("1.png", "a cat"), ("2.png", "a dog")]
    with pytest.raises(DataError, match="is a list of images without texts"):
        read(folder / "x.txt", "1.png\n2.png\n")


def test_a_json_list_that_is_called_jsonl_is_one_error_with_the_command_that_renames_it(folder):
    with pytest.raises(DataError) as error:
        read(folder / "x.jsonl", "[\n" + '{"image": "1.png", "text": "a"},\n' * 30 + "]\n")
    assert len(str(error.value).splitlines()) == 2 and f"mv {folder / 'x.jsonl'} {folder / 'x.json'}" in str(error.value)


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", '"sep=;"\n', "sep=;;\n"])
def test_the_line_that_names_the_delimiter_for_excel_is_not_a_header(folder, first, capsys):
    """A text with more commas than semicolons does not change the delimiter, and line numbers count this line."""
    assert read(folder / "x.csv", f"{first}image;caption\n1.png;a, b, c\n") == [("1.png", "a, b, c")]
    assert "a semicolon between columns" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"x\.csv:3: .*does not exist"):
        read(folder / "x.csv", f"{first}image;caption\n9.png;a\n")
    assert read(folder / "x.csv", "sep=^\nimage^caption\n1.png^a; b\n") == [("1.png", "a; b")]


def test_windows_1252_and_utf_16_have_their_accents_and_one_line_each(folder, capsys):
    for encoding, name, delimiter in (
        ("cp1252", "Windows-1252", ","),
        ("utf-16", "UTF-16", "\t"),
        ("cp1252", "Windows-1252", ";"),
    ):
        for suffix in ("csv", "tsv"):
            content = f"image{delimiter}caption\r\n1.png{delimiter}un café à “Paris” – 5 €\r\n".encode(encoding)
            assert read(folder / f"x.{suffix}", content) == [("1.png", "un café à “Paris” – 5 €")]
            printed = capsys.readouterr().out
            assert printed.count(f"x.{suffix} is read as {name}") == 1
    read(folder / "x.csv", "image,caption\n1.png,é\n")
    assert "is read as" not in capsys.readouterr().out


def test_one_damaged_byte_does_not_change_the_encoding_of_the_other_lines(folder):
    entries = "image,caption\n1.png,é à ü\n2.png,caf".encode() + b"\xe9\n"
    (folder / "x.csv").write_bytes(entries)
    examples, problems = annotations.read(folder / "x.csv", on_bad_data="skip")
    assert [e.text for e in examples] == ["é à ü"] and "not UTF-8" in problems[0].reason


def test_quotes_in_a_tsv_are_removed_only_if_pandas_wrote_them(folder):
    assert read(folder / "x.tsv", 'image\tcaption\n1.png\t"a 12"" pizza"\n2.png\tb\n') == [
        ("1.png", 'a 12" pizza'),
        ("2.png", "b"),
    ]
    assert read(folder / "x.tsv", 'image\tcaption\n1.png\t"two\nlines"\n2.png\tb\n') == [("1.png", "two lines"), ("2.png", "b")]
    assert read(folder / "x.tsv", '1.png\t"red" cube\n2.png\ta 5" tube\n') == [("1.png", '"red" cube'), ("2.png", 'a 5" tube')]
    assert read(folder / "x.tsv", '1.png\t"stop"\n2.png\tb\n') == [("1.png", '"stop"'), ("2.png", "b")]


def test_a_middle_column_of_whole_numbers_is_no_question(folder):
    assert read(folder / "x.tsv", "1.png\t0\ta cat\n2.png\t1\ta dog\n") == [("1.png", "a cat"), ("2.png", "a dog")]
    path = folder / "x.tsv"
    path.write_text("1.png\thow many?\t2\n")
    assert list(tsv_entries(path)) == [(1, {"image": "1.png", "question": "how many?", "answers": ["2"]})]


def test_a_csv_without_a_header_is_read_by_its_image_names(folder):
    assert read(folder / "x.csv", "1.png,a cat\n2.png,a dog\n") == [("1.png", "a cat"), ("2.png", "a dog")]
    with pytest.raises(DataError, match="--image-key"):
        list(csv_entries(_written(folder / "y.csv", "a,b\nc,d\n")))


def _written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_an_excel_workbook_without_openpyxl_says_how_to_save_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    for content in (b"PK\x03\x04rest", b"\xd0\xcf\x11\xe0rest"):
        with pytest.raises(
            DataError,
            match=r'x\.xlsx is an Excel workbook; .* pip install "lora_blip\[excel\]"; or in Excel, save it as "CSV',
        ):
            read(folder / "x.xlsx", content)


def test_an_excel_workbook_is_read_as_a_table(folder, monkeypatch):
    """A stand-in for openpyxl gives the cells; its errors become one error."""
    rows: list[tuple] = [
        ("Photo", "Caption", "n", None),
        (None, None, None, None),
        ("1.png", "a cat", 3.0, None),
        ("2.png", 5, None, None),
    ]
    sheet = types.SimpleNamespace(iter_rows=lambda **_: iter(rows))
    book = types.SimpleNamespace(worksheets=[sheet], close=lambda: None)
    monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=lambda *_, **__: book))
    with zipfile.ZipFile(folder / "x.xlsx", "w") as archive:
        archive.writestr("a", "b")
    assert [(e.name, e.text, e.line) for e in annotations.read(folder / "x.xlsx")[0]] == [
        ("1.png", "a cat", 3),
        ("2.png", "5", 4),
    ]
    (folder / "y.xlsx").write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match="is not a readable Excel workbook"):
        annotations.read(folder / "y.xlsx")


def test_a_real_workbook_gives_its_cells(folder):
    """With a number, an empty row and an empty column at the end."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["File", "Caption"], ["1.png", "crème brûlée"], [], ["2.png", 7, None]):
        book.active.append(row)
    book.create_sheet("notes").append(["not", "read"])
    book.save(folder / "x.xlsx")
    assert [(e.name, e.text, e.line) for e in annotations.read(folder / "x.xlsx")[0]] == [
        ("1.png", "crème brûlée", 2),
        ("2.png", "7", 4),
    ]


@pytest.mark.parametrize(
    ("header", "keys"), [(("Photo", "Caption"), {}), (("Bild", "Wort"), {"image": "bild", "text": "Wort"})]
)
def test_the_sheet_with_the_columns_is_read_in_a_workbook_with_several(folder, monkeypatch, header, keys):
    """A cover sheet, and a damaged one, come first. Without any known column, the error is about the first sheet."""

    def damaged(**_: object) -> Any:
        raise KeyError("sheet9.xml")
        yield

    cover, lists = [("Project: cubes", None), ("Author", "me")], [header, ("1.png", "a cat")]
    sheets = [types.SimpleNamespace(iter_rows=lambda rows=rows, **_: iter(rows)) for rows in (cover, lists)]
    sheets.insert(1, types.SimpleNamespace(iter_rows=damaged))
    book = types.SimpleNamespace(worksheets=sheets, close=lambda: None)
    monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=lambda *_, **__: book))
    with zipfile.ZipFile(folder / "x.xlsx", "w") as archive:
        archive.writestr("a", "b")
    assert [(e.name, e.text) for e in annotations.read(folder / "x.xlsx", keys=Keys(**keys))[0]] == [("1.png", "a cat")]
    sheets.pop()
    with pytest.raises(DataError, match=r"x\.xlsx:2: (.|\n)*'Author'"):
        annotations.read(folder / "x.xlsx")


def test_a_real_workbook_with_a_cover_sheet(folder):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["Captions of our cubes", "2026"])
    for row in (["File", "Caption"], ["1.png", "a cat"]):
        (book["data"] if "data" in book.sheetnames else book.create_sheet("data")).append(row)
    book.save(folder / "x.xlsx")
    assert [(e.name, e.text, e.line) for e in annotations.read(folder / "x.xlsx")[0]] == [("1.png", "a cat", 2)]


def test_a_title_above_a_table_and_a_cover_sheet_are_not_the_table(folder):
    """Neither is the error about them if the columns are unknown."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["Inventory", "2026"], ["Author", "me"]):
        book.active.append(row)
    sheet = book.create_sheet("list")
    for row in (["Our cubes"], [], ["Nr", "Datei", "Wort"], [1, "1.png", "a cat"], [2, "2.png", ""]):
        sheet.append(row)
    book.save(folder / "x.xlsx")
    with pytest.raises(DataError, match=r'x\.xlsx:3: no column has a known(.|\n)*--image-key "Datei" --text-key "Wort"$'):
        annotations.read(folder / "x.xlsx")
    lines = annotations.read(folder / "x.xlsx", keys=Keys("Datei", "Wort"), on_bad_data="skip")[0]
    assert [(e.name, e.text, e.line) for e in lines] == [("1.png", "a cat", 4)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("title", ["My photos{0}{0}\n", "My photos\n", "My photos\nof 2026{0}\n"])
def test_a_title_above_unknown_columns_of_a_csv_is_not_their_header(folder, delimiter, title):
    """Before, the fix in the message was --image-key "" --text-key ""."""
    rows = "".join(
        f"{delimiter.join(row)}\n" for row in (("Nr", "Datei", "Wort"), ("1", "1.png", "a cat"), ("2", "2.png", "a dog"))
    )
    (folder / "x.csv").write_text(title.format(delimiter) + rows)
    with pytest.raises(DataError, match=r'no column has a known(.|\n)*--image-key "Datei" --text-key "Wort"$'):
        annotations.read(folder / "x.csv")
    lines = annotations.read(folder / "x.csv", keys=Keys("Datei", "Wort"))[0]
    assert [(e.name, e.text) for e in lines] == [("1.png", "a cat"), ("2.png", "a dog")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", "1.png,\n2.jfif,a cat\n2.png,a dog\n", {}),  # no header; the first row has no text
        ("x.tsv", "1.png\t\n1.png\ta cat\n2.png\tseen at http://x.org\n", {"1.png": "a cat", "2.png": "seen at http://x.org"}),
        ("x.tsv", "Bild|image|text\na|1.png|a dog\nb|2.png|red, round\n", {"1.png": "a dog", "2.png": "red, round"}),
        ("x.csv", "image|text\n1.png|a dog\n2.png|red, round\n", {"1.png": "a dog", "2.png": "red, round"}),
    ],
)
def test_no_row_of_a_table_becomes_a_title(folder, name, content, expected):
    """A row with an image is no title, and a delimiter that needs no titles is better."""
    (folder / name).write_text(content)
    if expected:
        lines, problems = annotations.read(folder / name, on_bad_data="skip")
        assert {e.name: e.text for e in lines} == expected and len(lines) + len(problems) >= content.count(".png\t")
    else:
        with pytest.raises(DataError):
            annotations.read(folder / name)


def test_a_first_row_with_one_cell_above_rows_of_images_is_not_a_title(folder):
    """The file has no header, and its first row is incomplete. That row is an error, and no other row becomes a header."""
    (folder / "x.tsv").write_text("1.png\n1.png\ta cat\n2.png\ta dog\n")
    lines, problems = annotations.read(folder / "x.tsv", on_bad_data="skip")
    assert [e.text for e in lines] == ["a cat", "a dog"] and [problem.line for problem in problems] == [1]


def test_booleans_of_a_spreadsheet_are_yes_and_no(folder):
    """In JSON, they always were. Other spellings are texts, because they may be answers."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["image", "question", "answer"], ["1.png", "is it red?", True], ["2.png", "is it red?", False]):
        book.active.append(row)
    book.save(folder / "x.xlsx")
    (folder / "x.csv").write_text("image,question,answer\n1.png,is it red?,TRUE\n2.png,is it red?,FALSE\n1.png,is it?,true\n")
    for name, more in (("x.xlsx", []), ("x.csv", [("true",)])):
        assert [e.answers for e in annotations.read(folder / name)[0]] == [("yes",), ("no",), *more]
    (folder / "y.csv").write_text("image,question,Answer 1,answer_2\n1.png,is it red?,TRUE,FALSE\n2.png,is it?,true, TRUE\n")
    assert [e.answers for e in annotations.read(folder / "y.csv")[0]] == [("yes", "no"), ("true", "yes")]
    (folder / "z.csv").write_text("image,caption_1,caption_2\n1.png,TRUE,a\n")  # a caption is a text
    assert [e.text for e in annotations.read(folder / "z.csv")[0]] == ["TRUE", "a"]


def test_a_merged_cell_has_its_text_in_each_of_its_rows(folder):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["image", "text"], ["1.png", "a cat"], ["2.png", None], ["1.png", "a dog"], [None, None]):
        book.active.append(row)
    for cells in ("B2:B3", "B4:B5"):
        book.active.merge_cells(cells)
    book.save(folder / "x.xlsx")
    assert [(e.name, e.text) for e in annotations.read(folder / "x.xlsx")[0]] == [
        ("1.png", "a cat"), ("2.png", "a cat"), ("1.png", "a dog"),
    ]  # fmt: skip


def test_a_column_of_json_is_not_proposed_as_the_text(folder):
    rows = ["filename,size,file_attributes", '1.png,7,"{""caption"": ""a cat""}"', '2.png,8,"{""caption"": ""a dog""}"']
    path = _written(folder / "x.csv", "\n".join(rows))
    with pytest.raises(DataError, match=r"table of VIA.*as JSON"):
        annotations.read(path)
    path.write_text("\n".join(rows).replace("file_attributes", "labels"))
    with pytest.raises(DataError, match=r'name the columns: --text-key "COLUMN"$'):
        annotations.read(path)
    path.write_text("\n".join(["datei,more,wort", "1.png,{},a cat", '2.png,"{""a long word"": 1}",b']))
    with pytest.raises(DataError, match=r'--image-key "datei" --text-key "wort"$'):
        annotations.read(path)


@pytest.mark.parametrize(
    ("image", "text", "header", "row"),
    [
        ("Bilddatei", "Was", "Foto-Name,Bildtext", "1.png,a cat"),  # Bildtext is similar to Bilddatei, and has no image
        ("Bild", "Text auf Deutsch", "Foto,Bild Text", "1.png,a cat"),
        ("Datei", "Beschreibung", "Foto,Beschreibungsdatei,Satz", "1.png,2.png,a cat"),  # similar, and has images
    ],
)
def test_a_similar_name_of_a_column_with_other_content_is_not_meant(folder, image, text, header, row):
    """Before, the command for a validation file swapped the image and the text."""
    path = _written(folder / "v.csv", f"{header}\n{row}\n")
    with pytest.raises(DataError) as error:
        annotations.read(path, keys=Keys(image=image, text=text))
    words = shlex.split(str(error.value).splitlines()[-1].removeprefix("did you mean ").removesuffix("?"))
    found = dict(zip(words[::2], words[1::2], strict=True))
    keys = Keys(image=found["--image-key"], text=found["--text-key"])
    (example,), _ = annotations.read(path, keys=keys)
    assert example.text == "a cat" and example.name.endswith(".png")


def test_swapped_columns_are_named(folder):
    names = [f"{number}.png" for number in range(30)]
    path = _written(folder / "x.csv", "text,image\n" + "".join(f"{name},a cat of {name[:-4]} years\n" for name in names))
    fix = r"its texts are names of images, such as '0\.png': swap the names of the two columns"
    with pytest.raises(DataError, match=fix):
        annotations.read(path)
    with pytest.raises(DataError, match=fix):
        prepare(PrepareConfig(source=str(path), output_dir=str(folder / "prepared")))
    assert not (folder / "prepared").exists()


def test_a_table_without_a_valid_row_or_with_one_column_is_one_error(folder):
    """No such table ends in a traceback. Valid rows after many invalid ones are still read."""
    for content in ('"1.png,a\n', ""):
        (folder / "x.csv").write_text(content or "\n\n")
        with pytest.raises(DataError, match=r"x\.csv.*(not valid CSV|no usable line)"):
            annotations.read(folder / "x.csv")
    (folder / "x.csv").write_text('"a"b,c\n' * 60 + "image,caption\n1.png,a\n")  # more invalid rows than the sample has
    assert [e.text for e in annotations.read(folder / "x.csv", on_bad_data="skip")[0]] == ["a"]
    (folder / "x.csv").write_text("caption\na cat\n")
    with pytest.raises(DataError, match=r"x\.csv:1: the table has only one column, 'caption'"):
        annotations.read(folder / "x.csv")


def test_a_workbook_without_a_sheet_is_an_error(folder, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=lambda *_, **__: types.SimpleNamespace(worksheets=[]))
    )
    with zipfile.ZipFile(folder / "x.xlsx", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(DataError, match="not a readable Excel workbook"):
        annotations.read(folder / "x.xlsx")
