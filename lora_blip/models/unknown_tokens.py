"""Report tokens that a tokenizer does not know. They are lost, so their share is printed before the first step."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

SHOWN = 3  # texts named in a report
MOST_WARNED = 100  # texts of a captioner that are named, so that a service does not fill its log
REMEDY = 'a base with a byte-level tokenizer knows every text, such as "Salesforce/blip2-opt-2.7b"'


class UnknownTokens:
    """The texts in which a tokenizer found unknown tokens. A byte-level tokenizer has none."""

    def __init__(self, tokenizer: Any, special: set[Any]) -> None:
        self.tokenizer = tokenizer
        # None if the unknown token is also the end token, as in OPT, whose tokenizer knows every text
        self.id = None if tokenizer.unk_token_id in special else tokenizer.unk_token_id
        self.counts: dict[str, tuple[int, int]] = {}  # text → its unknown tokens and all of its tokens
        self.warned: set[str] = set()  # the texts that `warning` has named

    def note(self, ids: dict[str, list[int]]) -> None:
        """Store the texts that have unknown tokens. ids: text → its token ids."""
        if self.id is not None:
            self.counts |= {text: (row.count(self.id), len(row)) for text, row in ids.items() if self.id in row}

    def only_unknown(self, ids: list[int]) -> bool:
        """Return True if the ids contain only unknown tokens and spaces. T5 has a token for a space."""
        known = [i for i in ids if i != self.id]
        return not known or (len(known) < len(ids) and not str(self.tokenizer.decode(known)).strip())

    def warning(self, text: str, ids: list[int]) -> str:
        """Return a line about the unknown tokens of a text. Return "" if there are none, or if this text was named before.

        At most MOST_WARNED texts are named. ids: the tokens of the text.
        """
        lost = ids.count(self.id) if self.id is not None else 0
        if not lost or text in self.warned or len(self.warned) >= MOST_WARNED:
            return ""
        self.warned.add(text)
        tokens = f"{lost:,} of its {counted(len(ids), 'token')}"
        return f"warning: the tokenizer does not know {tokens}, so they are lost: {quoted(text)}; {REMEDY}"

    def report(self, lines: Iterable[tuple[int | str, Iterable[str]]], what: str = "line") -> str:
        """Return the share of unknown tokens in some texts, with examples and the fix; "" if there are none.

        lines: (line number, texts of the line); 0 if the texts are not from a line. Only the texts given to `note` are counted.
        """
        if not self.counts:
            return ""
        affected: list[tuple[int | str, list[str]]] = []
        total = 0
        for line, texts in lines:
            total += 1
            if unknown_texts := [text for text in dict.fromkeys(texts) if text in self.counts]:
                affected.append((line, unknown_texts))
        if not affected:
            return ""
        counts = [self.counts[text] for text in chain.from_iterable(lost for _, lost in affected)]
        unknown, tokens = (sum(column) for column in zip(*counts, strict=True))
        shown = [f"{what} {line}: {quoted(lost[0])}" if line else quoted(lost[0]) for line, lost in affected[:SHOWN]]
        return "\n  ".join(
            [
                f"warning: {len(affected):,} of {counted(total, what)} ({len(affected) / total:.1%}) contain "
                f"tokens that this tokenizer does not know; {unknown:,} of their {counted(tokens, 'token')} "
                f"({unknown / tokens:.1%}) are lost:",
                *shown,
                REMEDY,
            ]
        )
