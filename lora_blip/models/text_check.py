"""Check that a model can use a text: its number of tokens, special tokens, and tokens that the tokenizer does not know.

`TokenBounds` computes upper bounds of the number of tokens without tokenizing, because a file may have a million lines.
"""

import json
import string
import sys
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

from lora_blip.models.token_rows import many_ids, plain_ids
from lora_blip.models.unknown_tokens import REMEDY, UnknownTokens
from lora_blip.runtime.untrusted import HALF_PAIR, quoted

PRINTABLE = string.digits + string.ascii_letters + string.punctuation
NORMALIZERS = {None, "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled"}  # these never lengthen ASCII
UNBOUNDED = sys.maxsize  # no bound
WORDS_KEPT = 2**17  # words whose number of tokens is stored
ONLY_UNKNOWN = f"has only tokens that this model's tokenizer does not know; {REMEDY}"


class TextChecker:
    """Check texts against a tokenizer. `special`: the ids that no text may contain."""

    def __init__(self, tokenizer: Any, special: set[Any]) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.unknown = UnknownTokens(tokenizer, special)
        self.pretokenized: dict[str, list[int]] = {}  # text → its tokens, of the last call of `pretokenize`
        self.lengths: dict[str, int] = {}  # text → its number of tokens, until `text_length.fit_generation` has used it

    @cached_property
    def bounds(self) -> "TokenBounds":
        return TokenBounds(self.tokenizer, self.special)

    def pretokenize(self, lines: list[tuple[str, ...]]) -> None:
        """Tokenize the texts of some lines in one call, for the next calls of `ids`. Skip the texts that need no check."""
        if longest := self.bounds.longest_word:
            lines = [texts for texts in lines if not (joined := "".join(texts)).isascii() or len(joined) > longest]
        unsure = sorted({text for texts in lines for text in texts if text and not self.bounds.has_no_unknown(text)})
        self.pretokenized = many_ids(self.tokenizer, unsure) if unsure else {}
        self.unknown.note(self.pretokenized)
        self.lengths |= {text: len(ids) for text, ids in self.pretokenized.items()}

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens."""
        return self.pretokenized.get(text) or plain_ids(self.tokenizer, text)

    def warning(self, text: str) -> str:
        """Return a line about the unknown tokens of a text, once for each text, or ""."""
        if self.unknown.id is None or self.bounds.has_no_unknown(text):  # the bounds of a large tokenizer take a second
            return ""
        return self.unknown.warning(text, self.ids(text))

    def problem(self, text: str, room: int) -> str:
        """Return why a text cannot be used if the model has room for `room` tokens, or ""."""
        if self.bounds.upper_bound(text, room) <= room:
            return ""
        ids = self.ids(text)
        if problem := self.special_token_problem(text, ids):
            return problem
        if self.unknown.only_unknown(ids):
            return f"the text {quoted(text)} {ONLY_UNKNOWN}"
        return f"the text has {len(ids)} tokens, and the model has room for {room}; shorten it" if len(ids) > room else ""

    def special_token_problem(self, text: str, ids: list[int]) -> str:
        """Return why a text with a special token, such as <image> or [SEP], or with no valid Unicode cannot be used, or ""."""
        if half := HALF_PAIR.search(text):
            return f"{quoted(text)} contains {half[0]!r}, which is half of a character (of a surrogate pair); remove it"
        special = [i for i in ids if i in self.special]
        tokens = self.tokenizer.convert_ids_to_tokens(special[:1])
        return f"{quoted(text)} contains {tokens[0]!r}, which the model uses as a special token; remove it" if special else ""


class TokenBounds:
    """Upper bounds of a tokenizer's `plain_ids` for texts of printable ASCII without special tokens.

    For such a text, WordPiece, a byte-level BPE and a unigram model produce at most one token for each character, and one for
    a space before it. They tokenize each word separately, so the sum over the words is a closer bound. For other texts, other
    tokenizers, and a tokenizer that does not know all of ASCII, the bound is UNBOUNDED. If the bound is finite, the text also
    has no special token, and at least one known token.
    """

    def __init__(self, tokenizer: Any, special: Iterable[Any]) -> None:
        self.tokenizer = tokenizer
        tokens = list(filter(None, tokenizer.convert_ids_to_tokens(sorted(special))))  # BLIP's [DEC] has no token
        # the first characters of special tokens, in lower and upper case: a text without them contains no special token
        self.first_characters = {case for token in tokens for case in (token[:1].lower(), token[:1].upper())}
        self.longest_word = longest_known_word(tokenizer, frozenset(special)) if all(map(str.isascii, tokens)) else 0
        self.counts: dict[str, tuple[int, int]] = {}  # word → its number of tokens at the start of a text, and after a space

    def upper_bound(self, text: str, enough: int = UNBOUNDED) -> int:
        """Return an upper bound of the number of tokens of a text.

        The bound is the number of characters + 1 if that is at most `enough`. Otherwise it is closer, and takes longer.
        """
        if not self._plain(text, text.find(" ") if len(text) > self.longest_word else 0):
            return UNBOUNDED
        most = len(text) + 1
        return most if most <= enough else sum(map(max, map(self._counts, text.split(" "))))

    def count(self, text: str, spaced: bool = False) -> int:
        """Return the number of tokens of a text, or of a text after a space; UNBOUNDED if this needs the tokenizer."""
        if self.upper_bound(text) == UNBOUNDED:
            return UNBOUNDED
        first, *rest = map(self._counts, text.split(" "))
        return first[spaced] + sum(after for _, after in rest)

    def has_no_unknown(self, text: str) -> bool:
        """Return True if the text certainly has no unknown and no special token."""
        if self.upper_bound(text) == UNBOUNDED:
            return False
        return len(text) <= self.longest_word or max(map(len, text.split(" "))) <= self.longest_word

    def upper_bound_of_longest(self, texts: Collection[str]) -> int:
        """Return an upper bound of the tokens of the longest of some texts."""
        longest = max(map(len, texts))
        known = min(texts) >= "!" and self._plain(" ".join(texts), longest)
        return longest + 1 if known else UNBOUNDED

    def _plain(self, text: str, word: int) -> bool:
        """Return True for printable ASCII without special tokens, if `word` is from 0 to `longest_word`.

        word: the length of a word of the text. 0: no word is checked. -1: the text is one word longer than `longest_word`.
        """
        for character in self.first_characters:
            if character in text:
                return False
        return text.isascii() and text.isprintable() and text >= "!" and 0 <= word <= self.longest_word

    def _counts(self, word: str) -> tuple[int, int]:
        """Return the number of tokens of a word at the start of a text, and after a space."""
        counts = self.counts.get(word)
        if counts is None:
            counts = len(plain_ids(self.tokenizer, word)), len(plain_ids(self.tokenizer, f" {word}"))
            if len(self.counts) < WORDS_KEPT:
                self.counts[word] = counts
        return counts


def longest_known_word(tokenizer: Any, special: Collection[int]) -> int:
    """Return the length up to which the tokenizer certainly knows every ASCII word; 0 for an unsupported tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        return 0
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps, normalizer = settings["model"], settings["pre_tokenizer"] or {}, settings["normalizer"] or {}
    if normalizer.get("type") not in NORMALIZERS:
        return 0
    splits = tuple(step["type"] for step in steps.get("pretokenizers", [steps] if steps else []))
    kind = (model["type"], *splits)
    if kind == ("WordPiece", "BertPreTokenizer"):
        lower = normalizer.get("lowercase", False)
        letters = {letter.lower() if lower else letter for letter in string.digits + string.ascii_letters}
        pieces = {*letters, *(model["continuing_subword_prefix"] + letter for letter in letters), *string.punctuation}
        known = pieces <= model["vocab"].keys() and tokenizer.unk_token_id not in special
        return int(model["max_input_chars_per_word"]) if known else 0
    if kind in (("BPE", "ByteLevel"), ("Unigram", "WhitespaceSplit", "Metaspace")):
        refused = {*special, tokenizer.unk_token_id}
        known = all((ids := plain_ids(tokenizer, letter)) and refused.isdisjoint(ids) for letter in PRINTABLE)
        return 2**31 if known else 0
    return 0
