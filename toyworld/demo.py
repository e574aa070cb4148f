"""The demos: train on the shipped cubes, score base and adapter on new ones. `python -m toyworld.demo caption|vqa|retrieval`

Flags of train.py may follow: python -m toyworld.demo caption --model assets/tiny-blip2 --targets vit,qformer
"""

import json
import os
import re
import runpy
import sys
import time
from datetime import datetime
from pathlib import Path

from lora_blip.cli import report_errors
from lora_blip.metrics.exact import exact_match
from lora_blip.runtime.system_errors import command_line

NOUN = re.compile(r"\b(cube|block|circle|square|triangle|shape)\b")
REFERENCES = Path("image_test/annotations.jsonl")
FLAGS = {
    "caption": "--epochs 20",
    "vqa": "--model assets/tiny-blip-vqa --annotations image_train/questions.jsonl --targets vit,text --epochs 6",
    "retrieval": "--model assets/tiny-blip-itm --annotations image_train/sentences.jsonl --targets vit,text --epochs 20 "
    "--batch-size 32",
}
KNOWN = {"caption": str(REFERENCES), "vqa": "image_test/questions.jsonl", "retrieval": "image_test/sentences.jsonl"}
CHECKPOINTS = {
    "caption": "Salesforce/blip-image-captioning-base",
    "vqa": "Salesforce/blip-vqa-base",
    "retrieval": "Salesforce/blip-itm-base-coco",
}
INPUTS = {"caption": [], "vqa": ["--question", "what color is it?"], "retrieval": ["--texts", "a red cube | a blue cube"]}


def without_noun(text: str) -> str:
    return NOUN.sub("thing", text)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(predictions: list[dict[str, str]], references: list[dict[str, str]]) -> str:
    """Return the exact match of the frozen base and with the adapter: whole captions, and without the noun."""
    by_name = {Path(line["image"]).name: line for line in predictions}
    rows = [
        f"{'exact match on':<22}{'images':>7}{'frozen base':>13}{'with LoRA':>11}{'  noun left out:':<17}{'base':>7}{'LoRA':>8}"
    ]
    for group in dict.fromkeys(line["group"] for line in references):
        some = [line for line in references if line["group"] == group]
        scores = []
        for form in (str, without_noun):
            right = [[form(line["text"])] for line in some]
            for key in ("base_text", "text"):
                scores.append(exact_match([form(by_name[Path(line["image"]).name][key]) for line in some], right))
        whole_base, whole, bare_base, bare = (f"{score:.1%}" for score in scores)
        rows.append(f"{group:<22}{len(some):>7}{whole_base:>13}{whole:>11}{'':<17}{bare_base:>7}{bare:>8}")
    rows.append('(noun left out: "a red cube" and "a red block" count as equal)')
    return "\n".join(rows)


def score_table(metrics: Path) -> str:
    """Return the scores of metrics.json, which `evaluate` has written: base and adapter."""
    scores = json.loads(metrics.read_text(encoding="utf-8"))["scores"]
    width = max(map(len, scores), default=0) + 2  # some names are long: "R@1 image→text: unseen colour pairs (12)"
    rows = [f"{'score':<{width}}{'frozen base':>13}{'with LoRA':>11}"]
    for name, row in scores.items():
        values = [f"{row[key]['value']:.3f}" if row[key] else "–" for key in ("base", "adapted")]
        rows.append(f"{name:<{width}}{values[0]:>13}{values[1]:>11}")
    return "\n".join(rows)


def run(script: str, *flags: str) -> float:
    """Run a script in this process, as on the command line, and return its seconds. Libraries are imported once."""
    started, before = time.perf_counter(), sys.argv
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before
    return time.perf_counter() - started


def captioned(folder: Path) -> tuple[float, str, Path]:
    """Caption image_test/ with base and adapter. Return the seconds, the table of exact match, and the page."""
    output = folder / "captions"
    flags = ("--adapter", str(folder), "--compare", "--references", str(REFERENCES), "--output-dir", str(output))
    seconds = run("infer.py", *flags)
    return seconds, table(lines(output / "predictions.jsonl"), lines(REFERENCES)), output / "gallery.html"


def evaluated(folder: Path, task: str) -> tuple[float, str, Path]:
    """Score base and adapter on image_test/. Return the seconds, the table of scores, and the page."""
    output = folder / "evaluation"
    flags = ("--adapter", str(folder), "--references", KNOWN[task], "--output-dir", str(output))
    seconds = run("lora_blip", "evaluate", *flags)
    return seconds, score_table(output / "metrics.json"), output / "report.html"


def next_commands(task: str, folder: Path) -> str:
    """Return the commands that a user runs next, with what each does."""
    here = Path(sys.executable)
    python = os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here)
    adapter = ["--adapter", str(folder)]
    commands = {
        "use this adapter": [python, "infer.py", *adapter, *INPUTS[task]],
        "score it with intervals": [python, "-m", "lora_blip", "evaluate", *adapter, "--references", KNOWN[task]],
        "train on your own images": [python, "train.py", "--model", CHECKPOINTS[task], "--annotations", "YOUR.jsonl"],
    }
    if task != "caption":
        del commands["score it with intervals"]  # the demo has done this
    return "\n".join(f"  {what + ':':<26}{command_line(command)}" for what, command in commands.items())


def main() -> None:
    task, *flags = sys.argv[1:] or ["caption"]
    if task not in FLAGS or "--output-dir" in flags:
        sys.exit(f"python -m toyworld.demo {'|'.join(FLAGS)}, then flags of train.py, but not --output-dir")
    folder = Path("lora_blip_output") / f"demo_{task}_{datetime.now():%Y%m%d_%H%M%S}"
    print(f"1 of 2: train an adapter for the task {task} on image_train/ (one to three minutes on two cores)", flush=True)
    trained = run("train.py", "--output-dir", str(folder), *FLAGS[task].split(), *flags)
    print("\n2 of 2: score the frozen base and the adapter on image_test/ (about half a minute)", flush=True)
    scored, scores, page = captioned(folder) if task == "caption" else evaluated(folder, task)
    print(f"\ntrained in {trained:.0f} s, scored in {scored:.0f} s; all files are in {folder}\n\n{scores}\n")
    if page.exists():
        print(f"each image with its texts: {page.resolve().as_uri()}\n")
    print(f"next:\n{next_commands(task, folder)}")


if __name__ == "__main__":
    report_errors(main)
