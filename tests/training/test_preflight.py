"""Test the preflight checks: each fault that makes training useless is refused with a reason."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.errors import PreflightError
from lora_blip.lora import attached, injection
from lora_blip.lora.sites import Site
from lora_blip.models.finite import first_nonfinite
from lora_blip.models.loading import load_backbone
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.registry import TASKS
from lora_blip.tasks.text_task import HEADING, WIDTH, aligned
from lora_blip.training import preflight
from tests.support import tiny
from tests.support.models import TEXTS, batch_of, inject


def checked(task: CaptionTask, **changes: object) -> str:
    batch = batch_of(task)
    rows = replace(batch.rows.padded(), **changes) if changes else batch.rows
    return preflight.check(task, replace(batch, rows=rows), nullcontext)


def test_a_correct_model_passes_the_checks_unchanged(backbone):
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    before = torch.get_rng_state()
    report_text = checked(task)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in backbone.model.parameters())
    heading, *table, _, memory = report_text.splitlines()
    assert heading == HEADING and memory.startswith("a step needs about ")
    inputs, labels = ([line[10:] for line in table if line.startswith(f"  {name} ")] for name in ("input", "label"))
    assert len(inputs) == len(labels) and "cube" in "".join(labels) and any(label.endswith(" .") for label in labels)


@pytest.mark.parametrize("kind", ["blip", "vqa", "itm"])
def test_a_tokenizer_of_bert_has_no_token_for_blips_start_of_a_text(checkpoints, kind, tmp_path):
    """The published BLIP checkpoints have BERT's 30,522 tokens, and the ids 30522 and 30523 for [DEC] and [ENC]."""
    folder = tmp_path / kind
    shutil.copytree(checkpoints[kind], folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    dropped = [token["id"] for token in tokenizer["added_tokens"] if token["content"] in ("[DEC]", "[ENC]")]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] not in dropped]
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: id_ for token, id_ in vocabulary.items() if token not in ("[DEC]", "[ENC]")}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    backbone = load_backbone(str(folder), "cpu")
    assert backbone.tokenizer.convert_ids_to_tokens(dropped[:1]) == [None]
    inject(backbone, trained=False)
    task = TASKS[{"vqa": "vqa", "itm": "retrieval"}.get(kind, "caption")](backbone)
    question = {"question": "what color is it?"} if kind == "vqa" else {}
    examples = [
        Example(Path(f"{n}.png"), "" if question else text, f"{n}.png", n, **question, answers=(text,) if question else ())
        for n, text in enumerate(TEXTS)
    ]
    images = torch.randn(len(TEXTS), 3, tiny.SIDE, tiny.SIDE)
    table = preflight.check(task, task.batch(HostBatch(examples, images)), nullcontext)
    assert (f"[{backbone.model.config.text_config.bos_token_id}]" in table) == (kind != "itm")


def test_each_label_is_printed_below_its_input_token():
    """Columns that do not fit are on the next two lines. Equal neighbors are one column. No cell is lost."""
    assert aligned([("[DEC]", "a"), ("a", "blue"), ("[PAD]", "."), ("[PAD]", ".")]) == [
        "  input   [DEC]  a     [PAD] ×2",
        "  label   a      blue  .",
    ]
    pairs = [(f"token{number}", f"token{number + 1}") for number in range(40)]
    lines = aligned(pairs)
    assert len(lines) == 8 and max(map(len, lines)) <= WIDTH + 10
    assert [token for line in lines[::2] for token in line.split()[1:]] == [token for token, _ in pairs]
    assert [label for line in lines[1::2] for label in line.split()[1:]] == [label for _, label in pairs]
    assert len(aligned([("x" * 500, "."), ("a", "b")])) == 4  # a token that is longer than a line has its own


def test_a_blip2_without_placeholders_is_refused(make):
    """Without placeholders in the text, the model would train without seeing the image."""
    for kind in ("opt", "t5"):
        backbone = make(kind)
        inject(backbone, "lm", trained=False)
        task = CaptionTask(backbone)
        image = backbone.model.config.image_token_index
        ids = batch_of(task).rows.padded().input_ids
        with pytest.raises(PreflightError, match=r"the model ignores the images.*<image>"):
            checked(task, input_ids=ids.masked_fill(ids == image, 5))


def test_an_adapter_that_is_never_called_is_refused(make, monkeypatch):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    mlp = backbone.model.vision_model.encoder.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.fc2(torch.nn.functional.linear(x, mlp.fc1.weight)))
    with pytest.raises(PreflightError, match=r"layers\.0\.mlp\.fc1': the model's forward does not call"):
        checked(CaptionTask(backbone))


def test_an_adapter_without_gradient_is_refused(make, monkeypatch):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    model = backbone.model.vision_model.encoder.layers[0]
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: forward(*a, **k).detach())
    with pytest.raises(PreflightError, match=r"4 adapters get no gradient"):
        checked(CaptionTask(backbone))


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_labels_on_padding_or_on_the_prompt_are_refused(make, kind):
    backbone = make(kind)
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    targets = batch_of(task).rows.padded().targets
    padded = targets.masked_fill(targets == IGNORE, backbone.tokenizer.convert_tokens_to_ids("a"))
    with pytest.raises(PreflightError, match=r"the labels of 'x\.png' decode to"):
        checked(task, targets=padded)
    with pytest.raises(PreflightError, match=r"the labels of 'x\.png' decode to ''"):
        checked(task, targets=torch.full_like(targets, IGNORE))


def test_a_loss_that_is_not_finite_names_the_first_module(make):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    weight = backbone.model.vision_model.encoder.layers[1].self_attn.projection.weight.data
    weight[0] = 3e38
    with pytest.raises(PreflightError, match=r"loss of the first batch is nan: .*'vision_model.*1\.self_attn\.projection'"):
        checked(CaptionTask(backbone))
    weight[0] = torch.nan
    with pytest.raises(PreflightError, match=r"nan: the weight 'vision_model.*1\.self_attn\.projection\.weight' contains NaN"):
        checked(CaptionTask(backbone))


def test_the_memory_estimate_counts_what_autograd_keeps(make):
    """Twice the images need about twice the activations.

    Checkpointing keeps the inputs of the blocks, and one block that is computed again.
    """
    counted = {}
    for name, options, copies in (("one", {}, 1), ("two", {}, 2), ("frugal", {"checkpointing": True}, 1)):
        backbone = make("opt", **options)
        inject(backbone, trained=False)
        backbone.model.train()
        task = CaptionTask(backbone)
        counted[name] = preflight.check_gradients(task, batch_of(task, ["a red cube"] * 4 * copies))
    assert 1.7 < counted["two"] / counted["one"] < 2.2 and counted["frugal"] < 0.8 * counted["one"]


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_the_estimate_with_checkpointing_contains_the_block_that_is_computed_again(make, kind, monkeypatch):
    """The largest block is that of a run without checkpointing, and the gradients are equal up to rounding."""
    sizes, gradients = {}, {}
    for checkpointing in (False, True):
        backbone = make(kind, checkpointing=checkpointing)
        inject(backbone, trained=True)
        backbone.model.train()
        task = CaptionTask(backbone)
        batch = batch_of(task, ["a red cube"] * 4)
        kept, largest, before = preflight.KeptBytes(backbone.model), 0, 0

        def enter(*_: object, kept=kept) -> None:
            nonlocal before
            before = kept.bytes

        def leave(*_: object, kept=kept) -> None:
            nonlocal largest
            largest = max(largest, kept.bytes - before)

        if not checkpointing:
            blocks = [m for m in backbone.model.modules() if isinstance(m, GradientCheckpointingLayer)]
            handles = [
                handle for m in blocks for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
            ]
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
                task.loss(batch)
            for handle in handles:
                handle.remove()
            block = largest
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "max", lambda *_, **__: 0, raising=False)  # without the block
            inputs = preflight.check_gradients(task, batch)
        sizes[checkpointing] = preflight.check_gradients(task, batch) - inputs
        (task.loss(batch) / batch.count).backward()
        gradients[checkpointing] = [p.grad.clone() for p in backbone.model.parameters() if p.grad is not None]
    assert sizes[False] == 0
    assert 0.75 * block <= sizes[True] <= 1.25 * block
    assert gradients[True]
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-5)


def test_the_checks_draw_nothing_from_the_generator_of_the_run(make):
    """Dropout during the checks does not change the random numbers of the training."""
    backbone = make("blip")
    for adapter in inject(backbone, "vit", trained=False).values():
        adapter.dropout = 0.5
    backbone.model.train()
    before = torch.get_rng_state()
    checked(CaptionTask(backbone))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- each proof on its own


class Toy(nn.Module):
    """A model with two adapted linears, a module that returns a tuple, and a module with integer outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair = Pair()
        injection.inject(self, targets_of("first", "second"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.pair(self.first(x))[1])


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1, 2]), x


def targets_of(*modules: str) -> list[Site]:
    return [Site(module, 2, 4.0) for module in modules]


def toy_task(model: nn.Module, loss, logits=None) -> SimpleNamespace:
    """Return an object with the attributes of a task that the checks of gradients and images use."""
    return SimpleNamespace(backbone=SimpleNamespace(model=model), loss=loss, logits=logits, parameters=lambda: ())


def test_the_first_module_that_is_not_finite_is_named_in_the_order_of_execution():
    """Test every position of the module. The search removes all its hooks."""
    x = torch.ones(1, 4)
    for module, poisoned, kind in (("first", "weight", "Linear"), ("second", "bias", "Linear")):
        model = Toy()
        getattr(getattr(model, module), poisoned).data.fill_(torch.inf)
        report_text = first_nonfinite(model, lambda model=model: model(x))
        assert report_text == f"the first output that is not finite is that of {module!r} ({kind}, torch.float32)"
        assert not any(m._forward_hooks for name, m in model.named_modules() if name not in ("first", "second"))
    model = Toy()
    attached.adapters(model)["first"].B.data.fill_(torch.nan)  # the linear with its update is named, not the adapter
    assert "'first'" in first_nonfinite(model, lambda: model(x))
    assert not first_nonfinite(Toy(), lambda: model(x))
    model.pair.register_forward_hook(lambda *_: (torch.tensor([1]), torch.full((1, 4), torch.nan)))
    attached.adapters(model)["first"].B.data.zero_()
    assert "that of 'pair' (Pair, torch.int64)" in first_nonfinite(model, lambda: model(x))
    recorded = []
    first_nonfinite(Toy(), lambda: recorded.append(torch.is_grad_enabled()))
    assert recorded == [False]


def test_hooks_of_the_search_are_removed_after_an_error_too():
    model = Toy()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ZeroDivisionError):
        first_nonfinite(model, lambda: 1 // 0)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_adapters_that_are_not_called_are_counted_and_the_first_is_named():
    model = Toy()
    preflight.check_hooks(model, lambda: model(torch.ones(1, 4)))
    for called, count, name in ((model.first, 1, "second"), (model.second, 1, "first"), (model.pair, 2, "first")):
        grad = []
        with pytest.raises(
            PreflightError, match=rf"^{count} adapter{'s' * (count > 1)} would have no effect, such as that of '{name}'"
        ):
            preflight.check_hooks(model, lambda c=called, g=grad: (g.append(torch.is_grad_enabled()), c(torch.ones(1, 4))))
        assert grad == [False]


def test_adapters_without_a_gradient_are_counted_and_no_gradient_stays():
    """One B is not used, and one has a zero gradient. A batch of four gives the same result as a batch of one."""
    x, model = torch.ones(1, 4), Toy()
    adapters = attached.adapters(model)
    batch = SimpleNamespace(count=4)
    assert preflight.check_gradients(toy_task(model, lambda _: model(x).sum()), batch) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    cases = [
        (lambda _: model.first(x).sum(), 1, "second"),
        (lambda _: model.second(x).sum(), 1, "first"),
        (lambda _: model.first(x).sum() + 0 * model.second(x).sum(), 1, "second"),
        (lambda _: 0 * adapters["first"].A.sum(), 2, "first"),
    ]
    for loss, count, name in cases:
        with pytest.raises(
            PreflightError,
            match=rf"^{'1 adapter gets' if count == 1 else f'{count} adapters get'} no gradient, such as '{name}'",
        ):
            preflight.check_gradients(toy_task(model, loss), batch)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradients_of_a_task_s_own_parameters_are_dropped_too():
    model, own = Toy(), nn.Parameter(torch.ones(()))
    task = toy_task(model, lambda _: (model(torch.ones(1, 4)) * own).sum())
    task.parameters = lambda: (own,)
    preflight.check_gradients(task, SimpleNamespace(count=1))
    assert own.grad is None


def test_a_gradient_that_underflows_without_a_loss_scale_is_detected():
    """In float16, 1e-8 is zero, but 1024 · 1e-8 is not."""
    model = Toy()
    adapters = attached.adapters(model)
    loss = lambda _: sum((x.B.half() * 1e-4 * 1e-4).sum() for x in adapters.values())  # noqa: E731
    preflight.check_gradients(toy_task(model, loss), SimpleNamespace(count=1))


def test_saved_tensors_are_counted_once_per_storage_without_parameters():
    """x · w saves x once for both products, exp saves its output, and the parameter w is not counted."""
    linear = nn.Linear(8, 8, bias=False)
    counter = preflight.KeptBytes(linear)
    x = torch.randn(4, 8)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        ((linear(x) + linear(x[:2]).sum()).exp()).sum().backward()
    assert counter.bytes == 2 * 4 * 8 * 4


def test_a_saved_tensor_that_is_freed_does_not_hide_later_ones():
    """The identity of a freed storage would be used again, so only a few of these tensors would be counted."""
    counter = preflight.KeptBytes(nn.Linear(1, 1))
    for _ in range(100):
        counter.pack(torch.ones(8))
    assert counter.bytes == 100 * 8 * 4


def test_images_that_change_nothing_are_refused_and_one_image_is_enough():
    """The batch is compared with the reversed batch, or with its negative if both are equal. Cached states are not used."""
    recorded = []
    for pixels in (torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.ones(2, 3, 4, 4)):
        batch = DeviceBatch([], pixels, None, 1.0, cached_states="kept")  # type: ignore[arg-type]

        def logits(device_batch: DeviceBatch) -> torch.Tensor:
            recorded.append((device_batch.cached_states, torch.is_grad_enabled()))
            return device_batch.pixel_values.sum((1, 2, 3))

        preflight.check_image_matters(toy_task(Toy(), None, logits), batch)
        with pytest.raises(PreflightError, match="other images give the same logits"):
            preflight.check_image_matters(
                toy_task(Toy(), None, lambda device_batch: device_batch.pixel_values.abs().sum()), batch
            )
    assert set(recorded) == {(None, False)} and len(recorded) == 6


def test_the_memory_of_a_step_adds_up():
    """2 GiB of float16 weights, 4 · 1 GiB for the adapters, and 0.5 GiB of activations are 6.5 GiB."""
    with torch.device("meta"):
        model = nn.Module()
        model.frozen = nn.Parameter(torch.empty(2**30, dtype=torch.float16), requires_grad=False)
        model.trained = nn.Parameter(torch.empty(2**28, dtype=torch.float16))
    assert preflight.memory_estimate(model, 2**29) == (
        "a step needs about 6.50 GiB of memory: frozen weights 2.00, adapters with gradients and AdamW's state 4.00, "
        "activations for the backward pass 0.50"
    )
    assert preflight.memory_estimate(nn.Linear(256, 1024).requires_grad_(False), 2**20).startswith(
        "a step needs about 2.00 MiB of memory: frozen weights 1.00, "
    )
