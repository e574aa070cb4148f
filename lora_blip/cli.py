"""The commands: `lora-blip …`, and the entry points of train.py and infer.py."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
from lora_blip.conversion import command as conversion
from lora_blip.errors import ConfigError, LoraBlipError, PeerError
from lora_blip.flags import parse
from lora_blip.inference import commands
from lora_blip.inference import early_checks as inference_checks
from lora_blip.inference import export as exporting
from lora_blip.inspection import command as inspection
from lora_blip.lora import blend_command as blending
from lora_blip.lora import tune_command
from lora_blip.lora.tune_command import NoSettings
from lora_blip.runtime.command_line import key_settings, with_own_program
from lora_blip.runtime.limits import ADVICE, LOST_WORKER, follows_lost_peer, is_lost_worker, is_process_limit
from lora_blip.runtime.progress import heartbeat
from lora_blip.runtime.similar_names import nearest
from lora_blip.runtime.system_errors import file_error, is_system_error, quoted_for_shell
from lora_blip.runtime.terminal import TerminalStream, terminal_streams
from lora_blip.runtime.untrusted import printable_lines
from lora_blip.training import early_checks as training_checks
from lora_blip.version import __version__

IMPORTING = "loading torch and transformers, which takes 5 to 20 s, the first time longer"  # the start of most commands
DEPENDENCIES = ("torch", "transformers", "PIL", "numpy", "safetensors", "tqdm")  # modules of pyproject.toml's dependencies


def run_train(script: dict[str, Any], doc: str | None) -> None:
    """Train with the settings of train.py and the flags. Print one message for a LoraBlipError, without a traceback."""
    report_errors(lambda: start(COMMANDS["train"], script, doc=doc or ""))


def run_infer(script: dict[str, Any], doc: str | None) -> None:
    """Run inference with the settings of infer.py and the flags. Report errors as `run_train` does."""
    report_errors(lambda: start(COMMANDS["infer"], script, doc=doc or ""))


def report_errors(run: Callable[[], None]) -> None:
    """Call `run`. If it raises LoraBlipError, print one message and exit with status 2. After Ctrl-C, exit with status 130.

    If standard output cannot be written, as on a full disk, `run` continues to its end, and the exit status is 1.
    """
    try:
        with terminal_streams() as (stdout, _):
            _report_errors(run)
    except SystemExit as end:
        if end.code or not stdout.failure:
            raise
    if stdout.failure:
        reason = printable_lines(stdout.failure.strerror or stdout.failure)
        advice = "free some space, or write it to another disk"
        print(f"error: standard output could not be written completely ({reason}); {advice}", file=sys.stderr)
        raise SystemExit(1)


def _report_errors(run: Callable[[], None]) -> None:
    try:
        run()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if follows_lost_peer(error):
            end_at_once(error)
        if isinstance(error, PeerError):  # the main process reports it
            if error.__cause__ and not isinstance(error.__cause__, LoraBlipError):
                print_traceback(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
            raise SystemExit(2) from None
        if isinstance(error, LoraBlipError):
            stop(error)
        if is_system_error(error):
            stop(file_error(error))
        if isinstance(error, ModuleNotFoundError) and error.name in DEPENDENCIES:
            stop(RuntimeError(missing_dependency(str(error.name))))
        if is_lost_worker(error) or is_process_limit(error):
            for child in multiprocessing.active_children():
                child.kill()  # loader workers ignore SIGTERM, and Python waits for them when it ends
            sys.unraisablehook = lambda _: None  # hide the error when a deleted loader cannot start its cleanup thread
            stop(RuntimeError(LOST_WORKER if is_lost_worker(error) else ADVICE))
        sys.excepthook = print_traceback
        raise


def missing_dependency(module: str) -> str:
    """Return a message that names the missing library, and the command that installs all dependencies into this Python."""
    is_checkout = ((repository := Path(__file__).resolve().parents[1]) / "pyproject.toml").is_file()
    project = f"-e {quoted_for_shell(str(repository))}" if is_checkout else "lora_blip"
    venv_python = repository / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    has_venv = is_checkout and venv_python.exists() and venv_python != Path(sys.executable)
    other = f", or use the Python that `make` installed: {quoted_for_shell(str(venv_python))}" if has_venv else ""
    return f"{module} is not installed; install it: {quoted_for_shell(sys.executable)} -m pip install {project}{other}"


def print_traceback(*error: Any) -> None:
    """Print the traceback of an unexpected error. Escape unsafe characters: the message may quote an untrusted file."""
    traceback.print_exception(*error, file=TerminalStream(sys.stderr))


def end_at_once(error: Exception) -> NoReturn:
    """Print an error that follows the loss of another process, and exit at once with os._exit.

    A normal exit frees the frames of the error, and gloo then sometimes waits forever for the lost process. No output is lost:
    all `with` blocks of the run have ended, so its files are closed and its locks are released.
    """
    is_known = isinstance(error, LoraBlipError)
    if not is_known:
        print_traceback(type(error), error, error.__traceback__)
    elif not isinstance(error, PeerError):  # the main process prints a PeerError
        print_error(error)
    for child in multiprocessing.active_children():
        child.kill()  # loader workers would otherwise wait some seconds for this process
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(2 if is_known else 1)


def stop(error: Exception) -> NoReturn:
    """Print the error and exit with status 2."""
    print_error(error)
    raise SystemExit(2)


def print_error(error: Exception) -> None:
    """Print the message of an error to stderr."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2]  # from a worker process
    # one write, so that the lines of processes do not mix
    print(f"error: {printable_lines(with_own_program(message + key_settings(message)))}\n", end="", file=sys.stderr)


def prepare_settings() -> type:
    from lora_blip.data.prepare.command import PrepareConfig

    return PrepareConfig


@heartbeat()
def prepare(config: Any) -> None:
    from lora_blip.data.prepare.command import prepare

    prepare(config)


@heartbeat(IMPORTING)
def train(config: TrainConfig) -> None:
    from lora_blip.training.loop import train

    train(config)


@heartbeat(IMPORTING)
def infer(config: InferConfig) -> None:
    from lora_blip.inference.pipeline import infer

    infer(config)


@heartbeat(IMPORTING)
def evaluate(config: EvaluateConfig) -> None:
    from lora_blip.evaluation.comparison import evaluate

    evaluate(config)


@heartbeat(IMPORTING)
def doctor(_: NoSettings) -> bool:
    from lora_blip.doctor import examine

    return examine()


class Command(NamedTuple):
    """A command of `lora-blip`. Its functions import torch only when they run, so `--help` and errors in settings are quick."""

    summary: str
    settings: Callable[[], type]  # returns the dataclass of the settings
    run: Callable[[Any], bool | None]  # called with the settings; False means exit status 1
    example: str  # a command that works, for the messages about wrong flags
    check_paths: Callable[[Any], object] = bool  # called with the settings before torch is imported; `bool` checks nothing
    slow_to_import: bool = True  # whether `run` imports torch and transformers


COMMANDS = {
    "caption": Command(
        f"caption images: {commands.command_of('caption')}", lambda: commands.CaptionConfig, commands.caption,
        commands.command_of("caption"), commands.check_paths,
    ),
    "ask": Command(
        f"answer a question: {commands.command_of('vqa')}", lambda: commands.AskConfig, commands.ask,
        commands.command_of("vqa"), commands.check_paths,
    ),
    "rank": Command(
        f"rank texts: {commands.command_of('retrieval')}", lambda: commands.RankConfig, commands.rank,
        commands.command_of("retrieval"), commands.check_paths,
    ),
    "train": Command(
        "train an adapter on images with texts", lambda: TrainConfig, train, "lora-blip train", training_checks.check_paths
    ),
    "infer": Command(
        "caption images, answer questions or rank texts, for few or millions of images", lambda: InferConfig, infer,
        "lora-blip infer --images photos", inference_checks.check_inference,
    ),
    "evaluate": Command(
        "compare the base and the adapter: scores with confidence intervals, and report.html", lambda: EvaluateConfig,
        evaluate, "lora-blip evaluate --references test.jsonl", inference_checks.check_evaluation,
    ),
    "inspect": Command(
        "measure an adapter, or compare two: size, rank and directions of each update", lambda: inspection.InspectConfig,
        heartbeat(IMPORTING)(inspection.inspect), "lora-blip inspect latest", inspection.check_paths,
    ),
    "export": Command(
        "write base and adapter as one Hugging Face folder, for programs with transformers", lambda: exporting.ExportConfig,
        heartbeat(IMPORTING)(exporting.export), "lora-blip export latest --output-dir my_model", exporting.check_paths,
    ),
    "blend": Command(
        "add adapters of one base with weights, to one adapter", lambda: blending.BlendConfig,
        heartbeat(IMPORTING)(blending.blend), "lora-blip blend RUN=0.7 OTHER_RUN=0.3 --output-dir blended",
        blending.check_paths,
    ),
    "convert": Command(
        "write an adapter in the format of peft, or read one from it", lambda: conversion.ConvertConfig,
        heartbeat(IMPORTING)(conversion.convert), "lora-blip convert latest --output-dir folder", conversion.check_paths,
    ),
    "prepare": Command(
        "convert common data formats to train, val and test JSONL, split by image", prepare_settings, prepare,
        "lora-blip prepare --source captions.csv", slow_to_import=False,
    ),
    "doctor": Command(
        "print versions and devices, and test the embedded bases", lambda: NoSettings, doctor, "lora-blip doctor"
    ),
    "tune": Command(
        "measure which fast paths are faster on this machine, in at most a minute", lambda: NoSettings,
        heartbeat(IMPORTING)(tune_command.tune), "lora-blip tune",
    ),
}  # fmt: skip


def main() -> None:
    """Run `lora-blip COMMAND …` or `python -m lora_blip COMMAND …`."""
    report_errors(lambda: run_command(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:]))


def run_command(name: str, arguments: list[str]) -> None:
    """Run a command with its flags. Raise ConfigError for an unknown command, and SystemExit(1) if the command failed."""
    if name in ("", "-h", "--help", "help"):
        print(overview())
    elif name in ("-V", "--version"):
        print(f"lora_blip {__version__}")
    elif name in COMMANDS:
        start(COMMANDS[name], {}, arguments, COMMANDS[name].summary, f"lora-blip {name}")
    else:
        refuse_command(name)


def start(
    command: Command, script: dict[str, Any], arguments: list[str] | None = None, doc: str = "", program: str | None = None
) -> None:
    """Read the settings with `flags.parse`, and run the command. Raise SystemExit(1) if it returns False.

    Check the paths, and print what starts if the command needs torch. The other parameters are passed to `flags.parse`.
    """
    example = command.example if program else f"python {Path(sys.argv[0]).name}"
    config: Any = parse(command.settings(), script, arguments, doc, program, example)
    if "WORLD_SIZE" not in os.environ:  # not under torchrun: if one process ended here, the others would wait for it
        command.check_paths(config)
    if command.slow_to_import and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":  # once under torchrun
        print(f"{(program or example).split()[1]}: {IMPORTING} …", file=sys.stderr, flush=True)
    if command.run(config) is False:
        raise SystemExit(1)


def overview() -> str:
    """Return the help of `lora-blip`: all commands, with one line each."""
    lines = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: lora-blip COMMAND …\n\nLoRA fine-tuning for BLIP and BLIP-2.\n\n"
        f"{lines}\n\nlora-blip COMMAND --help lists its settings. lora-blip --version prints the version."
    )


def refuse_command(name: str) -> NoReturn:
    """Raise ConfigError, whose message suggests the most similar command."""
    if name.startswith("-"):
        raise ConfigError(f"{name} comes before the command; write the command first: lora-blip caption photo.jpg {name} …")
    if os.path.lexists(name):
        raise ConfigError(f"{name!r} is a file, not a command; did you mean lora-blip caption {quoted_for_shell(name)}?")
    if name in ("explain", "compare"):
        raise ConfigError(f"{name!r} is not a command, but a flag: lora-blip infer --images photos --{name}")
    near = nearest(name, list(COMMANDS))
    fix = f"; did you mean {near}?" if near else "."
    raise ConfigError(f"{name!r} is not a command{fix} Commands are {', '.join(COMMANDS)}; each has --help")
