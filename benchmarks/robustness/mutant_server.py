"""The processes of `benchmarks.robustness.mutants`: one measures coverage by test, the other tests mutants in forked children.

Both are started as scripts in a private copy of the tree, so that they import nothing of the tree in advance.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]


def trace(rc: str, out: Path, file: str, options: list[str]) -> int:
    """Execute a test file under coverage, one context per test; write its tests, their CPU seconds and those that fail."""
    import coverage

    measured = coverage.Coverage(config_file=rc)
    measured.start()
    os.environ["COVERAGE_PROCESS_START"] = rc  # subprocesses measure too, in the context of the test that starts them
    tests: list[str] = []
    seconds: dict[str, float] = {}
    broken: set[str] = set()

    class Tracer(Checkpoints):
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
            os.environ["MUTANTS_TEST"] = str(len(tests))
            tests.append(item.nodeid)
            measured.switch_context(os.environ["MUTANTS_TEST"])
            measured.set_option("run:context", os.environ["MUTANTS_TEST"])  # the context of forked children
            try:
                return (yield)
            finally:
                os.environ["MUTANTS_TEST"] = ""
                measured.switch_context("")

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item: pytest.Item) -> Any:
            before = sum(os.times()[:4])
            try:
                return (yield)
            finally:
                seconds[item.nodeid] = round(sum(os.times()[:4]) - before, 3)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if not report.passed:  # a skipped test cannot notice a mutant
                broken.add(report.nodeid)

    pytest.main([*OPTIONS, *options, "--basetemp", str(out.with_suffix(".tmp")), file], plugins=[Tracer()])
    measured.stop()
    measured.save()
    out.write_text(json.dumps({"tests": tests, "seconds": seconds, "broken": sorted(broken)}), encoding="utf-8")
    return 0


class Checkpoints:
    """Creates the session fixture `checkpoints` once per server. It does not depend on the code of the package."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        if fixturedef.argname != "checkpoints":
            return (yield)
        stored = Path.cwd().with_name(f"{Path.cwd().name}_checkpoints")
        if stored.exists():
            known = {path.name: path for path in stored.iterdir()}
            real, fixturedef.func = fixturedef.func, lambda **_: known
            try:
                return (yield)
            finally:
                fixturedef.func = real
        checkpoints = yield
        whole = stored.with_name(f"{stored.name}_{os.getpid()}")
        for name, folder in checkpoints.items():
            shutil.copytree(folder, whole / name)
        whole.rename(stored)
        return checkpoints


# ---------------------------------------------------------------- the server: forks a child per mutant


def serve(options: list[str], tests: list[str]) -> None:
    """Import everything but the tree's own code, then answer each job, a line of JSON on stdin, with a line on stdout."""
    folder = Path.cwd()
    sys.path[0:1] = [str(folder)]
    sys.stdout, answers = sys.stderr, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    listed = folder.with_name(f"{folder.name}_modules.json")
    _forked(folder, lambda: _list_modules(listed, [*options, *tests]), 600)
    for name in json.loads(listed.read_text(encoding="utf-8")):
        try:
            __import__(name)
        except BaseException as error:  # some modules only import in the order of a real run
            print(f"not imported in advance: {name}: {error}")
    for line in sys.stdin:
        job = json.loads(line)
        if "rc" in job:
            code = _forked(folder, lambda job=job: trace(job["rc"], Path(job["out"]), job["file"], options), job["limit"])
            answer = {"code": code}
        else:
            answer = _answer(folder, job)
        print(json.dumps(answer), file=answers, flush=True)


def _list_modules(listed: Path, arguments: list[str]) -> int:
    """Collect all tests once, which also writes their compiled files, and list the modules from outside the tree."""
    sys.dont_write_bytecode = False
    del os.environ["PYTHONDONTWRITEBYTECODE"]
    status = pytest.main([*OPTIONS, "--collect-only", *arguments])
    inside = str(Path.cwd())
    names = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (
            name != "__main__"
            and file
            and not file.startswith(inside)
            and getattr(module, "__spec__", None)
            and "pytest" not in name
        ):
            names.append(name)
    listed.write_text(json.dumps(names), encoding="utf-8")
    return int(status)


def _answer(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    path = folder / job["file"]
    original, status = path.read_bytes(), path.stat()
    result = folder.with_name(f"{folder.name}_result.json")
    result.unlink(missing_ok=True)
    path.write_text(job["source"], encoding="utf-8")  # with a new time, so that no compiled file fits it
    started = time.time()
    try:
        code = _forked(folder, lambda: _test(job["tests"], result), job["limit"])
    finally:
        path.write_bytes(original)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result_of_tests = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    return {"code": code, "seconds": round(time.time() - started, 2), **result_of_tests}


def _forked(folder: Path, act: Callable[[], int], limit: float) -> int:
    """Return the exit status of `act` in a child; 1000 if it takes more than `limit` seconds of CPU or of waiting."""
    child = os.fork()
    if not child:
        status = 70
        try:
            import resource

            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
            with folder.with_name(f"{folder.name}.log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = act()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    code = None
    ends = time.time() + 3 * limit  # the machine may be busy
    pause = 0.005
    while code is None and time.time() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(pause)
            pause = min(0.05, pause * 1.2)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also ends processes that the tests started
    if code is None:
        os.waitpid(child, 0)
    return 1000 if code in (None, -signal.SIGXCPU, -signal.SIGKILL) else code


def _test(tests: list[str], result: Path) -> int:
    """Execute the tests in this order up to the first failure; write its name."""
    order = {test: number for number, test in enumerate(tests)}
    outcome: dict[str, Any] = {"passed": 0}

    class Runner(Checkpoints):
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and "killer" not in outcome:
                outcome["killer"] = report.nodeid
                crash = getattr(report.longrepr, "reprcrash", None)
                outcome["why"] = str(crash.message if crash else report.longrepr).strip().split("\n")[0][:200]
            outcome["passed"] += report.passed and report.when == "call"
            result.write_text(json.dumps(outcome), encoding="utf-8")

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                outcome["killer"] = f"{report.nodeid} (not collected)"
                result.write_text(json.dumps(outcome), encoding="utf-8")

    files = list(dict.fromkeys(test.split("::")[0] for test in tests))
    return int(pytest.main([*OPTIONS, "-x", "--basetemp", str(result.with_suffix(".tmp")), *files], plugins=[Runner()]))


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
