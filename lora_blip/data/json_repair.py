"""Correct JSON that a user wrote by hand or with Python's `print`, so that an error message can contain the corrected line."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from lora_blip.data.entries import IMAGE_KEYS, UNESCAPED, WrittenFloat
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import open_regular, parsed, pasteable, refuse_constant, unique_keys

LARGEST = 2**22  # largest number of characters of a text that is corrected; a longer text comes from a program
TOKEN = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[{}\[\]:,]|\s+|[^\s{}\[\]:,"']+""", re.DOTALL)
BACKSLASH = re.compile(r"""\\(?:(u[0-9A-Fa-f]{4}|["\\/bfnrt])|(')|)|(")""")  # an escape of JSON, \', a lone \, or a quote
IMAGE_PATH = re.compile(rf'("(?:{"|".join(IMAGE_KEYS)})"\s*:\s*")([^"]*)', re.IGNORECASE)
WORDS = {"True": "true", "False": "false", "None": "null"}
STRICT = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=WrittenFloat, parse_constant=refuse_constant)


def corrected_reason(text: str, error: ValueError, line: int = 1) -> str:
    """Return why a JSON text is invalid, with its corrected line, or "" if the text cannot be corrected.

    Correct single quotes, True, False and None of Python, commas before a closing bracket or at the end, and backslashes that
    are not escaped, in any combination. line: the number of the first invalid line.
    """
    if len(text) > LARGEST:
        return ""
    slashed = IMAGE_PATH.sub(lambda match: match[1] + re.sub(r"\\+", "/", match[2]), text)
    if slashed != text and _is_valid(slashed):
        return UNESCAPED.format(pasteable(_lines(slashed)[line - 1]))
    corrected = _corrected(text)
    if not _is_valid(corrected):
        return ""
    pairs = zip(_lines(text), _lines(corrected), strict=True)
    changed = [(number, new) for number, (old, new) in enumerate(pairs, 1) if old != new]
    number, new = changed[0]
    others = f" (and correct {counted(len(changed) - 1, 'other line')} in the same way)" if len(changed) > 1 else ""
    place = f" in line {number}" if number != line else ""  # the fault may be a comma at the end of an earlier line
    return f"it is not valid JSON ({error}); write{place}{others}: {pasteable(new)}"


def rename_command(path: Path, reasons: Iterable[str]) -> str:
    """Return how to rename a JSON list or a table that is called .jsonl, or "" for another file.

    reasons: why its lines are invalid. If some line is JSON, return "".
    """
    if path.suffix.lower() != ".jsonl" or not all("not valid JSON" in reason for reason in reasons):
        return ""
    with open_regular(path) as file:
        start = file.readline(2**16).decode("utf-8-sig", errors="replace").strip()
    kind, suffix = ("a JSON list", ".json") if start[:1] == "[" else ("a table", ".csv")
    if suffix == ".csv" and (start[:1] == "{" or not re.search(r"[,;\t|]", start)):
        return ""
    new = quoted_for_shell(str(path.with_suffix(suffix)))
    return f"no line is JSON: the file looks like {kind}; rename it: mv {quoted_for_shell(str(path))} {new}"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n")]


def _is_valid(text: str) -> bool:
    try:
        return isinstance(parsed(text, STRICT), dict | list)
    except ValueError:
        return False


def _corrected(text: str) -> str:
    """Return a text with each known fault corrected. Return "" if a quote is not closed."""
    parts: list[str] = []
    before = [""]  # the last two tokens that are not spaces
    comma = position = 0  # `comma` is the place of the last comma in `parts`
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            return ""
        token, position = match[0], match.end()
        if token in ("}", "]") and before[-1] == ",":
            parts[comma] = ""
        comma = len(parts) if token == "," else comma
        is_image = before[-1] == ":" and before[-2][1:-1].casefold() in IMAGE_KEYS
        parts.append(_string(token, is_image) if token[0] in "\"'" else WORDS.get(token, token))
        if not token.isspace():
            before = [before[-1], token]
    if before[-1] == ",":
        parts[comma] = ""
    return "".join(parts)


def _string(token: str, is_image: bool) -> str:
    """Return a string of JSON for a string in single or double quotes. The path of an image gets slashes for backslashes."""
    inside = token[1:-1]
    if is_image:
        inside = re.sub(r"\\+", "/", inside)
    return '"' + BACKSLASH.sub(_escaped, inside) + '"'


def _escaped(match: re.Match[str]) -> str:
    """Return a match of BACKSLASH as JSON writes it."""
    escape, apostrophe, quote = match.groups()
    return rf"\{escape}" if escape else apostrophe or (r"\"" if quote else r"\\")
