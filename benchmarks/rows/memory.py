"""Row `memory`: what a step needs beside the model. `python -m benchmarks.rows.memory --side peft` is one side by itself.

Kept: bytes that autograd holds at the end of the forward pass for the backward pass, storages counted once each, without
those of parameters and buffers. They are seen by `saved_tensors_hooks`, which sees what a custom autograd function
gives to `ctx.save_for_backward` as well; what one kept on `ctx` itself would be missing, so the second figure checks the
first. Peak: how far the resident memory of a process of its own rises above where it stood before the step (on a GPU, the
allocator's own peak), kept and passing alike.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import ours, peers
from benchmarks.suite.pairs import FLOOR, FULL, OURS, PEFT, PEFT16, Cell, freed
from benchmarks.suite.plan import Plan
from benchmarks.suite.sizes import backbone, copy_of, in_dtype
from benchmarks.suite.work import Work, work
from lora_blip.models.loading import Backbone

MB = 1e6
SIDES: dict[str, Callable[[Backbone, Work, str], Any]] = {
    OURS: ours.Training,
    PEFT: peers.peft_loop,
    PEFT16: lambda base, work, precision: peers.peft_loop(in_dtype(base, precision), work, precision),
    FULL: peers.full,
    FLOOR: peers.floor,
}


def memory(plan: Plan) -> Iterator[Cell]:
    for name in ("tiny",) if plan.quick else ("base", "large"):
        for precision in plan.precisions if name == "base" else plan.precisions[1:]:
            some = [side for side in SIDES if (side != PEFT16 or precision != "fp32") and (side != FULL or name == "base")]
            kept, peak = (Cell("memory", f"{name} {precision}, {what}", PEFT, "MB") for what in ("kept", "peak"))
            base = backbone(plan.size(name), plan.device)
            batch = work(base)
            for side in some:
                with freed():
                    training = SIDES[side](base if side == OURS else copy_of(base), batch, precision)
                    kept.figures[side] = [kept_bytes(training.model, training.forward) / MB]
                    kept.notes[f"weights of {side}, MB"] = own_bytes(training.model) / MB
            del base, batch, training
            for _ in range(2 if name == "base" else 1):
                for side in (OURS, PEFT, PEFT16)[: 2 if plan.quick or precision == "fp32" else 3]:
                    peak.figures.setdefault(side, []).append(apart(side, plan.size(name), precision) / MB)
            yield kept
            yield peak


def kept_bytes(model: Any, forward: Callable[[], Tensor]) -> int:
    """Bytes of all storages that the graph of `forward` keeps, those of the model's own tensors left out.

    Each saved tensor is handed to the graph as it is, so none is freed, and no address comes twice, before the count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # not itself: an output that its own graph holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(found.values())


def own_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ---------------------------------------------------------------- a process of its own


def apart(side: str, size: str, precision: str) -> int:
    """The peak of one step in a fresh process, whose allocator gives back at once what is freed."""
    command = [sys.executable, "-m", "benchmarks.rows.memory", "--side", side, "--size", size, "--precision", precision]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def peak_bytes(step: Callable[[], object]) -> int:
    """How far one step, after one that made the optimizer's moments, takes the memory above where it was."""
    step()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # glibc alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--size", default="base")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    base = backbone(arguments.size, "cuda" if torch.cuda.is_available() else "cpu")
    training = SIDES[arguments.side](base, work(base), arguments.precision)
    print(json.dumps({"peak": peak_bytes(training.step)}))
