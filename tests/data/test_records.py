"""Test that all parts of a line are used or reported: its own prompt, values that are not strings, and ignored keys."""

import csv
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.formats import STRICT
from lora_blip.data.image_sources import ImageSource
from lora_blip.data.loader import HostBatch
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import DataError
from lora_blip.evaluation.measures import ModelScores
from lora_blip.evaluation.outputs import Comparison, comparison_csv
from lora_blip.inference.finished import example_of_line, key_of
from lora_blip.inference.prediction import line_of, prediction_of
from lora_blip.inference.questions import WithPrompts, examples_to_predict, trim_references
from lora_blip.runtime.files import csv_text
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.text_task import after_prompt
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training import resume
from tests.support import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcd":
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries))
    return path


def captions(folder: Path, *texts: str, **more: str) -> Path:
    return lines(folder / "x.jsonl", *({"image": f"{n}.png", "text": t} | more for n, t in zip("abcd", texts, strict=False)))


def example(text: str = "", question: str = "", prompt: str = "", question_id: int | str = "", *answers: str) -> Example:
    return Example(Path("a.png"), text, "a.png", 1, "", question, answers, "", prompt, question_id)


# ---------------------------------------------------------------- prompts


def test_a_line_s_own_prompt_is_read_instead_of_the_task_s_and_never_learned(backbone):
    """In a batch of mixed prompts, each line has the same row and labels as alone, after its own prompt."""
    task = CaptionTask(backbone, "a picture of")
    some = [example("a red cube", prompt="the table with"), example("a blue cube"), example("nothing", prompt="a cube on")]
    images = torch.randn(3, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    batch = task.batch(HostBatch(some, images))
    rows = batch.rows.padded()
    assert task.wrong_labels(batch) == ""
    for row, (one, prompt) in enumerate(zip(some, ("the table with", "a picture of", "a cube on"), strict=True)):
        alone = CaptionTask(backbone, prompt).batch(HostBatch([replace(one, prompt="")], images[row : row + 1]))
        is_token = rows.attention_mask[row] == 1
        assert torch.equal(rows.input_ids[row][is_token], alone.rows.padded().input_ids[0])
        assert batch.rows.label_ids()[row] == rows.label_ids()[row] == alone.rows.label_ids()[0]
    predictions = task.predict(images, some)
    for row, prompt in enumerate(("the table with", "a picture of", "a cube on")):
        assert predictions[row] == CaptionTask(backbone, prompt).predict(images[row : row + 1], [example()])[0]


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [
        ("a picture of a red shoe", "a picture of", "a red shoe"),
        ("A Picture of a blue hat", "a picture of", "a blue hat"),
        ("a picture of a picture of a hat", "a picture of", "a picture of a hat"),  # once
        ("a picture often seen", "a picture of", "a picture often seen"),  # no whole word
        ("a red shoe", "a picture of", "a red shoe"),
        ("an apple", "a", "an apple"),
        ("caption:red", "caption:", "red"),
        ("a picture of", "a picture of", ""),
        ("图片红色的鞋", "图片", "红色的鞋"),
    ],
)  # fmt: skip
def test_a_prompt_at_the_start_of_a_text_is_removed_once(text, prompt, rest):
    assert after_prompt(text, prompt) == rest


@pytest.mark.parametrize("prompt", ["a picture of", "  a  picture of "])
def test_captions_that_begin_with_the_prompt_lose_it_and_are_counted_before_the_first_step(folder, make, prompt):
    """This holds for each spelling of the prompt. The number of changed lines is printed with an example."""
    messages: list[str] = []
    source = captions(folder, "a picture of a red cube", "A picture  of a hat", "a cube")
    task = CaptionTask(make("blip"), prompt)
    examples, _ = annotations.read(source, check=task.check, trim=task.trim, report=messages.append)
    assert [e.text for e in examples] == ["a red cube", "a hat", "a cube"]
    line, _table = messages
    assert "from the start of 2 lines" in line and "'a picture of a red cube' is now 'a red cube'" in line
    assert annotations.read(source)[0][0].text == "a picture of a red cube"


def test_a_line_s_own_prompt_at_the_start_of_its_text_is_removed(folder, make):
    source = captions(folder, "a shoe, red", "red", prompt="A shoe,")
    task = CaptionTask(make("blip"), "a picture of")
    examples, _ = annotations.read(source, check=task.check, trim=task.trim, report=lambda _: None)
    assert [(e.text, e.prompt) for e in examples] == [("red", "A shoe,")] * 2


def test_a_text_that_is_nothing_but_the_prompt_is_a_bad_line(folder, make):
    task = CaptionTask(make("blip"), "a picture of")
    with pytest.raises(DataError, match=r"x\.jsonl:1: the text is only the prompt"):
        annotations.read(captions(folder, "A picture of", "a cube"), check=task.check, trim=task.trim)


def test_an_answer_that_is_nothing_but_the_template_is_a_bad_line(folder, make):
    task = VqaTask(make("blip"))
    source = lines(folder / "x.jsonl", {"image": "a.png", "question": "q?", "answers": ["red", "Question: q? Answer:"]})
    with pytest.raises(DataError, match=r"x\.jsonl:1: the text is only the prompt"):
        annotations.read(source, check=task.check, trim=task.trim)


def test_an_answer_loses_the_template_it_begins_with_and_a_question_never_does(make):
    """BLIP's VQA encodes the question separately, so an answer that begins with the words of its question is not changed."""
    one = example("", "what is it?", "", "", "Question: what is it? Answer: a cube", "a cube")
    assert VqaTask(make("blip")).trim(one).answers == ("a cube", "a cube")
    red = example("", "red", "", "", "red cube")
    assert VqaTask(make("vqa")).trim(red) is red


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "json"])
def test_a_prompt_in_any_format_reaches_the_examples_through_prepare(folder, suffix):
    """The same holds for a file that training reads directly."""
    table = [["image", "prompt", "caption"], ["a.png", "a shoe,", "red"], ["b.png", "", "blue"]]
    entries = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    content = {
        "jsonl": "\n".join(map(json.dumps, entries)), "json": json.dumps(entries),
        "csv": "\n".join(",".join(f'"{cell}"' for cell in row) for row in table), "tsv": "\n".join(map("\t".join, table)),
    }  # fmt: skip
    source = folder / f"x.{suffix}"
    source.write_text(content[suffix] + "\n")
    files = prepare(PrepareConfig(source=str(source), output_dir=str(folder / "out"), splits="1"))
    for path in (files["train"], *([source] if suffix in ("jsonl", "tsv") else [])):
        assert [(e.prompt, e.text) for e in annotations.read(path)[0]] == [("a shoe,", "red"), ("", "blue")]


def test_changed_prompts_and_question_ids_make_another_run():
    """Resume detects a changed prompt. Lines without a prompt have the same digest as in earlier versions."""
    plain = [example("a cube"), example("", "what?", "", "", "x")]
    digests = {resume.lines_digest([replace(plain[0], prompt=prompt), plain[1]], False) for prompt in ("", "a", "b")}
    digests |= {resume.lines_digest([plain[0], replace(plain[1], question_id=number)], False) for number in (0, 1)}
    assert len(digests) == 5
    assert resume.lines_digest(plain, False) == "bef35a7bf4c96c1eadd85aa96a0c354a575609d517740b8981fd36b16a5ce9b1"


def test_an_invalid_prompt_gives_one_reason(make):
    task = CaptionTask(make("blip"))
    assert "too many tokens" in task.check(example("a cube", prompt="cube " * 80))
    assert "[SEP]" in task.check(example("a cube", prompt="a [SEP] b"))
    assert "does not contain {question} exactly once" in VqaTask(make("blip")).check(
        example("", "what?", "a picture of", "", "x")
    )
    assert 'remove the key "prompt"' in RetrievalTask(make("itm")).check(example("a cube", prompt="a picture of"))
    own = example("", "what?", "{question} please", "", "x")
    assert VqaTask(make("blip")).check(own) == "" and VqaTask(make("blip")).prompt_of(own) == "what? please"


def test_each_prompt_of_an_image_is_asked_and_scored_with_its_own_references(folder, make):
    """A prediction, its line in the file and its references are matched by image and prompt."""
    task = CaptionTask(make("blip"), "a picture of")
    source = lines(
        folder / "r.jsonl",
        {"image": "a.png", "text": "a picture of a cube"},
        {"image": "a.png", "text": "a shoe, red", "prompt": "a shoe,"},
        {"image": "b.png", "text": "blue"},
    )
    images = ImageSource(str(folder / "*.png"))
    lines_by_image: dict[Path, list[Example]] = {}
    for one in annotations.read(source)[0]:
        lines_by_image.setdefault(one.image, []).append(one)
    references = trim_references(task, str(source), lines_by_image)
    todo = list(examples_to_predict(task, images, "", references, []))
    expected = [("a.png", ""), ("a.png", "a shoe,"), ("b.png", ""), ("c.png", ""), ("d.png", "")]
    assert [(e.image.name, e.prompt) for e in todo] == expected and isinstance(
        examples_to_predict(task, images, "", references, []), WithPrompts
    )
    assert len({key_of(e) for e in todo}) == 5
    from_lines = [example_of_line(line_of(prediction_of(e, "x"))) for e in todo]
    assert list(map(key_of, from_lines)) == list(map(key_of, todo)) and list(map(task.subject, from_lines)) == list(
        map(task.subject, todo)
    )
    every = [e for some in references.values() for e in some]
    scores = task.scores({folder / "a.png": "a cube", (folder / "a.png", "a shoe,"): "red", folder / "b.png": "red"}, every)
    assert scores == {"exact_match": 2 / 3}


# ---------------------------------------------------------------- values that are no strings

VALUES = {"5": "5", "1.50": "1.50", "-2": "-2", "1e3": "1e3", "true": "yes", "false": "no", '" a  b "': "a b"}


@pytest.mark.parametrize(("written", "text"), VALUES.items())
def test_a_number_or_boolean_is_a_text_wherever_a_text_is_expected(folder, written, text):
    """A number is kept as it is written, in answers, questions, captions, prompts and groups. `prepare` keeps it too."""
    source = lines(
        folder / "x.jsonl",
        f'{{"image": "a.png", "question": {written}, "answers": [{written}, {{"answer": {written}}}], "group": {written}}}',
        f'{{"image": "b.png", "question": "q", "answer": {written}}}',
    )
    outputs = prepare(PrepareConfig(source=str(source), output_dir=str(folder / "out"), splits="1"))
    for path in (source, outputs["train"]):
        first, second = annotations.read(path)[0]
        assert (first.question, first.answers, second.answers) == (text, (text, text), (text,))
    assert annotations.read(source)[0][0].group == (text if written[0] != '"' else " a  b ")
    (caption,) = annotations.read(
        lines(folder / "y.jsonl", f'{{"image": "a.png", "caption": {written}, "prompt": {written}}}')
    )[0]
    assert (caption.text, caption.prompt) == (text, text)


@pytest.mark.parametrize(("written", "text"), VALUES.items())
def test_published_sets_may_have_numbers_and_booleans_for_texts(folder, written, text):
    """This holds for VQAv2's answers and questions, COCO's captions, Karpathy's sentences, and lists of captions."""
    head = '{"data_subtype": "val2014", '
    documents = {
        "q.json": head + f'"questions": [{{"image_id": 1, "question": {written}, "question_id": 7}}]}}',
        "a.json": head + f'"annotations": [{{"question_id": 7, "answers": [{{"answer": {written}, "answer_id": 1}}]}}]}}',
        "c.json": f'{{"images": [{{"id": 1, "file_name": "a.png"}}], "annotations": '
        f'[{{"image_id": 1, "caption": {written}}}]}}',
        "k.json": f'{{"images": [{{"filename": "a.png", "split": "train", "sentences": [{{"raw": {written}}}]}}]}}',
        "l.json": f'[{{"image": "a.png", "caption": [{written}, {written}]}}]',
    }
    for name, content in documents.items():
        (folder / name).write_text(content)
    Image.new("RGB", (2, 2)).save(folder / "COCO_val2014_000000000001.jpg")
    for source in ("q.json,a.json", "c.json", "k.json", "l.json"):
        paths = ",".join(str(folder / name) for name in source.split(","))
        config = PrepareConfig(
            source=paths, images=str(folder), output_dir=str(folder / f"{source} out"), splits="1", own_splits=False
        )
        for one in annotations.read(prepare(config)["train"])[0]:
            assert (one.question, one.answers) == (text, (text,)) if one.question else one.text == text


@pytest.mark.parametrize("key", ["text", "question", "answer"])
@pytest.mark.parametrize(
    ("written", "reason"),
    [("null", "the {} is null"), ("[[1]]", "], expected a text"), ('{"a": 1}', "}}, expected a text")],
)
def test_null_and_values_that_are_not_texts_are_named(folder, key, written, reason):
    entry = {"image": '"a.png"'} | (
        {"text": written} if key == "text" else {"question": '"q"', "answer": '"a"'} | {key: written}
    )
    line = "{" + ", ".join(f'"{name}": {value}' for name, value in entry.items()) + "}"
    with pytest.raises(DataError) as error:
        annotations.read(lines(folder / "x.jsonl", line))
    reason = "the text is an object with the keys 'a'; write a line for each" if (key, written[0]) == ("text", "{") else reason
    assert reason.format(key) in str(error.value)


def test_a_number_that_is_too_large_for_a_float_is_an_error():
    """Python would write it as Infinity, which is not JSON."""
    with pytest.raises(ValueError, match="1e999 is too large"):
        STRICT.decode('{"a": 1e999}')


# ---------------------------------------------------------------- keys that change nothing


def test_every_key_that_is_not_used_is_reported_once_with_its_lines(folder):
    """This holds for both paths of the builder. A second name for the value of another key is ignored, too."""
    messages: list[str] = []
    source = lines(
        folder / "x.jsonl",
        {"image": "a.png", "text": "t", "group": "g", "prompt": "p"},
        {"image": "a.png", "text": "t", "split": "val", "rat\x1bing": 3},
        {"image": "b.png", "text": " t ", "split": "val", "caption": "other", "question_id": 4},
        {"image": "b.png", "question": "q", "answers": ["a"], "question_id": 3, "text": "t"},
        {"image": "b.png", "question": "q", "answers": ["a"], "answer": "b", "prompt": " {question} "},
    )
    examples, _ = annotations.read(source, report=messages.append)
    assert len(examples) == 5 and len(messages) == 3 and "2 of 5 lines with an own prompt" in messages[1]
    expected = {
        "split": (2, 2),
        "rat\\x1bing": (1, 2),
        "caption": (1, 3),
        "question_id": (1, 3),
        "text": (1, 4),
        "answer": (1, 5),
    }
    for key, (count, first) in expected.items():
        assert f"'{key}' ({count} line{'s' * (count > 1)}, first line {first})" in messages[0]
    assert messages[0].count(", first line") == 6 and "\x1b" not in messages[0]


@pytest.mark.parametrize("key", ["question_id", "answers"])
def test_a_question_s_key_on_a_tidy_caption_is_reported(folder, key):
    messages: list[str] = []
    annotations.read(lines(folder / "x.jsonl", {"image": "a.png", "text": "t", key: 4}), report=messages.append)
    assert messages[:-1] == [f"{folder / 'x.jsonl'}: these keys are ignored: '{key}' (1 line, first line 1)"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [("anwser", "answer"), ("anwsers", "answers"), ("Answer ", "answer"), ("fullAnswer", ""), ("answer_type", "")]
    + [("question_type", ""), ("region_id", ""), ("groups", ""), ("ans_id", "")],
)
def test_a_misspelled_answer_of_a_question_is_reported_with_the_right_key(folder, key, meant):
    """A question without an answer is read for a prediction. A training raises an error for it."""
    messages: list[str] = []
    annotations.read(lines(folder / "x.jsonl", {"image": "a.png", "question": "t?", key: "4"}), report=messages.append)
    hint = f'; did you mean "{meant}"?' if meant else ""
    assert f"'{key}' (1 line, first line 1{hint})" in messages[0]


@pytest.mark.parametrize("number", [True, 4.5, [], {"a": 1}])
def test_an_invalid_question_id_is_a_bad_line(folder, number):
    entry = {"image": "a.png", "question": "q", "answers": ["a"], "question_id": number}
    with pytest.raises(DataError, match=r"x\.jsonl:1: the question_id is .*expected a whole number or a text"):
        annotations.read(lines(folder / "x.jsonl", entry))


def test_the_report_of_a_million_ignored_keys_is_short(folder):
    messages: list[str] = []
    entry = {"image": "a.png", "text": "t"} | {f"key {n}": n for n in range(2000)}
    annotations.read(lines(folder / "x.jsonl", entry), report=messages.append)
    assert len(messages[0]) < 2000 and "and 980 more" in messages[0]


# ---------------------------------------------------------------- questions with an identity


def vqav2(folder: Path) -> Path:
    """`prepare` keeps two questions about one image that have the same words and different answers."""
    Image.new("RGB", (8, 6), "red").save(folder / "COCO_val2014_000000000042.jpg")
    asked = [{"image_id": 42, "question": "how many?", "question_id": number} for number in (420, 421)]
    answers = [
        {"question_id": number, "answers": [{"answer": text, "answer_id": n} for n in range(10)]}
        for number, text in ((420, "two"), (421, "three"))
    ]
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (folder / "a.json").write_text(json.dumps({"data_subtype": "val2014", "annotations": answers}))
    source = f"{folder / 'q.json'},{folder / 'a.json'}"
    return prepare(
        PrepareConfig(source=source, images=str(folder), output_dir=str(folder / "out"), splits="1", own_splits=False)
    )["train"]


def test_two_questions_with_the_same_words_are_scored_separately(folder, make):
    """An answer that is right for one of two questions scores 50 %. Each has its own line, key and row."""
    task = VqaTask(make("blip"))
    examples, _ = annotations.read(vqav2(folder), check=task.check)
    assert [(e.question_id, e.answers[0]) for e in examples] == [(420, "two"), (421, "three")]
    subjects = [task.subject(e) for e in examples]
    assert task.scores(dict.fromkeys(subjects, "two"), examples) == {"vqa_accuracy": 0.5}
    assert list(examples_to_predict(task, [], "", {examples[0].image: examples}, [])) == examples
    lines = [line_of(prediction_of(e, "two")) for e in examples]
    assert [line["question_id"] for line in lines] == [420, 421] and len({key_of(e) for e in examples}) == 2
    again = [example_of_line(json.loads(json.dumps(line))) for line in lines]
    assert list(map(key_of, again)) == list(map(key_of, examples)) and list(map(task.subject, again)) == subjects
    model_scores = ModelScores(subjects, [[e] for e in examples], ["two", "two"], [1.0, 0.0], [True, False], "VQA accuracy")
    rows = list(csv.DictReader(io.StringIO(comparison_csv(Comparison(None, model_scores)))))
    assert [(row["question_id"], row["VQA accuracy"]) for row in rows] == [("420", "1.0"), ("421", "0.0")]


def test_a_question_id_is_the_same_in_a_csv_and_a_json(folder):
    (folder / "x.csv").write_text("image,question,answers,question_id\na.png,q,a|b,420\na.png,q,c,007\nb.png,q,d,\n")
    files = prepare(PrepareConfig(source=str(folder / "x.csv"), output_dir=str(folder / "out"), splits="1"))
    assert [e.question_id for e in annotations.read(files["train"])[0]] == [420, "007", ""]


def test_a_run_that_was_stopped_by_an_older_version_resumes():
    """Without prompt and question_id, a key is the same as in earlier versions."""
    assert key_of(example("", "what is it?")) == 5285109542600713310


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_cell_of_a_csv_is_a_formula_and_numbers_stay_numbers(start):
    text = csv_text([[f"{start}1+1", Path(f"{start}x.png"), -1.5, 3, "a=b", "", ""]])
    (row,) = csv.reader(io.StringIO(text, newline=""))
    start = start.replace("\r", "\n")  # which csv would not quote
    assert row[:2] == [f"'{start}1+1", f"'{start}x.png"] and row[2:] == ["-1.5", "3", "a=b", "", ""]


@pytest.mark.parametrize("before", ["", " ", "\u00a0 ", "\ufeff", "\u200b", "\x00", "a;", "a; ", "a\t", "a\n", "a\r\n", "a\r "])
def test_no_part_of_a_text_is_a_formula_in_any_spreadsheet(before):
    """Some programs trim spaces, some split at semicolons and tabs, and some treat a wide character as the plain one."""
    text = before.replace("\r\n", "\n").replace("\r", "\n")
    start = text.rstrip(SPACES)
    for sign in SIGNS:
        (row,) = csv.reader(io.StringIO(csv_text([[f"{before}{sign}1+1", "b"]]), newline=""))
        assert row == [f"{start}'{text[len(start) :]}{sign}1+1", "b"]


def test_a_long_text_of_separators_is_written_in_linear_time():
    """The search for such characters takes linear time."""
    start = time.perf_counter()
    for text in ("\t" * 200_000, ";" * 200_000, "\n " * 100_000, " " * 200_000, "; " * 100_000):
        assert len(csv_text([[text]])) >= 200_000
    assert time.perf_counter() - start < 60
    assert csv_text([["\t=1"]]) == "'\t'=1\n"


SIGNS = "=+-@\u2212\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b\u207a\u207b\u207c"  # plain, wide, small, raised
SPACES = " \u00a0\ufeff\u200b\x00"


def test_a_sign_within_a_text_is_left_alone():
    for text in ("a-b; c", "a cube - red", "a;b=1", "; a", "一 + 二", "😀-1", "a, =b", "a b\n c"):
        assert list(csv.reader(io.StringIO(csv_text([[text]]), newline=""))) == [[text]]


def test_a_comparison_contains_no_formula(make):
    one = replace(example("=cmd|' /C calc'!A0", prompt="@p"), image=Path("+a.png"), group="-g")
    task = CaptionTask(make("blip"))
    scores = ModelScores([task.subject(one)], [[one]], ["=1"], [-1.0], [False], "CIDEr")
    (row,) = csv.DictReader(io.StringIO(comparison_csv(Comparison(None, scores))))
    assert all(not value.startswith(("=", "+", "@")) for value in row.values()) and row["CIDEr"] == "-1.0"
    assert row["group"] == "'-g" and row["references"].startswith("'=")
