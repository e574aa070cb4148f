"""Check if an adapter fits a model: its modules, the shapes of its tensors, the weights of the base, and the image size."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_blip.errors import AdapterError, LoRAError
from lora_blip.lora.adapter_tensors import parameters_of
from lora_blip.lora.attached import BAKED, MERGED_FOR_GOOD, Loaded, model_of
from lora_blip.lora.fingerprint import same_weights, sample
from lora_blip.lora.sites import check_sites, is_linear, modules_of, refuse_meta, tied
from lora_blip.lora.variants import CLASSES
from lora_blip.runtime.untrusted import quoted

if TYPE_CHECKING:
    from lora_blip.lora.adapter_file import Adapter


def check_fit(backbone: Loaded | nn.Module, adapter: "Adapter", dropout: float = 0.0) -> None:
    """Raise AdapterError if a module is missing, has another shape, or has other weights than the base of the training."""
    model = model_of(backbone)
    modules = modules_of(model)
    remedy = (
        f"the adapter was trained on {quoted(adapter.base)}; load that base" if adapter.base else "load the base of the adapter"
    )
    if adapter.base and adapter.base == getattr(backbone, "name", "") and not vars(model).get(BAKED):
        remedy = (
            f"the adapter was trained on {quoted(adapter.base)}, which has changed since; load it again. If this does not "
            "help, its files have changed: give a copy of the old ones, or train the adapter again"
        )
    if adapter.metadata["base"].get("baked"):
        remedy = (
            f"it was trained on {quoted(adapter.base)} after another adapter had been merged permanently into it; first merge "
            "that one with lora_blip.bake"
        )
    for site in adapter.sites:
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise AdapterError(f"{adapter.path}: this model has no linear {quoted(site.module)}; {remedy}")
        _, stop = site.rows or (0, linear.out_features)
        empty = CLASSES[site.variant](site, linear.in_features, linear.out_features, device="meta")
        for key, parameter in parameters_of(site.address, empty).items():
            part = key.rpartition(".")[2]
            saved, shape = tuple(adapter.tensors[key].shape), tuple(parameter.shape)
            if saved != shape or stop > linear.out_features:
                message = f"{part} of {quoted(site.address)} is {saved}, and this model needs {shape}"
                raise AdapterError(f"{adapter.path}: {message}; {remedy}")
    for path, expected in adapter.metadata["base"]["samples"].items():
        if path not in modules or not is_linear(modules[path]):
            raise AdapterError(f"{adapter.path}: this model has no linear {quoted(path)}; {remedy}")
        refuse_meta(path, modules[path])
        if not same_weights(expected, sample(modules[path])):
            baked = f". Probable reason: {MERGED_FOR_GOOD}" * bool(vars(model).get(BAKED))
            raise AdapterError(f"{adapter.path}: the weights of {path!r} are not those of the training; {remedy}{baked}")
    try:
        check_sites(model, adapter.sites, dropout)
    except LoRAError as error:  # for example a tied head, which `save` never writes
        again = ", and train the adapter again" * any(site.module in tied(model) for site in adapter.sites)
        raise AdapterError(f"{adapter.path}: {error}{again}") from None


def check_image_size(backbone: Loaded | nn.Module, adapter: "Adapter") -> None:
    """Raise AdapterError if a backbone has another image size, unless the user chose it. For a plain model, only warn."""
    size = image_size_of(model_of(backbone)).get("image_size", 0)
    if not adapter.image_size or not size or size == adapter.image_size:
        return
    if isinstance(backbone, Loaded):
        if not backbone.chose_image_size:
            raise AdapterError(
                f"{adapter.path}: it was trained on images of {adapter.image_size}×{adapter.image_size}, and this backbone "
                f"has {size}×{size}; load the base with lora_blip.load_backbone(…, image_size={adapter.image_size}). To use "
                f"the adapter at {size}×{size} all the same, name this size: lora_blip.load_backbone(…, image_size={size})"
            )
    else:
        warnings.warn(
            f"{adapter.path} was trained on images of {adapter.image_size}×{adapter.image_size}, and the config of this model "
            f"says {size}×{size}",
            stacklevel=4,
        )


def image_size_of(model: Any) -> dict[str, int]:
    """Return {"image_size": pixels}, or {} for a model whose config has no size."""
    size = getattr(getattr(getattr(model, "config", None), "vision_config", None), "image_size", None)
    return {"image_size": size} if isinstance(size, int) else {}
