"""Write docs/code_map.md: the import graph, and the files that one caption passes.

`python -m benchmarks.studies.code_map`
"""

import ast
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lora_blip.cli import report_errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_blip"
PAGE = ROOT / "docs" / "code_map.md"


def imports() -> dict[str, set[str]]:
    """Return {package or file of the root: those that it imports}."""
    imported: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_blip"):
                inner = (node.module or "").split(".")[1:]
                imported.setdefault(name, set()).update([inner[0]] if inner else [alias.name for alias in node.names])
    everything = set(imported) | {each for some in imported.values() for each in some}
    return {name: (imported.get(name, set()) - {name}) & everything for name in sorted(everything) if not name.startswith("__")}


def levels(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Return the level of each package: one above the highest that it imports."""
    level: dict[str, int] = {}
    while len(level) < len(arrows):
        ready = [name for name, some in arrows.items() if name not in level and some <= level.keys()]
        if not ready:
            raise SystemExit(f"these packages import each other: {', '.join(sorted(arrows.keys() - level.keys()))}")
        level |= {name: 1 + max((level[each] for each in arrows[name]), default=-1) for name in ready}
    return level


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the arrows without those that follow from others."""

    def below(name: str) -> set[str]:
        return {x for each in arrows[name] for x in (each, *below(each))}

    return {name: {each for each in some if all(each not in below(x) for x in some)} for name, some in arrows.items()}


def picture(arrows: dict[str, set[str]]) -> str:
    """Return the graph in Mermaid, which GitHub draws. Training and inference have one level."""
    lines, level = ["flowchart TD"], levels(arrows)
    for name, some in sorted(reduced(arrows).items(), key=lambda item: (-level[item[0]], item[0])):
        lines += [f"    {name} --> {each}" for each in sorted(some)] or [f"    {name}"]
    return "\n".join(lines)


def caption_path(fast: bool) -> list[str]:
    """Return the files that run between an annotation file and `lora_A.grad`, in the order of their first call."""
    import torch

    from lora_blip.data import annotations
    from lora_blip.data.dataset import ImageDataset
    from lora_blip.data.loader import collate
    from lora_blip.lora import injection, targets
    from lora_blip.models.loading import load_backbone
    from lora_blip.tasks.caption import CaptionTask

    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = load_backbone(str(ROOT / "assets/tiny-blip"), "cpu", fast=fast)
    adapters = injection.inject(backbone.model, targets.find(backbone.model, "vit", 4, 8.0))
    task, files = CaptionTask(backbone), {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            files.setdefault(str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), None)

    sys.setprofile(note)
    try:
        examples, _ = annotations.read(ROOT / "annotations.jsonl", check=task.check, decode=False, report=lambda _: None)
        dataset = ImageDataset(examples[:2], backbone.image_processor, augmented=False, seed=0)
        batch = task.batch(collate([dataset[0, line] for line in range(2)]))
        task.loss(batch).backward()
    finally:
        sys.setprofile(None)
    assert all(lora.A.grad is not None for lora in adapters.values())
    return list(files)


def page() -> str:
    arrows = imports()
    level = levels(arrows)
    rows = [
        f"| {name} | {level[name]} | {len(list((PACKAGE / name).rglob('*.py'))) or 1} | {', '.join(sorted(some)) or '–'} |"
        for name, some in sorted(arrows.items(), key=lambda item: (-level[item[0]], item[0]))
    ]
    paths = {fast: caption_path(fast) for fast in (False, True)}
    return f"""# Code map

`python -m benchmarks.studies.code_map` writes this page from the source.

## Which package imports which

An arrow means "imports". No arrow is drawn from A to C if A imports B, and B imports C.
Training and inference never import each other.

```mermaid
{picture(arrows)}
```

| package | level | files | imports |
|---|---|---|---|
{chr(10).join(rows)}

## The files that compute the gradient of one caption

These files run between a line of the annotation file and the gradient of A, in the order of their first call. The training
loop is left out:
{len(paths[False])} with `FAST = False`, and {len(paths[True])} by default.

| `FAST = False` | by default |
|---|---|
| {"<br>".join(paths[False])} | {"<br>".join(paths[True])} |
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    report_errors(main)
