"""DoRA trains to the same adapter with checkpointing, compiled blocks, several processes, and sharded weights."""

from dataclasses import replace
from functools import partial
from shutil import which

import pytest
import torch

from lora_blip.lora import adapter_file
from lora_blip.runtime.runs import ADAPTER_NAME
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.kill import run_processes
from tests.support.runs import config_of, elsewhere, metrics_of, only_run, settings


def assert_near(one, other, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert that two runs have the same tensors, and that the magnitudes moved in both."""
    a, b = (adapter_file.read(only_run(config) / ADAPTER_NAME) for config in (one, other))
    assert a.variant == b.variant == "dora" and list(a.tensors) == list(b.tensors)
    assert any(key.endswith(".magnitude") for key in a.tensors)
    for key, value in a.tensors.items():
        assert value.any()
        torch.testing.assert_close(b.tensors[key], value, rtol=rtol, atol=atol, msg=key)


@pytest.mark.parametrize("kind", ["blip", pytest.param("opt", marks=pytest.mark.slow)])
def test_checkpointing_trains_to_the_same_dora(checkpoints, tmp_path, kind):
    targets = "vit,text" if kind == "blip" else "vit,qformer,lm"
    config = settings(checkpoints[kind], tiny.write_photos(tmp_path), targets=targets, variant="dora")
    frugal = replace(elsewhere(config), checkpointing=True)
    train(config), train(frugal)
    assert_near(config, frugal, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "ranks_settings", [{"accumulation": 1}, pytest.param({"accumulation": 1, "shard": True}, marks=pytest.mark.slow)]
)
def test_two_processes_train_the_dora_of_one(checkpoints, tmp_path, ranks_settings):
    """Each process has half of the micro-batches. With FSDP2, each also has half of W, and the norm needs whole rows."""
    changes = {"epochs": 30, "max_steps": 4, "targets": "vit,text", "variant": "dora", "checkpoint_seconds": 1e9}
    config = config_of(checkpoints, tmp_path, accumulation=2, **changes)
    several = replace(elsewhere(config), **ranks_settings)
    train(config)
    assert run_processes(2, lambda: train(several)) == [0, 0]
    assert_near(config, several)


@pytest.mark.slow
@pytest.mark.skipif(not which("g++"), reason="torch.compile needs a compiler")
def test_compiled_blocks_train_dora_as_uncompiled_ones(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    source = tiny.write_photos(tmp_path)
    config = settings(checkpoints["blip"], source, targets="vit,text", variant="dora", max_steps=8, epochs=8, lr=1e-3)
    losses = []
    for run in (config, replace(elsewhere(config), compile=True)):
        losses.append([line["loss"] for line in metrics_of(train(run)) if "loss" in line])
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] and not counted["graph_break"]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-5)
