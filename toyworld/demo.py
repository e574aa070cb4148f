"""The demos: train on the shipped cubes, score base and adapter on new ones. `python -m toyworld.demo caption|vqa|retrieval`

Flags of train.py may follow: python -m toyworld.demo caption --model assets/tiny-blip2 --targets vit,qformer
"""

import json
import re
import runpy
import sys
import time
from datetime import datetime
from pathlib import Path

from lora_blip.metrics.exact import exact_match

NOUN = re.compile(r"\b(cube|block|circle|square|triangle|shape)\b")
REFERENCES = Path("image_test/annotations.jsonl")
FLAGS = {
    "caption": "",
    "vqa": "--model assets/tiny-blip-vqa --annotations image_train/questions.jsonl --targets vit,text --epochs 6",
    "retrieval": "--model assets/tiny-blip-itm --annotations image_train/sentences.jsonl --targets vit,text --epochs 20 "
    "--batch-size 32",
}
KNOWN = {"vqa": "image_test/questions.jsonl", "retrieval": "image_test/sentences.jsonl"}


def without_noun(text: str) -> str:
    return NOUN.sub("thing", text)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(predictions: list[dict[str, str]], references: list[dict[str, str]]) -> str:
    """Exact match of the frozen base and with the adapter: whole captions, and with the noun left out."""
    said = {Path(line["image"]).name: line for line in predictions}
    rows = [
        f"{'exact match on':<22}{'images':>7}{'frozen base':>13}{'with LoRA':>11}{'  noun left out:':<17}{'base':>7}{'LoRA':>8}"
    ]
    for group in dict.fromkeys(line["group"] for line in references):
        mine = [line for line in references if line["group"] == group]
        scores = []
        for form in (str, without_noun):
            right = [[form(line["text"])] for line in mine]
            for key in ("base_text", "text"):
                scores.append(exact_match([form(said[Path(line["image"]).name][key]) for line in mine], right))
        whole_base, whole, bare_base, bare = (f"{score:.1%}" for score in scores)
        rows.append(f"{group:<22}{len(mine):>7}{whole_base:>13}{whole:>11}{'':<17}{bare_base:>7}{bare:>8}")
    return "\n".join(rows)


def run(script: str, *flags: str) -> float:
    """Seconds that a script takes, run here as it is on its own: libraries are imported once."""
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


def captioned(folder: Path) -> float:
    """Caption image_test/ and count what is right, with and without the noun."""
    made = folder / "captions"
    flags = ("--adapter", str(folder), "--compare", "--references", str(REFERENCES), "--output-dir", str(made))
    seconds = run("infer.py", *flags)
    print(f"\n{table(lines(made / 'predictions.jsonl'), lines(REFERENCES))}\n")
    return seconds


def evaluated(folder: Path, task: str) -> float:
    flags = ("--adapter", str(folder), "--references", KNOWN[task], "--output-dir", str(folder / "evaluation"))
    return run("lora_blip", "evaluate", *flags)


if __name__ == "__main__":
    task, *flags = sys.argv[1:] or ["caption"]
    if task not in FLAGS or "--output-dir" in flags:
        sys.exit(f"python -m toyworld.demo {'|'.join(FLAGS)}, then flags of train.py, but not --output-dir")
    folder = Path("lora_blip_output") / f"demo_{task}_{datetime.now():%Y%m%d_%H%M%S}"
    trained = run("train.py", "--output-dir", str(folder), *FLAGS[task].split(), *flags)
    scored = captioned(folder) if task == "caption" else evaluated(folder, task)
    print(f"trained in {trained:.0f} s, scored base and adapter in {scored:.0f} s; all of it is in {folder}")
