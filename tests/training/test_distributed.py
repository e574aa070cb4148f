"""Test that several processes equal one process with as many micro-batches per step, and that a lost rank is replaced."""

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lora_blip.config import TrainConfig
from lora_blip.data.loader import slots_of_steps
from lora_blip.errors import CheckpointError, ConfigError
from lora_blip.lora import adapter_file
from lora_blip.models import sharding
from lora_blip.runtime.distributed import joined
from lora_blip.runtime.runs import ADAPTER_NAME
from lora_blip.training import checkpoint, loop
from lora_blip.training.learner import Learner
from lora_blip.training.loop import train
from lora_blip.training.run_folder import Run
from tests.support.kill import run_processes
from tests.support.models import WHOLE
from tests.support.runs import assert_same, before_each_step, config_of, elsewhere, metrics_of, only_run, score


def finished(config: TrainConfig) -> Path:
    return only_run(config) / ADAPTER_NAME


@pytest.mark.parametrize("batches", [1, 2, 5, 6, 13])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_micro_batch_belongs_to_one_rank(batches, accumulation, ranks):
    """All ranks have the same number of slots in each step. Together, their micro-batches are those of the epoch, in order."""
    shares = [slots_of_steps(batches, accumulation, rank, ranks) for rank in range(ranks)]
    assert {tuple(len(step) for step in share) for share in shares} == {tuple(len(step) for step in shares[0])}
    assert len(shares[0]) == -(-batches // (accumulation * ranks))
    order = [
        turn[n] for steps in zip(*shares, strict=True) for turn in [list(zip(*steps, strict=True))] for n in range(len(turn))
    ]
    assert [slot.number for turn in order for slot in turn if not slot.is_filler] == list(range(batches))


SLOW_THREE = [pytest.param(kind, 3, marks=pytest.mark.slow) for kind in ("vqa", "itm")]  # three processes on two cores


@pytest.mark.parametrize(("kind", "ranks"), [("blip", 2), pytest.param("opt", 2, marks=pytest.mark.slow), *SLOW_THREE])
def test_several_ranks_train_as_one_process(checkpoints, tmp_path, kind, ranks):
    """Compare 20 steps with captions of different lengths, last batches of one line, dropout and sampled negatives."""
    changes = {
        "epochs": 30,
        "max_steps": 20,
        "validate_every": 8,
        "targets": WHOLE[kind],
        "batch_size": 4 if kind == "itm" else 2,
    }
    config = config_of(checkpoints, tmp_path, kind, accumulation=ranks, checkpoint_seconds=1e9, **changes)
    one = train(config)
    several = replace(elsewhere(config), accumulation=1)
    assert run_processes(ranks, lambda: train(several)) == [0] * ranks
    many = finished(several)
    alone, together = metrics_of(one), metrics_of(many)
    assert [entry["step"] for entry in alone] == [entry["step"] for entry in together] and len(alone) > 20
    for key in ("loss", "grad_norm", "val_loss", "val_exact_match", "val_recall_at_1", "val_vqa_accuracy", "lr"):
        pairs = [(a[key], b[key]) for a, b in zip(alone, together, strict=True) if key in a]
        assert all(a == pytest.approx(b, rel=1e-6) for a, b in pairs), key
    a, b = adapter_file.read(one), adapter_file.read(many)
    assert all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    assert a.task == b.task  # retrieval's temperature
    assert {p.name for p in one.parent.iterdir()} == {p.name for p in many.parent.iterdir()}


def test_only_the_main_rank_prints_and_it_reports_the_bytes_sent(checkpoints, tmp_path, capfd):
    """Two processes exchange the gradients of the adapters: each sends half of their bytes twice."""
    config = config_of(checkpoints, tmp_path, epochs=1, targets="vit,text")
    assert run_processes(2, lambda: train(config)) == [0, 0]
    printed = capfd.readouterr().out
    bytes_ = sum(tensor.numel() * 4 for tensor in adapter_file.read(finished(config)).tensors.values())
    assert printed.count("saved ") == 1 and f"2 processes, each sends {bytes_ / 1e6:.2f} MB of gradients per step" in printed


@pytest.mark.parametrize("last", ["backward", "all_gather"])
def test_a_finished_rank_ends_while_gloo_still_holds_an_object(last):
    """Without GROUPS, DDP's reducer holds the GIL and waits for gloo's thread, which waits for the GIL.

    After a backward, gloo's thread can hold the context of autograd. After `all_gather`, it can hold a tensor.
    """
    importlib.import_module("torch._dynamo")  # once here, not in each child

    def act() -> None:
        sys.setswitchinterval(60)  # another thread gets the GIL only if this thread releases it
        with joined() as ranks:
            model = DistributedDataParallel(torch.nn.Linear(2, 2))
            model(torch.ones(1, 2)).sum().backward()
            if last == "all_gather":
                ranks.all_gather([parameter.grad for parameter in model.parameters()])
        del model

    for _ in range(20):  # without GROUPS, one in seven runs after a backward does not end
        assert run_processes(2, act) == [0, 0]


def test_the_processes_of_torchrun_can_join_several_groups_one_after_the_other():
    """Before, the second group read the addresses of the first one from the store, and waited forever."""

    def act() -> None:
        for _ in range(4):
            with joined() as ranks:
                model = DistributedDataParallel(torch.nn.Linear(2, 2))
                model(torch.ones(1, 2)).sum().backward()
                assert ranks.all_gather(ranks.rank) == [0, 1]

    for _ in range(3):
        assert run_processes(2, act) == [0, 0]


@pytest.mark.parametrize("change", ["lines", "lr", "missing"])
def test_ranks_with_other_inputs_stop_before_the_first_step(checkpoints, tmp_path, capfd, change):
    """If one rank has other data, other settings or an error, all ranks stop at once, and the error names the rank."""
    config = config_of(checkpoints, tmp_path)
    source = Path(config.annotations)
    other = source.with_name("other.jsonl")
    other.write_text("\n".join(source.read_text().splitlines()[:8]))
    changed = {"lines": {"annotations": str(other)}, "lr": {"lr": 0.5}, "missing": {"annotations": "gone.jsonl"}}[change]
    start = time.monotonic()
    codes = run_processes(2, lambda: train(replace(config, **(changed if os.environ["RANK"] == "1" else {}))))
    assert codes == [1, 1] and time.monotonic() - start < 60
    printed = capfd.readouterr().err
    expected = {
        "lines": "process 1 would train something else than process 0: training lines are not the same",
        "lr": "lr is 0.5 there and",
        "missing": "process 1 failed, and all stop: DataError",
    }[change]
    assert expected in printed and not list(Path(config.output_dir).glob("20*"))


def test_two_ranks_that_receive_a_signal_save_both_their_gradients(checkpoints, tmp_path):
    """The signal comes during an accumulation. One process cannot resume the run of two processes."""
    config = config_of(checkpoints, tmp_path, checkpoint_seconds=1e9, epochs=3)
    assert run_processes(2, lambda: train(config)) == [0, 0]

    def stopped() -> None:
        real = loop.accumulate_gradients

        def accumulate(learner: Learner, *rest: object, **named: object) -> None:
            real(learner, *rest, **named)
            if learner.progress.step == 2 and learner.progress.slot == 2 and learner.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one rank receives the signal, and both stop

        loop.accumulate_gradients = accumulate
        train(elsewhere(config))

    assert run_processes(2, stopped) == [75, 75]
    saved = checkpoint.newest(only_run(elsewhere(config)))[0]
    assert saved is not None and saved.state["progress"]["slot"] == 2
    gradients = [{k: v for k, v in saved.tensors().items() if k.startswith(f"gradient/{rank}/")} for rank in (0, 1)]
    assert len(gradients[0]) == len(gradients[1]) > 0
    with pytest.raises(CheckpointError, match="processes was 2 and is 1"):
        train(replace(elsewhere(config), resume=str(saved.run)))
    assert run_processes(2, lambda: train(elsewhere(config))) == [0, 0]
    assert_same(finished(config), finished(elsewhere(config)))


def test_ranks_stop_early_together_after_a_resume(checkpoints, tmp_path, monkeypatch):
    """All ranks resume with the same number of validations without a better score."""
    scores = [score(9), score(2, 0.5), *[score(3, 0.5)] * 9]
    real = Run.log_validation
    monkeypatch.setattr(Run, "log_validation", lambda run, step, epoch, _: real(run, step, epoch, scores[step]))
    config = config_of(checkpoints, tmp_path, epochs=9, validate_every=1, patience=4, accumulation=1, checkpoint_seconds=1e9)
    assert run_processes(2, lambda: train(config)) == [0, 0]
    assert metrics_of(finished(config))[-1]["step"] == 5

    def stopped() -> None:
        def tell(count: int, _: Learner) -> None:
            if count == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            before_each_step(patch, tell)
            train(elsewhere(config))

    assert run_processes(2, stopped) == [75, 75]
    assert run_processes(2, lambda: train(elsewhere(config))) == [0, 0]
    assert_same(finished(config), finished(elsewhere(config)))


@pytest.mark.parametrize("kind", ["blip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("itm", "opt", "t5"))])
def test_sharded_weights_train_to_the_same_adapter(checkpoints, make, tmp_path, kind):
    """With FSDP2, each rank has half of the frozen blocks, and all weights of one block at a time. The adapter is the same.

    The model is moved to the device after its blocks are divided, and all blocks are divided when backward starts.
    """
    changes = {"epochs": 2, "targets": WHOLE[kind], "batch_size": 4 if kind == "itm" else 2}
    config = config_of(checkpoints, tmp_path, kind, checkpoint_seconds=0.2, **changes)
    assert run_processes(2, lambda: train(config)) == [0, 0]
    spread = replace(elsewhere(config), shard=True)

    def halved() -> None:
        blocks, moved, backwards = [], [], []
        real, to, backward = sharding.shard, nn.Module.to, torch.Tensor.backward

        def weights() -> int:
            """Return the number of frozen weights of the blocks that are on this rank."""
            return sum(sharding.local_part(p).numel() for b in blocks for p in b.parameters() if not p.requires_grad)

        def shard(backbone, ranks: int) -> None:
            parts = [getattr(backbone.model, name) for name in sharding.LARGE if hasattr(backbone.model, name)]
            blocks.extend(block for part in parts for block in sharding.blocks_of(part))
            before, most = weights(), max(sum(p.numel() for p in block.parameters()) for block in blocks)
            assert not moved
            real(backbone, ranks)
            after = weights()
            assert before > 0 and after == pytest.approx(before / 2, rel=0.02) and moved

            def alone(*_) -> None:
                assert weights() <= after + most  # no other block has all its weights

            def counted(loss, *rest, **named) -> None:
                assert weights() == after
                backwards.append(loss)
                backward(loss, *rest, **named)

            for block in blocks:
                block.register_forward_hook(alone)
                block.register_full_backward_hook(alone)
            torch.Tensor.backward = counted

        def recorded(module, *rest, **named):
            moved.extend([module] if isinstance(module, PreTrainedModel) else [])
            return to(module, *rest, **named)

        sharding.shard, nn.Module.to = shard, recorded
        train(spread)
        assert backwards

    assert run_processes(2, halved) == [0, 0]
    if kind == "t5":  # its autograd graph adds up the decoder's gradients in another order
        a, b = adapter_file.read(finished(config)).tensors, adapter_file.read(finished(spread)).tensors
        assert all((a[key] - b[key]).abs().max() <= 1e-4 * a[key].abs().max() for key in a)
    else:
        assert_same(finished(config), finished(spread))
    adapter_file.load(make(kind), finished(spread))


def test_sharded_weights_need_several_processes(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="torchrun"):
        train(config_of(checkpoints, tmp_path, shard=True))


DYING = """
    import os, signal, sys
    from lora_blip.config import TrainConfig
    from lora_blip.training import loop
    from lora_blip.training.loop import train

    rank, lives = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    real = loop.accumulate_gradients

    def accumulate(learner, *rest, **named):
        done = (learner.progress.step, learner.progress.slot)
        if (rank, lives, done) in DEATHS:
            os.kill(os.getpid(), signal.SIGKILL)
        real(learner, *rest, **named)

    loop.accumulate_gradients = accumulate
    train(TrainConfig(**CONFIG))
"""


@pytest.mark.slow
def test_any_rank_may_be_killed_and_all_restart_to_the_same_adapter(checkpoints, tmp_path):
    """Rank 1 is killed in a step, then rank 0, which writes the files, then rank 1 again."""
    config = config_of(checkpoints, tmp_path, epochs=3)
    assert run_processes(2, lambda: train(config)) == [0, 0]
    deaths = [("1", "0", (0, 1)), ("0", "1", (2, 0)), ("1", "2", (4, 2))]

    def act() -> None:
        real = loop.accumulate_gradients

        def accumulate(learner: Learner, *rest: object, **named: object) -> None:
            done = (learner.progress.step, learner.progress.slot)
            if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], done) in deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            real(learner, *rest, **named)

        loop.accumulate_gradients = accumulate
        train(elsewhere(config))

    assert run_processes(2, act, restarts=3) == [0, 0]
    assert_same(finished(config), finished(elsewhere(config)))


@pytest.mark.slow
def test_after_a_rank_is_killed_torchrun_restarts_to_the_same_adapter(checkpoints, tmp_path):
    """With --max-restarts 1, rank 0 is killed in a step. The adapter equals that of a run that is not killed."""
    config = config_of(checkpoints, tmp_path, epochs=3)
    assert run_processes(2, lambda: train(config)) == [0, 0]
    deaths = [(0, 0, (4, 0))]
    script = tmp_path / "dying.py"
    settings = vars(elsewhere(config))
    script.write_text(textwrap.dedent(DYING).replace("CONFIG", repr(settings)).replace("DEATHS", repr(deaths)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "6 steps in fp32, resumed after step 4" in done.stdout and "another process was lost" in done.stderr
    assert_same(finished(config), finished(elsewhere(config)))
