"""The demo: train the shipped default, caption image_test/ with and without the adapter, count what is right.

`python -m toyworld.demo` takes the flags of train.py as well: --model assets/tiny-blip2 --targets vit,qformer
"""

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from lora_blip.metrics.exact import exact_match

NOUN = re.compile(r"\b(cube|block|circle|square|triangle|shape)\b")
REFERENCES = Path("image_test/annotations.jsonl")


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
    started = time.perf_counter()
    subprocess.run([sys.executable, script, *flags], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    folder = Path("lora_blip_output") / f"demo_{datetime.now():%Y%m%d_%H%M%S}"
    captions = folder / "captions"
    trained = run("train.py", "--output-dir", str(folder), *sys.argv[1:])
    flags = ("--adapter", str(folder), "--compare", "--references", str(REFERENCES), "--output-dir", str(captions))
    captioned = run("infer.py", *flags)
    print(f"\n{table(lines(captions / 'predictions.jsonl'), lines(REFERENCES))}")
    print(f"\ntrained in {trained:.0f} s, captioned twice in {captioned:.0f} s; all of it is in {folder}")
