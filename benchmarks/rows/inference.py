"""Rows `generate`, `batch` and `merge`: the speed of captions with merged and unmerged adapters, and the time of a merge."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.contestants import ours, peers
from benchmarks.suite.pairs import HF, HF16, OURS, PEFT, STATIC, Cell, Turn, compare, freed, seconds
from benchmarks.suite.plan import Plan
from benchmarks.suite.sizes import backbone, copy_of, in_dtype
from benchmarks.suite.work import work
from lora_blip.models.loading import Backbone

TOKENS, BEAMS, MANY = 20, 5, 8


def generate(plan: Plan) -> Iterator[Cell]:
    """Generate exactly 20 tokens for two images: greedily and with five beams, merged and with hooks.

    If transformers supports a static cache for the model, it is measured too. Its first figure, which no ratio contains,
    includes the compilation.
    """
    for name, precision in [*(("base", precision) for precision in plan.precisions), ("blip2", plan.precisions[-1])]:
        several = (2,) if plan.quick else (1, BEAMS)
        if not plan.allows("generate", f"{name} {precision}, beams: {' and '.join(map(str, several))}"):
            continue
        with freed():
            base = backbone(plan.size(name), plan.device, precision if name == "blip2" else "fp32")
            pixels = work(base).pixel_values
            merged, hooked = ours.adapt(base, True, precision), ours.adapt(base, False, precision)
            peft_base = copy_of(base)
            peers.adapt(peft_base)
            half = in_dtype(copy_of(base), precision)
            for beams in several:
                how = (pixels, beams, 3 if plan.quick else TOKENS, precision)
                turns: dict[str, Turn] = {
                    f"{OURS}, merged": partial(seconds, partial(ours.generate, merged, *how)),
                    f"{OURS}, unmerged": partial(seconds, partial(ours.generate, hooked, *how)),
                    f"{PEFT}, unmerged": partial(seconds, partial(peers.generate, peft_base, *how)),
                    HF: partial(seconds, partial(peers.generate, base, *how)),
                }
                if precision != "fp32" and name != "blip2":
                    turns[HF16] = partial(seconds, partial(peers.generate, half, *how))
                if peers.has_static_cache(base):
                    turns[STATIC] = partial(seconds, partial(peers.generate, base, *how, static=True))
                yield compare("generate", f"{name} {precision}, beams: {beams}", turns, HF, plan.rounds)


def batch(plan: Plan) -> Iterator[Cell]:
    """Compare a batch of eight images with eight single images."""
    with freed():
        precision, one_by_one = plan.precisions[0], f"{OURS}, 8 × 1"
        base = backbone(plan.size("base"), plan.device)
        pixels, tokens = work(base, MANY).pixel_values, 3 if plan.quick else TOKENS
        merged = ours.adapt(base, True, precision)

        def each() -> None:
            for image in pixels.split(1):
                ours.generate(merged, image, 1, tokens, precision)

        turns: dict[str, Turn] = {
            f"{OURS}, 1 × 8": partial(seconds, partial(ours.generate, merged, pixels, 1, tokens, precision)),
            f"{HF}, 1 × 8": partial(seconds, partial(peers.generate, base, pixels, 1, tokens, precision)),
            one_by_one: partial(seconds, each),
        }
        yield compare("batch", f"base {precision}, 8 images, greedy", turns, one_by_one, plan.few)


def merge(plan: Plan) -> Iterator[Cell]:
    """Measure the time from an adapter file to merged weights, on a loaded model."""
    for name in ("base",) if plan.quick else ("base", "large"):
        if not plan.allows("merge", f"{name} fp32"):
            continue
        with freed(), tempfile.TemporaryDirectory() as folder:
            base = backbone(plan.size(name), plan.device)
            adapter_file = ours.save_adapter(base, Path(folder) / "adapter.safetensors")
            peft_folder = peers.save_adapter(copy_of(base), f"{folder}/peft")
            turns: dict[str, Turn] = {
                OURS: partial(fresh, ours.opened(base, "fp32"), partial(ours.load_and_merge, path=adapter_file)),
                PEFT: partial(fresh, base, partial(peers.load_and_merge, folder=peft_folder)),
            }
            yield compare("merge", f"{name} fp32, load and merge", turns, PEFT, 2 * plan.rounds)


def fresh(base: Backbone, work: Callable[[Backbone], None]) -> float:
    """Return the seconds of `work` on a copy of the model, without the time of copying."""
    copy = copy_of(base)
    return seconds(partial(work, copy))
