"""The line that `prepare` prints at its end: what to do with the files."""

import json
from collections.abc import Mapping
from pathlib import Path

from lora_blip.runtime.command_line import training_command
from lora_blip.runtime.system_errors import command_line, quoted_for_shell


def next_step(files: Mapping[str, Path], kind: str, only_train: bool) -> str:
    """Return the command of a training with train.jsonl, or how to use val.jsonl or test.jsonl if it is the only file.

    files: {split: file}. kind: "captions" or "questions". only_train: whether the user wants no other split; the command then
    keeps the setting VAL_ANNOTATIONS of train.py.
    """
    task = ["--task", "vqa"] * (kind == "questions")
    if "train" in files:
        flags = {"train": "--annotations", "val": "--val-annotations"}
        words = [word for split, flag in flags.items() if split in files for word in (flag, str(files[split]))]
        return command_line(training_command([*words, *task], ["--val-annotations"] * only_train))
    if "val" in files:
        path = files["val"].as_posix()
        return f"train with VAL_ANNOTATIONS = {json.dumps(path)} (--val-annotations {quoted_for_shell(path)})"
    return command_line(["lora-blip", "evaluate", "--references", str(files["test"])])
