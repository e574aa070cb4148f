"""`inject` refuses invalid sites, targets and models before it changes anything, and accepts the limits of each value."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_blip.errors import LoRAError, TargetError
from lora_blip.lora import attached, injection, targets
from lora_blip.lora.routing import use_adapters
from lora_blip.lora.sites import MOST_RANK, Site
from lora_blip.runtime.settings import LARGEST
from tests.support.networks import line, plus

NAN, INF = float("nan"), float("inf")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))


WRONG: dict[str, tuple[list[Any], str]] = {  # case → (sites, part of the error message)
    "no site": ([], "list of sites is empty"),
    "alpha NaN": ([Site("0", alpha=NAN)], "'0': alpha=nan"),
    "alpha infinite": ([Site("0", alpha=INF)], "'0': alpha=inf"),
    "alpha a boolean": ([Site("0", alpha=True)], "'0': alpha=True"),
    "alpha zero": ([Site("0", alpha=0.0)], "'0': alpha=0.0"),
    "alpha negative": ([Site("0", alpha=-2.0)], "'0': alpha=-2.0"),
    "alpha that is not a JSON number": ([Site("0", alpha=np.float32(2))], "'0': alpha="),  # type: ignore[arg-type]
    "scale beyond float32": ([Site("0", 1, 1e39)], "'0': alpha / r = 1e[+]39 / 1 is"),
    "scale below float32": ([Site("0", 8, 1e-38)], "'0': alpha / r"),
    "alpha of many digits": ([Site("0", alpha=10**5000)], "'0': alpha / r = int of many digits / 8"),
    "r zero": ([Site("0", 0)], "'0': r=0"),
    "r negative": ([Site("0", -3)], "'0': r=-3"),
    "r a fraction": ([Site("0", 2.5)], "'0': r=2.5"),  # type: ignore[arg-type]
    "r true": ([Site("0", True)], "'0': r=True"),
    "r that fills the memory": ([Site("0", 2**16 + 1)], "'0': r=65537: expected a whole number from 1 to 65536"),
    "r of many digits": ([Site("0", 10**5000)], "'0': r="),
    "twice": ([Site("0"), Site("0")], "'0' is named twice"),
    "twice with another r": ([Site("0", 2), Site("0", 4)], "'0' is named twice"),
    "one block twice": ([Site("0", block="q", rows=(0, 2)), Site("0", block="q", rows=(2, 4))], "'0.q' is named twice"),
    "a block without rows": ([Site("0", block="q")], "'0.q': a block needs a name"),
    "a block with a dot": ([Site("0", block="q.k", rows=(0, 2))], "'0.q.k': a block needs a name"),
    "rows backwards": ([Site("0", block="q", rows=(4, 2))], "'0.q': rows=[(]4, 2[)]"),
    "no rows": ([Site("0", block="q", rows=(2, 2))], "'0.q': rows=[(]2, 2[)]"),
    "negative rows": ([Site("0", block="q", rows=(-2, 2))], "'0.q': rows=[(]-2, 2[)]"),
    "rows past the end": ([Site("0", block="q", rows=(2, 7))], "'0.q': rows=[(]2, 7[)]"),
    "rows that are no whole numbers": ([Site("0", block="q", rows=(0.0, 2))], "'0.q': rows=[(]0.0, 2[)]"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_site_is_named_and_nothing_changes(case):
    """The valid site before it is not changed, and no parameter is frozen."""
    model, (sites, message) = net(), WRONG[case]
    before = dict(vars(model[1]))
    with pytest.raises(LoRAError, match=message.replace(".", r"\.")):
        injection.inject(model, [Site("1"), *sites] if sites else [])
    assert not attached.names(model) and not model[1]._forward_hooks and vars(model[1]).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_scale_of_rslora_must_fit_float32():
    """alpha / √r overflows before alpha / r does. B = 0 times infinity would be NaN in the first forward."""
    with pytest.raises(LoRAError, match=r"'0': alpha / √r = 1\.3e\+39 / √4 is beyond float32"):
        injection.inject(net(), [Site("0", 4, 1.3e39, variant="rslora")])


@pytest.mark.parametrize("dropout", [NAN, -0.1, 1.0, 1.5, INF, None, "0.1"])
def test_a_dropout_outside_0_to_1_is_refused_by_every_inject(dropout):
    """The first and the second `inject` raise LoRAError. The dropout of an existing adapter does not change."""
    model = net()
    with pytest.raises(LoRAError, match="dropout"):
        injection.inject(model, [Site("0")], dropout)
    assert not attached.names(model) and model[0].weight.requires_grad
    injection.inject(model, [Site("0")], 0.25)
    with pytest.raises(LoRAError, match="dropout"):
        injection.inject(model, [Site("0")], dropout)
    assert attached.adapters(model)["0"].dropout == 0.25


def test_the_largest_rank_equals_the_limit_of_the_setting():
    assert LARGEST["r"] == MOST_RANK


def test_inject_on_the_meta_device_is_refused():
    """`to_empty` would leave A and B uninitialized, so `inject` raises LoRAError."""
    with torch.device("meta"):
        model = net()
    with pytest.raises(LoRAError, match=r"'1' is on the meta device, so the model has no weights yet; load them first"):
        injection.inject(model, [Site("1")])
    assert not attached.names(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_an_invalid_target_is_an_error_with_the_fix():
    """Nothing is frozen by a call that fails."""
    for wrong in (None, 3, [nn.Linear(2, 2)], [Site("0"), "0"]):
        model = net()
        with pytest.raises(LoRAError, match=r"is not a target; .* lora_blip\.inject\(model, 'vit'\)"):
            injection.inject(model, wrong)
        assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TargetError, match="target 'vit' matches no linear of Sequential"):
        injection.inject(net(), "vit")


def test_inject_accepts_names_in_place_of_sites():
    """`inject(model, "0,1")` and lists of names equal `inject(model, find(model, "0,1"))`, with r and alpha."""
    expected = {address: lora.site for address, lora in injection.inject(net(), targets.find(net(), "0,1", 2, 3.0)).items()}
    assert list(expected) == ["0", "1"]
    for names in ("0,1", ["0", "1"], ("0", "1"), iter(["0", "1"])):
        adapters = injection.inject(net(), names, r=2, alpha=3.0)
        assert {address: lora.site for address, lora in adapters.items()} == expected
    assert injection.inject(net(), "1")["1"].site == Site("1")  # the same defaults of r and alpha


def test_the_smallest_and_largest_values_are_accepted():
    """One row, rank one, all rows and a dropout close to 1 are accepted."""
    sites = [Site("0", 1, 1e-3, "first", (0, 1)), Site("0", 1, 1e3, "last", (5, 6)), Site("1", 6, 1, "all", (0, 6))]
    adapters = injection.inject(net(), sites, 0.999_999)
    assert list(adapters) == ["0.first", "0.last", "1.all"]
    assert [tuple(x.B.shape) for x in adapters.values()] == [(1, 1), (1, 1), (6, 6)]


def test_a_block_with_the_name_of_a_submodule_is_refused():
    """The address "0.q" in a file would be ambiguous."""
    model = net()
    model[0].add_module("q", nn.Linear(4, 6))
    with pytest.raises(LoRAError, match=r"'0\.q' is named twice, by two sites or by a site and a module"):
        injection.inject(model, [Site("0", block="q", rows=(0, 2))])


def test_a_linear_with_another_attribute_lora_is_refused():
    for attribute in (nn.Linear(2, 2), nn.ModuleDict(), SimpleNamespace()):
        model = net()
        model[0].lora = attribute
        with pytest.raises(LoRAError, match="'0' already has another attribute 'lora'"):
            injection.inject(model, [Site("0")])
        assert model[0].lora is attribute


def test_a_base_with_lora_in_its_module_names_is_frozen_too():
    model = nn.ModuleDict({"lora": net(), "head": nn.Linear(6, 2)})
    injection.inject(model, [Site("head")])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.lora.default.A", "head.lora.default.B"]


def test_a_lazy_linear_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(LoRAError, match="'0' has no shape yet"):
        injection.inject(model, [Site("0")])
    model(torch.randn(2, 5))
    injection.inject(model, [Site("0")])


def test_a_second_inject_sets_the_dropout_and_changes_nothing_else():
    """The adapter keeps A and B, and uses the new dropout in training mode only."""
    model, x = net(), torch.ones(2, 4)
    adapter = injection.inject(model, [Site("0", 4)], 0.0)["0"]
    adapter.B.data.normal_()
    model.train()
    before = model(x)
    assert torch.equal(model(x), before)
    assert injection.inject(model, [Site("0", 4)], 0.5)["0"] is adapter and adapter.dropout == 0.5
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), before)
    injection.inject(model, [Site("0", 4)])
    assert adapter.dropout == 0 and torch.equal(model.train()(x), before)


def test_dropout_keeps_the_mean():
    """The mean of the update over many rows equals the update without dropout, because dropout rescales its output."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(20_000, 4)
    injection.inject(model, [Site("0", 2)], 0.5)["0"].B.data.normal_()
    torch.testing.assert_close(model.train()(x).mean(0), model.eval()(x).mean(0), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_adapter_is_in_the_mode_of_its_linear(training):
    """An adapter injected in training mode applies dropout. One injected in eval mode applies it only after `train()`."""
    model, x = net().train(training), torch.ones(3, 4)
    adapter = injection.inject(model, [Site("0", 4)], 0.5)["0"]
    adapter.B.data.normal_()
    assert adapter.training is training and torch.equal(model(x), model(x)) is not training
    model.train(not training)
    assert torch.equal(model(x), model(x)) is training


@pytest.mark.parametrize("fast", [True, False])
def test_a_linear_may_be_called_by_keyword(fast):
    """`linear(input=x)` equals `linear(x)` in values and gradients, also with adapters by row and other argument names."""

    class Scaled(nn.Linear):
        def forward(self, states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
            return super().forward(states) * scale

    for kind, name in ((nn.Linear, "input"), (Scaled, "states")):
        model = nn.Sequential(kind(4, 3))
        for adapter in ("a", "b"):
            injection.inject(model, [Site("0", 2)], name=adapter)["0"].B.data.normal_()
        attached.fast(model, fast)
        linear, x = model[0], torch.randn(2, 4, requires_grad=True)
        torch.testing.assert_close(linear(**{name: x}), linear(x))
        linear(**{name: x}).sum().backward()
        by_keyword, x.grad = x.grad, None
        linear(x).sum().backward()
        torch.testing.assert_close(by_keyword, x.grad)
        with use_adapters(model, ["a", None]):
            torch.testing.assert_close(linear(**{name: x}), plus(model, x, "a") * torch.tensor([[1.0], [0]]) + plus(model, x) * torch.tensor([[0.0], [1]]))  # fmt: skip  # noqa: E501
        with pytest.raises(TypeError):
            linear()


def test_copies_and_pickles_keep_the_setting_of_fast():
    """A copy of a model with fast off supports gradients of gradients too. Adapters injected later inherit the setting."""
    model = line("a")
    attached.fast(model, False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(2, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()
        assert twin[0].lora.routing.fast is False and x.grad is not None
    attached.fast(model)
    assert copy.deepcopy(model)[0].lora.routing.fast
    bare = net()
    attached.fast(bare, False)  # before there is an adapter
    injection.inject(bare, [Site("0")])
    assert bare[0].lora.routing.fast is False
    whole = nn.Sequential(net())
    attached.fast(whole[0], False)  # of a part of the model
    injection.inject(whole, [Site("0.0")])
    assert whole[0][0].lora.routing.fast is False
    attached.fast(whole)
    assert copy.deepcopy(whole)[0][0].lora.routing.fast and attached.adapters(whole) and whole[0][0].lora.routing.fast
