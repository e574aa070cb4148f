"""Names in the files of peft: which tensor belongs to which linear, and which linears the settings of peft choose."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lora_blip.lora.header import HeaderError
from lora_blip.runtime.regex_limit import Groups, LimitedRegex
from lora_blip.runtime.untrusted import quoted

PREFIX = "base_model.model."  # of every tensor that peft saves
WRAPPERS = (PREFIX, "module.", "_orig_mod.", "model.", "blip.")  # of a model that was wrapped before it was given to peft
PARTS = (
    "vision_model.", "text_decoder.", "text_encoder.", "qformer.", "language_model.", "language_projection", "vision_proj",
    "text_proj", "itm_head", "vision_projection", "text_projection",
)  # fmt: skip
TENSOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<half>[AB])(?:\.(?P<name>[\w-]+))?\.weight|lora_magnitude_vector(?:\.(?P<owner>[\w-]+))*)"
)
PLAIN = re.compile(r"[\w.-]+")  # a name, as a regex
FLAGS = re.compile(r"\(\?[aiLmsux]+\)")  # at the start of a regex
LAYER = (r".*?\.[^.]*\.(\d+)\.", r".*\.[^.]*\.(\d+)\.")  # the first number, since peft 0.18; before, the last number
SECONDS = 2.0  # for all searches of all regexes of a file
MOST_REGEXES = 64  # of a file, without plain names
LONGEST_REGEX = 20_000
Names = str | list[str] | None  # a regex, or names


class Key(NamedTuple):
    """A tensor of a file: its linear in the model that was trained, and "A", "B" or "magnitude"."""

    module: str
    half: str


def parse_key(key: str) -> Key | None:
    """Return what a tensor of peft is, or None for a tensor that is no part of LoRA.

    Newer versions write `…lora_A.weight`. A state_dict, and versions before 0.3, also have the adapter's name:
    `…lora_A.default.weight`.
    """
    match = TENSOR.fullmatch(key.removeprefix(PREFIX))
    return Key(match["module"], match["half"] or "magnitude") if match else None


def canonical(module: str) -> str:
    """Return the name of a linear in the models of transformers 5.

    Remove the prefixes of wrappers. In BLIP-2, OPT is at `language_model.model` and T5 at `language_model`; other releases of
    transformers, and models that were saved without their head, have the other one.
    """
    path = module
    while not path.startswith(PARTS):
        wrapper = next((wrapper for wrapper in WRAPPERS if path.startswith(wrapper)), "")
        if not wrapper:
            return module
        path = path.removeprefix(wrapper)
    path = re.sub(r"^language_model\.decoder\.(?=layers\.)", "language_model.model.decoder.", path)
    return re.sub(r"^language_model\.model\.(?=(?:encoder|decoder)\.block\.)", "language_model.", path)


class Budget:
    """The time that all regexes of a file may take together, and their number."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.regexes = seconds, 0

    def search(self, key: str, regex: LimitedRegex, text: str) -> Groups:
        """Return the match. Raise HeaderError if the time is over. `key` is the name of the setting, for the message."""
        regex.seconds = self.seconds
        try:
            return regex.search(text)
        except (TimeoutError, RecursionError, MemoryError):
            raise HeaderError(
                f"its {key} contains {quoted(regex.pattern.pattern)}, which takes too long; write the names of the modules"
            ) from None
        finally:
            self.seconds = regex.seconds

    def compile(self, key: str, text: str) -> LimitedRegex:
        """Return a regex. Raise HeaderError if the text is no regex, if it is too long, or if there are too many."""
        self.regexes += 1
        if self.regexes > MOST_REGEXES or len(text) > LONGEST_REGEX:
            raise HeaderError(
                f"its {key} has more than {MOST_REGEXES} regexes, or one of more than {LONGEST_REGEX:,} characters; write names"
            )
        try:
            return LimitedRegex(text, self.seconds)
        except (re.error, OverflowError, RecursionError) as error:
            raise HeaderError(
                f"its {key} contains {quoted(text)}, which is not a regex ({quoted(error)}); correct it"
            ) from None


class NamePattern:
    """A regex of a file. A plain name is matched by `re`. Any other regex may take years, so it has a time limit."""

    def __init__(self, key: str, text: str, whole: bool, budget: Budget) -> None:
        """whole: match the whole name, as `target_modules` does. Otherwise, match it from its start or after a dot."""
        self.key, self.budget = key, budget
        flags = match[0] if (match := FLAGS.match(text)) else ""
        start = "" if whole else r"(?:.*\.)?"
        regex = rf"{flags}\A{start}(?:{text[len(flags) :]})\Z"
        self.regex = re.compile(regex) if PLAIN.fullmatch(text) else budget.compile(key, regex)

    def matches(self, module: str) -> bool:
        if isinstance(self.regex, LimitedRegex):
            return self.budget.search(self.key, self.regex, module) is not None
        return self.regex.match(module) is not None


class Values:
    """`rank_pattern` or `alpha_pattern`: the first regex that matches the end of a linear's name gives its value."""

    def __init__(self, key: str, patterns: Mapping[str, float], default: float, budget: Budget) -> None:
        self.patterns = [(NamePattern(key, text, False, budget), value) for text, value in patterns.items()]
        self.default = default

    def of(self, module: str) -> float:
        """Return the value of a linear, by its name in the model that was trained."""
        return next((value for pattern, value in self.patterns if pattern.matches(module)), self.default)


class Targets:
    """The linears that `target_modules`, `exclude_modules` and `layers_to_transform` choose."""

    def __init__(
        self, targets: Names, excluded: Names, layers: list[int] | None, layers_pattern: list[str] | None, budget: Budget
    ) -> None:
        self.budget, self.layers = budget, layers if isinstance(targets, list) else None
        self.targets, self.excluded = self._names("target_modules", targets), self._names("exclude_modules", excluded)
        self.everything = targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")
        texts = [rf"(?:^|.*?\.){text}\.(\d+)\." for text in layers_pattern or []] or LAYER
        self.numbers = [budget.compile("layers_pattern", text) for text in texts] if self.layers else []

    def __contains__(self, module: str) -> bool:
        if self._is_named(self.excluded, module) or not (self.everything or self._is_named(self.targets, module)):
            return False
        found = [self.budget.search("layers_pattern", regex, module) for regex in self.numbers]
        return not self.layers or any(
            groups and (groups[1] or "").isdecimal() and int(groups[1] or 0) in self.layers for groups in found
        )

    def _names(self, key: str, names: Names) -> NamePattern | frozenset[str]:
        return NamePattern(key, names, True, self.budget) if isinstance(names, str) else frozenset(names or ())

    def _is_named(self, names: NamePattern | frozenset[str], module: str) -> bool:
        """Return True if a regex matches the whole name, or if the list contains the name or its end after a dot."""
        return names.matches(module) if isinstance(names, NamePattern) else any(end in names for end in ends(module))


def ends(module: str) -> Iterator[str]:
    """Yield a name, and each part of it after a dot: a.b.c, b.c, c."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module
