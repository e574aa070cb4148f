"""`lora-blip caption --explain` and `ask --explain`: predict a few images, and write explain.html into a new folder."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

from lora_blip.config import InferConfig
from lora_blip.data.annotations import plain
from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.inference.adapter_choice import read_adapter
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.commands import ModelConfig, announce, require_task, task_setting
from lora_blip.inference.explanation import explained, require_few, write_explanation
from lora_blip.inference.finished import key_of
from lora_blip.inference.prediction import Prediction
from lora_blip.inference.setup import apply_adapter, open_task, work_of
from lora_blip.reports.explanation import TextView
from lora_blip.runtime import runs
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import unused_path


def predict_and_explain(config: ModelConfig, images: list[str], question: str = "") -> Iterator[Prediction]:
    """Yield the same predictions as the command without --explain. Then write the page, and print its address on stderr.

    The base is explained before the adapter is merged into it. Raise LoraBlipError as the command does, and ConfigError for
    more than explanation.LIMIT images.
    """
    examples = [example_of(image, plain(question)) for image in images]
    require_few(examples)
    name = config.given_adapter
    adapter = None if name is None else replace(read_adapter(name, config.task), scale=config.scale)
    setting = task_setting(adapter, config.task)
    settings = InferConfig(
        adapter=config.adapter if adapter else "none", model=config.model, device=config.device, task=setting
    )
    task, precision = open_task(settings, adapter)
    announce(adapter, task.backbone)
    require_task(task.name, config, images[0], adapter)
    views: list[dict[int, TextView]] = []
    if adapter:
        base = Captioner(task, settings.batch_size, precision)
        base.runner.reload_on_cpu = lambda: open_task(settings, adapter, device="cpu")[0]
        views += explanation_of(base, examples, list(predictions_of(base, images, question)), "base")
        task, precision = base.runner.task, base.runner.precision
        apply_adapter(task, adapter, settings.merge, precision)
    captioner = Captioner(task, settings.batch_size, precision, adapter)
    captioner.runner.reload_on_cpu = lambda: open_task(settings, adapter, adapted=True, device="cpu")[0]
    predictions = []
    for prediction in predictions_of(captioner, images, question):
        predictions.append(prediction)
        yield prediction
    views += explanation_of(captioner, examples, predictions, "adapter" if adapter else "base")
    facts = {"base": captioner.backbone.name, "precision": precision, "task": captioner.task}
    facts |= {"adapter": str(adapter.path), "trained": work_of(adapter)} if adapter else {}
    facts |= {"date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    folder = unused_path(runs.RUNS / f"explanation_{datetime.now():%Y%m%d_%H%M%S}")
    if views and (page := attempt("explanation", lambda: write_explanation(folder, task, examples, views, facts))):
        print(f"explanation: {page.resolve().as_uri()}", file=sys.stderr, flush=True)


def predictions_of(captioner: Captioner, images: list[str], question: str) -> Iterator[Prediction]:
    """Yield a caption of each image, or the answer to a question about it."""
    return captioner.stream(images) if captioner.task == "caption" else iter(captioner.answer(images, question))


def explanation_of(
    captioner: Captioner, examples: list[Example], predictions: list[Prediction], model: str
) -> list[dict[int, TextView]]:
    """Return a list with the explained predictions, or an empty list if they cannot be explained."""
    texts = {key_of(e): p.text for e, p in zip(examples, predictions, strict=True) if not p.error}
    return explained(captioner.runner, examples, lambda: texts, model)
