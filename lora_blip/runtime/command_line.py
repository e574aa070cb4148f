"""The command that started this process, as a line to paste."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_blip.runtime.system_errors import command_line
from lora_blip.runtime.untrusted import open_regular, printable
from lora_blip.runtime.user_paths import relative_if_below

KEY_FLAGS = re.compile(r"""--(image|text|question|answer)-key ("[^"]*"|'(?:[^']|'"'"')*'|[^\s'"]+)""")
SCRIPTS = ("train.py", "infer.py")
# settings of a script that change how annotations are read, if they are set
READING = re.compile(
    r"""^(IMAGE_ROOT|(?:IMAGE|TEXT|QUESTION|ANSWER)_KEY|GROUP_BY|VAL_ANNOTATIONS|TASK) *= *r?["'](?!auto["'])[^"']""",
    re.MULTILINE,
)
COMMAND = re.compile(r"(?<![\w/.-])lora-blip(?= [a-z-])")  # in a message
LONGEST_SCRIPT = 2**20  # bytes of a file that are searched


def program() -> list[str]:
    """Return the words that start this program: `python train.py` or `lora-blip`; [] if it is another program."""
    path = Path(sys.argv[0])
    if path.name in SCRIPTS:
        return [python(), str(path)]
    if path.parts[-2:] == ("lora_blip", "__main__.py"):
        return [python(), "-m", "lora_blip"]
    return [_named("lora-blip", path)] if path.stem == "lora-blip" else []


def python() -> str:
    """Return "python" if a shell finds this interpreter by that name, or else its path."""
    return _named("python", Path(sys.executable))


def _named(name: str, file: Path) -> str:
    """Return the name of a program if PATH leads to the folder of its file, or if the file has no folder. Else its path."""
    found = shutil.which(name)
    in_path = found and Path(found).absolute().parent == file.absolute().parent and _same(found, file)
    return name if in_path or file.parent == Path() else relative_if_below(file.absolute())


def _same(found: str, file: Path) -> bool:
    try:
        return file.samefile(found)
    except OSError:  # on Windows, lora-blip is lora-blip.exe
        return True


def key_settings(message: str) -> str:
    """Return the lines of a script for the flags of columns in a message, such as IMAGE_KEY = "Datei"; "" for a command.

    Return "" if the flags are those of `lora-blip prepare`.
    """
    if Path(sys.argv[0]).name not in SCRIPTS or "lora-blip prepare" in message:
        return ""
    values = {name: shlex.split(value)[0] for name, value in KEY_FLAGS.findall(message) if value != "KEY"}  # a placeholder
    lines = [f"{name.upper()}_KEY = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join([f"\nin {Path(sys.argv[0]).name}:", *lines]) if lines else ""


def is_our_script(path: str) -> bool:
    """Return True if a file is a script of this project, such as train.py. Another program may have the same name."""
    try:
        with open_regular(Path(path)) as file:
            return b"lora_blip" in file.read(LONGEST_SCRIPT)
    except OSError:
        return False


def training_command(flags: Sequence[str], kept: Sequence[str] = ()) -> list[str]:
    """Return the words of a training with these flags: that of train.py if it is in the current folder, else `lora-blip train`.

    Other flags reset the settings of train.py that change how annotations are read, such as IMAGE_ROOT, if they are set.
    kept: flags of the settings that are not reset.
    """
    if not is_our_script("train.py"):
        return [*(program() or ["lora-blip"]), "train", *flags]
    with open_regular(Path("train.py")) as file:
        settings = READING.findall(file.read(LONGEST_SCRIPT).decode(errors="replace"))
    names = {f"--{name.lower().replace('_', '-')}": "auto" * (name == "TASK") for name in settings}
    reset = [word for flag, value in names.items() if flag not in (*flags, *kept) for word in (flag, value)]
    return [python(), "train.py", *flags, *reset]


def start_of_command(usual: str) -> list[str]:
    """Return the words before the flags of this process. usual: such as "lora-blip train" or "python train.py"."""
    words, own = usual.split(), program()
    return own + words[1:] * (words[0] == "lora-blip") if own else words


def lora_blip_program() -> list[str]:
    """Return the words that start a command of lora_blip. If a script runs, `lora-blip` may not be in its PATH."""
    is_script = Path(sys.argv[0]).suffix == ".py"
    return [python(), "-m", "lora_blip"] if is_script else program() or ["lora-blip"]


def with_own_program(message: str) -> str:
    """Return a message whose commands start this installation, if a shell does not find it as `lora-blip`."""
    is_found = _named("lora-blip", Path(sys.executable).with_name("lora-blip")) == "lora-blip"
    return message if is_found else COMMAND.sub(lambda _: command_line(lora_blip_program()), message)


def this_command(without: Sequence[str] = (), added: Sequence[str] = ()) -> str:
    """Return the command of this process, or "" if the package was called from another program, or by torchrun.

    without: flags that are left out with their values. added: words at the end.
    """
    start = program()
    if not start or "WORLD_SIZE" in os.environ:
        return ""
    words, skipped = list[str](), False
    for word in sys.argv[1:]:
        if word.partition("=")[0] in without:
            skipped = "=" not in word  # the next word is its value
        elif skipped:
            skipped = False
        else:
            words.append(word)
    return printable(command_line([*start, *words, *added]))
