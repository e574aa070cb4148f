"""The adapters that are on the linears of a model, and the hooks that they need.

The adapters of a linear are its child `linear.lora`, an `AdapterStack`. The hooks are module-level functions. So a model that
is copied or pickled keeps its adapters and hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_blip.errors import LoRAError
from lora_blip.lora.adapter_tensors import names_of, refuse_other_parameters
from lora_blip.lora.call_batch import forget_batch, note_batch
from lora_blip.lora.fused import PendingInput, fused_hook, fused_pre_hook, is_product
from lora_blip.lora.layer import AdapterStack, LoRA, lora_hook
from lora_blip.lora.routing_state import AdapterRouting
from lora_blip.lora.save_guard import unguard
from lora_blip.lora.sites import Site, modules_of, name_of
from lora_blip.lora.variants import CLASSES, EXTRA, DoRA, original_of
from lora_blip.runtime.runs import is_adapter, is_peft
from lora_blip.runtime.untrusted import quoted

# The routing of a model without adapters: a block may begin before the first adapter, and end after the last one.
BARE: "WeakKeyDictionary[nn.Module, AdapterRouting]" = WeakKeyDictionary()
BAKED = "has_baked_adapters"  # name of an attribute of a model: True after `bake`
FAST = "fast_update"  # name of an attribute of a model: True if its adapters may use `fused`


MERGED_FOR_GOOD = (
    "an adapter was merged permanently into this model, by lora_blip.bake or by a Captioner that opened its base itself "
    "(Captioner.from_adapter(…, merge=False) keeps it apart)"
)


@runtime_checkable
class Loaded(Protocol):
    """A loaded backbone: a model with the data that an adapter file needs. `models.loading.Backbone` is one."""

    model: Any
    name: str
    samples: dict[str, dict[str, Any]] | None
    chose_image_size: bool


def model_of(model: nn.Module | Loaded, second: object = None, call: str = "") -> nn.Module:
    """Return the model of a backbone, the model inside DistributedDataParallel, or the model itself.

    Raise LoRAError for anything else.

    second: the second argument of a public function, whose right call is `call`: users may have swapped the two.
    """
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return model_of(model.module)
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Loaded):
        inner: nn.Module = model.model
        return inner
    if isinstance(second, nn.Module | Loaded):
        raise LoRAError(f"the arguments are swapped; call {call}")
    hint = ""
    if hasattr(model, "backbone"):
        hint = (
            "; captioner.backbone is one, and it can be changed if the captioner was opened with merge=False: otherwise its "
            "adapter is merged permanently"
        )
    elif isinstance(model, str | Path):
        hint = _hint_of_path(str(model))
    raise LoRAError(f"the first argument is of type {type(model).__name__}; give a backbone, or a model of transformers{hint}")


def _hint_of_path(path: str) -> str:
    """Return the calls that load the base or the adapter at a path, as the end of a message."""
    if is_adapter(path) or is_peft(Path(path)):
        return (
            f"; {quoted(path)} is an adapter: first load its base, backbone = lora_blip.load_backbone(…), then call "
            f"lora_blip.load_adapter(backbone, {quoted(path)}). Both at once: lora_blip.Captioner.from_adapter({quoted(path)})"
        )
    is_base = (Path(path) / "config.json").is_file() or ("/" in path and not Path(path).exists())
    return f"; load it first: backbone = lora_blip.load_backbone({quoted(path if is_base else 'assets/tiny-blip')})"


def adapters(model: nn.Module, name: str = "default") -> dict[str, LoRA]:
    """Return {address: LoRA} of the adapter `name`, in the model's order; {} if the model does not have it."""
    return {lora.site.address: lora for owner, lora in every_adapter(model) if owner == name}


def names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on a model."""
    return list(dict.fromkeys(owner for owner, _ in every_adapter(model)))


def unfired(model: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Run `forward`, and return the addresses of the adapters whose linear it did not call."""
    called: set[int] = set()

    def note(linear: nn.Module, _args: object, _output: object) -> None:
        called.add(id(linear))

    linears = adapted_linears(model).values()
    handles = [linear.register_forward_hook(note) for linear in linears]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [lora.site.address for m in linears if id(m) not in called for lora in m.lora.values()]


def fast(model: nn.Module, on: bool = True) -> None:
    """Allow or forbid the fused update (allowed by default). Copies of the model and later adapters have the same setting."""
    for module in modules_of(model).values():
        vars(module).pop(FAST, None)  # remove the settings of submodules
    setattr(model, FAST, on)
    share_routing(model).fast = on
    add_fused_hooks(model)


def add_fused_hooks(model: nn.Module) -> None:
    """Replace `lora_hook` by the hooks of `fused` on each linear, if they are allowed."""
    for linear in adapted_linears(model).values():
        hooks = linear._forward_hooks
        plain = [number for number, hook in hooks.items() if hook is lora_hook]
        if plain and linear.lora.routing.fast:
            linear.lora.pending = PendingInput()
            linear.register_forward_pre_hook(fused_pre_hook, with_kwargs=True)
            hooks.update(dict.fromkeys(plain, fused_hook))  # at the same place among the hooks


def share_routing(model: nn.Module) -> AdapterRouting:
    """Make all linears of a model share one routing, and return it. Parts of the model may have had their own."""
    modules = modules_of(model).values()
    stacks: list[Any] = [module.lora for module in modules if has_adapters(module)]
    routings = list(dict.fromkeys(stack.routing for stack in stacks if stack.routing is not None))
    routings = routings or [BARE.setdefault(model, AdapterRouting())]
    in_block = [routing for routing in routings if routing.blocks]
    if len(in_block) > 1:
        raise LoRAError(
            "two parts of this model are each in a block of `use_adapters` or `disable_adapters`; leave these blocks first"
        )
    routing: AdapterRouting = (in_block or routings)[0]
    routing.fast = all(each.fast for each in routings) and all(vars(module).get(FAST, True) for module in modules)
    for stack in stacks:
        stack.routing = stack.routing or routing  # of a stack that the user has made, as in the docstring of `layer`
    if len(routings) > 1:  # one routing has nothing to join, and writing could undo what another thread writes
        routing.has_dora = any(each.has_dora for each in routings)
        routing.entered, routing.recorded = any(each.entered for each in routings), any(each.recorded for each in routings)
        routing.used = routing.entered or routing.has_dora
        routing.dormant = frozenset().union(*(each.dormant for each in routings))
        for stack in stacks:
            stack.routing = routing
    return routing


def every_adapter(model: nn.Module) -> Iterator[tuple[str, LoRA]]:
    """Yield (name, LoRA) for each linear and each adapter on it."""
    for linear in adapted_linears(model).values():
        for key, lora in list(linear.lora.items()):  # a copy, because another thread may put an adapter on this linear
            yield name_of(key), lora


def adapted_linears(model: nn.Module) -> dict[str, Any]:
    """Return {path: linear} of the linears with adapters."""
    return {path: m for path, m in modules_of(model).items() if has_adapters(m)}


def has_adapters(module: nn.Module) -> bool:
    return isinstance(module._modules.get("lora"), AdapterStack)


def has_merged(model: nn.Module) -> bool:
    """Return True if an adapter is merged into the weights of the model, and `restore` can undo it."""
    return any(linear.lora.merged for linear in adapted_linears(model).values())


def refuse_baked(model: nn.Module) -> None:
    """Raise LoRAError if the only adapters of a model were merged permanently. Nothing can undo this merge."""
    if vars(model).get(BAKED) and not names(model):
        raise LoRAError(f"{MERGED_FOR_GOOD}, so it cannot be removed, disabled or restored; load the base again")


def check_names(model: nn.Module, required: Iterable[str]) -> None:
    """Raise LoRAError if the model does not have one of the required adapters."""
    present = names(model)
    for name in required:
        if name not in present:
            held = share_routing(model).dormant
            listed = ", ".join(f"{each} (of a Captioner)" if each in held else each for each in present)
            known = f"it has {listed}" if present else "call lora_blip.inject or lora_blip.load_adapter first"
            if vars(model).get(BAKED) and not present:
                known = f"{MERGED_FOR_GOOD}; load the base again"
            raise LoRAError(f"the model has no adapter {name!r}; {known}")


def check_unheld(model: nn.Module, *names: str) -> None:
    """Raise LoRAError if one of these adapters belongs to a `Captioner`."""
    for name in names:
        if isinstance(name, str) and name in share_routing(model).dormant:
            raise LoRAError(
                f"adapter {name!r} belongs to a Captioner on this model, and only that one can use it; put your own adapter "
                "on the model with another name: lora_blip.load_adapter(backbone, path, name='mine')"
            )


def attach(
    linear: Any, site: Site, dropout: float, name: str, values: Mapping[str, Tensor] | None = None,
    routing: AdapterRouting | None = None,
) -> None:  # fmt: skip
    """Put an adapter on a linear, and `lora_hook` if it is the first one.

    values: the tensors of a file; None: a new adapter, whose A is drawn on the CPU, so that each device gets the same numbers.
    An adapter of a file needs no draw. routing: the routing of the model; None: a new one.
    """
    device = next((tensor.device for tensor in (*linear.parameters(), *linear.buffers())), torch.device("cpu"))
    where = "meta" if values is not None or device.type == "meta" else "cpu"
    lora = CLASSES[site.variant](site, linear.in_features, linear.out_features, dropout, where)
    refuse_other_parameters(lora)
    if not has_adapters(linear):
        stack = AdapterStack()
        stack.routing = routing or AdapterRouting()
        linear.lora = stack
        linear.register_forward_hook(lora_hook, with_kwargs=True, prepend=True)  # first: other hooks see the update
    if values is None:
        lora = lora if device.type == where else lora.to(device)
    else:
        for part, key in zip(("A", "B", *EXTRA.get(site.variant, ())), names_of(site), strict=True):
            empty = torch.empty(getattr(lora, part).shape, dtype=torch.float32, device=device)
            setattr(lora, part, nn.Parameter(empty.copy_(values[key])))
    if isinstance(lora, DoRA):
        if values is None:
            lora.start_at(original_of(linear))
        linear.lora.routing.has_dora = linear.lora.routing.used = True
    is_product(lora)  # now, because a later call may be inside torch.compile or a transform
    linear.lora[f"{name}:{site.block}" if site.block else name] = lora.train(linear.training)


def detach(linear: Any) -> None:
    """Remove all adapters and our hooks from a linear."""
    remove_hooks(linear)
    del linear.lora


def clear_if_bare(model: nn.Module) -> None:
    """Remove our hooks and guards from a model that has no adapters left."""
    if not adapted_linears(model):
        unguard(model)
        for module in modules_of(model).values():
            remove_hooks(module)


def remove_hooks(module: nn.Module) -> None:
    """Remove our hooks from a module. They are compared by identity, so this works on a deepcopy and after unpickling too."""
    m: Any = module
    for hooks, *flags in (
        (m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs),
        (m._forward_hooks, m._forward_hooks_with_kwargs, m._forward_hooks_always_called),
    ):
        for number in [number for number, hook in hooks.items() if hook in OURS]:
            for table in (hooks, *flags):
                table.pop(number, None)


OURS = (fused_pre_hook, fused_hook, lora_hook, note_batch, forget_batch)
