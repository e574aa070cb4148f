"""Numbers of things in messages have the right singular and plural."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from lora_blip.runtime.counts import counted, lr_ratio_of, plural, steps_of

PACKAGE = Path(__file__).resolve().parents[2] / "lora_blip"
NOUNS = (
    "steps images captions texts lines files rows examples questions answers words batches modules adapters linears "
    "entries runs epochs bytes tokens predictions references columns processes groups parameters"
).split()
NOUN = re.compile(rf"^ (?:more |other |training |validation |ViT )?({'|'.join(NOUNS)})\b")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "step", "0 steps"), (1, "step", "1 step"), (1200, "image", "1,200 images"), (2, "batch", "2 batches")],
)
def test_a_number_has_its_noun(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_only_the_last_word_changes_and_the_verb_agrees() -> None:
    assert (counted(1, "entry", "have"), counted(2, "training entry", "have")) == ("1 entry has", "2 training entries have")
    assert plural("module") == "modules"


def test_the_steps_of_an_untrusted_file_are_a_text() -> None:
    assert [steps_of({"steps": steps}) for steps in (1, 20, "1", None)] == ["1 step", "20 steps", "? steps", "? steps"]


SEVERAL = {  # the number is never 1, or the noun is not counted, or the error can only be one of the calling code
    "data/annotations.py: len(problems) lines", "data/chats.py: len(images) images", "data/conversions.py: len(images) images",
    "data/disk_cache.py: value.nbytes bytes", "data/prepare/parquet_reader.py: len(value) images",
    "data/prepare/sources.py: flag captions", "data/prepare/sources.py: flag questions", "data/shards.py: self.size bytes",
    "inference/arguments.py: kind answers",
    "inspection/command.py: len(self.adapters) adapters", "lora/header.py: claimed bytes",
    "lora/peft_config.py: len(pattern) entries", "lora/peft_format.py: len(modules) linears",
    "lora/spectrum.py: second.shape[-1] columns", "metrics/bootstrap.py: first.shape images",
    "metrics/captions.py: len(predictions) predictions", "metrics/diversity.py: len(predictions) predictions",
    "metrics/diversity.py: predictions predictions", "metrics/java.py: len(captions) captions",
    "metrics/java.py: len(tokenized) lines", "models/text_check.py: len(ids) tokens", "runtime/distributed.py: command runs",
    "training/run_folder.py: entry['images_per_s'] images", "training/run_folder.py: learner.ranks.count processes",
}  # fmt: skip


@cache
def tree(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, expression with its noun) for each number in an f-string that is followed by a noun in the plural."""
    for node in tree(path):
        if isinstance(node, ast.JoinedStr):
            for value, text in pairwise(node.values):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and NOUN.match(str(text.value)):
                    yield node.lineno, ast.unparse(value.value) + NOUN.match(str(text.value))[0]  # type: ignore[index]


def test_no_message_has_a_plural_that_is_wrong_for_1() -> None:
    """Numbers are written by `counted`. A constant, in capitals, may have a fixed noun."""
    found = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in PACKAGE.rglob("*.py")
        for _, text in messages(path)
        if not text.split()[0].isupper()
    }
    assert found - SEVERAL == set()
    texts = {path: [node.value for node in tree(path) if isinstance(node, ast.Constant)] for path in PACKAGE.rglob("*.py")}
    assert [path for path, values in texts.items() if any("(s)" in value for value in values if isinstance(value, str))] == []


def test_the_ratio_of_lora_plus_is_named_only_if_it_is_one() -> None:
    """The metadata may come from a stranger: any other value gives no text."""
    assert lr_ratio_of({"settings": {"lr_ratio": 16.0}}) == "LR_RATIO = 16"
    for value in (None, 1, 1.0, 0, -4.0, True, "16", [16], float("nan"), float("inf"), 10**400):
        assert lr_ratio_of({"settings": {"lr_ratio": value}}) == ""
    assert lr_ratio_of({}) == lr_ratio_of({"settings": [1]}) == ""
