"""The adapter file: one .safetensors that stands alone, and what it refuses.

Tensors: `<address>.lora_A` (r, in) and `<address>.lora_B` (rows, r), float32. Header: JSON under
"lora_blip" with the ranks, the task, the base and samples of its weights, versions and the training's
summary. Nothing that is read or written here can run code.
"""

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors
import torch
import transformers
from safetensors.torch import save as serialise
from torch import Tensor, nn

from lora_blip.errors import AdapterError, LoRAError
from lora_blip.lora import attached, header, injection
from lora_blip.lora.fingerprint import same_weights, sample, samples
from lora_blip.lora.header import FORMAT_VERSION, HeaderError, sites_of
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site, check_sites, is_linear, refuse_meta
from lora_blip.runtime.files import write_whole
from lora_blip.runtime.untrusted import UnreadableError, cut, open_regular, quoted, why
from lora_blip.version import __version__

FLOAT32_MAX = torch.finfo(torch.float32).max


@runtime_checkable
class Loaded(Protocol):
    """What a loaded backbone knows besides its model. `models.loading.Backbone` is one."""

    model: Any
    name: str
    samples: dict[str, dict[str, Any]] | None
    chose_image_size: bool


@dataclass(frozen=True)
class Adapter:
    """What a file holds, before it meets a model."""

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @property
    def sites(self) -> list[Site]:
        return sites_of(self.about)

    @property
    def base(self) -> str:
        return self.about["base"]["name"]

    @property
    def image_size(self) -> int:
        """Height and width of the images that it was trained on; 0 if the file does not say: the base's own."""
        return self.about["base"].get("image_size", 0)

    @property
    def task(self) -> dict[str, Any]:
        return self.about["task"]


# ---------------------------------------------------------------- save


def save(
    path: str | Path,
    backbone: Loaded | nn.Module,
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
    found = attached.adapters(model, name)
    if not found:
        raise AdapterError(f"the model carries no adapter {name!r}; it has {attached.names(model) or 'none'}")
    for x in found.values():
        refuse_meta(x.site.module, model.get_submodule(x.site.module))
    tensors = {key: value for address, x in found.items() for key, value in _tensors(address, x).items()}
    _check_values(path, tensors, [x.site for x in found.values()])
    kept = backbone.samples if isinstance(backbone, Loaded) else None
    about = {
        "format_version": FORMAT_VERSION,
        "sha256": _digest(tensors),
        "lora": {
            "dropout": next(iter(found.values())).dropout,
            "modules": {address: _entry(x.site) for address, x in found.items()},
        },
        "base": {
            "name": backbone.name if isinstance(backbone, Loaded) else str(getattr(model, "name_or_path", "")),
            "architecture": type(model).__name__,
            "samples": kept or samples(model, found.values()),
            **_image_size(model),
        },
        "task": task or {},
        "training": training or {},
        "merge_drift": merge_drift or {},
        "versions": {"lora_blip": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
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
    """Read a file and check it against itself: header, keys, ranks, values. AdapterError says what is wrong.

    Nothing is allocated because the file claims it: no tensor is read before the header, which is small, names it.
    """
    path = Path(path)
    try:
        _check_header_size(path)
        with safetensors.safe_open(path, "pt") as file:
            about = _header(path, file.metadata())
            sites = sites_of(about)
            _check_keys(path, sites, file)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise AdapterError(f"adapter {str(path)!r} does not exist") from None
    except HeaderError as error:
        raise AdapterError(f"{path}: {error}") from None
    except (safetensors.SafetensorError, OSError) as error:
        told = why(error) if isinstance(error, OSError) else cut(str(error))
        raise AdapterError(f"{path} is no whole .safetensors file ({told}); copy it again") from None
    _check_values(path, tensors, sites)
    if about.get("sha256", "") not in ("", _digest(tensors)):
        raise AdapterError(f"{path} is damaged: its weights are not those that were saved; copy it again")
    return Adapter(path, tensors, about)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the values, by name."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _check_header_size(path: Path) -> None:
    """The first eight bytes say how long the header is; a safetensors reader believes up to 100 MB."""
    with open_regular(path) as file:
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > header.LARGEST:
        raise UnreadableError(f"its header claims {claimed:,} bytes, more than {header.LARGEST:,}")


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("lora_blip")
    if text is None:
        raise AdapterError(f"{path} was not written by lora_blip: its header has no 'lora_blip' entry")
    return header.about_of(text)


def _check_keys(path: Path, sites: list[Site], file: Any) -> None:
    """The tensors that the header promises and no others, each of its shape, as the file describes them."""
    expected = {f"{site.address}.lora_{half}": site for site in sites for half in "AB"}
    there = set(file.keys())
    missing, extra = sorted(expected.keys() - there), sorted(there - expected.keys())
    if missing:
        raise AdapterError(
            f"{path} is incomplete: {quoted(missing[0])} is missing ({len(missing)} of {len(expected)} tensors are); "
            "copy the file again, or train it again"
        )
    if extra:
        raise AdapterError(f"{path}: {quoted(extra[0])} belongs to no module of its header ({len(extra)} such); train it again")
    for key, site in expected.items():
        tensor = file.get_slice(key)
        shape, dtype, is_b = tensor.get_shape(), tensor.get_dtype(), key.endswith("B")
        rows = site.rows[1] - site.rows[0] if site.rows and is_b else None
        if len(shape) != 2 or shape[is_b] != site.r or dtype != "F32" or 0 in shape or (rows and shape[0] != rows):
            promised = f"r={site.r} in float32" + f" for {rows} rows" * bool(rows)
            raise AdapterError(
                f"{path}: {quoted(key)} is {quoted(tuple(shape))} {dtype}, and {promised} was promised; train it again"
            )


def _check_values(path: Path, tensors: dict[str, Tensor], sites: list[Site]) -> None:
    """Every value is finite, so is every ΔW that they can make, and some B is not zero."""
    reach = {key: max(map(abs, torch.stack(tensor.aminmax()).tolist())) for key, tensor in tensors.items()}  # keeps NaN
    for key, value in reach.items():
        if not math.isfinite(value):
            raise AdapterError(
                f"{path}: {quoted(key)} holds NaN or infinity; the training diverged: lower lr, or use bf16 or fp32"
            )
    for site in sites:
        if not site.alpha * reach[f"{site.address}.lora_A"] * reach[f"{site.address}.lora_B"] < FLOAT32_MAX:  # ≥ |ΔW|
            raise AdapterError(f"{path}: the update of {quoted(site.address)} overflows float32; train again with a lower lr")
    if not any(value for key, value in reach.items() if key.endswith(".lora_B")):
        raise AdapterError(f"{path}: every lora_B is zero, so the adapter does nothing; it was saved before it was trained")


# ---------------------------------------------------------------- load


def load(backbone: Loaded | nn.Module, path: str | Path | Adapter, name: str = "default") -> Adapter:
    """Put the adapter of a file, or one that `read` gave, on a frozen backbone by hooks; `lora_blip.merge` then writes it in.

    Raises AdapterError, before the model is touched, if the file is damaged or was trained on another base; LoRAError if
    the base is on the meta device.
    """
    model, adapter = _model(backbone), path if isinstance(path, Adapter) else read(path)
    if attached.adapters(model, name):
        raise AdapterError(f"the model already carries an adapter {name!r}; eject it, or load this one under another name")
    _check_fit(model, adapter)
    _check_image_size(backbone, adapter)
    for address, x in injection.inject(model, adapter.sites, adapter.about["lora"].get("dropout", 0.0), name).items():
        x.A.data.copy_(adapter.tensors[f"{address}.lora_A"])
        x.B.data.copy_(adapter.tensors[f"{address}.lora_B"])
    return adapter


def _check_fit(model: nn.Module, adapter: Adapter) -> None:
    """Every module is there, of the right shape, with the base's own weights."""
    modules = dict(model.named_modules())
    remedy = f"the adapter was trained on {quoted(adapter.base)}; load that base"
    for site in adapter.sites:
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise AdapterError(f"{adapter.path}: this model has no linear {quoted(site.module)}; {remedy}")
        start, stop = site.rows or (0, linear.out_features)
        for half, shape in (("A", (site.r, linear.in_features)), ("B", (stop - start, site.r))):
            found = tuple(adapter.tensors[f"{site.address}.lora_{half}"].shape)
            if found != shape or stop > linear.out_features:
                told = f"lora_{half} of {quoted(site.address)} is {found}, and this model's takes {shape}"
                raise AdapterError(f"{adapter.path}: {told}; {remedy}")
    for path, expected in adapter.about["base"]["samples"].items():
        if path not in modules or not is_linear(modules[path]):
            raise AdapterError(f"{adapter.path}: this model has no linear {quoted(path)}; {remedy}")
        refuse_meta(path, modules[path])
        if not same_weights(expected, sample(modules[path])):
            raise AdapterError(f"{adapter.path}: the weights of {path!r} are not those it was trained on; {remedy}")
    try:
        check_sites(model, adapter.sites)
    except LoRAError as error:  # a tied head: nothing that was saved here has one
        raise AdapterError(f"{adapter.path}: {error}; {remedy}") from None


def _check_image_size(backbone: Loaded | nn.Module, adapter: Adapter) -> None:
    """Raise AdapterError if the base reads images of another size, and nobody chose that size."""
    size = _image_size(_model(backbone)).get("image_size", 0)
    if not adapter.image_size or not size or size == adapter.image_size:
        return
    if isinstance(backbone, Loaded):
        if not backbone.chose_image_size:
            raise AdapterError(
                f"{adapter.path}: it was trained on images of {adapter.image_size}×{adapter.image_size}, and this backbone "
                f"reads {size}×{size}; load it by load_backbone(…, image_size={adapter.image_size}), or by image_size={size} "
                "to use the adapter at that size"
            )
    else:
        warnings.warn(
            f"{adapter.path} was trained on images of {adapter.image_size}×{adapter.image_size}, and the config of this model "
            f"says {size}×{size}",
            stacklevel=3,
        )


def _image_size(model: Any) -> dict[str, int]:
    """{"image_size": pixels}, or nothing for a model whose config names no size."""
    size = getattr(getattr(getattr(model, "config", None), "vision_config", None), "image_size", None)
    return {"image_size": size} if isinstance(size, int) else {}


def _model(backbone: Loaded | nn.Module) -> Any:
    return backbone.model if isinstance(backbone, Loaded) else backbone
