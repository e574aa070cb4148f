"""A model that several captioners share: one lock for its computations, and the adapters that they put on it."""

import json
import threading
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

from torch import nn

from lora_blip.lora import adapter_file, attached
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.models.loading import Backbone


class SharedBase:
    """The lock and the adapters of one model, shared by its captioners. `names` has only adapters that captioners loaded."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held while the model or its tokenizer is used
        self.names: dict[str, str] = {}  # adapter, as JSON → its name on the model

    def load(self, backbone: Backbone, adapter: Adapter) -> str:
        """Return the name of an adapter on the model. Load the adapter first if no captioner has loaded it."""
        key = json.dumps([str(adapter.path), adapter.metadata], default=str)
        with self.lock:
            present = attached.names(backbone.model)
            if self.names.get(key) not in present:
                name = next(name for n in range(1, len(present) + 2) if (name := f"captioner_{n}") not in present)
                adapter_file.load(backbone, adapter, name)
                self.names[key] = name
            return self.names[key]

    def active(self, model: nn.Module, adapter: str | None) -> AbstractContextManager[None]:
        """Return a context in which only `adapter` acts. If it is None, only adapters act that no captioner loaded."""
        if adapter is not None:
            return use_adapters(model, adapter)
        others = [name for name in attached.names(model) if name in self.names.values()]
        return disable_adapters(model, *others) if others else nullcontext()


BASES: "WeakKeyDictionary[nn.Module, SharedBase]" = WeakKeyDictionary()
LOCK = threading.Lock()


def shared(model: nn.Module) -> SharedBase:
    """Return the `SharedBase` of a model. Create it at the first call."""
    with LOCK:
        return BASES.setdefault(model, SharedBase())
