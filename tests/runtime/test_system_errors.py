"""A read-only disk, a full quota, a lost share: one line with the path and a fix, and no file that is half-written."""

import ast
import errno
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.cli import main, report_errors, run_infer, run_train
from lora_blip.data.disk_cache import Store
from lora_blip.errors import AdapterError, FileError, ModelError, OutputError
from lora_blip.kernels import paths
from lora_blip.lora import adapter_file
from lora_blip.runtime import files, lock, system_errors
from lora_blip.runtime.files import make_whole, refuse_full, remove, room_for, write_whole
from lora_blip.runtime.runs import locate
from lora_blip.runtime.system_errors import NUMBERS, file_error, writing
from lora_blip.training import checkpoint
from tests.support import tiny
from tests.support.faults import Access, watched
from tests.support.runs import adapter_of

PACKAGE = Path(__file__).resolve().parents[2] / "lora_blip"
ERRNOS = [
    errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ETIMEDOUT,
]  # fmt: skip


# ---------------------------------------------------------------- every access of every command


@dataclass
class Command:
    """A command in a folder with four photos, their annotations and an adapter. It writes to the folder O."""

    folder: Path
    run: Callable[[], None]
    flags: list[str]
    monkeypatch: pytest.MonkeyPatch
    capsys: Any

    def __call__(self) -> tuple[int, str]:
        """Return the exit status and what is printed on stderr. Let an unexpected error through."""
        self.monkeypatch.setattr(sys, "argv", ["program", *self.flags])
        code: Any = 0
        try:
            self.run()
        except SystemExit as end:
            code = end.code or 0
        return code, self.capsys.readouterr().err

    def clean(self) -> None:
        shutil.rmtree(self.folder / "O", ignore_errors=True)

    def accesses(self) -> list[Access]:
        """Return the different accesses of the command, in their order."""
        self.clean()
        with watched(self.folder) as watch:
            assert self()[0] == 0
        return list(dict.fromkeys(watch.accesses))

    def broken(self, access: Access, number: int) -> tuple[int, str]:
        self.clean()
        with watched(self.folder, access, number) as watch:
            result = self()
        assert watch.raised, access
        return result


@pytest.fixture
def command(checkpoints, tmp_path, monkeypatch, capsys) -> Callable[[str], Command]:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java
    source = tiny.write_photos(here, 4, ["a red cube", "a blue cube"] * 2)
    shutil.copytree(adapter_of(checkpoints["blip"], tmp_path / "trained").parent, here / "run")
    base = ["--model", str(checkpoints["blip"]), "--device", "cpu"]
    training = "--max-steps 1 --output-dir O --targets vit --max-new-tokens 3 --checkpoint-seconds 0 --augment false --cache-gb"
    evaluation = f"evaluate --references {source.name} --output-dir O --adapter run --train-annotations none"
    commands: dict[str, tuple[Callable[[], None], list[str]]] = {
        "prepare": (main, ["prepare", "--source", source.name, "--output-dir", "O", "--splits", "0.5,0.5"]),
        "train": (lambda: run_train({}, ""), ["--annotations", source.name, *training.split(), "0", *base]),
        "cached": (lambda: run_train({}, ""), ["--annotations", source.name, *training.split(), "1", *base]),
        "infer": (
            lambda: run_infer({}, ""),
            ["--images", "photos", "--references", source.name, "--output-dir", "O", "--adapter", "run", *base],
        ),
        "caption": (main, ["caption", "photos", "--adapter", "run", *base]),
        "evaluate": (main, [*evaluation.split(), *base]),
    }
    return lambda name: Command(here, *commands[name], monkeypatch, capsys)


def refuse(command: Command, access: Access, number: int) -> int:
    """Break one access, and check that the command ends well or with one line. Return its exit status."""
    code, error = command.broken(access, number)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2) and "Traceback" not in error, (access, error)
    if code:
        assert len(lines) == 1 and os.strerror(number) in lines[0], (access, error)
        assert ("; " in error or "free some space" in error) and access.name.split("/")[0] in error, (access, error)
    if access.event not in ("os.remove", "os.rmdir"):
        assert not [path for path in (command.folder / "O").rglob("*.tmp") if path.is_file()], access
    for path in (command.folder / "O").rglob("*.json*"):
        text = path.read_text("utf-8")
        for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(line)
    return code


@pytest.mark.parametrize("name", ["prepare", "infer", "evaluate"])
def test_a_write_that_is_refused_is_one_line(command, name):
    """Each write of the command is refused once, each with another error of the system."""
    run = command(name)
    writes = [each for each in run.accesses() if each.name.startswith("O") and each.event in ("os.mkdir", "open", "os.rename")]
    writes = [each for each in writes if each.writes]
    assert len(writes) >= 4
    codes = [refuse(run, access, ERRNOS[at % len(ERRNOS)]) for at, access in enumerate(writes)]
    assert 2 in codes and (0 in codes) is (name != "prepare")  # 0: a page for people could not be written
    if name == "prepare":
        assert not (run.folder / "O" / "train.jsonl").exists() or (run.folder / "O" / "val.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "cached", "infer", "caption", "evaluate"])
def test_an_access_that_is_refused_is_one_line(command, name):
    """Each access of the command is refused once. A training that was stopped by this resumes and ends."""
    paths.measured()  # a process reads this file only once
    run = command(name)
    for at, access in enumerate(run.accesses()):
        code = refuse(run, access, ERRNOS[at % len(ERRNOS)])
        if name == "cached" and code and access.name.startswith("O/RUN"):
            assert run()[0] == 0, access
        if name == "cached" and access.name.startswith("O/RUN"):
            (adapter,) = (run.folder / "O").glob("*/adapter.safetensors")
            assert adapter_file.read(adapter).metadata["training"]["steps"] == 1, access


@pytest.mark.parametrize(
    ("event", "name", "number"),
    [
        ("open", "O/RUN/.lock", errno.EACCES),
        ("os.rename", "O/RUN/.adapter.safetensors.tmp", errno.ESTALE),
        ("os.rename", "O/RUN/checkpoints/.000002_step0.tmp", errno.EDQUOT),
    ],
)
def test_a_training_that_was_stopped_by_the_system_resumes(command, event, name, number):
    run = command("train")
    assert refuse(run, Access(event, name, writes=True), number) == 2
    assert run()[0] == 0 and len(list((run.folder / "O").glob("*/adapter.safetensors"))) == 1


@pytest.mark.parametrize(
    "access", [Access("os.rename", "O/RUN/checkpoints", True), Access("open", "O/RUN/metrics.jsonl", False)]
)
def test_a_finished_adapter_is_not_lost(command, access):
    """The adapter is saved. Then the checkpoints cannot be removed: one warning, and status 0."""
    run = command("train")
    assert refuse(run, access, errno.EROFS) == 0
    (adapter,) = (run.folder / "O").glob("*/adapter.safetensors")
    assert adapter_file.read(adapter)


def test_the_scores_are_printed_before_their_files_are_written(command, capsys):
    run = command("evaluate")
    run.clean()
    with (
        watched(run.folder, Access("os.rename", "O/.metrics.json.tmp", True), errno.ENOSPC),
        pytest.raises(SystemExit),
    ):
        run.monkeypatch.setattr(sys, "argv", ["program", *run.flags])
        run.run()
    printed = capsys.readouterr()
    assert "[95 % interval]" in printed.out and "O/metrics.json cannot be written: No space left" in printed.err


# ---------------------------------------------------------------- no write outside the helpers

WRITERS = {"write_text", "write_bytes", "mkdir", "makedirs", "touch", "save_file", "savefig", "copyfile", "copy", "copytree",
           "move", "rename", "replace", "truncate", "link", "symlink", "symlink_to", "hardlink_to", "unlink", "rmdir", "rmtree",
           "fdopen", "TemporaryFile", "NamedTemporaryFile"}  # fmt: skip
OWNERS = {"write_text", "write_bytes", "mkdir", "touch", "unlink", "rmdir"}  # methods of Path alone
ALLOWED = {  # file: function → why its write is not in `writing`
    "data/disk_cache.py:get": "a damaged value is removed; an error is ignored",
    "data/disk_cache.py:_open_lock_file": "an error ends the cache with one line",
    "data/disk_cache.py:bytes_in": "an error is ignored",
    "data/prepare/packed.py:parquet_entries": "a temporary file in memory or in the system's folder",
    "data/prepare/packed.py:removed_on_error": "after an error, which is reported",
    "data/prepare/command.py:write": "after an error, which is reported",
    "data/prepare/parquet_reader.py:write_image": "a child process, whose error is reported by its parent",
    "models/bin_reader.py:main": "a child process, whose error is reported by its parent",
    "metrics/java.py:*": "the system's temporary folder, for a score that is optional",
    "reports/plots.py:draw": "`attempt` reports it",
    "runtime/distributed.py:*": "the null device",
    "runtime/terminal.py:*": "the null device",
    "runtime/untrusted.py:open_regular": "it opens for reading",
    "runtime/files.py:refuse_unwritable": "it reports the error of a test file",
    "runtime/files.py:_replace": "each caller has a `writing`",
    "runtime/files.py:remove": "an error is ignored: what is left has a temporary name",
    "training/run_folder.py:_restore_files": "its caller has a `writing`",
    "runtime/files.py:link_or_copy": "only inside `make_whole`, which has a `writing`",
    "models/bin_weights.py:fill": "only inside `make_whole`, which has a `writing`",
    "models/bin_weights.py:_index": "only inside `make_whole`, which has a `writing`",
}


def is_write(call: ast.Call) -> bool:
    """Return True for a call that creates, changes or removes a file."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if name == "open":
        is_mode = [set(mode) <= set("rwabx+t") and bool(set(mode) & set("wax+")) for mode in modes]
        return any(is_mode) or "os.O_CREAT" in ast.unparse(call)
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("replace", "copy", "link", "move"):  # also methods of str, dict and dataclasses
        is_path = any(word in owner for word in ("path", "folder", "temporary", "source"))
        return owner in ("os", "shutil") or (name == "replace" and is_path and len(call.args) == 1)
    return name in WRITERS


def writes_of(path: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield (function, whether the write is in `with writing(…)` or `with suppress(OSError)`, the call) for each write."""

    def walk(node: ast.AST, function: str, is_protected: bool) -> Iterator[tuple[str, bool, str]]:
        if isinstance(node, ast.FunctionDef):
            function, is_protected = node.name, False
        if isinstance(node, ast.With):
            texts = [ast.unparse(item.context_expr) for item in node.items]
            is_protected = is_protected or any(text.startswith(("writing(", "suppress(OSError")) for text in texts)
        if isinstance(node, ast.Call) and is_write(node):
            yield function, is_protected, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, is_protected)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "", False)


def test_every_write_is_protected():
    """A new write is in a helper of `runtime.files`, in `with writing(path)`, or in ALLOWED with a reason."""
    unprotected, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for function, is_protected, call in writes_of(path):
            keys = {f"{name}:{function}", f"{name}:*"} & ALLOWED.keys()
            used |= keys
            if not is_protected and not keys:
                unprotected.append(f"{name}:{function}: {call}")
    assert unprotected == []
    assert used == ALLOWED.keys(), ALLOWED.keys() - used


@pytest.mark.parametrize(
    "source",
    ["open(p, 'w')", "p.open('ab')", "p.write_text(x)", "os.replace(a, b)", "temporary.replace(path)", "p.mkdir()",
     "save_file(x, p)", "shutil.copyfile(a, b)", "p.touch()"],
)  # fmt: skip
def test_the_search_for_writes_finds_each_kind(tmp_path, source):
    for text, protected in ((f"def f():\n    {source}", False), (f"def f():\n    with writing(p):\n        {source}", True)):
        (tmp_path / "module.py").write_text(text, encoding="utf-8")
        assert [(function, inside) for function, inside, _ in writes_of(tmp_path / "module.py")] == [("f", protected)]


# ---------------------------------------------------------------- the helpers


@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_each_error_of_the_system_is_one_line_with_a_fix(number):
    for action in ("read", "written", "used"):
        error = file_error(OSError(number, os.strerror(number), "some where/x"), action=action)
        assert str(error).startswith(f"some where/x cannot be {action}: {os.strerror(number)}; ") and "\n" not in str(error)
        assert not {"{", "}"} & set(str(error)) and error.errno == number and isinstance(error, OSError)
        assert "--output-dir" not in str(error) or action == "written"
    assert "chmod u+rwX 'a b'" in str(file_error(OSError(errno.EACCES, "no"), "a b", "written"))


def test_an_error_of_the_program_is_not_one_of_the_system():
    """EAGAIN (too many processes) and an OSError without a number keep their own messages."""
    for error in (BlockingIOError(errno.EAGAIN, "busy"), OSError("config.json is missing")):
        with pytest.raises(type(error)) as caught, writing("x"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("number", ERRNOS)
def test_an_unknown_place_is_one_line_too(capsys, number):
    """An OSError that no code expects: the command prints its path and exits with status 2."""

    def fail() -> None:
        raise OSError(number, os.strerror(number), "photos/red 1.png")

    with pytest.raises(SystemExit) as stopped:
        report_errors(fail)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: photos/red 1.png cannot be used: ") and error.count("\n") == 1


@pytest.mark.parametrize("event", ["os.mkdir", "open", "os.rename", "os.remove"])
def test_a_file_is_whole_or_as_before(tmp_path, event):
    path = tmp_path / "folder" / "file.json"
    name = "folder" if event == "os.mkdir" else "folder/.file.json.tmp"
    with watched(tmp_path, Access(event, name, True), errno.EIO) as watch:
        if event == "os.remove":  # of the temporary file, which has been renamed
            write_whole(path, b"new")
        else:
            with pytest.raises(FileError, match=r"file\.json cannot be written: .*run the command again"):
                write_whole(path, b"new")
    assert watch.raised and (not path.exists() or path.read_bytes() == b"new")
    if path.exists():
        with watched(tmp_path, Access("os.rename", "folder/.file.json.tmp", True), errno.ENOSPC), pytest.raises(FileError):
            write_whole(path, b"newer")
        assert path.read_bytes() == b"new" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_share_that_cannot_sync_is_used(tmp_path, monkeypatch, number, is_fatal):
    """Some shares have no fsync. An input/output error of fsync means that the content is lost, so it is an error."""

    def refuse_sync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse_sync)
    for write in (
        lambda: write_whole(tmp_path / "x", b"1"),
        lambda: make_whole(tmp_path / "y", lambda f: write_whole(f / "z", b"")),
    ):
        if is_fatal:
            with pytest.raises(FileError, match="Input/output error"):
                write()
        else:
            write()
    assert (tmp_path / "x").exists() is not is_fatal and (tmp_path / "y").exists() is not is_fatal


def test_windows_renames_a_file_that_is_open_for_a_moment(tmp_path, monkeypatch):
    """A virus scanner has the new file open: the rename is tried again. Elsewhere, a refused rename is final."""
    pauses: list[float] = []
    real, refusals = Path.replace, iter([True, True, False, True])

    def replace(source: Path, target: Path) -> Path:
        if next(refusals):
            raise PermissionError(errno.EACCES, "in use")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    monkeypatch.setattr(system_errors, "WINDOWS", True)
    write_whole(tmp_path / "x", b"1")
    assert pauses == list(files.PAUSES[:2]) and (tmp_path / "x").read_bytes() == b"1"
    monkeypatch.setattr(system_errors, "WINDOWS", False)
    with pytest.raises(FileError):
        write_whole(tmp_path / "x", b"2")
    assert len(pauses) == 2


def test_commands_to_paste_are_quoted_for_the_shell_of_windows(monkeypatch):
    assert system_errors.command_line(["lora-blip", "my photos"]) == "lora-blip 'my photos'"
    monkeypatch.setattr(system_errors, "WINDOWS", True)
    assert system_errors.command_line(["lora-blip", r"C:\my photos"]) == r'lora-blip "C:\my photos"'
    assert system_errors.quoted_for_shell(r"C:\photos") == r"C:\photos"
    assert "close the program" in str(file_error(PermissionError(errno.EACCES, "no"), "x", "written"))


def test_a_full_disk_and_a_read_only_disk_have_different_advice(tmp_path):
    for number, part in ((errno.ENOSPC, "free some space, then start again"), (errno.EROFS, "(--output-dir): start again")):
        with pytest.raises(ModelError) as caught, room_for(tmp_path, ModelError, ": {first}start again"), writing("x"):
            raise OSError(number, os.strerror(number))
        assert part in str(caught.value)


def test_a_share_without_locks_is_used(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse_lock)
    monkeypatch.setattr(fcntl, "flock", refuse_lock)
    with lock.held(tmp_path):
        assert (tmp_path / ".lock").exists()
    store = Store(tmp_path / "cache", {"of": "x"}, 10**6)
    assert store.put("ab0", torch.ones(3)) and store.get("ab0") is not None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path, number):
    """Otherwise, a share that fails for a moment would start a new run."""
    write_whole(tmp_path / "run" / "x", b"")
    folder = checkpoint.write(tmp_path / "run", 1, {"x": torch.ones(1)}, {}, tmp_path / "no", 2)
    name = folder.relative_to(tmp_path).as_posix()
    with (
        watched(tmp_path, Access("open", f"{name}/state.json", False), number),
        pytest.raises(FileError, match="cannot be read"),
    ):
        checkpoint.newest(tmp_path / "run")
    saved, problems = checkpoint.newest(tmp_path / "run")
    assert saved and not problems and torch.equal(saved.tensors()["x"], torch.ones(1))


def test_a_share_that_cannot_map_files_reads_checkpoints_and_names_adapters(checkpoints, tmp_path, monkeypatch):
    """safetensors maps a file into memory; its error has only a number in its text."""
    import safetensors

    path = adapter_of(checkpoints["blip"], tmp_path)

    def refuse_map(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: No such device (os error 19)")

    monkeypatch.setattr(safetensors, "safe_open", refuse_map)
    with pytest.raises(AdapterError, match=r"cannot be read: No such device; .* copy the file to a local disk"):
        adapter_file.read(path)


def test_an_adapter_folder_that_cannot_be_listed_is_not_a_missing_one(tmp_path):
    (tmp_path / "runs").mkdir()
    with (
        watched(tmp_path, Access("os.scandir", "runs", False), errno.EIO),
        pytest.raises(FileError, match="runs cannot be read"),
    ):
        locate(tmp_path / "runs")


def test_removing_never_leaves_a_half_folder(tmp_path):
    write_whole(tmp_path / "old" / "x", b"1")
    with watched(tmp_path, Access("os.rename", "old", True), errno.EACCES), pytest.raises(FileError):
        remove(tmp_path / "old")
    assert (tmp_path / "old" / "x").exists()


@pytest.mark.parametrize("event", ["os.mkdir", "open", "os.scandir", "os.listdir"])
def test_a_cache_on_a_read_only_disk_is_disabled_with_one_line(tmp_path, capsys, event):
    with watched(tmp_path) as watch:
        Store(tmp_path / "a", {"of": "x"}, 10**6).put("ab0", torch.ones(3))
    (access, *_) = [each for each in watch.accesses if each.event == event]
    capsys.readouterr()
    shutil.rmtree(tmp_path / "a")
    store = Store(tmp_path / "a", {"of": "x"}, 10**6)
    with watched(tmp_path, access, errno.EROFS):
        assert not store.put("ab0", torch.ones(3)) and not store.put("ab1", torch.ones(3))
    printed = "".join(capsys.readouterr())
    assert printed.count("warning: nothing more is cached in") == 1 and "Read-only file system" in printed


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_an_image_of_a_parquet_file_that_cannot_be_written_is_no_damaged_download(tmp_path):
    """The child process cannot write its images: the error names the folder, and not the Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lora_blip.data.formats import Keys
    from lora_blip.data.prepare import packed

    pq.write_table(pa.table({"image": [{"bytes": b"\x89PNG", "path": "x"}], "text": ["a"]}), tmp_path / "x.parquet")
    target = tmp_path / "images"
    real = packed.READER.read_text("utf-8")
    broken = tmp_path / "reader.py"
    broken.write_text(real.replace("path.write_bytes(content)", f"raise OSError({errno.ENOSPC}, 'x')"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "READER", broken)
        with pytest.raises(FileError, match="images cannot be written: No space left on device; free some space"):
            list(packed.parquet_entries(tmp_path / "x.parquet", Keys(), target))


# values after a flag in a message that need no quotes: numbers, names of the package, and texts that are already quoted
SAFE = {
    "data/prepare/web_addresses.py: images", "data/prepare/web_addresses.py: local",
    "inference/commands.py: BASE_OF[config.task]", "inference/commands.py: BASE_OF[self.task]",
    "data/image_roots.py: folder",
    "inference/adapter_choice.py: task", "inference/other_runs.py: task",
    "inference/explanation.py: first", "inference/setup.py: wrong[0]", "lora/blend_command.py: new", "lora/targets.py: R",
    "models/base_config.py: key", "runtime/files.py: new", "runtime/hub_cache.py: folder",
    "runtime/setting_checks.py: BASE_OF[task]", "tasks/text_length.py: longer", "tasks/text_task.py: room",
    "training/caching.py: math.ceil(needed)", "training/diagnostics.py: folder", "training/diagnostics.py: half",
    "training/diagnostics.py: double", "training/initial_adapter.py: r", "training/initial_adapter.py: exact(alpha)",
    "training/initial_adapter.py: adapter.image_size", "training/initial_adapter.py: backbone.image_size",
    "training/initial_adapter.py: adapter.variant", "training/resume.py: run", "training/session.py: name",
}  # fmt: skip


def values_after_flags(path: Path) -> Iterator[str]:
    """Yield each expression that an f-string puts after a flag such as --output-dir without `quoted_for_shell`."""
    for text in ast.walk(ast.parse(path.read_text("utf-8"))):
        for before, value in pairwise(text.values) if isinstance(text, ast.JoinedStr) else ():
            follows_flag = isinstance(before, ast.Constant) and re.search(r"--[a-z][a-z-]*[ =]$", str(before.value))
            if follows_flag and isinstance(value, ast.FormattedValue):
                expression = ast.unparse(value.value)
                if not re.search(r"\bquote(d_for_shell)?\(", expression):
                    yield expression


def test_a_path_after_a_flag_is_quoted():
    """Otherwise the advice fails if it is pasted, for a folder such as "my photos". Before, --output-dir was not quoted."""
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {each}" for path in PACKAGE.rglob("*.py") for each in values_after_flags(path)
    }
    assert found == SAFE


def test_the_new_folder_that_an_error_names_is_quoted_and_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mein Modell", "mein Modell_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    with pytest.raises(OutputError, match=r"give a new folder: --output-dir 'mein Modell_3'$"):
        refuse_full(Path("mein Modell"))
