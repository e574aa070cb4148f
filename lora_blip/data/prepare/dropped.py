"""The lines and entries that `prepare` does not write, and the report about them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_blip.data.annotations import LISTED, located
from lora_blip.data.formats import Location
from lora_blip.data.prepare.sources import Source
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


def lines_by_reason(dropped: list[Dropped]) -> list[str]:
    """Return a text for each reason: the number of its entries, and the first of them."""
    firsts = {one.reason: one for one in reversed(dropped)}
    counts = Counter(one.reason for one in dropped)
    lines = [line_of_list(f"{count:,} × {firsts[reason]}") for reason, count in counts.most_common(LISTED)]
    return lines + [f"… and {len(counts) - LISTED:,} more reasons"] * (len(counts) > LISTED)


def first_line(dropped: list[Dropped]) -> list[str]:
    """Return the first dropped line as a text: in these categories, all reasons are alike."""
    return [f"first {dropped[0]}"]


SHOW = {"fault": first_lines, "left out": lines_by_reason}  # for each category, how `print_dropped` shows its lines


def print_dropped(dropped: list[Dropped], written: int, file: Path) -> None:
    """Print the number of dropped lines in each category, with their reasons. written: number of the other lines."""
    total = len(dropped) + written
    print(printable(f"dropped {len(dropped):9,} of {total:,} → {file}"))
    for category, title in CATEGORY_TITLES.items():
        if group := [one for one in dropped if one.category == category]:
            print(f"  {len(group):,} {title}")
            lines = SHOW.get(category, first_line)(group)
            print("\n".join(f"    {line}" for line in lines))
