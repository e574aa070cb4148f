"""Read adapters in the format of peft, without peft: `adapter_model.safetensors` and `adapter_config.json`.

`peft_writer` writes them. What peft has no field for (the task, the prompt, samples of the base's weights) is in the header of
a safetensors that lora_blip wrote. peft ignores it.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from lora_blip.lora import header
from lora_blip.lora.header import HeaderError, sites_of, version_of
from lora_blip.lora.peft_config import EMBEDDINGS, LARGEST, MERGE, MOST_NAMES, TASK_OF, PeftConfig, parse_config
from lora_blip.lora.peft_names import Key, canonical, parse_key
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import EXTRA
from lora_blip.runtime.runs import PEFT_CONFIG
from lora_blip.runtime.untrusted import open_regular, quoted

DTYPES = ("F32", "F16", "BF16")
OWN = "lora_blip"  # the entry of our header in the metadata of a safetensors
OUTPUT_LAYER = "cls.predictions.decoder"  # of BLIP; it has the weight of the embeddings
BOTH = "copy both files again from one folder"
FOREIGN = "peft"  # key in the metadata of an adapter that peft wrote: the version of peft


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the tensors of an adapter of peft, as a file of lora_blip has them.

    path: its `adapter_model.safetensors`, with `adapter_config.json` beside it. Raise HeaderError or OSError if the adapter
    cannot be read, or if it has something that lora_blip does not compute. The message names it.
    """
    try:
        with open_regular(path.with_name(PEFT_CONFIG), LARGEST) as file:
            config = parse_config(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise HeaderError(f"{PEFT_CONFIG} is not UTF-8; copy it again") from None
    except HeaderError as error:
        raise HeaderError(f"{PEFT_CONFIG}: {error}") from None
    header.check_size(path)
    with safetensors.safe_open(path, "pt") as file:
        keys = _keys(list(file.keys()), config)
        sites = [_site(module, halves, config, file) for module, halves in keys.items()]
        if extra := set(EXTRA.get(sites[0].variant, ())) - {"magnitude"}:
            raise HeaderError(f"it lacks {' and '.join(sorted(extra))}, which the class of {sites[0].variant} here has")
        metadata = _metadata(sites, config, (file.metadata() or {}).get(OWN))
        tensors = {
            f"{canonical(module)}.{half if half == 'magnitude' else f'lora_{half}'}": file.get_tensor(key).float().contiguous()
            for module, halves in keys.items()
            for half, key in halves.items()
        }
    return metadata, {name: value.flatten() if name.endswith(".magnitude") else value for name, value in tensors.items()}


def _keys(names: list[str], config: PeftConfig) -> dict[str, dict[str, str]]:
    """Return {linear: {"A", "B" or "magnitude": name of the tensor}}. Raise HeaderError for tensors that are not LoRA's."""
    modules: dict[str, dict[str, str]] = {}
    halves = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    for name in sorted(names):
        key = parse_key(name)
        if key is None or key.half not in halves:
            way_out = EMBEDDINGS if "lora_embedding" in name else MERGE
            raise HeaderError(
                f"it contains {quoted(name)}, {_described(name, key)}, which lora_blip does not compute; {way_out}"
            )
        if key.half in modules.setdefault(key.module, {}):
            raise HeaderError(
                f"it has two tensors for {quoted(key.module)}, {quoted(name)} is one; save each adapter on its own"
            )
        modules[key.module][key.half] = name
    if not modules:
        raise HeaderError("it has no tensors; copy it again")
    if len(modules) > MOST_NAMES:
        raise HeaderError(f"it has {len(modules):,} linears, more than {MOST_NAMES:,}; copy it again")
    for module, own in modules.items():
        if own.keys() != halves:
            raise HeaderError(f"{quoted(module)} has no {min(halves - own.keys())}; copy the file again")
        if module not in config.targets:
            raise HeaderError(
                f"{quoted(module)} is not in target_modules of {PEFT_CONFIG}, so peft would ignore its tensors; {BOTH}"
            )
    doubled = [name for name, count in Counter(map(canonical, modules)).items() if count > 1]
    if doubled:
        raise HeaderError(f"it has two updates for {quoted(doubled[0])}, under two names; save each adapter on its own")
    return modules


def _described(name: str, key: Key | None) -> str:
    if key is not None:
        return "the magnitude of DoRA, but use_dora is false"
    if name.endswith(".bias"):
        return "a trained bias"
    return "an embedding" if "lora_embedding" in name else "a weight that is no part of LoRA"


def _site(module: str, halves: dict[str, str], config: PeftConfig, file: Any) -> Site:
    """Return the site of a linear. Raise HeaderError if the shapes of its tensors do not fit each other or the settings."""
    slices = {half: file.get_slice(key) for half, key in halves.items()}
    shapes = {half: tuple(part.get_shape()) for half, part in slices.items()}
    for half, part in slices.items():
        if part.get_dtype() not in DTYPES:
            raise HeaderError(
                f"{quoted(halves[half])} has the dtype {quoted(part.get_dtype())}, expected one of {', '.join(DTYPES)}"
            )
    r, alpha = int(config.ranks.of(module)), float(config.alphas.of(module))
    A, B = shapes["A"], shapes["B"]
    if len(A) == len(B) == 4:
        raise HeaderError(f"{quoted(module)} is a convolution, and lora_blip adapts only linear layers; {MERGE}")
    if module.endswith(OUTPUT_LAYER):
        raise HeaderError(f"{quoted(module)} is the output layer of BLIP; {EMBEDDINGS}")
    if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r or 0 in (*A, *B):
        raise HeaderError(
            f"the tensors of {quoted(module)} are {quoted(A)} and {quoted(B)}, but r is {r} in {PEFT_CONFIG}; {BOTH}"
        )
    if math.prod(shapes.get("magnitude", (B[0],))) != B[0]:
        raise HeaderError(
            f"the magnitude of {quoted(module)} is {quoted(shapes['magnitude'])}, expected ({B[0]},); copy it again"
        )
    if config.use_dora and config.use_rslora:
        alpha *= math.sqrt(r)  # a file of lora_blip has one variant; alpha·√r / r is alpha / √r
    variant = "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    return Site(canonical(module), r, alpha, variant=variant)


def _metadata(sites: list[Site], config: PeftConfig, own: str | None) -> dict[str, Any]:
    """Return the header of a file of lora_blip, checked as one. own: the entry that `written` puts into the safetensors."""
    kept = header.parse_header(own) if own else {}
    samples: dict[str, Any] = {site.module: {} for site in sites}
    base = kept.get("base", {})
    variant = sites[0].variant
    metadata = {
        "format_version": version_of(variant),
        "lora": {
            "dropout": config.dropout,
            **({} if variant == "lora" else {"variant": variant}),
            "modules": {site.address: {"module": site.module, "r": site.r, "alpha": site.alpha} for site in sites},
        },
        "base": {
            "architecture": config.architecture,
            **base,
            "name": config.base or base.get("name", ""),
            "samples": samples | base.get("samples", {}),
        },
        "task": kept.get("task") or ({"name": TASK_OF[config.architecture]} if config.architecture in TASK_OF else {}),
        "training": kept.get("training", {}),
        "merge_drift": kept.get("merge_drift", {}),
        "versions": kept.get("versions", {"peft": config.version}),
        **({} if kept else {FOREIGN: config.version}),
    }
    checked = header.parse_header(json.dumps(metadata))
    sites_of(checked)
    return checked
