"""The files of an exported folder: what `save_pretrained` of transformers writes for a model and its processor."""

from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Processor, BlipProcessor, GenerationConfig

from lora_blip.models.library import Quiet
from lora_blip.models.loading import UNREAD, Backbone
from lora_blip.tasks.base import PredictionTask

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GENERATORS = {"blip": "text_decoder", "blip-2": "language_model"}  # the part of a family whose `generate` writes the text
PARTS = ("text_config", "vision_config", "qformer_config")


def write(place: Path, task: PredictionTask, base_config: Any, dtype: str, shard_gb: float) -> None:
    """Write a merged model, its processor with the tokenizer, and its generation config. Cast the weights to `dtype`.

    base_config: the configuration of the base, before `load_backbone` changed it.
    """
    model = task.backbone.model
    model.to(TORCH_DTYPES[dtype])
    restore_settings(model.config, base_config)
    for part in filter(None, (getattr(model.config, key, None) for key in PARTS)):
        part.dtype = TORCH_DTYPES[dtype]
    if task.writes_text:
        model.generation_config = generation_config(task)
        complete_text_config(model)
    with Quiet(str(place)):
        model.save_pretrained(place, max_shard_size=int(shard_gb * 10**9))
        write_processor(place, task.backbone)
    mode = place.stat().st_mode & 0o666  # of a new folder: the permissions that the user's umask gives
    for file in place.glob("*.safetensors"):  # safetensors writes files that only their owner can read
        with suppress(OSError):  # a file system without permissions
            file.chmod(mode)


def restore_settings(config: Any, original: Any) -> None:
    """Give a configuration the base's dropout and UNREAD settings, which `load_backbone` replaced."""
    for part, own in [(config, original), *((getattr(config, key, None), getattr(original, key, None)) for key in PARTS)]:
        for key, value in vars(own).items() if part is not None and own is not None else ():
            if ("drop" in key and isinstance(value, float)) or key in UNREAD:
                setattr(part, key, value)


def generation_config(task: PredictionTask) -> GenerationConfig:
    """Return the base's generation config with the adapter's options, and with the tokens that end and pad a text."""
    base = task.backbone.model.generation_config.to_dict()
    language: Any = task.language  # type: ignore[attr-defined]  # as `writes_text` says
    tokens = {"eos_token_id": language.end_id, "pad_token_id": language.pad_id}
    if (start := getattr(language, "start_id", None)) is not None:
        tokens["decoder_start_token_id" if task.backbone.family == "blip-2" else "bos_token_id"] = start
    options = {name: value for name, value in task.generation.arguments().items() if name != "seed"}
    base.pop("max_length", None)  # max_new_tokens replaces it
    return GenerationConfig.from_dict(base | tokens | options | {"_from_model_config": False})


def complete_text_config(model: Any) -> None:
    """Give the text config what `generate` of BLIP and BLIP-2 reads from it: `max_new_tokens`, and the first token of a T5.

    They read no other option there, and nothing from generation_config.json. Without `max_new_tokens`, they stop at 20 tokens.
    """
    text, stored = model.config.text_config, model.generation_config
    text.max_new_tokens = stored.max_new_tokens
    if text.is_encoder_decoder and getattr(text, "decoder_start_token_id", None) is None:
        text.decoder_start_token_id = stored.decoder_start_token_id


def write_processor(place: Path, backbone: Backbone) -> None:
    """Write the image processor and the tokenizer as the processor of the model's family."""
    kinds: Any = (BlipProcessor, Blip2Processor)  # transformers gives their constructors no types
    blip, blip2 = kinds
    if backbone.family == "blip":
        blip(backbone.image_processor, backbone.tokenizer).save_pretrained(place)
        return
    config = backbone.model.config
    queries = None if config.image_token_index is None else config.num_query_tokens  # None: the texts have no placeholders
    tokenizer = deepcopy(backbone.tokenizer)  # the processor adds <image>, which a model without that token cannot embed
    blip2(backbone.image_processor, tokenizer, num_query_tokens=queries).save_pretrained(place)
    backbone.tokenizer.save_pretrained(place)
