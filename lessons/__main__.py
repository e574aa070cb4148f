"""Run all lessons and solutions, two at a time: `make lessons`, or `python -m lessons 03 05` for some of them.

Each runs in a separate process. A lesson fails if one of its assertions fails. The exit code is 1 if one fails.
"""

import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from lessons import process

HERE = Path(__file__).resolve().parent
AT_ONCE = 2  # processes, each with one thread
QUIET = 10.0  # seconds without a finished lesson after which a line names the lessons that are running
LONG = ("05", "06", "11")  # they train several adapters, so they start first


def scripts(prefixes: list[str]) -> list[Path]:
    """Return the lessons and solutions whose names start with one of the prefixes, or all. The long ones are first."""
    found = sorted(HERE.glob("[0-9][0-9]_*.py")) + sorted((HERE / "solutions").glob("[0-9][0-9]_*.py"))
    found.sort(key=lambda path: not path.name.startswith(LONG))
    return [path for path in found if not prefixes or path.name.startswith(tuple(prefixes))]


def execute(path: Path) -> tuple[Path, float, subprocess.CompletedProcess[str]]:
    """Run a lesson and return its path, its seconds and its output."""
    started = time.perf_counter()
    done = process.run(path)
    return path, time.perf_counter() - started, done


def main() -> None:
    chosen = scripts(sys.argv[1:])
    if not chosen:
        sys.exit(f"no lesson starts with {' or '.join(sys.argv[1:]) or 'two digits'}: give the first digits, such as 03")
    print(f"{len(chosen)} lessons and solutions, {AT_ONCE} at a time: at most ten minutes on two cores", flush=True)
    started, failed = time.perf_counter(), []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {pool.submit(execute, path): path for path in chosen}
        while jobs:
            finished, _ = wait(jobs, QUIET, FIRST_COMPLETED)
            if not finished:
                running = " and ".join(path.relative_to(HERE).as_posix() for path in list(jobs.values())[:AT_ONCE])
                print(f"{time.perf_counter() - started:.0f} s: running {running}", flush=True)
            for job in finished:
                del jobs[job]
                path, seconds, done = job.result()
                print(
                    f"{path.relative_to(HERE).as_posix():<52}{seconds:6.1f} s  {'failed' if done.returncode else 'ok'}",
                    flush=True,
                )
                if done.returncode:
                    failed.append(path)
                    print(process.end_of_output(done), flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(chosen) - len(failed)} of {len(chosen)} passed in {seconds:.0f} s. Pictures: lessons/figures/")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
