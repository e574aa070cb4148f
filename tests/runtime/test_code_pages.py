"""Every command prints in every code page, into a pipe that is closed or full, and without any stream. Its files are UTF-8."""

import ast
import errno
import io
import json
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_blip
from lora_blip import cli
from lora_blip.cli import COMMANDS, main, report_errors, run_infer, run_train
from lora_blip.config import InferConfig
from lora_blip.inference.pipeline import infer
from lora_blip.runtime.terminal import encodable_output
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
CODE_PAGES = ["cp1252", "cp437", "cp932", "ascii", "latin-1", "utf-8"]
WORDS = "→ … é ü 红色的立方体 👩 ж"
PROGRAMS = [ROOT / "train.py", ROOT / "infer.py"] + [
    path
    for folder in ("toyworld", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
CHILDREN = {"mutant_server.py"}  # started by another program, which reads its output


class Streams:
    """sys.stdout and sys.stderr as files in a code page that raise an error for a character that it does not have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.encoding = encoding
        self.files = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True) for _ in "oe"]
        monkeypatch.setattr(sys, "stdout", self.files[0])
        monkeypatch.setattr(sys, "stderr", self.files[1])

    def text(self) -> str:
        """Return what was printed, decoded. Raise UnicodeDecodeError if it is not in the code page."""
        return "".join(file.buffer.getvalue().decode(self.encoding) for file in self.files)


def call(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], *flags: object) -> int:
    """Run a program with these flags and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- code pages


@pytest.mark.parametrize("encoding", CODE_PAGES)
@pytest.mark.parametrize("columns", ["20", "0", "many"])
def test_every_help_is_printed(monkeypatch, encoding, columns):
    """In every code page, and on a terminal that is narrow or whose width is unknown."""
    streams = Streams(monkeypatch, encoding)
    monkeypatch.setenv("COLUMNS", columns)
    for run, flags in [
        (main, ["--help"]), (main, ["--version"]), (lambda: run_train({}, WORDS), ["--help"]),
        (lambda: run_infer({}, WORDS), ["--help"]), *((main, [name, "--help"]) for name in COMMANDS),
    ]:  # fmt: skip
        assert call(monkeypatch, run, *flags) == 0
    assert streams.text().count("usage: ") == len(COMMANDS) + 3


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", r"-> ... \xe9 \xfc \u7ea2\u8272\u7684\u7acb\u65b9\u4f53 \U0001f469 \u0436"),
        ("cp1252", r"-> … é ü \u7ea2\u8272\u7684\u7acb\u65b9\u4f53 \U0001f469 \u0436"),
        ("utf-8", WORDS),
    ],
)
def test_only_characters_that_a_code_page_lacks_are_replaced(monkeypatch, encoding, printed):
    """In printed text, warnings, log records, and messages of errors."""
    streams = Streams(monkeypatch, encoding)

    def run() -> None:
        print(WORDS)
        warnings.warn(WORDS, stacklevel=1)
        logging.getLogger("any").warning(WORDS)
        sys.stdout.writelines([WORDS, "\n"])
        raise cli.ConfigError(WORDS)

    handler = logging.StreamHandler(sys.stderr)  # made before the command starts, as by a library's import
    logging.getLogger("any").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr))
            assert call(monkeypatch, lambda: report_errors(run)) == 2
    finally:
        logging.getLogger("any").removeHandler(handler)
    assert streams.text().count(printed) == 5 and f"error: {printed}\n" in streams.text()
    assert [file.errors for file in streams.files] == ["strict", "strict"]


@pytest.mark.parametrize(
    "encoding",
    [
        "cp1252",
        "ascii",
        *(pytest.param(page, marks=pytest.mark.slow) for page in CODE_PAGES if page not in ("cp1252", "ascii")),
    ],
)
def test_commands_print_texts_and_names_of_any_language(checkpoints, here, monkeypatch, encoding):
    """`prepare`, `train`, `infer`, `caption` and `evaluate` end, and their files contain every character."""
    source = tiny.write_photos(here, 4, [f"a {colour} cube {WORDS}" for colour in ("red", "blue", "red", "blue")])
    for photo in (here / "photos").iterdir():
        photo.rename(photo.with_name(f"{photo.stem} 红 é.png"))
    source.write_text(source.read_text("utf-8").replace(".png", " 红 é.png"), encoding="utf-8")
    streams = Streams(monkeypatch, encoding)
    base = ["--model", checkpoints["blip"], "--device", "cpu", "--max-new-tokens", 3]
    alone = [*base, "--adapter", "none"]
    assert call(monkeypatch, main, "prepare", "--source", source, "--output-dir", "aus→gabe", "--splits", "1") == 0
    training = ["--annotations", "aus→gabe/train.jsonl", "--max-steps", 1, "--output-dir", "läufe→", "--targets", "vit", *base]
    assert call(monkeypatch, lambda: run_train({}, ""), *training) == 0
    shown = ["--images", "photos", "--references", source, "--output-dir", "bilder→", *alone]
    assert call(monkeypatch, lambda: run_infer({}, ""), *shown) == 0
    assert call(monkeypatch, main, "caption", "photos", "--model", checkpoints["blip"], "--adapter", "none") == 0
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java
    assert call(monkeypatch, main, "evaluate", "--references", source, "--output-dir", "bericht→", *alone) == 0
    assert streams.text().count(".png") >= 8
    for name in ("aus→gabe/train.jsonl", "bilder→/predictions.jsonl", "bericht→/base.jsonl"):
        lines = [json.loads(line) for line in (here / name).read_text("utf-8").splitlines()]
        assert len(lines) == 4 and all("红 é.png" in line["image"] for line in lines)
    assert WORDS in (here / "aus→gabe" / "train.jsonl").read_text("utf-8")
    for name in ("bilder→/gallery.html", "bericht→/report.html"):
        assert WORDS in (here / name).read_text("utf-8")
    (config,) = here.glob("läufe→/*/config.json")
    assert json.loads(config.read_text("utf-8"))["output_dir"] == "läufe→"


def test_the_python_api_prints_in_every_code_page(checkpoints, here, monkeypatch):
    """A script of a user that calls `infer` ends too. Afterwards, the streams are as before."""
    tiny.write_photos(here, 2)
    (here / "photos").rename(here / "照片→")
    streams = Streams(monkeypatch, "cp1252")
    infer(InferConfig(model=str(checkpoints["blip"]), adapter="none", images="照片→", max_new_tokens=3, device="cpu"))
    assert r"\u7167\u7247->" in streams.text() and streams.files[0].errors == "strict"
    for name in ("train", "infer", "evaluate"):
        assert hasattr(getattr(lora_blip, name), "__wrapped__"), f"{name} is not decorated with {encodable_output}"


def test_files_are_utf_8_in_the_c_locale(here):
    """With `LC_ALL=C` and without Python's UTF-8 mode, open() without an encoding writes ASCII."""
    tiny.write_photos(here, 1, [WORDS])
    environment = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "lora_blip", "prepare", "--source", "captions.jsonl", "--splits", "1"]
    (here / "captions.jsonl").write_text(json.dumps({"image": "photos/0.png", "text": WORDS}), encoding="utf-8")
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | environment)
    assert done.returncode == 0 and b" -> " in done.stdout, done.stderr[-500:]
    assert json.loads((here / "prepared" / "train.jsonl").read_text("utf-8"))["text"] == WORDS


@pytest.mark.parametrize("path", [p for p in PROGRAMS if p.name not in CHILDREN], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_program_starts_inside_the_safe_streams(path):
    """The last block of each program of this repository calls `report_errors`, alone or by run_train and run_infer."""
    (block,) = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if "__main__" in ast.unparse(node)[:30]]
    assert isinstance(block, ast.If)
    call = block.body[-1]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    assert ast.unparse(call.value.func) in ("report_errors", "run_train", "run_infer")
    assert all(isinstance(line, ast.ImportFrom) for line in block.body[:-1])


@pytest.mark.parametrize("module", ["toyworld.cubes", "toyworld.picture", "benchmarks", "benchmarks.robustness.chaos"])
def test_the_help_of_a_program_is_printed_in_ascii(monkeypatch, module):
    streams = Streams(monkeypatch, "ascii")
    assert call(monkeypatch, lambda: runpy.run_module(module, run_name="__main__"), "--help") == 0
    assert "usage: " in streams.text()


NO_FILE = ("/proc/", "'/dev/null'", "tarfile.open(", "os.fdopen(1,", "os.fdopen(2,")  # the last two are in a child's streams


def opens_text_without_encoding(call: ast.Call) -> bool:
    """Return True for open(path), open(path, "w"), path.open("a"), read_text() and write_text(x) without `encoding`."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    is_text = not call.args or any(set(mode) <= set("rwax+t") for mode in modes)
    return (name in ("read_text", "write_text") or (name in ("open", "fdopen") and is_text)) and "encoding" not in [
        keyword.arg for keyword in call.keywords
    ]


def test_every_text_file_is_opened_with_an_encoding():
    """open, read_text and write_text without `encoding` use the code page of the system."""
    calls_without_encoding = []
    for path in (path for folder in ("lora_blip", "toyworld", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        calls_without_encoding += [
            f"{path.relative_to(ROOT)}: {ast.unparse(call)}" for call in calls if opens_text_without_encoding(call)
        ]
    assert [line for line in calls_without_encoding if not any(part in line for part in NO_FILE)] == []
    assert len(calls_without_encoding) > 5  # such as those of /proc


# ---------------------------------------------------------------- streams that are closed, full or missing


class Broken(io.TextIOWrapper):
    """A stream on which each write fails."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number, self.attempts = number, 0

    def write(self, _: str) -> int:
        self.attempts += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL])  # as on POSIX and on Windows
def test_a_closed_reader_of_stdout_does_not_stop_the_command(monkeypatch, capsys, number):
    """`| head -1`: no error, status 0, and the command does all its work."""
    monkeypatch.setattr(sys, "stdout", stream := Broken(number))
    done = []
    assert call(monkeypatch, lambda: report_errors(lambda: [print(WORDS), print(WORDS), done.append(1)])) == 0
    assert done and stream.attempts == 1 and capsys.readouterr().err == ""
    assert call(monkeypatch, main, "train", "--help") == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_log_on_a_full_disk_is_one_error_after_the_work(monkeypatch, capsys, number):
    """The command does all its work, prints one line on stderr, and its status is not 0; also for --help."""
    done = []
    for run, flags in [(lambda: report_errors(lambda: [print(WORDS), done.append(1)]), []), (main, ["train", "--help"])]:
        monkeypatch.setattr(sys, "stdout", Broken(number))
        assert call(monkeypatch, run, *flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: standard output could not be written") and error.count("\n") == 1
        assert os.strerror(number) in error
    assert done


def test_a_program_without_streams_runs(monkeypatch):
    """pythonw has no console: sys.stdout and sys.stderr are None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def run() -> None:
        print(WORDS, file=sys.stderr)
        sys.stdout.writelines([WORDS])  # tqdm and argparse write to the stream itself
        assert not sys.stdout.isatty()
        raise cli.ConfigError(WORDS)

    assert call(monkeypatch, lambda: report_errors(run)) == 2
    assert sys.stdout is None and sys.stderr is None


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes descriptors")
def test_closed_streams_write_into_no_file_of_the_user(tmp_path):
    """Without reserved descriptors, the first file would be descriptor 0, 1 or 2, and receive what libraries print."""
    code = (
        "import os\nfrom lora_blip.cli import report_errors\n"
        "def run():\n"
        "    with open('user.txt', 'wb') as file:\n"
        "        file.write(b'mine'); file.flush()\n"
        "        [os.write(number, b'noise') for number in (1, 2)]\n"
        "report_errors(run)"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    done = subprocess.run(command, cwd=tmp_path, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and (tmp_path / "user.txt").read_bytes() == b"mine"


def test_a_stream_of_another_kind_is_written_in_its_encoding(monkeypatch):
    """A notebook's or an editor's stream has an encoding but cannot be reconfigured."""

    class Editor:
        encoding, text = "cp1252", ""

        def write(self, text: str) -> int:
            self.text += text.encode(self.encoding).decode(self.encoding)
            return len(text)

        def flush(self) -> None: ...

    editor: Any = Editor()
    monkeypatch.setattr(sys, "stdout", editor)
    report_errors(lambda: print(WORDS))
    assert editor.text.startswith("-> … é")
