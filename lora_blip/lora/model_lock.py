"""One lock for each model, so that a change of its adapters and a batch of a `Captioner` never overlap.

A captioner holds the lock while it computes a batch. `inject`, `load_adapter`, `eject`, `merge`, `restore` and `bake` hold it
while they change the model. So each batch is computed either before the change or after it. The forward of a user's own code
holds no lock.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from lora_blip.lora.sites import modules_of

LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()  # in the order of their creation
if hasattr(os, "register_at_fork"):  # in a forked process, a lock may be held by a thread that does not exist there
    os.register_at_fork(after_in_child=LOCKS.clear)


def lock_of(model: nn.Module) -> threading.RLock:
    """Return the lock of a model. Create it at the first call."""
    return LOCKS.setdefault(model, threading.RLock())


@contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """Hold the lock of a model. Also hold the locks of all models that share a module with it, such as one that contains it.

    The locks are acquired in the order of their creation, so two threads cannot wait for each other.
    """
    while True:
        models = related(model)
        with ExitStack() as held:
            for each in models:
                held.enter_context(lock_of(each))
            if related(model) == models:  # otherwise another thread has created a lock meanwhile
                yield
                return


def related(model: nn.Module) -> list[nn.Module]:
    """Return the model, and all models with a lock that share a module with it. The oldest lock comes first."""
    lock_of(model)
    own = {id(module) for module in modules_of(model).values()}
    known = [other for reference in LOCKS.keyrefs() if (other := reference()) is not None]
    return [other for other in known if other is model or any(id(module) in own for module in modules_of(other).values())]
