"""Write the settings of train.py and infer.py from `lora_blip/config.py`: names, defaults and help texts.

`python -m benchmarks.studies.script_settings`
"""

from dataclasses import Field
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors
from lora_blip.config import InferConfig, TrainConfig
from lora_blip.runtime.settings import settings_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train.py": TrainConfig, "infer.py": InferConfig}


def line(entry: Field[Any]) -> str:
    """Return the line of a setting: NAME = default  # help text."""
    value = f'"{entry.default}"' if isinstance(entry.default, str) else repr(entry.default)
    return f"{entry.name.upper()} = {value}  # {entry.metadata['doc']}\n"


def block(kind: type) -> str:
    """Return the lines of all settings of a config class, with a heading above each group."""
    return "".join(
        (f"\n# {entry.metadata['group']}\n" if entry.metadata["group"] else "") + line(entry) for entry in settings_of(kind)
    )


def rewritten(script: str, kind: type) -> str:
    """Return the source of a script with the settings of `kind` between its docstring and its last block."""
    head, _, rest = script.partition("\n")
    return f"{head}\n{block(kind)}\n{rest[rest.index('if __name__') :]}"


def main() -> None:
    for name, kind in SCRIPTS.items():
        path = ROOT / name
        path.write_text(rewritten(path.read_text(encoding="utf-8"), kind), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    report_errors(main)
