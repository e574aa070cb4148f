"""Describe an adapter in words: its task, base, data, training and scores, from its header and the files of its run."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lora_blip.lora.adapter_file import Adapter
from lora_blip.metrics.names import named_score, score_value
from lora_blip.runtime.counts import counted, exact, lr_ratio_of, steps_of
from lora_blip.runtime.runs import METRICS_NAME
from lora_blip.runtime.untrusted import open_regular

TASKS = {"caption": "write a caption", "vqa": "answer a question", "retrieval": "rank texts for an image"}
VARIANTS = {  # of LoRA, except the plain one
    "rslora": "rsLoRA: ΔW = alpha / √r · B A",
    "dora": (
        "DoRA: W′ = m / ‖W + ΔW‖ ⊙ (W + ΔW). Singular values, effective rank and amplification are those of "
        "ΔW = alpha / r · B A. With the base, ‖ΔW‖, ‖ΔW‖ / ‖W‖ and intruder dimensions are those of W′ − W; without it, ‖ΔW‖ "
        "is that of ΔW"
    ),
}
LARGEST = 2**28  # bytes of a metrics.jsonl that is read
LONGEST = 600  # characters of a fact
LISTED = 6  # ranks, or settings of the generation, that are listed


def describe(adapter: Adapter) -> dict[str, str]:
    """Return {name: text} for the header of the page. The file may be untrusted: the caller escapes the texts."""
    metadata = adapter.metadata
    training = metadata.get("training", {})
    settings = training.get("settings", {})
    facts = {
        "adapter": _size(adapter),
        "variant": VARIANTS.get(adapter.variant, ""),
        "task": _task(adapter.task),
        "base": _base(adapter),
        "data": _data(settings),
        "training": _training(training, settings),
        "blend of": _blend(_object(training.get("blend"))),
        "scores": _scores(adapter, training),
        "merge": _merge(metadata.get("merge_drift", {})),
        "made with": ", ".join(f"{name} {version}" for name, version in _object(metadata.get("versions")).items()),
    }
    return {name: text if len(text) <= LONGEST else f"{text[:LONGEST]} …" for name, text in facts.items() if text}


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _size(adapter: Adapter) -> str:
    """Return "96 modules, r = 8, alpha = 32, 3,145,728 parameters"."""
    sites = adapter.sites
    ranks = Counter((site.r, site.alpha) for site in sites).most_common(LISTED)
    described = " or ".join(
        f"r = {r}, alpha = {exact(alpha)}" + f" ({count})" * (len(ranks) > 1) for (r, alpha), count in ranks
    )
    dropout = adapter.metadata["lora"].get("dropout", 0.0)
    size = sum(tensor.numel() for tensor in adapter.tensors.values())
    counts = f"{counted(len(sites), 'module')}, {described}, {counted(size, 'parameter')}"
    return counts + f", dropout {dropout:g}" * bool(dropout)


def _task(task: Mapping[str, Any]) -> str:
    name = str(task.get("name", ""))
    prompt = task.get("prompt")
    generation = list(_object(task.get("generation")).items())
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in generation[:LISTED])
    text = TASKS.get(name, name) or "not in the file"
    return text + f", after the prompt “{prompt}”" * bool(prompt) + f"; generation: {options}" * bool(options)


def _base(adapter: Adapter) -> str:
    architecture = adapter.metadata["base"].get("architecture", "")
    size = f", images of {adapter.image_size}×{adapter.image_size}" * bool(adapter.image_size)
    return f"{adapter.base}" + f" ({architecture})" * bool(architecture) + size


def _data(settings: Mapping[str, Any]) -> str:
    annotations, root = settings.get("annotations", ""), settings.get("image_root", "")
    held_out = settings.get("val_annotations") or settings.get("val_fraction")
    validation = f", {held_out:.0%} held out" if isinstance(held_out, float) else f", validated on {held_out}" * bool(held_out)
    return f"{annotations}" + f", images in {root}" * bool(root) + validation if annotations else ""


def _training(training: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if not training:
        return ""
    parts = [steps_of(training)] if "steps" in training else []
    parts += filter(None, [lr_ratio_of(training)])
    parts += ["stopped before its end"] * (training.get("finished") is False)
    epochs = 0 if settings.get("max_steps") else settings.get("epochs")  # MAX_STEPS may end the run in its first epoch
    parts += [f"{epochs} epoch" + "s" * (epochs != 1)] * (type(epochs) is int and epochs > 0)
    named = {"batch_size": "batches of {}", "lr": "lr {}", "targets": "targets {}"}
    return ", ".join(parts + [text.format(settings[key]) for key, text in named.items() if settings.get(key)])


def _blend(blend: Mapping[str, Any]) -> str:
    """Return "0.7 · first + 0.3 · second" for an adapter that `lora-blip blend` wrote, or ""."""
    sources = blend.get("sources")
    listed = [_object(source) for source in sources[:LISTED]] if isinstance(sources, list) else []
    terms = [f"{source['weight']:g} · {source.get('adapter')}" for source in listed if _is_number(source.get("weight"))]
    return " + ".join(terms)


def _scores(adapter: Adapter, training: Mapping[str, Any]) -> str:
    """Return the validation scores of the adapter, and those before the training if the run folder has them."""
    before, scores = _first_line(adapter), list[str]()
    for key, value in training.items():
        if key.startswith("val_") and _is_number(value):
            start = f" (before the training {score_value(key[4:], before[key])})" if key in before else ""
            scores.append(named_score(key[4:], value) + start)
    return "validation " + ", ".join(scores[:LISTED]) if scores else ""


def _is_number(value: Any) -> bool:
    """Return True for a number that can be printed as one: a file may contain integers of any length."""
    return type(value) in (int, float) and abs(value) < 1e30


def _first_line(adapter: Adapter) -> dict[str, float]:
    """Return the scores at step 0 from metrics.jsonl beside the adapter, or {}."""
    with suppress(OSError, ValueError), open_regular(adapter.path.with_name(METRICS_NAME), LARGEST) as file:
        line = _object(json.loads(file.readline(2**20)))
        if line.get("step") == 0:
            return {key: float(value) for key, value in line.items() if key.startswith("val_") and _is_number(value)}
    return {}


def _merge(drift: Mapping[str, Any]) -> str:
    """Return how far apart the run measured merged and hooked logits (`training.validation.merge_drift`)."""
    difference, largest = drift.get("largest_difference"), drift.get("largest_logit")
    if not _is_number(difference) or not _is_number(largest):
        return ""
    return f"merged and hooked logits differ by at most {difference:.2g}; the largest logit is {largest:.3g}"
