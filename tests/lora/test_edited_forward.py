"""An edit of `forward` in layer.py acts in every path: the fused update steps aside, and a merge is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.conversion.command import write_peft
from lora_blip.errors import AdapterError, LoRAError
from lora_blip.kernels import paths
from lora_blip.lora import adapter_file, attached, blending, formula, fused, injection, layer, merging, peft_writer
from lora_blip.lora.formula import adds_delta, other_formula
from lora_blip.lora.fused import is_product
from lora_blip.lora.header import HeaderError
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import CLASSES, EXTRA, DoRA, RsLoRA

ORIGINAL, HOOK = LoRA.forward, layer.lora_hook


def written_out(lora: LoRA, x: Tensor) -> Tensor:
    """Return the same update as the original `forward`, in other words."""
    return F.pad((lora.scale * x.to(lora.A.dtype)) @ (lora.B @ lora.A).T, lora.padding)


def with_relu(lora: LoRA, x: Tensor) -> Tensor:
    return F.pad(F.linear(F.linear(x.to(lora.A.dtype), lora.A).relu(), lora.B) * lora.scale, lora.padding)


EDITS: dict[str, Callable[[LoRA, Tensor], Tensor]] = {
    "twice the update": lambda lora, x: 2 * ORIGINAL(lora, x),
    "another scale": lambda lora, x: ORIGINAL(lora, x) / lora.scale,
    "a ReLU": with_relu,
    "a limit of large values": lambda lora, x: ORIGINAL(lora, x).clamp(-100, 100),
    "no gradient of A": lambda lora, x: F.pad(F.linear(F.linear(x, lora.A.detach()), lora.B) * lora.scale, lora.padding),
    "noise in training": lambda lora, x: ORIGINAL(lora, x) * (1 + 0.1 * torch.rand(()) * lora.training),
    "a constant": lambda lora, x: ORIGINAL(lora, x) + 1.0,
    "the sign of x": lambda lora, x: ORIGINAL(lora, x.abs()),
}


def new(kind: type[LoRA], module: str = "fc1", **options: Any) -> LoRA:
    return kind(Site(module, 3, 2.0, **options), 4, 6)


def test_the_classes_of_lora_compute_the_product_and_dora_does_not(monkeypatch):
    found = {name: is_product(new(kind, variant=name)) for name, kind in CLASSES.items()}
    assert found == {"lora": True, "rslora": True, "dora": False}
    monkeypatch.setattr(LoRA, "forward", written_out)
    assert is_product(new(LoRA)) and is_product(new(RsLoRA, variant="rslora"))
    assert is_product(new(LoRA, block="q", rows=(2, 4)))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_forward_is_not_the_product(edit, monkeypatch):
    monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    assert not is_product(new(LoRA)) and not is_product(new(RsLoRA, variant="rslora"))


def test_a_forward_may_depend_on_the_layer(monkeypatch):
    """Before, one adapter of each class was compared, so an edit for some layers was trained and not used for predictions."""
    monkeypatch.setattr(LoRA, "forward", lambda lora, x: ORIGINAL(lora, x) * (4 if lora.site.module == "2" else 1))
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    for lora in injection.inject(model, [Site("0", 2, 3.0), Site("2", 2, 3.0)]).values():
        nn.init.normal_(lora.B, std=10.0 if lora.site.module == "0" else 0.1)
    assert is_product(model[0].lora["default"]) and not is_product(model[2].lora["default"])
    with pytest.raises(LoRAError, match="on '2' adds something other than ΔW x"):
        merging.merge(model)


@pytest.mark.parametrize("edit", ["adds the update twice", "doubles y"])
def test_the_hook_may_be_edited_too(edit, monkeypatch):
    """Before, predictions merged the update once, without a message."""

    def edited(linear: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if edit == "doubles y":
            return HOOK(linear, args, kwargs, 2 * output)
        return HOOK(linear, args, kwargs, HOOK(linear, args, kwargs, output))

    for module in (layer, fused, formula, attached):
        monkeypatch.setattr(module, "lora_hook", edited)
    model = nn.Sequential(nn.Linear(6, 9))
    (lora,) = injection.inject(model, [Site("0", 2, 3.0)]).values()
    nn.init.normal_(lora.B)
    assert not is_product(lora) and not formula.adds_delta(model[0], "default")
    with pytest.raises(LoRAError, match="`forward` and `delta_weight` of LoRA differ"):
        merging.bake(model)


def test_a_class_with_another_parameter_or_an_error_is_not_the_product():
    class Gated(LoRA):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.gate = nn.Parameter(torch.ones(1))

    class Broken(LoRA):
        def forward(self, x: Tensor) -> Tensor:
            return x.no_such_name

    assert not is_product(new(Gated)) and not is_product(new(Broken))


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),  # as torch.set_default_device("cuda") does
    ],
)
def test_the_comparison_depends_on_no_mode_and_draws_no_random_number(mode, monkeypatch):
    linear = nn.Linear(6, 9)
    injection.inject(nn.Sequential(linear), [Site("0", 2, 3.0)])
    nn.init.normal_(linear.lora["default"].B)
    monkeypatch.setattr(LoRA, "forward", lambda lora, x: written_out(lora, x) * 1)  # a new function is compared again
    lora = new(LoRA)
    state = torch.get_rng_state()
    with mode():
        assert is_product(lora) and adds_delta(linear, "default")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["fused", "short"])
@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit != "noise in training"])
def test_an_edited_forward_is_trained_with_the_fast_path_on(edit, limit, monkeypatch):
    """Before, the fast path computed (alpha / r) · B A x, and an own training loop ignored the edit without a message."""
    monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    row = replace(paths.row(), fused=limit)
    monkeypatch.setattr(paths, "row", lambda: row)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    for lora in injection.inject(model, [Site("0", 2, 3.0), Site("2", 2, 3.0)]).values():
        nn.init.normal_(lora.B)
    plain, x = copy.deepcopy(model), 20 * torch.randn(5, 6)
    attached.fast(plain, False)
    attached.fast(model)
    outputs = model(x), plain(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (_, one), (_, other) in zip(attached.every_adapter(model), attached.every_adapter(plain), strict=True):
        torch.testing.assert_close(one.B.grad, other.B.grad)
        torch.testing.assert_close(one.A.grad, other.A.grad)


@pytest.mark.parametrize("rows", [None, (0, 3), (2, 5), (100, 200)])
@pytest.mark.parametrize("edit", [None, *EDITS])
def test_an_edited_forward_differs_from_delta_weight(edit, rows, monkeypatch):
    linear = nn.Linear(6, 200)
    injection.inject(nn.Sequential(linear), [Site("0", 2, 3.0, "q" if rows else "", rows)])
    (key,) = linear.lora
    assert adds_delta(linear, key)  # B is zero
    nn.init.normal_(linear.lora[key].B)
    if edit:
        monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    same = edit in (None, "no gradient of A", "noise in training")  # the noise is off in eval mode
    assert adds_delta(linear, key) is same


def test_commands_on_files_refuse_a_class_whose_formula_they_do_not_know(monkeypatch, make, tmp_path):
    """Before, `blend` and `convert` left out a parameter of the class, and `blend` reported the result as exact."""
    assert [other_formula(variant) for variant in CLASSES] == ["", "", ""]
    backbone = make("blip")
    for lora in injection.inject(backbone, "vit").values():
        nn.init.normal_(lora.B)
    adapter = adapter_file.read(adapter_file.save(tmp_path / "a.safetensors", backbone))
    for edit in ("forward", "parameter"):
        with monkeypatch.context() as edited:
            if edit == "forward":
                edited.setattr(LoRA, "forward", with_relu)
            else:
                edited.setitem(EXTRA, "lora", ("gate",))
            assert other_formula("lora").endswith("but the class LoRA here computes something else")
            with pytest.raises(AdapterError, match="cannot be blended: this computes lora by its formula, but the class LoRA"):
                blending.blend([adapter], [0.5], 0)
            with pytest.raises(HeaderError, match="it cannot be written for peft: this computes lora by its formula"):
                peft_writer.updates_of(adapter.sites, adapter.tensors)


def test_a_file_of_peft_lacks_a_parameter_of_the_class_here(monkeypatch, make, tmp_path):
    backbone = make("blip")
    for lora in injection.inject(backbone, "vit").values():
        nn.init.normal_(lora.B)
    adapter = adapter_file.read(adapter_file.save(tmp_path / "a.safetensors", backbone))
    (folder := tmp_path / "peft").mkdir()
    path = write_peft(folder, adapter)
    assert adapter_file.read(path).sites
    monkeypatch.setitem(EXTRA, "lora", ("gate",))
    with pytest.raises(AdapterError, match="it lacks gate, which the class of lora here has"):
        adapter_file.read(path)


UNMERGEABLE: dict[str, tuple[type[LoRA], str, Any]] = {
    "a ReLU between A and B": (LoRA, "forward", with_relu),
    "a forward with twice the update": (LoRA, "forward", lambda lora, x, of=LoRA.forward: 2 * of(lora, x)),
    "a ΔW of twice the size": (LoRA, "delta_weight", lambda lora, rows=None, of=LoRA.delta_weight: 2 * of(lora, rows)),
    "a DoRA with twice the update": (DoRA, "update", lambda lora, *args, of=DoRA.update: 2 * of(lora, *args)),
    "a DoRA with a ReLU": (LoRA, "forward", with_relu),
}


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", UNMERGEABLE)
def test_an_edit_of_the_forward_alone_is_not_merged(edit, dtype, write, monkeypatch):
    """Before, the merge wrote ΔW, and the predictions were those of an update that was not trained."""
    kind, method, changed = UNMERGEABLE[edit]
    monkeypatch.setattr(kind, method, changed)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6)).to(dtype)
    sites = [Site("0", 2, 3.0, "q", (2, 5)), Site("1", 2, 3.0)]
    sites = [replace(site, variant="dora") for site in sites] if "DoRA" in edit else sites
    loras = injection.inject(model, sites)
    loras["1"].B.data.normal_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        LoRAError, match=rf"of {'DoRA' if 'DoRA' in edit else 'LoRA'} differ.* adds something other than ΔW x, so a merge"
    ):
        write(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("rows", [None, (0, 3), (2, 5), (100, 200)])
def test_the_check_of_an_update_uses_no_dropout_and_leaves_the_mode_and_the_random_state(variant, rows):
    model = nn.Sequential(nn.Linear(6, 200, bias=False)).train()
    (lora,) = injection.inject(model, [Site("0", 2, 3.0, "q" if rows else "", rows, variant)], dropout=0.5).values()
    lora.B.data.normal_()
    state = torch.get_rng_state()
    merging.merge(model)
    assert lora.training and lora.dropout == 0.5 and torch.equal(torch.get_rng_state(), state)
