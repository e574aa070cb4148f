"""The fields of a config class that are settings: declare them with `setting`, and check their values with `check`."""

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, field, fields
from typing import Any, Literal, get_args, get_origin

from lora_blip.errors import ConfigError

LARGEST_INT = 2**31 - 1
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}  # of values, for messages
LARGEST = {  # largest sensible values, by setting
    "r": 2**16, "lr_ratio": 1e6, "seed": 2**32 - 1, "num_workers": 1024, "min_improvement": 1e6,
    "lr": 10.0, "alpha": 1e6, "weight_decay": 100.0, "max_grad_norm": 1e30, "cache_gb": 1e9, "checkpoint_seconds": 1e12,
}  # fmt: skip
SEPARATORS = {  # settings that may be a list, and what separates its items in a text
    "targets": ",", "source": ",", "annotations": ",", "val_annotations": ",", "references": ",", "train_annotations": ",",
    "image_key": "|", "text_key": "|", "question_key": "|", "answer_key": "|",
}  # fmt: skip
ADDED = {
    "init_adapter": "",
    "variant": "lora",
    "lr_ratio": 1.0,
}  # settings that older adapter files lack, with the values without effect


class Options(dict[str, Any]):
    """A dict of options: the value of a setting such as GENERATION. It is hashable, because defaults of a dataclass must be."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def setting(default: Any, doc: str, group: str = "", path: Literal["", "always", "if it exists"] = "") -> Any:
    """Return a dataclass field for a setting.

    doc: the only source of the setting's help text. `--help` prints it, and it is the comment in train.py or infer.py:
        `python -m benchmarks.studies.script_settings` writes those lines. Names of settings are in capitals.
    group: the heading above the setting, if it is the first of a group.
    path: "" if the value is not a path. A relative path in a script is joined to the script's folder: always, or only if the
        joined path exists. ~ and $HOME are expanded.
    """
    return field(default=default, metadata={"doc": doc, "group": group, "path": path})


def argument(doc: str, metavar: str, several: bool = False) -> Any:
    """Return a dataclass field for a positional argument. If `several`, its value is a list of one or more texts."""
    return field(metadata={"doc": doc, "group": "", "metavar": metavar, "nargs": "+" if several else None})


def settings_of(kind: Any) -> list[Field[Any]]:
    """Return the fields of a config class that are settings, in their order."""
    return [entry for entry in fields(kind) if "doc" in entry.metadata]


def require_settings(config: object, kind: type, call: str) -> None:
    """Raise ConfigError if a Python caller gives something other than the settings, such as a path."""
    if not isinstance(config, kind):
        given = "references='test.jsonl'" * (call == "evaluate")
        given = "**settings" if isinstance(config, Mapping) else given  # a dict
        right = f"lora_blip.{call}(lora_blip.{kind.__name__}({given}))"
        raise ConfigError(f"lora_blip.{call} expects {kind.__name__}, and not {type(config).__name__}: {right}")


def joined(name: str, values: Any) -> Any:
    """Return a list of texts or paths as one text, if the setting may be a list. Return other values unchanged."""
    if name not in SEPARATORS or not isinstance(values, list | tuple) or not values:
        return values
    parts = [str(value) if isinstance(value, os.PathLike) else value for value in values]
    if any(not isinstance(part, str) or (SEPARATORS[name] in part and name != "targets") for part in parts):
        return values
    return SEPARATORS[name].join(parts)


def _expanded(path: str) -> str:
    """Return a path without ~ and variables such as $HOME at its start. Return another text unchanged."""
    starts = path.strip().startswith(("~", "$"))
    return os.path.expandvars(os.path.expanduser(path.strip())) if starts else path  # noqa: PTH111


def check(config: Any) -> None:
    """Raise ConfigError if a field has a wrong type, is not finite, or is too large.

    Also convert values in place: a list of targets, files or columns, a path or a torch.device to a text,
    an int to a float, and ~ and $HOME in paths to folders.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        if (text := joined(entry.name, value)) is not value:
            value = text
            object.__setattr__(config, entry.name, value)
        is_device = type(value).__module__ == "torch" and type(value).__name__ == "device"
        if entry.type is str and (isinstance(value, os.PathLike) or is_device):
            value = str(value)
            object.__setattr__(config, entry.name, value)
        if get_origin(entry.type) is Literal:
            require(value in get_args(entry.type), entry.name, value, f"one of {', '.join(get_args(entry.type))}")
        elif entry.type is float and type(value) is int:
            require(abs(value) < 1e30, entry.name, value, "a smaller number")
            object.__setattr__(config, entry.name, float(value))
        elif get_origin(entry.type) is dict:
            object.__setattr__(config, entry.name, options_of(value, entry.name))
        elif type(value) is not entry.type:
            if isinstance(value, str) and (written := _without_quotes(value, entry.type)):
                raise ConfigError(f"{entry.name} = {value!r} is a text; write it without quotes: {written}")
            expected = KINDS.get(type(entry.default), type(entry.default).__name__)
            meaning = f": {entry.metadata['doc']}" * (entry.type is str and bool(entry.metadata.get("doc")))
            raise ConfigError(f"{entry.name} = {value!r}: expected {expected}{meaning}")
        if isinstance(value, str):
            if entry.metadata.get("path"):
                parts = value.split(",") if SEPARATORS.get(entry.name) == "," else [value]
                value = ",".join(map(_expanded, parts))
                object.__setattr__(config, entry.name, value)
            require("\0" not in value, entry.name, value, "a text without a NUL character")
        elif entry.type in (int, float):
            require(math.isfinite(value), entry.name, value, "a finite number")
            largest = LARGEST.get(entry.name, LARGEST_INT)
            require(value <= largest, entry.name, value, f"at most {largest:,}")


def _without_quotes(text: str, kind: Any) -> str:
    """Return a text as the number or truth value that it means, in Python's spelling, or "" if it means none."""
    if kind is bool:
        truth = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}
        return truth.get(text.strip().lower(), "")
    try:
        return str(kind(text)) if kind in (int, float) else ""
    except ValueError:
        return ""


def stored_settings(config: Any) -> dict[str, Any]:
    """Return the settings for an adapter file, without those of ADDED that have no effect: old versions had none of them."""
    settings = asdict(config)
    return {name: value for name, value in settings.items() if value != {} and (name not in ADDED or value != ADDED[name])}


def options_of(value: Any, name: str) -> Options:
    """Return a copy of an object, as JSON stores it. Raise ConfigError if it is not an object of names and JSON values."""
    try:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return Options(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError):
        pass
    raise ConfigError(f'{name} = {value!r}: expected names and values, such as {{"num_beams": 3, "top_p": 0.9}}')


def share_options(config: Any, settings: dict[str, str]) -> None:
    """Give the options of GENERATION that are also settings to these settings, so that each has one value.

    settings: {option: setting}. Raise ConfigError if both have a value, and these differ. A setting has no value if it is at
    its default. An option that is `false` or null stays in GENERATION, where it replaces the adapter's value. A setting cannot
    do this: at its default, it has no effect.
    """
    options = dict(config.generation)
    defaults = {entry.name: entry.default for entry in fields(config)}
    for option, name in settings.items():
        if option not in options:
            continue
        value, own = options[option], getattr(config, name)
        if own not in (defaults[name], value):
            raise ConfigError(
                f"{name} = {own!r}, but generation has {option} = {value!r}; remove {option} from GENERATION (--generation), "
                f"or {name.upper()} (--{name.replace('_', '-')})"
            )
        if value is None or value is False:
            continue
        expected = "true or false" if option == "do_sample" else "a whole number above 0"
        require(type(value) is type(own) and value > 0, f"generation: {option}", value, expected)
        object.__setattr__(config, name, options.pop(option))
    object.__setattr__(config, "generation", Options(options))


def require_name(value: str, name: str, known: Sequence[str]) -> None:
    """Raise ConfigError, with the most similar name, if the value of a setting is not one of the known names."""
    near = difflib.get_close_matches(value.lower(), known, 1, 0.0)[0]
    require(value in known, name, value, f"one of {', '.join(known)}; did you mean {near!r}?")


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise ConfigError, with the name and the value of the setting, if `holds` is False."""
    if not holds:
        raise ConfigError(f"{name} = {value!r}: expected {expected}")
