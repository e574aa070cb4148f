"""The number of tokens that a generated text may have: chosen from the data, and reported if it cuts texts."""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from lora_blip.data.example import Example
from lora_blip.models.language import CutText, DecoderLanguage
from lora_blip.models.text_check import UNBOUNDED
from lora_blip.models.token_rows import many_ids
from lora_blip.tasks.base import BaseTask, Generation
from lora_blip.tasks.text_task import TextTask

MARGIN = 8  # tokens beyond the longest text, at least; a quarter of it if that is more
CHUNK = 1024  # texts tokenized together
MANY = 200_000  # lines whose texts take some seconds to count


def token_counts(task: BaseTask, texts: Collection[str], spaced: bool = False) -> dict[str, int]:
    """Return the tokens that the model must generate for each text, with its end token.

    spaced: the text follows a prompt in a decoder, so it has a space before it. Most numbers are known from `TokenBounds` or
    from the check of the data; the other texts are tokenized here.
    """
    counts, lengths = {text: task.checker.bounds.count(text, spaced) for text in texts}, task.checker.lengths
    if not spaced:
        counts |= {text: lengths[text] for text in texts if counts[text] == UNBOUNDED and text in lengths}
    rest = [text for text in texts if counts[text] == UNBOUNDED]
    for start in range(0, len(rest), CHUNK):
        part = rest[start : start + CHUNK]
        written = [f" {text}" if spaced else text for text in part]
        ids = many_ids(task.backbone.tokenizer, written)
        counts |= {text: len(ids[one]) for text, one in zip(part, written, strict=True)}
    return {text: tokens + 1 for text, tokens in counts.items()}


def texts_by_space(task: BaseTask, examples: Iterable[Example]) -> dict[bool, Counter[str]]:
    """Return how often each text is in the examples. Key True: the texts that are generated with a space before them."""
    decoder = isinstance(task, TextTask) and isinstance(task.language, DecoderLanguage)
    texts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for e in examples:
        texts[decoder and bool(e.prompt or task.prompt)].update(e.answers or (e.text,))
    return texts


def longer_texts(task: BaseTask, examples: Iterable[Example], limit: int) -> tuple[Counter[str], int, int]:
    """Return the texts of more than `limit` tokens with their counts, the most tokens of one, and the number of texts.

    If no text is longer than `limit`, the most tokens are 0. Each text of a line counts.
    """
    texts, longer, most = texts_by_space(task, examples), Counter[str](), 0
    for spaced, counts in texts.items():
        may_be = [text for text in counts if task.checker.bounds.at_most(text) + 1 > limit]
        too_long = {text: n for text, n in token_counts(task, may_be, spaced).items() if n > limit}
        longer.update({text: counts[text] for text in too_long})
        most = max(most, *too_long.values()) if too_long else most
    return longer, most, sum(counts.total() for counts in texts.values())


def longest_text(task: BaseTask, examples: Iterable[Example]) -> int:
    """Return the most tokens of any text of the examples, with its end token. Only texts that may be longest are counted."""
    longest = 0
    for spaced, counts in texts_by_space(task, examples).items():
        others = []
        for text in counts:
            most = task.checker.bounds.at_most(text, longest - 1)
            if most == UNBOUNDED:
                others.append(text)
            elif most + 1 > longest:
                longest = max(longest, task.checker.bounds.count(text, spaced) + 1)
        longest = max(longest, *token_counts(task, others, spaced).values()) if others else longest
    return longest


def most_new_tokens(task: TextTask) -> int:
    """Return how many tokens the model has room for after the task's prompt, without a question, with the end token."""
    return task.most_new_tokens(task.prompt.replace("{question}", ""))


def fit_generation(
    task: BaseTask, examples: list[Example], limit: int, fix: str = "MAX_NEW_TOKENS = 0 has room for all"
) -> int:
    """Set and return the most tokens of a generated text.

    limit: 0 chooses the longest text of the examples plus a margin, at most what the model has room for. Another value is used
    as it is. If texts are longer, their number is printed, with the fix.
    """
    if not isinstance(task, TextTask):
        task.checker.lengths = {}
        return limit or Generation().max_new_tokens
    chosen, room = limit, most_new_tokens(task)
    if len(examples) >= MANY:
        print(f"counting the tokens of the texts of {len(examples):,} lines")
    if not limit:
        longest = longest_text(task, examples)
        chosen = max(1, min(longest + max(MARGIN, longest // 4), room))
        fix = "the model has no room for more after the prompt"
    if (limit or longest > chosen) and (cut := longer_texts(task, examples, chosen))[0]:
        longer, most, total = cut
        print(
            f"warning: max_new_tokens = {chosen} cuts {longer.total():,} of {total:,} texts, the longest of which has "
            f"{most} tokens with its end token: their predictions can never be right. {fix}"
        )
    task.checker.lengths = {}  # not needed any more
    task.generation = replace(task.generation, max_new_tokens=chosen)
    return chosen


# ---------------------------------------------------------------- generated texts


@dataclass
class CutCount:
    """How many generated texts were cut."""

    cut: int = 0
    total: int = 0

    def add(self, texts: Collection[object]) -> "CutCount":
        self.cut += sum(isinstance(text, CutText) for text in texts)
        self.total += len(texts)
        return self

    def report(self, task: BaseTask, what: str, examples: Iterable[Example] = ()) -> str:
        """Return one line with the number of texts that were cut, and the fix; "" if there are none.

        examples: the right answers, if they are known. If all of them fit, the model should have ended its texts.
        """
        if not self.cut or not isinstance(task, TextTask):
            return ""
        most = task.generation.max_new_tokens
        longer = min(2 * most, most_new_tokens(task))
        if examples and longest_text(task, examples) <= most:
            fix = "The right texts are not longer: the model did not end these, and more training teaches it to"
        elif longer > most:
            fix = f"Set MAX_NEW_TOKENS = {longer} (--max-new-tokens {longer})"
        else:
            fix = "The model has no room for longer texts"
        return f"{self.cut:,} of {self.total:,} {what} were cut after {most} tokens, before their end. {fix}"
