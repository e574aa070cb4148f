"""Share one model between several captioners: one lock for its computations, and the adapters that they load."""

import itertools
import json
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from lora_blip.config import InferConfig
from lora_blip.errors import InputError, LoRAError, ModelError
from lora_blip.lora import adapter_file, attached, injection
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.model_lock import Result, changing, lock_of
from lora_blip.lora.routing import use_adapters
from lora_blip.lora.sites import quantization
from lora_blip.models.forked import restart_thread_pool
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import DTYPES, dtype_of


@dataclass(eq=False)
class SharedAdapter:
    """An adapter that captioners loaded on a model. It stays on the model as long as one of them refers to this object."""

    name: str


HALVES = ("fp16", "bf16")
MERGED = (
    "an adapter is merged into the base that this captioner uses; call lora_blip.restore(backbone) first, or open the "
    "captioner on another base"
)
NUMBERS = itertools.count(1)  # for the names of adapters; a name is never used again, because an old captioner may refer to it
OPEN_AGAIN = "open it in each process, after a fork (gunicorn: without --preload; ProcessPoolExecutor: in `initializer`)"


class SharedBase:
    """The lock of one model, and the adapters that its captioners loaded. All captioners of the model share it."""

    def __init__(self, lock: threading.RLock) -> None:
        """lock: the lock of the model. `inject`, `eject` and the other functions that change its adapters hold it too."""
        self._lock, self._process = lock, os.getpid()
        self.names: dict[str, str] = {}  # adapter, as JSON → its name on the model
        # key of `names` → adapter; an entry disappears when its last captioner is deleted
        self.in_use: WeakValueDictionary[str, SharedAdapter] = WeakValueDictionary()

    def __reduce__(self) -> NoReturn:
        """Raise ModelError if a captioner or its base is pickled or copied, for example to send it to another process."""
        raise ModelError(f"a captioner cannot be sent to another process or copied; {OPEN_AGAIN}")

    @property
    def lock(self) -> threading.RLock:
        """Return the lock that is held while the model or its tokenizer is used.

        Raise ModelError in a process that was forked since: it has none of PyTorch's threads, so a prediction can wait forever.
        """
        if os.getpid() != self._process:
            raise ModelError(
                "this captioner or its base was opened before a fork, and PyTorch's threads do not survive a fork; "
                + OPEN_AGAIN
            )
        return self._lock

    def changing(self, model: nn.Module, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, which is called while the locks of `changing` are held.

        Raise ModelError in a forked process.
        """
        _ = self.lock  # raises the error
        return changing(model, work)

    def load(self, backbone: Backbone, adapter: Adapter) -> SharedAdapter:
        """Load an adapter on the model, unless a captioner has already loaded it. Eject adapters whose captioners are deleted.

        The adapter is active only in calls of captioners. The caller's parameters keep their `requires_grad`.
        Raise LoRAError if an adapter is merged into the model.
        """
        key = json.dumps([adapter_file.digest(adapter.tensors), adapter.metadata, adapter.scale], default=str)
        model = backbone.model

        def change() -> SharedAdapter:
            if attached.has_merged(model):
                raise LoRAError(MERGED)
            in_use = self.in_use.get(key)  # this reference keeps the entry in `self.in_use`
            for unused in [other for other in self.names if other not in self.in_use]:
                name = self.names.pop(unused)
                if name in attached.names(model):
                    injection.eject(model, name)
            present = attached.names(model)
            if in_use is None or len(attached.adapters(model, in_use.name)) < len(adapter.sites):
                name = next(name for n in NUMBERS if (name := f"captioner_{n}") not in present)
                adapter_file.put(backbone, adapter, name, dormant=True)
                in_use = self.in_use[key] = SharedAdapter(name)
                self.names[key] = name
            return in_use

        return self.changing(model, change)

    def active(self, model: nn.Module, adapter: str | None) -> AbstractContextManager[None]:
        """Return a context in which only `adapter` is active. If `adapter` is None, the caller's own adapters are active."""
        return nullcontext() if adapter is None else use_adapters(model, adapter)


def check_settings(backbone: Backbone, config: InferConfig) -> None:
    """Raise InputError for a device, an image size, a dtype or kernels that a base loaded by the caller does not have."""
    model = backbone.model
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"{name!r} of the loaded base has no values (it is on the meta device); load the base again, while no other "
                "thread calls from_pretrained of transformers"
            )
    kind, _, number = config.device.partition(":")
    device = next(backbone.model.parameters()).device
    if config.device != "auto" and (kind != device.type or (number and number != str(device.index or 0))):
        raise InputError(
            f"device = {config.device!r}, but the loaded base is on {device}; leave device out, or give a base on that device: "
            f"lora_blip.load_backbone(…, device={config.device!r}), or model.to({config.device!r}) for a model of transformers"
        )
    if config.image_size not in (0, backbone.image_size):
        raise InputError(
            f"image_size = {config.image_size}, but the loaded base has images of {backbone.image_size} pixels; leave "
            f"image_size out, or load the base with lora_blip.load_backbone(…, image_size={config.image_size})"
        )
    own = quantization(backbone.model) or dtype_of(backbone.model)
    if config.base_dtype not in ("auto", own):
        raise InputError(
            f"base_dtype = {config.base_dtype!r}, but the loaded base is in {own}; leave base_dtype out, or load the base with "
            f"lora_blip.load_backbone(…, dtype={config.base_dtype!r})"
        )
    weights = next(model.vision_model.parameters()).dtype
    if config.precision in HALVES and weights not in (torch.float32, DTYPES[config.precision]):
        raise InputError(
            f"precision = {config.precision!r}, but the loaded base is in {str(weights).removeprefix('torch.')}; leave "
            f"precision out, give precision='fp32', or load the base with load_backbone(…, dtype={config.precision!r})"
        )
    if backbone.fast and not config.fast:
        raise InputError(
            "fast = False, but the loaded base uses the fast kernels; leave fast out, or load the base with "
            "lora_blip.load_backbone(…, fast=False)"
        )


BASES: "WeakKeyDictionary[nn.Module, SharedBase]" = WeakKeyDictionary()
LOCK = threading.Lock()


def shared(model: nn.Module) -> SharedBase:
    """Return the `SharedBase` of a model. At the first call, wait until running changes have ended, then create it."""
    restart_thread_pool()
    if model not in BASES:
        changing(model, lambda: None)  # a change that is already running does not hold the lock that is created here
    with LOCK:
        return BASES.setdefault(model, SharedBase(lock_of(model)))
