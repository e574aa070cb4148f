"""An unusable setting of a tokenizer, image processor or config raises one error, or has no effect."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_blip.errors import ModelError
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.registry import TASKS, default_task

NAN = float("nan")
Entry = Callable[[str, str, str, Any], Path]


@pytest.fixture
def with_entry(checkpoints: dict[str, Path], tmp_path: Path) -> Entry:
    """Return a function: with_entry("blip", "config.json", "text_config.dtype", "x") copies a checkpoint and sets an entry."""

    def copy(kind: str, file: str, key: str, value: Any) -> Path:
        folder = Path(shutil.copytree(checkpoints[kind], tmp_path / "copy"))
        content = json.loads((folder / file).read_text())
        *path, last = key.split(".")
        place = content
        for step in path:
            place = place[step]
        place[last] = value
        (folder / file).write_text(json.dumps(content))
        return folder

    return copy


TOKENIZER, SETTINGS, IMAGES, CONFIG = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"
REFUSED = [
    ("blip", TOKENIZER, "model", {"type": "Planted"}), ("blip", TOKENIZER, "model.vocab", {"a": -1}),
    ("blip", TOKENIZER, "normalizer", 7), ("blip", TOKENIZER, "pre_tokenizer", {"type": "Planted"}),
    ("blip", TOKENIZER, "added_tokens", [7]), ("opt", TOKENIZER, "model.vocab", {"a": 2**40}),
    ("blip", SETTINGS, "tokenizer_class", []), ("blip", SETTINGS, "model_max_length", "x"),
    ("blip", SETTINGS, "pad_token", 7), ("blip", SETTINGS, "added_tokens_decoder", {"x": 1}),
    ("itm", SETTINGS, "pad_token", None), ("itm", SETTINGS, "cls_token", None), ("vqa", SETTINGS, "sep_token", None),
    ("itm2", SETTINGS, "sep_token", None),
    ("blip", IMAGES, "image_processor_type", "Planted"), ("blip", IMAGES, "image_std", [0, 0, 0]),
    ("blip", IMAGES, "image_std", [NAN] * 3), ("blip", IMAGES, "image_mean", [NAN] * 3),
    ("opt", IMAGES, "rescale_factor", 1e400),
    ("blip", IMAGES, "rescale_factor", "x"), ("blip", IMAGES, "size", {"height": 10**9, "width": 10**9}),
    ("blip", IMAGES, "size", {"height": -1, "width": -1}), ("blip", IMAGES, "resample", 99),
    ("blip", CONFIG, "architectures", 7), ("blip", CONFIG, "architectures", [7]), ("opt", CONFIG, "architectures", "Blip2"),
    ("blip", CONFIG, "text_config.bos_token_id", None), ("vqa", CONFIG, "text_config.sep_token_id", None),
    ("opt", CONFIG, "text_config.pad_token_id", None), ("blip", CONFIG, "text_config.is_decoder", False),
    ("blip", CONFIG, "image_text_hidden_size", 10**9), ("blip", CONFIG, "text_config.layer_norm_eps", "x"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "key", "value"), REFUSED)
def test_a_setting_that_cannot_be_used_is_one_error(kind, file, key, value, with_entry):
    with pytest.raises(ModelError) as caught:
        load_backbone(str(with_entry(kind, file, key, value)), "cpu")
    message = str(caught.value)
    assert message.count("\n") <= 1 and len(message) < 900 and message.replace("\n", "").isprintable()


HARMLESS = [
    (TOKENIZER, "truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    (SETTINGS, "tokenizer_file", "/etc/passwd"), (SETTINGS, "trust_remote_code", True), (SETTINGS, "padding_side", "left"),
    (SETTINGS, "chat_template", "{{ raise() }}"), (SETTINGS, "auto_map", {"AutoTokenizer": ["evil.Evil", None]}),
    (IMAGES, "auto_map", {"AutoImageProcessor": "evil.Evil"}), (IMAGES, "device", "cuda:9"), (IMAGES, "return_tensors", "np"),
    (CONFIG, "trust_remote_code", True), (CONFIG, "text_config.output_attentions", True),
    (CONFIG, "vision_config.output_hidden_states", True), (CONFIG, "text_config.chunk_size_feed_forward", 7),
    (CONFIG, "dtype", "float64"), (CONFIG, "decoder_start_token_id", 5000),
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "value"), HARMLESS)
def test_a_setting_without_a_use_changes_no_caption(file, key, value, with_entry, make):
    captions = []
    for backbone in (make("blip"), load_backbone(str(with_entry("blip", file, key, value)), "cpu")):
        task = TASKS[default_task(backbone.architecture)](backbone)
        pixels = backbone.image_processor(Image.new("RGB", (40, 30), (200, 10, 10)), return_tensors="pt")["pixel_values"]
        rows = task.language.tokenize(["a red"], ["cube on a table"])
        captions.append([task.language.generate(pixels, ["a red"], max_new_tokens=6), rows.inputs, pixels.sum().item()])
        assert torch.is_tensor(pixels)
    assert captions[0] == captions[1]
