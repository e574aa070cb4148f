"""Run lessons 5, 6 and 11 with seeds 0, 1 and 2, and write their recorded numbers to lessons/spread.md: `make lessons-spread`

`python -m lessons.spread 05 11` runs only these lessons. Lessons that the command does not run keep their rows in the table.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lessons import process

HERE = Path(__file__).resolve().parent
LESSONS, SEEDS, AT_ONCE = ("05", "06", "11"), (0, 1, 2), 2
ROW_STARTS = tuple(f"| {number}" for number in LESSONS)
TABLE = HERE / "spread.md"
TITLE = """# Lessons 5, 6 and 11 with three seeds

Numbers that may depend on the seed, for seeds 0, 1 and 2. `make lessons-spread` writes this table.

With the same seed, another version of the code or of PyTorch, or another processor, can give other numbers, because it rounds
differently. If a difference is smaller than the range of the seeds, it may come from the seed: compare its
sign for each seed.

| lesson | number | seed 0 | seed 1 | seed 2 | range |
|---|---|---|---|---|---|
"""


def execute(lesson: Path, seed: int, folder: Path) -> list[dict[str, object]]:
    """Run a lesson with a seed and return its recorded numbers. Exit if it fails."""
    file = folder / f"{lesson.stem}_{seed}.jsonl"
    done = process.run(lesson, LESSON_SEED=str(seed), LESSON_RECORD=str(file))
    if done.returncode:
        raise SystemExit(f"{lesson.name} fails with LESSON_SEED={seed}:\n{process.end_of_output(done)}")
    print(f"{lesson.name} with seed {seed}: ok", flush=True)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def rows(records: list[dict[str, object]]) -> list[str]:
    """Return a row of the table for each recorded number, in the order of the lessons and of their records."""
    values: dict[tuple[object, object], dict[object, float]] = {}
    for line in records:
        values.setdefault((line["lesson"], line["name"]), {})[line["seed"]] = float(str(line["value"]))
    lines = []
    for (lesson, name), by_seed in values.items():
        cells = [f"{by_seed[seed]:.4g}" if seed in by_seed else "–" for seed in SEEDS]
        spread = max(by_seed.values()) - min(by_seed.values())
        lines.append(f"| {lesson} | {str(name).replace('|', ' ')} | {' | '.join(cells)} | {spread:.2g} |")
    return lines


def merged(old: str, new: list[str], chosen: tuple[str, ...]) -> str:
    """Return the table with the new rows of the chosen lessons and the old rows of the others, sorted by lesson."""
    kept = [line for line in old.splitlines() if line.startswith(ROW_STARTS) and not line[2:].startswith(chosen)]
    return TITLE + "".join(f"{line}\n" for line in sorted([*kept, *new], key=lambda line: line[:4]))


def main() -> None:
    chosen = tuple(sys.argv[1:]) or LESSONS
    lessons = sorted(path for number in chosen for path in HERE.glob(f"{number}_*.py"))
    if not set(chosen) <= set(LESSONS) or len(lessons) < len(chosen):
        sys.exit(
            f"give one or more of {', '.join(LESSONS)}; lessons found: {', '.join(path.name for path in lessons) or 'none'}"
        )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(execute, lesson, seed, Path(folder)) for lesson in lessons for seed in SEEDS]
        records = [line for job in jobs for line in job.result()]
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    TABLE.write_text(merged(old, rows(records), chosen), encoding="utf-8")
    print(f"{len(records)} numbers in {TABLE}")


if __name__ == "__main__":
    main()
