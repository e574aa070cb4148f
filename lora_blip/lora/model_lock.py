"""One lock for each model, so that a change of its adapters and a batch of a `Captioner` never overlap.

A captioner holds the lock while it computes a batch. `inject`, `load_adapter`, `eject`, `merge`, `restore` and `bake` hold it
while they change the model. So each batch is computed either before the change or after it. The forward of a user's own code
holds no lock.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from lora_blip.lora.sites import modules_of

Result = TypeVar("Result")
LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()  # in the order of their creation
if hasattr(os, "register_at_fork"):  # in a forked process, a lock may be held by a thread that does not exist there
    os.register_at_fork(after_in_child=LOCKS.clear)


def lock_of(model: nn.Module) -> threading.RLock:
    """Return the lock of a model. Create it at the first call."""
    return LOCKS.setdefault(model, threading.RLock())


def changing(model: nn.Module, work: Callable[[], Result]) -> Result:
    """Return the result of `work`, which is called while the lock of a model is held.

    The locks of all models that share a module with it, such as one that contains it, are held too. They are acquired in the
    order of their creation, so two threads cannot wait for each other.
    """
    results: list[Result] = []
    while not results:
        models = related(model)

        def attempt(models: list[nn.Module] = models) -> None:
            if related(model) == models:  # otherwise another thread has created a lock meanwhile
                results.append(work())

        _holding([lock_of(each) for each in models], attempt)
    return results[0]


def _holding(locks: list[threading.RLock], work: Callable[[], None]) -> None:
    """Call `work` while the locks are held.

    Ctrl-C cannot interrupt `with lock` between the acquisition and the block. A context manager that is written in Python, such
    as ExitStack, can be interrupted there. Its lock would never be released, and other threads would wait forever.
    """
    if not locks:
        work()
        return
    with locks[0]:
        _holding(locks[1:], work)


def related(model: nn.Module) -> list[nn.Module]:
    """Return the model, and all models with a lock that share a module with it. The oldest lock comes first."""
    lock_of(model)
    own = {id(module) for module in modules_of(model).values()}
    known = [other for reference in LOCKS.keyrefs() if (other := reference()) is not None]
    return [other for other in known if other is model or any(id(module) in own for module in modules_of(other).values())]
