"""Messages about an adapter of another task, with the newest run of the right task, and about a base that was moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_blip.errors import LoraBlipError, MissingBaseError
from lora_blip.inference.arguments import VERBS
from lora_blip.lora import adapter_file
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.peft_config import TASK_OF
from lora_blip.runtime import runs
from lora_blip.runtime.system_errors import quoted_for_shell

SEARCHED = 100  # largest number of runs whose adapters are read


def newest_of_task(task: str, folder: str | Path = runs.RUNS, skip_unreadable: bool = True) -> str:
    """Return the newest run in `folder` whose adapter has this task, or "" if the SEARCHED newest have none.

    As for "latest", the run has ended, or was stopped with its progress saved. A run that still trains is left out.
    skip_unreadable: leave out runs that cannot be read. If False, return such a run, because it may be of this task.
    """
    for run in runs.newest_runs(folder, [runs.ADAPTER_NAME])[:SEARCHED]:
        try:
            if adapter_file.read(runs.locate(run)).task.get("name") == task:
                return str(run)
        except LoraBlipError:
            if not skip_unreadable:
                return str(run)
    return ""


def advice(task: str, given: str, adapter: Adapter | None, folder: str | Path = runs.RUNS) -> str:
    """Return what to append to a message if the inputs are those of this task, and the settings are not; "" if nothing helps.

    If the adapter that was `given` has this task, the setting TASK is at fault. Otherwise, name the adapter if `given` is
    "latest", and the newest run of the task.
    """
    own = adapter.task.get("name") if adapter else None
    if adapter and own == task:
        return f'. The adapter {adapter.path} {VERBS[task]}: set TASK = "auto" (--task auto)'
    named = f'"latest" is {adapter.path.parent}, which {VERBS[own]}' if adapter and own in VERBS and given == "latest" else ""
    run = newest_of_task(task, folder)
    other = f"the newest run that {VERBS[task]}: --adapter {quoted_for_shell(run)}" if run else ""
    return "".join(f". {part[0].upper()}{part[1:]}" for part in (named, other) if part)


def other_task_warning(task: str, architecture: str, adapter: Adapter | None) -> str:
    """Return a warning if the adapter was not trained for the task, or if there is none and the base was not; otherwise "".

    A BLIP-2 captions and answers questions, so its base was trained for both. An adapter of peft may name no task.
    """
    own = adapter.task.get("name") if adapter else None
    if own == task:
        return ""
    base_task = TASK_OF.get(architecture, task)
    trained = [f"the adapter {adapter.path} was trained for the task {own}"] if adapter and own else []
    trained += [f"the base is a {architecture}, which is trained for the task {base_task}"] * (base_task != task)
    if not trained:
        return ""
    result = "may mean nothing" if base_task != task else "may be worse than those of the base alone"
    fix = f"give an adapter of the task {task} (--adapter), or train one (--task {task})"
    return f"warning: the task is {task}, but {' and '.join(trained)}: the predictions {result}; {fix}"


@contextmanager
def base_named_by(adapter: Adapter | None) -> Iterator[None]:
    """Add to an error about a missing base that this adapter names it, and how to give its new path."""
    try:
        yield
    except MissingBaseError as error:
        if adapter is None:
            raise
        moved = "if this base was moved, give its new path: --model PATH (in Python: base=PATH, or model=PATH in a config)"
        raise MissingBaseError(f"{error}\nThe adapter {adapter.path} was trained on {adapter.base!r}; {moved}") from None
