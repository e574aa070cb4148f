"""The number of tokens that a generated text may have: chosen from the data, and reported if it cuts texts."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from lora_blip.data.example import Example
from lora_blip.models.language import CutText, DecoderLanguage
from lora_blip.models.text_check import UNBOUNDED
from lora_blip.models.token_rows import many_ids
from lora_blip.runtime.counts import counted
from lora_blip.tasks.base import BaseTask, Generation
from lora_blip.tasks.text_task import TextTask

MARGIN = 8  # tokens that are added to those of the longest text; a quarter of the text's tokens if that is more
OF_BASE = "texts of the base"  # the name of these texts in a report
CHUNK = 1024  # texts tokenized together
MANY = 200_000  # lines whose texts take some seconds to count


def token_counts(task: BaseTask, texts: Collection[str], spaced: bool = False) -> dict[str, int]:
    """Return the number of tokens that the model must generate for each text, with its end token.

    spaced: the text follows a prompt in a decoder, so it has a space before it. Most numbers are known from `TokenBounds` or
    from the check of the data. The other texts are tokenized here.
    """
    counts, lengths = {text: task.checker.bounds.count(text, spaced) for text in texts}, task.checker.lengths
    if not spaced:
        counts |= {text: lengths[text] for text in texts if counts[text] == UNBOUNDED and text in lengths}
    rest = [text for text in texts if counts[text] == UNBOUNDED]
    for start in range(0, len(rest), CHUNK):
        part = rest[start : start + CHUNK]
        inputs = [f" {text}" if spaced else text for text in part]
        ids = many_ids(task.backbone.tokenizer, inputs)
        counts |= {text: len(ids[one]) for text, one in zip(part, inputs, strict=True)}
    return {text: tokens + 1 for text, tokens in counts.items()}


def texts_by_space(task: BaseTask, examples: Iterable[Example]) -> dict[bool, Counter[str]]:
    """Return how often each text is in the examples. Key True: the texts that are generated with a space before them."""
    decoder = isinstance(task, TextTask) and isinstance(task.language, DecoderLanguage)
    texts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for e in examples:
        texts[decoder and bool(e.prompt or task.prompt)].update(e.answers or (e.text,))
    return texts


def longer_texts(task: BaseTask, examples: Iterable[Example], limit: int) -> tuple[Counter[str], int, int]:
    """Return how often each text of more than `limit` tokens occurs, the tokens of the longest, and the number of all texts.

    If no text is longer than `limit`, the second value is 0. Each text of a line counts.
    """
    texts, longer, most = texts_by_space(task, examples), Counter[str](), 0
    for spaced, counts in texts.items():
        may_be = [text for text in counts if task.checker.bounds.upper_bound(text) + 1 > limit]
        too_long = {text: n for text, n in token_counts(task, may_be, spaced).items() if n > limit}
        longer.update({text: counts[text] for text in too_long})
        most = max(most, *too_long.values()) if too_long else most
    return longer, most, sum(counts.total() for counts in texts.values())


def longest_text(task: BaseTask, examples: Iterable[Example]) -> int:
    """Return the number of tokens of the longest text, with its end token. Only texts that may be the longest are tokenized."""
    longest = 0
    for spaced, counts in texts_by_space(task, examples).items():
        others = []
        for text in counts:
            most = task.checker.bounds.upper_bound(text, longest - 1)
            if most == UNBOUNDED:
                others.append(text)
            elif most + 1 > longest:
                longest = max(longest, task.checker.bounds.count(text, spaced) + 1)
        longest = max(longest, *token_counts(task, others, spaced).values()) if others else longest
    return longest


def most_new_tokens(task: TextTask) -> int:
    """Return how many tokens a text may have after the prompt, with its end token. The prompt's question is not counted."""
    return task.most_new_tokens(task.prompt.replace("{question}", ""))


def fit_generation(
    task: BaseTask,
    examples: list[Example],
    limit: int,
    fix: str = "MAX_NEW_TOKENS = 0 (--max-new-tokens 0) has room for all",
) -> int:
    """Set `max_new_tokens` of a task that generates texts, and return it.

    limit: the value to use. If it is 0, use the number of tokens of the longest text plus a margin, but not more than the model
    has room for. Print how many texts are longer than the value, with the fix. For a task that generates no texts, set
    nothing, and return `limit` or the default.
    """
    if not isinstance(task, TextTask):
        task.checker.lengths = {}
        return limit or Generation().max_new_tokens
    chosen, room = limit, most_new_tokens(task)
    if len(examples) >= MANY:
        print(f"counting the tokens of the texts of {counted(len(examples), 'line')}")
    if not limit:
        longest, least = longest_text(task, examples), task.generation.options.get("min_new_tokens", 0)
        chosen = max(1, min(max(longest + max(MARGIN, longest // 4), least), room))
        fix = "The model has no room for more after the prompt: shorten the texts or the prompt"
    if (limit or longest > chosen) and (cut := longer_texts(task, examples, chosen))[0]:
        longer, most, total = cut
        print(
            f"warning: max_new_tokens = {chosen} cuts {longer.total():,} of {counted(total, 'text')}, the longest of which has "
            f"{counted(most, 'token')} with its end token. The model cannot generate them completely. {fix}"
        )
    task.checker.lengths = {}  # not needed any more
    task.generation = replace(task.generation, max_new_tokens=chosen)
    return chosen


# ---------------------------------------------------------------- generated texts


@dataclass
class TextCount:
    """How many generated texts were cut, and how many are empty."""

    cut: int = 0
    empty: int = 0
    total: int = 0

    def add(self, texts: Collection[object]) -> "TextCount":
        self.cut += sum(isinstance(text, CutText) for text in texts)
        self.empty += sum(isinstance(text, str) and not text.strip() for text in texts)
        self.total += len(texts)
        return self

    def warnings(self, task: BaseTask, what: str, examples: Iterable[Example] = ()) -> list[str]:
        """Return a line about the texts that were cut, and one about those that are empty, if there are any.

        examples: the lines with the reference texts, if these are known. If all texts fit, a larger limit does not help.
        """
        if not isinstance(task, TextTask):
            return []
        cut = [self._describe_cut(task, what, examples)] if self.cut else []
        empty = f"{self.empty:,} of {self.total:,} {what} are empty"
        advice = "; a longer training (EPOCHS) or a lower learning rate (LR) may help" * (what != OF_BASE)
        return cut + [empty + advice] * bool(self.empty)

    def _describe_cut(self, task: TextTask, what: str, examples: Iterable[Example]) -> str:
        most = task.generation.max_new_tokens
        longest = longest_text(task, examples) if examples else 0
        longer = min(max(2 * most, longest), most_new_tokens(task))
        if examples and longest <= most:
            cause = (
                "the base does not end its texts"
                if what == OF_BASE
                else "the model does not end its texts yet; if this is so after the training, train longer (EPOCHS, MAX_STEPS)"
            )
            fix = f"All reference texts fit this limit, so a larger one does not help: {cause}"
        elif longer > most:
            fix = f"Set MAX_NEW_TOKENS = {longer} (--max-new-tokens {longer})"
            fix += "; if the texts repeat words, train longer instead" * (what != OF_BASE)
        else:
            fix = "The model has no room for longer texts"
        return f"{self.cut:,} of {self.total:,} {what} were cut after {counted(most, 'token')}, before their end. {fix}"
