"""The laws of LoRA for its variants: no-op start, merged is hooked, exact restore, the adapter file, several adapters, rows."""

import ast
import json
import pickle
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

import lora_blip
from lora_blip.config import TrainConfig
from lora_blip.data.loader import Slot
from lora_blip.errors import AdapterError, ConfigError, LoRAError
from lora_blip.inference.setup import work_of
from lora_blip.inspection.description import describe
from lora_blip.lora import adapter_file, attached, header, injection, merging, sites, targets
from lora_blip.lora.layer import AdapterStack, LoRA, lora_hook
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.lora.sites import Site, modules_of
from lora_blip.lora.variants import CLASSES, EXTRA, DoRA
from lora_blip.runtime.setting_checks import VARIANTS
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.learner import Learner, adapter_groups
from lora_blip.training.loop import accumulate_gradients, train, update_parameters
from tests.lora.test_adapter_file import rewrite
from tests.support.kill import killed_at
from tests.support.models import batch_of, inject, logits_of
from tests.support.runs import assert_same, config_of, elsewhere

OTHERS = [variant for variant in VARIANTS if variant != "lora"]
variants = pytest.mark.parametrize("variant", OTHERS)


def test_each_variant_of_the_settings_has_a_class():
    assert tuple(CLASSES) == VARIANTS


def test_rslora_divides_alpha_by_the_square_root_of_r():
    """ΔW = (alpha / √r) · B A, so with r = 16 it is 4 times that of LoRA. The fused update computes the same."""
    for r, factor in ((1, 1.0), (16, 4.0)):
        linear, x = torch.nn.Linear(20, 10), torch.randn(3, 20)
        outputs = []
        for variant in ("lora", "rslora"):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(20, 10))
            model.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()})
            (lora,) = injection.inject(model, "0", r=r, alpha=8.0, variant=variant).values()
            torch.nn.init.normal_(lora.B)
            assert torch.equal(lora.delta_weight(), lora.B @ lora.A * (8.0 / (r if variant == "lora" else r**0.5)))
            outputs.append(model(x) - linear(x))
        assert torch.allclose(outputs[1], factor * outputs[0], rtol=1e-4, atol=1e-5) and outputs[0].any()


@variants
def test_a_new_adapter_changes_no_bit_of_the_logits(make, variant):
    backbone = make("blip")
    expected = logits_of(backbone)
    inject(backbone, variant=variant, trained=False)
    assert torch.equal(logits_of(backbone), expected)


@variants
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_new_adapter_changes_no_bit_of_a_base_in_16_bits(make, variant, dtype):
    backbone = make("blip", dtype=dtype)
    expected = logits_of(backbone)
    inject(backbone, variant=variant, trained=False)
    assert torch.equal(logits_of(backbone), expected)


@variants
def test_merged_logits_are_those_of_the_hooks_and_restore_is_exact(backbone, variant):
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    base = logits_of(backbone)
    inject(backbone, variant=variant)
    hooked = logits_of(backbone)
    merging.merge(backbone.model)
    merged = logits_of(backbone)
    assert torch.allclose(merged, hooked, rtol=1e-4, atol=1e-4) and not torch.allclose(merged, base, rtol=1e-2, atol=1e-2)
    merging.restore(backbone.model)
    assert torch.equal(logits_of(backbone), hooked)
    injection.eject(backbone.model)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())


@variants
def test_a_file_has_the_variant_and_loads_bit_for_bit(make, tmp_path, variant):
    """The header has the variant and format 2: an older lora_blip would compute something else from the same tensors."""
    backbone = make("blip")
    inject(backbone, "vit.q,text[1:]:r=2", variant=variant)
    expected = logits_of(backbone)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    adapter = adapter_file.read(path)
    assert adapter.metadata["format_version"] == 2 and adapter.metadata["lora"]["variant"] == adapter.variant == variant
    assert {site.variant for site in adapter.sites} == {variant}
    other = make("blip")
    adapter_file.load(other, path)
    assert torch.equal(logits_of(other), expected)


@variants
def test_an_older_reader_refuses_the_file(make, tmp_path, monkeypatch, variant):
    backbone = make("blip")
    inject(backbone, "vit", variant=variant)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    monkeypatch.setattr(header, "FORMAT_VERSION", 1)
    with pytest.raises(AdapterError, match="format 2, and this lora_blip reads formats up to 1; upgrade it"):
        adapter_file.read(path)


def test_a_file_of_plain_lora_has_no_variant_and_format_1(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit")
    with safetensors.safe_open(adapter_file.save(tmp_path / "a.safetensors", backbone), "pt") as file:
        metadata = json.loads(file.metadata()["lora_blip"])
    assert metadata["format_version"] == 1 and list(metadata["lora"]) == ["dropout", "modules"]


def test_a_wrong_variant_in_a_header_is_refused(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit", variant="rslora")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    lora, whole = adapter_file.read(path).metadata["lora"], path.read_bytes()
    for value in ("vera", 3, None, ["lora"], "RSLORA"):
        path.write_bytes(whole)
        with pytest.raises(AdapterError, match=r"lora\.variant is .*, expected one of lora, rslora"):
            adapter_file.read(rewrite(path, header={"lora": lora | {"variant": value}}))
    path.write_bytes(whole)
    with pytest.raises(AdapterError, match="has format 1, in which an adapter has no variant"):
        adapter_file.read(rewrite(path, header={"format_version": 1}))


def test_an_adapter_has_one_known_variant(make):
    backbone = make("blip")
    first, second = targets.find(backbone.model, "vit", variant="rslora")[:1], targets.find(backbone.model, "text")[:1]
    with pytest.raises(LoRAError, match="one variant, and the sites have rslora and lora"):
        injection.inject(backbone.model, [*first, *second])
    with pytest.raises(LoRAError, match="variant='vera': expected one of lora, rslora"):
        injection.inject(backbone.model, "vit", variant="vera")
    injection.inject(backbone.model, first)
    with pytest.raises(LoRAError, match="with another r, alpha or variant"):
        injection.inject(backbone.model, [Site(first[0].module, first[0].r, first[0].alpha)])
    assert len(attached.adapters(backbone.model)) == 1


def test_a_wrong_variant_in_the_settings_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"variant = 'rs-lora': expected one of lora, rslora.*did you mean 'rslora'"):
        TrainConfig(variant="rs-lora")
    with pytest.raises(ConfigError, match=r"variant = 'LoRA\+': LoRA\+ is the setting LR_RATIO; .*--lr-ratio 16"):
        TrainConfig(variant="LoRA+")


# ---------------------------------------------------------------- DoRA


def dora_on(linear: nn.Linear, *sites: Site) -> tuple[nn.Sequential, list[DoRA]]:
    """Return a model of one linear with trained DoRA adapters in float64."""
    model = nn.Sequential(linear)
    loras = list(injection.inject(model, sites or "0", r=3, alpha=6.0, variant="dora").values())
    for lora in loras:
        nn.init.normal_(lora.B, std=0.5)
        lora.magnitude.data *= torch.rand(len(lora.magnitude)) + 0.5
    return model.double(), loras


def dense(linear: nn.Linear, loras: list[DoRA], x: torch.Tensor) -> torch.Tensor:
    """Return W' x + b with W' = W + Σ (m / ‖W + ΔW‖ ⊙ (W + ΔW) − W), computed on whole matrices. The norm has no gradient."""
    W = linear.weight
    total = W
    for lora in loras:
        changed = W + lora.delta_weight()
        g = torch.ones(len(W), dtype=W.dtype)
        start, stop = lora.site.rows or (0, len(W))
        g[start:stop] = lora.magnitude / changed[start:stop].norm(dim=1).detach()
        total = total + g[:, None] * changed - W
    return nn.functional.linear(x, total, linear.bias)


Q, V = (Site("0", 3, 6.0, name, rows, "dora") for name, rows in (("q", (0, 4)), ("v", (8, 12))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sites", [(), (Q,), (Q, V)])
def test_dora_equals_the_formula_on_whole_matrices(bias, sites):
    """Outputs, the gradients of x, A, B and m, and merged outputs are equal in float64, for whole linears and row blocks."""
    linear = nn.Linear(7, 12, bias=bias)
    model, loras = dora_on(linear, *sites)
    x, weights = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 12, dtype=torch.float64)
    parameters = [x, *(p for lora in loras for p in lora.parameters())]
    output, expected = model(x), dense(linear, loras, x)
    gradients, right = (torch.autograd.grad((y * weights).sum(), parameters) for y in (output, expected))
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12) and len(parameters) == 1 + 3 * len(loras)
    for one, other in zip(gradients, right, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11) and other.any()
    merging.merge(model)
    assert torch.allclose(model(x), expected, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_stays_finite():
    """m of such a row is 0, so the row stays 0 until m moves. peft divides 0 by 0 there."""
    linear = nn.Linear(7, 12)
    linear.weight.data[3] = 0
    model = nn.Sequential(linear)
    x, before = torch.randn(4, 7), linear(torch.ones(4, 7))
    (lora,) = injection.inject(model, "0", variant="dora").values()
    assert torch.equal(model(torch.ones(4, 7)), before)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in lora.parameters())
    nn.init.normal_(lora.B)
    merging.merge(model)
    assert not linear.weight[3].any() and linear.weight.isfinite().all()


@pytest.mark.parametrize("first", ["lora", "rslora", "dora"])
def test_adapters_of_several_variants_on_one_linear_add_up(first):
    """y is W x + b plus the change of each adapter alone, in any order, also if one of them is merged."""
    linear, x = nn.Linear(7, 12), torch.randn(5, 7, dtype=torch.float64)
    results = []
    for order in (("a", "b"), ("b", "a")):
        model = nn.Sequential(deepcopy(linear))
        for name in order:
            torch.manual_seed(ord(name))
            (lora,) = injection.inject(model, "0", name=name, variant={"a": first, "b": "dora"}[name]).values()
            nn.init.normal_(lora.B)
        model.double()
        both = model(x)
        changes = []
        for other in ("b", "a"):
            with disable_adapters(model, other):
                changes.append(model(x) - nn.functional.linear(x, model[0].weight, model[0].bias))
        assert torch.allclose(both, linear.double()(x) + sum(changes)) and all(change.abs().max() > 0.1 for change in changes)
        results.append(both)
        for names in (["a"], ["b"], ["a", "b"]):
            merging.merge(model, *names)
            assert torch.allclose(model(x), both), names
            merging.restore(model)
            assert torch.equal(model(x), both)
    assert torch.allclose(*results)


@variants
def test_each_row_of_a_mixed_batch_has_its_adapter(make, variant):
    """Rows with the variant, with plain LoRA, and with none equal those of batches in which all rows have that adapter."""
    backbone = make("blip")
    inject(backbone, "vit,text", name="one", variant=variant)
    inject(backbone, "vit", name="two")
    task = CaptionTask(backbone)
    batch, each = batch_of(task), ["one", None, "two"]
    with torch.no_grad():
        with use_adapters(backbone.model, each):
            mixed = task.logits(batch)
        separate = []
        for name in each:
            with disable_adapters(backbone.model, *({"one", "two"} - {name})):
                separate.append(task.logits(batch))
    for row, logits in enumerate(separate):
        assert torch.allclose(mixed[row], logits[row], rtol=1e-4, atol=1e-5)
        others = [other[row] for number, other in enumerate(separate) if number != row]
        assert not any(torch.allclose(logits[row], other, rtol=1e-3, atol=1e-3) for other in others)


@variants
def test_a_copy_and_a_second_model_keep_the_variant(make, variant):
    backbone = make("blip")
    inject(backbone, variant=variant)
    expected = logits_of(backbone)
    backbone.model = deepcopy(backbone.model)
    assert torch.equal(logits_of(backbone), expected)
    backbone.model = pickle.loads(pickle.dumps(backbone.model))
    assert torch.equal(logits_of(backbone), expected)


def test_dora_is_refused_on_a_linear_that_is_not_plain():
    """DoRA needs the rows of W. Without `inject`, it raises an error, because the plain hook would ignore m."""

    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4))
    with pytest.raises(LoRAError, match=r"'1' is a Scaled with a Parameter, and DoRA needs an nn\.Linear"):
        injection.inject(model, "0,1", variant="dora")
    assert not attached.names(model)
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LoRAError, match=r"DoRA needs an nn\.Linear with a weight of 16 or 32 bits"):
        injection.inject(nn.Sequential(linear), "0", variant="dora")
    linear = nn.Linear(4, 4)
    linear.lora = AdapterStack()
    linear.lora["default"] = DoRA(Site("0", variant="dora"), 4, 4)
    linear.register_forward_hook(lora_hook, with_kwargs=True)
    with pytest.raises(LoRAError, match=r"needs the weight of its linear; put the adapter on it by lora_blip\.inject"):
        linear(torch.ones(1, 4))


def test_the_magnitude_in_a_file_must_fit(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit.q", variant="dora")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    whole, key = path.read_bytes(), next(key for key in adapter_file.read(path).tensors if key.endswith(".magnitude"))
    assert adapter_file.read(path).tensors[key].shape == (32,)
    for value, reason in (
        (torch.ones(31), r"is \(31,\) F32, but lora_B has 32 rows"),
        (torch.ones(32, 1), r"is \(32, 1\) F32, but lora_B has 32 rows"),
        (torch.ones(32, dtype=torch.float16), "F16, but lora_B has 32 rows"),
        (None, r"magnitude' is missing \(1 of"),
        (torch.full((32,), torch.inf), "contains NaN or infinity"),
    ):
        path.write_bytes(whole)
        with pytest.raises(AdapterError, match=reason):
            adapter_file.read(rewrite(path, {key: value}, {"sha256": ""}))


# ---------------------------------------------------------------- training


@variants
def test_a_run_that_is_killed_equals_an_uninterrupted_run(checkpoints, tmp_path, variant):
    """A resumed run of a variant with LoRA+ is exact: the magnitudes and their moments are in the checkpoint."""
    config = config_of(checkpoints, tmp_path, variant=variant, lr_ratio=4.0)
    uninterrupted = train(config)
    again = elsewhere(config)
    for death in (2, 7):
        with killed_at(death):
            train(again)
    path = train(again)
    assert_same(uninterrupted, path)
    adapter = adapter_file.read(path)
    assert adapter.variant == variant and adapter.metadata["training"]["settings"]["lr_ratio"] == 4.0


def test_an_initial_adapter_keeps_its_variant(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path, variant="dora", max_steps=2, val_fraction=0)
    path = train(config)
    start = adapter_file.read(path)
    with pytest.raises(AdapterError, match=r"has the variant 'dora', and this training has VARIANT = 'lora'; .*--variant dora"):
        train(replace(config, init_adapter=str(path), variant="lora"))
    further = adapter_file.read(train(replace(config, init_adapter=str(path), lr=1e-30)))
    magnitudes = {key for key in start.tensors if key.endswith(".magnitude")}
    assert magnitudes and all(torch.equal(further.tensors[key], start.tensors[key]) for key in magnitudes)


def test_the_settings_of_plain_lora_are_not_stored(checkpoints, tmp_path):
    """So the bytes of an adapter of plain LoRA are those of the versions without these settings."""
    settings = adapter_file.read(train(config_of(checkpoints, tmp_path, max_steps=1, val_fraction=0))).metadata["training"]
    assert not {"variant", "lr_ratio"} & settings["settings"].keys() and settings["settings"]["r"] == 2


def test_lora_plus_gives_b_a_multiple_of_the_learning_rate(make):
    """The first step of AdamW moves an element by about its learning rate. A magnitude moves as A does, and does not decay."""
    backbone = make("blip")
    inject(backbone, "vit", variant="dora")
    learner = Learner(CaptionTask(backbone), weight_decay=0.5, lr_ratio=8.0)
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    assert [(g["lr_factor"], g["weight_decay"]) for g in learner.optimizer.param_groups] == [(1, 0.5), (8, 0.5), (1, 0)]
    batch = batch_of(learner.task)
    learner.begin_step([batch], [Slot(0)])
    accumulate_gradients(learner, batch, Slot(0), is_last=True)
    update_parameters(learner, 1e-4)
    for part, rate, decay in (("lora_A", 1e-4, 0.5), ("lora_B", 8e-4, 0.5), ("magnitude", 1e-4, 0.0)):
        moves = [(p - before[name] * (1 - rate * decay)).abs() for name, p in learner.parameters.items() if name.endswith(part)]
        assert torch.cat([move.flatten() for move in moves]).median().item() == pytest.approx(rate, rel=0.02), part


def test_inference_and_inspect_name_the_ratio_of_lora_plus(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit.q", variant="dora")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    training = {"steps": 3, "settings": {"lr_ratio": 16.0}}
    adapter = adapter_file.read(rewrite(path, header={"training": training}))
    assert work_of(adapter) == "3 steps, dora, LR_RATIO = 16"
    assert describe(adapter)["training"] == "3 steps, LR_RATIO = 16"


class Diagonal(LoRA):
    """ΔW = (alpha / r) · B diag(d) A."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.d = nn.Parameter(torch.ones(len(self.A), device=self.A.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.A) * self.d, self.B) * self.scale

    def delta_weight(self, rows: slice | None = None) -> torch.Tensor:
        delta = (self.B * self.d) @ self.A * self.scale
        return delta if rows is None else delta[rows]


def test_a_variant_with_a_parameter_of_its_own_needs_two_entries(make, monkeypatch, tmp_path):
    """As CONTRIBUTING.md says: a class and the name of its parameter. Before, three more files had the names of DoRA's."""
    for module in (sites, header):
        monkeypatch.setattr(module, "VARIANTS", (*VARIANTS, "diagonal"))
    monkeypatch.setitem(CLASSES, "diagonal", Diagonal)
    monkeypatch.setitem(EXTRA, "diagonal", ("d",))
    backbone = make("blip")
    loras = injection.inject(backbone, "vit,text", r=2, variant="diagonal")
    for lora in loras.values():
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.3)
    groups = adapter_groups({f"{address}.d": lora.d for address, lora in loras.items()}, 0.1, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(loras)
    expected, path = logits_of(backbone), tmp_path / "a.safetensors"
    adapter_file.save(path, backbone)
    injection.eject(backbone)
    assert not torch.equal(logits_of(backbone), expected)
    adapter_file.load(backbone, path)
    assert torch.equal(logits_of(backbone), expected)
    merging.merge(backbone)
    assert torch.allclose(logits_of(backbone), expected, rtol=1e-4, atol=1e-4)


def test_an_own_class_of_adapter_is_not_saved_as_another_one(make, tmp_path):
    """Before, the file left out the parameter d, and the loaded adapter computed something else without a message."""
    backbone = make("blip")
    for lora in injection.inject(backbone, "vit").values():
        lora.__class__ = Diagonal
        lora.d = nn.Parameter(torch.ones(len(lora.A)))
        nn.init.normal_(lora.B)
    with pytest.raises(
        AdapterError, match=r"is of the class Diagonal, and a file has only lora, rslora, dora; add the class to"
    ):
        adapter_file.save(tmp_path / "a.safetensors", backbone)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_parameter_that_is_added_to_lora_itself_is_saved_or_refused_before_the_training(
    variant, as_buffer, make, monkeypatch, tmp_path
):
    """Before, the file left it out without a message, and the adapter could not be loaded, or computed something else."""
    start = LoRA.__init__

    def edited(self: LoRA, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        gate = torch.full((1,), 0.5, device=self.A.device)
        self.register_buffer("gate", gate) if as_buffer else setattr(self, "gate", nn.Parameter(gate))

    monkeypatch.setattr(LoRA, "__init__", edited)
    monkeypatch.setattr(LoRA, "forward", lambda self, x, of=LoRA.forward: self.gate * of(self, x))
    monkeypatch.setattr(LoRA, "delta_weight", lambda self, rows=None, of=LoRA.delta_weight: self.gate * of(self, rows))
    backbone = make("blip")
    attached.fast(backbone.model, False)
    modules = [*backbone.model.named_modules()]
    with pytest.raises(LoRAError, match=r"(LoRA|DoRA) has gate, which an adapter file would not contain") as caught:
        injection.inject(backbone, "vit", variant=variant)
    assert [*backbone.model.named_modules()] == modules
    assert all(not linear._forward_hooks for linear in modules_of(backbone.model).values())
    if as_buffer:
        assert "keep the values in an nn.Parameter of" in str(caught.value)
        return
    extra = ast.literal_eval(str(caught.value).split("EXTRA = ")[1])
    assert extra[variant][-1] == "gate" and extra["dora"][0] == "magnitude"
    monkeypatch.setitem(EXTRA, variant, extra[variant])
    for lora in injection.inject(backbone, "vit", variant=variant).values():
        nn.init.normal_(lora.B)
        lora.gate.data.fill_(3.0)
    expected = logits_of(backbone)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    injection.eject(backbone)
    adapter_file.load(backbone, path)
    assert torch.equal(logits_of(backbone), expected)


def test_a_parameter_that_is_added_after_inject_is_refused(make, tmp_path):
    backbone = make("blip")
    for lora in injection.inject(backbone, "vit").values():
        lora.gate = nn.Parameter(torch.ones(1))
        nn.init.normal_(lora.B)
    with pytest.raises(LoRAError, match="LoRA has gate, which an adapter file would not contain"):
        adapter_file.save(tmp_path / "a.safetensors", backbone)


def test_an_edit_of_the_scale_in_lora_itself_is_saved(make, monkeypatch, tmp_path):
    """Before, the training ended with an error that the adapter was loaded with another scale. A scale set later is refused."""
    start = LoRA.__init__

    def edited(self: LoRA, site: Site, *args: Any, **options: Any) -> None:
        start(self, site, *args, **options)
        self.scale = site.alpha / site.r**0.5

    monkeypatch.setattr(LoRA, "__init__", edited)
    backbone = make("blip")
    loras = injection.inject(backbone, "vit")
    for lora in loras.values():
        nn.init.normal_(lora.B, std=0.01)
    expected = logits_of(backbone)
    adapter_file.save(tmp_path / "a.safetensors", backbone)
    injection.eject(backbone)
    adapter_file.load(backbone, tmp_path / "a.safetensors")
    assert torch.equal(logits_of(backbone), expected)
    next(iter(attached.adapters(attached.model_of(backbone)).values())).scale *= 0.5
    with pytest.raises(AdapterError, match="another scale"):
        adapter_file.save(tmp_path / "b.safetensors", backbone)


@pytest.mark.parametrize("call", ["merge", "restore", "bake", "eject", "disable_adapters", "use_adapters", "inject"])
def test_the_three_lines_of_the_docstring_of_layer_make_an_adapter_for_every_function(make, call):
    """Before, all of these ended in an AttributeError: only `inject` gave the stack a routing."""
    backbone = make("blip")
    linear = backbone.model.get_submodule("vision_model.encoder.layers.0.mlp.fc1")
    linear.lora = AdapterStack()
    linear.lora["default"] = LoRA(Site("fc1", r=8, alpha=32.0), linear.in_features, linear.out_features)
    linear.register_forward_hook(lora_hook, with_kwargs=True)
    nn.init.normal_(linear.lora["default"].B, std=0.01)
    hooked = logits_of(backbone)
    result = getattr(lora_blip, call)(
        backbone,
        *{"use_adapters": ["default"], "inject": ["text"]}.get(call, []),
        **({"name": "second"} if call == "inject" else {}),
    )
    if call in ("disable_adapters", "use_adapters"):
        with result:
            inside = logits_of(backbone)
        assert torch.equal(inside, hooked) == (call == "use_adapters")
    elif call == "eject":
        assert not torch.equal(logits_of(backbone), hooked)
    else:
        assert torch.allclose(logits_of(backbone), hooked, rtol=1e-4, atol=1e-4)
