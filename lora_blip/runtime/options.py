"""Read the value of a flag with several options: num_beams=3,length_penalty=1.5 or a JSON object."""

import argparse
import re
from typing import Any

from lora_blip.runtime.untrusted import parsed

WORD = re.compile(r"[A-Za-z][\w-]*")


def options(text: str) -> dict[str, Any]:
    """Return the options of a flag: num_beams=3,length_penalty=1.5 or a JSON object. A value is JSON, or a word without quotes.

    Raise ArgumentTypeError for a part that is not NAME=VALUE, and for a name that is given twice.
    """
    if text.lstrip().startswith("{"):
        try:
            return dict(parsed(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); write num_beams=3,length_penalty=1.5") from None
    result: dict[str, Any] = {}
    for part in filter(str.strip, _parts(text)):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=VALUE; write num_beams=3,length_penalty=1.5")
        if name in result:
            raise argparse.ArgumentTypeError(f"{name} is given twice; keep one")
        result[name] = _value(name, value)
    return result


def _parts(text: str) -> list[str]:
    """Return the parts between the commas that are not in brackets or quotes."""
    parts, depth, quoted = [""], 0, False
    for index, character in enumerate(text):
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (character in "[{") - (character in "]}")
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(name: str, text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return parsed(text)
    except ValueError:
        if WORD.fullmatch(text):
            return text
        raise argparse.ArgumentTypeError(
            f"{name}={text}: the value is not JSON; write a number, true, false, null, a list such as [[5,7]], or a word"
        ) from None
