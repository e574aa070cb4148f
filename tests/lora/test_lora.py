"""Injection, hooks, merging and ejection: outputs equal the formula of LoRA, and each operation can be undone."""

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.initialization import no_init_weights

from lora_blip.errors import LoRAError
from lora_blip.lora import attached, injection, merging, targets
from lora_blip.lora.fused import fused_hook, fused_pre_hook
from lora_blip.lora.layer import AdapterStack, LoRA, lora_hook
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.lora.sites import Site, tied
from lora_blip.models.library import Quiet
from tests.support.models import inject, logits_of


def test_a_fresh_adapter_changes_no_bit(backbone):
    """Law 1: a fresh adapter has B = 0, so the logits equal those of the base bit for bit. A is Kaiming-uniform."""
    before = logits_of(backbone)
    adapters = inject(backbone, trained=False)
    assert torch.equal(logits_of(backbone), before)
    for x in adapters.values():
        bound = 1 / x.A.shape[1] ** 0.5  # Kaiming-uniform with a = sqrt(5)
        assert x.A.abs().max() <= bound and x.A.std() > 0.4 * bound and not x.B.any()


def test_an_adapter_whose_a_was_not_drawn_is_refused(backbone):
    """transformers turns torch.nn.init off in the process while another thread loads a model. A would be random memory."""
    before = logits_of(backbone)
    with no_init_weights(), pytest.raises(LoRAError, match=r"A of '.* has no random values, .*; call inject after that$"):
        inject(backbone, trained=False)
    assert not attached.adapters(backbone.model) and torch.equal(logits_of(backbone), before)
    assert inject(backbone, trained=False)


def test_another_start_of_a_in_an_edited_class_is_accepted(backbone, monkeypatch):
    """Before, an A that is drawn from a Gaussian was an error about another thread."""
    start = LoRA.__init__

    def gaussian(self: LoRA, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        torch.nn.init.normal_(self.A, std=self.A.shape[1] ** -0.5)

    monkeypatch.setattr(LoRA, "__init__", gaussian)
    assert inject(backbone, trained=False)


def test_inject_waits_for_a_base_that_another_thread_loads(make):
    """Otherwise torch.nn.init would be off."""
    backbone, loading, injected = make("blip"), threading.Event(), threading.Event()

    def load() -> None:
        with Quiet("."), no_init_weights():
            loading.set()
            assert not injected.wait(0.2)

    thread = threading.Thread(target=load)
    thread.start()
    assert loading.wait(10) and inject(backbone, trained=False)
    injected.set()
    thread.join()


def test_the_hook_adds_the_update_of_the_equation():
    """The output equals W x + b + (alpha / r) B A x, computed in float64, for an adapter on a block of rows."""
    linear = nn.Linear(6, 9).double()
    model = nn.Sequential(linear)
    adapter = injection.inject(model, [Site("0", r=2, alpha=3.0, block="k", rows=(3, 6))])["0.k"]
    adapter.B.data.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    delta = torch.zeros(9, 6, dtype=torch.float64)
    delta[3:6] = (3.0 / 2) * adapter.B.double() @ adapter.A.double()
    expected = x @ (linear.weight + delta).T + linear.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(adapter.delta_weight().double(), delta, rtol=1e-6, atol=1e-6)


def test_an_adapter_on_a_block_of_a_fused_qkv_changes_only_its_rows(make):
    backbone = make("blip")
    adapters = inject(backbone, "vit.q,vit.v")
    width = backbone.model.config.vision_config.hidden_size
    for address, x in adapters.items():
        delta = x.delta_weight().view(3, width, width)
        block = "qkv".index(address[-1])
        assert delta[block].any() and not delta[[i for i in range(3) if i != block]].any()


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.15), ("fp16", 0.02)])
def test_merged_logits_equal_hooked_logits(make, dtype, bound):
    """Law 5: merged and hooked logits differ by at most `bound` of the largest logit, and by less than half of the update."""
    for kind in ("blip", "opt") + (("t5",) if dtype != "fp16" else ()):
        backbone = make(kind, dtype=dtype)
        with torch.autocast("cpu", getattr(torch, {"fp16": "float16"}.get(dtype, "bfloat16")), enabled=dtype != "fp32"):
            base = logits_of(backbone).float()
            inject(backbone)
            hooked = logits_of(backbone).float()
            merging.merge(backbone.model)
            merged = logits_of(backbone).float()
        assert (merged - hooked).abs().max() <= bound * hooked.abs().max()
        assert (hooked - base).abs().max() > 2 * (merged - hooked).abs().max()


def test_merge_and_restore_are_idempotent_and_restore_is_exact(backbone):
    """A second `merge` or `restore` changes nothing. After `restore`, all weights equal those before the merge bit for bit."""
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    inject(backbone)
    merging.merge(backbone.model)
    once = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    merging.merge(backbone.model)
    assert all(torch.equal(value, once[key]) for key, value in backbone.model.state_dict().items())
    assert any(not torch.equal(once[key], before[key]) for key in before)
    merging.restore(backbone.model)
    merging.restore(backbone.model)
    assert all(torch.equal(backbone.model.state_dict()[key], before[key]) for key in before)


def test_half_precision_weights_survive_merge_and_restore_to_the_bit(make):
    """`restore` is exact in fp16, because it copies the original. Subtracting ΔW would change a fifth of the weights."""
    backbone = make("blip", dtype="fp16")
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    inject(backbone)
    for _ in range(3):
        merging.merge(backbone.model)
        merging.restore(backbone.model)
    assert all(torch.equal(backbone.model.state_dict()[key], before[key]) for key in before)


def test_eject_restores_the_base_exactly(backbone):
    """After `merge` and `eject`, the keys and logits are those of the base, and no hook is left."""
    before, keys = logits_of(backbone), list(backbone.model.state_dict())
    inject(backbone)
    assert set(keys) <= set(backbone.model.state_dict())  # injection does not rename keys of the base
    merging.merge(backbone.model)
    injection.eject(backbone.model)
    injection.eject(backbone.model)
    assert list(backbone.model.state_dict()) == keys and torch.equal(logits_of(backbone), before)
    assert not any(hook in attached.OURS for m in backbone.model.modules() for hook in m._forward_hooks.values())


def test_bake_leaves_a_plain_model_with_the_merged_weights(make):
    """After `bake`, the keys are those of the base and the logits are those of the merged model."""
    backbone = make("blip")
    keys = list(backbone.model.state_dict())
    inject(backbone)
    merging.merge(backbone.model)
    merged = logits_of(backbone)
    merging.bake(backbone.model)
    assert list(backbone.model.state_dict()) == keys and torch.equal(logits_of(backbone), merged)


def test_inject_is_idempotent(make):
    """A second `inject` on the same modules keeps A and B. One on other modules raises ValueError."""
    backbone = make("blip")
    inject(backbone)
    once = logits_of(backbone)
    inject(backbone, trained=False)
    assert torch.equal(logits_of(backbone), once)
    with pytest.raises(ValueError, match="on other modules, or with another r, alpha or variant"):
        inject(backbone, "vit")


def test_updates_of_two_adapters_add_and_one_can_be_ejected():
    """The output is that of W + ΔW₁ + ΔW₂. Ejecting one of two merged adapters leaves exactly W + ΔW of the other."""
    model = nn.Sequential(nn.Linear(5, 4))
    weight = model[0].weight.detach().clone()
    for name in ("one", "two"):
        injection.inject(model, [Site("0", r=2)], name=name)["0"].B.data.normal_()
    alone = copy.deepcopy(model)
    deltas = {name: attached.adapters(model, name)["0"].delta_weight() for name in attached.names(model)}
    x = torch.randn(3, 5)
    both = x @ (weight + deltas["one"] + deltas["two"]).T + model[0].bias
    torch.testing.assert_close(model(x), both)
    merging.merge(model, "one")
    torch.testing.assert_close(model(x), both)  # "one" is in the weights, "two" is on the hook
    merging.merge(model)
    torch.testing.assert_close(model(x), both)
    injection.eject(model, "one")
    merging.merge(alone, "two")
    assert attached.names(model) == ["two"] and torch.equal(model[0].weight, alone[0].weight)
    torch.testing.assert_close(model[0].weight, weight + deltas["two"])
    injection.eject(model, "two")
    assert torch.equal(model[0].weight, weight)


def test_disabled_adapters_give_the_base_and_are_active_again_after_an_error(make):
    """`disable_adapters` gives the logits of the base, ends with an exception too, and is refused on a merged model."""
    backbone = make("blip")
    before = logits_of(backbone)
    inject(backbone)
    after = logits_of(backbone)
    with disable_adapters(backbone.model):
        assert torch.equal(logits_of(backbone), before)
    with pytest.raises(KeyError), disable_adapters(backbone.model):
        raise KeyError
    assert torch.equal(logits_of(backbone), after)
    merging.merge(backbone.model)
    with pytest.raises(ValueError, match="restore"), disable_adapters(backbone.model):
        pass


def test_a_copied_model_has_separate_adapters(make):
    """A deepcopy or pickle of a model has its own adapters: changing them does not change the original."""
    backbone = make("blip")
    inject(backbone)
    before = logits_of(backbone)
    stored = io.BytesIO()
    pickle.dump(backbone.model, stored)
    for twin in (copy.deepcopy(backbone.model), pickle.loads(stored.getvalue())):
        for x in attached.adapters(twin).values():
            x.B.data.zero_()
        original, backbone.model = backbone.model, twin
        changed = logits_of(backbone)
        injection.eject(twin)
        ejected = logits_of(backbone)
        backbone.model = original
        assert not torch.equal(changed, before) and torch.equal(changed, ejected)
    assert torch.equal(logits_of(backbone), before)


def test_adapters_are_fp32_on_an_fp16_base(make):
    backbone = make("opt", dtype="fp16")
    assert {half.dtype for x in inject(backbone).values() for half in (x.A, x.B)} == {torch.float32}


def test_only_adapters_are_trainable(backbone):
    inject(backbone)
    assert all(parameter.requires_grad == (".lora." in name) for name, parameter in backbone.model.named_parameters())


class Int8Linear(nn.Module):
    """A linear with an int8 weight and a scale, like that of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_a_quantized_base_runs_the_hook_and_cannot_be_merged():
    """The output is that of the base plus the update, and `merge` raises ValueError."""
    for quantised in (Int8Linear(nn.Linear(8, 4)), _dynamic_quantised()):
        model = nn.Sequential(quantised)
        x = torch.randn(3, 8)
        before = model(x)
        adapter = injection.inject(model, [Site("0", r=2)])["0"]
        adapter.B.data.normal_()
        torch.testing.assert_close(model(x), before + x @ adapter.delta_weight().T)
        with pytest.raises(ValueError, match="'0' is quantized"):
            merging.merge(model)


def _dynamic_quantised() -> nn.Module:
    import torch.ao.nn.quantized.dynamic as quantised

    linear = nn.Linear(8, 4)
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return quantised.Linear.from_float(linear)


def test_a_head_that_shares_its_weight_is_refused(backbone):
    head = "text_decoder.cls.predictions.decoder" if backbone.family == "blip" else "language_model.lm_head"
    if head not in tied(backbone.model):
        pytest.skip("the head of this T5 has a separate weight, as in Flan-T5")
    with pytest.raises(ValueError, match="shares its weight with"):
        injection.inject(backbone.model, targets.find(backbone.model, head))


@pytest.mark.parametrize("site", [Site("nowhere"), Site("1"), Site("0", rows=(2, 9)), Site("0", r=0)])
def test_an_invalid_site_is_refused_before_anything_changes(site):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match=f"'{site.module}"):
        injection.inject(model, [Site("0"), site] if site.module != "0" else [site])
    assert not attached.names(model) and not model[0]._forward_hooks


def test_unfired_lists_a_linear_that_is_never_called():
    """Law 3: a module that calls F.linear with the weight bypasses the hook of the linear. `unfired` returns its path."""

    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.called(x), self.bypassed.weight)

    model = Bypassing()
    injection.inject(model, [Site("called"), Site("bypassed")])
    assert attached.unfired(model, lambda: model(torch.randn(2, 4))) == ["bypassed"]


def test_activation_checkpointing_does_not_change_adapter_gradients(make):
    """With non-reentrant checkpointing, the gradient of every B equals that without checkpointing."""
    from lora_blip.tasks.caption import CaptionTask
    from tests.support.models import batch_of

    for kind in ("blip", "opt", "t5"):
        gradients = []
        for checkpointing in (False, True):
            backbone = make(kind, checkpointing=checkpointing)
            adapters = inject(backbone)
            backbone.model.train()
            task = CaptionTask(backbone)
            task.loss(batch_of(task)).backward()
            gradients.append({address: x.B.grad for address, x in adapters.items()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in backbone.model.modules())
        for address, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][address], plain, rtol=1e-4, atol=2e-6 * float(plain.abs().max()))
            assert plain.any(), address


def test_an_unknown_adapter_name_is_an_error(make):
    backbone = make("blip")
    inject(backbone, "vit")
    for act in (merging.merge, injection.eject):
        with pytest.raises(LoRAError, match="no adapter 'typo'; it has default"):
            act(backbone.model, "typo")
    with pytest.raises(LoRAError, match="no adapter 'typo'"), disable_adapters(backbone.model, "typo"):
        pass


@pytest.mark.parametrize("name", ["merged", "original", "training", "a.b", "", "keys"])
def test_an_invalid_adapter_name_is_refused_before_anything_changes(name):
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(LoRAError, match="adapter name"):
        injection.inject(model, [Site("0")], name=name)
    assert not model[0]._forward_hooks and not hasattr(model[0], "lora")


def test_a_second_merge_uses_the_current_values():
    """After B has changed, `merge` writes the new W + ΔW. `restore` gives the original weight, also in another dtype."""
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.detach().clone()
    adapter = injection.inject(model, [Site("0", r=2)])["0"]
    for _ in range(2):
        adapter.B.data.normal_()
        merging.merge(model)
        torch.testing.assert_close(model[0].weight, before + adapter.delta_weight())
    model.double()
    merging.merge(model)
    merging.restore(model)
    assert torch.equal(model[0].weight, before.double())


def two_adapters(fast: bool) -> nn.Sequential:
    """Return two linears: the first with adapters a and b, the second with a on a block of rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    attached.fast(model, fast)
    injection.inject(model, [Site("0", 2, 3.0), Site("2", 2, 3.0, "q", (1, 3))], name="a")
    injection.inject(model, [Site("0", 3, 5.0)], name="b")
    for name in ("a", "b"):
        for lora in attached.adapters(model, name).values():
            nn.init.normal_(lora.B)
    return model


@pytest.mark.parametrize("merged", [(), ("b",)])
@pytest.mark.parametrize("case", ["FAST = False", "without fused", "after a block"])
def test_every_hook_equals_lora_hook_if_every_adapter_acts_on_every_row(case, merged):
    """Outputs and gradients equal those of `lora_hook` bit for bit: with FAST off, without `fused`, after `use_adapters`."""
    model = two_adapters(fast=case == "without fused")
    attached.fast(model, False)
    if case == "after a block":
        with use_adapters(model, ["a"] * 5):
            model(torch.randn(5, 6))
    if merged:
        merging.merge(model, *merged)
    plain = copy.deepcopy(model)
    for linear in attached.adapted_linears(plain).values():
        attached.remove_hooks(linear)
        linear.register_forward_hook(lora_hook, with_kwargs=True)
        linear.lora.routing = None
    x = torch.randn(5, 6)
    outputs = [each(x) for each in (model, plain)]
    assert torch.equal(*outputs)
    halves = [list(unmerged_halves(each)) for each in (model, plain)]
    gradients = [torch.autograd.grad(y.square().sum(), some) for y, some in zip(outputs, halves, strict=True)]
    assert all(map(torch.equal, *gradients)) and all(g.any() for g in gradients[0])
    hidden = nn.functional.gelu(written_out(plain[0], x))
    torch.testing.assert_close(written_out(plain[2], hidden), outputs[1], rtol=1e-6, atol=1e-6)


def test_inject_registers_only_lora_hook_and_fast_adds_the_fused_hooks():
    """Without fast, `inject` does the three lines of layer.py. `attached.fast` puts the fused hooks before foreign hooks."""
    linear, model = nn.Linear(6, 8), two_adapters(fast=False)
    linear.load_state_dict({name: value for name, value in model[0].state_dict().items() if name in ("weight", "bias")})
    linear.lora = AdapterStack()
    for name in ("a", "b"):
        linear.lora[name] = copy.deepcopy(model[0].lora[name])
    linear.register_forward_hook(lora_hook, with_kwargs=True)
    x = torch.randn(5, 6)
    assert torch.equal(linear(x), model[0](x)) and torch.equal(linear(input=x), linear(x))
    assert [*model[0]._forward_hooks.values()] == [lora_hook] and not model[0]._forward_pre_hooks
    foreign = model[0].register_forward_hook(lambda _module, _args, output: output + 1)
    before = model[0](x)
    attached.fast(model)
    attached.fast(model)
    hooks = [*model[0]._forward_pre_hooks.values(), *model[0]._forward_hooks.values()]
    assert hooks[:2] == [fused_pre_hook, fused_hook] and len(hooks) == 3
    torch.testing.assert_close(model[0](x), before)
    foreign.remove()
    injection.eject(model)
    assert not any(hook in attached.OURS for hook in model[0]._forward_hooks.values()) and not model[0]._forward_pre_hooks


class Doubled(LoRA):
    """A variant of LoRA with twice the update."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)

    def delta_weight(self, rows: slice | None = None) -> torch.Tensor:
        return 2 * super().delta_weight(rows)


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_an_edit_of_the_formula_in_lora_itself_is_merged(write, monkeypatch):
    """Before, a merge of one float32 adapter computed (alpha / r) · B A itself, so that predictions ignored the edit."""
    monkeypatch.setattr(LoRA, "forward", lambda self, x, forward=LoRA.forward: 2 * forward(self, x))
    monkeypatch.setattr(LoRA, "delta_weight", lambda self, rows=None, of=LoRA.delta_weight: 2 * of(self, rows))
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6)), torch.randn(5, 6)
    attached.fast(model, False)
    for lora in injection.inject(model, [Site("0", 2, 3.0, "q", (2, 5)), Site("1", 2, 3.0)]).values():
        lora.B.data.normal_()
    hooked = model(x)
    write(model)
    torch.testing.assert_close(model(x), hooked)


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_a_subclass_of_lora_is_hooked_trained_merged_and_baked(write):
    """The hook calls `forward` of the subclass, also with `fused` on. `merge` and `bake` call its `delta_weight`."""
    model, x = two_adapters(fast=True), torch.randn(5, 6)
    plain = copy.deepcopy(model)
    for linear in attached.adapted_linears(model).values():
        for lora in linear.lora.values():
            lora.__class__ = Doubled
    for lora in (lora for _, lora in attached.every_adapter(plain)):
        lora.B.data *= 2
    hooked = model(x)
    torch.testing.assert_close(hooked, plain(x))
    hooked.sum().backward()
    plain(x).sum().backward()
    for (_, one), (_, two) in zip(attached.every_adapter(model), attached.every_adapter(plain), strict=True):
        torch.testing.assert_close(one.A.grad, two.A.grad)
        torch.testing.assert_close(one.B.grad, 2 * two.B.grad)
    write(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-5, atol=1e-5)


def unmerged_halves(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield A and B of every adapter that is not merged."""
    for linear in attached.adapted_linears(model).values():
        for key, lora in linear.lora.items():
            if key not in linear.lora.merged:
                yield from lora.parameters()


def written_out(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return y = (W + Σ ΔW) x + b, with the original W."""
    weight = linear.weight if linear.lora.original is None else linear.lora.original
    return nn.functional.linear(x, weight + sum(lora.delta_weight() for lora in linear.lora.values()), linear.bias)


def test_a_new_adapter_draws_its_numbers_on_the_cpu(monkeypatch):
    """On each device, the same seed gives the same A. So the numbers are drawn before the adapter moves to the device."""
    linear, devices = nn.Linear(4, 3), []
    real = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda x, **named: (devices.append(x.device.type), real(x, **named))[1])
    moved = []
    monkeypatch.setattr(LoRA, "to", lambda self, device: (moved.append(torch.device(device)), self)[1])
    on_a_gpu = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(linear, "parameters", lambda: iter([on_a_gpu]))
    attached.attach(linear, Site("", 2), 0.0, "default")
    assert [device for device in devices if device != "meta"] == ["cpu"] and moved == [torch.device("cuda:0")]
