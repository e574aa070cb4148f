"""Texts are encoded and decoded as the processor of transformers does it, for tokenizers of the classes of real checkpoints."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from lora_blip.data.example import Example
from lora_blip.models.loading import Backbone, load_backbone
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.registry import TASKS, default_task
from tests.support import tiny
from tests.support.tokenizers import CHINESE, save_bert, save_t5

KINDS = ("blip", "vqa", "itm", "opt", "opt of 2023", "t5")  # the six kinds of published checkpoints
IMAGE = Image.new("RGB", (8, 8))
TEXTS = {
    "words": "a red cube on top of a blue cube",
    "accents": "Café à la crème, naïve Ångström ÉÎÕÜ",
    "a combining accent": "cafe\u0301",
    "digits": "12,345.67 € at 9:30, 2nd of 3",
    "emoji": "😀 👩\u200d👩\u200d👧 🇩🇪 ok",
    "Chinese": f"{CHINESE} and a red cube",
    "other scripts": "한국어 العربية русский",
    "mixed case": "A RED Cube McDonald",
    "quotes": "\"double\" 'single' “curly” ‘typographic’ it's don't",
    "a newline": "a red\ncube\r\n",
    "a tab": "a\tred\tcube",
    "spaces": "  two   spaces\u00a0and\u200bmore ",
    "punctuation": "! ? . , ; : ( ) [ ] { } a , b . c 's n't",
    "compatibility characters": "ﬁ ½ ²",
    "one long word": "a" * 150,
    "a very long text": "a red cube " * 400,
}
SPECIAL = ("a<image>b", "</s> end", "[SEP] x", "<pad>", "[DEC]", "[CLS][CLS]", "<extra_id_0>", "<s>")


@pytest.fixture
def pair(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], tuple[Backbone, Any]]:
    """Return our backbone and transformers' processor of a checkpoint."""

    def opened(kind: str) -> tuple[Backbone, Any]:
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoints[kind.partition(" ")[0]], folder)
        config = json.loads((folder / "config.json").read_text())
        if kind in ("blip", "vqa", "itm"):
            (folder / "tokenizer.json").unlink()
            save_bert(folder, config["text_config"]["vocab_size"])
        elif kind == "t5":
            save_t5(folder)
        elif kind == "opt of 2023":
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            del config["image_token_index"]
            (folder / "config.json").write_text(json.dumps(config))
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        if kind in ("opt", "opt of 2023", "t5"):
            processor.num_query_tokens = tiny.QUERIES
        return load_backbone(str(folder), "cpu"), processor

    return opened


def processed(processor: Any, text: str) -> list[int]:
    ids = processor(images=IMAGE, text=text).input_ids
    return ids[0] if isinstance(ids[0], list) else ids


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_encoded_as_the_processor_does(pair, kind):
    """The prompt ids equal those that transformers' `generate` gets. A BLIP caption starts with [DEC] and has no [SEP]."""
    backbone, processor = pair(kind)
    task = TASKS[default_task(backbone.architecture)](backbone)
    for what, text in (TEXTS | {text: text for text in SPECIAL}).items():
        expected = processed(processor, text)
        if kind == "itm":
            assert task.matcher.tokenize([text]).ids[0].tolist() == expected, what
            continue
        if kind == "blip":  # as BlipForConditionalGeneration.generate does
            expected = [backbone.model.config.text_config.bos_token_id, *expected[1:-1]]
        assert task.language.prompt_ids(text) == expected, what


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "itm"])
def test_every_text_is_decoded_as_the_processor_does(pair, kind):
    """Decoding equals that of the processor, for the ids of texts and for random ids with special and unknown tokens."""
    backbone, processor = pair(kind)
    language, draw = TASKS[default_task(backbone.architecture)](backbone).language, random.Random(0)
    rows = [processed(processor, text) for text in TEXTS.values()]
    rows += [[draw.randrange(len(backbone.tokenizer)) for _ in range(12)] for _ in range(200)]
    assert language.texts_of(torch.tensor(rows[0])[None]) == ["a red cube on top of a blue cube"]
    for row in rows:
        assert language.texts_of(torch.tensor([row])) == [processor.decode(row, skip_special_tokens=True)], row


@pytest.mark.parametrize("kind", ["blip", "vqa", "opt", "opt of 2023", "t5"])
@pytest.mark.parametrize("prompt", ["", "a picture of", "Where is it?"])
def test_labels_are_the_tokens_of_the_text_after_its_prompt(pair, kind, prompt):
    """A decoder's row is the encoding of prompt, space and text; an encoder-decoder's labels are the text's own encoding."""
    backbone, processor = pair(kind)
    language = TASKS[default_task(backbone.architecture)](backbone).language
    for what, text in TEXTS.items():
        text = " ".join(text.split())  # as every text of a data file
        rows = language.tokenize([prompt], [text])
        labels = [label for label in rows.targets[0] if label != IGNORE]
        assert labels[-1] == language.end_id, what
        whole = processor.tokenizer(f"{prompt} {text}".strip() if kind.startswith(("blip", "opt")) else text).input_ids
        if kind.startswith("opt"):
            assert [*rows.inputs[0][tiny.QUERIES :]] == [*whole, language.end_id], what
        elif kind == "blip":
            assert rows.inputs[0][1:] == whole[1:], what
        else:
            assert labels == whole[1 if kind == "vqa" else 0 :], what


@pytest.mark.parametrize(
    ("kind", "text"), [("blip", "[SEP]"), ("vqa", "[CLS]"), ("itm", "[PAD]"), ("opt", "<image>"), ("opt", "</s>"),
                       ("opt of 2023", "<image>"), ("t5", "<extra_id_0>"), ("t5", "<image>"), ("t5", "<pad>")]
)  # fmt: skip
def test_a_text_with_a_special_token_is_refused_with_its_name(pair, kind, text):
    """A text that contains a special token is refused. transformers would encode it as the token itself."""
    backbone, _ = pair(kind)
    task = TASKS[default_task(backbone.architecture)](backbone)
    fields = {"question": "what?", "answers": (f"a {text} b",)} if kind == "vqa" else {"text": f"a {text} b"}
    message = task.check(Example(**{"image": Path("a.png"), "text": "", "name": "a.png", "line": 1} | fields))
    assert f"contains {text!r}, which the model uses as a special token; remove it" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_too_long_is_refused_with_its_number_of_tokens(pair, kind):
    backbone, processor = pair(kind)
    task = TASKS[default_task(backbone.architecture)](backbone)
    text = TEXTS["a very long text"].strip()
    tokens = len(processor.tokenizer(text, add_special_tokens=False).input_ids)
    fields = {"question": "what?", "answers": (text,)} if kind == "vqa" else {"text": text}
    message = task.check(Example(**{"image": Path("a.png"), "text": "", "name": "a.png", "line": 1} | fields))
    assert f"the text has {tokens} tokens, and the model has room for" in message
