"""Questions and images for VQA."""

from pathlib import Path

import torch

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.tasks.vqa import TEMPLATE, VqaTask
from tests.support import tiny

ASKED = [  # ragged questions, ragged answers, shared votes
    ("what is it?", ("a red cube",)),
    ("what is on top of the blue cube, on the left of the table?", ("nothing", "a green cube", "nothing", "nothing")),
    ("how many cubes?", ("two", "two cubes on top of a table", "two")),
    ("red?", ("no",)),
]


def examples(asked=None) -> list[Example]:
    return [Example(Path(f"{n}.png"), "", f"{n}.png", n + 1, "", q, a) for n, (q, a) in enumerate(asked or ASKED)]


def pictures(count: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def batch_of(task: VqaTask, some: list[Example] | None = None, first: int = 0, dtype=torch.float32) -> DeviceBatch:
    some = some or examples()
    return task.batch(HostBatch(some, pictures(first + len(some))[first:].to(dtype)))


def ids_of(task: VqaTask, text: str) -> list[int]:
    return task.backbone.tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def hugging_face(task: VqaTask, image: torch.Tensor, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits (tokens, vocabulary) of an answer and its end token, and its ids, from one unpadded row."""
    model, tokenizer = task.backbone.model, task.backbone.tokenizer
    prompt = TEMPLATE.replace("{question}", question)
    config = model.config.text_config
    ids, pixels = ids_of(task, answer), image[None].to(next(model.parameters()).dtype)
    if task.backbone.architecture == "BlipForQuestionAnswering":
        asked = tokenizer(question, return_tensors="pt").input_ids
        end, first, kept = tokenizer.sep_token_id, config.bos_token_id, []
        handle = model.text_decoder.register_forward_hook(lambda *a: kept.append(a[-1].logits[0]))
        model(
            input_ids=asked, pixel_values=pixels, attention_mask=torch.ones_like(asked),
            decoder_input_ids=torch.tensor([[first, *ids]]), labels=torch.tensor([[first, *ids]]),
        )  # fmt: skip
        handle.remove()
        return kept[0], torch.tensor([*ids, end])
    if task.backbone.architecture == "BlipForConditionalGeneration":
        start = torch.tensor([[config.bos_token_id, *ids_of(task, prompt)]])
        end = tokenizer.sep_token_id
    else:
        image_ids = [model.config.image_token_index] * model.config.num_query_tokens
        if not model.config.use_decoder_only_language_model:
            asked = torch.tensor([[*image_ids, *ids_of(task, prompt), config.eos_token_id]])
            written = torch.tensor([[config.pad_token_id, *ids]])
            logits = model(pixel_values=pixels, input_ids=asked, decoder_input_ids=written).logits[0]
            return logits, torch.tensor([*ids, config.eos_token_id])
        ids, end = ids_of(task, f" {answer}"), config.eos_token_id  # a byte-level BPE: the answer follows a space
        start = torch.tensor([[*image_ids, config.bos_token_id, *ids_of(task, prompt)]])
    row = torch.cat([start, torch.tensor([ids], dtype=torch.long)], dim=1)
    logits = model(pixel_values=pixels, input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    return logits[start.shape[1] - 1 :], torch.tensor([*ids, end])
