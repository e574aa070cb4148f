"""`lora-blip export RUN --output-dir DIR`: write base and adapter as one Hugging Face folder. torch is imported late.

The new folder is loaded with transformers alone and compared with the adapter on its base. It gets its name only if both agree.
So a folder that exists is complete and compared.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_blip.errors import ConfigError, OutputError
from lora_blip.models.local_base import locate_base
from lora_blip.runtime import runs
from lora_blip.runtime.files import make_whole, refuse_full, refuse_unwritable, room_for
from lora_blip.runtime.progress import phase
from lora_blip.runtime.settings import argument, check, require, setting
from lora_blip.runtime.untrusted import printable

if TYPE_CHECKING:
    from lora_blip.inference.export_check import Outcome, Probe
    from lora_blip.lora.adapter_file import Adapter
    from lora_blip.tasks.base import PredictionTask

GB = 2**30
SMALL = 2**26  # bytes for the tokenizer and the other small files
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RATE, START = 100 * 2**20, 10  # bytes in a second, and seconds, for the time that is printed at the start


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All settings of `export`."""

    adapter: str = argument('an adapter file, a run folder or "latest"', "ADAPTER")
    output_dir: str = setting("", "folder that is written; it must not exist, or be empty", path="always")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "dtype of the weights in the folder")
    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter was trained on")
    base_dtype: Literal["auto", "fp32", "int8", "nf4"] = setting(
        "auto", 'the base to export: "int8" or "nf4" (dequantized), or "fp32"; "auto": as in the training of the adapter'
    )
    device: str = setting("auto", '"auto", "cpu", "cuda", "cuda:1", "mps"')
    images: str = setting("", "images for the comparison: a file, a folder or a glob; empty: four drawn pictures")
    shard_gb: float = setting(5.0, "largest size of a file of weights in GB")

    def __post_init__(self) -> None:
        check(self)
        require(self.shard_gb > 0, "shard_gb", self.shard_gb, "a number above 0")
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give a folder: lora-blip export latest --output-dir my_model")


def check_paths(config: ExportConfig) -> None:
    """Raise LoraBlipError if there is no adapter or base at the given paths, or if the folder cannot be written."""
    refuse_full(Path(config.output_dir))
    refuse_unwritable(str(Path(config.output_dir).absolute().parent))
    runs.locate(config.adapter)
    if config.model:
        locate_base(config.model)


def export(config: ExportConfig) -> None:
    """Write the folder. Raise OutputError, and leave no folder, if it computes something else than the adapter on its base."""
    from lora_blip.config import InferConfig
    from lora_blip.inference import export_check, setup
    from lora_blip.inference.other_runs import base_named_by
    from lora_blip.lora import adapter_file, merging
    from lora_blip.lora.sites import quantization
    from lora_blip.models.bin_weights import with_safetensors
    from lora_blip.models.loading import load_config, locate_model
    from lora_blip.models.precision import refuse_t5_fp16
    from lora_blip.models.quantized import dequantize

    adapter, folder = adapter_file.read(runs.locate(config.adapter)), Path(config.output_dir)
    refuse_full(folder)
    name = config.model or adapter.base
    with base_named_by(None if config.model else adapter):
        source = locate_model(name)
    base_config = load_config(source)
    refuse_t5_fp16(base_config, name, {"float16": "fp16"}.get(config.dtype, "fp32"), "give --dtype bfloat16")
    announce(config, adapter, name, with_safetensors(source, name))
    inference = InferConfig(model=config.model, device=config.device, precision="fp32", base_dtype=config.base_dtype)
    task, _ = setup.open_task(inference, adapter)
    setup.apply_adapter(task, adapter, merge=False)
    probe = export_check.probe_of(task, config.images)
    with phase("predicting with the adapter on its base"):
        hooked = export_check.predict_hooked(task, probe)
    if kind := quantization(task.backbone.model):
        print(f"the weights of the base in {kind} are dequantized for the folder", flush=True)
    with phase("merging"):
        dequantize(task.backbone.model)
        merging.bake(task.backbone.model)
    with room_for(folder, OutputError, "; {first}run the command again"):
        make_whole(folder, lambda place: fill(place, config, adapter, task, base_config, hooked, probe))
    print(printable(f"exported {folder}: load it with transformers as its README.md shows"), flush=True)


def announce(config: ExportConfig, adapter: "Adapter", name: str, weights: str) -> None:
    """Print what the command does and how long it takes. Raise OutputError if the disk has too little room.

    weights: the folder of the base's safetensors.
    """
    from lora_blip.models.base_config import weight_shapes
    from lora_blip.models.quantization_config import value_count

    count = value_count(weight_shapes(weights))
    written, memory = count * BYTES[config.dtype] + SMALL, 4 * count
    folder = Path(config.output_dir).absolute()
    parent = next(path for path in folder.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if written > free:
        raise OutputError(
            f"output_dir = {config.output_dir!r}: the folder needs {written / GB:,.1f} GB, and {parent} has {free / GB:,.1f} "
            "GB; free some space, give a folder on another disk, or halve the size: --dtype bfloat16"
        )
    seconds = START + (memory + 2 * written) / RATE
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    print(
        printable(
            f"export: merges {adapter.path} into {name} and writes {config.output_dir}, {(written - SMALL) / GB:,.2f} GB in "
            f"{config.dtype}; then loads it with transformers and compares; needs {memory / GB:,.1f} GB of memory, about {time}"
        ),
        flush=True,
    )


def fill(
    place: Path, config: ExportConfig, adapter: "Adapter", task: "PredictionTask", base_config: Any, hooked: "Outcome",
    probe: "Probe",
) -> None:  # fmt: skip
    """Write the folder at a temporary place, and compare it. The merged model is then freed: two may not fit the memory."""
    from lora_blip.inference import export_check, exported_folder, model_card

    with phase("writing the folder"):
        exported_folder.write(place, task, base_config, config.dtype, config.shard_gb)
    task.backbone.model.to("meta")
    with phase("comparing the folder with the adapter on its base"):
        exported = export_check.predict_exported(place, task, probe)
        lines = export_check.compare(hooked, exported, config.dtype)
    print("".join(f"{printable(line)}\n" for line in lines), end="", flush=True)
    model_card.write(place, config, adapter, task, lines)
    with suppress(OSError):  # an empty folder: Windows cannot rename onto it
        Path(config.output_dir).rmdir()
