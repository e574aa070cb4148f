"""Run a lesson or a solution in a separate process."""

import os
import subprocess
import sys
from pathlib import Path


def run(path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with one thread and these environment variables. Return its exit code and its output."""
    return subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def end_of_output(done: subprocess.CompletedProcess[str]) -> str:
    """Return the end of the output, and the traceback of an error."""
    return done.stdout[-2000:] + done.stderr[-4000:]
