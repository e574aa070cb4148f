"""The longest text of the data in tokens, found without tokenizing a million lines."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from lora_blip.data.annotations import Example
from lora_blip.tasks.task import Generation, Task
from lora_blip.tasks.text import TextTask

MARGIN = 8  # tokens beyond the longest text, at least; a quarter of it if that is more


def tokens_of(task: Task, text: str) -> int:
    """Return the tokens that the model must generate for a text, with its end token."""
    return max(len(task.ids(text)), len(task.ids(f" {text}"))) + 1


def longest_text(task: Task, texts: Iterable[str]) -> int:
    """Return the most tokens of any text, with its end token. Only texts that may be the longest are tokenized."""
    longest = 0
    for text in texts:
        if task.bounds.most(text, longest - 1) + 1 > longest:
            longest = max(longest, tokens_of(task, text))
    return longest


def fit_generation(task: Task, examples: list[Example], wanted: int) -> int:
    """Set and return the longest text that the task generates.

    `wanted` 0 gives the longest text of the examples plus a margin, as far as the model has room. Otherwise it is
    `wanted`, and the number of longer texts is printed.
    """
    if not isinstance(task, TextTask):
        return wanted or Generation().max_new_tokens
    texts = Counter(text for e in examples for text in (e.answers or (e.text,)))
    if not wanted:
        longest = longest_text(task, texts)
        room = task.language.room(task.prompt.replace("{question}", ""))
        task.generation = replace(task.generation, max_new_tokens=max(1, min(longest + max(MARGIN, longest // 4), room)))
        return task.generation.max_new_tokens
    longer = {text: count for text, count in texts.items() if task.bounds.most(text, wanted - 1) + 1 > wanted}
    longer = {text: count for text, count in longer.items() if tokens_of(task, text) > wanted}
    if longer:
        print(
            f"warning: max_new_tokens = {wanted} cuts {sum(longer.values()):,} of {texts.total():,} texts, the longest of "
            f"which has {longest_text(task, longer)} tokens with its end: their predictions can never be right. "
            "MAX_NEW_TOKENS = 0 has room for all"
        )
    return wanted
