"""`lora-blip inspect ADAPTER [OTHER]`: what is in an adapter, and how much it changes its base. torch is imported late."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lora_blip.errors import ConfigError
from lora_blip.models.local_base import locate_base
from lora_blip.runtime import runs
from lora_blip.runtime.files import refuse_unwritable, unused_path
from lora_blip.runtime.settings import argument, setting
from lora_blip.runtime.untrusted import printable

FILE_NAME = "inspect.html"


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """All settings of `inspect`."""

    adapters: list[str] = argument(
        'an adapter file, a run folder or "latest"; a second one is compared with it', "ADAPTER", True
    )
    model: str = setting(
        "", 'hub name or folder of the base; empty: that of the adapter, if it is on this machine; "none": without the base'
    )
    output_dir: str = setting("", "folder of inspect.html; empty: a new folder in lora_blip_output")
    all: bool = setting(False, "print every module; False: those with the largest and the smallest updates")

    def __post_init__(self) -> None:
        if not 1 <= len(self.adapters) <= 2:
            raise ConfigError(
                f"{len(self.adapters)} adapters are given; give one, or two to compare: lora-blip inspect RUN OTHER_RUN"
            )


def check_paths(config: InspectConfig) -> None:
    """Raise LoraBlipError if there is no adapter or base at the given paths, or if the page cannot be written."""
    for adapter in config.adapters:
        runs.locate(adapter)
    if config.model not in ("", "none"):
        locate_base(config.model)
    if config.output_dir and (Path(config.output_dir) / FILE_NAME).exists():
        raise ConfigError(
            f"{Path(config.output_dir) / FILE_NAME} exists already; give another folder, or no --output-dir for a new one"
        )
    refuse_unwritable(config.output_dir or str(runs.RUNS))


def inspect(config: InspectConfig) -> None:
    """Measure the adapters, print a table, and write inspect.html. Raise LoraBlipError if an adapter cannot be read."""
    from lora_blip.inspection.description import describe
    from lora_blip.inspection.measurement import base_of, compare, measure
    from lora_blip.inspection.terminal import printed
    from lora_blip.lora import adapter_file
    from lora_blip.lora.formula import other_formula
    from lora_blip.reports import inspection

    adapters = [adapter_file.read(runs.locate(path)) for path in config.adapters]
    views, notes = [], list[str]()
    for adapter in adapters:
        weights, note = base_of(adapter, config.model)
        notes += [adapter.note] * bool(adapter.note)
        formula = other_formula(adapter.variant)
        notes += [each for each in (note, formula and f"wrong numbers: {formula}") if each and each not in notes]
        views.append(inspection.AdapterView(str(adapter.path), describe(adapter), measure(adapter, weights)))
    pairs, alone = compare(*adapters) if len(adapters) == 2 else ([], [])
    page = inspection.Inspection(views, notes, pairs, alone)
    print(printed(page, config.all), flush=True)
    folder = (
        Path(config.output_dir) if config.output_dir else unused_path(runs.RUNS / f"inspection_{datetime.now():%Y%m%d_%H%M%S}")
    )
    path = inspection.write(folder / FILE_NAME, page)
    print(printable(f"the page with all of it: {path}"), flush=True)
