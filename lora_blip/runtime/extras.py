"""Optional outputs: plots, trackers and reports. If one fails, a line is printed and the run continues."""

from collections.abc import Callable
from typing import TypeVar

from lora_blip.runtime.untrusted import printable

Result = TypeVar("Result")


def attempt(what: str, act: Callable[[], Result]) -> Result | None:
    """Return the result of `act`. If it fails, print a warning that starts "no {what}", and return None."""
    try:
        return act()
    except Exception as error:
        reason = printable(" ".join(str(error).split())[:200])
        print(f"warning: no {what} ({type(error).__name__}: {reason}); nothing else is affected")
        return None
