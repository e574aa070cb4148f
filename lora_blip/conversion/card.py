"""The model card of an adapter: the README.md of a folder, which the hub shows."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_blip.metrics.names import validation_scores
from lora_blip.runtime.adapter_names import HUB_NAME
from lora_blip.runtime.untrusted import printable

if TYPE_CHECKING:
    from lora_blip.lora.adapter_file import Adapter

PIPELINES = {
    "caption": "image-to-text",
    "vqa": "visual-question-answering",
    "retrieval": "image-text-to-text",
}  # tags of the hub
TASKS = {"caption": "writes captions", "vqa": "answers questions about images", "retrieval": "ranks texts for images"}
MOST_SCORES = 8
LONGEST = 400  # characters of a value


def card(adapter: "Adapter", largest_r: int, folder: Path) -> str:
    """Return the card: the header that the hub reads, the facts and scores, and the lines that load the adapter with peft.

    The adapter may be untrusted: each value is shortened and escaped.
    """
    base, _, revision = adapter.base.partition("@")
    on_hub = HUB_NAME.fullmatch(base) is not None and not base.startswith("assets/")
    task = str(adapter.task.get("name", ""))
    facts = {
        "task": TASKS.get(task, ""),
        "prompt": _code(adapter.task.get("prompt")),
        "base": f"[{base}](https://huggingface.co/{base})" if on_hub else _code(base),
        "revision of the base": _code(revision),
        "image size": f"{adapter.image_size} × {adapter.image_size}" * bool(adapter.image_size),
        "linears": f"{len({site.module for site in adapter.sites}):,}",
        "largest rank": f"{largest_r}",
        "variant": adapter.variant,
    }
    scores = validation_scores(adapter.metadata.get("training", {}))[:MOST_SCORES]
    facts["validation"] = ", ".join(printable(score)[:LONGEST].replace("|", r"\|") for score in scores)
    rows = "\n".join(f"| {name} | {text} |" for name, text in facts.items() if text)
    tags = ["lora", "peft", "blip-2" if adapter.metadata["base"].get("architecture", "").startswith("Blip2") else "blip"]
    front = {"library_name": "peft", "tags": tags, **({"base_model": base} if on_hub else {})}
    front |= {"pipeline_tag": PIPELINES[task]} if task in PIPELINES else {}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())  # JSON is YAML
    return (
        f"---\n{lines}\n---\n\n# A LoRA adapter of {_name(adapter)}\n\n| | |\n|---|---|\n{rows}\n\n## How to load it\n\n"
        f"```python\n{loading(adapter, folder.name)}\n```\n\nTrained with lora_blip, which reads this folder too: "
        "`lora-blip infer --adapter FOLDER`.\n"
    )


def _name(adapter: "Adapter") -> str:
    return printable(adapter.metadata["base"].get("architecture", "") or "BLIP")


def _code(value: Any) -> str:
    """Return a text as code in a cell of a table, or "" for an empty one."""
    text = printable(value if isinstance(value, str) else "")[:LONGEST].replace("`", "'").replace("|", r"\|")
    return f"`{text}`" if text else ""


def loading(adapter: "Adapter", folder: str) -> str:
    """Return the lines that load the base with transformers and the adapter with peft."""
    kind = adapter.metadata["base"].get("architecture", "")
    known = kind if re.fullmatch(r"Blip2?For\w{1,60}", kind) else "AutoModelForImageTextToText"
    base, _, revision = adapter.base.partition("@")
    arguments = repr(base) + (f", revision={revision!r}" if revision else "") + ', dtype="float32"'  # as in a training
    return "\n".join(
        (
            "from peft import PeftModel",
            f"from transformers import {known}",
            f"model = PeftModel.from_pretrained({known}.from_pretrained({printable(arguments)}), {printable(repr(folder))})",
        )
    )
