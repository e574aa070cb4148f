"""Mutation testing: plant small faults in our source, and count those that a test notices.

`python -m benchmarks.robustness.mutants`, at most 90 minutes.

A mutant is the source with one fault (`mutations.py`). It is killed if one of the tests that execute its lines fails. The
survivors are printed as diffs: each one is a missing test, or is listed with a reason in `equivalent_mutants.json`. The named
mutants (`named_mutants.py`) are faults that once passed the whole suite. The others are drawn with a seed, the same number
from each part of PARTS.

Why our own code: mutmut and cosmic-ray start a new process for each mutant. Here the imports of torch, transformers and the
tests' other libraries take 10 to 20 s of each process, longer than the tests that kill most mutants. Both also mutate the
text of messages, annotations and code that only a GPU executes. This tool:
- measures once per version, with coverage.py, which tests execute which lines, also in their subprocesses;
- keeps a server per worker that has imported everything but our code, and forks a child for each mutant;
- gives each worker a private copy of the tree with the fault in it, so that subprocesses and torchrun see the fault too;
- executes the covering tests, quickest first, and stops at the first failure.

Limits: the tests of a mutant get BUDGET CPU seconds, then the mutant waits for another pass with the tests that are left.
What is not finished after `--minutes` is "unfinished" and counts as a survivor. A child that needs far more CPU time than its
tests need without the fault, or hangs, is "timeout" and counts as killed. A test that fails without any fault is not used.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.robustness.mutations import Mutant, assigned, functions, mutations, uses
from benchmarks.robustness.named_mutants import NAMED
from lora_blip.cli import report_errors

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "benchmarks" / "robustness" / "mutant_server.py"
RESULTS = ROOT / "benchmarks" / "results"
EQUIVALENT = ROOT / "benchmarks" / "robustness" / "equivalent_mutants.json"
PARTS = {  # part → its files
    "lora": [f"lora_blip/lora/{name}.py" for name in "layer attached injection merging mergeable".split()],
    "fused": ["lora_blip/lora/fused.py", "lora_blip/kernels/linear.py"],
    "routing": ["lora_blip/lora/routing.py", "lora_blip/lora/routing_state.py"],
    "adapter_file": ["lora_blip/lora/adapter_file.py"],
    **{name: [f"lora_blip/training/{name}.py"] for name in "learner loop resume checkpoint preflight".split()},
    "losses": [
        f"lora_blip/{name}.py"
        for name in "models/token_rows models/packing tasks/losses tasks/text_task kernels/head_loss".split()
    ],
    "metrics": [
        f"lora_blip/metrics/{name}.py" for name in "bootstrap captions diversity exact java retrieval tokens vqa".split()
    ],
}
SLOW_FILES = tuple(  # test files that take long and are about other code; leaving tests out can only lower the score
    "vit text_attention base_config benchmarks blocks compile dataset fast_inference formats gpu leaks records "
    "mutants image_sources preprocessing ranking report batch_runner scale scripts shipped signatures disk_cache terminal "
    "unknown_tokens".split()
)
COUNT, SEED, MINUTES = 300, 0, 90.0
BUDGET = 20.0  # CPU seconds of tests in the first pass of a mutant; each later pass has three times as many
KILLED, SURVIVED = ("killed", "timeout"), ("survived", "unfinished", "uncovered")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip


@dataclass
class Tree:
    """What is tested, and where the tool may write."""

    root: Path = ROOT
    package: str = "lora_blip"
    work: Path = ROOT / ".mutants"
    options: tuple[str, ...] = ("-m", "not gpu and not slow")
    left_out: tuple[str, ...] = SLOW_FILES
    spare: float = 60.0  # a child may take this many CPU seconds, plus 4 times the CPU seconds of its tests without the fault
    sources: dict[str, bytes] = field(default_factory=dict)  # file → content at the start

    def source(self, file: str) -> bytes:
        if file not in self.sources:
            self.sources[file] = (self.root / file).read_bytes()
        return self.sources[file]

    def files(self) -> list[str]:
        """Return the files of the tree that git tracks or does not ignore."""
        command = ["git", "-C", str(self.root), "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        if listed.returncode:
            return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]
        return [name for name in listed.stdout.split("\0") if name and (self.root / name).is_file()]

    def test_files(self) -> list[str]:
        tests = (name for name in self.files() if fnmatch(name, "tests/*test_*.py"))
        return sorted(name for name in tests if Path(name).stem.removeprefix("test_") not in self.left_out)

    def digest(self, test_file: str) -> str:
        """Identify all code that a test file executes."""
        digest = hashlib.sha256(sys.version.encode())
        for name in sorted(name for name in self.files() if name.endswith(".py")):
            if name == test_file or not Path(name).name.startswith("test_"):
                digest.update(name.encode() + self.source(name))
        return digest.hexdigest()[:16]

    def copy(self, name: str) -> Path:
        """Return a fresh private copy of the tree."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        for file in self.files():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / file, folder / file)
        return folder


# ---------------------------------------------------------------- which tests execute which lines


@dataclass
class Coverage:
    """The coverage of the tests. seconds: {test: CPU seconds}. lines: {file: {line: tests that execute it}}."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]
    broken: list[str] = field(default_factory=list)  # tests that fail without a fault

    def tests(self, file: str, lines: Iterable[int]) -> set[str]:
        known = self.lines.get(file, {})
        return {test for line in lines for test in known.get(line, ())}


def coverage_of(tree: Tree, servers: list["Server"]) -> Coverage:
    """Measure the coverage of each test file, or read it again if neither the file nor the package has changed since."""
    known: dict[str, Path] = {}
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for file in tree.test_files():
        known[file] = tree.work / f"coverage_{Path(file).stem}_{tree.digest(file)}.json"
        if not known[file].exists():
            waiting.put(file)

    def work(server: Server) -> None:
        while not waiting.empty():
            with suppress(queue.Empty):
                file = waiting.get_nowait()
                _trace(tree, file, known[file], server)

    in_threads(work, servers)
    coverage = Coverage({}, {}, [])
    for path in known.values():
        read = json.loads(path.read_text(encoding="utf-8"))
        coverage.seconds |= read["seconds"]
        coverage.broken += read["broken"]
        for file, lines in read["lines"].items():
            for line, tests in lines.items():
                coverage.lines.setdefault(file, {}).setdefault(int(line), []).extend(tests)
    return coverage


def _trace(tree: Tree, file: str, cache: Path, server: "Server") -> None:
    from coverage import CoverageData, CoverageException

    out = cache.with_suffix("")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "coveragerc").write_text(
        f"[run]\nsource = {server.folder / tree.package}\nparallel = true\ndata_file = {out / 'data'}\n"
        "context = ${MUTANTS_TEST-}\npatch =\n    _exit\n    fork\n"
        "disable_warnings =\n    no-data-collected\n    module-not-imported\n",
        encoding="utf-8",
    )
    started = time.time()
    server.ask({"rc": str(out / "coveragerc"), "out": str(out / "tests.json"), "file": file, "limit": 3600})
    if not (out / "tests.json").exists():
        raise RuntimeError(f"the coverage of {file} was not measured; see {server.folder.name}.log in {tree.work}")
    measurement = json.loads((out / "tests.json").read_text(encoding="utf-8"))
    seconds = {test: cpu for test, cpu in measurement["seconds"].items() if test not in measurement["broken"]}
    lines: dict[str, dict[int, set[str]]] = {}
    for path in out.glob("data.*"):
        data = CoverageData(str(path))
        try:
            data.read()
        except CoverageException:  # of a process that a test killed while it was written
            continue
        for measured in data.measured_files():
            known = lines.setdefault(str(Path(measured).relative_to(server.folder)), {})
            for line, contexts in data.contexts_by_lineno(measured).items():
                tests = {measurement["tests"][int(number)] for number in contexts if number}
                known.setdefault(line, set()).update(tests & seconds.keys())
    used = {name: {line: sorted(tests) for line, tests in known.items() if tests} for name, known in sorted(lines.items())}
    cache.write_text(json.dumps({"seconds": seconds, "lines": used, "broken": measurement["broken"]}), encoding="utf-8")
    shutil.rmtree(out)
    took, needed = time.time() - started, sum(seconds.values())
    print(
        f"{file}: {len(seconds)} tests, {needed:.0f} s of CPU, {took:.0f} s; without a fault fail {measurement['broken']}",
        flush=True,
    )


# ---------------------------------------------------------------- mutants and their tests


def candidates(tree: Tree, files: Iterable[str]) -> list[Mutant]:
    return [mutant for file in files if (tree.root / file).exists() for mutant in mutations(file, tree.source(file))]


def drawn(tree: Tree, parts: dict[str, list[str]], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants at random, the same number from each part, or all if it has fewer."""
    ranked = {part: sorted(candidates(tree, files), key=lambda m: m.rank(seed)) for part, files in parts.items()}
    taken: list[Mutant] = []
    while len(taken) < count and any(ranked.values()):
        for queue_of_part in ranked.values():
            if queue_of_part and len(taken) < count:
                taken.append(queue_of_part.pop(0))
    return sorted(taken, key=lambda m: (m.file, m.start, m.operator))


def named(tree: Tree) -> list[Mutant]:
    """Return the named mutants. Raise SystemExit if no file contains the text of one: the list is then out of date."""
    return [_named(tree, name, part, pairs) for name, part, pairs in NAMED]


def _named(tree: Tree, name: str, part: str, pairs: list[tuple[str, str]]) -> Mutant:
    for file in (file for file in PARTS[part] if (tree.root / file).exists()):
        source = tree.source(file)
        for old, new in pairs:
            if source.count(old.encode()) == 1:
                start = source.index(old.encode())
                line = source[:start].count(b"\n") + 1
                text = source.decode().splitlines()[line - 1].strip()
                lines = (line, line + old.count("\n"))
                return Mutant(file, "", line, start, start + len(old.encode()), new, name, text, lines, name)
    raise SystemExit(
        f"named mutant {name!r}: no file of {part} has its text exactly once; update benchmarks/robustness/named_mutants.py"
    )


def covering(tree: Tree, coverage: Coverage, mutant: Mutant) -> list[str]:
    """Return the tests that can notice a mutant, the quickest first; those of the file's own test file count as quicker.

    A line that is executed once, at import, belongs to the tests of its function (a default, a decorator). Otherwise it belongs
    to the tests of all functions that use a name that it assigns. Otherwise it belongs to all tests of its file.
    """
    source = tree.source(mutant.file)
    bodies = list(functions(source))
    tests = coverage.tests(mutant.file, range(mutant.lines[0], mutant.lines[1] + 1))
    if not any(mutant.line in body for _, body in bodies):
        own_bodies = [body for whole, body in bodies if mutant.line in whole]
        tests = coverage.tests(mutant.file, (line for body in own_bodies for line in body))
        if not own_bodies:
            for file in coverage.lines:
                tests |= coverage.tests(file, uses(tree.source(file), assigned(source, mutant.line)))
        if not tests:
            tests = coverage.tests(mutant.file, (line for _, body in bodies for line in body))
    own = f"test_{Path(mutant.file).stem}.py"
    return sorted(tests, key=lambda test: (coverage.seconds[test] * (0.2 if f"/{own}::" in test else 1), test))


# ---------------------------------------------------------------- running


@dataclass
class Outcome:
    mutant: Mutant
    diff: str
    status: str = "unfinished"
    tests: list[str] = field(default_factory=list)  # the covering tests, in order
    done: int = 0  # number of tests that earlier passes executed
    passes: int = 0
    killer: str = ""
    why: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        kept = {"key": self.mutant.key, "name": self.mutant.name, "line": self.mutant.line, "status": self.status}
        return kept | {
            "file": self.mutant.file, "diff": self.diff, "killer": self.killer,
            "why": self.why, "covering": len(self.tests), "passed": self.done, "seconds": self.seconds,
        }  # fmt: skip


def run(tree: Tree, mutants: list[Mutant], workers: int = 2, minutes: float = MINUTES, save: Any = None) -> list[Outcome]:
    """Test all mutants. After each test of a mutant, call `save` with the outcomes so far."""
    ends = time.time() + 60 * minutes
    with ExitStack() as closing:
        servers = [closing.enter_context(Server(tree, number)) for number in range(workers)]
        return _run(tree, mutants, coverage_of(tree, servers), servers, ends, save)


def _run(
    tree: Tree, mutants: list[Mutant], coverage: Coverage, servers: list["Server"], ends: float, save: Any
) -> list[Outcome]:
    outcomes = [Outcome(m, m.diff(tree.source(m.file)), tests=covering(tree, coverage, m)) for m in mutants]
    jobs: queue.PriorityQueue[tuple[int, int, Outcome]] = queue.PriorityQueue()
    order = sorted(range(len(outcomes)), key=lambda n: (not outcomes[n].mutant.name, outcomes[n].mutant.rank(1)))
    for place, number in enumerate(order):  # the named ones first, then at random: a run that is cut off is a fair sample
        outcome = outcomes[number]
        if outcome.tests:
            jobs.put((0, place, outcome))
        else:
            outcome.status = "uncovered"
    lock = threading.Lock()

    def work(server: Server) -> None:
        while time.time() < ends:
            try:
                turn, place, outcome = jobs.get_nowait()
            except queue.Empty:
                return
            _try(tree, coverage, outcome, server)
            if outcome.status == "unfinished":
                jobs.put((turn + 1, place, outcome))
            with lock:
                _tell(outcomes, outcome)
                if save:
                    save(outcomes)

    in_threads(work, servers)
    return outcomes


def _try(tree: Tree, coverage: Coverage, outcome: Outcome, server: "Server") -> None:
    """Give a mutant the tests of its next pass."""
    tests: list[str] = []
    needed, budget = 0.0, BUDGET * 3**outcome.passes
    for test in outcome.tests[outcome.done :]:
        if tests and needed + coverage.seconds[test] > budget:
            break
        tests.append(test)
        needed += coverage.seconds[test]
    source = outcome.mutant.apply(tree.source(outcome.mutant.file)).decode()
    answer = server.ask({"file": outcome.mutant.file, "source": source, "tests": tests, "limit": 4 * needed + tree.spare})
    outcome.seconds = round(outcome.seconds + answer["seconds"], 2)
    outcome.killer, outcome.why = answer.get("killer", ""), answer.get("why", "")
    if answer["code"] == 1000:
        outcome.status, outcome.killer = "timeout", outcome.killer or tests[min(answer.get("passed", 0), len(tests) - 1)]
    elif answer["code"] in (0, 5):  # 5: the tests have other parameters now, so that none is left
        outcome.done, outcome.passes = outcome.done + len(tests), outcome.passes + 1
        outcome.status = "survived" if outcome.done == len(outcome.tests) else "unfinished"
    elif answer["code"] in (1, 2, 3, 4) or answer["code"] < 0:  # a failure, or our code cannot be imported, or crashes
        outcome.status, outcome.killer = "killed", outcome.killer or f"exit status {answer['code']}"
    else:
        raise RuntimeError(f"{outcome.mutant.key}: exit status {answer['code']}; see the logs in {tree.work}")


def _tell(outcomes: list[Outcome], last: Outcome) -> None:
    counts = Counter(outcome.status for outcome in outcomes)
    print(f"{time.strftime('%H:%M:%S')} {dict(counts)} {last.seconds:.1f} s {last.status}: {last.mutant.key}", flush=True)


class Server:
    """A process of `mutant_server.py` in a private copy of the tree."""

    def __init__(self, tree: Tree, number: int) -> None:
        self.folder = tree.copy(f"worker{number}")
        shutil.rmtree(tree.work / f"worker{number}_checkpoints", ignore_errors=True)
        command = [sys.executable, str(SERVER), json.dumps({"options": tree.options, "tests": tree.test_files()})]
        with self.folder.with_name(f"server{number}.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=_environment(self.folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.communicate()  # closes stdin, at which the server ends
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process of {self.folder.name} ended ({self.process.poll()}); see the logs in {self.folder.parent}"
            )
        return json.loads(answer)


def _environment(folder: Path) -> dict[str, str]:
    return (
        {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE")}
        | ENVIRONMENT
        | {"PYTHONPATH": str(folder)}
    )


def in_threads(work: Callable[[Server], None], servers: list[Server]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        for done in [pool.submit(work, server) for server in servers]:
            done.result()


# ---------------------------------------------------------------- what is written


def report(outcomes: list[Outcome], details: dict[str, Any]) -> dict[str, Any]:
    """Return the result as JSON: scores per file, every mutant with its status."""
    known = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else []
    reasons = {each["key"]: each["reason"] for each in known}
    mutants = [outcome.as_json() for outcome in outcomes]
    for mutant in mutants:
        if mutant["key"] in reasons and mutant["status"] in SURVIVED:
            mutant |= {"status": "equivalent", "reason": reasons[mutant["key"]]}
    files = sorted({mutant["file"] for mutant in mutants})
    scores = {file: _score([mutant for mutant in mutants if mutant["file"] == file]) for file in files}
    return details | {"total": _score(mutants), "scores": scores, "mutants": mutants}


def _score(mutants: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(mutant["status"] for mutant in mutants)
    counted = len(mutants) - counts["equivalent"]
    killed = sum(counts[status] for status in KILLED)
    return {"mutants": len(mutants), **counts, "score": round(killed / counted, 4) if counted else None}


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    statuses = [*KILLED, *SURVIVED, "equivalent"]
    lines = [
        f"# Mutation testing, {result['date']}",
        "",
        f"`{result['command']}`, commit {result['commit'][:9]}, {result['minutes']:.0f} minutes on {result['workers']} cores.",
        "",
    ]
    lines += [result["note"], ""] if "note" in result else []
    lines += [f"| file | mutants | {' | '.join(statuses)} | score |", "|---|" + "---|" * (len(statuses) + 2)]
    for file, score in {**result["scores"], "**all**": result["total"]}.items():
        share = "–" if score["score"] is None else f"{score['score']:.1%}"
        lines.append(f"| {file} | {score['mutants']} | {' | '.join(str(score.get(s, 0)) for s in statuses)} | {share} |")
    named_mutants = [mutant for mutant in result["mutants"] if mutant["name"]]
    if named_mutants:
        lines += ["", "## Named mutants", "", "| mutant | file | status | test |", "|---|---|---|---|"]
        lines += [f"| {m['name']} | {m['file']} | {m['status']} | {m['killer'].split('/')[-1]} |" for m in named_mutants]
    for title, statuses in (("Survivors", SURVIVED), ("Equivalent mutants", ("equivalent",))):
        some = [mutant for mutant in result["mutants"] if mutant["status"] in statuses]
        lines += ["", f"## {title}", ""] if some else []
        for m in some:
            detail = m.get("reason") or f"{m['status']}, {m['passed']} of {m['covering']} covering tests pass"
            lines += [f"`{m['key']}`: {detail}", "", "```diff", m["diff"], "```", ""]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help=f"parts or files, with commas: {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="mutants to draw, besides the named ones")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="limit of the whole run")
    parser.add_argument(
        "--survivors", type=Path, metavar="RESULT.json", help="test again the mutants that survived in an earlier result"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and test none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the .json and the .md")
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to test")
    given = parser.parse_args(arguments)
    root = given.root.resolve()
    tree = Tree(root, work=root / ".mutants")
    parts = {part: files for part, files in PARTS.items() if not given.only or part in given.only.split(",")}
    for file in given.only.split(",") if given.only else ():
        if file not in PARTS:
            parts[file] = [file]
    inside = {file for files in parts.values() for file in files}
    mutants = [mutant for mutant in named(tree) if mutant.file in inside] + drawn(tree, parts, given.count, given.seed)
    if given.survivors:
        earlier = [m for m in json.loads(given.survivors.read_text(encoding="utf-8"))["mutants"] if m["status"] in SURVIVED]
        now = {mutant.key: mutant for mutant in (*candidates(tree, inside), *named(tree))}
        mutants = [now[m["key"]] for m in earlier if m["key"] in now]
        missing = [m["key"] for m in earlier if m["key"] not in now and m["file"] in inside]
        print(*(f"no longer in the source: {key}" for key in missing), sep="\n")
    if given.list:
        for mutant in mutants:
            print(mutant.key, mutant.diff(tree.source(mutant.file)), "", sep="\n")
        return 0
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    details = {
        "date": str(date.today()),
        "command": " ".join(["python -m benchmarks.robustness.mutants", *(arguments or sys.argv[1:])]),
        "commit": commit.strip(), "seed": given.seed, "workers": given.workers,
    }  # fmt: skip
    stem = _unused(given.out, f"mutants_{details['date']}")
    started = time.time()

    def save(outcomes: list[Outcome]) -> None:
        result = report(outcomes, details | {"minutes": round((time.time() - started) / 60, 1)})
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(page(result), encoding="utf-8")

    outcomes = run(tree, mutants, given.workers, given.minutes, save)
    save(outcomes)
    print(stem.with_suffix(".md").read_text(encoding="utf-8"))
    return 1 if any(outcome.status in SURVIVED for outcome in outcomes) else 0


def _unused(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (folder / f"{name}{f'-{number}' * (number > 1)}.json").exists():
        number += 1
    return folder / f"{name}{f'-{number}' * (number > 1)}"


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
