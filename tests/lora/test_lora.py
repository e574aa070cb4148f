"""The heart: a fresh adapter does nothing, a merged one does what the hooked one did, and everything can be undone."""

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lora_blip.errors import LoRAError
from lora_blip.lora import attached, injection, merging, targets
from lora_blip.lora.fused import fused_hook, fused_pre_hook
from lora_blip.lora.layer import AdapterStack, LoRA, lora_hook
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.lora.sites import Site, tied
from tests.support.models import inject, logits_of


def test_a_fresh_adapter_changes_no_bit(backbone):
    """Law 1: B = 0, so every logit is bit-identical to the base's."""
    before = logits_of(backbone)
    found = inject(backbone, trained=False)
    assert torch.equal(logits_of(backbone), before)
    for x in found.values():
        bound = 1 / x.A.shape[1] ** 0.5  # Kaiming-uniform with a = sqrt(5)
        assert x.A.abs().max() <= bound and x.A.std() > 0.4 * bound and not x.B.any()


def test_the_hook_adds_what_the_equation_says():
    """y = W x + b + (alpha / r) B A x, against float64 matrices written out; also for a row block."""
    linear = nn.Linear(6, 9).double()
    model = nn.Sequential(linear)
    found = injection.inject(model, [Site("0", r=2, alpha=3.0, block="k", rows=(3, 6))])["0.k"]
    found.B.data.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    delta = torch.zeros(9, 6, dtype=torch.float64)
    delta[3:6] = (3.0 / 2) * found.B.double() @ found.A.double()
    expected = x @ (linear.weight + delta).T + linear.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.delta_weight().double(), delta, rtol=1e-6, atol=1e-6)


def test_blocks_of_a_fused_qkv_touch_their_rows_alone(make):
    backbone = make("blip")
    found = inject(backbone, "vit.q,vit.v")
    width = backbone.model.config.vision_config.hidden_size
    for address, x in found.items():
        delta = x.delta_weight().view(3, width, width)
        own = "qkv".index(address[-1])
        assert delta[own].any() and not delta[[i for i in range(3) if i != own]].any()


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.15), ("fp16", 0.02)])
def test_merged_is_hooked(make, dtype, bound):
    """Law 5: logits agree within the bound (relative to the largest), with an update that is far larger than it."""
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


def test_merging_twice_is_merging_once_and_restore_gives_the_same_bits(backbone):
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
    """A merge undone by subtraction changes a fifth of fp16 weights; the kept original changes none."""
    backbone = make("blip", dtype="fp16")
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    inject(backbone)
    for _ in range(3):
        merging.merge(backbone.model)
        merging.restore(backbone.model)
    assert all(torch.equal(backbone.model.state_dict()[key], before[key]) for key in before)


def test_eject_leaves_the_base_as_it_was(backbone):
    before, keys = logits_of(backbone), list(backbone.model.state_dict())
    inject(backbone)
    assert set(keys) <= set(backbone.model.state_dict())  # the base's own names never change
    merging.merge(backbone.model)
    injection.eject(backbone.model)
    injection.eject(backbone.model)
    assert list(backbone.model.state_dict()) == keys and torch.equal(logits_of(backbone), before)
    assert not any(hook in attached.OURS for m in backbone.model.modules() for hook in m._forward_hooks.values())


def test_bake_keeps_the_merged_weights_and_nothing_else(make):
    backbone = make("blip")
    keys = list(backbone.model.state_dict())
    inject(backbone)
    merging.merge(backbone.model)
    merged = logits_of(backbone)
    merging.bake(backbone.model)
    assert list(backbone.model.state_dict()) == keys and torch.equal(logits_of(backbone), merged)


def test_injecting_twice_is_injecting_once(make):
    backbone = make("blip")
    inject(backbone)
    once = logits_of(backbone)
    inject(backbone, trained=False)
    assert torch.equal(logits_of(backbone), once)
    with pytest.raises(ValueError, match="already on other modules"):
        inject(backbone, "vit")


def plus(weight: torch.Tensor, x: LoRA) -> torch.Tensor:
    """W + ΔW, as a merge has it."""
    return weight + x.delta_weight()


def test_two_adapters_add_up_and_one_can_be_ejected():
    """Updates add: hooked with both equals W + ΔW₁ + ΔW₂; ejecting one of two merged leaves exactly the other."""
    model = nn.Sequential(nn.Linear(5, 4))
    weight = model[0].weight.detach().clone()
    for name in ("one", "two"):
        injection.inject(model, [Site("0", r=2)], name=name)["0"].B.data.normal_()
    deltas = {name: attached.adapters(model, name)["0"].delta_weight() for name in attached.names(model)}
    x = torch.randn(3, 5)
    both = x @ (weight + deltas["one"] + deltas["two"]).T + model[0].bias
    torch.testing.assert_close(model(x), both)
    merging.merge(model, "one")
    torch.testing.assert_close(model(x), both)  # one in the weights, two on the hook
    merging.merge(model)
    torch.testing.assert_close(model(x), both)
    injection.eject(model, "one")
    assert attached.names(model) == ["two"] and torch.equal(model[0].weight, plus(weight, attached.adapters(model, "two")["0"]))
    injection.eject(model, "two")
    assert torch.equal(model[0].weight, weight)


def test_disabled_is_the_base_and_ends_even_by_an_error(make):
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


def test_a_copy_has_adapters_of_its_own(make):
    """deepcopy and pickle: closures would share the adapter, or fail."""
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


def test_adapters_are_fp32_whatever_the_base(make):
    backbone = make("opt", dtype="fp16")
    assert {half.dtype for x in inject(backbone).values() for half in (x.A, x.B)} == {torch.float32}


def test_only_adapters_are_trainable(backbone):
    inject(backbone)
    assert all(parameter.requires_grad == (".lora." in name) for name, parameter in backbone.model.named_parameters())


class Int8Linear(nn.Module):
    """A linear as bitsandbytes keeps it: an int8 weight and a scale, called like any other."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_a_quantised_base_is_trained_by_hook_and_refuses_to_merge():
    for quantised in (Int8Linear(nn.Linear(8, 4)), _dynamic_quantised()):
        model = nn.Sequential(quantised)
        x = torch.randn(3, 8)
        before = model(x)
        found = injection.inject(model, [Site("0", r=2)])["0"]
        found.B.data.normal_()
        torch.testing.assert_close(model(x), before + x @ found.delta_weight().T)
        with pytest.raises(ValueError, match="'0' is quantized"):
            merging.merge(model)


def _dynamic_quantised() -> nn.Module:
    import torch.ao.nn.quantized.dynamic as quantised

    linear = nn.Linear(8, 4)
    linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return quantised.Linear.from_float(linear)


def test_a_tied_head_is_refused(backbone):
    head = "text_decoder.cls.predictions.decoder" if backbone.family == "blip" else "language_model.lm_head"
    if head not in tied(backbone.model):
        pytest.skip("this T5 has a head of its own, as Flan-T5 does")
    with pytest.raises(ValueError, match="shares its weight with"):
        injection.inject(backbone.model, targets.find(backbone.model, head))


@pytest.mark.parametrize("site", [Site("nowhere"), Site("1"), Site("0", rows=(2, 9)), Site("0", r=0)])
def test_a_site_that_cannot_be_is_refused_before_anything_changes(site):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ValueError, match=f"'{site.module}"):
        injection.inject(model, [Site("0"), site] if site.module != "0" else [site])
    assert not attached.names(model) and not model[0]._forward_hooks


def test_unfired_lists_a_linear_that_is_never_called():
    """Law 3: F.linear(x, self.weight) never calls the module, and an adapter there would do nothing."""

    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.honest, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.honest(x), self.bypassed.weight)

    model = Sly()
    injection.inject(model, [Site("honest"), Site("bypassed")])
    assert attached.unfired(model, lambda: model(torch.randn(2, 4))) == ["bypassed"]


def test_checkpointed_layers_keep_their_adapters_alive(make):
    """Non-reentrant checkpointing: the gradients are those without it, on every adapter."""
    from lora_blip.tasks.caption import CaptionTask
    from tests.support.models import batch_of

    for kind in ("blip", "opt", "t5"):
        gradients = []
        for checkpointing in (False, True):
            backbone = make(kind, checkpointing=checkpointing)
            found = inject(backbone)
            backbone.model.train()
            task = CaptionTask(backbone)
            task.loss(batch_of(task)).backward()
            gradients.append({address: x.B.grad for address, x in found.items()})
        assert any(getattr(m, "gradient_checkpointing", False) for m in backbone.model.modules())
        for address, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][address], plain, rtol=1e-4, atol=2e-6 * float(plain.abs().max()))
            assert plain.any(), address


def test_an_unknown_name_is_an_error(make):
    backbone = make("blip")
    inject(backbone, "vit")
    for act in (merging.merge, injection.eject):
        with pytest.raises(LoRAError, match="no adapter 'typo'; it has default"):
            act(backbone.model, "typo")
    with pytest.raises(LoRAError, match="no adapter 'typo'"), disable_adapters(backbone.model, "typo"):
        pass


@pytest.mark.parametrize("name", ["merged", "original", "training", "a.b", "", "keys"])
def test_an_odd_adapter_name_is_refused_before_anything_changes(name):
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(LoRAError, match="adapter name"):
        injection.inject(model, [Site("0")], name=name)
    assert not model[0]._forward_hooks and not hasattr(model[0], "lora")


def test_a_second_merge_uses_the_current_values():
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.detach().clone()
    found = injection.inject(model, [Site("0", r=2)])["0"]
    for _ in range(2):
        found.B.data.normal_()
        merging.merge(model)
        assert torch.equal(model[0].weight, plus(before, found))
        torch.testing.assert_close(model[0].weight, before + found.delta_weight())
    model.double()
    merging.merge(model)
    merging.restore(model)
    assert torch.equal(model[0].weight, before.double())


def two_adapters(fast: bool) -> nn.Sequential:
    """Two linears with two adapters, one of them on a block of rows."""
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
@pytest.mark.parametrize("way", ["FAST = False", "without fused", "after a block"])
def test_every_hook_is_the_plain_hook_if_every_adapter_acts_on_every_row(way, merged):
    """Outputs and gradients have equal bits: with FAST = False, without `fused`, and once `use_adapters` was used."""
    model = two_adapters(fast=way == "without fused")
    attached.fast(model, False)
    if way == "after a block":
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


def test_the_three_lines_of_layer_py_are_what_inject_does_without_fast():
    """`inject` registers `lora_hook` and nothing else. `attached.fast` adds the hooks of `fused`, at the same place."""
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
    """A variant of LoRA: twice the update."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)

    def delta_weight(self) -> torch.Tensor:
        return 2 * super().delta_weight()


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_a_variant_is_hooked_trained_merged_and_baked_by_its_own_update(write):
    """ΔW has one source, `delta_weight`, and the hook adds what `forward` returns, also where `fused` is on."""
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
    """The A and B that act by a hook."""
    for linear in attached.adapted_linears(model).values():
        for key, lora in linear.lora.items():
            if key not in linear.lora.merged:
                yield from lora.parameters()


def written_out(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """y = (W + Σ ΔW) x + b, with the original W."""
    weight = linear.weight if linear.lora.original is None else linear.lora.original
    return nn.functional.linear(x, weight + sum(lora.delta_weight() for lora in linear.lora.values()), linear.bias)
