"""The texts of transformers' own `generate`, called on the whole model."""

from typing import Any

import torch

from lora_blip.kernels import switch
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask


def written(task: CaptionTask, ids: torch.Tensor, after: int) -> list[str]:
    texts = task.backbone.tokenizer.batch_decode(ids[:, after:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


@torch.no_grad()
def hugging_face(task: CaptionTask, images: torch.Tensor, prompt: str, **settings: Any) -> list[str]:
    """Captions by the model's own `generate`, with transformers' own attention."""
    model, language = task.backbone.model, task.language
    switch.fast(model, False)
    start = language.prompt_ids(prompt)
    ids = torch.tensor([start] * len(images))
    if task.backbone.family == "blip":  # it sets both ids itself
        ids = torch.cat([ids, ids[:, :1]], dim=1)  # it drops the last token
        generated, after = model.generate(pixel_values=images, input_ids=ids, **settings), len(start)
    else:
        settings |= {"eos_token_id": language.end_id, "pad_token_id": language.pad_id}
        if not model.config.use_decoder_only_language_model:
            settings["decoder_start_token_id"] = language.start_id
        generated = model.generate(pixel_values=images, input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        after = len(start) if generated[0, : len(start)].tolist() == start else 0
    switch.fast(model)
    return written(task, generated, after)


@torch.no_grad()
def hugging_face_answers(task: VqaTask, images: torch.Tensor, questions: list[str], **settings: Any) -> list[str]:
    """Answers by the model's own `generate`, to one unpadded question at a time."""
    model, tokenizer, answers = task.backbone.model, task.backbone.tokenizer, []
    for image, question in zip(images, questions, strict=True):
        asked = tokenizer(question, return_tensors="pt")
        ids = model.generate(asked.input_ids, image[None], asked.attention_mask, **settings)
        answers += [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return answers
