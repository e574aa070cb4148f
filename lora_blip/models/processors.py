"""The tokenizer and the image processor of a checkpoint."""

import sys
from typing import Any

from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
)

from lora_blip.errors import ModelError
from lora_blip.models.library import Quiet, first_line, write_processor
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

LONGEST_REASON = 300  # characters; transformers lists every class that it knows
SMALLEST_VOCABULARY = 100  # transformers creates an empty tokenizer if the files are missing
IMAGE_TOKEN = "<image>"
WORD_EMBEDDINGS = ("word_embeddings", "embed_tokens", "shared")  # embedding tables whose row numbers are token ids
NEEDED_IDS = {  # architecture → token ids of text_config without which it cannot generate
    "BlipForConditionalGeneration": ("bos_token_id", "sep_token_id", "pad_token_id"),
    "BlipForQuestionAnswering": ("bos_token_id", "sep_token_id", "pad_token_id"),
    "Blip2ForConditionalGeneration": ("pad_token_id", "eos_token_id"),
}
NEEDED_TOKENS = {  # architecture → tokens of the tokenizer that enclose or pad a text
    "BlipForQuestionAnswering": ("cls_token", "sep_token"),
    "BlipForImageTextRetrieval": ("cls_token", "sep_token", "pad_token"),
    "Blip2ForImageTextRetrieval": ("cls_token", "sep_token", "pad_token"),
}
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


def load_processors(source: str) -> tuple[Any, Any]:
    """Return the tokenizer and the image processor, which uses Pillow: its results do not depend on torchvision."""
    try:
        with Quiet(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
            tokenizer("a photo", add_special_tokens=False)  # fails here if a setting has another type
    except Exception as error:  # an untrusted file can fail anywhere in transformers
        raise ModelError(
            f"the tokenizer or image processor of {source!r} cannot be loaded: {first_line(error)[:LONGEST_REASON]}\n"
            f"{write_processor(source)}"
        ) from None
    if len(tokenizer) < SMALLEST_VOCABULARY:
        raise ModelError(f"{source!r} has no tokenizer files (tokenizer.json or vocab.txt); {write_processor(source)}")
    return tokenizer, image_processor


def add_image_token(model: Any, tokenizer: Any, name: str) -> None:
    """Add the token `<image>` to a BLIP-2 checkpoint of 2023. Newer revisions of these checkpoints have it.

    Image features replace this token, so the model never embeds it. It gets the first id after the tokenizer's, which becomes
    `image_token_index` in the config. If the embeddings have no row for it, lora_blip adds the mean of the other rows,
    so that its logit is not extreme.
    """
    if type(model) is not Blip2ForConditionalGeneration or model.config.image_token_index is not None:
        return
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = model.get_input_embeddings().num_embeddings
    if index >= rows:
        model.resize_token_embeddings(index + 1, mean_resizing=False)
        tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        for table in tables:
            table.weight.data[rows:] = table.weight.data[:rows].mean(0)
    model.config.image_token_index = index
    print(f"{name!r} is a BLIP-2 without {IMAGE_TOKEN}; lora_blip added the token with the id {index}", flush=True)


def check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Raise ModelError if a needed token is missing, or if a token or a token id has no row in the text embeddings.

    There may be more rows than tokens. In a model that matches images with texts, the image token may have no row, because that
    model never embeds it.
    """
    for token in NEEDED_TOKENS.get(type(model).__name__, ()):
        if getattr(tokenizer, f"{token}_id") is None:
            raise ModelError(
                f"{name!r}: its tokenizer has no {token}, and the model needs one; copy tokenizer_config.json again from the "
                "checkpoint"
            )
    tables = [part for path, part in model.named_modules() if path.rpartition(".")[2] in WORD_EMBEDDINGS]
    rows = min(table.num_embeddings for table in tables)
    generates = not isinstance(model, Blip2ForImageTextRetrieval)  # that one has a text_config that it does not use
    image = getattr(model.config, "image_token_index", None)
    if image is not None and not (is_id(image, rows) or (is_id(image) and not generates)):
        raise ModelError(no_embedding(name, "image_token_index", image, rows))
    without_row = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows and id_ != image)
    if without_row:
        raise ModelError(
            f"{name!r}: the tokenizer has {counted(len(without_row), 'token')} without an embedding in the model (first: "
            f"{quoted(without_row[0][1])}, id {without_row[0][0]}; the model has {counted(rows, 'row')}); use the tokenizer "
            "that was saved with it, or call model.resize_token_embeddings(len(tokenizer)) in transformers and save both again"
        )
    if not generates:
        return
    for key in TOKEN_IDS:
        value = getattr(model.config.text_config, key, None)
        for id_ in value if isinstance(value, list) else [value]:
            needed = key in NEEDED_IDS.get(type(model).__name__, ())
            if not is_id(id_, rows) and (needed or id_ is not None):
                raise ModelError(no_embedding(name, f"{key} of text_config", id_, rows))


def is_id(value: Any, rows: int = sys.maxsize) -> bool:
    """Return True if a value is a token id below `rows`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows


def no_embedding(name: str, key: str, value: object, rows: int) -> str:
    """Return the message for a token id that has no row in the text embeddings."""
    return (
        f"{name!r}: {key} in config.json is {quoted(value)}, but the model has {rows} embeddings; set it to an id of the "
        f"tokenizer, from 0 to {rows - 1}"
    )
