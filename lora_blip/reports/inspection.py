"""Write inspect.html, one page without external files: what is in an adapter, and how much it changes its base.

This module prepares the data. The template inspect.html contains the layout and the script; the colours and the basic functions
are those of report.html.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_blip.reports.report import MARKER, breakable, facts_html, json_html, policy, warnings_html
from lora_blip.reports.score_table import escaped
from lora_blip.runtime.files import write_whole
from lora_blip.version import __version__

TEMPLATE, REPORT = (Path(__file__).with_name(name) for name in ("inspect.html", "report.html"))
SHARED = re.compile(r"/\* inspect\.html has the same \w+, .*?\*/\n(.*?)/\* end of the (\w+) of inspect\.html \*/", re.DOTALL)
FIGURES = 6  # significant digits of the numbers on the page


@dataclass(frozen=True)
class ModuleView:
    """The measures of one update. None: it needs the base, which was not read."""

    address: str  # the path of the linear, with ".q" for a block of its output features
    part: str  # "ViT", "text" …
    group: str  # the path up to the number of the layer: modules of one group are drawn as one map
    layer: int
    kind: str  # the path after the number of the layer
    r: int
    alpha: float
    shape: tuple[int, int]  # (output features, input features) of ΔW
    singular_values: list[float]  # largest first
    effective_rank: float
    norm: float  # ‖ΔW‖_F
    relative_norm: float | None  # ‖ΔW‖_F / ‖W‖_F
    intruders: int | None
    amplification: float | None
    magnitudes: int = 0  # of DoRA: one for each output feature

    @property
    def parameters(self) -> int:
        return self.r * sum(self.shape) + self.magnitudes


@dataclass(frozen=True)
class AdapterView:
    """An adapter: its path, what its header says in words, and its modules."""

    path: str
    facts: dict[str, str]
    modules: list[ModuleView]


@dataclass(frozen=True)
class PairView:
    """The subspace similarity φ of a module that two adapters have."""

    address: str
    rows: int  # directions of the first adapter
    columns: int  # directions of the second adapter
    phi: str  # φ from 0 to 1 as bytes from 0 to 255, row by row, in base64
    first: float  # φ of the strongest directions, φ(1, 1)
    all: float  # φ of all directions
    chance: float  # what two random subspaces of this size would have on average


@dataclass(frozen=True)
class PartView:
    """A part of the model with its share of the update."""

    name: str
    modules: int
    parameters: int
    share: float  # of the sum of ‖ΔW‖² over all modules


@dataclass(frozen=True)
class Inspection:
    """Everything on the page."""

    adapters: Sequence[AdapterView]  # one, or two that are compared
    notes: Sequence[str] = ()  # what is left out, and why
    pairs: Sequence[PairView] = ()
    alone: Sequence[str] = ()  # modules that cannot be compared, with the reason


def parts_of(modules: Sequence[ModuleView]) -> list[PartView]:
    """Return the parts in the order of the modules, with their shares of Σ ‖ΔW‖²."""
    total = sum(module.norm**2 for module in modules) or 1.0
    parts = []
    for name in dict.fromkeys(module.part for module in modules):
        own = [module for module in modules if module.part == name]
        share = sum(module.norm**2 for module in own) / total
        parts.append(PartView(name, len(own), sum(module.parameters for module in own), share))
    return parts


def write(path: Path, inspection: Inspection) -> Path:
    """Write the page to `path` and return the path. The page needs no network."""
    shared = {kind: text for text, kind in SHARED.findall(REPORT.read_text(encoding="utf-8"))}
    page = TEMPLATE.read_text(encoding="utf-8")
    for kind, text in shared.items():
        page = page.replace(f"/* the {kind} of report.html */", text)
    names = [short_name(view.path) for view in inspection.adapters]
    title = " and ".join(names)
    several = len(names) > 1
    facts = [
        facts_html({"file": view.path} | view.facts, f"Adapter {'AB'[number]}" if several else "This adapter", f"f{number}")
        for number, view in enumerate(inspection.adapters)
    ]
    parts = {
        "policy": escaped(policy(page)),
        "title": escaped(title),
        "heading": " and ".join(map(breakable, names)) if several else breakable(title),
        "notes": warnings_html(inspection.notes, "Not everything was measured"),
        "facts": "".join(facts),
        "version": escaped(__version__),
        "data": json_html(page_data(inspection, names)),
    }
    filled = MARKER.sub(lambda marker: parts[marker[1]], page)  # in one pass, so that a marker in a text is not replaced
    write_whole(path, filled.encode("utf-8", "replace"))
    return path


def short_name(path: str) -> str:
    """Return the name of a run for adapter.safetensors or best.safetensors in its folder, and the name of another file."""
    file = Path(path)
    return file.parent.name if file.name in ("adapter.safetensors", "best.safetensors") and file.parent.name else file.name


def page_data(inspection: Inspection, names: list[str]) -> dict[str, Any]:
    """Return what the script of the page reads."""
    adapters = [
        {
            "name": name,
            "modules": [rounded(asdict(module) | {"parameters": module.parameters}) for module in view.modules],
            "parts": [rounded(asdict(part)) for part in parts_of(view.modules)],
        }
        for name, view in zip(names, inspection.adapters, strict=True)
    ]
    return {
        "adapters": adapters,
        "pairs": [rounded(asdict(pair)) for pair in inspection.pairs],
        "alone": list(inspection.alone),
    }


def rounded(value: Any) -> Any:
    """Return a value with its floats rounded to FIGURES significant digits, in lists and objects too."""
    if isinstance(value, float):
        return float(f"{value:.{FIGURES}g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
