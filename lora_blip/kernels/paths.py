"""Choose between the fast paths by a table of measured limits, `paths.json`, with one row for each processor family.

Each path equals the plain computation up to rounding. Which one is faster depends on the processor and on the sizes. So
`lora-blip tune` measures the limits. An unknown processor uses the nearest row. A run stores its row. After a resume on another
machine it takes the same paths, so that they round in the same way.

Each product reads `row()`, so it is a plain variable of this process. A run sets it by `use` before its first step.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "paths.json"  # of a table, also in the folder of a run
TABLE = Path(__file__).with_name(NAME)
CPUINFO = Path("/proc/cpuinfo")
MOST_BYTES = 2**16  # a larger file is no table
NEVER = 2**62  # a limit that no size reaches


@dataclass(frozen=True)
class PathLimits:
    """The measured limits of one processor. A path is used for sizes from its limit on."""

    processor: str  # vendor and family, such as "AuthenticAMD 25"
    onednn: int  # multiplications of a float32 product, with `linear.ROWS_OF_WEIGHT` more rows, from which oneDNN is faster
    onednn_narrow: int  # the same for the products with A and B, which have a short side
    fused: int  # multiplications of the frozen product, from which `lora.fused` is faster than its `short_update`
    gelu_bytes: int  # bytes of a GELU's output, from which the backward pass computes it again to save memory
    fused_16bit: int  # scores of a 16-bit attention, from which PyTorch's fused kernel is faster than separate operations
    by_heads: int  # scores of a 16-bit attention of a ViT, from which `vit.by_heads` is faster than `sdpa.attend`

    def selection(self) -> str:
        """Return the fast paths that a run with these limits takes, without the limits."""
        paths = {
            "float32 products by oneDNN": self.onednn, "fused updates": self.fused,
            "16-bit attention by PyTorch's fused kernel": self.fused_16bit, "16-bit attention by heads": self.by_heads,
        }  # fmt: skip
        used = [f"{'large ' * (limit > 0)}{name}" for name, limit in paths.items() if limit < NEVER]
        return f"fast paths for {self.processor} (docs/fast_paths.md): {', '.join(used) or 'none'}"

    def __str__(self) -> str:
        return (
            f"fast paths by the limits of {self.processor}, in millions of multiplications: oneDNN from "
            f"{millions(self.onednn)} (with A or B {millions(self.onednn_narrow)}), fused update from "
            f"{millions(self.fused)}; 16-bit attention, in millions of scores: PyTorch's fused kernel from "
            f"{millions(self.fused_16bit)}, by heads from {millions(self.by_heads)} "
            "(docs/fast_paths.md)"
        )


def millions(limit: int) -> str:
    return "∞" if limit >= NEVER else f"{limit / 1e6:,.1f}"


def parsed(processor: str, values: Any) -> PathLimits:
    """Return a row from JSON. Raise ValueError if an entry is missing, unknown or out of range."""
    names = [entry.name for entry in fields(PathLimits) if entry.name != "processor"]
    if isinstance(values, Mapping) and values.get("separate_16bit") in (True, False):  # a row of an older version
        separate = values["separate_16bit"]
        values = {"fused_16bit": NEVER if separate else 0, **values} | ({} if separate else {"by_heads": NEVER})
        del values["separate_16bit"]
    if not isinstance(values, Mapping) or set(values) != set(names):
        raise ValueError(f"the entries of a row are {', '.join(names)}")
    for name in names:
        if type(values[name]) is not int or not 0 <= values[name] <= NEVER:
            raise ValueError(f"{name} must be an integer from 0 to {NEVER}")
    return PathLimits(processor, **values)


def as_json(row: PathLimits) -> dict[str, Any]:
    """Return the row as stored in a run: `from_json` reads it."""
    return asdict(row)


def table(*rows: PathLimits) -> bytes:
    """Return the content of a table with these rows."""
    entries = {each.processor: as_json(each) for each in rows}
    for entry in entries.values():
        del entry["processor"]
    return (json.dumps({"format": FORMAT, "rows": entries}, indent=1) + "\n").encode()


def from_json(values: Any) -> PathLimits:
    """Return the row that a run stored. Raise ValueError if it is invalid."""
    if not isinstance(values, Mapping) or not isinstance(values.get("processor"), str) or len(values["processor"]) > 80:
        raise ValueError("a row needs the name of its processor")
    return parsed(values["processor"], {name: value for name, value in values.items() if name != "processor"})


def read(path: Path) -> dict[str, PathLimits]:
    """Return the rows of a table by processor. Raise ValueError or OSError if the file is invalid."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    table = json.loads(content)
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("rows"), dict):
        raise ValueError(f"it is not a table of format {FORMAT}")
    return {name: parsed(name, values) for name, values in table["rows"].items()}


def processor() -> str:
    """Return vendor and family of this processor, such as "AuthenticAMD 25", or the machine type if they are unknown."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine() or "unknown"
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found['vendor_id']} {found['cpu family']}" if {"vendor_id", "cpu family"} <= set(found) else platform.machine()


def nearest(rows: Mapping[str, PathLimits], name: str) -> PathLimits:
    """Return the row of a processor: its own, else that of the nearest family of the same vendor, else the first row."""
    vendor, _, family = name.rpartition(" ")
    distances: dict[int, PathLimits] = {}
    for each in rows.values():
        other, _, number = each.processor.rpartition(" ")
        if other == vendor and number.isdecimal() and family.isdecimal():
            distances.setdefault(abs(int(number) - int(family)), each)
    return distances[min(distances)] if distances else next(iter(rows.values()))


def tuned_file() -> Path:
    """Return the file in the user's cache folder in which `lora-blip tune` stores the row of this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_blip" / NAME


@cache
def measured() -> PathLimits:
    """Return the row of this processor: that of `lora-blip tune`, else the nearest one of the package."""
    name = processor()
    try:
        return read(tuned_file())[name]
    except (OSError, ValueError, KeyError, RuntimeError):  # no home folder or file, or not of this machine; `tune` writes it
        return nearest(read(TABLE), name)


class Current:
    """The row that this process uses; None until it is read for the first time."""

    row: PathLimits | None = None


def row() -> PathLimits:
    """Return the row that this process uses."""
    if Current.row is None:
        Current.row = measured()
    return Current.row


def use(new: PathLimits) -> None:
    """Use another row in this process, such as that of a resumed run."""
    Current.row = new
