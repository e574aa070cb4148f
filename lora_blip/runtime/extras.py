"""What is nice to have beside the adapter: plots, trackers and reports. They print a line if they fail, and stop no run."""

from collections.abc import Callable
from typing import TypeVar

from lora_blip.runtime.untrusted import printable

Result = TypeVar("Result")


def attempt(what: str, act: Callable[[], Result]) -> Result | None:
    """Return the result of `act`, or None after one printed line if it fails."""
    try:
        return act()
    except Exception as error:
        reason = printable(" ".join(str(error).split())[:200])
        print(f"warning: no {what} ({type(error).__name__}: {reason}); nothing else is affected")
        return None
