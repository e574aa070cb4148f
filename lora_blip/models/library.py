"""Call modules of transformers with checked argument names, and suppress its messages."""

import inspect
import json
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lora_blip.errors import ModelError
from lora_blip.kernels.signatures import version_of
from lora_blip.runtime.process_state import PROCESS_STATE
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import printable

LONGEST_WAIT = 30.0  # seconds; the construction of a large model takes several
UNCHECKED = {"use_cache"}  # changes no result; a model may accept it in **kwargs and pass it to its language model


def call(module: Any, **named: Any) -> Any:
    """Return module(**named). Raise ModelError if one of these arguments is not in the signature of the module's `forward`.

    Without this check, the `**kwargs` of transformers accept a name that it has changed, and ignore the value.
    """
    kind = type(module)
    if torch.compiler.is_compiling():  # checked before: the first batch runs uncompiled
        return module(**named)
    if missing := named.keys() - arguments_of(kind.forward) - UNCHECKED:
        raise ModelError(
            f"{kind.__name__} of {version_of(kind)} has no argument {min(missing)!r}; install a version that lora_blip is "
            "tested with: pip install 'transformers>=5.20,<5.25'"
        )
    return module(**named)


def write_processor(folder: str) -> str:
    """Return how to write the tokenizer and the image processor of a base into a folder of weights."""
    code = (
        "from transformers import AutoProcessor; "
        f'AutoProcessor.from_pretrained("BASE").save_pretrained({json.dumps(folder, ensure_ascii=False)})'
    )
    return f"write those of its base into the folder: python -c {quoted_for_shell(code)}"


@cache
def arguments_of(method: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a method's parameters, without those that `*args` and `**kwargs` accept."""
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    return frozenset(name for name, one in inspect.signature(method).parameters.items() if one.kind not in kinds)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, safe to print although it may quote an untrusted file."""
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)


def wait_for_other_loads() -> None:
    """Wait until no thread of the caller is inside `from_pretrained` of transformers, which turns `tie_weights` off meanwhile.

    Raise ModelError after LONGEST_WAIT seconds: if two threads were inside at the same time, it stays off.
    """
    until = time.monotonic() + LONGEST_WAIT
    while getattr(PreTrainedModel.tie_weights, "__name__", "") == "empty_func":  # the stub in transformers.initialization
        if time.monotonic() > until:
            raise ModelError(
                "two threads of this program have called from_pretrained of transformers at the same time, so it ties no "
                "weights any more: start the program again, and load models one after the other"
            )
        time.sleep(0.01)


class Quiet(warnings.catch_warnings):
    """Suppress transformers' warnings while a checkpoint is loaded. Only a download shows progress bars.

    One thread at a time is in such a block (see `runtime.process_state`).
    """

    depth = 0  # blocks of the current thread

    def __init__(self, source: str) -> None:
        super().__init__(record=False)
        self.local = Path(source).is_dir()

    def __enter__(self) -> None:
        PROCESS_STATE.acquire()
        try:
            if not Quiet.depth:
                wait_for_other_loads()
        except ModelError:
            PROCESS_STATE.release()
            raise
        Quiet.depth += 1
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        if self.local:
            transformers_logging.disable_progress_bar()

    def __exit__(self, *error: Any) -> None:
        try:
            transformers_logging.set_verbosity(self.level)
            if self.bars:
                transformers_logging.enable_progress_bar()
            super().__exit__(*error)
        finally:
            Quiet.depth -= 1
            PROCESS_STATE.release()
