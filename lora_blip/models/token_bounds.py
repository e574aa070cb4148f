"""How many tokens a text has at most, told without tokenising it: that is how a million lines are checked."""

import json
import string
import sys
from collections.abc import Collection, Iterable
from typing import Any

from lora_blip.models.token_rows import plain_ids

PRINTABLE = string.digits + string.ascii_letters + string.punctuation
NORMALIZERS = {None, "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled"}  # none makes ASCII longer
UNBOUNDED = sys.maxsize  # no bound
WORDS_KEPT = 2**17  # whose tokens are counted once


class TokenBounds:
    """Upper bounds of a tokenizer's `plain_ids`, for texts of printable ASCII without a special token in them.

    Of such a text word pieces, a byte-level BPE and a unigram model make at most a token of each character, and one more
    for a space before it; and each reads a word by itself, so that the tokens of its words bound those of the text. Of any
    other tokenizer, one that does not know all of ASCII, and any other text nothing is said: the bound is UNBOUNDED.
    Any other bound also says that the text has no special token and is more than unknown ones.
    """

    def __init__(self, tokenizer: Any, special: Iterable[Any]) -> None:
        self.tokenizer = tokenizer
        tokens = list(filter(None, tokenizer.convert_ids_to_tokens(sorted(special))))  # BLIP's [DEC] has none there
        self.marks = {case for token in tokens for case in (token[:1].lower(), token[:1].upper())}  # what each begins with
        self.longest_word = longest_known_word(tokenizer, frozenset(special)) if all(map(str.isascii, tokens)) else 0
        self.counts: dict[str, tuple[int, int]] = {}  # word → its tokens at the start of a text, and after a space

    def at_most(self, text: str, enough: int = UNBOUNDED) -> int:
        """Tokens of a text at most; a closer bound, which takes longer, when they might be more than `enough`."""
        if not self._plain(text, text.find(" ") if len(text) > self.longest_word else 0):
            return UNBOUNDED
        most = len(text) + 1
        return most if most <= enough else sum(map(max, map(self._counts, text.split(" "))))

    def count(self, text: str, spaced: bool = False) -> int:
        """Return the tokens of a text, or of it after a space; UNBOUNDED if that needs the tokenizer."""
        if self.at_most(text) == UNBOUNDED:
            return UNBOUNDED
        first, *rest = map(self._counts, text.split(" "))
        return first[spaced] + sum(after for _, after in rest)

    def has_no_unknown(self, text: str) -> bool:
        """Return True if the text surely has no unknown and no special token: as `most`, and for each of its words."""
        if self.at_most(text) == UNBOUNDED:
            return False
        return len(text) <= self.longest_word or max(map(len, text.split(" "))) <= self.longest_word

    def at_most_of(self, texts: Collection[str]) -> int:
        """Tokens of the longest of some texts at most."""
        longest = max(map(len, texts))
        known = min(texts) >= "!" and self._plain(" ".join(texts), longest)
        return longest + 1 if known else UNBOUNDED

    def _plain(self, text: str, word: int) -> bool:
        """Whether all is printable ASCII, it begins with more than a space, and its first word, so long, would be known."""
        for mark in self.marks:
            if mark in text:
                return False
        return text.isascii() and text.isprintable() and text >= "!" and 0 <= word <= self.longest_word

    def _counts(self, word: str) -> tuple[int, int]:
        """Return the tokens of a word at the start of a text, and after a space."""
        found = self.counts.get(word)
        if found is None:
            found = len(plain_ids(self.tokenizer, word)), len(plain_ids(self.tokenizer, f" {word}"))
            if len(self.counts) < WORDS_KEPT:
                self.counts[word] = found
        return found


def longest_known_word(tokenizer: Any, special: Collection[int]) -> int:
    """Characters of a word that is certainly known, whatever ASCII is in it; 0 for a tokenizer that is not understood."""
    if not getattr(tokenizer, "is_fast", False):
        return 0
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps, normalizer = about["model"], about["pre_tokenizer"] or {}, about["normalizer"] or {}
    if normalizer.get("type") not in NORMALIZERS:
        return 0
    reads = tuple(step["type"] for step in steps.get("pretokenizers", [steps] if steps else []))
    whole = (model["type"], *reads)
    if whole == ("WordPiece", "BertPreTokenizer"):
        lower = normalizer.get("lowercase", False)
        letters = {letter.lower() if lower else letter for letter in string.digits + string.ascii_letters}
        pieces = {*letters, *(model["continuing_subword_prefix"] + letter for letter in letters), *string.punctuation}
        known = pieces <= model["vocab"].keys() and tokenizer.unk_token_id not in special
        return int(model["max_input_chars_per_word"]) if known else 0
    if whole in (("BPE", "ByteLevel"), ("Unigram", "WhitespaceSplit", "Metaspace")):
        refused = {*special, tokenizer.unk_token_id}
        known = all((ids := plain_ids(tokenizer, letter)) and refused.isdisjoint(ids) for letter in PRINTABLE)
        return 2**31 if known else 0
    return 0
