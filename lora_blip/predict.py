"""Inference in batches: images → captions, printed, written to predictions.jsonl, and scored where references are given."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # comes with transformers

from lora_blip import adapter, lora
from lora_blip.adapter import Adapter
from lora_blip.config import ConfigError, InferConfig, refuse_unwritable
from lora_blip.data import annotations
from lora_blip.data.annotations import Example
from lora_blip.data.batches import pixel_values
from lora_blip.data.images import ImageError, find_images, open_image
from lora_blip.loop import seed_everything
from lora_blip.metrics.exact import exact_match
from lora_blip.models import Backbone, autocasting, open_backbone
from lora_blip.run import fresh
from lora_blip.tasks import TASKS
from lora_blip.tasks.caption import CaptionTask, Generation

FILE_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    image: Path
    text: str


def infer(config: InferConfig) -> Path:
    """Caption images as `config` says; returns the path of predictions.jsonl, a line an image.

    Raises ConfigError, ModelError, AdapterError, ImageError or DataError before any image is captioned.
    """
    seed_everything(config.seed)
    images = find_images(config.images)
    references = read_references(config.references, config.image_root, images)
    wanted = None if config.adapter in ("", "none") else adapter.read(adapter.locate(config.adapter))
    output = output_file(config.output_dir)  # refused now if it exists; made when there is something to write
    name = config.model or (wanted.base if wanted else "")
    backbone, precision = open_backbone(name, config.device, config.precision)
    task = task_of(backbone, wanted, config)
    print(described(wanted, name, len(images), precision))

    base_texts: dict[Path, str] = {}
    if config.compare and wanted:
        base_texts = {
            p.image: p.text for p in progress(captions(task, images, config.batch_size, precision), len(images), "base")
        }
    if wanted:
        adapter.load(backbone, wanted)
        if config.merge:
            lora.bake(backbone.model)
    said: dict[Path, str] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("x", encoding="utf-8") as file:
        for prediction in progress(captions(task, images, config.batch_size, precision), len(images), "captions"):
            said[prediction.image] = prediction.text
            file.write(json.dumps(line_of(prediction, base_texts), ensure_ascii=False) + "\n")
            tqdm.write(printed(prediction, base_texts))
    report(references, said, base_texts)
    print(f"wrote {output}")
    return output


def described(wanted: Adapter | None, name: str, images: int, precision: str) -> str:
    """One line: which adapter, of which base, trained how far."""
    if wanted is None:
        return f"{images} images, {name} as it is, {precision}"
    training = wanted.about.get("training", {})
    unfinished = "" if training.get("finished", True) else ", stopped before its end"
    return f"{images} images, {name} with {wanted.path} ({training.get('steps', '?')} steps{unfinished}), {precision}"


def task_of(backbone: Backbone, wanted: Adapter | None, config: InferConfig | None = None) -> CaptionTask:
    """The task that an adapter was trained for, with its prompt and generation, where `config` does not override them."""
    about: dict[str, Any] = wanted.task if wanted else {}
    known = {key: value for key, value in about.get("generation", {}).items() if key in Generation.__dataclass_fields__}
    generation = Generation(**known)
    if config:
        chosen: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "num_beams": config.num_beams,
            "do_sample": config.sample,
        }
        generation = replace(generation, **{key: value for key, value in chosen.items() if value})
    prompt = (config.prompt if config else "") or str(about.get("prompt", ""))
    prompt = "" if prompt == "none" else prompt
    return TASKS[about.get("name", "caption")](backbone, prompt, generation)


def captions(
    task: CaptionTask, images: Iterable[str | Path], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Captions in the order of `images`, a batch at a time; an image that cannot be read is reported and left out."""
    autocast = autocasting(task.backbone.device, precision)
    task.backbone.model.eval()
    iterator = iter(images)
    while paths := [Path(path) for path in islice(iterator, batch_size)]:
        read = [(path, values) for path in paths if (values := _pixels(path, task.backbone)) is not None]
        if read:
            with autocast():
                texts = task.predict(torch.stack([values for _, values in read]).to(task.backbone.device))
            yield from (Prediction(path, text) for (path, _), text in zip(read, texts, strict=True))


def _pixels(path: Path, backbone: Backbone) -> torch.Tensor | None:
    try:
        return pixel_values(open_image(path), backbone.image_processor)
    except ImageError as error:
        tqdm.write(f"left out: {error}")
        return None


def progress(predictions: Iterable[Prediction], count: int, name: str) -> Iterable[Prediction]:
    return tqdm(predictions, total=count, desc=name, unit="image", disable=None, dynamic_ncols=True)


def line_of(prediction: Prediction, base_texts: dict[Path, str]) -> dict[str, str]:
    line = {"image": str(prediction.image), "text": prediction.text}
    return line | ({"base_text": base_texts.get(prediction.image, "")} if base_texts else {})


def printed(prediction: Prediction, base_texts: dict[Path, str]) -> str:
    base = f"Base:    {base_texts.get(prediction.image, '')}\n" if base_texts else ""
    return f"Image:   {prediction.image}\n{base}Caption: {prediction.text}\n"


def output_file(output_dir: str) -> Path:
    """predictions.jsonl in a folder; what is there already is never written over."""
    if not output_dir:
        return fresh(adapter.RUNS / f"captions_{datetime.now():%Y%m%d_%H%M%S}") / FILE_NAME
    refuse_unwritable(output_dir)
    path = Path(output_dir) / FILE_NAME
    if path.exists():
        raise ConfigError(f"{path} exists already; give another output_dir, or leave it empty for a new folder")
    return path


def read_references(source: str, root: str, images: list[Path]) -> dict[Path, list[Example]]:
    """Image → its lines in an annotations file, for the images that are captioned. DataError if there is none."""
    if not source:
        return {}
    examples, problems = annotations.read(source, root, on_bad_data="skip", decode=False)
    if problems:
        print(f"references: left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    wanted = {image.resolve(): image for image in images}
    found: dict[Path, list[Example]] = {}
    for example in examples:
        if example.image.resolve() in wanted:
            found.setdefault(wanted[example.image.resolve()], []).append(example)
    if not found:
        raise annotations.DataError(f"{source} has a line for none of the {len(images)} images; compare the paths")
    return found


def report(references: dict[Path, list[Example]], said: dict[Path, str], base_texts: dict[Path, str]) -> None:
    """Exact match over all images with references and, where the references name groups, over each group."""
    scored = [image for image in references if image in said]
    if not scored:
        return
    whole = f"{'exact match':<24}{'images':>8}" + f"{'base':>9}" * bool(base_texts) + f"{'captions':>10}"
    print(whole)
    for group in [*dict.fromkeys(references[image][0].group for image in scored), "all"]:
        mine = [image for image in scored if group in ("all", references[image][0].group)]
        if not group or (group != "all" and len(mine) == len(scored)):
            continue
        right = [[example.text for example in references[image]] for image in mine]
        scores = [exact_match([texts.get(image, "") for image in mine], right) for texts in (base_texts, said) if texts]
        print(f"{group:<24}{len(mine):>8}" + "".join(f"{score:>9.1%} " for score in scores))
