"""Start a training from the values of an existing adapter (INIT_ADAPTER), with a new schedule and a new optimizer.

Modules of the adapter that are not in TARGETS keep their values: they act in every forward and are saved, but are not trained.
Modules that are in TARGETS but not in the adapter begin as in a new adapter: their update is zero.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_blip.config import TrainConfig
from lora_blip.errors import AdapterError
from lora_blip.lora import adapter_file, injection, targets
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.fit import check_fit
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site
from lora_blip.models.loading import Backbone
from lora_blip.runtime import runs
from lora_blip.runtime.counts import counted, exact
from lora_blip.runtime.system_errors import command_line, quoted_for_shell
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.tasks.base import Generation, Task

SPLITTING = ("annotations", "val_annotations", "val_fraction", "seed", "group_by")  # settings that choose the held-out lines


def inject_adapters(config: TrainConfig, backbone: Backbone) -> Adapter | None:
    """Put the adapters of TARGETS on the backbone. If INIT_ADAPTER is set, copy its values and return it; else return None.

    Raise AdapterError, with the settings that fit, if the initial adapter has another base, image size, rank or alpha.
    """
    sites = targets.find(backbone.model, config.targets, config.r, config.alpha, config.variant)
    if not config.init_adapter:
        injection.inject(backbone.model, sites, config.dropout)
        return None
    adapter = adapter_file.read(runs.locate_initial(config.init_adapter, config.output_dir))
    check_base(adapter, backbone, config.task)
    check_sites(adapter, sites)
    trained = {site.address for site in sites}
    every = [*sites, *(site for site in adapter.sites if site.address not in trained)]
    own = {site.address for site in adapter.sites}
    loras = injection.inject(backbone.model, every, config.dropout)
    injection.copy_values({address: lora for address, lora in loras.items() if address in own}, adapter.tensors)
    print(printable(describe(adapter, sites)))
    return adapter


def freeze_others(config: TrainConfig, backbone: Backbone, loras: dict[str, LoRA]) -> None:
    """Do not train the adapters that are not in TARGETS. Call this after the digest of the frozen weights was computed."""
    if config.init_adapter:
        trained = {site.address for site in targets.find(backbone.model, config.targets, config.r, config.alpha)}
        for address, lora in loras.items():
            lora.requires_grad_(address in trained)


def check_base(adapter: Adapter, backbone: Backbone, task: str) -> None:
    """Raise AdapterError if the adapter was trained on another base, or at an image size that IMAGE_SIZE does not confirm.

    task: that of this training. If the adapter has another one, its base may not have this task.
    """
    try:
        check_fit(backbone, adapter)
    except AdapterError as error:
        reason = str(error)
        flag = f": --model {quoted_for_shell(adapter.base)}" * reason.endswith("load that base")
        if (own := adapter.task.get("name", task)) != task:  # its base would not help
            reason = reason.removesuffix("; load that base")
            flag = (
                f". It is for the task {own}, and this training is for {task}: give the path of an adapter of this task, or "
                'INIT_ADAPTER = "" (--init-adapter "")'
            )
        raise AdapterError(f"init_adapter: {reason}{flag}") from None
    if adapter.image_size not in (0, backbone.image_size) and not backbone.chose_image_size:
        raise AdapterError(
            f"init_adapter: {adapter.path} was trained on images of {adapter.image_size}×{adapter.image_size}, and this "
            f"training uses {backbone.image_size}×{backbone.image_size}; set IMAGE_SIZE = {adapter.image_size} (--image-size "
            f"{adapter.image_size}), or --image-size {backbone.image_size} to continue at that size"
        )


def check_sites(adapter: Adapter, sites: list[Site]) -> None:
    """Raise AdapterError if a target has another variant, r or alpha than in the adapter, or other rows of the same linear."""
    variants = {site.variant for site in sites}
    if variants != {adapter.variant}:
        raise AdapterError(
            f"init_adapter: {adapter.path} has the variant {adapter.variant!r}, and this training has VARIANT = "
            f"{min(variants)!r}; use the values of the adapter: --variant {adapter.variant} {fitting_flags(adapter)}"
        )
    own = {site.address: site for site in adapter.sites}
    whole = {site.module for site in (*sites, *own.values()) if not site.block}
    for site in sites:
        same = own.get(site.address)
        if same and (same.r, same.alpha) != (site.r, site.alpha):
            raise AdapterError(
                f"init_adapter: {adapter.path} has r = {same.r} and alpha = {exact(same.alpha)} at {quoted(site.address)}, and "
                f"this training has r = {site.r} and alpha = {exact(site.alpha)}; use those of the adapter: "
                f"{fitting_flags(adapter)}"
            )
    for site in (*sites, *own.values()):
        if site.block and site.module in whole:
            raise AdapterError(
                f"init_adapter: {adapter.path} and TARGETS do not agree on {quoted(site.module)}: one has all of its rows, the "
                f"other only those of {quoted(site.block)}; use the targets of the adapter: {fitting_flags(adapter, full=True)}"
            )


def fitting_flags(adapter: Adapter, full: bool = False) -> str:
    """Return the flags for a training with the sites of the adapter: r and alpha, and the targets if they are needed."""
    pairs = {(site.r, site.alpha) for site in adapter.sites}
    settings: Any = adapter.metadata.get("training", {}).get("settings", {})
    if len(pairs) == 1 and not full:
        ((r, alpha),) = pairs
        return f"--r {r} --alpha {exact(alpha)}"
    known = {name: settings[name] for name in ("targets", "r", "alpha") if isinstance(settings.get(name), str | int | float)}
    if len(known) == 3:
        return command_line([part for name, value in known.items() for part in (f"--{name}", f"{value}")])
    return f"--targets {quoted_for_shell(','.join(_target(site) for site in adapter.sites))}"


def _target(site: Site) -> str:
    return f"{site.address}:r={site.r}:alpha={exact(site.alpha)}"


def describe(adapter: Adapter, sites: Iterable[Site]) -> str:
    """Return a line with the number of modules that continue, that keep their values, and that are new."""
    trained, own = {site.address for site in sites}, {site.address for site in adapter.sites}
    line = f"continuing from {adapter.path}: {counted(len(trained & own), 'adapted module', 'begin')} with its values"
    if kept := own - trained:
        line += (
            f"; {counted(len(kept), 'module')} of it, such as {quoted(min(kept))}, not in TARGETS: unchanged in this training"
        )
    if new := trained - own:
        line += f"; {counted(len(new), 'module')}, such as {quoted(min(new))}, not in it: new adapters, whose update is zero"
    return line


def restore_task(task: Task, adapter: Adapter, config: TrainConfig) -> None:
    """Load the temperature of a retrieval adapter. Print a note for each setting of the adapter that this training replaces."""
    name, prompt = adapter.task.get("name", ""), str(adapter.task.get("prompt", ""))
    notes = [lines_note(adapter, config), adapter.note]
    if name and name != task.name:
        notes.append(f"the initial adapter was trained for the task {quoted(name)}, and this training is for {task.name}")
    elif name:
        task.load_metadata(adapter.task)
        if prompt != task.prompt:
            own = f"this training has {quoted(task.prompt)}"
            notes.append(f"the initial adapter was trained with PROMPT = {quoted(prompt)}, and {own}")
        notes.append(generation_note(adapter, task.generation.stored()) if task.writes_text else "")
    print("".join(f"note: {printable(note)}\n" for note in notes if note), end="")


def generation_note(adapter: Adapter, current: dict[str, Any]) -> str:
    """Return a note if the adapter was validated with other options of generation, or "". MAX_NEW_TOKENS is not compared."""
    before = Generation().stored() | adapter.task.get("generation", {})
    names = sorted(name for name in before | current if before.get(name) != current.get(name) and name != "max_new_tokens")
    if not names:
        return ""
    old, new = ({name: values.get(name) for name in names} for values in (before, current))
    return f"the initial adapter was validated with GENERATION = {quoted(old)}, and this training has {quoted(new)}"


def lines_note(adapter: Adapter, config: TrainConfig) -> str:
    """Return a note if the adapter may have learned from lines that this training holds out, or ""."""
    settings: Any = adapter.metadata.get("training", {}).get("settings", {})
    names = [name for name in SPLITTING if name in settings and _compared(settings, name) != _compared(vars(config), name)]
    if not names or not (config.val_fraction or config.val_annotations):
        return ""
    differences = [f"{name.upper()} was {quoted(settings[name])} and is {quoted(getattr(config, name))}" for name in names]
    return (
        f"the initial adapter was trained on other lines ({', '.join(differences)}). If it has learned from images that are "
        "now held out, their scores are too high"
    )


def _compared(settings: dict[str, Any], name: str) -> Any:
    """Return the value of a setting for the comparison. A path becomes absolute."""
    value = settings[name]
    return str(Path(value).absolute()) if name.endswith("annotations") and isinstance(value, str) and value else value


def source_of(adapter: Adapter) -> str:
    """Return the identity of an adapter: the start of the SHA-256 of its values."""
    return adapter_file.digest(adapter.tensors)[:16]
