"""Several captions or answers of one line: numbered columns and keys, in every format."""

import csv
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.formats import Keys
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.several_texts import gathered
from lora_blip.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"image": "0.png", "caption_1": "a red cube", "caption_2": "a cube, red", "caption_3": "", "width": 4},
    {"image": "1.png", "caption_1": "a ball", "caption_2": "a blue ball", "caption_3": "one ball", "width": 4},
]
TEXTS = [
    ("0.png", "a red cube"),
    ("0.png", "a cube, red"),
    ("1.png", "a ball"),
    ("1.png", "a blue ball"),
    ("1.png", "one ball"),
]


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a file of this kind, and return its path."""
    path = folder / f"captions.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "xlsx":
        workbook = openpyxl.Workbook()
        for row in (list(rows[0]), *(list(row.values()) for row in rows)):
            workbook.active.append(row)
        workbook.save(path)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8), (9 * int(name[0]), 0, 0)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("names", ["caption_{}", "Caption {}", "caption{}", "text-{}", "sentence_0{}"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "xlsx"])
def test_numbered_columns_are_several_captions_and_empty_cells_are_left_out(folder, kind, names):
    rows = [{key.replace("caption_", "#"): value for key, value in row.items()} for row in ROWS]
    rows = [{names.format(key[1:]) if key[0] == "#" else key: value for key, value in row.items()} for row in rows]
    messages: list[str] = []
    examples = annotations.read(written(folder, kind, rows), report=messages.append)[0]
    assert [(example.name, example.text) for example in examples] == TEXTS
    assert "these keys are ignored: 'width' (5 lines, first line " in messages[0] and messages[0].count("first line") == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "xlsx", "parquet"])
def test_prepare_writes_a_line_for_each_numbered_caption(folder, kind):
    rows = [row | {"image": str(folder / row["image"])} for row in ROWS] if kind == "parquet" else ROWS
    source = written(folder, kind, rows)
    files = prepare(PrepareConfig(source=str(source), images=str(folder), output_dir=str(folder / "out"), splits="1"))
    lines = [json.loads(line) for line in files["train"].read_text(encoding="utf-8").splitlines()]
    assert [(Path(line["image"]).name, line["text"]) for line in lines] == TEXTS


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "xlsx"])
def test_numbered_answers_of_a_question_are_its_answers(folder, kind):
    rows = [{"image": "0.png", "question": "color?", "answer_1": "red", "answer_2": "dark red", "answer_3": ""}]
    (example,) = annotations.read(written(folder, kind, rows))[0]
    assert example.question == "color?" and example.answers == ("red", "dark red")


@pytest.mark.parametrize("key", ["caption", "answer"])
def test_lines_may_have_different_numbers_of_numbered_texts(folder, key):
    """The first line has one, and another has two. Absent keys are no empty cells."""
    rows = [{"image": "0.png", f"{key}_1": "red"}, {"image": "1.png", f"{key}_1": "blue", f"{key}_2": "dark blue"}]
    rows = [row | ({"question": "color?"} if key == "answer" else {}) for row in rows]
    examples = annotations.read(written(folder, "jsonl", rows))[0]
    texts = [example.answers for example in examples] if key == "answer" else [example.text for example in examples]
    assert texts == ([("red",), ("blue", "dark blue")] if key == "answer" else ["red", "blue", "dark blue"])


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_the_flags_of_a_table_with_numbered_texts_name_only_the_image(folder, kind):
    rows = [{"Bild": row["image"]} | {key: value for key, value in row.items() if key != "image"} for row in ROWS]
    source = written(folder, kind, rows)
    with pytest.raises(
        DataError, match=r"no column has a known name for the image[^$]*name the columns: --image-key \"Bild\"$"
    ):
        annotations.read(source)
    examples = annotations.read(source, keys=Keys(image="Bild"))[0]
    assert [(example.name, example.text) for example in examples] == TEXTS
    examples = annotations.read(source, keys=Keys(image="Bild", text="Caption"))[0]  # the name without the numbers
    assert [(example.name, example.text) for example in examples] == TEXTS
    with pytest.raises(DataError, match=r"to read caption_1, caption_2, caption_3, name no text: --text-key \"\"$"):
        annotations.read(source, keys=Keys(image="Bild", text="words"))


@pytest.mark.parametrize("kind", ["csv", "xlsx", "jsonl"])
@pytest.mark.parametrize("asks", [False, True])
def test_numbered_columns_of_any_name_are_read_by_their_name(folder, kind, asks):
    """Before, a flag could name only one of these columns, and the suggested one was empty in some rows."""
    name = "Antwort" if asks else "Satz"
    question = {"Frage": "Ist das rot?"} if asks else {}
    rows: list[dict[str, Any]] = [
        {"Bild": "0.png", **question, "Titel": "t", f"{name} 1": "ein Würfel", f"{name} 2": ""},
        {"Bild": "1.png", **question, "Titel": "t", f"{name} 1": "rot", f"{name} 2": "rosa"},
    ]
    source = written(folder, kind, rows)
    if kind != "jsonl":
        flags = '--question-key "Frage" --answer-key "Antwort"' if asks else '--text-key "Satz"'
        with pytest.raises(DataError, match=f'name the columns: --image-key "Bild" {flags}$'):
            annotations.read(source)
    keys = Keys("Bild", "", "Frage", "Antwort") if asks else Keys("Bild", "Satz", "", "")
    examples = annotations.read(source, keys=keys)[0]
    if asks:
        assert [example.answers for example in examples] == [("ein Würfel",), ("rot", "rosa")]
    else:
        assert [(each.name, each.text) for each in examples] == [("0.png", "ein Würfel"), ("1.png", "rot"), ("1.png", "rosa")]
    with pytest.raises(DataError, match=r"it has no 'Sat'|no column has the name 'Sat'"):
        annotations.read(source, keys=Keys("Bild", "Sat", "", ""))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_named_numbered_columns_are_used_instead_of_a_usual_one_which_is_reported(folder, kind):
    rows = [{"image": "0.png", "caption": "not this", "Satz_1": "a", "Satz_2": "b"}]
    messages: list[str] = []
    examples = annotations.read(written(folder, kind, rows), keys=Keys(text="Satz"), report=messages.append)[0]
    assert [example.text for example in examples] == ["a", "b"]
    assert "these keys are ignored: " in messages[0] and "caption' (2 lines" in messages[0]


@pytest.mark.parametrize(
    ("row", "keys", "fix"),
    [
        ({"Bild": "0.png", "Frage": "q?", "Antwort": "a"}, Keys("Bild", "Bildunterschrift", "Frage", "Antwort"), "text"),
        ({"image": "0.png", "text": "a"}, Keys("", "", "Frage", "Antwort"), "question"),
        ({"image": "0.png", "text": "a"}, Keys("image", "", "Frage", ""), "question"),
        ({"image": "0.png", "question": "q?", "answers": "a"}, Keys("", "Caption", "", ""), "text"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_key_of_earlier_data_gets_the_fix_that_empties_it(folder, kind, row, keys, fix):
    """Before, the fix named the column of the image, and the next fix another wrong one."""
    source = written(folder, kind, [row])
    try:
        examples = annotations.read(source, keys=keys)[0]
        assert kind == "jsonl" and keys.question == "Frage" and examples[0].question == "q?"  # one of two names is enough
    except DataError as error:
        reason = str(error).partition("\nin ")[0]
        both = f'--{fix}-key ""' + ' --answer-key ""' * (kind == "csv" and fix == "question" and bool(keys.answer))
        assert reason.endswith(f"such column: {both}") or f"such key: {both}" in reason
    assert annotations.read(source, keys=replace(keys, **{fix: "", "answer": keys.answer * (fix == "text")}))[0]


def test_all_wrong_columns_are_corrected_at_once(folder):
    source = written(folder, "csv", [{"Bild": "0.png", "Beschreibung": "a"}])
    with pytest.raises(DataError, match=r'did you mean --image-key "Bild" --text-key "Beschreibung"\?'):
        annotations.read(source, keys=Keys("Bilder", "Beschreibungen", "", ""))


@pytest.mark.parametrize(
    ("row", "keys", "fix"),
    [
        ({"Datei": "0.png", "Satz 1": "a", "Satz 2": "b"}, ("Foto", "Satz"), '--image-key "Datei"'),  # "Satz" is right
        ({"Datei": "0.png", "Beschreibung": "a b"}, ("Dateien", "Text"), '--image-key "Datei" --text-key "Beschreibung"'),
        ({"Datei": "0.png", "Beschreibung": "a b"}, ("Foto", "Satz"), '--image-key "Datei" --text-key "Beschreibung"'),
        ({"Nr": "1", "Satz": "a b", "Datei": "0.png"}, ("Foto", "Text"), '--image-key "Datei" --text-key "Satz"'),
        ({"Foto": "0.png", "Was": "a b"}, ("Foto", "Beschreibung"), '--text-key "Was"'),
        ({"Bild": "0.png", "Satz 1": "a", "Satz 2": "b"}, ("Bilder", "Satz"), '--image-key "Bild"'),
        ({"Bild": "0.png", "Satz 1": "a", "Satz 2": "b"}, ("Bild", "Sats"), '--text-key "Satz"'),
        ({"Bild": "0.png", "Satz 1": "a", "Satz 2": "b"}, ("Bilder", "Sats"), '--image-key "Bild" --text-key "Satz"'),
        ({"Bild": "0.png", "caption_1": "a", "caption_2": "b"}, ("Bilder", "captions"), '--image-key "Bild" --text-key ""'),
        ({"Bild": "0.png", "caption_1": "a", "caption_2": "b"}, ("Bild", "captions"), '--text-key ""'),
        ({"Bild": "0.png", "Worte": "a"}, ("Bilder", "Wörter"), '--image-key "Bild" --text-key "Worte"'),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_flags_in_an_error_correct_every_wrong_name_and_keep_the_right_ones(folder, kind, row, keys, fix):
    """Before, the text "Satz" of "Satz 1" and "Satz 2" was corrected too, and a JSON error corrected only one name."""
    source = written(folder, kind, [row])
    with pytest.raises(DataError) as error:
        annotations.read(source, keys=Keys(*keys, "", ""))
    assert (
        re.search(r"(?:did you mean|no such column:|no such key:|name no text:) (--.*?)\??$", str(error.value), re.M)[1] == fix
    )
    new = dict(zip(shlex.split(fix)[::2], shlex.split(fix)[1::2], strict=True))
    right = Keys(new.get("--image-key", keys[0]), new.get("--text-key", keys[1]), "", "")
    texts = [text for text in row.values() if text not in ("0.png", "1")]
    assert [each.text for each in annotations.read(source, keys=right)[0]] == texts


@pytest.mark.parametrize("kind", ["jsonl", "json", "mapping", "parquet"])
def test_a_list_of_questions_gives_an_entry_for_each(folder, kind):
    asked = [{"question": "how many?", "answer": "2"}, {"question": "red?", "answer": "yes"}]
    rows: list[dict[str, Any]] = [{"image": name, "qa_pairs": asked} for name in ("0.png", "1.png")]
    if kind == "mapping":
        (folder / "x.json").write_text(json.dumps({row["image"]: row["qa_pairs"] for row in rows}))
        examples = annotations.read(folder / "x.json")[0]
    elif kind == "parquet":
        source = written(folder, kind, rows)
        prepared = prepare(PrepareConfig(source=str(source), output_dir=str(folder / "out"), images=str(folder), splits="1"))
        examples = annotations.read(prepared["train"])[0]
    else:
        examples = annotations.read(written(folder, kind, rows))[0]
    pairs = {("how many?", ("2",)), ("red?", ("yes",))}
    assert len(examples) == 4 and {(each.question, each.answers) for each in examples} == pairs


@pytest.mark.parametrize("titles", ["Urlaub 2026;;\n", "Urlaub 2026\n", "Urlaub 2026;;\n;;von Anna\n", '"Urlaub; 2026"\n'])
@pytest.mark.parametrize("named", [False, True])
def test_rows_with_one_cell_above_the_columns_of_a_csv_are_titles(folder, titles, named):
    names = "Bild;Ort;Worte" if named else "image;place;caption"
    (folder / "t.csv").write_text(f"{titles}{names}\n0.png;Köln;ein Würfel\n1.png;;ein Ball\n", encoding="utf-8")
    keys = Keys(image="Bild", text="Worte") if named else Keys()
    examples = annotations.read(folder / "t.csv", keys=keys)[0]
    assert [(example.name, example.text) for example in examples] == [("0.png", "ein Würfel"), ("1.png", "ein Ball")]


def test_a_row_without_any_of_the_numbered_texts_is_an_error(folder):
    rows = [*ROWS, {"image": "1.png", "caption_1": "", "caption_2": " ", "caption_3": "", "width": 4}]
    with pytest.raises(DataError, match=r"captions\.csv:4: the text is empty"):
        annotations.read(written(folder, "csv", rows))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "xlsx"])
def test_a_column_that_the_user_names_is_the_only_caption(folder, kind):
    examples = annotations.read(written(folder, kind, ROWS), keys=Keys(text="caption_2"))[0]
    assert [example.text for example in examples] == ["a cube, red", "a blue ball"]


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "a", "caption": "b", "caption_2": "c", "caption_3": "d"},  # one column has the usual name
        {"image": "a", "caption_1": "b", "caption_2": "c", "text_1": "d", "text_2": "e"},  # which of the two?
        {"image": "a", "layer_1": "b", "layer_2": "c"},
        {"image": "a", "question": "b", "answer": "c", "answer_1": "d", "answer_2": "e"},
        {"image": "a", "caption_en": "b", "caption_de": "c"},
        {"image": "a", "prompt_1": "b", "prompt_2": "c"},
    ],
)
def test_other_entries_are_unchanged(entry):
    assert gathered(entry) == entry
