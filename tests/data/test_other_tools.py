"""Records of other tools: chats of vision-language models, pairs, choices, Prodigy and Labelbox, and a file for each split."""

import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.formats import NO_KEYS, Keys
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.data.several_files import of_several_files
from lora_blip.errors import DataError
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask

Q = "What is it?"


def photo(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photo(tmp_path / "images/1.png"), photo(tmp_path / "images/2.png", "blue")
    return tmp_path


def write(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records) if path.suffix in (".jsonl", ".ndjson") else ""
    path.write_text(lines or json.dumps(records))
    return path


def read(path: Path, **settings: Any) -> list[tuple[str, str, tuple[str, ...], str]]:
    """Return (name of the image, question, answers, text) of each example."""
    examples, _ = annotations.read(path, **settings)
    return [(one.image.name, one.question, one.answers, one.text) for one in examples]


def turns(
    *texts: Any, roles: tuple[str, str] = ("user", "assistant"), keys: tuple[str, str] = ("role", "content")
) -> list[Any]:
    return [{keys[0]: roles[index % 2], keys[1]: text} for index, text in enumerate(texts)]


LLAVA = {"roles": ("human", "gpt"), "keys": ("from", "value")}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "llama-factory": {"messages": turns("<image>" + Q, "a cube"), "images": ["images/1.png"]},
    "sharegpt": {"conversations": turns("<image>\n" + Q, "a cube", **LLAVA), "images": ["images/1.png"], "system": "Be brief."},
    "llava, a list with one image": {"image": ["images/1.png"], "conversations": turns(Q + "<image>", "a cube", **LLAVA)},
    "ms-swift": {"messages": [SYSTEM, *turns("<image>" + Q, "a cube")], "images": ["images/1.png"]},
    "ms-swift with objects": {"messages": turns("<image>" + Q, "a cube"), "images": [{"bytes": None, "path": "images/1.png"}]},
    "qwen-vl": {"conversations": turns(f"Picture 1: <img>images/1.png</img>\n{Q}", "a cube", keys=("from", "value"))},
    "trl": {
        "images": ["images/1.png"],
        "messages": turns([{"type": "image"}, {"type": "text", "text": Q}], [{"type": "text", "text": "a cube"}]),
    },
    "axolotl": {"messages": turns([{"type": "image", "path": "images/1.png"}, {"type": "text", "text": Q}], "a cube")},
    "openai": {
        "messages": [
            SYSTEM,
            {"role": "user", "content": Q},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "images/1.png", "detail": "low"}}]},
            {"role": "assistant", "content": "a cube"},
        ]
    },
    "a list of turns": turns([{"type": "image", "image": "images/1.png"}, {"type": "text", "text": Q}], "a cube"),
    "trl, prompt and completion": {
        "prompt": turns(Q),
        "completion": turns("a cube", roles=("assistant",) * 2),
        "images": ["images/1.png"],
    },
    "query": {"query": "<image>" + Q, "response": "a cube", "images": ["images/1.png"]},
    "alpaca": {"instruction": "What is", "input": "it?", "output": "a cube", "images": ["images/1.png"]},
    "roboflow": {"image": "1.png", "prefix": Q, "suffix": "a cube"},
    "the cauldron": {"images": ["images/1.png"], "texts": [{"user": Q, "assistant": "a cube", "source": "x"}]},
    "the number of a choice": {"image": "1.png", "question": Q, "choices": ["a cat", "a cube"], "answer": 1},
    "the letter of a choice": {"image": "1.png", "question": Q, "options": ["a cat", "a cube"], "answer": "B"},
    "the text of a choice": {"image": "1.png", "question": Q, "choices": ["a cube", "1"], "answer": "a cube"},
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", CHATS)
def test_a_question_of_another_tool_is_read_with_its_answer(folder, name, suffix):
    path = write(folder / f"x.{suffix}", [CHATS[name]])
    assert read(path) == [("1.png", Q, ("a cube",), "")]
    files = prepare(PrepareConfig(source=str(path), output_dir=str(folder / "out"), splits="1"))
    line = json.loads(files["train"].read_text())
    assert (line["question"], line["answers"], Path(line["image"]).name) == (Q, ["a cube"], "1.png")


def test_each_question_of_a_chat_is_an_example_and_a_chat_with_other_images_is_counted(folder, capsys):
    talk = turns("<image>" + Q, "a cube", "<|image_1|>Which color?", "red")
    records = [{"messages": talk, "images": images} for images in (["images/1.png"], [], ["images/1.png", "images/2.png"])]
    path = write(folder / "x.jsonl", records)
    assert [one[1:3] for one in read(path)] == [(Q, ("a cube",)), ("Which color?", ("red",))]
    shown = capsys.readouterr().out
    assert "left out  2 lines" in shown
    assert "x.jsonl:2: the conversation has no image" in shown and "the conversation has 2 images; an example has one" in shown
    with pytest.raises(DataError, match=r"no usable line\n.*the conversation has no image"):
        read(write(folder / "y.jsonl", records[1:2]))
    with pytest.raises(DataError, match=r"no usable line; nothing was written\n.*the conversation has no image"):
        prepare(PrepareConfig(source=str(folder / "y.jsonl"), output_dir=str(folder / "out")))


@pytest.mark.parametrize("prefix", ["<CAPTION>", "<MORE_DETAILED_CAPTION>", "caption en", "caption", "<image>"])
def test_a_prefix_that_only_asks_for_a_caption_gives_a_caption(folder, prefix):
    path = write(folder / "x.jsonl", [{"image": "1.png", "prefix": prefix, "suffix": "a cube"}])
    assert read(path) == [("1.png", "", (), "a cube")]


def test_an_image_without_a_question_gives_a_caption(folder):
    content = [{"type": "image_url", "image_url": "images/1.png"}]
    assert read(write(folder / "x.jsonl", [{"messages": turns(content, "a cube")}])) == [("1.png", "", (), "a cube")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": turns(3, "a"), "images": ["1.png"]}, "a turn is .*expected a text under content or value"),
        ({"messages": [SYSTEM, {"role": "assistant", "content": "a"}], "images": ["1.png"]}, "has no question before it"),
        ({"messages": turns("q", ""), "images": ["1.png"]}, "an answer is empty"),
        ({"messages": [*turns("q"), 3], "images": ["1.png"]}, "a turn is 3; expected a text"),
        ({"images": ["1.png"]}, "no text: expected one of the keys text, caption"),
    ],
)
def test_an_invalid_record_is_a_reason(folder, record, reason):
    with pytest.raises(DataError, match=reason):
        read(write(folder / "x.jsonl", [record]))


def test_prodigy_s_captions_are_read_and_the_others_are_counted(folder, capsys):
    task = {"image": "images/1.png", "text": "1", "caption": "a cube", "_task_hash": 1, "_input_hash": 2}
    path = write(folder / "x.jsonl", [task | {"answer": answer} for answer in ("accept", "reject", "ignore")])
    assert read(path) == [("1.png", "", (), "a cube")]
    assert "it is marked as reject in Prodigy" in capsys.readouterr().out


def test_labelbox_s_text_answers_are_captions_of_the_external_id(folder, capsys):
    def row(*answers: str) -> Any:
        classifications = [{"name": "Caption", "text_answer": {"content": answer}} for answer in answers]
        labels = [{"annotations": {"objects": [], "classifications": classifications}}]
        data = {"id": "x", "external_id": "1.png", "row_data": "https://example.com/x.png"}
        return {"data_row": data, "projects": {"p": {"labels": labels}}}

    path = write(folder / "export.ndjson", [row("a cube", "a red cube"), row()])
    assert read(path) == [("1.png", "", (), "a cube"), ("1.png", "", (), "a red cube")]
    assert "the row has no text answer" in capsys.readouterr().out


def test_a_named_key_is_used_instead_of_a_pair_and_may_have_a_list(folder):
    path = write(folder / "x.jsonl", [{"image": "1.png", "prompt": "p", "response": "a"}])
    assert read(path, keys=Keys(text="response")) == [("1.png", "", (), "a")]
    path = write(folder / "x.jsonl", [{"filename": "1.png", "label": ["a", "b"]}])
    assert [one[3] for one in read(path, keys=Keys(text="label"))] == ["a", "b"]
    with pytest.raises(DataError, match=r"has the keys 'label'; name the right one: --text-key label\n"):
        read(path)
    with pytest.raises(DataError, match=r"has the keys 'pic', 'text'; name the right one: --image-key pic\n"):
        read(write(folder / "x.jsonl", [{"pic": "1.png", "text": "a"}]))
    with pytest.raises(DataError, match=r"name the right one: --image-key 'my bild' --text-key unterschrift\n"):
        read(write(folder / "x.jsonl", [{"nr": "3", "my bild": "a/1.JPG", "unterschrift": "ein Würfel"}]))
    with pytest.raises(DataError, match=r"has the keys 'words', 'n'; name the right one: --text-key words\n"):
        read(write(folder / "x.jsonl", [{"image": "1.png", "words": "a cube", "n": 3}]))


@pytest.mark.parametrize(
    ("line", "typo", "flag"),
    [
        ({"image": "1.png", "txet": "a"}, "write \"text\" for 'txet'", "--text-key txet"),
        ({"imgae": "1.png", "text": "a"}, "write \"image\" for 'imgae'", "--image-key imgae"),
        (
            {"imgae": "1.png", "txet": "a"},
            "write \"image\" for 'imgae' and \"text\" for 'txet'",
            "--image-key imgae --text-key txet",
        ),
        ({"image": "1.png", "txet": "a", "source": "a longer text"}, "write \"text\" for 'txet'", "--text-key source"),
        ({"image": "1.png", "captoins": ["a", "b"]}, "write \"captions\" for 'captoins'", "--text-key captoins"),
    ],
)
def test_a_misspelled_key_in_one_line_is_corrected_in_this_line(folder, line, typo, flag):
    """A flag would make every other line wrong, so it is named only if no line is right."""
    with pytest.raises(DataError) as error:
        read(write(folder / "x.jsonl", [{"image": "1.png", "text": "a"}, line]))
    assert f"; {typo}\n" in str(error.value) and "-key" not in str(error.value)
    with pytest.raises(
        DataError, match=re.escape(f"if only this line has a typo, {typo}; otherwise name the right one: {flag}\n")
    ):
        read(write(folder / "x.jsonl", [line]))
    with pytest.raises(DataError, match=re.escape(f"; name the right one: {flag} (all 3 lines have this problem)")):
        read(write(folder / "x.jsonl", [line, line, line]))


def test_prepare_corrects_the_misspelled_key_of_an_answer(folder, tmp_path):
    good = {"image": "1.png", "question": "what?", "answer": "a"}
    for other, fix in (("anwser", "write \"answer\" for 'anwser'"), ("note", 'add "answers", a list of texts, or "answer", a')):
        path = write(folder / "x.jsonl", [good, {"image": "1.png", "question": "what?", other: "a"}])
        with pytest.raises(DataError, match=f"x.jsonl:2: no answer: {re.escape(fix)}"):
            prepare(PrepareConfig(str(path), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("keys", "good", "line", "fix"),
    [
        (NO_KEYS, {"image": "1.png", "text": "a"}, {"image": "1.png", "my words": "a cube"}, "write \"text\" for 'my words'"),
        (NO_KEYS, {"image": "1.png", "text": "a"}, {"foto": "1.png", "text": "a"}, "write \"image\" for 'foto'"),
        (NO_KEYS, {"image": "1.png", "text": "a"}, {"image": "1.png", "label": 3}, 'add "text"'),
        (Keys(text="words"), {"image": "1.png", "words": "a"}, {"image": "1.png", "wrods": "a"}, "write \"words\" for 'wrods'"),
        (Keys(text="words"), {"image": "1.png", "words": "a"}, {"image": "1.png", "text": "a"}, "write \"words\" for 'text'"),
        (Keys(text="l'a"), {"image": "1.png", "l'a": "a"}, {"image": "1.png", "la": "a"}, "write \"l'a\" for 'la'"),
        (NO_KEYS, {"image": "1.png", "text": "a"}, {"image": "1.png", 'my"key': "a cube"}, 'write "text" for \'my"key\''),
        (NO_KEYS, {"image": "1.png", "text": "a"}, {"image": "1.png", "foto\\": "a cube"}, "write \"text\" for 'foto\\\\'"),
        (
            Keys(text="words"),
            {"image": "1.png", "words": "a"},
            {"image": "1.png", "words; did you mean --x-key y": "a"},
            "write \"words\" for 'words; did you mean --x-key y'",
        ),
    ],
)
def test_a_fix_for_one_line_does_not_change_the_names_of_the_valid_lines(folder, tmp_path, keys, good, line, fix):
    path = write(folder / "x.jsonl", [good, line])
    flags = {f"{name}_key": value for name, value in vars(keys).items() if value}
    for run in (
        lambda: read(path, keys=keys),
        lambda: prepare(PrepareConfig(str(path), output_dir=str(tmp_path / "out"), **flags)),
    ):
        with pytest.raises(DataError) as error:
            run()
        assert f"; {fix}\n" in str(error.value) and "-key " not in str(error.value).replace("--x-key y", "")


def test_a_key_that_contains_a_known_name_is_no_misspelling(folder, tmp_path):
    """The keys of VQAv2 and VizWiz contain other values."""
    good = {"image": "1.png", "question": "what?", "answer": "a"}
    for key in ("answer_type", "answerable", "answer_id"):
        path = write(folder / "x.jsonl", [good, {"image": "1.png", "question": "what?", key: "other"}])
        with pytest.raises(DataError, match='no answer: add "answers"'):
            prepare(PrepareConfig(str(path), output_dir=str(tmp_path / "out")))
    for line in ({"image_id": 3, "text": "a"}, {"image": "1.png", "text_id": 3}):
        missing = "text" if "image" in line else "image"
        with pytest.raises(DataError, match=f'; add "{missing}"\n'):
            read(write(folder / "x.jsonl", [{"image": "1.png", "text": "a"}, line]))


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ({"image": "1.png", "answer": "red"}, 'add "question"'),
        ({"image": "1.png", "question_": "what?", "answer": "a"}, "write \"question\" for 'question_'"),
        (
            {"image": "1.png", "caption_en": "a cube", "source": "https://example.org/" + "x" * 50},
            "\"caption\" for 'caption_en'",
        ),
        ({"image": "1.png", "alt text": "a cube", "credit": "x" * 50}, "\"alt_text\" for 'alt text'"),
    ],
)
def test_a_line_without_a_text_gets_a_fix_beside_valid_lines_and_alone(folder, line, fix):
    for lines in ([{"image": "1.png", "text": "a"}, line], [line] * 3):
        with pytest.raises(DataError) as error:
            read(write(folder / "x.jsonl", lines))
        assert fix in str(error.value) or "name the right one: --" in str(error.value)
    assert "-key" in str(error.value) or fix in str(error.value)


def test_own_keys_of_questions_get_the_flags_of_questions(folder):
    line = {"bild": "1.png", "frage": "How many cubes are there in all?", "antwort": "two", "id": 3}
    with pytest.raises(DataError, match=r"--image-key bild --question-key frage --answer-key antwort \(all 3 lines"):
        read(write(folder / "x.jsonl", [line] * 3))
    line |= {"antwort": ["two", "2"]}
    with pytest.raises(DataError, match="--question-key frage --answer-key antwort"):
        read(write(folder / "x.jsonl", [line] * 3))
    assert read(folder / "x.jsonl", keys=Keys("bild", "", "frage", "antwort"))


@pytest.mark.parametrize(
    ("rest", "answer"),
    [
        ({"a": "yes", "split": "train"}, "a"),
        ({"a": "no", "answer_type": "yes/no"}, "a"),
        ({"a": "yes", "bbox": [1, 2, 3, 4]}, "a"),
        ({"one": "yes", "two": "no"}, "KEY; replace KEY by one of these keys"),
        ({"n": 3}, "KEY; replace KEY by one of these keys"),
    ],
)
def test_the_key_of_an_answer_is_named_only_if_it_is_clear(folder, rest, answer):
    line = {"image": "1.png", "q": "is it red?"} | rest
    with pytest.raises(DataError, match=f"--question-key q --answer-key {answer} "):
        read(write(folder / "x.jsonl", [line] * 3))


def test_two_keys_do_not_get_the_same_new_name(folder):
    line = {"image": "1.png", "caption_en": "a cat", "caption_de": "eine Katze"}
    with pytest.raises(DataError) as error:
        read(write(folder / "x.jsonl", [{"image": "1.png", "text": "a"}, line]))
    assert "; write \"caption\" for 'caption_de'\n" in str(error.value)


def test_a_rare_problem_does_not_hide_the_others(folder):
    lines = [{"image": "1.png", "text": ""}] * 5 + [{"image": "1.png", "words": "a cat"}, {"image": "1.png", "remark": "b"}]
    with pytest.raises(DataError) as error:
        read(write(folder / "x.jsonl", lines))
    assert str(error.value).count("the text is empty") == 5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_fix_of_most_lines_is_named_if_no_line_is_valid(folder, first):
    """A flag for the misspelled key of one line would make all other lines invalid."""
    lines = [{"shot": "1.png", "says": "a cube"}] * 4
    odd = [{"shot": "1.png", "sais": "a cube"}, {"shot": "1.png"}]
    path = write(folder / "x.jsonl", [*odd[:first], *lines, *odd[first:]])
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).endswith("name the right one: --image-key shot --text-key says (4 of 6 lines have this problem)")


def test_an_error_in_one_line_of_the_validation_file_names_no_other_column(folder):
    """The names of the columns are right, because other lines are valid."""
    for bad in ({"image": "1.png", "wrods": "a"}, {"image": "1.png"}):
        path = write(folder / "val.jsonl", [{"image": "1.png", "words": "a"}, bad, bad])
        with pytest.raises(DataError) as error, of_several_files(Keys(text="words")):
            read(path, keys=Keys(text="words"))
        assert "val.jsonl:2: it has no 'words'" in str(error.value) and "|" not in str(error.value)
    with pytest.raises(DataError, match=r'--text-key "words\|text"'), of_several_files(Keys(text="words")):
        read(write(folder / "val.jsonl", [{"image": "1.png", "text": "a"}]), keys=Keys(text="words"))


@pytest.mark.parametrize("length", (300, 5000))
def test_a_long_key_has_a_fix_too(folder, length):
    path = write(folder / "x.jsonl", [{"image": "1.png", "text": "a"}, {"image": "1.png", "it isn't " * length: "a cube"}])
    with pytest.raises(DataError, match='; write "text" for ') as error:
        read(path)
    assert len(str(error.value)) < 1500


def test_the_reason_of_a_left_out_line_fits_the_other_lines(folder, tmp_path, capsys):
    path = write(folder / "x.jsonl", [{"image": "1.png", "text": "a"}, {"image": "1.png", "txet": "a"}])
    prepare(PrepareConfig(str(path), output_dir=str(tmp_path / "out"), on_bad_data="skip", splits="1"))
    assert "write \"text\" for 'txet'" in (printed := capsys.readouterr().out) and "-key" not in printed
    (dropped,) = (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()
    assert "-key" not in dropped


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "1.png", "quesiton": "what?", "answer": "a"}, "write \"question\" for 'quesiton'\n"),
        ({"imgae": "1.png", "question": "what?", "answer": "a"}, "write \"image\" for 'imgae'\n"),
    ],
)
def test_a_misspelled_key_of_a_question_gives_no_flag_for_the_text(folder, line, message):
    """The question would become a caption."""
    path = write(folder / "x.jsonl", [{"image": "1.png", "question": "what?", "answer": "a"}, line])
    with pytest.raises(DataError, match=re.escape(message)):
        read(path)


@pytest.mark.parametrize(
    ("keys", "entry", "reason"),
    [
        (Keys(text="lomg"), {"image": "1.png", "caption": "a", "long": "b"}, 'did you mean --text-key "long"?'),
        (Keys(text="words"), {"image": "1.png", "caption": "a"}, "it has no 'words'; its keys are 'image', 'caption'"),
        (Keys(text="words"), {"image": "1.png", "caption": "a"}, 'did you mean --text-key "caption"?'),
        (Keys(image="Foto"), {"file_name": "1.png", "text": "a"}, 'did you mean --image-key "file_name"?'),
        (Keys(image="pic"), {"image": "1.png", "picture": "2.png", "text": "a"}, 'did you mean --image-key "picture"?'),
        (Keys(question="ask"), {"image": "1.png", "question": "q?", "answer": "a"}, "it has no 'ask'"),
        (
            Keys(question="ask"),
            {"image": "1.png", "question": "q?", "answer": "a"},
            "its keys are 'image', 'question', 'answer'",
        ),
        (Keys(answer="labl"), {"image": "1.png", "question": "q?", "answer": "a", "label": "b"}, '--answer-key "label"?'),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_name_that_no_key_has_is_an_error_and_no_common_name_is_used(folder, name, keys, entry, reason):
    path = folder / name
    path.write_text(json.dumps(entry if name == "x.jsonl" else [entry, entry]))
    with pytest.raises(DataError) as error:
        read(path, keys=keys)
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_a_named_key_of_a_format_with_fixed_keys_is_reported(folder, capsys, kind):
    coco = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    coco_file, text_file = folder / "x.json", folder / "images/1.txt"
    (coco_file if kind == "coco" else text_file).write_text(json.dumps(coco) if kind == "coco" else "a")
    source = coco_file if kind == "coco" else folder / "images"
    assert [one[3] for one in read(source, on_bad_data="skip", keys=Keys(text="words", answer="b"))] == ["a"]
    assert f"--text-key, --answer-key have no effect: the keys of {kind} are fixed" in capsys.readouterr().out
    read(source, on_bad_data="skip")
    assert "no effect" not in capsys.readouterr().out


def test_lines_with_captions_and_lines_with_questions_may_have_different_named_keys(folder):
    lines = [{"pic": "1.png", "cap": "a"}, {"pic": "1.png", "ask": "q?", "label": "b"}]
    path = write(folder / "x.jsonl", lines)
    assert read(path, keys=Keys("pic", "cap", "ask", "label")) == [("1.png", "", (), "a"), ("1.png", "q?", ("b",), "")]


SPLITS = ("train", "val", "test")
FILES = {
    "names": ("{}.jsonl", {"val": "valid"}),
    "words": ("captions_{}.json", {"val": "validation"}),
    "roboflow": ("_annotations.{}.jsonl", {"val": "valid"}),
    "folders": ("{}/annotations.jsonl", {"val": "valid"}),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_differ_only_in_the_split_are_one_data_set(folder, kind):
    """A folder with such files is read whole: each file is its split, in prepare and in training."""
    pattern, names = FILES[kind]
    for split, color in zip(SPLITS, ("red", "blue", "green"), strict=True):
        path = folder / pattern.format(names.get(split, split))
        write(path, [{"image": f"{split}.png", "caption": split}])
        photo(path.parent / f"{split}.png", color)
    files = prepare(PrepareConfig(source=str(folder), output_dir=str(folder / "out")))
    assert {split: json.loads(path.read_text())["text"] for split, path in files.items()} == {split: split for split in SPLITS}
    sides: dict[str, list] = {}
    annotations.read(folder, splits=sides)
    assert {split: [one.text for one in examples] for split, examples in sides.items()} == {split: [split] for split in SPLITS}


def test_files_of_two_data_sets_are_not_mixed(folder):
    for name in ("train.jsonl", "notes_test.jsonl"):
        write(folder / name, [{"image": "images/1.png", "caption": "a"}])
    with pytest.raises(DataError, match="2 images without captions; write"):
        annotations.read(folder)


def test_lists_under_the_names_of_splits_are_all_read(folder):
    document = {split: [{"image": f"images/{n}.png", "caption": split}] for n, split in ((1, "train"), (2, "test"))}
    sides: dict[str, list] = {}
    annotations.read(write(folder / "x.json", document), splits=sides)
    assert {split: [one.text for one in examples] for split, examples in sides.items()} == {
        "train": ["train"],
        "test": ["test"],
    }


def test_one_metadata_file_above_folders_named_train_and_test_has_their_splits(folder):
    for split in ("train", "test"):
        photo(folder / f"{split}/{split}.png", {"train": "red", "test": "blue"}[split])
    (folder / "metadata.csv").write_text("file_name,text\ntrain/train.png,a\ntest/test.png,b\n")
    files = prepare(PrepareConfig(source=str(folder), output_dir=str(folder / "out")))
    assert {split: json.loads(path.read_text())["text"] for split, path in files.items()} == {"train": "a", "test": "b"}


def test_lines_that_all_have_one_problem_are_one_error_with_its_fix(folder):
    """Chats on a captioning base: the error names the task and the base to choose, once."""
    path = write(folder / "x.jsonl", [CHATS["llama-factory"]] * 4)
    example = annotations.read(path)[0][0]
    caption, retrieval = (kind.check(object.__new__(kind), example) for kind in (CaptionTask, RetrievalTask))
    assert "--task vqa" in caption and all("--model Salesforce/blip-vqa-base" in reason for reason in (caption, retrieval))
    for on_bad_data in ("stop", "skip"):
        with pytest.raises(DataError) as error:
            read(path, check=lambda _: caption, on_bad_data=on_bad_data)
        assert str(error.value) == f"{path}:1: {caption} (all 4 lines have this problem)"


def test_images_inside_json_are_unpacked_once_by_prepare(folder):
    """An OpenAI chat with two questions, and a line that is longer than other lines may be, as a photo makes it."""
    content = (folder / "images/1.png").read_bytes() + bytes(2**20)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    chat = {
        "messages": turns([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": Q}], "a cube", Q, "b")
    }
    prodigy = {"image": url, "caption": "a cube", "answer": "accept", "_task_hash": 1, "_input_hash": 2}
    for name, records, count in (("chat.jsonl", [chat], 2), ("chat.json", [chat], 2), ("prodigy.jsonl", [prodigy], 1)):
        path, output = write(folder / name, records), folder / f"{name}_out"
        with pytest.raises(DataError, match=r"contains images.*; convert it once.*\n.*prepare --source"):
            read(path)
        lines = prepare(PrepareConfig(source=str(path), output_dir=str(output), splits="1"))["train"].read_text().splitlines()
        images = {json.loads(line)["image"] for line in lines}
        assert len(lines) == count and [(output / image).read_bytes() for image in images] == [content]
    path = write(folder / "broken.jsonl", [chat, {"image": url[:-3] + "*", "text": "a"}])
    with pytest.raises(DataError, match=r"broken.jsonl:2: its image is not valid base64"):
        prepare(PrepareConfig(source=str(path), output_dir=str(folder / "broken")))
    assert not (folder / "broken").exists()


def test_web_addresses_in_chats_are_one_error_with_commands_that_work(folder):
    """The commands give a copy whose paths are those of the downloaded files."""
    content = [{"type": "image_url", "image_url": {"url": "https://example.com/a/1.png"}}, {"type": "text", "text": Q}]
    for records in (
        [{"messages": turns(content, "a cube")}],
        [{"image": "https://example.com/a/1.png", "prefix": Q, "suffix": "a"}],
    ):
        path = write(folder / "chat.jsonl", records)
        with pytest.raises(DataError) as error:
            read(path)
        commands = str(error.value).split("\n")[1:]
        photo(folder / "downloaded/example.com/a/1.png")  # what wget writes
        subprocess.run(f"{commands[0]} && {commands[2]}", shell=True, check=True, cwd=folder)
        assert (folder / "addresses.txt").read_text() == "https://example.com/a/1.png\n"
        assert read(folder / "chat_local.jsonl")[0][:2] == ("1.png", Q)
