"""Test torch.compile of the ViT's blocks: no graph breaks, and the same training as without it."""

from functools import partial
from shutil import which

import pytest
import torch

from lora_blip.errors import ConfigError
from lora_blip.kernels import paths
from lora_blip.models.compilation import compile_blocks
from lora_blip.training import early_checks
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.runs import metrics_of, settings

COMPILER = pytest.mark.skipif(not which("g++"), reason="torch.compile needs a compiler")
STEPS, BOUND = 20, {"fp32": 1e-5, "bf16": 0.02}  # BOUND: largest relative difference of the losses


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "batch_size", "blocks", "graphs", "backend"),
    [("fp32", 3, "vit[1:2]", 1, "inductor"), ("bf16", 4, "vit", 4, "aot_eager")],
)
def test_compiled_blocks_train_as_uncompiled_ones(
    checkpoints, tmp_path, monkeypatch, precision, batch_size, blocks, graphs, backend
):
    """The losses of twenty steps are equal, and so are the losses of the validations, which are not compiled.

    The backend aot_eager captures the same graphs, forward and backward, but executes PyTorch's own kernels. g++ would need
    seconds for each graph.

    There are two graphs, because only the input of the first block has no gradient. Nine images in batches of four leave a
    batch of one, which adds two graphs.
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
