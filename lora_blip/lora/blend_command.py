"""`lora-blip blend A=0.7 B=0.3 --output-dir DIR`: write one adapter whose update is the weighted sum of several."""

import math
from dataclasses import dataclass
from pathlib import Path

from lora_blip.errors import ConfigError
from lora_blip.runtime import runs
from lora_blip.runtime.command_line import lora_blip_program
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import make_folder, refuse_unwritable, unused_path
from lora_blip.runtime.settings import argument, require, setting
from lora_blip.runtime.system_errors import command_line, quoted_for_shell
from lora_blip.runtime.untrusted import printable

MOST_WEIGHT = 1000.0


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """All settings of `blend`."""

    adapters: list[str] = argument("an adapter file or a run folder, = and its weight, such as RUN=0.7", "ADAPTER=WEIGHT", True)
    output_dir: str = setting("", "folder of the new adapter.safetensors")
    r: int = setting(0, "rank of each module, by truncated SVD; 0: exact, the ranks are added")

    def __post_init__(self) -> None:
        require(self.r >= 0, "r", self.r, "at least 0")
        require(self.r <= 2**16, "r", self.r, f"at most {2**16:,}")
        for text in self.adapters:
            parsed(text)
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give the folder of the new adapter: --output-dir blended")


def parsed(text: str) -> tuple[str, float]:
    """Return the path and the weight of RUN=0.7. Raise ConfigError if there is no weight, or if it is 0 or not finite."""
    path, equals, number = text.rpartition("=")
    try:
        weight = float(number) if path and equals else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < abs(weight) <= MOST_WEIGHT:  # False for NaN
        fix = quoted_for_shell(f"{path if path and equals else text}=0.5")
        raise ConfigError(f"{text!r} is not ADAPTER=WEIGHT with a weight other than 0, from -1000 to 1000; for example: {fix}")
    return path, weight


def check_paths(config: BlendConfig) -> None:
    """Raise LoraBlipError if an adapter does not exist, or if the new one cannot be written."""
    for text in config.adapters:
        runs.locate(parsed(text)[0])
    if (Path(config.output_dir) / runs.ADAPTER_NAME).exists():
        new = quoted_for_shell(str(unused_path(Path(config.output_dir))))
        file = Path(config.output_dir) / runs.ADAPTER_NAME
        raise ConfigError(f"{file} exists already; give a new folder: --output-dir {new}")
    refuse_unwritable(config.output_dir)


def blend(config: BlendConfig) -> None:
    """Read the adapters, blend them, and write the result. Raise LoraBlipError if they cannot be blended."""
    from lora_blip.lora import adapter_file, blending

    pairs = [parsed(text) for text in config.adapters]
    adapters = [adapter_file.read(runs.locate(path)) for path, _ in pairs]
    blended = blending.blend(adapters, [weight for _, weight in pairs], config.r)
    folder = Path(config.output_dir)
    make_folder(folder)
    path = blending.save(folder / runs.ADAPTER_NAME, blended)
    terms = " + ".join(f"{weight:g} · {adapter.path}" for adapter, (_, weight) in zip(adapters, pairs, strict=True))
    ranks = sorted({update.site.r for update in blended.updates})
    modules = f"{counted(len(blended.updates), 'module')}, r = {', '.join(map(str, ranks[:6]))}{' …' * (len(ranks) > 6)}"
    lines = [f"{path} = {terms}", f"{modules}; {accuracy(blended.relative_error, blended.errors, config.r)}"]
    first = adapters[0]
    if any(adapter.task != first.task for adapter in adapters if len(adapter.task) > 1):  # a file of peft has only the name
        lines.append(f"note: the adapters have different prompts or options of generation; those of {first.path} are used")
    lines.append(f"next: {command_line([*lora_blip_program(), 'inspect', config.output_dir])}")
    print(*map(printable, lines), sep="\n", flush=True)


def accuracy(error: float, errors: dict[str, tuple[float, float]], r: int) -> str:
    """Return a text with the error of the truncation, in all and of the worst module."""
    if not r:
        return "exact: the ranks are added"
    shares = {address: lost / norm for address, (lost, norm) in errors.items() if norm}
    worst = max(shares, key=lambda address: shares[address], default="")
    return f"the truncation loses {error:.2%} of ‖ΔW‖" + (f", at most {shares[worst]:.2%}, at {worst}" if worst else "")
