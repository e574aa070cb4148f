"""Compare an exported folder, loaded with transformers alone, with the adapter on its base: texts and logits of one batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoProcessor

from lora_blip.data.image_folders import example_of
from lora_blip.data.images import open_image
from lora_blip.data.preprocessing import pixels_of
from lora_blip.errors import OutputError
from lora_blip.inference.commands import expand
from lora_blip.inference.exported_folder import GENERATORS, TORCH_DTYPES
from lora_blip.models.finite import cause_of
from lora_blip.models.language import WITH_LOGITS
from lora_blip.models.library import Quiet
from lora_blip.models.loading import ARCHITECTURES
from lora_blip.models.matching import cosines, log_odds
from lora_blip.models.token_rows import mask_of, pad
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted
from lora_blip.tasks.base import PredictionTask
from lora_blip.tasks.verification import BOUNDS

IMAGES, STEPS = 8, 16  # the most images, and the most tokens whose logits are compared
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 50, 220), (240, 240, 240))
QUESTION = "what color is it?"
TEXTS = ("a red cube", "a blue cube", "a green square", "two dogs on a table")


@dataclass(frozen=True)
class Probe:
    """The inputs of the comparison. A prompt for a task that writes texts; texts for a task that ranks them."""

    images: list[Image.Image]
    prompt: str


@dataclass(frozen=True)
class Outcome:
    """What a model computes for the probe.

    logits: float32 on the CPU: those of greedy generation (images, steps, tokens), or those of ITC and ITM (images, 2, texts).
    """

    texts: list[str]
    logits: Tensor
    end_id: int | None = None  # the token that ends a text; None: no text is generated
    prompt: list[int] | None = None  # the tokens before the text


def probe_of(task: PredictionTask, images: str) -> Probe:
    """Return the probe: the first images at a path, or drawn pictures. Raise ImageError if one cannot be read."""
    if images:
        pictures = [open_image(Path(path)) for path, _ in zip(expand([images]), range(IMAGES), strict=False)]
    else:
        pictures = [drawn(number) for number in range(len(COLOURS))]
    question = example_of("", QUESTION if task.takes_question else "")
    return Probe(pictures, task.prompt_of(question) if task.writes_text else "")  # type: ignore[attr-defined]


def drawn(number: int) -> Image.Image:
    """Return a picture of a square in one color on another one."""
    picture = Image.new("RGB", (240, 240), COLOURS[(number + 1) % len(COLOURS)])
    ImageDraw.Draw(picture).rectangle((60 + 8 * number, 60, 180, 180 - 8 * number), COLOURS[number])
    return picture


# ---------------------------------------------------------------- the adapter on its base


def predict_hooked(task: PredictionTask, probe: Probe) -> Outcome:
    """Return what the task computes, with the adapter as hooks. Raise OutputError if that is NaN or infinite."""
    outcome = hooked_outcome(task, probe)
    if not (outcome.logits < torch.inf).all():
        cause = cause_of(task.backbone.model, lambda: hooked_outcome(task, probe))
        raise OutputError(f"the folder was not written: the outputs of the adapter on its base are not finite: {cause}")
    return outcome


@torch.no_grad()
def hooked_outcome(task: PredictionTask, probe: Probe) -> Outcome:
    pixels = torch.stack([pixels_of(task.backbone.image_processor)(image) for image in probe.images]).to(task.backbone.device)
    parts: Any = task
    if not task.writes_text:
        return matched(*hooked_matches(parts, pixels), parts.temperature.item())
    language, rows = parts.language, [parts.language.prompt_ids(probe.prompt)] * len(pixels)
    ids, mask = pad(rows, language.pad_id).to(pixels.device), mask_of(rows).to(pixels.device)
    settings = {"max_new_tokens": min(STEPS, task.generation.max_new_tokens)} | WITH_LOGITS
    output = language.generate_ids(language.encode_images(pixels), ids, mask, settings)
    texts = language.generate(pixels, [probe.prompt] * len(pixels), **generation_arguments(task))
    return Outcome([str(text) for text in texts], stacked(output.logits), language.end_id, rows[0])


def hooked_matches(task: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and ITM's log-odds of each text, both (images, texts)."""
    matcher, texts = task.matcher, task.matcher.tokenize(list(TEXTS)).to(pixels.device)
    states = matcher.encode_images(pixels)
    similarity = cosines(matcher.image_features(states), matcher.text_features(texts))
    odds = [matcher.matching(one.expand(len(texts), *one.shape), texts) for one in states]
    return similarity, torch.stack(odds)


def generation_arguments(task: PredictionTask) -> dict[str, Any]:
    """Return the arguments of `Language.generate` for the comparison: those of the adapter, or greedy ones if it samples."""
    arguments = task.generation.arguments()
    return {"max_new_tokens": task.generation.max_new_tokens} if task.generation.do_sample else arguments


# ---------------------------------------------------------------- the folder


@torch.no_grad()
def predict_exported(folder: Path, task: PredictionTask, probe: Probe) -> Outcome:
    """Return what transformers computes with an exported folder. task: that of the adapter, for its name and settings."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in ARCHITECTURES[task.backbone.family]}
    processors: Any = AutoProcessor
    with Quiet(str(folder)):
        model = kinds[task.backbone.architecture].from_pretrained(folder).eval().to(task.backbone.device)
        processor = processors.from_pretrained(folder, backend="pil")
        if not task.writes_text:
            parts: Any = task
            return matched(*exported_matches(model, processor, probe), parts.temperature.item())
        return generated(model, processor, task, probe)


def generated(model: Any, processor: Any, task: PredictionTask, probe: Probe) -> Outcome:
    """Return the texts that the model generates by its generation config, and the logits of greedy generation."""
    prompts, language = [probe.prompt] * len(probe.images), task.language  # type: ignore[attr-defined]
    inputs = processor(images=probe.images, text=prompts, return_tensors="pt").to(model.device, model.dtype)
    part = getattr(model, GENERATORS[model.config.model_type])
    steps = min(STEPS, task.generation.max_new_tokens)
    output = model.generate(**inputs, max_new_tokens=steps, **WITH_LOGITS)
    if not task.generation.do_sample:
        part.generation_config = model.generation_config  # as the card shows
    ids = model.generate(**inputs)
    copies = len(ids) // len(probe.images)
    texts = processor.batch_decode(ids[::copies], skip_special_tokens=True)
    start = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    first = inputs["input_ids"][0].tolist()
    if task.backbone.architecture == "BlipForConditionalGeneration":
        first = [model.config.text_config.bos_token_id, *first[1:-1]]  # as its `generate` reads [CLS] prompt [SEP]
    return Outcome([plain_text(text, start) for text in texts], stacked(output.logits), language.end_id, first)


def plain_text(text: str, prompt: str) -> str:
    """Return a generated text without the prompt, which a decoder repeats, with single spaces."""
    words, start = " ".join(text.split()), " ".join(prompt.split())
    return words[len(start) :].strip() if start and words.startswith(start) else words


def exported_matches(model: Any, processor: Any, probe: Probe) -> tuple[Tensor, Tensor]:
    """Return the cosines and ITM's log-odds of each text, both (images, texts), by the model's forward."""
    similarity, odds, is_blip = list[Tensor](), list[Tensor](), model.config.model_type == "blip"
    flag, result = ("use_itm_head", "itm_score") if is_blip else ("use_image_text_matching_head", "logits_per_image")
    for image in probe.images:
        inputs = processor(images=[image], text=list(TEXTS), padding=True, return_tensors="pt").to(model.device, model.dtype)
        similarity.append(getattr(model(**inputs, **{flag: False}), result)[0].float())
        inputs["pixel_values"] = inputs["pixel_values"].expand(len(TEXTS), -1, -1, -1)
        odds.append(log_odds(getattr(model(**inputs, **{flag: True}), result).float()))
    return torch.stack(similarity), torch.stack(odds)


# ---------------------------------------------------------------- the difference


def matched(similarity: Tensor, odds: Tensor, temperature: float) -> Outcome:
    """Return the best text of each image by ITC and ITM together, and the logits of both."""
    logits = torch.stack([similarity.float() / temperature, odds.float()], 1).cpu()
    return Outcome([TEXTS[best] for best in logits.sum(1).argmax(1).tolist()], logits)


def stacked(steps: tuple[Tensor, ...]) -> Tensor:
    """Return the logits of all steps, (rows, steps, tokens). steps: transformers' tuple of (rows, tokens)."""
    return torch.stack(steps, 1).float().cpu()


def compare(hooked: Outcome, exported: Outcome, dtype: str) -> list[str]:
    """Return lines about the difference. Raise OutputError if it is too large for the dtype.

    In float32 the texts must be equal too. In 16 bits, two tokens with nearly equal logits may change places.
    """
    if hooked.prompt != exported.prompt:
        raise OutputError(
            f"the folder was not written: its tokenizer reads the prompt as the tokens {exported.prompt}, and lora_blip reads "
            f"{hooked.prompt}; copy tokenizer.json and tokenizer_config.json again from the base's checkpoint"
        )
    difference, largest = logit_difference(hooked, exported)
    bound = BOUNDS[TORCH_DTYPES[dtype]] * largest
    wrong = [(own, other) for own, other in zip(hooked.texts, exported.texts, strict=True) if own != other]
    count = len(hooked.texts)
    line = f"compared on {counted(count, 'image')}: {count - len(wrong)} of {counted(count, 'text', 'are')} equal, the largest "
    line += f"logit difference is {difference:.2g}, the bound for {dtype} is {bound:.2g}"
    differing = [f"  adapter {quoted(own)}, folder {quoted(other)}" for own, other in wrong]
    if not difference <= bound or (wrong and dtype == "float32"):
        raise OutputError("\n".join([f"the folder was not written: {line}", *differing, ADVICE]))
    return [line, *differing]


ADVICE = (
    "try --dtype float32; if that fails too, use the adapter with lora_blip, and report this with the output of: "
    "lora-blip doctor"
)


def logit_difference(hooked: Outcome, exported: Outcome) -> tuple[float, float]:
    """Return the largest difference of two logits and the largest logit.

    Generated rows are compared up to their end, and up to the first step at which the models choose different tokens: after it,
    they continue different texts.
    """
    own, other = hooked.logits, exported.logits
    steps = min(own.shape[1], other.shape[1])
    own, other = own[:, :steps], other[:, :steps]
    compared = torch.ones(own.shape[:2], dtype=torch.bool)
    if hooked.end_id is not None:
        tokens, others = own.argmax(2), other.argmax(2)
        last = (tokens != others) | (tokens == hooked.end_id)
        compared = last.cumsum(1) - last.int() == 0  # up to the first such step, which is compared too
    finite = own.isfinite() & other.isfinite()
    pairs = (own - other).abs().masked_fill(~finite, 0)[compared]
    if not torch.equal(own.isfinite()[compared], other.isfinite()[compared]):
        return float("inf"), 0.0
    return pairs.max().item(), own.masked_fill(~finite, 0)[compared].abs().max().item()
