"""A merge writes all updates or raises one error that names the module, before any weight has changed."""

import copy
import inspect
import itertools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from lora_blip.errors import AdapterError, LoRAError
from lora_blip.kernels.linear import QuickLinear, can_bypass
from lora_blip.lora import adapter_file, attached, fused, injection, merging
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.lora.sites import Site, modules_of
from lora_blip.models import weights


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)


def adapt(model: nn.Module, paths: tuple[str, ...] = ("0", "1"), name: str = "default", std: float = 1.0) -> nn.Module:
    for adapter in injection.inject(model, [Site(path, 2) for path in paths], name=name).values():
        adapter.B.data.normal_(std=std)
    return model


class ScaledInt8(torch.Tensor):
    """A weight like that of torchao: dtype float32 and shape (out, in) outside, int8 values and a scale inside."""

    values: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> "ScaledInt8":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __repr__(self) -> str:
        return "ScaledInt8"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.values.float() * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return ScaledInt8(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of an int8 weight")


def int8_weight(linear: nn.Linear) -> None:
    scale = linear.weight.detach().abs().max() / 127
    values = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = nn.Parameter(ScaledInt8(values, scale), requires_grad=False)


def computed_weight(kind: Callable[..., Any]) -> Callable[[nn.Sequential], object]:
    return lambda model: kind(model[1])


def share_storage(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(model[2].weight.data)


def share_rows(model: nn.Sequential) -> None:
    """Two weights whose rows overlap in one storage."""
    both = torch.randn(6, 4)
    model[1].weight, model[2].weight = nn.Parameter(both[:4]), nn.Parameter(both[2:])


def tie_later(model: nn.Sequential) -> None:
    model[2].weight = model[1].weight


def buffer_shares(model: nn.Sequential) -> None:
    model.register_buffer("ema", model[1].weight.data)


def expand(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4), requires_grad=False)


def overlap(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.randn(7).as_strided((4, 4), (1, 1)), requires_grad=False)


class Doubled(nn.Linear):
    """Return 2 (W x + b). An update in the weight would be doubled too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2 * super().forward(x)


class Float8(nn.Linear):
    """A linear with a plain float8 parameter and a separate scale, like that of transformers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return nn.functional.linear(x, self.weight.float() * 0.1, self.bias)


def kind_of_linear(kind: type[nn.Linear], dtype: torch.dtype = torch.float32) -> Callable[[nn.Sequential], object]:
    def change(model: nn.Sequential) -> None:
        weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
        model[1].__class__ = kind
        model[1].weight = weight

    return change


def replace_forward(model: nn.Sequential) -> None:
    model[1].forward = lambda x: x.sin()


UNMERGEABLE: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {  # case → (change of the model, error message)
    "weight_norm": (computed_weight(parametrizations.weight_norm), "'1' computes its weight"),
    "orthogonal": (computed_weight(parametrizations.orthogonal), "'1' computes its weight"),
    "the older weight_norm": (computed_weight(weight_norm), "'1' computes its weight"),
    "pruned": (lambda model: prune.l1_unstructured(model[1], "weight", 0.5), "'1' computes its weight"),
    "two parameters, one storage": (share_storage, r"'1' shares the memory of its weight with '2\.weight'"),
    "overlapping rows": (share_rows, r"'1' shares the memory of its weight with '2\.weight'"),
    "tied after inject": (tie_later, r"'1' shares the memory of its weight with '2\.weight'"),
    "a buffer of one storage": (buffer_shares, r"'1' shares the memory of its weight with '\.ema'"),
    "an expanded weight": (expand, "'1' has an expanded weight"),
    "a weight that overlaps itself": (overlap, "'1' has an expanded weight"),
    "a linear that scales": (kind_of_linear(Doubled), r"'1' \(Doubled\) computes something other than W x \+ b"),
    "a replaced forward": (replace_forward, r"'1' \(Linear\) computes something other than W x \+ b"),
    "float8 with a scale": (kind_of_linear(Float8, torch.float8_e4m3fn), r"'1' is quantized \(Float8, Parameter\)"),
    "int8 behind float32": (lambda model: int8_weight(model[1]), r"'1' is quantized \(Linear, ScaledInt8\)"),
    "NaN in A": (lambda model: model[1].lora["default"].A.data.fill_(float("nan")), "'1' would be NaN"),
    "inf in B": (lambda model: model[1].lora["default"].B.data[0, 0].fill_(float("inf")), "'1' would be NaN"),
    "NaN in the base": (lambda model: model[1].weight.data[3, 3].fill_(float("nan")), "'1' would be NaN"),
}
NOT_FINITE = {"NaN in A", "inf in B", "NaN in the base"}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_a_linear_that_cannot_be_merged_is_named_and_nothing_is_changed(case):
    """`merge` and `bake` check every linear before they write the first one. The hook still works on such a linear."""
    model, (change, message) = adapt(net()), UNMERGEABLE[case]
    change(model)
    model.requires_grad_(False)
    first, x = model[0].weight.clone(), torch.randn(3, 4)
    before = model(x)
    for write in (merging.merge, merging.bake):
        with pytest.raises(LoRAError, match=message):
            write(model)
        assert torch.equal(model[0].weight, first) and not model[0].lora.merged and model[0].lora.original is None
        assert case in NOT_FINITE or torch.equal(model(x), before)
    if case not in NOT_FINITE:  # the hook adds to the output, so any kind of weight works
        x = x.requires_grad_()
        model(x).sum().backward()
        assert x.grad.isfinite().all()


def test_a_tensor_subclass_as_weight_uses_the_plain_update(monkeypatch):
    """Only the dequantized twin uses the fused update. The gradients of both models are equal."""
    fused_linears: list[Any] = []
    updated = fused.updated
    monkeypatch.setattr(fused, "updated", lambda linear, output: fused_linears.append(linear) or updated(linear, output))
    model = adapt(net())
    twin = copy.deepcopy(model)
    for linear in model:
        if isinstance(linear, nn.Linear):
            int8_weight(linear)
    for own, other in zip(model, twin, strict=True):
        other.weight.data.copy_(own.weight.values.float() * own.weight.scale)
    model.requires_grad_(False)
    gradients = []
    for each in (model, twin):
        for half in (p for _, p in each.named_parameters() if p.shape in ((2, 4), (4, 2))):
            half.requires_grad_()
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        each(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 5 and [linear in twin for linear in fused_linears] == [True, True]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_subclass_of_linear_that_computes_w_x_plus_b_is_merged():
    """A subclass whose forward gives the same result can be merged, in each dtype."""

    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.einsum("...i,oi->...o", x, self.weight) + self.bias

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Linear(4, 4), Same(4, 4)).to(dtype)
        x = torch.randn(3, 4, dtype=dtype)
        hooked = adapt(model)(x)
        merging.merge(model)
        bound = 1e-4 if dtype.itemsize > 2 else 0.1
        torch.testing.assert_close(model(x), hooked, rtol=bound, atol=bound)


@pytest.mark.parametrize("earlier", [(), ("a",)])
def test_a_merge_that_fails_halfway_restores_every_weight(monkeypatch, earlier):
    """After MemoryError at the last linear, weights, outputs and the set of merged adapters are those before the call."""
    model = adapt(adapt(net(), ("0", "1", "2"), "a"), ("0", "1", "2"), "b")
    if earlier:
        merging.merge(model, *earlier)
    x, before = torch.randn(3, 4), [linear.weight.clone() for linear in model]
    hooked, fold = model(x), merging.fold

    def fail(linear: Any, keys: frozenset[str]) -> None:
        if linear is model[2] and "b" in keys:
            raise MemoryError
        fold(linear, keys)

    monkeypatch.setattr(merging, "fold", fail)
    with pytest.raises(MemoryError):
        merging.merge(model)
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(model, before, strict=True))
    assert all(linear.lora.merged == set(earlier) for linear in model) and torch.equal(model(x), hooked)
    monkeypatch.undo()
    merging.merge(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [merging.bake, merging.restore, injection.eject, lambda model: injection.eject(model, "a")],
    ids=["bake", "restore", "eject", "eject one"],
)
@pytest.mark.parametrize("earlier", [(), ("a",), ("a", "b")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_that_is_interrupted_at_any_line_finishes_before_it_raises(dtype, earlier, change):
    """Ctrl-C before each line that writes weights or removes adapters: the model is that of a call without an interruption."""
    plain = adapt(adapt(net(), ("0", "1", "2"), "a"), ("0", "2"), "b").to(dtype)
    if earlier:
        merging.merge(plain, *earlier)
    x, expected = torch.randn(3, 4, dtype=dtype), copy.deepcopy(plain)
    change(expected)
    functions = (merging.bake_all, merging.write_back_all, merging.write_back, attached.detach, injection.remove)
    watched = {inspect.unwrap(function).__code__ for function in (*functions, injection._remove_keys, merging.fold)}
    for stop in itertools.count(1):
        model, lines = copy.deepcopy(plain), 0

        def interrupt(frame: Any, event: str, _argument: Any) -> Any:
            nonlocal lines
            if event == "line" and "fold_all" not in {
                each.frame.f_code.co_name for each in inspect.getouterframes(frame, 0)[:5]
            }:
                lines += 1
                if lines == stop:
                    raise KeyboardInterrupt
            return interrupt if frame.f_code in watched else None

        sys.settrace(interrupt)
        try:
            change(model)
        except KeyboardInterrupt:
            done = False
        else:
            done = True
        finally:
            sys.settrace(None)
        assert list(model.state_dict()) == list(expected.state_dict()), stop
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)), stop
        assert [len(linear._forward_hooks) for linear in model] == [len(linear._forward_hooks) for linear in expected], stop
        assert torch.equal(model(x), expected(x)), stop
        if done:
            break
    assert stop > 10 or (change is merging.restore and not earlier)


def test_a_baked_adapter_cannot_be_disabled_or_removed_silently(tmp_path):
    """After `bake`, the model seems to have no adapter, and each request that would have no effect is an error."""
    model, other = adapt(net()), adapt(net())
    path = adapter_file.save(tmp_path / "adapter.safetensors", other)
    merging.bake(model)
    for call in (
        lambda: disable_adapters(model).__enter__(),
        lambda: injection.eject(model),
        lambda: use_adapters(model, "default").__enter__(),
        lambda: adapter_file.load(model, path),
        lambda: merging.merge(model),
        lambda: merging.bake(model),
    ):
        with pytest.raises((LoRAError, AdapterError), match=r"merged permanently into this model, by lora_blip\.bake"):
            call()
    adapt(model)  # a new adapter on the changed base can be disabled and removed
    with disable_adapters(model):
        pass
    injection.eject(model)
    clean = net()
    with disable_adapters(clean):  # without an adapter, the base is active already
        pass


def test_a_bake_that_cannot_finish_leaves_the_outputs_and_continues_later(monkeypatch):
    """Memory runs out at the second linear, twice. The first one is plain, the others keep their adapters."""
    model, x = adapt(net()), torch.randn(3, 4)
    hooked, fold = model(x), merging.fold

    def fail(linear: Any, keys: frozenset[str]) -> None:
        if linear is model[1]:
            raise MemoryError
        fold(linear, keys)

    monkeypatch.setattr(merging, "fold", fail)
    with pytest.raises(MemoryError):
        merging.bake(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    merging.bake(model)
    assert not attached.names(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("undo", [merging.restore, injection.eject], ids=["restore", "eject"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
        lambda m: parametrizations.weight_norm(m[1]),
        lambda m: weight_norm(m[1]),
    ],
    ids=["pruned", "weight_norm", "the older weight_norm"],
)
def test_a_weight_that_is_computed_since_the_merge_is_not_restored(compute, undo):
    """The original would be written into a tensor that the next forward computes again, with the update in it."""
    model = adapt(net())
    merging.merge(model)
    compute(model)
    before = model[0].weight.clone()
    with pytest.raises(LoRAError, match=r"'1' computes its weight .* the original weight cannot be put back; first make it"):
        undo(model)
    assert model[0].lora.merged and torch.equal(model[0].weight, before)


@pytest.mark.parametrize("earlier", [False, True])
def test_an_injection_that_fails_halfway_leaves_no_adapter(monkeypatch, earlier):
    """The second linear fails, for example because the memory does not suffice. Other adapters stay."""
    model = adapt(net(), ("0", "2"), "other") if earlier else net()
    x, keys, attach = torch.randn(2, 4), list(model.state_dict()), attached.attach
    expected = model(x)

    def fail(linear: Any, site: Site, *more: Any) -> None:
        attach(linear, site, *more)
        if site.module == "1":
            raise MemoryError

    monkeypatch.setattr(injection, "attach", fail)
    with pytest.raises(MemoryError):
        adapt(model)
    assert attached.names(model) == ["other"] * earlier and list(model.state_dict()) == keys
    assert torch.equal(model(x), expected) and not model[1]._forward_hooks
    monkeypatch.undo()
    assert len(injection.inject(model, [Site("0"), Site("1")])) == 2


def test_an_eject_that_fails_halfway_restores_every_weight(monkeypatch):
    """Ejecting one of two merged adapters writes W + ΔW of the other, to all linears or to none."""
    model = adapt(adapt(net(), ("0", "1", "2"), "a"), ("0", "1", "2"), "b")
    merging.merge(model)
    before, calls = [linear.weight.clone() for linear in model], []
    fold = merging.fold

    def fail(linear: Any, keys: frozenset[str]) -> None:
        calls.append(keys)
        if len(calls) == 2:
            raise MemoryError
        fold(linear, keys)

    monkeypatch.setattr(merging, "fold", fail)
    with pytest.raises(MemoryError):
        injection.eject(model, "a")
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(model, before, strict=True))
    assert attached.names(model) == ["a", "b"] and all(linear.lora.merged == {"a", "b"} for linear in model)


def test_a_load_draws_nothing_and_its_module_walks_cost_one_step_for_each_module(tmp_path):
    """Loading and merging leave the random state alone. `named_modules` is never used: it costs a step for each level."""
    model = adapt(net())
    path = adapter_file.save(tmp_path / "adapter.safetensors", model)
    injection.eject(model)
    state, walks = torch.random.get_rng_state(), 0

    def count(frame: Any, event: str, _argument: Any) -> None:
        nonlocal walks
        walks += event == "call" and frame.f_code is nn.Module.named_modules.__code__ and frame.f_locals["self"] is model

    sys.setprofile(count)
    try:
        adapter_file.load(model, path)
        merging.bake(model)
    finally:
        sys.setprofile(None)
    assert torch.equal(torch.random.get_rng_state(), state) and walks == 0


def test_the_paths_of_a_walk_are_those_of_named_modules():
    """Order and paths are equal for shared, nested and missing modules."""
    shared, model = nn.Linear(2, 2), nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict())
    model[1]["a"], model[1]["b"] = shared, nn.Sequential(shared, nn.ReLU())
    model.register_module("none", None)
    assert list(modules_of(model).items()) == list(model.named_modules())


@pytest.mark.parametrize("rows", [None, (100, 700)])
def test_a_merge_in_blocks_of_rows_is_the_sum_of_the_whole_matrices(monkeypatch, rows):
    """Every size of a block gives W + ΔW, also for an adapter of some rows only."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(96, 768))
    lora = injection.inject(start, [Site("0", 3, block="q" if rows else "", rows=rows)])["0.q" if rows else "0"]
    lora.B.data.normal_()
    expected = start[0].weight.double() + nn.functional.pad(
        lora.scale * lora.B.double() @ lora.A.double(), (0, 0, *lora.padding)
    )
    for block in (1, 500, 96 * 100, 2**18):
        monkeypatch.setattr(merging, "BLOCK", block)
        model = copy.deepcopy(start)
        merging.merge(model)
        torch.testing.assert_close(model[0].weight.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("write", "copies"), [(merging.merge, 4), (merging.bake, 1)])
def test_a_merge_needs_memory_for_the_originals_only_and_a_bake_for_one_of_them(monkeypatch, write, copies):
    """`merge` keeps the four originals, and `bake` only one at a time. copies: the largest memory, in weights of a linear."""
    monkeypatch.setattr(merging, "BLOCK", 2**14)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    adapt(model, ("0", "1", "2", "3"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        write(model)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    largest = max(itertools.accumulate(changes))
    assert copies <= largest / (4 * 512 * 512) < copies + 0.3


class Scaling:
    """A foreign forward hook that changes the output."""

    def __call__(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2 + 1


def scale_in_place(_module: nn.Module, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
    output.mul_(2)


def watch_only(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    output.sum()


@pytest.mark.parametrize("when", ["before the adapter", "after the adapter"])
def test_a_foreign_hook_receives_the_update_whenever_it_was_registered(when):
    """A hook that scales the output of the linear also scales the update, before and after a merge."""
    model, plain, x = net(), net(), torch.randn(3, 4)
    if when == "before the adapter":
        model[1].register_forward_hook(Scaling())
    adapt(model), adapt(plain)
    plain.load_state_dict(model.state_dict())
    if when == "after the adapter":
        model[1].register_forward_hook(Scaling())
    hooked = model(x)
    torch.testing.assert_close(hooked, plain[2](plain[1](plain[0](x)) * 2 + 1))
    merging.merge(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
@pytest.mark.parametrize("where", ["prepended", "prepended, with keywords", "of all modules"])
def test_a_foreign_hook_before_the_adapter_hook_must_not_change_the_output(where, write):
    """A hook that changes the output before the adapter hook makes `merge` and `bake` raise LoRAError. A reader is allowed."""
    for hook, allowed in ((watch_only, True), (Scaling(), False)):
        model, x = adapt(net()), torch.randn(3, 4)
        if where == "of all modules":
            handle = nn.modules.module.register_module_forward_hook(hook)
        elif where == "prepended" or allowed:
            handle = model[1].register_forward_hook(hook, prepend=True)
        else:
            handle = model[1].register_forward_hook(scale_in_place, prepend=True, with_kwargs=True)
        try:
            hooked, before = model(x), model[0].weight.clone()
            if allowed:
                write(model)
                torch.testing.assert_close(model(x), hooked, rtol=1e-5, atol=1e-5)
            else:
                with pytest.raises(LoRAError, match=r"'[01]' has a forward hook that changes its output before"):
                    write(model)
                assert torch.equal(model[0].weight, before) and torch.equal(model(x), hooked)
        finally:
            handle.remove()


def test_quick_linear_and_cast_once_ignore_tensor_subclasses(make):
    """`cast_once` does not cast a weight that is a tensor subclass, and `QuickLinear` does not use its fast paths for it."""
    backbone = make("blip")
    quick = backbone.model.vision_model.encoder.layers[0].mlp.fc1
    assert type(quick) is QuickLinear
    int8_weight(quick)
    weight = quick.weight
    weights.cast_once(backbone, "bf16")
    assert quick.weight is weight and backbone.model.vision_model.encoder.layers[0].mlp.fc2.weight.dtype == torch.bfloat16
    assert not can_bypass(quick) and not quick._plain_backward(torch.randn(2, 4))


def test_weights_in_one_storage_that_do_not_overlap_are_merged():
    """Weights that are separate rows of one flat buffer can be merged."""
    model, both = net(), torch.randn(8, 4)
    model[0].weight, model[1].weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])
    x = torch.randn(3, 4)
    hooked = adapt(model)(x)
    merging.merge(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-5, atol=1e-5)


def test_one_module_under_two_parents_is_merged_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    x = torch.randn(3, 4)
    hooked = adapt(model, ("0.0",))(x)
    merging.merge(model)
    torch.testing.assert_close(model(x), hooked, rtol=1e-4, atol=1e-4)
    injection.eject(model)
    with pytest.raises(LoRAError, match=r"'1\.0' is not a linear layer of Sequential; name it '0\.0'"):
        injection.inject(model, [Site("1.0")])


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_a_merged_weight_beyond_float16_is_refused_and_one_within_is_written(write):
    """The limit, 65504, applies to W + ΔW and not to ΔW."""
    for base, update, fits in (
        (60000.0, 60000.0, False),
        (-60000.0, 120000.0, True),
        (0.0, 65504.0, True),
        (0.0, 65536.0, False),
    ):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).half()
        model[0].weight.data.fill_(1.0)
        model[1].weight.data.fill_(base)
        for adapter in injection.inject(model, [Site("0", 1, 1.0), Site("1", 1, 1.0)]).values():
            adapter.A.data.fill_(1.0)
            adapter.B.data.fill_(1.0)
        attached.adapters(model)["1"].B.data.fill_(update)
        if fits:
            write(model)
            assert model[1].weight.item() == base + update and model[0].weight.item() == 2
        else:
            with pytest.raises(LoRAError, match="'1' would be NaN or beyond the largest float16, 65504"):
                write(model)
            assert model[0].weight.item() == 1 and model[1].weight.item() == base


@pytest.mark.parametrize("seed", range(40))
def test_no_value_of_a_merged_weight_is_larger_than_its_bound(seed):
    """The bound also covers B A in float32 before it is scaled, and the original weight if another adapter is merged."""
    torch.manual_seed(seed)
    scale, r = 10.0 ** int(torch.randint(-3, 3, ())), int(torch.randint(1, 5, ()))
    model = nn.Sequential(nn.Linear(3, 4))
    for name, alpha in (("a", scale), ("b", 1 / scale)):
        lora = injection.inject(model, [Site("0", r, alpha * r)], name=name)["0"]
        lora.A.data.fill_(float(torch.randn(())))
        lora.B.data.fill_(float(torch.randn(())))
    keys = frozenset(("a", "b")) if seed % 2 else frozenset(("a",))
    if seed % 3 == 0:
        merging.merge(model, "a")
    bound, rounding = merging.bound_of(model[0], keys), 1 + 1e-6
    assert merging.largest_of(merging.summed(model[0], keys)) <= bound * rounding
    assert all(merging.largest_of(model[0].lora[key].B @ model[0].lora[key].A) <= bound * rounding for key in keys)
    model[0].lora["a"].scale = math.nan
    assert math.isnan(merging.bound_of(model[0], keys))


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
@pytest.mark.parametrize(("scale", "a", "b"), [(1e30, 1e-38, 1e9), (1e-30, 1e38, 1e-15), (1.0, 1.0, 3e38)])
@pytest.mark.parametrize("width", [1, 2, 64, 768])
def test_a_merge_writes_the_sum_that_was_checked(width, scale, a, b, write):
    """Extreme factors whose product is an ordinary number, and partial sums near the largest float32: no infinity, no NaN."""
    r = 2 if b > 1e30 else 1
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model[0].weight.data.fill_(3e38 if r == 2 else 0.0)
    lora = injection.inject(model, [Site("0", r, scale * r)])["0"]
    lora.A.data.fill_(a)
    lora.B.data.copy_(torch.tensor([b, -b])[:r].expand(width, r))
    expected = (model[0].weight.double() + lora.scale * lora.B.double() @ lora.A.double()).float()
    write(model)
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_weights_and_adapters_of_any_float_dtypes_are_merged_inside_autocast_too(autocast, write):
    """W, A and B may have different dtypes."""
    bounds = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    for of_weight, of_a, of_b in itertools.product(bounds, bounds, bounds):
        model = nn.Sequential(nn.Linear(4, 4).to(of_weight))
        lora = injection.inject(model, [Site("0", 2)])["0"]
        lora.B.data.normal_()
        lora.A.data, lora.B.data = lora.A.data.to(of_a), lora.B.data.to(of_b)
        expected = model[0].weight.double() + lora.scale * lora.B.double() @ lora.A.double()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            write(model)
        bound = bounds[of_weight]
        torch.testing.assert_close(model[0].weight.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_a_dora_adapter_that_overflows_is_refused(write):
    model = nn.Sequential(nn.Linear(4, 4).half())
    lora = injection.inject(model, [Site("0", 2, variant="dora")])["0"]
    lora.magnitude.data.fill_(1e6)
    before = model[0].weight.clone()
    with pytest.raises(LoRAError, match="'0' would be NaN or beyond the largest float16"):
        write(model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_an_update_is_refused_if_only_its_product_overflows(dtype, write):
    """B A is computed in float32, where it is infinite, although (alpha / r) · B A and the dtype of W could contain the sum."""
    model = nn.Sequential(nn.Linear(1, 1)).to(dtype)
    adapter = injection.inject(model, [Site("0", 1, 1e-30)])["0"]
    adapter.A.data.fill_(1e30)
    adapter.B.data.fill_(1e10)
    before = model[0].weight.clone()
    with pytest.raises(LoRAError, match="'0' would be NaN or beyond the largest float"):
        write(model)
    assert torch.equal(model[0].weight, before)


def test_one_of_two_merged_adapters_is_not_ejected_if_the_other_overflows():
    """Ejecting one of two merged adapters writes W + ΔW of the other. `eject` checks it before it writes."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).half()
    for name, value in (("up", 40000.0), ("down", -40000.0)):
        adapter = injection.inject(model, [Site("0", 1, 1.0)], name=name)["0"]
        adapter.A.data.fill_(2.0)
        adapter.B.data.fill_(value)
    merging.merge(model)
    merged = model[0].weight.clone()
    with pytest.raises(LoRAError, match="'0' would be NaN or beyond"):
        injection.eject(model, "down")
    assert torch.equal(model[0].weight, merged) and attached.names(model) == ["up", "down"]
    merging.restore(model)
    injection.eject(model, "down")


def test_an_update_is_summed_in_float32_and_rounded_once():
    """Law 5: a merged fp16 weight is W + ΔW of float64 within half a unit in the last place and one float32 rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).half()
    weight = model[0].weight.detach().double()
    truth = weight.clone()
    for name in ("a", "b"):
        adapter = injection.inject(model, [Site("0", 16, 3.0)], name=name)["0"]
        adapter.B.data.normal_()
        truth += adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()
    merging.merge(model)
    unit = 2.0 ** (truth.abs().log2().floor() - 10)
    assert ((model[0].weight.double() - truth).abs() <= 0.501 * unit + 1e-7).all()


def test_delta_weight_is_float32_inside_autocast():
    adapter = injection.inject(nn.Sequential(nn.Linear(8, 8)), [Site("0", 4)])["0"]
    adapter.B.data.normal_()
    outside = adapter.delta_weight()
    with torch.autocast("cpu", torch.bfloat16):
        inside = adapter.delta_weight()
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_a_merge_inside_autocast_equals_one_outside():
    merged = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8))
        injection.inject(model, [Site("0", 4)])["0"].B.data.normal_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            merging.merge(model)
        merged.append(model[0].weight)
    assert torch.equal(*merged)


def test_a_backward_pass_after_a_merge_raises_an_error():
    """Autograd saved W for the gradient of x. A merge after the forward pass changes W, so `backward` raises RuntimeError."""
    model = adapt(net())
    x = torch.randn(3, 4, requires_grad=True)
    y = model(x)
    merging.merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_threads_may_merge_at_the_same_time():
    """Concurrent merges in four threads give the weights of one merge."""
    model = adapt(net())
    once = copy.deepcopy(model)
    merging.merge(once)
    threads = [threading.Thread(target=merging.merge, args=(model,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model, once, strict=True))
    merging.restore(model)


def test_a_model_on_the_meta_device_raises_lora_error(tmp_path):
    """`load`, `merge`, `bake` and `save` raise LoRAError that names the module."""
    from lora_blip.lora import adapter_file as adapter

    path = adapter.save(tmp_path / "a.safetensors", adapt(net()))
    bare, carrying = net().to("meta"), adapt(net()).to("meta")
    for operation in (
        lambda: adapter.load(bare, path),
        lambda: merging.merge(carrying),
        lambda: merging.bake(carrying),
        lambda: adapter.save(tmp_path / "b.safetensors", carrying),
    ):
        with pytest.raises(LoRAError, match=r"'0' is on the meta device.*load"):
            operation()
    assert not attached.names(bare)
