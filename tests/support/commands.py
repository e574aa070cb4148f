"""Run `lora-blip` in the process of a test."""

from typing import Any

import pytest

from lora_blip.cli import main


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Return the exit status, stdout and stderr of `lora-blip` with these arguments."""
    monkeypatch.setattr("sys.argv", ["lora-blip", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err
