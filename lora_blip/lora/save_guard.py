"""Raise an error if `save_pretrained` is called while adapters are unmerged: the saved folder would load as the base alone.

`state_dict()` is allowed, so that training loops can keep adapters in their own checkpoints.
"""

import sys
from types import FrameType
from typing import Any

from torch import nn

from lora_blip.errors import LoRAError
from lora_blip.lora.sites import modules_of

NAME = "save_pretrained"


class SaveGuard:
    """Replaces `save_pretrained` of a model that may have adapters.

    It is a class, so that a deepcopy of the model has a guard for the copy.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for path, module in modules_of(self.model).items():
            unmerged = getattr(module._modules.get("lora"), "unmerged", ())
            if unmerged:
                refuse(unmerged, path)
        return getattr(type(self.model), NAME)(self.model, *args, **kwargs)


def guard(model: nn.Module) -> None:
    """Put a guard on every module of the model that has `save_pretrained`."""
    for module in modules_of(model).values():
        if hasattr(type(module), NAME) and NAME not in vars(module):
            vars(module)[NAME] = SaveGuard(module)


def unguard(model: nn.Module) -> None:
    """Remove the guards."""
    for module in modules_of(model).values():
        if isinstance(vars(module).get(NAME), SaveGuard):
            del vars(module)[NAME]


def refuse_inside_save_pretrained(unmerged: list[str]) -> None:
    """Raise LoRAError if there are unmerged adapters and a `save_pretrained` is among the callers.

    A larger model that contains this one has no guard, and its `save_pretrained` calls `state_dict`.
    """
    frame: FrameType | None = sys._getframe(1) if unmerged else None
    while frame is not None:
        if frame.f_code.co_name == NAME:
            refuse(unmerged)
        frame = frame.f_back


def refuse(unmerged: list[str], path: str = "") -> None:
    """Raise LoRAError for the first unmerged adapter of the module at `path`."""
    where = f" on {path!r}" if path else ""
    raise LoRAError(
        f"save_pretrained would write the adapter {unmerged[0]!r}{where} next to the base's weights, and a model that is "
        "loaded from the folder ignores it. Call lora_blip.merge(model) first, or save the adapter alone: "
        "lora_blip.save_adapter(path, model). In a Trainer of transformers: save_strategy='no', and save it after the training"
    )
