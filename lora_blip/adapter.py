"""The adapter file: one .safetensors that stands alone, and what it refuses.

Tensors: `<address>.lora_A` (r, in) and `<address>.lora_B` (rows, r), float32. Header: JSON under
"lora_blip" with the ranks, the task, the base and samples of its weights, versions and the training's
summary. Nothing that is read or written here can run code.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import save as serialise
from torch import Tensor, nn

import lora_blip
from lora_blip import lora
from lora_blip.files import write_whole
from lora_blip.fingerprint import is_sample, same_weights, sample, sampled
from lora_blip.lora import LoRA
from lora_blip.models import Backbone
from lora_blip.sites import Site, is_linear

FORMAT_VERSION = 1
FILE_NAME = "adapter.safetensors"
RUNS = Path("lora_blip_output")


class AdapterError(ValueError):
    """An adapter that is not there, is damaged, or does not fit its base; the message names the module and the remedy."""


@dataclass(frozen=True)
class Adapter:
    """What a file holds, before it meets a model."""

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def sites(self) -> list[Site]:
        return [_site(self.path, address, entry) for address, entry in self.about["lora"]["modules"].items()]

    @property
    def base(self) -> str:
        return self.about["base"]["name"]

    @property
    def task(self) -> dict[str, Any]:
        return self.about["task"]


# ---------------------------------------------------------------- save


def save(
    path: str | Path,
    backbone: Backbone | nn.Module,
    name: str = "default",
    task: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    merge_drift: dict[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write adapter `name` of a model to `path`, whole or not at all (a temporary file, synced, then renamed).

    Raises AdapterError when there is no such adapter, when it has learned nothing (every B is zero) or is
    not finite, and when the file exists and `overwrite` is false.
    """
    model, path = _model(backbone), Path(path)
    if path.exists() and not overwrite:
        raise AdapterError(f"{path} exists already; give another name, or overwrite=True")
    found = lora.adapters(model, name)
    if not found:
        raise AdapterError(f"the model carries no adapter {name!r}; it has {lora.names(model) or 'none'}")
    tensors = {key: value for address, x in found.items() for key, value in _tensors(address, x).items()}
    _check_values(path, tensors)
    about = {
        "format_version": FORMAT_VERSION,
        "lora": {
            "dropout": next(iter(found.values())).dropout,
            "modules": {address: _entry(x.site) for address, x in found.items()},
        },
        "base": {
            "name": backbone.name if isinstance(backbone, Backbone) else str(getattr(model, "name_or_path", "")),
            "architecture": type(model).__name__,
            "samples": {path: sample(model.get_submodule(path)) for path in sampled(model, found.values())},
        },
        "task": task or {},
        "training": training or {},
        "merge_drift": merge_drift or {},
        "versions": {"lora_blip": lora_blip.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_whole(path, serialise(tensors, {"lora_blip": json.dumps(about)}))
    return path


def _tensors(address: str, x: LoRA) -> dict[str, Tensor]:
    halves = {f"{address}.lora_A": x.A, f"{address}.lora_B": x.B}
    return {key: half.detach().float().cpu().contiguous() for key, half in halves.items()}


def _entry(site: Site) -> dict[str, Any]:
    entry: dict[str, Any] = {"module": site.module, "r": site.r, "alpha": site.alpha}
    return entry | ({"block": site.block, "rows": list(site.rows)} if site.rows else {})


# ---------------------------------------------------------------- read


def read(path: str | Path) -> Adapter:
    """Read a file and check it against itself: header, keys, ranks, values. AdapterError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"adapter {str(path)!r} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("lora_blip")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is no whole .safetensors file ({error}); copy it again") from None
    if header is None:
        raise AdapterError(f"{path} was not written by lora_blip: its header has no 'lora_blip' entry")
    adapter = Adapter(path, tensors, _header(path, header))
    _check_keys(adapter)
    _check_values(path, tensors)
    return adapter


def _header(path: Path, header: str) -> dict[str, Any]:
    try:
        about = json.loads(header)
        version = about["format_version"]
        modules, base = about["lora"]["modules"], about["base"]
        sound = isinstance(version, int) and isinstance(modules, dict) and bool(modules) and isinstance(about["task"], dict)
        sound = sound and isinstance(base["name"], str) and all(is_sample(s) for s in base["samples"].values())
        sound = sound and all(entry["module"] in base["samples"] for entry in modules.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise AdapterError(f"{path}: its header cannot be understood; copy the file again, or train it again")
    if version > FORMAT_VERSION:
        raise AdapterError(f"{path} has format {version}, and this lora_blip knows up to {FORMAT_VERSION}; upgrade lora_blip")
    return about


def _site(path: Path, address: str, entry: Any) -> Site:
    try:
        rows = tuple(int(row) for row in entry["rows"]) if "rows" in entry else None
        site = Site(str(entry["module"]), int(entry["r"]), float(entry["alpha"]), str(entry.get("block", "")), rows)  # type: ignore[arg-type]
        sound = math.isfinite(site.alpha) and site.r > 0 and (rows is None or len(rows) == 2)
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise AdapterError(
            f"{path}: the header's entry for {address!r} cannot be understood; train the adapter again"
        ) from None
    if site.address != address:
        raise AdapterError(f"{path}: the header's entry for {address!r} speaks of {site.address!r}; train the adapter again")
    return site


def _check_keys(adapter: Adapter) -> None:
    expected = {f"{site.address}.lora_{half}": site for site in adapter.sites for half in "AB"}
    missing, extra = sorted(expected.keys() - adapter.tensors.keys()), sorted(adapter.tensors.keys() - expected.keys())
    if missing:
        raise AdapterError(
            f"{adapter.path} is incomplete: {missing[0]!r} is missing ({len(missing)} of {len(expected)} tensors are); "
            "copy the file again, or train it again"
        )
    if extra:
        raise AdapterError(
            f"{adapter.path}: {extra[0]!r} belongs to no module of its header ({len(extra)} such); train it again"
        )
    for key, site in expected.items():
        tensor = adapter.tensors[key]
        if tensor.ndim != 2 or tensor.shape[key.endswith("B")] != site.r or tensor.dtype != torch.float32:
            raise AdapterError(
                f"{adapter.path}: {key!r} is {tuple(tensor.shape)} {tensor.dtype}, and r={site.r} in float32 was promised; "
                "train it again"
            )


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {key!r} holds NaN or infinity; the training diverged: lower lr, or use bf16 or fp32")
    if not any(tensor.any() for key, tensor in tensors.items() if key.endswith(".lora_B")):
        raise AdapterError(f"{path}: every lora_B is zero, so the adapter does nothing; it was saved before it was trained")


# ---------------------------------------------------------------- load


def load(backbone: Backbone | nn.Module, path: str | Path | Adapter, name: str = "default") -> Adapter:
    """Put the adapter of a file, or one that `read` gave, on a frozen backbone by hooks; `lora.merge` then writes it in.

    Raises AdapterError, before the model is touched, if the file is damaged or was trained on another base.
    """
    model, adapter = _model(backbone), path if isinstance(path, Adapter) else read(path)
    if lora.adapters(model, name):
        raise AdapterError(f"the model already carries an adapter {name!r}; eject it, or load this one under another name")
    _check_fit(model, adapter)
    for address, x in lora.inject(model, adapter.sites, _dropout(adapter), name).items():
        x.A.data.copy_(adapter.tensors[f"{address}.lora_A"])
        x.B.data.copy_(adapter.tensors[f"{address}.lora_B"])
    return adapter


def _dropout(adapter: Adapter) -> float:
    dropout = adapter.about["lora"].get("dropout", 0.0)
    return float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0


def _check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Every module is there, of the right shape, with the base's own weights."""
    modules = dict(model.named_modules())
    remedy = f"the adapter was trained on {adapter.base!r}; load that base"
    for site in adapter.sites:
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise AdapterError(f"{adapter.path}: this model has no linear {site.module!r}; {remedy}")
        start, stop = site.rows or (0, linear.out_features)
        for half, shape in (("A", (site.r, linear.in_features)), ("B", (stop - start, site.r))):
            found = tuple(adapter.tensors[f"{site.address}.lora_{half}"].shape)
            if found != shape or stop > linear.out_features:
                raise AdapterError(
                    f"{adapter.path}: lora_{half} of {site.address!r} is {found}, and this model's takes {shape}; {remedy}"
                )
    for path, expected in adapter.about["base"]["samples"].items():
        if path not in modules or not is_linear(modules[path]):
            raise AdapterError(f"{adapter.path}: this model has no linear {path!r}; {remedy}")
        if not same_weights(expected, sample(modules[path])):
            raise AdapterError(f"{adapter.path}: the weights of {path!r} are not those it was trained on; {remedy}")


def locate(adapter: str | Path) -> Path:
    """A file; or the newest adapter in a folder; "latest" is the newest of all runs in lora_blip_output."""
    path = RUNS if adapter == "latest" else Path(adapter)
    if path.is_dir():
        found = sorted(path.rglob(FILE_NAME), key=lambda p: p.stat().st_mtime)
        if found:
            return found[-1]
    if path.is_file():
        return path
    raise AdapterError(f"no adapter at {str(path)!r}; train one with train.py, or give the path of an {FILE_NAME}")


def _model(backbone: Backbone | nn.Module) -> Any:
    return backbone.model if isinstance(backbone, Backbone) else backbone
