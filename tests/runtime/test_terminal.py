"""What reaches a terminal or a page: no text of a stranger's file moves the cursor, forges a line or reorders one."""

import io
import json
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_blip.cli import COMMANDS, main, print_traceback, run_infer, run_train
from lora_blip.config import InferConfig
from lora_blip.data.annotations import Problem
from lora_blip.data.images import open_image
from lora_blip.data.prepare import command as prepare
from lora_blip.errors import ImageError
from lora_blip.inference.pipeline import infer
from lora_blip.lora import adapter_file
from lora_blip.runtime.terminal import TerminalStream
from lora_blip.runtime.untrusted import for_terminal, printable, printable_lines
from tests.support import tiny
from tests.support.runs import adapter_of

SCREEN = "\x1b[2J\x1b]0;pwned\x07"  # clears the screen and renames the window
HOSTILE = [SCREEN, "a\nerror: forged", "b\rforged", "c\x9b31m", "d\u202egnp", "e\u2028f", "\x7f\x08", "g\u2066h\u200f"]
NAMES = [*(text.replace("/", "") for text in HOSTILE), b"\xff\xfe".decode("utf-8", "surrogateescape")]
OTHERS = ["un café", "红色的立方体　在桌上", "قطة حمراء", "می‌خواهم", "👩‍👩‍👧 🏳️‍🌈", "C:\\new\\table", "שלום", "a\u00a0b"]
MARKED = {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI"}  # Unicode's bidirectional classes of controls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")


def unsafe(text: str, allowed: str = "\n") -> list[str]:
    """The characters of a text that a terminal may obey, by Unicode's own tables."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return [
        x for x in text if x not in allowed and (unicodedata.category(x) in kinds or unicodedata.bidirectional(x) in MARKED)
    ]


def run(command: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, capsys: Any, *flags: object) -> str:
    """All that a command prints, with what it says when it refuses."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    capsys.readouterr()
    try:
        command()
    except SystemExit as ended:
        assert ended.code == 2
    printed = capsys.readouterr()
    return printed.out + printed.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hostile_images(folder: Path) -> None:
    """A picture under each hostile name, and a broken one beside it."""
    tiny.write_photos(folder, 1)
    picture = (folder / "photos" / "0.png").read_bytes()
    (folder / "odd").mkdir()
    for name in NAMES:
        (folder / "odd" / f"{name}.png").write_bytes(picture)
        (folder / "odd" / f"{name}_broken.png").write_bytes(b"broken")
    with tarfile.open(folder / "odd.tar", "w", encoding="utf-8", errors="surrogateescape") as archive:
        for number, name in enumerate(NAMES):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(picture)
            archive.addfile(info, io.BytesIO(picture if number % 2 else b"x" * len(picture)))
            link = tarfile.TarInfo(f"{name}_link.png")
            link.type = tarfile.SYMTYPE
            archive.addfile(link)


# ---------------------------------------------------------------- the function


@given(st.text(st.characters(codec=None)))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_an_escaped_text_has_no_control_and_keeps_its_content(text):
    """No control is left; escaping twice is escaping once; what is printable stays as it is."""
    shown = printable(text)
    assert not unsafe(shown, "") and printable(shown) == shown
    shown.encode("utf-8")
    assert not unsafe(printable_lines(text)) and printable_lines(text).count("\n") == text.count("\n")
    if text.isprintable():
        assert shown == text


def test_every_control_of_unicode_is_escaped():
    every = unsafe("".join(map(chr, range(0x110000))), "")
    assert len(every) > 2100 and not [x for x in every if printable(x) == x]
    assert printable(f"{SCREEN}\n\r\t") == r"\x1b[2J\x1b]0;pwned\x07\n\r\t"


@pytest.mark.parametrize("text", OTHERS)
def test_other_languages_emoji_and_paths_are_printed_as_they_are(text):
    assert printable(text) == text == for_terminal(text)


def test_a_progress_bar_moves_the_cursor_and_its_text_does_not():
    assert for_terminal("\r 50%") == "\r 50%" and for_terminal("\x1b[A") == "\x1b[A"
    assert for_terminal(f"\r{SCREEN}\r\n") == "\r" + r"\x1b[2J\x1b]0;pwned\x07\r" + "\n"
    stream = io.StringIO()
    TerminalStream(stream).writelines([SCREEN, "\n"])
    assert not unsafe(stream.getvalue())


def test_errors_about_files_are_one_line():
    for text in HOSTILE:
        with pytest.raises(ImageError) as caught:
            open_image(text)
        assert not unsafe(str(caught.value), "")
        assert not unsafe(str(Problem(Path(text), 3, text)), "")


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("source", ["odd", "odd.tar"])
@pytest.mark.parametrize("by_command", [False, True])
def test_names_of_images_and_members_are_escaped(checkpoints, here, monkeypatch, capsys, source, by_command):
    """From Python as from the command: of pictures that are captioned, and of those that are left out."""
    hostile_images(here)
    settings: dict[str, Any] = {"model": str(checkpoints["blip"]), "adapter": "none", "images": source, "device": "cpu"}
    settings |= {"output_dir": "out", "max_new_tokens": 3}
    if by_command:
        flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
        printed = run(lambda: run_infer({}, ""), monkeypatch, capsys, *flags)
    else:
        infer(InferConfig(**settings))
        printed = "".join(capsys.readouterr())
    assert not unsafe(printed) and "\nerror: forged" not in printed
    assert printed.count("left out: ") + printed.count("Image:  ") == min(20, 2 * len(NAMES)) and r"\x1b[2J" in printed
    written = [json.loads(line) for line in (here / "out" / "predictions.jsonl").read_bytes().splitlines()]
    assert all(line["image"].startswith(source) for line in written)
    assert any(line["image"] == f"{source}/{HOSTILE[1]}.png" for line in written)  # the file has the name itself


def test_texts_questions_and_groups_are_escaped(checkpoints, here, monkeypatch, capsys):
    tiny.write_photos(here, 2)
    texts = "|".join(["a red cube", *(f"a {text} cube" for text in HOSTILE)])
    base = ["--adapter", "none", "--images", "photos", "--device", "cpu"]
    printed = run(lambda: run_infer({}, ""), monkeypatch, capsys, *base, "--model", checkpoints["itm"], "--texts", texts)
    assert not unsafe(printed) and r"\x1b" in printed
    lines = [
        {"image": f"photos/{n % 2}.png", "text": f"a red cube {text}", "group": f"{n % 2}{text}"}
        for n, text in enumerate(HOSTILE)
    ]
    (here / "refs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = ["--model", checkpoints["opt"], "--max-new-tokens", 3]
    printed = run(lambda: run_infer({}, ""), monkeypatch, capsys, *base, *model, "--references", "refs.jsonl")
    assert not unsafe(printed) and r"0\x1b[2J" in printed  # the group's row

    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java
    flags = ["evaluate", "--references", "refs.jsonl", "--adapter", "none", *model, "--output-dir", "page"]
    printed = run(main, monkeypatch, capsys, *flags, "--device", "cpu")
    assert not unsafe(printed) and r"0\x1b[2J" in printed
    assert not unsafe((here / "page" / "report.html").read_text("utf-8"))

    asked = ["--model", checkpoints["vqa"], "--max-new-tokens", 3, "--question", f"what {SCREEN}\u202e is it?"]
    assert not unsafe(run(lambda: run_infer({}, ""), monkeypatch, capsys, *base, *asked))


def test_captions_tokens_and_folders_of_a_training_are_escaped(checkpoints, here, monkeypatch, capsys):
    texts = [f"a red cube {text}" for text in HOSTILE]
    source = tiny.write_photos(here, len(texts), texts)
    flags: dict[str, Any] = {"model": checkpoints["opt"], "annotations": source, "output-dir": f"out{HOSTILE[4]}", "epochs": 1}
    flags |= {"batch-size": 4, "r": 2, "val-fraction": 0.25, "device": "cpu", "targets": "vit,qformer", "max-new-tokens": 4}
    command = [part for key, value in flags.items() for part in (f"--{key}", value)]
    printed = run(lambda: run_train({}, ""), monkeypatch, capsys, *command)
    assert "saved " in printed and not unsafe(printed)
    (here / "bad.jsonl").write_text("".join(json.dumps({"image": name, "text": "x"}) + "\n" for name in HOSTILE))
    flags["annotations"] = here / "bad.jsonl"
    command = [part for key, value in flags.items() for part in (f"--{key}", value)]
    printed = run(lambda: run_train({}, ""), monkeypatch, capsys, *command)
    assert printed.startswith("error: ") and not unsafe(printed) and "\nerror: forged" not in printed


def test_texts_from_an_adapter_are_escaped(checkpoints, here, monkeypatch, capsys):
    """Controls in its header are refused; what is left, such as a text that runs backwards, is escaped."""
    tiny.write_photos(here, 1)
    path = adapter_of(checkpoints["blip"], here)
    for text in HOSTILE:
        for place in ("name", "prompt", "base"):
            metadata = json.loads(json.dumps(adapter_file.read(path).metadata))
            if place == "base":
                metadata["base"]["name"] = f"{checkpoints['blip']}{text}"
            else:
                metadata["task"][place] = f"caption{text}" if place == "name" else f"a {text}"
            odd = here / f"{place}.safetensors"
            odd.write_bytes(adapter_file.serialise(adapter_file.read(path).tensors, {"lora_blip": json.dumps(metadata)}))
            flags = ["--adapter", odd, "--images", "photos", "--device", "cpu", "--max-new-tokens", 3]
            if place != "base":
                flags += ["--model", checkpoints["blip"]]
            assert not unsafe(run(lambda: run_infer({}, ""), monkeypatch, capsys, *flags)), (place, text)


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_texts_from_a_checkpoint_are_escaped(checkpoints, here, monkeypatch, capsys, key):
    tiny.write_photos(here, 1)
    config = json.loads((checkpoints["opt"] / "config.json").read_text())
    folder = here / f"model{HOSTILE[3]}"
    folder.mkdir()
    for file in checkpoints["opt"].iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {key: [SCREEN] if key == "architectures" else SCREEN}))
    printed = run(lambda: run_infer({}, ""), monkeypatch, capsys, "--adapter", "none", "--model", folder, "--images", "photos")
    assert "error" in printed and not unsafe(printed)


@pytest.mark.usefixtures("here")
def test_settings_and_names_of_commands_are_escaped(monkeypatch, capsys):
    for flags in (["--precision", SCREEN], [f"--no-such{SCREEN}", 1], ["--r", SCREEN], ["--annotations", f"{SCREEN}.jsonl"]):
        printed = run(lambda: run_train({}, ""), monkeypatch, capsys, *flags)
        assert printed and not unsafe(printed)
    assert not unsafe(run(main, monkeypatch, capsys, SCREEN)) and "prepare" in COMMANDS


def test_a_prepared_data_set_is_reported_in_safe_lines(here, monkeypatch, capsys):
    picture = tiny.write_photos(here, 1).parent / "photos" / "0.png"
    for name in NAMES[:-1]:
        (here / f"{name}.png").write_bytes(picture.read_bytes())
    lines = [{"image": f"{name}.png", "text": "a cube"} for name in [*NAMES[:-1], *HOSTILE]] + [
        {"image": "photos/0.png", "text": "x"}
    ]
    (here / f"data{HOSTILE[4]}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["prepare", "--source", f"data{HOSTILE[4]}.jsonl", "--splits", "1", "--on-bad-data", "skip"]
    printed = run(main, monkeypatch, capsys, *flags)
    assert "are invalid:" in printed and not unsafe(printed)
    assert prepare.DROPPED in printed


def test_an_unknown_error_is_printed_escaped(monkeypatch):
    """The last line of defence: Python's own traceback, with a stranger's text in its message."""
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    try:
        raise RuntimeError(f"cannot read {SCREEN}")
    except RuntimeError:
        print_traceback(*sys.exc_info())
    assert "RuntimeError: cannot read" in stream.getvalue() and not unsafe(stream.getvalue())
