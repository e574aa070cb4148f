"""Check the header of an adapter file before it is used: the file may be untrusted."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lora_blip.lora.fingerprint import digest_of, is_sample
from lora_blip.lora.sites import Site
from lora_blip.runtime.setting_checks import VARIANTS
from lora_blip.runtime.untrusted import WITH_NAN, UnreadableError, is_path, open_regular, parsed, quoted

FORMAT_VERSION = 2  # the largest that this version reads; see `version_of`
LARGEST = 8 * 2**20  # bytes; 700 adapted modules need less than one million
LONGEST_TEXT = 10_000  # characters of a prompt or name
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # terminal control codes, lone surrogates
OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
BLOCK = re.compile(r"[\w-]{0,64}")
MISSING = object()
OWN_DIGEST = "header_sha256"  # key of the digest of all other entries
FIX = "copy the file again, or train the adapter again"


class HeaderError(ValueError):
    """A header cannot be used. The message contains the reason and the fix."""


def check_size(path: Path) -> None:
    """Raise UnreadableError if the header is too long. Its length is in the first eight bytes; safetensors accepts 100 MB."""
    with open_regular(path) as file:
        claimed = int.from_bytes(file.read(8), "little")
        size = file.seek(0, os.SEEK_END)
    if claimed > max(size, LARGEST):
        raise UnreadableError("its first bytes are not those of safetensors")
    if claimed > LARGEST:
        raise UnreadableError(f"its header has {claimed:,} bytes, more than {LARGEST:,}")


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and not CONTROL.search(value)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_generation(value: Any) -> bool:
    """Return True for at most 64 options with small values. Any names are allowed: later versions have more options."""
    if not is_object(value) or len(value) > 64 or not all(OPTION.fullmatch(name) for name in value):
        return False
    return len(repr(value)) <= LONGEST_TEXT and all(map(_is_value, value.values()))


def _is_value(value: Any) -> bool:
    """Return True for a value of JSON without infinite numbers, control characters, or integers of more than 32 bits."""
    if isinstance(value, list):
        return all(map(_is_value, value))
    if isinstance(value, dict):
        return all(is_text(key) and _is_value(each) for key, each in value.items())
    if isinstance(value, str):
        return is_text(value)
    return value is None or is_flag(value) or (abs(value) < 2**31 if type(value) is int else math.isfinite(value))


def whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most


# part of a header that the program uses → (check, description of a valid value); an object comes before its entries
KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "": (is_object, "an object"),
    "format_version": (whole(1, 2**31), "a number from 1"),
    "lora": (is_object, "an object"),
    "lora.modules": (lambda value: is_object(value) and bool(value), "an object with at least one module"),
    "lora.variant": (lambda value: value in VARIANTS, f"one of {', '.join(VARIANTS)}"),
    "lora.dropout": (number(0, 0.999_999), "a number from 0 to below 1"),
    "base": (is_object, "an object"),
    "base.name": (is_path, "a name or path"),
    "base.samples": (is_object, "an object"),
    "base.dtype": (is_text, "a text"),
    "base.baked": (is_flag, "true or false"),
    "base.image_size": (whole(1, 4096), "a number from 1 to 4096"),
    "task": (is_object, "an object"),
    "task.name": (is_text, "a text"),
    "task.prompt": (is_text, "a text"),
    "task.generation": (is_generation, "an object of at most 64 options with small values"),
    "task.generation.max_new_tokens": (whole(1, 2**31), "a number from 1"),
    "task.generation.num_beams": (whole(1, 1024), "a number from 1 to 1024"),
    "task.generation.do_sample": (is_flag, "true or false"),
    "task.temperature": (number(1e-6, 1e6), "a number from 0.000001 to 1000000"),
    "training": (is_object, "an object"),
    "training.steps": (whole(0, 2**63), "a number"),
    "training.finished": (is_flag, "true or false"),
    "training.settings": (is_object, "an object"),
    "training.settings.annotations": (is_path, "a path"),
    "training.settings.image_root": (is_path, "a path"),
    "merge_drift": (is_object, "an object"),
}
NEEDED = ("", "format_version", "lora", "lora.modules", "base", "base.name", "base.samples", "task")


def parse_header(text: str) -> dict[str, Any]:
    """Return the header as a dict. Raise HeaderError, which names the part, if a part in KNOWN is not valid."""
    try:
        metadata: dict[str, Any] = parsed(text, WITH_NAN)  # a loss may be NaN
    except ValueError as error:
        raise HeaderError(f"its header cannot be understood ({error}); {FIX}") from None
    version = metadata.get("format_version") if is_object(metadata) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise HeaderError(
            f"it has format {quoted(version)}, and this lora_blip reads formats up to {FORMAT_VERSION}; upgrade it: "
            "pip install --upgrade lora_blip"
        )
    if is_object(metadata) and metadata.pop(OWN_DIGEST, None) not in (None, digest_of(metadata)):  # earlier versions wrote none
        raise HeaderError("it is damaged: its header has changed since it was saved; copy it again")
    for place, (fits, expected) in KNOWN.items():
        value = _at(metadata, place)
        if value is MISSING and place not in NEEDED:
            continue
        if not fits(value):
            actual = "missing" if value is MISSING else quoted(value)
            raise HeaderError(
                f"its header cannot be understood ({place or 'the header'} is {actual}, expected {expected}); {FIX}"
            )
    if version_of(metadata["lora"].get("variant", "lora")) > metadata["format_version"]:
        raise HeaderError(f"its header has format {version}, in which an adapter has no variant; train the adapter again")
    samples, modules = metadata["base"]["samples"], metadata["lora"]["modules"]
    wrong = [path for path, sample in samples.items() if not is_sample(sample)]
    wrong += [address for address, entry in modules.items() if not _is_sampled(entry, samples)]
    if wrong:
        raise HeaderError(f"its header cannot be understood (the entry for {quoted(wrong[0])}); {FIX}")
    return metadata


def _is_sampled(entry: Any, samples: dict[str, Any]) -> bool:
    return is_object(entry) and isinstance(entry.get("module"), str) and entry["module"] in samples


def _at(metadata: Any, place: str) -> Any:
    for key in filter(None, place.split(".")):
        if not isinstance(metadata, dict) or key not in metadata:
            return MISSING
        metadata = metadata[key]
    return metadata


def sites_of(metadata: dict[str, Any]) -> list[Site]:
    """Return the sites of the adapters in a header. Raise HeaderError, with the entry, if one is not valid."""
    variant = metadata["lora"].get("variant", "lora")
    return [_site(address, entry, variant) for address, entry in metadata["lora"]["modules"].items()]


def version_of(variant: str) -> int:
    """Return the format version of a file with this variant.

    Version 1 has plain LoRA only. An older lora_blip would compute another variant wrongly, so it must refuse the file.
    """
    return 1 if variant == "lora" else 2


def entry_of(site: Site) -> dict[str, Any]:
    """Return the entry of a site in a header, from which `sites_of` returns the site."""
    entry: dict[str, Any] = {"module": site.module, "r": site.r, "alpha": site.alpha}
    return entry | ({"block": site.block, "rows": list(site.rows)} if site.rows else {})


def _site(address: str, entry: dict[str, Any], variant: str) -> Site:
    r, alpha, block, rows = map(entry.get, ("r", "alpha", "block", "rows"))
    valid = whole(1, 2**31)(r) and number(0, 1e300)(alpha) and alpha != 0
    valid = valid and (rows is None) is (block is None) and (rows is None or _is_block(block, rows))
    if not valid:
        raise HeaderError(f"the header's entry for {quoted(address)} cannot be understood; train the adapter again")
    place = (block or "", tuple(rows) if rows else None)
    site = Site(entry["module"], cast(int, r), float(cast(float, alpha)), *place, variant)
    if site.address != address:
        message = f"the header's entry for {quoted(address)} describes {quoted(site.address)}"
        raise HeaderError(f"{message}; train the adapter again")
    return site


def _is_block(block: Any, rows: Any) -> bool:
    """Return True for a name and a range [start, stop) of output rows."""
    if not isinstance(block, str) or not BLOCK.fullmatch(block) or not isinstance(rows, list) or len(rows) != 2:
        return False
    return all(map(whole(0, 2**31), rows)) and rows[0] < rows[1]
