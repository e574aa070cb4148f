"""Load BLIP or BLIP-2 frozen, by hub name or folder, with its tokenizer and image processor."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_blip.errors import ConfigError, InputError, ModelError
from lora_blip.kernels import switch
from lora_blip.kernels.plain import is_plain, plain
from lora_blip.lora import attached
from lora_blip.lora.routing import checkpoint_context
from lora_blip.lora.sites import modules_of, refuse_peft
from lora_blip.models import quantized
from lora_blip.models.base_config import check_config, check_sizes, skeleton_of, weight_shapes
from lora_blip.models.bin_weights import with_safetensors
from lora_blip.models.forked import restart_thread_pool
from lora_blip.models.hub import fetch
from lora_blip.models.image_size import check_size, fit_processor, own_size, resize_positions
from lora_blip.models.library import Quiet, first_line
from lora_blip.models.local_base import locate_base
from lora_blip.models.precision import DTYPES, emulated, pick_base_dtype, pick_device, pick_precision, refuse_t5_fp16
from lora_blip.models.processors import add_image_token, check_vocabulary, load_processors
from lora_blip.models.unsupported import refuse_loaded, unsupported_kind
from lora_blip.models.weight_names import check_names, prefix_of
from lora_blip.runtime.limits import is_process_limit
from lora_blip.runtime.untrusted import quoted

# model type → its architectures; the first is used if a config names none
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], ...]] = {
    "blip": (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval),
    "blip-2": (Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval),
}
UNREAD = {"output_attentions": False, "output_hidden_states": False, "chunk_size_feed_forward": 0}  # no effect on results


@dataclass
class Backbone:
    """A frozen model with its tokenizer and image processor, and its settings."""

    model: Any  # a PreTrainedModel; its type does not declare its parts
    tokenizer: Any
    image_processor: Any
    name: str
    device: torch.device
    samples: dict[str, Any] | None = None  # fingerprints of the weights before they were cast or sharded; None: compute them
    fast: bool = True  # use the fast kernels and packed texts; false: transformers' own computation
    own_image_size: int = 0  # pixels; the size in the checkpoint, even if another one was chosen
    chose_image_size: bool = False  # True if the user chose the size; adapters of another size can then be loaded

    @property
    def image_size(self) -> int:
        """Return the height and width of the model's images, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def chosen_size(self) -> int:
        """Return `image_size`, or 0 if it is the checkpoint's own. A run's identity contains this value."""
        return self.image_size if self.own_image_size not in (0, self.image_size) else 0

    @property
    def family(self) -> str:
        return self.model.config.model_type  # "blip" or "blip-2"

    @property
    def architecture(self) -> str:
        return type(self.model).__name__  # such as "BlipForQuestionAnswering"; it decides which tasks are possible


def load_backbone(
    name: str, device: str = "auto", dtype: str | torch.dtype = "fp32", checkpointing: bool = False, fast: bool = True,
    image_size: int = 0,
) -> Backbone:  # fmt: skip
    """Load a checkpoint frozen, in eval mode, for captioning, question answering or retrieval.

    name: a hub name or a folder. dtype: that of the weights, "fp32", "fp16", "bf16" or a dtype of torch; or "int8" or "nf4":
    bitsandbytes quantizes the linears, and the other weights are in float32. checkpointing: recompute activations in the
    backward pass (non-reentrant: the reentrant kind leaves adapters without gradients). fast: use the fast attention, update
    and packed texts; if false, transformers and `layer.lora_hook` compute everything. image_size: height and width of the
    images in pixels, a multiple of the patch size; the position embeddings are interpolated; 0: the checkpoint's own.

    The dropout of the model is set to 0: it does not help a frozen backbone, and without it training and inference compute the
    same. Raise ModelError if the checkpoint does not exist, is of another kind, lacks weights, or is a T5 in fp16. Raise
    ConfigError for another dtype or image size. In peft: `from_pretrained` of transformers.

    >>> backbone = lora_blip.load_backbone("assets/tiny-blip")
    >>> backbone.family, backbone.image_size, backbone.device.type
    ('blip', 96, 'cpu')
    """
    refuse_loaded(name)
    for setting, value in (("checkpointing", checkpointing), ("fast", fast)):
        if not isinstance(value, bool):
            raise ConfigError(f"{setting} = {quoted(value)}: expected True or False")
    source = locate_model(name)
    config, (rest, width) = load_config(source), quantized.split_dtype(dtype)
    kind = quantized.choose(config, name, width)
    return _load(name, source, config, pick_device(device), rest, checkpointing, fast, image_size, kind)


def open_backbone(
    name: str, device: str, precision: str, base_dtype: str = "auto", checkpointing: bool = False, fast: bool = True,
    image_size: int = 0, trained_dtype: str = "", move: bool = True,
) -> tuple[Backbone, str]:  # fmt: skip
    """Return the backbone for the settings of a run, and its precision. Training and inference both use this function.

    trained_dtype: the dtype of the base that the adapter was trained on, which `base_dtype` "auto" follows if it is quantized.
    move: if false, the weights stay in the CPU's memory, and `sharding.shard` moves them in parts.
    Raise ModelError and ConfigError as `load_backbone` does, and ConfigError for fp16 together with bf16.
    """
    where = pick_device(device)
    precision = pick_precision(precision, where)
    if emulated(precision, where):
        print(f"this CPU emulates {precision}, which is many times slower than fp32")
    source = locate_model(name)
    config = load_config(source)
    refuse_t5_fp16(config, name, precision)  # also if only autocast is in fp16
    kind = quantized.choose(config, name, base_dtype, trained_dtype)
    dtype = pick_base_dtype("auto" if kind else base_dtype, config, precision)
    return _load(name, source, config, where, dtype, checkpointing, fast, image_size, kind, move), precision


def as_backbone(model: Any, processor: Any) -> Backbone:
    """Return the backbone of a BLIP or BLIP-2 model that the caller loaded with transformers. Its weights are not changed.

    processor: the BlipProcessor or Blip2Processor of the checkpoint; the backbone has a copy, which resizes images to the
    model's size. Raise InputError for another kind of object, and ModelError for a checkpoint that `load_backbone` refuses.
    """
    kinds = tuple(kind for architectures in ARCHITECTURES.values() for kind in architectures)
    if not isinstance(model, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        of_peft = "base=model.unload() for the base alone, or base=model.merge_and_unload() with the adapter of peft in it"
        fix = of_peft * hasattr(model, "merge_and_unload")
        for inner in ("_orig_mod", "module"):  # of torch.compile, and of DataParallel or DistributedDataParallel
            fix = f"base=model.{inner}" if isinstance(getattr(model, inner, None), kinds) else fix
        fix = fix or f"a name, a folder, or a model of one of the classes {names}"
        raise InputError(f"base is of type {type(model).__name__}; give {fix}")
    refuse_peft(modules_of(model))
    tokenizer, image_processor = (getattr(processor, name, None) for name in ("tokenizer", "image_processor"))
    if tokenizer is None or image_processor is None:
        raise InputError("a model of transformers needs its processor: processor=transformers.AutoProcessor.from_pretrained(…)")
    name, dtype = str(model.name_or_path) or type(model).__name__, next(model.parameters()).dtype
    _refuse(model.config, name, next((key for key, value in DTYPES.items() if value == dtype), "fp32"))
    check_vocabulary(model, tokenizer, name)
    own, image_processor = own_size(model.config, name), deepcopy(image_processor)
    fit_processor(image_processor, own, name)
    return Backbone(model, tokenizer, image_processor, name, model.device, fast=False, own_image_size=own)


def _load(
    name: str, source: str, config: PretrainedConfig, where: torch.device, dtype: str, checkpointing: bool, fast: bool,
    image_size: int, kind: str = "", move: bool = True,
) -> Backbone:  # fmt: skip
    _refuse(config, name, dtype)
    own = own_size(config, name)
    if image_size:
        check_size(image_size, config)
    size = image_size or own
    _plain_settings(config)
    weights = with_safetensors(source, name)
    with Quiet(source):
        check_sizes(_architecture(config), config, weights)
    model = _load_model(_architecture(config), weights, name, config, DTYPES[dtype], kind, where)
    tokenizer, image_processor = load_processors(source)
    add_image_token(model, tokenizer, name)
    check_vocabulary(model, tokenizer, name)
    if size != own:
        resize_positions(model, size)
    model.requires_grad_(False).eval()
    if move and not kind:  # a quantized model is on its device already
        model.to(where)
    switch.fast(model, fast)
    attached.fast(model, fast)
    if checkpointing:
        with Quiet(source):
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": partial(recompute_contexts, model)})
            model.disable_input_require_grads()  # only the reentrant kind needs them; BLIP's in-place addition fails
    before = fit_processor(image_processor, size, name)
    if size != own:
        print(f"images are resized to {size}×{size}; the positions of {name!r} are interpolated from {own}×{own}")
    elif before:
        print(f"images are resized to {size}×{size}, the size of the model {name!r}; its own processor {before}")
    return Backbone(
        model, tokenizer, image_processor, name, where, fast=fast, own_image_size=own, chose_image_size=bool(image_size)
    )


def recompute_contexts(model: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a checkpointed forward and of its recomputation, which may run in another thread."""
    forward, recompute = checkpoint_context(model)
    return forward, both(recompute, plain(is_plain()))


@contextmanager
def both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter two contexts."""
    with first, second:
        yield


def load_config(source: str) -> PretrainedConfig:
    """Return the checkpoint's configuration. Raise ModelError if there is none, or if it cannot be used."""
    try:
        with Quiet(source):
            check_config(source)
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # an untrusted file can fail anywhere in transformers
        raise ModelError(
            f"model {source!r} cannot be loaded: {first_line(error)}\n"
            "give a folder that contains config.json, or a hub name such as Salesforce/blip-image-captioning-large"
        ) from None


def locate_model(name: str) -> str:
    """Return the folder of a checkpoint, as `local_base.locate_base` finds it.

    The files of a hub name (`user/name` or `user/name@revision`) are downloaded if they are not in the cache.
    """
    return locate_base(name) or fetch(name)


def _refuse(config: PretrainedConfig, name: str, dtype: str) -> None:
    if config.model_type not in ARCHITECTURES:
        raise ModelError(unsupported_kind(config.model_type, name))
    known = [kind.__name__ for kind in ARCHITECTURES[config.model_type]]
    if config.architectures and not set(known) & set(config.architectures):
        raise ModelError(
            f"{name!r} is a {quoted(config.architectures[0])}, which has no task here; give one of {' or '.join(known)}"
        )
    if _architecture(config) is Blip2ForConditionalGeneration:
        refuse_t5_fp16(config, name, dtype)


def _architecture(config: PretrainedConfig) -> type[PreTrainedModel]:
    named = config.architectures or []
    kinds = ARCHITECTURES[config.model_type]
    return next((kind for kind in kinds if kind.__name__ in named), kinds[0])


def _plain_settings(config: PretrainedConfig) -> None:
    """Set the dropout of all parts to 0, and settings that have no effect on results to their defaults."""
    for part in [config, *(getattr(config, key, None) for key in ("text_config", "vision_config", "qformer_config"))]:
        for key, value in list(vars(part).items()) if part is not None else []:
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
        for key, value in UNREAD.items() if part is not None else ():
            if getattr(part, key, value) != value:  # a new attribute would change the digest in runs and adapters
                setattr(part, key, value)


def _load_model(
    kind: type[PreTrainedModel], source: str, name: str, config: PretrainedConfig, dtype: torch.dtype,
    width: str = "", where: torch.device | None = None,
) -> Any:  # fmt: skip
    model: Any
    report: Any
    from_pretrained: Any = partial(kind.from_pretrained, config=config, dtype=dtype)  # returns a pair when asked for its report
    stored = bool(quantized.stored_quantization(config))
    more = quantized.arguments(width, stored, skeleton_of(kind, config), dtype, where) if width else {}
    prefix = prefix_of(weight_shapes(source))
    more |= {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    restart_thread_pool()
    try:
        with Quiet(source):
            model, report = from_pretrained(
                source, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **more
            )  # fmt: skip
    except Exception as error:  # an untrusted file can fail anywhere in transformers
        if is_process_limit(error):
            raise
        raise ModelError(
            f"the weights of {name!r} cannot be loaded: {first_line(error)}\nits folder needs model.safetensors or "
            "pytorch_model.bin; download the checkpoint again"
        ) from None
    if prefix:
        vars(model).pop("_weight_conversions", None)  # otherwise save_pretrained adds the prefix again
    check_names(model, report["missing_keys"], report["unexpected_keys"], name, prefix)
    if width:
        quantized.finish(model, name, source, stored)
    return model
