"""A run that is killed, and a run of two processes, on a device."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_blip.config import TrainConfig
from lora_blip.lora import adapter_file
from lora_blip.runtime.runs import ADAPTER_NAME
from lora_blip.training.loop import train
from tests.support.gpu import HALF, assert_near
from tests.support.kill import killed_at
from tests.support.runs import config_of, elsewhere, metrics_of, only_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, signal
from lora_blip.config import TrainConfig
from lora_blip.training import loop
real, count = loop.accumulate_gradients, 0

def accumulate(*given, **named):
    global count
    count += 1
    if count == {death}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*given, **named)

loop.accumulate_gradients = accumulate
loop.train(TrainConfig(**{config!r}))
"""


def started(config: TrainConfig, folder: Path, death: int = 0, *launcher: str) -> int:
    """Train in a new process that kills itself at this micro-batch (0: never). Return its exit code."""
    script = folder / "training.py"
    script.write_text(SCRIPT.format(death=death, config=vars(config)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, str(script)], check=False, env=environment).returncode


def assert_same_steps(one: Path, other: Path, device: str) -> None:
    """Assert that two runs have the same steps and adapters. On CUDA, the last digits may differ."""
    a, b = (adapter_file.read(path).tensors for path in (one, other))
    assert_near([*b.values()], [a[key] for key in b], 0.0 if device == "cpu" else 1e-2)
    assert [line.get("step") for line in metrics_of(one)] == [line.get("step") for line in metrics_of(other)]


def killed_here(config: TrainConfig, _: Path) -> None:
    """Stop in the middle of a step, twice, without saving."""
    for death in (5, 4):
        with killed_at(death):
            train(config)


def killed_process(config: TrainConfig, folder: Path) -> None:
    assert started(config, folder, 8) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kill", [killed_here, killed_process])
@pytest.mark.parametrize("precision", HALF)
def test_a_killed_run_resumes_to_the_same_adapter(
    checkpoints, tmp_path, device, precision, kill: Callable[[TrainConfig, Path], None]
):
    """With dropout, whose random numbers depend only on the position in the data, and in fp16 the saved loss scale."""
    config = config_of(checkpoints, tmp_path, device=device, precision=precision, max_skipped=40, epochs=2)
    whole, again = train(config), elsewhere(config)
    kill(again, tmp_path)
    assert_same_steps(whole, train(again), device)
    only_run(again)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["", "shard"])
def test_two_devices_are_one(checkpoints, tmp_path, device, shard):
    """Two GPUs with nccl have the losses of one GPU with two micro-batches a step. The rehearsal has two CPU processes."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    config = config_of(checkpoints, tmp_path, device=device, accumulation=2, precision="fp32", base_dtype="fp32")
    one = train(config)
    several = replace(elsewhere(config), accumulation=1, shard=shard, device="auto" if device == "cuda" else device)
    assert started(several, tmp_path, 0, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2") == 0
    losses = [[e["loss"] for e in metrics_of(path) if "loss" in e] for path in (one, only_run(several) / ADAPTER_NAME)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
