"""Read the adapter that a setting or a caller of the API names. "latest" is the newest run of the chosen task."""

from dataclasses import replace
from pathlib import Path

from lora_blip.errors import AdapterError
from lora_blip.inference.other_runs import newest_of_task
from lora_blip.lora import adapter_file
from lora_blip.lora.adapter_file import Adapter
from lora_blip.runtime import runs
from lora_blip.runtime.adapter_names import HUB_NAME
from lora_blip.runtime.setting_checks import check_scale
from lora_blip.runtime.untrusted import is_too_long
from lora_blip.tasks.registry import TASKS


def chosen_adapter(name: str, scale: float = 1.0, task: str = "auto", folder: str | Path = runs.RUNS) -> Adapter | None:
    """Return the adapter that a setting names, with its scale, or None if it is "none" or empty.

    folder: the folder that is searched for "latest". Raise AdapterError as `given_adapter` does.
    """
    return None if name in ("", "none") else given_adapter(name, scale, task, folder)


def given_adapter(
    adapter: str | Path | Adapter | None, scale: float, task: str, folder: str | Path = runs.RUNS
) -> Adapter | None:
    """Return the adapter that a caller of the API gives, with its scale.

    Raise AdapterError if there is none at a path, or if "latest" is of another task than `task`.
    """
    content = adapter if adapter is None or isinstance(adapter, Adapter) else read_adapter(adapter, task, folder)
    own = str(content.task.get("name", task)) if content else task
    if content and adapter == "latest" and task in TASKS and own != task:
        run = str(content.path.parent)
        raise AdapterError(
            f"no run in {str(folder)!r} is of the task {task}; train one with TASK = {task!r} (--task {task}), or give the "
            f'path of an adapter. The newest run is of the task {own}: {run!r}; to use it for {own}, set TASK = "auto" '
            f"(--task auto; in Python: lora_blip.Captioner.from_adapter({run!r}))"
        )
    return content and replace(content, scale=content.scale * check_scale(scale))


def read_adapter(adapter: str | Path, task: str = "auto", folder: str | Path = runs.RUNS) -> Adapter:
    """Return the adapter at a path. "latest" is the newest run of the task, or without such a run the newest of all.

    Raise AdapterError if there is none. If the path looks like a base, the message gives the call that loads a base.
    """
    try:
        of_task = newest_of_task(task, folder, skip_unreadable=False) if adapter == "latest" and task != "auto" else ""
        return adapter_file.read(runs.locate(of_task or adapter, folder))
    except AdapterError as error:
        if not isinstance(adapter, str | Path) or is_too_long(str(adapter)):
            raise
        looks_like_base = (Path(adapter) / "config.json").is_file() or HUB_NAME.fullmatch(str(adapter))
        if not looks_like_base or Path(adapter).is_file() or Path(adapter).parent == runs.RUNS or runs.is_run(Path(adapter)):
            raise
        raise AdapterError(f"{error}. If it is a base: lora_blip.Captioner.from_adapter(None, base={str(adapter)!r})") from None
