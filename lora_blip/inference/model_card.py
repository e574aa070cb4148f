"""The README.md of an exported folder: what the model is, and the lines that load it with transformers."""

import json
import re
from pathlib import Path
from typing import Any

from lora_blip.inference.export import ExportConfig
from lora_blip.inference.exported_folder import GENERATORS
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.fingerprint import HALF_STEP
from lora_blip.metrics.names import validation_scores
from lora_blip.runtime.adapter_names import HUB_NAME
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import write_new
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import PredictionTask
from lora_blip.version import __version__

LONGEST = 200  # characters of a text from the adapter file
TAGS = {"caption": "image-to-text", "vqa": "visual-question-answering", "retrieval": "zero-shot-image-classification"}
LOADING = """\
from PIL import Image
from transformers import AutoProcessor, {kind}

model = {kind}.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")  # the pixels of the training
image = Image.open("photo.jpg").convert("RGB")
"""
GENERATING = """\
model.{part}.generation_config = model.generation_config
inputs = processor(images=image, text={prompt}, return_tensors="pt").to(model.device, model.dtype)
print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True))
"""
PIPELINE = """\
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="FOLDER")
pipe.model.{part}.generation_config = pipe.model.generation_config
print(pipe("photo.jpg", text={prompt}))
"""
RANKING = """\
texts = ["a red cube", "a blue cube"]
inputs = processor(images=[image], text=texts, padding=True, return_tensors="pt").to(model.device, model.dtype)
similarity = model(**inputs, {flag}=False).{result}[0] / {temperature}  # contrast (ITC)
inputs["pixel_values"] = inputs["pixel_values"].expand(len(texts), -1, -1, -1)
match = model(**inputs, {flag}=True).{result}  # matching (ITM): logits of "no match" and "match"
print((similarity + match[:, 1] - match[:, 0]).softmax(0))  # the probability of each text
"""
GENERATION_NOTE = """\
generation_config.json contains the options that the adapter was validated with. In BLIP and BLIP-2, the part that generates
the text does not read this file. The line with `generation_config` gives it the options. Without the line, only
`max_new_tokens` has an effect.
"""


def write(place: Path, config: ExportConfig, adapter: Adapter, task: PredictionTask, comparison: list[str]) -> None:
    """Write README.md. comparison: the lines about the difference between the folder and the adapter."""
    write_new(place / "README.md", card(config, adapter, task, comparison).encode())


def card(config: ExportConfig, adapter: Adapter, task: PredictionTask, comparison: list[str]) -> str:
    """Return the text of the card. Texts of the adapter file are escaped, because the file may be untrusted."""
    base = config.model or adapter.base
    header = ["---", "library_name: transformers", f"pipeline_tag: {TAGS[task.name]}", "tags: [lora_blip]"]
    header += [f"base_model: {base}"] if HUB_NAME.fullmatch(base) and not Path(base).exists() else []
    dtype = adapter.base_dtype if config.base_dtype == "auto" else config.base_dtype
    facts = {
        "task": task.name,
        "base": text(base) + f", dequantized from {dtype}" * (dtype in HALF_STEP),
        "adapter": text(adapter.path.name) + f", {counted(len(adapter.sites), 'module')}, merged in float32",
        "weights": config.dtype,
        "images": f"{task.backbone.image_size}×{task.backbone.image_size}",
        "prompt": code(getattr(task, "prompt", "")),
        "scores": text(", ".join(validation_scores(adapter.metadata.get("training", {})))),
        "compared with the adapter": text(comparison[0]),
        "exported by": f"lora_blip {__version__}",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value and value != code("")]
    lines = [*header, "---", "", f"# {title(adapter, base)}", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, "Replace FOLDER by the path or the hub name of this folder.", "", usage(task), ""])


def title(adapter: Adapter, base: str) -> str:
    """Return the heading: the last part of the base's name, and the task."""
    name = base.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return text(f"{name} with a merged LoRA adapter ({adapter.task.get('name', '')})")


def usage(task: PredictionTask) -> str:
    """Return code that loads and uses the folder."""
    parts: Any = task
    loading = LOADING.format(kind=task.backbone.architecture)
    if not task.writes_text:
        is_blip = task.backbone.family == "blip"
        flag, result = ("use_itm_head", "itm_score") if is_blip else ("use_image_text_matching_head", "logits_per_image")
        return block(loading + RANKING.format(flag=flag, result=result, temperature=f"{parts.temperature.item():.6g}"))
    prompt = json.dumps(parts.prompt.replace("{question}", "what color is it?"))
    part = GENERATORS[task.backbone.family]
    blocks = [block(loading + GENERATING.format(prompt=prompt, part=part))]
    if task.backbone.architecture != "BlipForQuestionAnswering":  # it has no pipeline in transformers
        blocks.append(block(PIPELINE.format(prompt=prompt, part=part)))
    return "\n".join([*blocks, GENERATION_NOTE])


def block(lines: str) -> str:
    return f"```python\n{lines}```\n"


def text(value: object) -> str:
    """Return a text for Markdown, on one line: characters that format it are escaped."""
    line = printable(str(value)[:LONGEST])
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def code(value: object) -> str:
    """Return a text as inline code, without characters that end it."""
    line = printable(str(value)[:LONGEST]).replace("`", "'").replace("|", "¦")
    return f"`{line}`"
