"""The length of generated texts is chosen from the data; cut texts are counted and reported."""

import json
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.example import Example
from lora_blip.evaluation.comparison import evaluate
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.pipeline import infer
from lora_blip.lora import adapter_file
from lora_blip.models.language import CutText
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.text_length import MARGIN, OF_BASE, TextCount, fit_generation, longer_texts, token_counts
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.kill import killed_at, run_processes
from tests.support.runs import assert_same, config_of, elsewhere, only_run

WORDS = [
    "a",
    "red",
    "cube",
    "cubes'",
    "it's",
    "2,500",
    "U.S.",
    "Würfel",
    "über",
    "方块",
    "cube-like",
    "x" * 30,
    "#1",
    "[SEP",
    "e\u0301",
]


def texts_of_words(count: int = 200) -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def example(text: str = "", **more: object) -> Example:
    return Example(Path("x.png"), text, "x.png", 1, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- counted


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_tokens_are_counted_as_the_tokenizer_does(make, kind, checked):
    """`token_counts` equals the number of tokens of each text plus the end token, with and without a space before it."""
    task, texts = CaptionTask(make(kind)), texts_of_words()
    if checked:
        task.pretokenize([example(text) for text in texts])
    for spaced in (False, True):
        expected = {
            text: len(task.backbone.tokenizer(f" {text}" if spaced else text, add_special_tokens=False).input_ids) + 1
            for text in texts
        }
        assert token_counts(task, texts, spaced) == expected


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_the_texts_that_a_limit_cuts_are_counted_with_all_their_lines(make, kind):
    """`longer_texts` equals a count over the tokenized training rows, also for lines with their own prompt."""
    task, texts = CaptionTask(make(kind)), [*texts_of_words(60), "a cube", "a cube", "two red cubes", "two red cubes"]
    examples = [example(text, prompt="a photo of" if number % 3 == 0 else "") for number, text in enumerate(texts)]
    rows = task.language.tokenize([task.prompt_of(e) for e in examples], texts).pad()
    tokens = (rows.targets != -100).sum(1).tolist()
    for limit in (1, 3, 5, 9, max(tokens) - 1, max(tokens)):
        longer, most, total = longer_texts(task, examples, limit)
        assert longer.total() == sum(n > limit for n in tokens) and total == len(texts)
        assert most == (max(tokens) if limit < max(tokens) else 0)


@pytest.mark.parametrize("kind", ["vqa", "blip", "opt", "t5"])
def test_answers_get_room_for_the_longest_of_any_line(make, kind):
    """The automatic length has room for the longest answer of any line. Questions do not count."""
    task = VqaTask(make(kind))
    answers = [("red", "dark red"), ("a red cube on a blue cube", "red"), ("no",)]
    examples = [example(question="what is on top of the table, and of which colour is it?", answers=each) for each in answers]
    longest = len(task.checker.ids("a red cube on a blue cube")) + 1
    assert longest + MARGIN <= fit_generation(task, examples, 0) <= longest + MARGIN + 2  # OPT's tokens after a space


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_a_text_that_fills_the_model_has_room_for_its_end(make, kind):
    """The automatic length is at most the model's room, also for a text that fills it."""
    task = CaptionTask(make(kind))
    task.language.max_tokens = 40
    room = task.language.room("")
    text = " ".join(["a"] * room)
    assert len(task.checker.ids(text)) == room and not task.check(example(text))
    limit = fit_generation(task, [example(text)], 0)
    assert limit == room + 1
    task.require_room("")


# ---------------------------------------------------------------- cut


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_a_text_without_its_end_token_is_a_cut_text(make, kind, beams):
    """A text is a CutText if and only if a generation with more tokens continues it."""
    task = (VqaTask if kind == "vqa" else CaptionTask)(make(kind), "", Generation(4, beams))
    language, has_end = task.language, []
    real = language.generate_ids

    def continued(*arguments: object) -> torch.Tensor:
        ids = real(*arguments)
        has_end.extend(language.end_id in row for row in ids.tolist())
        return ids

    language.generate_ids = continued  # type: ignore[method-assign]
    images = torch.randn(6, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(1))
    examples = [example(question="what is it?" if kind == "vqa" else "")] * 6
    texts = task.predict(images, examples)
    assert [isinstance(text, CutText) for text in texts] == [not ended for ended in has_end]
    if beams == 1:
        task.generation = Generation(20)
        longer = task.predict(images, examples)
        for text, whole in zip(texts, longer, strict=True):
            assert whole.startswith(str(text)) if isinstance(text, CutText) else whole == text


def test_a_cut_text_is_a_text():
    text = CutText("a red")
    assert text == "a red" and hash(text) == hash("a red") and json.dumps([text]) == '["a red"]'
    assert isinstance(pickle.loads(pickle.dumps(text)), CutText)
    assert type(text.upper()) is str and f"{text}" == "a red"


def test_the_fix_is_a_number_that_the_model_has_room_for(make):
    """The suggested limit is twice the tokens, at most the model's room. Data of short texts gets no such suggestion."""
    task = CaptionTask(make("blip"), "", Generation(10))
    count = TextCount().add([CutText("a"), "b", CutText("c"), " "])
    cut, empty = count.warnings(task, "texts")
    fix = "Set MAX_NEW_TOKENS = 20 (--max-new-tokens 20); if the texts repeat words, train longer instead"
    assert cut == f"2 of 4 texts were cut after 10 tokens, before their end. {fix}"
    assert empty == "1 of 4 texts are empty; a longer training (EPOCHS) or a lower learning rate (LR) may help"
    assert count.warnings(task, OF_BASE)[1] == "1 of 4 texts of the base are empty"
    assert "train longer (EPOCHS, MAX_STEPS)" in count.warnings(task, "texts", [example("a cube")])[0]
    assert "Set MAX_NEW_TOKENS" in count.warnings(task, "texts", [example("a cube " * 9)])[0]
    room = task.language.room("") + 1
    task.generation = Generation(room - 1)
    assert f"MAX_NEW_TOKENS = {room} " in count.warnings(task, "texts")[0]
    task.generation = Generation(room)
    assert count.warnings(task, "texts")[0].endswith("The model has no room for longer texts")
    assert TextCount().add(["a"]).warnings(task, "texts") == []


# ---------------------------------------------------------------- reported


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferConfig:
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 7)
    return InferConfig(
        model=str(checkpoints["blip"]), adapter="none", images="photos", max_new_tokens=4, batch_size=3, output_dir="out",
        device="cpu",
    )  # fmt: skip


def cut_among(config: InferConfig, make) -> int:
    task = CaptionTask(make("blip"), "", Generation(config.max_new_tokens))
    return sum(isinstance(p.text, CutText) for p in Captioner(task)(sorted(Path("photos").iterdir())))


@pytest.mark.parametrize("ranks", [1, 2])
def test_infer_reports_the_texts_that_were_cut(config, make, capfd, ranks):
    """`infer` prints one line with the number of cut texts and the fix, with one process or several."""
    cut = cut_among(config, make)
    assert cut
    if ranks == 1:
        infer(config)
    else:
        assert run_processes(ranks, lambda: infer(config)) == [0] * ranks
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "were cut" in line]
    assert line.startswith(f"warning: {cut} of 7 texts of the base were cut after 4 tokens") and "--max-new-tokens 8" in line


def test_evaluate_warns_of_texts_that_were_cut(config, capsys, monkeypatch):
    """`evaluate` reports cut texts on the terminal and in metrics.json."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java, which takes seconds to start
    arguments = {"references": "annotations.jsonl", "model": config.model, "adapter": "none", "device": "cpu"}
    folder = evaluate(EvaluateConfig(**arguments, max_new_tokens=2, output_dir="scores"))
    (warning,) = [w for w in json.loads((folder / "metrics.json").read_text())["warnings"] if "cut" in w]
    assert (
        re.match(r"\d of 7 texts of the base were cut after 2 tokens", warning) and "MAX_NEW_TOKENS = 10 " in warning
    )  # the longest
    assert f"WARNING: {warning}" in capsys.readouterr().out


def test_validation_reports_the_texts_that_were_cut(checkpoints, tmp_path, capsys):
    """A limit below the data's texts is reported before training and with each validation."""
    train(config_of(checkpoints, tmp_path, max_new_tokens=2, epochs=1))
    printed = capsys.readouterr().out
    assert re.search(
        r"warning: max_new_tokens = 2 cuts \d+ of 16 texts.*MAX_NEW_TOKENS = 0 \(--max-new-tokens 0\) has room for all", printed
    )
    found = re.search(r"warning: \d of 3 validation texts were cut after 2 tokens.*Set MAX_NEW_TOKENS = (\d+)", printed)
    assert found and int(found[1]) > 4  # the longest validation text


# ---------------------------------------------------------------- a run of an older version


def test_a_run_that_began_with_another_length_continues_with_it(checkpoints, tmp_path, capsys):
    """A run of an older version with a fixed length of 40 resumes with 40 if the setting is automatic."""
    config = config_of(checkpoints, tmp_path, max_new_tokens=40)
    whole = train(config)
    again = elsewhere(config)
    with killed_at(5):
        train(again)
    run = only_run(again)
    capsys.readouterr()
    path = train(replace(again, max_new_tokens=0))
    assert path.parent == run and "MAX_NEW_TOKENS remains 40" in capsys.readouterr().out
    assert_same(whole, path)
    assert adapter_file.read(path).task["generation"]["max_new_tokens"] == 40
    assert json.loads((run / "config.json").read_text())["max_new_tokens"] == 40


def test_an_automatic_length_is_stored_and_found_again(checkpoints, tmp_path):
    """A run with an automatic length resumes with the same settings, also by path. A fixed number starts another run."""
    config = config_of(checkpoints, tmp_path, max_new_tokens=0)
    with killed_at(5):
        train(config)
    run = only_run(config)
    stored = json.loads((run / "config.json").read_text())["max_new_tokens"]
    assert stored > 1
    assert train(replace(config, max_new_tokens=stored + 1)).parent != run
    assert train(replace(config, resume=str(run))).parent == run
