"""`lora-blip convert ADAPTER --to peft|lora_blip`: write an adapter in another format. torch is imported late."""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_blip.conversion.base import check_base, open_base, weight_of
from lora_blip.errors import AdapterError, ConfigError
from lora_blip.models.local_base import locate_base
from lora_blip.runtime import runs
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import refuse_full, refuse_unwritable, write_whole
from lora_blip.runtime.setting_checks import TASK_NAMES
from lora_blip.runtime.settings import argument, check, require, setting
from lora_blip.runtime.untrusted import printable, quoted

if TYPE_CHECKING:
    from lora_blip.lora.adapter_file import Adapter

CARD_NAME = "README.md"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All settings of `convert`."""

    adapter: str = argument('an adapter file, a run folder, "latest", or a folder of peft', "ADAPTER")
    to: Literal["peft", "lora_blip"] = setting("peft", "the format to write: that of peft, or that of lora_blip")
    output_dir: str = setting("", "a new folder for the files")
    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter names")
    task: str = setting("auto", '"caption", "vqa" or "retrieval", for an adapter that names no task')
    prompt: str = setting("", "the prompt of the training, for an adapter that names none")

    def __post_init__(self) -> None:
        check(self)
        require(self.task in ("auto", *TASK_NAMES), "task", self.task, f"one of auto, {', '.join(TASK_NAMES)}")
        if not self.output_dir:
            raise ConfigError(f"output_dir is empty; give a new folder: lora-blip convert {self.adapter} --output-dir FOLDER")


def check_paths(config: ConvertConfig) -> None:
    """Raise LoraBlipError if there is no adapter or base at the given paths, or if the folder cannot be written."""
    runs.locate(config.adapter)
    if config.model:
        locate_base(config.model)
    refuse_full(Path(config.output_dir))
    refuse_unwritable(config.output_dir)


def convert(config: ConvertConfig) -> None:
    """Write the adapter into a new folder, and print the path of its weights. Raise LoraBlipError if that is impossible."""
    from lora_blip.lora import adapter_file

    adapter = adapter_file.read(runs.locate(config.adapter))
    if config.model and (weights := open_base(config.model)):
        check_base(adapter, weights)
    adapter = completed(adapter, config)
    for line in (adapter.note, *notes(adapter, config)):
        print(f"note: {printable(line)}\n" if line else "", end="")
    folder = Path(config.output_dir)
    path = write_peft(folder, adapter) if config.to == "peft" else write_own(folder, adapter)
    print(printable(f"wrote {path}, {counted(len(adapter.sites), 'module')}"), flush=True)


def completed(adapter: "Adapter", config: ConvertConfig) -> "Adapter":
    """Return the adapter with the base, the task and the prompt of the settings.

    Raise AdapterError if its modules are of another model, if it names no base, or if a file of lora_blip would have no task.
    """
    from lora_blip.lora.peft_names import PARTS

    base, task = dict(adapter.metadata["base"]), dict(adapter.task)
    other = next((site.module for site in adapter.sites if not site.module.startswith(PARTS)), "")
    if other:
        name = f", which was trained on {quoted(adapter.base)}," if adapter.base else ""
        raise AdapterError(
            f"{adapter.path}: its linear {quoted(other)}{name} is not part of BLIP or BLIP-2; give another adapter"
        )
    base["name"] = config.model or base["name"]
    if not base["name"]:
        raise AdapterError(f"{adapter.path} names no base; give it: --model Salesforce/blip-image-captioning-base")
    task |= {"name": config.task} if config.task != "auto" else {}
    task |= {"prompt": config.prompt} if config.prompt else {}
    if config.to == "lora_blip" and "name" not in task:
        raise AdapterError(f"{adapter.path} names no task, and its base has several; give it: --task caption, or --task vqa")
    return replace(adapter, metadata=adapter.metadata | {"base": base, "task": task})


def notes(adapter: "Adapter", config: ConvertConfig) -> list[str]:
    """Return what another program may not read, as lines."""
    lines = []
    if config.to == "peft":
        if len({site.scale for site in adapter.sites}) > 1:
            lines.append("its linears have different scales (alpha / r). peft reads them, and vLLM uses one scale for all")
        if adapter.variant == "dora":
            lines.append("its variant is DoRA. peft reads it, and vLLM refuses it")
    return lines


def write_peft(folder: Path, adapter: "Adapter") -> Path:
    """Write the adapter in the format of peft, with a model card. Return the path of the weights."""
    from safetensors.torch import save

    from lora_blip.conversion.card import card
    from lora_blip.lora import peft_writer
    from lora_blip.lora.header import HeaderError

    base = cache(partial(open_base, adapter.base))  # opened once, and only if a linear needs it
    try:
        updates = peft_writer.updates_of(
            adapter.sites, adapter.tensors, lambda module: weight_of(adapter, module, weights) if (weights := base()) else None
        )
    except HeaderError as error:
        raise AdapterError(f"{adapter.path}: {error}") from None
    tensors, metadata, settings = peft_writer.written(adapter.metadata, adapter.sites, updates)
    path = folder / runs.PEFT_WEIGHTS
    write_whole(path, save(tensors, metadata))
    write_whole(folder / CARD_NAME, card(adapter, max(update.r for update in updates), folder).encode())
    write_whole(folder / runs.PEFT_CONFIG, settings.encode())  # last: with it, the folder is an adapter of peft
    return path


def write_own(folder: Path, adapter: "Adapter") -> Path:
    """Write the adapter as a file of lora_blip, in a folder that is then a run folder. Return the path of the file."""
    from lora_blip.lora.adapter_file import digest, write
    from lora_blip.lora.peft_format import FOREIGN

    metadata = {key: value for key, value in adapter.metadata.items() if key != FOREIGN}
    metadata["sha256"] = digest(adapter.tensors)
    path = folder / runs.ADAPTER_NAME
    write(path, adapter.tensors, metadata)
    return path
