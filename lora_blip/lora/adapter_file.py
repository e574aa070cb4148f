"""Save and load an adapter file: one .safetensors that contains everything about the adapter.

Tensors: `<address>.lora_A` and `.lora_B`, float32. DoRA also has `.magnitude`. An address is a module path. ".q" after it names
a block of output features.
Header: JSON under "lora_blip": ranks, task, base with samples of its weights, versions, summary of the training. No code runs.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from lora_blip.errors import AdapterError, LoRAError
from lora_blip.lora import attached, header, injection, peft_format
from lora_blip.lora.adapter_tensors import check_keys, check_values, refuse_unknown, tensors_of
from lora_blip.lora.attached import Loaded, model_of
from lora_blip.lora.fingerprint import digest_of, dtype_note, samples, weights_dtype
from lora_blip.lora.fit import check_fit, check_image_size, image_size_of
from lora_blip.lora.header import HeaderError, entry_of, sites_of, version_of
from lora_blip.lora.model_lock import changing
from lora_blip.lora.sites import Site, refuse_meta
from lora_blip.lora.variants import rescale
from lora_blip.runtime.files import write_whole
from lora_blip.runtime.runs import is_peft, locate
from lora_blip.runtime.setting_checks import check_scale
from lora_blip.runtime.system_errors import reason_and_fix
from lora_blip.runtime.untrusted import os_error_reason, quoted, shorten
from lora_blip.version import __version__


@dataclass(frozen=True)
class Adapter:
    """The content of a file."""

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)  # not in the repr, which a notebook prints
    metadata: dict[str, Any] = field(repr=False)
    scale: float = field(default=1.0, repr=False)  # `load` multiplies the change of the weights by it; it is not in the file

    @property
    def sites(self) -> list[Site]:
        return sites_of(self.metadata)

    @property
    def variant(self) -> str:
        """Return "lora", or another name of `setting_checks.VARIANTS`."""
        variant: str = self.metadata["lora"].get("variant", "lora")
        return variant

    @property
    def base(self) -> str:
        name: str = self.metadata["base"]["name"]
        return name

    @property
    def base_dtype(self) -> str:
        """Return the dtype of the base's weights in training, such as "float32" or "nf4"; "" in older files."""
        dtype: str = self.metadata["base"].get("dtype", "")
        return dtype

    @property
    def image_size(self) -> int:
        """Return the height and width of the training images. 0: the file does not name a size, so it is that of the base."""
        size: int = self.metadata["base"].get("image_size", 0)
        return size

    @property
    def note(self) -> str:
        """Return what is unknown about an adapter that peft wrote, as one line; "" for an adapter of lora_blip."""
        if peft_format.FOREIGN not in self.metadata:
            return ""
        return (
            "this adapter has the format of peft, so its file has no prompt, no image size and no fingerprint of the base; "
            "only the names and shapes of the linears are compared with a base"
        )

    @property
    def task(self) -> dict[str, Any]:
        task: dict[str, Any] = self.metadata["task"]
        return task


# ---------------------------------------------------------------- save


def refuse_wrapper(model: nn.Module, module: str) -> None:
    """Raise LoRAError if a model has no such module, because the adapter was put on a part of the model."""
    try:
        model.get_submodule(module)  # also of a compiled model
    except AttributeError:
        parts = [f"model.{name}" for name, part in model.named_children() if module in dict(part.named_modules())]
        inner = parts[0] if parts else "the part with the adapter"
        raise LoRAError(f"the adapter is on a part of this {type(model).__name__}; give that part: {inner}") from None


def no_such_adapter(model: nn.Module, name: str) -> AdapterError:
    others = " or ".join(f"name={each!r}" for each in attached.names(model))
    fix = f"it has {others}" if others else "put one on it, and train it: lora_blip.inject(model, 'vit')"
    return AdapterError(f"the model has no adapter {quoted(name)}; {fix}")


def save(
    path: str | Path,
    backbone: Loaded | nn.Module,
    name: str = "default",
    task: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    merge_drift: dict[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the adapter `name` of a model to `path` atomically (a temporary file, synced, then renamed), and return the path.

    Raise AdapterError if there is no such adapter, if it is untrained (every B is zero) or not finite, or if the file exists
    and `overwrite` is false. In peft: `save_pretrained`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> path = lora_blip.save_adapter("copy.safetensors", backbone)
    """
    if not isinstance(path, str | Path):
        raise AdapterError("the path comes first: lora_blip.save_adapter('adapter.safetensors', model)")
    model, path = model_of(backbone), Path(path)
    check_target(path, overwrite)
    loras = attached.adapters(model, name)
    if not loras:
        raise no_such_adapter(model, name)
    refuse_wrapper(model, next(iter(loras.values())).site.module)
    for lora in loras.values():
        refuse_meta(lora.site.module, model.get_submodule(lora.site.module))
        refuse_unknown(name, lora)
    tensors = {key: value for address, lora in loras.items() for key, value in tensors_of(address, lora).items()}
    check_values(path, tensors, [lora.site for lora in loras.values()])
    base_samples = samples(model, loras.values(), backbone.samples if isinstance(backbone, Loaded) else None)
    variant = next(iter(loras.values())).site.variant
    import transformers  # late: it takes a second, and reading a file does not need it

    metadata = {
        "format_version": version_of(variant),
        "sha256": digest(tensors),
        "lora": {
            **({} if variant == "lora" else {"variant": variant}),
            "dropout": next(iter(loras.values())).dropout,
            "modules": {address: entry_of(lora.site) for address, lora in loras.items()},
        },
        "base": {
            "name": backbone.name if isinstance(backbone, Loaded) else str(getattr(model, "name_or_path", "")),
            "architecture": type(model).__name__,
            "dtype": weights_dtype(model, loras.values()),
            "samples": base_samples,
            "baked": bool(vars(model).get(attached.BAKED)),
            **image_size_of(model),
        },
        "task": task or {},
        "training": training or {},
        "merge_drift": merge_drift or {},
        "versions": {"lora_blip": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write(path, tensors, metadata)
    return path


def check_target(path: Path, overwrite: bool) -> None:
    """Raise AdapterError if a path is empty or a folder, or if its file exists and may not be overwritten."""
    if not path.name or path.is_dir():
        raise AdapterError(f"the path {quoted(str(path))} is not that of a file; give one, such as 'adapter.safetensors'")
    if path.exists() and not overwrite:
        raise AdapterError(f"{path} exists already; give another path, or overwrite=True")


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and their header as an adapter file, which appears under its name only when it is complete."""
    metadata = metadata | {header.OWN_DIGEST: digest_of(metadata)}
    write_whole(path, serialise(tensors, {"lora_blip": json.dumps(metadata)}))


# ---------------------------------------------------------------- read


def read(path: str | Path) -> Adapter:
    """Read a file and check its header, keys, ranks and values. Raise AdapterError, with the reason, if one is wrong.

    path: a file of lora_blip, or the adapter_model.safetensors of an adapter of peft, with its adapter_config.json beside it.
    The size of the header is limited, and the tensors are read after the header was checked. So a hostile file cannot make this
    function allocate more memory than the size of the file.
    """
    path = Path(path)
    try:
        metadata, tensors = peft_format.read(path) if is_peft(path) else _read(path)
        sites = sites_of(metadata)
    except FileNotFoundError:
        raise AdapterError(f"adapter {str(path)!r} does not exist; correct the path, or give 'latest'") from None
    except HeaderError as error:
        raise AdapterError(f"{path}: {error}") from None
    except (safetensors.SafetensorError, OSError) as error:
        if reason := reason_and_fix(error, path):
            raise AdapterError(f"{path} cannot be read: {reason}") from None
        reason = os_error_reason(error) if isinstance(error, OSError) else shorten(str(error))
        fix = "copy it again" if path.suffix == ".safetensors" else "give a run folder, an adapter file, or 'latest'"
        raise AdapterError(f"{path} is not a complete .safetensors file ({reason}); {fix}") from None
    if metadata.get("sha256", "") not in ("", digest(tensors)):
        raise AdapterError(f"{path} is damaged: its weights have changed since it was saved; copy it again")
    check_values(path, tensors, sites)
    return Adapter(path, tensors, metadata)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file of lora_blip. Raise HeaderError, AdapterError or OSError."""
    header.check_size(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = _header(path, file.metadata())
        check_keys(path, sites_of(metadata), file)
        return metadata, {key: file.get_tensor(key) for key in file.keys()}


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the values, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(tensors[key].contiguous().numpy().data)
    return digest.hexdigest()


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get("lora_blip")
    if text is None:
        raise AdapterError(f"{path} was not written by lora_blip: its header has no entry 'lora_blip'; give another file")
    return header.parse_header(text)


# ---------------------------------------------------------------- load


def load(
    backbone: Loaded | nn.Module, path: str | Path | Adapter = "latest", name: str = "default", scale: float = 1.0
) -> Adapter:
    """Put an adapter on a frozen backbone by hooks, and return the content of its file. `merge` writes it into the weights.

    path: a file, a run folder, "latest", or a result of `read`. If the model has other adapters, their updates are added too;
    `use_adapters` chooses. The parameters of the adapter can be trained.
    scale: factor of the change that the adapter makes; 1: as trained, 0: the base. A scaled adapter cannot be saved.
    Raise AdapterError if the file is missing or damaged, or has another base. Raise LoRAError if the base is
    on the meta device, or if a `Captioner` uses an adapter called `name`. The model is then unchanged.
    In peft: `PeftModel.from_pretrained`; for a second adapter, `load_adapter`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> adapter.task["name"], adapter.base
    ('caption', 'assets/tiny-blip')
    """
    model = model_of(backbone, path, 'lora_blip.load_adapter(backbone, "latest")')
    adapter = path if isinstance(path, Adapter) else read(locate(path))
    adapter = replace(adapter, scale=check_scale(adapter.scale) * check_scale(scale))

    def change() -> None:
        attached.check_unheld(model, name)
        put(backbone, adapter, name)
        injection.freeze(model)

    changing(model, change)
    return adapter


def put(backbone: Loaded | nn.Module, adapter: Adapter, name: str, dormant: bool = False) -> None:
    """Put an adapter on a backbone if it fits. The caller holds the lock of the model.

    dormant: whether the adapter acts only in blocks of `use_adapters` that name it.
    """
    model, dropout = model_of(backbone), adapter.metadata["lora"].get("dropout", 0.0)
    if name in attached.names(model):
        raise AdapterError(f"the model already has an adapter {name!r}; give another name=…, or call lora_blip.eject first")
    try:
        check_fit(backbone, adapter, dropout)
    except AdapterError as error:
        fix = f": lora_blip.load_backbone({adapter.base!r}); or give the path of another run"
        fix *= str(error).endswith("load that base")
        raise AdapterError(f"{error}{fix}") from None
    if note := dtype_note(adapter.base_dtype, model):
        print(note, file=sys.stderr, flush=True)
    check_image_size(backbone, adapter)
    injection.put(model, adapter.sites, dropout, name, adapter.tensors, dormant)
    for lora in attached.adapters(model, name).values() if adapter.scale != 1 else ():
        rescale(lora, adapter.scale)
