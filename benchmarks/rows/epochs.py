"""Rows `epoch`, `cached` and `input`: complete epochs, from JPEG files to updates."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from benchmarks.contestants import ours, peers, trainer
from benchmarks.suite.pairs import OURS, PEFT, PEFT16, TRAINER, TRAINER16, Cell, Turn, compare, freed, seconds
from benchmarks.suite.plan import Plan
from benchmarks.suite.sizes import backbone, copy_of, in_dtype, save
from benchmarks.suite.work import Work, work, write_photos
from lora_blip.models.loading import Backbone

Step = Callable[[], None]
BATCH = 2  # images
CAPTIONS = 5  # per image; a batch of peft has a row for each caption
# (targets, size, precision); the blocks before the first adapter are frozen, so their outputs can be cached
CACHED = (
    ("text", "base", "fp32"), ("text", "base", "bf16"), ("text", "large", "bf16"),
    ("vit[8:12]", "base", "bf16"), ("qformer", "blip2", "bf16"),
)  # fmt: skip


def epoch(plan: Plan) -> Iterator[Cell]:
    """Measure seconds per image of 640 × 480 with five captions. peft with Trainer opens the image for each caption."""
    images = 4 if plan.quick else 12
    for precision in plan.precisions[1:]:
        if not plan.allows("epoch", f"base {precision}"):
            continue
        with freed(), tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            base = backbone(plan.size("base"), plan.device)
            annotations, model = write_photos(root / "data", images, CAPTIONS), save(base, root / "model")
            files = trainer.Files(base, lines_of(annotations))

            def our_epochs() -> dict[str, float]:
                with tempfile.TemporaryDirectory() as output:
                    settings: dict[str, Any] = {"batch_size": BATCH, "num_workers": plan.workers, "precision": precision}
                    seconds_of_epochs = ours.epochs(model, annotations, Path(output), 2, **settings)
                return {"first epoch": seconds_of_epochs[0] / BATCH, "second epoch": seconds_of_epochs[1] / BATCH}

            def their_epochs(model: Any) -> float:
                watch = trainer.Watch()
                workers = {"dataloader_num_workers": plan.workers, "dataloader_persistent_workers": plan.workers > 0}
                trainer.train(model, files, precision, BATCH * CAPTIONS, watch, plan.device, num_train_epochs=1, **workers)
                return trainer.a_step(watch.steps) / BATCH

            turns: dict[str, Turn] = {
                OURS: our_epochs,
                TRAINER: partial(their_epochs, peers.with_peft(copy_of(base))),
                TRAINER16: partial(their_epochs, peers.with_peft(in_dtype(copy_of(base), precision))),
            }
            cell = compare("epoch", f"base {precision}, JPEG", turns, TRAINER, plan.long_rounds, "s/image", warm=False)
            cell.notes = {"images": images, "captions an image": CAPTIONS, "images a batch": BATCH, "workers": plan.workers}
            yield cell


def cached(plan: Plan) -> Iterator[Cell]:
    """Measure epochs after the first, with a frozen part before the first adapter. peft's pixel values are in memory."""
    for where, name, precision in CACHED:
        if plan.quick and (where, precision) not in (("text", "fp32"), ("qformer", "bf16")):
            continue
        where = where if not (plan.quick and "[" in where) else "vit[1:2]"
        with freed(), tempfile.TemporaryDirectory() as folder:
            yield _cached(plan, Path(folder), where, name, precision)


def _cached(plan: Plan, root: Path, where: str, name: str, precision: str) -> Cell:
    images = 4 if plan.quick else 8
    base = backbone(plan.size(name), plan.device, precision if name == "blip2" else "fp32")
    annotations, model = write_photos(root / "data", images, 1), save(base, root / "model")
    loops: dict[str, list[Step]] = {}
    kinds = {PEFT: base} | ({PEFT16: in_dtype(copy_of(base), precision)} if "16" in precision and name != "blip2" else {})
    for side, held in kinds.items():
        loops[side] = _loops(peers.peft_loop(held, work(held, BATCH), precision, where), held, annotations)
        loops[side][0]()  # a warm-up; the warm-up of our side is its first epoch, which is reported separately

    def our_epochs() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as output:
            settings: dict[str, Any] = {"batch_size": BATCH, "num_workers": plan.workers, "precision": precision}
            seconds_of_epochs = ours.epochs(model, annotations, Path(output), 3, targets=where, **settings)
        return {"first epoch": seconds_of_epochs[0] / BATCH, "later epochs": mean(seconds_of_epochs[1:]) / BATCH}

    turns: dict[str, Turn] = {OURS: our_epochs}
    turns |= {side: partial(_an_epoch, some, images) for side, some in loops.items()}
    cell = compare("cached", f"{name} {precision}, adapters on {where}", turns, PEFT, plan.long_rounds, "s/image", warm=False)
    cell.notes = {"images": images, "batch": BATCH, "workers": plan.workers}
    return cell


def _loops(loop: peers.Training, held: Backbone, annotations: Path) -> list[Step]:
    """Make a step for each batch of the captions in the annotations."""
    lines = [text for _, text in lines_of(annotations)]
    pixels = loop.inputs["pixel_values"]
    batches = [Work(pixels, [[text] for text in lines[start : start + BATCH]]) for start in range(0, len(lines), BATCH)]
    return [partial(_with, loop, peers.inputs_of(held, batch)) for batch in batches]


def _with(loop: peers.Training, inputs: peers.Inputs) -> None:
    loop.inputs = inputs
    loop.step()


def _an_epoch(steps: list[Step], images: int) -> float:
    return seconds(lambda: [step() for step in steps]) / images


def input(plan: Plan) -> Iterator[Cell]:
    """Measure the time from a JPEG of 640 × 480 to pixel values for the base size."""
    images = 2 if plan.quick else 12
    with freed(), tempfile.TemporaryDirectory() as folder:
        base = backbone(plan.size("base"))
        base.model = None
        paths = [path for path, _ in lines_of(write_photos(Path(folder) / "data", images, 1))]
        side = base.image_processor.size["height"]
        processor = BlipImageProcessorPil(size={"height": side, "width": side})

        def our_reads() -> dict[str, float]:
            ours.forget_digests()
            cache, again = Path(tempfile.mkdtemp(dir=folder)), range(images)
            read = ours.reader(base, paths, cache)
            first = seconds(lambda: [read(index) for index in again]) / images
            return {"first time": first, "again": seconds(lambda: [read(index) for index in again]) / images}

        def their_reads() -> float:
            opened = (Image.open(path).convert("RGB") for path in paths)
            return seconds(lambda: [processor(image, return_tensors="pt")["pixel_values"][0] for image in opened]) / images

        turns: dict[str, Turn] = {OURS: our_reads, "PIL and the processor": their_reads}
        yield compare("input", f"640 × 480 → {side} × {side}", turns, "PIL and the processor", plan.rounds, "s/image")


def lines_of(annotations: Path) -> list[tuple[Path, str]]:
    entries = [json.loads(line) for line in annotations.read_text(encoding="utf-8").splitlines()]
    return [(annotations.parent / entry["image"], entry["text"]) for entry in entries]
