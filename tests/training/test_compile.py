"""Test torch.compile of a training step: no graph breaks, and the same training as without it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.errors import ConfigError, LoRAError
from lora_blip.kernels import linear, paths
from lora_blip.lora.sites import is_compiled
from lora_blip.models.compilation import compile_blocks, uncompiled
from lora_blip.models.precision import autocasting
from lora_blip.tasks import verification
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.training import early_checks
from lora_blip.training.loop import train
from lora_blip.training.setup import compile_step
from tests.support import tiny
from tests.support.kill import run_processes
from tests.support.models import inject
from tests.support.runs import assert_same, before_each_step, config_of, elsewhere, metrics_of, only_run, settings

COMPILER = pytest.mark.skipif(not which("g++"), reason="torch.compile needs a compiler")
STEPS, BOUND = 20, {"fp32": 1e-5, "bf16": 0.02}  # BOUND: largest relative difference of the losses


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "batch_size", "blocks", "graphs", "backend"),
    [("fp32", 3, "vit[1:2]", 1, "inductor"), ("bf16", 4, "vit", 2, "aot_eager")],
)
def test_a_compiled_step_trains_as_an_uncompiled_one(
    checkpoints, tmp_path, monkeypatch, precision, batch_size, blocks, graphs, backend
):
    """The losses of twenty steps are equal, and so are the losses of the validations, which are not compiled.

    The backend aot_eager captures the same graphs, forward and backward, but executes PyTorch's own kernels. g++ would need
    seconds for each graph.

    There is one graph. In the second case, nine images in batches of four leave a batch of one, which adds a graph.
    """
    source = tiny.write_photos(tmp_path)
    losses = {}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for compiled in (False, True):
        torch._dynamo.reset()  # earlier tests may have used up the compilations of the same code
        torch._dynamo.utils.counters.clear()
        options = {"max_steps": STEPS, "epochs": STEPS, "validate_every": 7, "precision": precision, "lr": 1e-3}
        options["batch_size"] = batch_size
        path = train(settings(checkpoints["blip"], source, compile=compiled, targets=f"{blocks},text", **options))
        losses[compiled] = [line["loss"] for line in metrics_of(path) if "loss" in line]
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == graphs and not counted["graph_break"]
    assert len(losses[True]) == STEPS and (losses[True] != losses[False] or backend != "inductor")
    assert losses[True] == pytest.approx(losses[False], rel=BOUND[precision])


def test_a_missing_compiler_is_an_error_before_the_model_is_loaded(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(early_checks, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="compiler"):
        train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), compile=True))


@pytest.mark.slow
def test_the_table_of_paths_is_read_before_the_graphs_are_traced(make, monkeypatch):
    """In a process that has not read the table, the trace has no graph break."""
    model = make("blip").model
    monkeypatch.setattr(paths.Current, "row", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model)
    model.vision_model(torch.randn(2, 3, tiny.SIDE, tiny.SIDE))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]


def test_blocks_before_the_first_adapter_are_left_as_they_are(make):
    """The cached states are the same with and without torch.compile."""
    model = make("blip").model
    compile_blocks(model, first=1)
    assert [block._compiled_call_impl is not None for block in model.vision_model.encoder.layers] == [False, True]


WORDS = "a red cube on top of the blue cube".split()
# the texts of each image, as numbers of words; the last batch has one image
SIZES = ([3, 5], [8]), ([4], [6, 2], [7]), ([2, 8, 3, 4], [9, 5, 6]), ([5, 1], [3]), ([4, 6],)


def batches(task: Any) -> Iterator[DeviceBatch]:
    """Yield batches with other numbers of images, texts and tokens each. In VQA, the texts are answers to a question."""
    for seed, images in enumerate(SIZES):
        lines = [(number, " ".join(WORDS[:words])) for number, texts in enumerate(images) for words in texts]
        examples = [
            Example(Path(f"{number}.png"), text, f"{number}.png", line, question="what is it", answers=(text,))
            if task.takes_question
            else Example(Path(f"{number}.png"), text, f"{number}.png", line)
            for line, (number, text) in enumerate(lines, 1)
        ]
        pixels = torch.randn(len(images), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))
        yield task.batch(HostBatch(examples, pixels, [number for number, _ in lines]))


def loss_and_gradients(task: Any, batch: DeviceBatch) -> tuple[Tensor, list[Tensor]]:
    trained = [p for p in task.backbone.model.parameters() if p.requires_grad]
    loss = task.loss(batch) / batch.count
    return loss.detach(), list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))


def compiled_task(make: Any, kind: str) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone = make(kind)
    task = TASKS[default_task(backbone.architecture)](backbone)
    inject(backbone)
    task.backbone.model.train()
    assert task.compile_loss(backend="aot_eager")
    return task


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blip", "vqa", "opt", "t5"])
def test_few_graphs_serve_batches_of_all_sizes(make, kind):
    """Losses and gradients are those of the eager step. Sizes of 1, and rows without packing, have graphs of their own."""
    task = compiled_task(make, kind)
    for batch in batches(task):
        loss, gradients = loss_and_gradients(task, batch)
        with uncompiled(task.backbone.model):
            expected, truths = loss_and_gradients(task, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for gradient, truth in zip(gradients, truths, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-5)
    counted = torch._dynamo.utils.counters
    assert 0 < counted["stats"]["unique_graphs"] <= (2 if kind == "blip" else 6) and not counted["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "calls"), [("fp32", True), ("bf16", False)])
def test_the_graph_calls_one_operator_for_each_large_frozen_product(make, monkeypatch, precision, calls):
    """The operator chooses the kernel in each call, so a graph without fixed rows is not slower than the eager step.

    Without the operator, a compiled step in float32 takes 1.6 times as long on an AMD EPYC. In 16 bits, it is not used.
    """
    used = []
    monkeypatch.setattr(linear, "is_faster", lambda _, weight: used.append(weight.shape) or False)
    monkeypatch.setattr(linear, "has_kernel", lambda: True)
    monkeypatch.setattr(linear, "LARGE", 0)
    monkeypatch.setattr(paths.Current, "row", replace(paths.row(), onednn=0))
    task = compiled_task(make, "blip")
    batch = next(batches(task))
    with autocasting(task.backbone.device, precision)():
        with uncompiled(task.backbone.model):
            expected, truths = loss_and_gradients(task, batch)
        used.clear()
        loss, gradients = loss_and_gradients(task, batch)
    linears = [each for each in task.backbone.model.modules() if isinstance(each, nn.Linear)]
    assert len(used) > 1.5 * len(linears) if calls else not used  # forward, and backward above the first adapter
    torch.testing.assert_close(loss, expected, rtol=1e-5 if calls else 1e-2, atol=1e-6)
    for gradient, truth in zip(gradients, truths, strict=True) if calls else ():
        torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiled_loss_refuses_adapters_and_can_be_switched_off(make):
    """`inject` into the model is refused. After the fallback of the verification, no step runs compiled code."""
    task = compiled_task(make, "blip")
    model = task.backbone.model
    assert is_compiled(model)
    with pytest.raises(LoRAError, match=r"torch\.compile"):
        inject(task.backbone, "text", name="second")
    with uncompiled(model):
        loss_and_gradients(task, next(batches(task)))
    verification.disable(task)
    assert not is_compiled(model)
    loss_and_gradients(task, next(batches(task)))
    assert not torch._dynamo.utils.counters["stats"]


def test_compilation_with_checkpointing_is_refused_before_the_model_is_loaded(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="cannot be used with checkpointing = True: set COMPILE = False, or CHECKPOINTING = "):
        train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), compile=True, checkpointing=True))


def test_retrieval_and_sharded_weights_compile_the_blocks_of_the_vit(make):
    """Retrieval has several losses. Sharded weights are gathered between the layers, outside a graph."""
    for kind, shards in (("blip", True), ("itm", False)):
        backbone = make(kind)
        inject(backbone)
        blocks = backbone.model.vision_model.encoder.layers
        task = TASKS[default_task(backbone.architecture)](backbone)
        assert compile_step(task, shards) == f"{len(blocks)} of the {len(blocks)} ViT blocks"
        assert all(block._compiled_call_impl is not None for block in blocks) and is_compiled(backbone.model)


@COMPILER
@pytest.mark.slow
def test_a_resumed_compiled_run_has_the_bits_of_an_uninterrupted_one(checkpoints, tmp_path):
    """The new process compiles at another batch. Its graphs have no fixed numbers of rows and tokens, so they round equally."""
    config = replace(config_of(checkpoints, tmp_path, dropout=0.0, epochs=2), compile=True)
    torch._dynamo.reset()
    uninterrupted = train(config)

    def interrupt(step: int, _learner: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        before_each_step(patch, interrupt)
        train(elsewhere(config))
    torch._dynamo.reset()
    assert_same(uninterrupted, train(elsewhere(config)))


@pytest.mark.slow
def test_two_processes_train_a_compiled_step_as_an_uncompiled_one(checkpoints, tmp_path, monkeypatch):
    """DistributedDataParallel does not divide the graph. The losses are those of two uncompiled processes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    source, losses = tiny.write_photos(tmp_path), []
    for compiled in (False, True):
        run = settings(checkpoints["blip"], source, compile=compiled, targets="vit,text", max_steps=6, epochs=6, lr=1e-3)
        run = replace(run, output_dir=str(tmp_path / str(compiled)))
        assert run_processes(2, partial(train, run)) == [0, 0]
        losses.append([line["loss"] for line in metrics_of(only_run(run) / "metrics.jsonl") if "loss" in line])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)
