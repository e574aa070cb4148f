"""Describe a source none of whose images is in the folder of the images."""

import os
from pathlib import Path

from lora_blip.data.image_paths import SAMPLE, SEVERAL, ImageFinder
from lora_blip.runtime.system_errors import long_path_advice, quoted_for_shell
from lora_blip.runtime.untrusted import quoted
from lora_blip.runtime.user_paths import relative_if_below

DEEP = 3  # smallest number of parts of a folder that IMAGE_ROOT is set to: a search of /home would take long


def none_found(root: Path, own_root: Path, written: list[str], reason: str, fix: str = "") -> str:
    """Return a message about a source none of whose images is in `root`, with the fix.

    own_root: the folder of the images if IMAGE_ROOT were empty. written: their paths in the source. reason: that of the first
    one. fix: a fix to use instead.
    """
    several, _, folder = reason.partition(SEVERAL) if SEVERAL in reason else ("", "", "")
    text = f"none of its images ({len(written):,}) is in {root.absolute()}; "
    text += several or f"{quoted(written[0])} does not exist there"
    near = reason.partition("nearest existing name is ")[2]
    usual = f"the nearest name there is {near}; correct the names, or " * bool(near)
    usual += "set IMAGE_ROOT (--image-root) to the folder of the images" + f", such as --image-root {folder}" * bool(folder)
    return f"{text}; {fix or long_path_advice(root / written[0]) or _common_root(root, own_root, written) or usual}"


def _common_root(root: Path, own_root: Path, written: list[str]) -> str:
    """Return the fix if IMAGE_ROOT is the folder of other images only, such as those of ANNOTATIONS. Otherwise return ""."""
    finder = ImageFinder(own_root)
    found = [finder.find(name)[0] for name in written[:SAMPLE]] if own_root.resolve() != root.resolve() else []
    if not found or not all(found):
        return ""
    folder = os.path.commonpath([Path(path).absolute().parent for path in found])
    common = Path(os.path.commonpath([folder, root.absolute()]))
    is_useful = len(common.parts) >= DEEP and common != root.absolute()
    value = relative_if_below(common) if is_useful else ""
    contains = ", which contains both" * bool(value)
    return (
        f"these images are in {folder}. IMAGE_ROOT is one folder for all annotations: set IMAGE_ROOT to {value!r}{contains} "
        f"(--image-root {quoted_for_shell(value)})"
    )
