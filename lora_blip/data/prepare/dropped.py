"""The lines and entries that `prepare` does not write, and the texts about them."""

from dataclasses import dataclass
from typing import Literal

from lora_blip.data.annotations import located
from lora_blip.data.entries import Location
from lora_blip.data.prepare.sources import Source
from lora_blip.data.summary import LISTED, lines_by_reason
from lora_blip.runtime.untrusted import line_of_list, printable

CATEGORY_TITLES = {
    "missing": "have no image file: downloads of published data sets often lack some images",
    "unlisted": "have an image in no split of the data set; use them with --own-splits false",
    "left out": "are not usable examples:",
    "fault": "are invalid:",
}


@dataclass(frozen=True)
class Dropped:
    """A line or entry that is not written. A "fault" is an error. The other categories are common in published data."""

    source: Source
    at: Location
    category: Literal["fault", "missing", "unlisted", "left out"]
    reason: str

    def __str__(self) -> str:
        return printable(f"{located(self.source.path, self.at)}: {self.reason}")


def first_lines(dropped: list[Dropped]) -> list[str]:
    """Return the first dropped lines as texts, and the number of further ones."""
    more = len(dropped) - LISTED
    return [line_of_list(str(one)) for one in dropped[:LISTED]] + [f"… and {more:,} more"] * (more > 0)


def first_line(dropped: list[Dropped]) -> list[str]:
    """Return the first dropped line as a text, for categories in which all reasons are alike, such as "missing"."""
    return [f"first {dropped[0]}"]


SHOW = {"fault": first_lines, "left out": lines_by_reason}  # for each category, how `dropped_lines` shows its lines


def dropped_lines(dropped: list[Dropped]) -> list[str]:
    """Return the number of dropped lines in each category, with their reasons, as texts."""
    texts: list[str] = []
    for category, title in CATEGORY_TITLES.items():
        if group := [one for one in dropped if one.category == category]:
            texts += [f"{len(group):,} {title}", *(f"  {line}" for line in SHOW.get(category, first_line)(group))]
    return texts
