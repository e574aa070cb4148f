"""Read settings from the upper-case names of a script and from command-line flags."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from lora_blip.errors import ConfigError
from lora_blip.runtime.command_line import start_of_command
from lora_blip.runtime.options import options
from lora_blip.runtime.settings import SEPARATORS, joined, settings_of
from lora_blip.runtime.similar_names import OTHER_NAMES, corrected, flag_meant, nearest
from lora_blip.runtime.system_errors import command_line, quoted_for_shell
from lora_blip.runtime.untrusted import pasteable
from lora_blip.runtime.user_paths import exists

Settings = TypeVar("Settings")
MOST_WORDS = 40  # of a command that a message corrects
ESCAPES = re.compile(r"[\a\b\t\n\v\f\r]")  # characters that an unescaped backslash in a path makes
LETTERS = str.maketrans({"\a": "/a", "\b": "/b", "\t": "/t", "\n": "/n", "\v": "/v", "\f": "/f", "\r": "/r", "\\": "/"})
NAMED = re.compile(r"argument --([a-z-]+)|^(\w+) = |did you mean --([a-z-]+)")  # the flag or setting in a message
ONE_OF = re.compile(r"expected one of ([\w, ]+)")
CAPITALS = re.compile(r"\b[A-Z_]{2,}\b")  # the name of a setting in a help text


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError with a one-line message. argparse itself prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(
    kind: type[Settings],
    script: dict[str, Any],
    arguments: list[str] | None = None,
    doc: str = "",
    program: str | None = None,
    example: str = "",
) -> Settings:
    """Return the settings from the upper-case names of a script, overridden by flags of the same names.

    A relative path in a script that has a `__file__` is relative to the script's folder. A path in a flag is relative to the
    current folder. Raise ConfigError for a name or a flag that is not a setting, and for a wrong value. The message ends with
    a command that works: the user's command with the right flag or value, or else `example`. A wrong value in a script is
    followed by the line to write there.
    """
    known = settings_of(kind)
    names = [entry.name for entry in known]
    _refuse_unknown_names(script, names)
    values = {entry.name: script.get(entry.name.upper(), entry.default) for entry in known}
    given = sys.argv[1:] if arguments is None else arguments

    def checked(words: list[str]) -> str:
        """Return the command with these words, or "" if it is not valid."""
        if {"-h", "--help"} & {*words}:  # it would be printed
            return ""
        try:
            flags = _parser(known, values, doc, program).parse_intermixed_args(words) if words else None
            kind(**(_resolve_paths(script, kind, dict(values)) | vars(flags)))
        except (ConfigError, TypeError):
            return ""
        return command_line([*start_of_command(program or example), *words])

    try:
        from_flags, unknown = _parser(known, values, doc, program).parse_known_intermixed_args(arguments)
        if unknown:
            correct = lambda names: checked(corrected(given, unknown, names) if len(given) <= MOST_WORDS else [])  # noqa: E731
            _refuse_flags(unknown, known, correct, getattr(kind, "of_infer", ()))
    except ConfigError as error:
        end = "" if "for example: " in str(error) else _example(str(error), known, example, given, checked)
        raise ConfigError(f"{error}{end}") from None
    try:
        return kind(**_resolve_paths(script, kind, values) | vars(from_flags))
    except ConfigError as error:
        end = ""
        if ": expected " in str(error):
            in_script = script.get("__file__") and _named(str(error)) not in vars(from_flags)
            line = _line_of_script(str(error), known, Path(script["__file__"]).name) if in_script else ""
            end = line or _example(str(error), known, example, given, checked)
        raise type(error)(f"{error}{end}") from None


def _example(message: str, known: list[Field[Any]], command: str, given: list[str], checked: Callable[[list[str]], str]) -> str:
    """Return the end of a message about a wrong flag: the user's command with a right value, or else `command` with it.

    The value is the most similar of the possible ones, or the default. given: the words of the user's command. checked:
    returns the command with other words, or "" if it is not valid.
    """
    name = _named(message)
    entry = next((each for each in known if each.name == name and each.default not in ("", {}, MISSING)), None)
    if entry and f"{_flag(name)} " not in command:
        value = str(entry.default).lower() if entry.type is bool else str(entry.default)
        separate = [word for each in given for word in (each.split("=", 1) if each.startswith(f"{_flag(name)}=") else [each])]
        wrong = next((separate[at + 1] for at, word in enumerate(separate[:-1]) if word == _flag(name)), "")
        named = ONE_OF.search(message)
        choices = named[1].split(", ") if named else list(map(str, get_args(entry.type)))
        value = nearest(wrong, choices) or nearest(wrong.lower(), choices) or value
        words = _with_value(given, _flag(name), value) if len(given) <= MOST_WORDS else []
        command = checked(words) or (command and f"{command} {_flag(name)} {quoted_for_shell(value)}")
    return f"; for example: {command}" if command else ""


def _with_value(given: list[str], flag: str, value: str) -> list[str]:
    """Return the words of a command with another value of a flag. Return [] if they do not contain the flag."""
    words, skips = list[str](), False
    for word in given:
        if word == flag or word.startswith(f"{flag}="):
            words += [flag, value]
            skips = word == flag
        elif not skips or word.startswith("--"):
            words.append(word)
            skips = False
        else:
            skips = False
    return words if flag in words else []


def _named(message: str) -> str:
    """Return the name of the setting that a message is about, or ""."""
    named = NAMED.search(message)
    return named[named.lastindex or 1].replace("-", "_") if named else ""


def _line_of_script(message: str, known: list[Field[Any]], script: str) -> str:
    """Return the part of a message about a wrong value that shows the setting with its default in the script."""
    name = _named(message)
    default = next((entry.default for entry in known if entry.name == name and entry.default is not MISSING), None)
    value = json.dumps(default) if isinstance(default, str) else repr(default)
    return "" if default is None else f"; in {script}, for example: {name.upper()} = {value}"


def _parser(known: list[Field[Any]], values: dict[str, Any], doc: str, program: str | None) -> argparse.ArgumentParser:
    """Return a parser with a flag per setting, in the groups of the settings."""
    without_flag = [entry for entry in known if "metavar" in entry.metadata]
    names = "".join(f" {entry.metadata['metavar']}{' …' if entry.metadata['nargs'] else ''}" for entry in without_flag)
    usage = f"%(prog)s{names} [--SETTING VALUE] …"  # the default usage lists every flag, in twenty lines
    parser = _Parser(prog=program, usage=usage, description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for entry in without_flag:
        metavar, nargs, doc = (entry.metadata[key] for key in ("metavar", "nargs", "doc"))
        parser.add_argument(entry.name, metavar=metavar, nargs=nargs, help=doc)
    group: Any = parser
    for entry in (entry for entry in known if entry not in without_flag):
        if entry.metadata["group"]:
            group = parser.add_argument_group(entry.metadata["group"])
        flag = _flag(entry.name)
        current = f" (now: {values[entry.name]})" if values[entry.name] not in ("", {}) else ""
        text = f"{_with_flags(entry.metadata['doc'], known)}{current}".replace("%", "%%")
        if entry.type is bool and without_flag:  # `--flag photo.jpg`: the path is an argument, not the value of the flag
            group.add_argument(flag, action="store_true", help=text)
        elif entry.type is bool:
            group.add_argument(flag, nargs="?", const=True, type=_bool, help=text, metavar="true|false")
            group.add_argument(f"--no-{flag[2:]}", dest=entry.name, action="store_false", help=argparse.SUPPRESS)
        elif get_origin(entry.type) is dict:
            group.add_argument(flag, type=options, help=text, metavar="NAME=VALUE,…")
        elif get_origin(entry.type) is Literal:
            group.add_argument(flag, choices=get_args(entry.type), help=text)
        else:
            group.add_argument(flag, type=entry.type, help=text, metavar=type(entry.default).__name__)
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with_flags(doc: str, known: list[Field[Any]]) -> str:
    """Return a help text with the flag of each setting that it names: --best-by instead of BEST_BY."""
    flags = {entry.name.upper(): _flag(entry.name) for entry in known}
    return CAPITALS.sub(lambda match: flags.get(match[0], match[0]), doc)


def _resolve_paths(script: dict[str, Any], kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values. Join their relative paths to the script's folder, unless it is the current folder."""
    for entry in fields(kind):
        if entry.metadata.get("path", "always") == "always":
            _refuse_escapes(entry.name, values.get(entry.name))
    folder = Path(script["__file__"]).absolute().parent if script.get("__file__") else Path.cwd()
    if folder.resolve() == Path.cwd().resolve():
        return values
    for entry in fields(kind):
        value = values.get(entry.name, entry.default)
        if entry.name == "model" and str(value).startswith("assets/"):
            continue  # an embedded base: `load_backbone` finds it from every folder, and adapter files contain this name
        resolve = entry.metadata.get("path", "always")  # the field `runs` is not a setting, but it is a path
        value = joined(entry.name, value)
        if isinstance(value, str) and value and (resolve == "always" or (resolve and exists(folder / value))):
            several = SEPARATORS.get(entry.name) == "," and not exists(folder / value)
            parts = [part.strip() for part in value.split(",")] if several else [value]
            values[entry.name] = ",".join(_below(folder, part) for part in parts)
    return values


def _below(folder: Path, path: str) -> str:
    """Join a relative path to a folder. `check` expands ~ and $HOME later."""
    return path if not path or path.startswith(("~", "$")) else str(folder / path)


def _refuse_escapes(name: str, value: Any) -> None:
    """Raise ConfigError for a path such as "my\\test", in which Python reads the backslash and the t as a tab."""
    if isinstance(value, str) and ESCAPES.search(value) and not exists(Path(value)):
        meant = value.translate(LETTERS)
        raise ConfigError(
            f"{name.upper()} contains {ascii(ESCAPES.findall(value)[0])[1:-1]}, which Python reads as one character; write the "
            f'path with slashes, "{pasteable(meant)}", or as a raw string, r"{pasteable(meant.replace("/", chr(92)))}"'
        )


def _refuse_unknown_names(script: dict[str, Any], known: list[str]) -> None:
    """Raise ConfigError for a name in a script that looks like a setting but has no effect: RANK, rank or r instead of R.

    Ignore names that start with _, modules, classes and functions: a user may add them to the script.
    """
    folded = [name.replace("_", "") for name in known]
    for name, value in script.items():
        if name.startswith("_") or callable(value) or isinstance(value, ModuleType):
            continue
        plain = name.lower()
        intended = (
            known[folded.index(plain.replace("_", ""))]
            if plain.replace("_", "") in folded
            else OTHER_NAMES.get(plain, "").partition("=")[0]
        )
        if name.isupper() and name.lower() not in known:
            near = nearest(name.lower(), known).partition("=")[0].upper()
            fix = f"; did you mean {near}? To add" if near else ". To add"
            raise ConfigError(f"{name} is not a setting{fix} a variable, start its name with _: _{name}")
        if not name.isupper() and intended in known:
            raise ConfigError(
                f"{name} is not a setting; write {intended.upper()}. To add a variable, start its name with _: _{name}"
            )


def _refuse_flags(
    unknown: list[str], known: list[Field[Any]], correct: Callable[[list[str]], str], elsewhere: Iterable[str]
) -> NoReturn:
    """Raise ConfigError for words that are not flags. The message suggests the right flag and a command with it.

    unknown: the words that argparse does not know. correct: takes the names of the flags, and returns the user's command with
    the right flags, or "" if that is not valid. elsewhere: the settings that `infer` has and this command has not.
    """
    arguments = [entry for entry in known if "metavar" in entry.metadata]
    wrong = next((word for word in unknown if word.startswith("-")), "")
    if not wrong:
        flag = unknown[0]
        path = next((entry.name for entry in known if entry.metadata.get("path") == "always"), "")
        fix = "write a value after its flag (--batch-size 8), and quotes around a text with spaces"
        if path and not arguments and exists(Path(flag)):
            fix = f"did you mean {_flag(path)} {quoted_for_shell(flag)}?"
        raise ConfigError(f"{flag!r} is not a flag, and does not follow a flag; {fix}")
    name = wrong.partition("=")[0]
    for entry in arguments:
        if name.lstrip("-").replace("-", "_").lower() in (entry.name, entry.name.removesuffix("s")):
            raise ConfigError(f"{name} is not a flag; write {entry.metadata['metavar']} without a flag")
    names = [*(entry.name for entry in known if entry not in arguments), "help"]
    near, _ = flag_meant(wrong, names)
    command = correct(names) if near else ""
    fix = f"; did you mean {near}?" if near else " of this command."
    if name.lstrip("-").replace("-", "_") in elsewhere:
        fix = " of this command. lora-blip infer has it."
    raise ConfigError(f"{name} is not a flag{fix} --help lists all flags" + f"; for example: {command}" * bool(command))


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
