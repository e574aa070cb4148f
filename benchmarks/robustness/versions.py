"""Compare fast and plain computation on each supported version of transformers: `python -m benchmarks.robustness.versions`.

Every version is installed without its dependencies, which are the same for all, into a folder that comes first on
PYTHONPATH. Each cell of the table compares one embedded base with FAST on and off: captions, answers and rankings must be
equal (probabilities to 1e-4), and twenty training losses to 1e-4. The exit status is 1 if a cell differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors

VERSIONS = ("5.20.0", "5.23.0", "5.24.0")
ROOT = Path(__file__).resolve().parents[2]
CELLS = {  # base → the results to compare: predictions of the base, and losses of an adapter on it
    "tiny-blip": ("caption", "answer", "rank", "losses"), "tiny-blip2": ("caption", "answer", "rank", "losses"),
    "tiny-blip-vqa": ("answer", "rank", "losses"), "tiny-blip-itm": ("rank", "losses"),
}  # fmt: skip
CORE = [
    f"tests/{name}.py"
    for name in (
        "lora/test_lora",
        "tasks/test_caption",
        "kernels/test_signatures",
        "models/test_library_models",
        "inference/test_export",
        "test_fixtures",
    )
]
TEXTS = ["a red circle on top of a blue square", "a green triangle", "no shape is present in the image", "a blue square above"]
QUESTION = "what color is the circle?"
BOUND = 1e-4
IMAGES = 8


def results(base: str, cell: str, fast: bool) -> list[Any]:
    """Return the texts, the probabilities or the losses of a cell, in a process with one version of transformers."""
    import torch

    from lora_blip.data.example import Example
    from lora_blip.data.images import open_image
    from lora_blip.data.loader import HostBatch, pixel_values
    from lora_blip.lora import injection, targets
    from lora_blip.models.loading import load_backbone
    from lora_blip.tasks.base import Generation
    from lora_blip.tasks.registry import TASKS, default_task

    torch.manual_seed(0)
    backbone = load_backbone(str(ROOT / "assets" / base), "cpu", fast=fast)
    name = "vqa" if cell == "answer" else default_task(backbone.architecture)
    task: Any = TASKS[name](backbone, "", Generation(12, 3 if cell == "caption" else 1))
    paths = sorted((ROOT / "image_test").glob("*.png"))[:IMAGES]
    pixels = torch.stack([pixel_values(open_image(path), backbone.image_processor) for path in paths])
    examples = [
        Example(path, TEXTS[n % len(TEXTS)], path.name, n, "", QUESTION, (TEXTS[n % len(TEXTS)],))
        for n, path in enumerate(paths)
    ]
    if cell == "rank":
        return task.rank(pixels, examples, TEXTS).flatten().tolist()
    if cell != "losses":
        return task.predict(pixels, examples)
    adapters = injection.inject(backbone.model, targets.find(backbone.model, "vit", 4, 8.0))
    batch = task.batch(HostBatch(examples, pixels))
    optimizer, losses = torch.optim.AdamW([half for x in adapters.values() for half in (x.A, x.B)], lr=1e-3), []
    for _ in range(20):
        loss = task.repeatable_loss(batch) / batch.count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def equal(fast: list[Any], plain: list[Any]) -> bool:
    """Return True for equal texts, or for numbers whose relative difference is at most BOUND."""
    if isinstance(plain[0], str):
        return fast == plain
    return len(fast) == len(plain) and all(abs(a - b) <= BOUND * max(1.0, abs(b)) for a, b in zip(fast, plain, strict=True))


def row(version: str) -> bool:
    """Print a line for each base of this process's version of transformers. Return False if a cell differs."""
    import torch
    import transformers

    if transformers.__version__ != version:
        raise SystemExit(f"transformers {version} is needed, but {transformers.__version__} was imported")
    torch.set_num_threads(1)
    all_equal = True
    for base, cells in CELLS.items():
        is_equal = {cell: equal(results(base, cell, True), results(base, cell, False)) for cell in cells}
        all_equal = all_equal and all(is_equal.values())
        names = CELLS["tiny-blip"]
        shown = ["–" if name not in is_equal else "equal" if is_equal[name] else "DIFFERS" for name in names]
        print(f"| {version} | {base} | {' | '.join(shown)} |", flush=True)
    return all_equal


def overlay(package: str, version: str, folder: Path) -> dict[str, str]:
    """Install one version of a package without its dependencies, and return the environment variables that import it."""
    target = folder / version
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), f"{package}=={version}"], check=True)
    return os.environ | {"PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tests", action="store_true", help="run the core tests on the lowest and the newest version, too")
    options = parser.parse_args()
    if options.row:
        raise SystemExit(0 if row(options.row) else 1)
    print(f"| transformers | base | {' | '.join(CELLS['tiny-blip'])} |\n|---|---|---|---|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for version in VERSIONS:
            environment = overlay("transformers", version, Path(folder))
            command = [sys.executable, "-m", "benchmarks.robustness.versions", "--row", version]
            failed |= subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0
            if options.tests and version in (VERSIONS[0], VERSIONS[-1]):
                tests = [sys.executable, "-m", "pytest", "-n", "2", *CORE]
                failed |= subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode != 0
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    report_errors(main)
