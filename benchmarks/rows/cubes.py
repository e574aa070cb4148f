"""Row `cubes`: seconds of training until 95 % of the captions of validation images are exactly right, with train.py's settings.

Both sides have the same images, split, base, adapters, augmentation, learning rates and steps with a validation. Each round has
a different seed. The time until a step includes all earlier validations, but not that of the step, on both sides.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from PIL import Image

import train
from benchmarks.contestants import ours, peers, trainer
from benchmarks.suite.pairs import OURS, TRAINER, Cell, Turn, compare, freed
from benchmarks.suite.plan import Plan
from lora_blip.config import TrainConfig
from lora_blip.data import annotations, splits
from lora_blip.data.augmentation import augment
from lora_blip.data.example import Example
from lora_blip.flags import parse
from lora_blip.metrics.exact import exact_match
from lora_blip.models.loading import Backbone, load_backbone
from lora_blip.models.local_base import REPOSITORY
from lora_blip.models.precision import pick_precision
from lora_blip.tasks.base import Generation
from lora_blip.training.setup import default_rate

ENOUGH = 0.95
EVERY = 25  # steps between validations; the default, a tenth of the run, is too coarse for a comparison
SEEDS = 3
Run = Callable[[TrainConfig, float], dict[str, float]]
UNITS = {"until 95 %": "s", "steps until 95 %": "steps", "a step": "s"}


def cubes(plan: Plan) -> Iterator[Cell]:
    flags = ["--epochs", "1", "--num-workers", "0"] if plan.quick else []
    config = parse(TrainConfig, vars(train), [*flags, "--device", plan.device, "--validate-every", str(EVERY)])
    enough = 0.0 if plan.quick else ENOUGH
    with freed():
        turns: dict[str, Turn] = {
            side: partial(seeded, run, config, count(config.seed), enough)
            for side, run in ((OURS, our_run), (TRAINER, their_run))
        }
        both = compare("cubes", "", turns, TRAINER, 1 if plan.quick else SEEDS, warm=False)
        for what, unit in UNITS.items():
            figures = {side: both.figures[f"{side}, {what}"] for side in turns}
            yield Cell("cubes", f"tiny-blip as shipped, {what}", TRAINER, unit, figures)


def seeded(run: Run, config: TrainConfig, seeds: Iterator[int], enough: float) -> dict[str, float]:
    """Run one side with its next seed."""
    return run(replace(config, seed=next(seeds)), enough)


def our_run(config: TrainConfig, enough: float) -> dict[str, float]:
    base, lines = REPOSITORY / config.model, REPOSITORY / config.annotations
    given = {key: value for key, value in vars(config).items() if key not in ("model", "annotations", "output_dir")}
    with tempfile.TemporaryDirectory() as output:
        log = ours.run(base, lines, Path(output), **given)
    at = {line["step"]: line["seconds"] for line in log if "seconds" in line}
    good = [line["step"] for line in log if line.get("val_exact_match", -1.0) >= enough and line["step"]]
    return figures_of(at, good, list(at.values()))


def figures_of(at: dict[int, float], good: list[int], moments: list[float]) -> dict[str, float]:
    """Return the figures of a run. at: seconds from the start to each step. good: steps whose validation reached the goal."""
    if not good:
        raise RuntimeError(f"no validation reached an exact match of {ENOUGH:.0%}, so there is no time to compare")
    return dict(zip(UNITS, (at[good[0]], float(good[0]), median_gap(moments)), strict=True))


def median_gap(moments: list[float]) -> float:
    """Return the median seconds of the steps without a validation."""
    return median(after - before for before, after in pairwise(moments))


# ---------------------------------------------------------------- peft and Trainer


def their_run(config: TrainConfig, enough: float) -> dict[str, float]:
    torch.manual_seed(config.seed)
    backbone = load_backbone(str(REPOSITORY / config.model), config.device)
    examples, _ = annotations.read(REPOSITORY / config.annotations, report=lambda _: None)
    training, validation = splits.split_by_image(examples, config.val_fraction, config.seed)
    side = backbone.image_processor.size["height"]
    files = trainer.Files(backbone, pairs_of(training), partial(moved, random.Random(config.seed), side))
    model = peers.with_peft(backbone, config.targets, config.r, config.alpha)
    steps = config.epochs * -(-len(training) // config.batch_size)
    watch = Validating(backbone, validation, config.validate_every, steps, enough, config)
    settings: dict[str, Any] = {
        "learning_rate": default_rate(backbone.model), "lr_scheduler_type": "cosine", "num_train_epochs": config.epochs,
        "warmup_steps": min(config.warmup_steps, steps // 5), "weight_decay": config.weight_decay, "seed": config.seed,
        "max_grad_norm": config.max_grad_norm, "dataloader_num_workers": max(0, config.num_workers),
        "dataloader_persistent_workers": config.num_workers > 0,
    }  # fmt: skip
    precision = pick_precision(config.precision, backbone.device)
    trainer.train(model, files, precision, config.batch_size, watch, config.device, **settings)
    at = {step: moment - watch.began for step, moment in enumerate(watch.steps, 1)}
    return figures_of(at, watch.good, watch.steps)


def pairs_of(examples: list[Example]) -> list[tuple[Path, str]]:
    return [(example.image, example.text) for example in examples]


def moved(rng: random.Random, side: int, image: Image.Image, text: str) -> Image.Image:
    return augment(image, text, rng, side)


class Validating(trainer.Watch):
    """Captions the validation images at regular steps. Stops the training if enough captions are right."""

    def __init__(
        self, backbone: Backbone, examples: list[Example], every: int, total: int, enough: float, config: TrainConfig
    ) -> None:
        super().__init__()
        self.backbone, self.every, self.total, self.enough, self.config = backbone, every, total, enough, config
        self.texts = [[example.text] for example in examples]
        plain = trainer.Files(backbone, pairs_of(examples))
        self.pixels = torch.stack([plain[index]["pixel_values"] for index in range(len(plain))]).to(backbone.device)
        self.good: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        step = state.global_step
        self.steps.append(perf_counter())
        if (step % self.every == 0 or step == self.total) and exact_match(self.captions(), self.texts) >= self.enough:
            self.good.append(step)
            control.should_training_stop = True

    @torch.no_grad()
    def captions(self) -> list[str]:
        model, tokenizer, texts = self.backbone.model, self.backbone.tokenizer, []
        model.eval()
        for pixels in self.pixels.split(self.config.batch_size):
            ids = model.generate(pixel_values=pixels, max_new_tokens=self.config.max_new_tokens or Generation().max_new_tokens)
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        model.train()
        return texts
