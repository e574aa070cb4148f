"""Run each test here on CUDA (`make test-gpu`), and on the CPU as a rehearsal (`make test`, and with `slow` `make slow`).

The rehearsal finds mistakes in the tests without a GPU. On the CPU, fp16 and bf16 may be emulated. For each kind of
model, the rehearsal of a test has one precision.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
REHEARSED = {"blip": "bf16", "opt": "fp16", "t5": "bf16", "vqa": "fp16", "itm": "bf16", "itm2": "fp16"}  # kind → precision


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("device", [pytest.param("cuda", marks=CUDA), "cpu"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    runs = [item.path.parent != here or is_run(getattr(item, "callspec", None)) for item in items]
    config.hook.pytest_deselected(items=[item for item, run in zip(items, runs, strict=True) if not run])
    items[:] = [item for item, run in zip(items, runs, strict=True) if run]


def is_run(call: Any) -> bool:
    """False for a rehearsal in a precision that is not that of its kind."""
    if call is None or call.params.get("device") != "cpu" or not {"kind", "precision"} <= call.params.keys():
        return True
    return REHEARSED[call.params["kind"]] == call.params["precision"]
