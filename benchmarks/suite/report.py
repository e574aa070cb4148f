"""Write the measurements to benchmarks/results/<machine>_<date>.json, and as a table to a .md file with the same name."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite.pairs import Cell

RESULTS = Path(__file__).resolve().parents[1] / "results"
MEANT = "A ratio is the median over the rounds (the smallest–the largest). Below 1 means less than the reference."
QUICK = "Quick: one model of two narrow layers replaces every size, to check that the rows run. Its times have no meaning.\n"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "pillow", "numpy")


def collect(
    rows: Mapping[str, Iterable[Cell]], folder: Path, kind: str = "", left_out: list[str] | None = None
) -> tuple[Path, bool]:
    """Measure the rows in order. Print each comparison, and write both files again after each one.

    If a row fails, report it and continue with the next. Return the path of the JSON file, and True if no row failed.
    left_out: the list to which the rows add the comparisons for which there is no time.
    """
    result: dict[str, Any] = {"machine": machine(), "date": f"{datetime.now():%Y-%m-%d %H:%M}", "command": command()}
    result |= {"commit": commit(), "versions": versions(), "seconds": {}, "failed": {}}
    result |= {"left_out": [] if left_out is None else left_out, "cells": []}
    path = unused_path(folder, kind)
    print(f"{described(result)}\n→ {path}\n{MEANT}\n{QUICK * ('quick' in kind)}", flush=True)
    for name, cells in rows.items():
        started = time.perf_counter()
        try:
            for cell in cells:
                result["cells"].append(cell.as_json())
                print(cell, flush=True)
                write(result, path)
        except Exception as error:  # one failed row must not lose the results of the others
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        result["seconds"][name] = round(time.perf_counter() - started, 1)
        write(result, path)
    print("".join(f"left out, because there was no time: {each}\n" for each in result["left_out"]), end="")
    return path, not result["failed"]


def write(result: dict[str, Any], path: Path) -> None:
    """Write the JSON file, and the table beside it."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def unused_path(folder: Path, kind: str = "") -> Path:
    """Return a new file name, so that no earlier result is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", str(machine()["name"]).lower()).strip("-")
    stem = "_".join(filter(None, (name, kind, f"{datetime.now():%Y-%m-%d}")))
    names = (stem, *(f"{stem}_{number}" for number in range(2, 1000)))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


# ---------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """Return the name of the CPU, that of the GPU if there is one, and the numbers of cores and threads."""
    cpu = cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads(), "system": platform.platform()}
    if torch.cuda.is_available():
        return {"name": torch.cuda.get_device_name(), "card": torch.cuda.get_device_name(), **facts}
    return {"name": f"{cpu} {cores} cores", "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(), **facts}


def cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}, **cuda}


def commit() -> str:
    """Return the commit of the code, with "+" if files differ from it; "" outside of a git checkout."""
    try:
        run = partial(subprocess.run, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
        return run(["git", "rev-parse", "HEAD"]).stdout.strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> str:
    """Return the command of this process, as far as Python knows it."""
    module = sys.modules["__main__"].__spec__
    started = f"python -m {module.name.removesuffix('.__main__')}" if module else f"python {Path(sys.argv[0]).name}"
    return shlex.join([*shlex.split(started), *sys.argv[1:]])


# ---------------------------------------------------------------- the page


def described(result: dict[str, Any]) -> str:
    where = result["machine"]
    named = f"{where['card']}, {where['cpu']}" if "card" in where else where["cpu"]
    which = f"commit {result['commit'][:10] + '+' * result['commit'].endswith('+')}, " if result["commit"] else ""
    return f"{named}, {where['cores']} cores, {where['threads']} threads, {result['date']}; {which}" + ", ".join(
        f"{name} {number}" for name, number in result["versions"].items()
    )


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['machine']['name']}, {result['date']}", "", described(result), "", f"    {result['command']}", ""]
    lines += [
        MEANT,
        "",
    ]
    for row in dict.fromkeys(cell["row"] for cell in result["cells"]):
        lines += [f"## {row}", "", "| | | ratio | min–max | rounds | median | |", "|---|---|---|---|---|---|---|"]
        for cell in (cell for cell in result["cells"] if cell["row"] == row):
            lines += [line(cell, name) for name in cell["ratios"]]
            lines += [f"| {cell['setting']} | {key} | | | | {shown(value)} | |" for key, value in cell["notes"].items()]
        lines.append("")
    lines += [f"{row} failed: {error}\n" for row, error in result["failed"].items()]
    lines += [f"left out, because there was no time: {each}\n" for each in result["left_out"]]
    return "\n".join(lines)


def line(cell: dict[str, Any], name: str) -> str:
    ratio, median = cell["ratios"][name], cell["medians"][name]
    spread, rounds = f"{ratio['min']:.3f}–{ratio['max']:.3f}", len(cell["figures"][name])
    first = f"| {cell['setting']} | {name} | {ratio['median']:.3f} "
    if name == cell["reference"]:
        spread = "reference"
    return first + f"| {spread} | {rounds} | {median:.5g} | {cell['unit']} |"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
