"""A file of QUESTION beside REFERENCES: it needs no answers, and may have other names of columns."""

import json
import re
import shlex
from pathlib import Path

import pytest

import lora_blip
from lora_blip import InferConfig
from lora_blip.data import annotations
from lora_blip.data.formats import NO_KEYS, Keys
from lora_blip.data.image_sources import ImageSource
from lora_blip.data.question_files import read_questions
from lora_blip.errors import DataError
from lora_blip.inference.questions import read_references
from tests.support import tiny

ASKED = "name the thing on top"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 2)
    return tmp_path


def write(name: str, *rows: str) -> str:
    """Write a CSV, or the same as JSONL, with a header and rows that are separated by semicolons."""
    header, *others = (row.split(";") for row in rows)
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in others] if name.endswith(".jsonl") else rows
    Path(name).write_text("\n".join(lines) + "\n")
    return name


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("header", "keys"),
    [
        ("Bild;Frage", Keys(image="Bild", question="Frage", answer="Antwort")),  # it has no answers
        ("image;question", Keys(image="Bild", question="Frage", answer="Antwort")),  # the usual names, not those of REFERENCES
        ("Bild;question", Keys(image="Bild", question="Frage")),
        ("image;Frage", Keys(image="Bild", question="Frage", text="Satz")),
        ("image;question", NO_KEYS),
    ],
)
def test_the_names_of_the_columns_may_be_those_of_the_references(kind, header, keys):
    """Before, a file without answers was an error, and its fix removed the answers of REFERENCES."""
    name = write(f"q.{kind}", header, f"photos/0.png;{ASKED}", f"photos/1.png;{ASKED}")
    (first, second) = read_questions(name, "", keys, has_references=True)
    assert [first.question, second.question] == [ASKED] * 2 and first.answers == ()


def test_the_references_are_scored(checkpoints, capsys):
    questions = write("q.csv", "Bild;Frage", f"photos/0.png;{ASKED}")
    references = write("r.csv", "Bild;Frage;Antwort", f"photos/0.png;{ASKED};red")
    config = InferConfig(
        adapter="none", model=str(checkpoints["vqa"]), images="photos", device="cpu", question=questions,
        references=references, image_key="Bild", question_key="Frage", answer_key="Antwort",
    )  # fmt: skip
    lines = [json.loads(line) for line in lora_blip.infer(config).read_text().splitlines()]
    assert [(line["image"], line["question"]) for line in lines] == [("photos/0.png", ASKED)]
    assert re.search(r"^VQA accuracy .*\nall +1 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("keys", [NO_KEYS, Keys(image="Foto", question="Q", answer="A"), Keys(image="Bild", question="Q")])
def test_the_flags_of_an_error_name_the_question(kind, keys):
    """Before, they named the text, and the next error the caption run. The flags that are printed read the file."""
    name = write(f"q.{kind}", "Bild;Frage", f"photos/0.png;{ASKED}")
    with pytest.raises(DataError) as error:
        read_questions(name, "", keys, has_references=False)
    assert "--text-key" not in str(error.value) and "--answer-key" not in str(error.value)
    words = shlex.split(" ".join(re.findall(r"--\w+-key (?:\"[^\"]*\"|\w+)", str(error.value))))
    given = {"--image-key": keys.image, "--question-key": keys.question} | dict(zip(words[::2], words[1::2], strict=True))
    (line,) = read_questions(name, "", Keys(image=given["--image-key"], question=given["--question-key"]), has_references=False)
    assert line.question == ASKED


def test_other_columns_than_those_of_the_references_do_not_end_in_a_circle():
    """The flags name the columns of both files. Before, each error named the columns of one."""
    name = write("q.csv", "Bild;Frage", f"photos/0.png;{ASKED}")
    references = write("r.csv", "Foto;Q;A", f"photos/0.png;{ASKED};red")
    keys = Keys(image="Foto", question="Q", answer="A")
    with pytest.raises(DataError, match=r': --image-key "Foto\|Bild" --question-key "Q\|Frage"\n'):
        read_questions(name, "", keys, has_references=True)
    keys = Keys(image="Foto|Bild", question="Q|Frage", answer="A")
    assert read_questions(name, "", keys, has_references=True)[0].question == ASKED
    assert read_references(references, "", ImageSource("photos"), keys)[Path("photos/0.png")][0].answers == ("red",)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_flags_for_the_references_keep_the_names_of_the_questions(checkpoints, kind):
    """Before, they replaced these names, so the next error was about the other file."""
    settings = {"adapter": "none", "model": str(checkpoints["vqa"]), "images": "photos", "device": "cpu", "image_key": "Datei"}
    questions = write("q.csv", "Datei;Was", f"photos/0.png;{ASKED}")
    references = write(f"r.{kind}", "bild;frage;answer", f"photos/0.png;{ASKED};red")
    with pytest.raises(DataError, match=r'--image-key "Datei\|bild" --question-key "Was\|frage"'):
        lora_blip.infer(InferConfig(question=questions, references=references, question_key="Was", **settings))
    settings["image_key"] = "Datei|bild"
    assert lora_blip.infer(InferConfig(question=questions, references=references, question_key="Was|frage", **settings))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_that_are_questions_are_named(kind):
    name = write(f"q.{kind}", "image;text", f"photos/0.png;{ASKED}")
    with pytest.raises(DataError, match=r"no line has a question; if its texts are the questions: --question-key text$"):
        read_questions(name, "", NO_KEYS, has_references=False)
    assert read_questions(name, "", Keys(question="text"), has_references=False)[0].question == ASKED


def test_a_question_with_other_words_has_no_score_with_the_reason(checkpoints, capsys):
    """Before, the message was that the references have no answers."""
    references = write("r.csv", "image;question;answer", f"photos/0.png;{ASKED}?;red", f"photos/1.png;{ASKED};red")
    settings = {"adapter": "none", "model": str(checkpoints["vqa"]), "device": "cpu", "references": references}
    lora_blip.infer(InferConfig(images="photos/0.png", question=ASKED, **settings))
    reason = f"the references have other questions, such as '{ASKED}?', and not '{ASKED}'; ask with the same words\n"
    assert f"no score: {reason}" in capsys.readouterr().out
    lora_blip.infer(InferConfig(images="photos", question=ASKED, **settings))
    printed = capsys.readouterr().out
    assert "1 question of 2 not in the references with the same words: they have no score\n" in printed
    settings["model"] = str(checkpoints["blip"])
    lora_blip.infer(InferConfig(images="photos", **settings))
    assert "no score: the references are questions with answers, and the task needs texts; give" in capsys.readouterr().out


def test_several_answers_in_one_text_of_json(tmp_path):
    """As in a table. Before, they were one answer, and every prediction was wrong."""
    line = {"image": "photos/0.png", "question": ASKED, "answer": "blue| dark blue|blue"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    (example,), _ = annotations.read("r.jsonl")
    assert example.answers == ("blue", "dark blue", "blue")
    (tmp_path / "r.jsonl").write_text(json.dumps(line | {"answer": ["a|b"]}) + "\n")
    assert annotations.read("r.jsonl")[0][0].answers == ("a|b",)


@pytest.mark.parametrize("setting", ["references", "question"])
def test_an_image_path_that_may_be_two_files_is_an_error(here, setting, capsys):
    """Before, its line was not used, and the score was that of the other lines. The message said that it is not in IMAGES."""
    for folder in ("a", "b"):
        tiny.write_photos(here / folder, 2)
    tiny.write_photos(here / "c", 3)
    (here / "c/photos/2.png").rename(here / "a/photos/2.png")
    write("x.csv", "image;question;answer", *(f"{n}.png;{ASKED};red" for n in range(3)))
    (here / "photos").rename(here / "c/other")
    with pytest.raises(
        DataError, match=r"x\.csv:2: '0\.png' may be several files; .* set IMAGE_ROOT = \".*a/photos\" \(--image"
    ):
        read_references("x.csv", "", ImageSource("a/photos"), setting=setting)
    assert sum(map(len, read_references("x.csv", "a/photos", ImageSource("a/photos"), setting=setting).values())) == 3
    assert "not used" not in capsys.readouterr().out
    write(
        "x.csv",
        "image;question;answer",
        f"a/photos/0.png;{ASKED};red",
        f"b/photos/1.png;{ASKED};red",
        f"gone/7.png;{ASKED};red",
    )
    read_references("x.csv", "", ImageSource("a/photos"), setting=setting)
    printed = capsys.readouterr().out
    assert "1 line of 3 not used: their images are not in IMAGES, such as 'b/photos/1.png'\n" in printed
    assert "1 line of 3 not used: their images do not exist, such as 'gone/7.png'\n" in printed
