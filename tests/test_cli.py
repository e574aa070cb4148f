"""The program `lora-blip`, which is also `python -m lora_blip`: its help, its mistakes, and what it imports."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lora_blip import cli
from lora_blip.cli import COMMANDS, main
from lora_blip.flags import parse
from lora_blip.runtime import command_line
from lora_blip.runtime.similar_names import FLAGS, OTHER_NAMES
from lora_blip.version import __version__

ROOT = Path(__file__).resolve().parent.parent
POSIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "crypt", "_posixsubprocess")
NOT_ON_WINDOWS = {  # attributes that these modules lack on Windows
    "os": ("fork", "forkpty", "getuid", "geteuid", "getpgid", "setsid", "killpg", "sched_getaffinity", "register_at_fork",
           "statvfs", "mkfifo", "uname", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "posix_fallocate", "pread", "fchmod"),
    "signal": ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGQUIT", "SIGCHLD", "pthread_sigmask", "setitimer"),
}  # fmt: skip


def printed(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> str:
    """Run the program in this process and return what it prints on stdout."""
    monkeypatch.setattr(sys, "argv", ["lora-blip", *arguments])
    main()
    return capsys.readouterr().out


def refused(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: str) -> str:
    """Return the one line on stderr of a call that exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        printed(monkeypatch, capsys, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def process(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process that imports the package from this repository."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_lists_every_command_with_one_line(monkeypatch, capsys, arguments):
    lines = printed(monkeypatch, capsys, *arguments).splitlines()
    assert lines[0] == "usage: lora-blip COMMAND …"
    for name, command in COMMANDS.items():
        assert f"  {name:<10} {command.summary}" in lines
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_printed(monkeypatch, capsys, flag):
    assert printed(monkeypatch, capsys, flag) == f"lora_blip {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command(monkeypatch, capsys, name):
    """--help documents each setting, and the command runs its function with the settings."""
    command = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        printed(monkeypatch, capsys, name, "--help")
    helped = capsys.readouterr().out
    assert (
        stopped.value.code == 0
        and helped.startswith(f"usage: lora-blip {name}")
        and command.summary in " ".join(helped.split())
    )


def test_help_and_wrong_settings_import_no_large_library():
    """The overview, the help of each command and a wrong flag need neither torch, transformers, numpy nor PIL."""
    code = (
        "import sys; from lora_blip.cli import COMMANDS, main\n"
        "def run(*arguments):\n"
        "    sys.argv[1:] = arguments\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "run('--help'); run(); run('--version'); run('trian')\n"
        "for name in set(COMMANDS) - {'prepare'}: run(name, '--help'); run(name, '--no-such-flag')\n"
        "large = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "raise SystemExit(f'imports {large}' if large else 0)"
    )
    done = process(code)
    assert done.returncode == 0, done.stderr[-500:]


def test_python_m_is_the_same_program(tmp_path):
    """`python -m lora_blip` prints what `main` prints."""
    code = "import runpy; runpy.run_module('lora_blip', run_name='__main__')"
    assert process(code, cwd=tmp_path).stdout == f"{cli.overview()}\n"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("trian", "train"), ("eval", "evaluate"), ("inference", "infer"), ("docter", "doctor")]
)
def test_a_mistyped_command_names_the_nearest(monkeypatch, capsys, wrong, nearest):
    assert f"{wrong!r} is not a command; did you mean {nearest}?" in refused(monkeypatch, capsys, wrong)


def test_a_flag_that_is_given_as_a_command_is_named(monkeypatch, capsys):
    assert "'explain' is not a command, but a flag: lora-blip infer --images photos --explain" in refused(
        monkeypatch, capsys, "explain"
    )


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ("ask photo.jpg", 'required: QUESTION; for example: lora-blip ask photo.jpg "what color is it?"'),
        ("caption", "required: IMAGE; for example: lora-blip caption photo.jpg"),
        ("train --r", "expected one argument; for example: lora-blip train --r 8"),
        ("train --r 0", "expected above 0; for example: lora-blip train --r 8"),
        ("train --image-key a --task captions --lr 1e-3", "example: lora-blip train --image-key a --task caption --lr 1e-3"),
        ("train --epochs=ten --text-key Text", "for example: lora-blip train --epochs 30 --text-key Text"),
        ("train --batch-size -1 --lr 1e-3 --no-augment", "lora-blip train --batch-size 8 --lr 1e-3 --no-augment"),
        ("train --lr 1e-3 --epochs --r 4", "expected one argument; for example: lora-blip train --lr 1e-3 --epochs 30 --r 4"),
        ("train --on-bad-data ignore --r 0", "for example: lora-blip train --on-bad-data stop"),  # two errors
        ("infer --images a --scale much --model b", "for example: lora-blip infer --images a --scale 1.0 --model b"),
        ("train --augment maybe", "neither true nor false; for example: lora-blip train --augment true"),
        ("infer --batch 4 --r=2", "--batch-size? --help lists all flags; for example: lora-blip infer --batch-size 4"),
        ("train --learning-rate 1e-3 --epoch 3", "did you mean --lr? --help lists all flags; for example: lora-blip train "
         "--lr 1e-3 --epochs 3"),
        ("train --images=a", "for example: lora-blip train --image-root a"),
        ("train --bf16 true --resume_from_checkpoint x", "lora-blip train --precision bf16 --resume x"),
        ("train --model_name_or_path m --train_file a.csv --val_split 0.2", "lora-blip train --model m --annotations a.csv "
         "--val-fraction 0.2"),
        ("train --fp16 --use-dora --no-augment", "lora-blip train --precision fp16 --variant dora --no-augment"),
        ("prepare --source a.csv --image-root tests", "for example: lora-blip prepare --source a.csv --images tests"),
        ("infer --temperature 0.7 --top_p 0.9 --generation num_beams=3", "lora-blip infer --generation "
         "temperature=0.7,top_p=0.9,num_beams=3"),
        ("train --no-gradient-checkpointing", "did you mean --no-checkpointing? --help lists all flags; for example: lora-blip "
         "train --no-checkpointing"),
        ("train --no-augmen --epochs 3", "lora-blip train --no-augment --epochs 3"),
        ("train --load_in_8bit false --lr 1e-3", "for example: lora-blip train --lr 1e-3"),
        ("infer --scal -0.5", "for example: lora-blip infer --scale -0.5"),
        ("train --bf16=false", "for example: lora-blip train --precision auto"),
        ("train --epoch 2 --foo a b", "for example: lora-blip train --epochs 30"),
        ("train --gpu", "for example: lora-blip train --device cuda"),
        ("train --save_steps 500", "is not a flag of this command. --help lists all flags; for example: lora-blip train"),
        ("evaluate --annotations a.jsonl", "for example: lora-blip evaluate --references a.jsonl"),
        ("infer --temperature 0.7 --images a", "lora-blip infer --images a --generation temperature=0.7"),
        ("evaluate --references a --skip", "lora-blip evaluate --references a --on-bad-data skip"),
        ("infer --on-bad-data skip", "is not a flag of this command. --help lists all flags; for example: lora-blip infer "
         "--images photos"),
        ("rank --explain a.jpg b c", 'is not a flag of this command. --help lists all flags; for example: lora-blip rank '
         'photo.jpg "a red cube" "a blue cube"'),
        ("train --epochs -1", "epochs = -1: expected above 0; for example: lora-blip train --epochs 30"),
        ("evaluate --references", "for example: lora-blip evaluate --references test.jsonl"),
        ("evaluate", "the right texts: --references test.jsonl"),
        ("train --task VQA", "for example: lora-blip train --task vqa"),
        ("train --task captions", "for example: lora-blip train --task caption"),
        ("train --task itm", "for example: lora-blip train --task retrieval"),
        ("prepare captions.csv", "for example: lora-blip prepare --source captions.csv"),
        ("infer --adapter none", "set MODEL (--model assets/tiny-blip) or ADAPTER (--adapter latest)"),
        ("infer --adapter none --question why?", "set MODEL (--model assets/tiny-blip-vqa) or ADAPTER (--adapter latest)"),
        ("infer --adapter none --texts a|b", "set MODEL (--model assets/tiny-blip-itm) or ADAPTER (--adapter latest)"),
        ("doctor --x", "for example: lora-blip doctor"),
    ],
)  # fmt: skip
def test_a_wrong_flag_ends_with_a_command_to_paste(monkeypatch, capsys, arguments, end):
    assert refused(monkeypatch, capsys, *arguments.split(" ")).endswith(f"{end}\n")


@pytest.mark.parametrize("command", ["train", "infer", "evaluate"])
@pytest.mark.parametrize("flag", sorted({*OTHER_NAMES, *FLAGS, *(f"no_{name}" for name in FLAGS)}))
def test_the_command_for_each_flag_of_another_library_is_valid(monkeypatch, capsys, command, flag):
    """With a value, with "false" and without a value. `evaluate` needs references."""
    for values in (["3"], ["false"], []):
        message = refused(monkeypatch, capsys, command, "--references", "a.jsonl", f"--{flag}", *values)
        if flag in OTHER_NAMES | FLAGS and command in message.rpartition("for example: ")[2]:
            words = shlex.split(message.rpartition("for example: ")[2])[2:]
            parse(COMMANDS[command].settings(), {}, words)


def test_a_long_command_is_not_corrected(monkeypatch, capsys):
    names = [f"{number}.jpg" for number in range(20_000)]  # from a glob of the shell
    started = time.monotonic()
    message = refused(monkeypatch, capsys, "infer", "--images", *names, "--batch", "4")
    assert message.endswith("for example: lora-blip infer --images photos --batch-size 16\n") and len(message) < 200
    assert time.monotonic() - started < 5


def test_a_missing_source_or_folder_of_prepare_names_the_similar_one(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("captions.csv").write_text("image,text\n1.png,a\n")
    Path("photos").mkdir()
    source = refused(monkeypatch, capsys, "prepare", "--source", "caption.csv")
    assert "source 'caption.csv' does not exist; did you mean 'captions.csv'? Otherwise give a file" in source
    images = refused(monkeypatch, capsys, "prepare", "--source", "captions.csv", "--images", "photo")
    assert "images = 'photo': the folder does not exist in" in images and "did you mean 'photos'?" in images


def test_the_next_command_after_prepare_runs_the_train_script_of_the_current_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2, 2)).save("1.png")
    Path("a.csv").write_text("image,text\n1.png,a\n")
    scripts = {
        "": "lora-blip train",
        "import torch": "lora-blip train",
        "from lora_blip.cli import run_train": "python train.py",
    }
    for number, (script, start) in enumerate(scripts.items()):
        Path("train.py").write_text(script)
        words = ["prepare", "--source", "a.csv", "--splits", "1", "--output-dir", f"out{number}"]
        monkeypatch.setattr(sys, "argv", ["lora-blip", *words])
        cli.run_command(words[0], words[1:])
        assert capsys.readouterr().out.endswith(f"next: {start} --annotations out{number}/train.jsonl\n")


def test_a_path_without_its_flag_is_explained(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("my captions.csv").touch()
    for command, flag in (("train", "annotations"), ("infer", "images"), ("evaluate", "references"), ("prepare", "source")):
        assert f"did you mean --{flag} 'my captions.csv'?" in refused(monkeypatch, capsys, command, "my captions.csv")


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        (
            {"PRECISION": "float16"},
            'in train.py, for example: PRECISION = "auto"',
        ),
        ({"EPOCHS": "60"}, "epochs = '60' is a text; write it without quotes: 60"),
        ({"LR": "1e-4"}, "lr = '1e-4' is a text; write it without quotes: 0.0001"),
        ({"AUGMENT": "no"}, "augment = 'no' is a text; write it without quotes: False"),
        ({"EPOCHS": "many"}, "epochs = 'many': expected a whole number; in train.py, for example: EPOCHS = 30"),
        ({"AUGMENT": 2}, "in train.py, for example: AUGMENT = True"),
    ],
)
def test_a_wrong_value_in_a_script_shows_the_line_to_write(monkeypatch, capsys, values, fix):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit):
        cli.run_train({"__file__": "somewhere/train.py", **values}, "")
    assert capsys.readouterr().err.endswith(f"{fix}\n")


def test_a_wrong_flag_does_not_show_the_line_of_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py", "--epochs", "-1"])
    with pytest.raises(SystemExit):
        cli.run_train({"__file__": "somewhere/train.py", "EPOCHS": 3}, "")
    assert (
        capsys.readouterr().err == "error: epochs = -1: expected above 0; for example: python somewhere/train.py --epochs 30\n"
    )


@pytest.mark.parametrize(
    ("path", "escape", "meant"),
    [("C:\new\\photos", "\\n", "C:/new/photos"), ("my\test\bear.jsonl", "\\t", "my/test/bear.jsonl")],
)
def test_a_path_with_unescaped_backslashes_is_explained(monkeypatch, capsys, path, escape, meant):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit):
        cli.run_train({"__file__": "somewhere/train.py", "ANNOTATIONS": path}, "")
    raw = meant.replace("/", "\\")
    expected = f'ANNOTATIONS contains {escape}, which Python reads as one character; write the path with slashes, "{meant}", or'
    assert f'{expected} as a raw string, r"{raw}"' in capsys.readouterr().err


def test_unknown_columns_give_the_lines_of_the_script(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("Datei,Text zum Bild\n1.png,eine Katze\n")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli.run_train({"ANNOTATIONS": "a.csv"}, "")
    lines = 'in train.py:\nIMAGE_KEY = "Datei"\nTEXT_KEY = "Text zum Bild"\n'
    assert capsys.readouterr().err.endswith(f'--image-key "Datei" --text-key "Text zum Bild"\n{lines}')
    Path("b.jsonl").write_text('{"Bild": "1.png", "Wörter im \\"Bild\\"": "eine Katze"}\n')
    with pytest.raises(SystemExit):
        cli.run_train({"ANNOTATIONS": "b.jsonl", "MODEL": str(ROOT / "assets/tiny-blip"), "DEVICE": "cpu"}, "")
    assert capsys.readouterr().err.endswith('\nin train.py:\nIMAGE_KEY = "Bild"\nTEXT_KEY = "Wörter im \\"Bild\\""\n')
    monkeypatch.setattr(sys, "argv", ["lora-blip", "train", "--annotations", "a.csv"])
    with pytest.raises(SystemExit):
        main()
    assert "train.py" not in capsys.readouterr().err


def test_a_wrong_flag_of_a_script_names_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py", "--epochs", "x"])
    with pytest.raises(SystemExit):
        cli.run_train({}, "")
    assert capsys.readouterr().err.endswith("; for example: python somewhere/train.py --epochs 30\n")


def test_a_flag_before_the_command_is_explained(monkeypatch, capsys):
    assert "write the command first" in refused(monkeypatch, capsys, "--adapter", "x")


def test_a_command_that_returns_false_exits_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr("lora_blip.doctor.examine", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        printed(monkeypatch, capsys, "doctor")
    assert stopped.value.code == 1


# ---------------------------------------------------------------- the first line


def test_the_first_line_comes_before_the_imports(monkeypatch, capsys):
    """Only if torch is still to be imported, only after the settings are valid, and only in the first process of torchrun."""
    monkeypatch.setattr("lora_blip.doctor.examine", lambda: True)
    without_torch = {name: module for name, module in sys.modules.items() if name != "torch"}
    for modules, rank, notice in [
        (without_torch, "0", f"doctor: {cli.IMPORTING} …\n"),
        (without_torch, "1", ""),
        (without_torch | {"torch": sys}, "0", ""),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "modules", modules)
            patch.setenv("RANK", rank)
            patch.setattr(sys, "argv", ["lora-blip", "doctor"])
            main()
        assert capsys.readouterr() == ("", notice)


# ---------------------------------------------------------------- Windows


@pytest.mark.slow
def test_no_module_needs_what_only_posix_has():
    """Every module of the package is imported without fcntl, resource, os.fork and others, and a help is printed.

    torch and transformers are imported first: they choose their own way on Windows.
    """
    code = (
        "import importlib, pkgutil, sys, matplotlib.figure, torch, torch.utils.data, torch.distributed, transformers\n"
        "from transformers import Blip2ForConditionalGeneration, BlipForConditionalGeneration\n"
        f"for name in {POSIX_ONLY}: sys.modules[name] = None\n"
        f"for module, names in {NOT_ON_WINDOWS}.items():\n"
        "    for name in names: importlib.import_module(module).__dict__.pop(name, None)\n"
        "import lora_blip\n"
        "for module in pkgutil.walk_packages(lora_blip.__path__, 'lora_blip.'):\n"
        "    if module.name != 'lora_blip.__main__': importlib.import_module(module.name)\n"
        "from lora_blip.cli import main\n"
        "sys.argv[1:] = ['--help']\n"
        "main()"
    )
    done = process(code)
    assert done.returncode == 0 and "usage: lora-blip" in done.stdout, done.stderr[-800:]


def test_printed_commands_start_a_program_that_the_shell_finds(tmp_path, monkeypatch):
    """`make demo` calls .venv/bin/python without changing PATH. Before, its next command began with python."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name in ("python", "lora-blip"):
        (folder / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    elsewhere = os.environ["PATH"]
    for paths, found in ((elsewhere, False), (f"{folder}{os.pathsep}{elsewhere}", True)):
        monkeypatch.setenv("PATH", paths)
        start = "" if found else ".venv/bin/"
        for started, words in (
            ("train.py", [f"{start}python", "train.py"]), (str(folder / "lora-blip"), [f"{start}lora-blip"]),
            ("x/lora_blip/__main__.py", [f"{start}python", "-m", "lora_blip"]), ("lora-blip", ["lora-blip"]),
        ):  # fmt: skip
            monkeypatch.setattr("sys.argv", [started])
            assert command_line.program() == words
        monkeypatch.setattr("sys.argv", ["infer.py"])
        assert command_line.lora_blip_program() == [f"{start}python", "-m", "lora_blip"]
    for started in (str(tmp_path / "bin" / "lora-blip"), "lora-blip", "train.py"):
        monkeypatch.setenv("PATH", elsewhere)
        monkeypatch.setattr("sys.argv", [started])
        message = "train one: lora-blip train; or `lora-blip infer --images a`; see docs/lora-blip or my-lora-blip run"
        own = {"lora-blip": "lora-blip", "train.py": ".venv/bin/python -m lora_blip"}.get(started, "bin/lora-blip")
        expected = f"train one: {own} train; or `{own} infer --images a`; see docs/lora-blip or my-lora-blip run"
        assert command_line.with_own_program(message) == expected
    monkeypatch.setattr("sys.argv", ["gunicorn"])
    assert command_line.program() == [] and command_line.lora_blip_program() == ["lora-blip"]


def test_the_command_of_prepare_resets_the_settings_of_train_py_that_change_how_data_are_read(tmp_path, monkeypatch):
    """The files of `prepare` have the usual keys and their own folder. Before, IMAGE_ROOT of train.py led to other photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    assert command_line.training_command(["--annotations", "a"]) == ["lora-blip", "train", "--annotations", "a"]
    (tmp_path / "train.py").write_text(
        'import lora_blip\nIMAGE_ROOT = \'photos\'\nIMAGE_KEY = ""\nTEXT_KEY = r"was"\n# ANSWER_KEY = "a"\nTASK = "vqa"\n'
    )
    words = ["python", "train.py", "--annotations", "a", "--image-root", "", "--text-key", ""]
    assert command_line.training_command(["--annotations", "a"]) == [*words, "--task", "auto"]
    assert command_line.training_command(["--task", "vqa"])[2:] == ["--task", "vqa", *words[4:]]
    (tmp_path / "train.py").write_text('import lora_blip\nTASK = "auto"\nVAL_ANNOTATIONS = "v.jsonl"\n')
    assert command_line.training_command([])[2:] == ["--val-annotations", ""]
    assert command_line.training_command(["--val-annotations", "x"])[2:] == ["--val-annotations", "x"]
    assert command_line.training_command([], kept=["--val-annotations"])[2:] == []
