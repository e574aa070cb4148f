"""One setting names the columns of several files: "Bild|Foto". The flags of an error add to the names that are given."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lora_blip.config import EvaluateConfig, TrainConfig
from lora_blip.data import annotations
from lora_blip.data.column_check import check_columns
from lora_blip.data.formats import NO_KEYS, Keys, keys_of
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.several_files import chosen, with_usual_names
from lora_blip.errors import DataError
from lora_blip.evaluation.leak_search import search_leaks
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.examples import read_file
from tests.support import tiny

KEY_FLAGS = re.compile(r"""(--\w+-key) ("[^"]*"|'[^']*'|\S+)""")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 4)
    return tmp_path


def write(name: str, header: str, *rows: str) -> str:
    """Write a table, or the same as JSONL. The cells are separated by semicolons."""
    lines = [json.dumps(dict(zip(header.split(";"), row.split(";"), strict=True))) for row in rows]
    Path(name).write_text("\n".join(lines if name.endswith(".jsonl") else [header, *rows]) + "\n")
    return name


def with_flags(keys: Keys, message: str) -> Keys:
    """Return the names with those of the flags in a message."""
    named = {flag: shlex.split(name)[0] for flag, name in KEY_FLAGS.findall(message)}
    pairs = zip(("--image-key", "--text-key", "--question-key", "--answer-key"), vars(keys).values(), strict=True)
    return Keys(*(named.get(flag, own) for flag, own in pairs))


@pytest.mark.parametrize(
    ("named", "names", "expected"),
    [
        ({"image": "Bild|Foto"}, ["Foto", "Text"], {"image": "Foto"}),
        ({"image": "Bild|Foto"}, ["Bild", "Foto"], {"image": "Bild"}),
        ({"image": "Bild|Foto"}, ["image"], {"image": "Bild|Foto"}),  # unknown, as a single name is
        ({"image": "Bild|image"}, ["file_name"], {}),  # a usual name
        ({"image": "Bild|image"}, ["image"], {"image": "image"}),
        ({"text": "Satz|text", "answers": "A|answer"}, ["Satz 1", "Satz 2"], {"text": "Satz"}),
        ({"text": " satz | Wort"}, ["SATZ"], {"text": "satz"}),
        ({"text": "a|b"}, ["a|b", "b"], {"text": "a|b"}),  # the name of one column
        ({"text": "Satz"}, ["text"], {"text": "Satz"}),
    ],
)
def test_the_first_name_that_a_file_has_is_chosen(named, names, expected):
    assert chosen(named, names) == expected


def test_the_usual_names_are_added_only_to_names_that_are_given():
    assert with_usual_names(Keys(image="Bild", answer="A")) == Keys(image="Bild|image", answer="A|answer")
    assert with_usual_names(NO_KEYS) == NO_KEYS


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("usual", ["", "training", "validation"])
def test_the_flags_for_a_validation_file_read_both_files(make, kind, named, usual):
    """Before, a flag for one file broke the other one, and both had to be converted."""
    headers = {part: "image;text" if part == usual else names for part, names in FILES.items()}
    training = write(f"a.{kind}", headers["training"], "photos/0.png;a cube 0", "photos/1.png;a cube 1")
    validation = write(f"b.{kind}", headers["validation"], "photos/2.png;a cube 2", "photos/3.png;a cube 3")
    keys = Keys(image="Datei", text="Wort") if named else NO_KEYS
    task = CaptionTask(make("blip"))
    for _ in range(3):  # an error for each file at most
        config = TrainConfig(
            annotations=training, val_annotations=validation, image_key=keys.image, text_key=keys.text, check_images="lazy"
        )
        try:
            check_columns(config, "annotations", "val_annotations")
            found = [[each.text for each in read_file(config, task, source, None)] for source in (training, validation)]
            break
        except DataError as error:
            keys = with_flags(keys, str(error))
    assert found == [["a cube 0", "a cube 1"], ["a cube 2", "a cube 3"]]


FILES = {"training": "Datei;Wort", "validation": "Foto;Satz"}


@pytest.mark.parametrize("kinds", ["csv csv", "csv jsonl", "jsonl csv", "jsonl jsonl"])
@pytest.mark.parametrize("first", ["Datei;Wort", "image;text", "file_name;caption"])
def test_the_flags_for_several_files_read_all_of_them(first, kinds):
    """In `ANNOTATIONS = "a.csv,b.csv"` and in `prepare`. Before, each flag broke the other file."""
    files = ",".join(f"{name}.{kind}" for name, kind in zip("ab", kinds.split(), strict=True))
    a, b = files.split(",")
    write(a, first, "photos/0.png;a cube 0")
    write(b, "Foto;Satz", "photos/1.png;a cube 1", "photos/2.png;a cube 2")
    for read in (
        lambda keys: [each.text for each in annotations.read(files, keys=keys)[0]],
        lambda keys: prepared(PrepareConfig(files, splits="1", image_key=keys.image, text_key=keys.text)),
    ):
        keys = NO_KEYS
        for _ in range(3):
            try:
                found = read(keys)
                break
            except DataError as error:
                keys = with_flags(keys, str(error))
        assert found == ["a cube 0", "a cube 1", "a cube 2"]


def prepared(config: PrepareConfig) -> list[str]:
    return [json.loads(line)["text"] for line in prepare(config)["train"].read_text().splitlines()]


@pytest.mark.parametrize("header", ["image;text", "Foto;Satz"])
def test_the_training_file_of_an_evaluation_may_have_other_columns(header):
    """Before, `evaluate` found no way to name the columns of REFERENCES and of TRAIN_ANNOTATIONS."""
    references = write("r.csv", "Bild;Text der Zeile", "photos/0.png;a cube")
    training = write("t.csv", header, "photos/0.png;a cube")
    keys = Keys(image="Bild", text="Text der Zeile")
    for _ in range(2):
        config = EvaluateConfig(references=references, train_annotations=training, image_key=keys.image, text_key=keys.text)
        examples, _ = annotations.read(references, keys=keys_of(config))
        try:
            found = search_leaks(config, None, examples)
            break
        except DataError as error:
            keys = with_flags(keys, str(error))
    assert found.note.startswith("1 found among the 1 image of")


def test_a_parquet_file_and_a_shard_choose_a_name_too(here):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = (here / "photos/0.png").read_bytes()
    parquet.write_table(pa.table({"Foto": [content], "Satz": ["a cube"]}), "a.parquet")
    files = prepare(PrepareConfig("a.parquet", splits="1", image_key="Bild|Foto", text_key="Wort|Satz"))
    assert json.loads(files["train"].read_text())["text"] == "a cube"
