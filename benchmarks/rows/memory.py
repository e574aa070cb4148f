"""Row `memory`: the memory of a step beyond the model. `python -m benchmarks.rows.memory --side peft` measures one side.

Kept: the bytes that autograd keeps for the backward pass at the end of the forward pass. Each storage counts once; parameters
and buffers do not count. `saved_tensors_hooks` counts them, also those that a custom function passes to
`ctx.save_for_backward`. It would miss tensors stored on `ctx` itself, so the second figure checks the first.

Peak: the increase of a separate process's resident memory during a step. On a GPU, it is the peak of the allocator.
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
from lora_blip.cli import report_errors
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
                    peak.figures.setdefault(side, []).append(peak_in_new_process(side, plan.size(name), precision) / MB)
            yield kept
            yield peak


def kept_bytes(model: Any, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of all storages that the graph of `forward` keeps, without parameters and buffers.

    The graph keeps each tensor until the count ends, so no address is used twice.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    bytes_at: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            bytes_at[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # detached: a graph that holds its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(bytes_at.values())


def own_bytes(model: Any) -> int:
    """Return the bytes of the parameters and buffers. Shared storages count once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# ---------------------------------------------------------------- in a separate process


def peak_in_new_process(side: str, size: str, precision: str) -> int:
    """Return the peak of one step in a new process, whose allocator returns freed memory at once."""
    command = [sys.executable, "-m", "benchmarks.rows.memory", "--side", side, "--size", size, "--precision", precision]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the increase of the memory during the second step. The first step creates the optimizer's moments."""
    step()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # only with glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # set the peak to the memory that is resident now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Return the bytes in a line of /proc/self/status."""
    match = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--size", default="base")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    base = backbone(arguments.size, "cuda" if torch.cuda.is_available() else "cpu")
    training = SIDES[arguments.side](base, work(base), arguments.precision)
    print(json.dumps({"peak": peak_bytes(training.step)}))


if __name__ == "__main__":
    report_errors(main)
