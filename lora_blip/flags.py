"""Settings from the names of a script and from flags."""

import argparse
import difflib
from dataclasses import fields
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from lora_blip.errors import ConfigError

Settings = TypeVar("Settings")

OTHER_NAMES = {  # names of settings in other libraries
    "rank": "r", "lora_r": "r", "lora_rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "learning_rate": "lr", "num_epochs": "epochs", "num_train_epochs": "epochs", "bs": "batch_size",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size",
    "grad_accum": "accumulation", "gradient_accumulation_steps": "accumulation", "gradient_checkpointing": "checkpointing",
    "target_modules": "targets", "model_name": "model", "base_model": "model", "max_length": "max_new_tokens",
    "beams": "num_beams", "dtype": "precision", "workers": "num_workers", "output": "output_dir",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError: one line, without the usage of all settings."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(
    kind: type[Settings], script: dict[str, Any], arguments: list[str] | None = None, doc: str = "", program: str | None = None
) -> Settings:
    """Return the settings from the upper-case names of a script, overridden by flags of the same names.

    Raises ConfigError for a name or a flag that is not a setting.
    """
    parser = _Parser(prog=program, description=doc, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    known: Any = fields(kind)  # type: ignore[arg-type]  # a dataclass
    names = [entry.name for entry in known]
    _refuse_unknown_names(script, names)
    script = {entry.name: script.get(entry.name.upper(), entry.default) for entry in known}
    for entry in known:
        flag = f"--{entry.name.replace('_', '-')}"
        text = f"{entry.metadata['doc']} (now: {script[entry.name]!r})".replace("%", "%%")
        if entry.type is bool:
            parser.add_argument(flag, nargs="?", const=True, type=_bool, help=text, metavar="true|false")
            parser.add_argument(f"--no-{flag[2:]}", dest=entry.name, action="store_false", help=argparse.SUPPRESS)
        elif get_origin(entry.type) is Literal:
            parser.add_argument(flag, choices=get_args(entry.type), help=text)
        else:
            parser.add_argument(flag, type=entry.type, help=text, metavar=type(entry.default).__name__)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_flag(unknown[0], names)
    return kind(**script | vars(given))


def _refuse_unknown_names(script: dict[str, Any], known: list[str]) -> None:
    """Raise ConfigError for RANK = 4, r = 4 or rank = 4 beside the setting R: it would have no effect.

    Names that start with _ are the user's, and so are modules, classes and functions (`import PIL`).
    """
    folded = [name.replace("_", "") for name in known]
    for name, value in script.items():
        if name.startswith("_") or callable(value) or isinstance(value, ModuleType):
            continue
        plain = name.lower()
        meant = known[folded.index(plain.replace("_", ""))] if plain.replace("_", "") in folded else OTHER_NAMES.get(plain)
        if name.isupper() and name.lower() not in known:
            raise ConfigError(
                f"{name} is not a setting; did you mean {nearest(name.lower(), known).upper()}? "
                f"Names of your own start with _: _{name}"
            )
        if not name.isupper() and meant in known:
            raise ConfigError(f"{name} is not a setting; write {meant.upper()}. Names of your own start with _: _{name}")


def _refuse_flag(flag: str, known: list[str]) -> NoReturn:
    """Raise ConfigError that suggests the nearest flag."""
    name = flag.partition("=")[0]
    if not name.startswith("-"):
        raise ConfigError(f"{flag!r} is not a flag and not the value of one; write a value after its flag: --batch-size 8")
    near = nearest(name.lstrip("-").replace("-", "_").lower(), [*known, "help"])
    raise ConfigError(f"{name} is not a flag; did you mean --{near.replace('_', '-')}? --help lists all flags")


def nearest(name: str, known: list[str]) -> str:
    """Return the setting that a wrong name most likely means."""
    if OTHER_NAMES.get(name) in known:
        return OTHER_NAMES[name]
    longer = [one for one in known if len(name) > 2 and one.startswith(name)]  # an abbreviation
    return longer[0] if longer else difflib.get_close_matches(name, known, 1, 0.0)[0]


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
