"""Describe the columns of a table in an error message, and name the flags that select the right ones."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_blip.data.entries import ANSWER_KEYS, IMAGE_KEYS, IMAGE_NAME, TEXT_KEYS, Entry, KeyFault, plain_name
from lora_blip.data.several_texts import listed, numbered_names, numbered_of
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import pasteable, quoted, shorten

INTEGER = re.compile(r"-?[0-9]+")
SPECIAL = re.compile(r"[\"$`\\!%]")  # characters that a shell interprets between double quotes
FEW_COLUMNS = 12  # largest number of columns that a message lists
COMMON = {"image": IMAGE_KEYS, "text": TEXT_KEYS, "question": ("question",), "answers": ANSWER_KEYS}
VIA_TABLE = "this is a table of VIA, whose texts are inside JSON; in VIA, export the annotations as JSON, and give this file"
ALIKE = 0.6  # difflib's ratio of two names that are suggested for each other


def described(header: Sequence[str], below: Sequence[Sequence[str]]) -> str:
    """Return a text with a line for each column: its name and its first value."""
    lines = []
    for column, name in enumerate(header[:FEW_COLUMNS]):
        value = next((row[column].strip() for row in below if row[column].strip()), "")
        lines.append(f"  {quoted(name.strip())}: {quoted(value[:60]) if value else 'empty'}")
    return "\n".join(lines + [f"  and {len(header) - FEW_COLUMNS} more"] * (len(header) > FEW_COLUMNS))


def absent(named: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the part of `named` whose columns or keys are not among `names`, as columns of their own or as numbered ones."""
    return {ours: name for ours, name in named.items() if name not in names and not numbered_of(names, ours, name)}


def meant(
    wrong: Mapping[str, str], named: Mapping[str, str], names: Sequence[str], below: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Return the columns or keys that wrong names mean, {our key: column}: by their names, or else by their content.

    wrong: a part of `named`, which is {our key: name that the user gives}. below: the values of the first rows.
    """
    near = by_name(wrong, named, names)
    images = [name for column, name in enumerate(names) if any(IMAGE_NAME.fullmatch(row[column].strip()) for row in below)]
    for ours, name in near.items():  # Bildtext is similar to Bilddatei, but its cells are texts
        if name in names and images and (name in images) != (ours == "image"):
            near[ours] = ""
    return by_content(near, named, names, below)


def by_name(wrong: Mapping[str, str], named: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the columns or keys that have names similar to the wrong ones, {our key: column}. A column is "" if none has.

    The columns of the right names are not meant. Of numbered columns, the name is without the number, or "" if it is a known
    name of texts: then they are read without a flag.
    """
    used = {each for ours, name in named.items() if ours not in wrong for each in (name, *numbered_of(names, ours, name))}
    rest = [each for each in names if each not in used]
    near: dict[str, str] = {}
    for ours, name in wrong.items():
        free = [each for each in rest if each not in near.values()]
        column = next(filter(None, (near_column(ours, each, free) for each in name.split("|"))), "")
        near[ours] = without_number(ours, column, names)
    return near | ({"text": ""} if "text" in near and numbered_names(list(map(plain_name, names)), False) else {})


def by_content(
    near: dict[str, str], named: Mapping[str, str], names: Sequence[str], below: Sequence[Sequence[str]]
) -> dict[str, str]:
    """Return the result of `by_name` with the likely columns of the image and of the text, if no name is similar to theirs.

    The text of questions stays "", and so does that of numbered texts.
    """
    right = {ours: name for ours, name in (dict(named) | near).items() if name}
    keys = [
        next((ours for ours, name in right.items() if each in (name, *numbered_of(names, ours, name))), "") for each in names
    ]
    plain = list(map(plain_name, names))
    found = likely(names, keys, below) if below else {}
    if "question" in near and "question" not in found and plain_name(found.get("text", "")) not in TEXT_KEYS:
        found["question"] = found.pop("text", "")  # questions without a question mark
    if "question" in (*keys, *plain) or numbered_names(plain, False):
        found.pop("text", None)
    free = [each for each, key in zip(names, keys, strict=True) if not key]
    return {ours: column or (found.get(ours, "") if found.get(ours) in free else "") for ours, column in near.items()}


def without_number(ours: str, column: str, names: Sequence[str]) -> str:
    """Return the name of a column, without its number if other columns have the same name with a number."""
    name = re.sub(r"[\s_-]*\d{1,3}$", "", column.strip())
    return name if len(numbered_of(names, ours, name)) > 1 else column


def right_flags(near: Mapping[str, str], what: str) -> str:
    """Return the end of a message with flags for the result of `meant`. what: "column" or "key"."""
    new = " ".join(flag_of(ours, column) if column else f'{key_flag(ours)} ""' for ours, column in near.items())
    return f"did you mean {new}?" if any(near.values()) else f"if the file has no such {what}: {new}"


def near_column(ours: str, name: str, header: Sequence[str]) -> str:
    """Return the column that a wrong name means, or "" if there is none.

    It is a similar column, or else one with a common name. A column is similar if one name contains the other, or if difflib
    finds it. A column with a common name of another key is not meant. ours: "image", "text", "question" or "answers".
    """
    others = {cell for key, names in COMMON.items() if key != ours for cell in names}
    plain = {cell.strip().casefold(): cell.strip() for cell in header if cell.strip() and plain_name(cell) not in others}
    wanted = name.strip().casefold()
    inside = [cell for cell in plain if (len(wanted) > 2 and wanted in cell) or (len(cell) > 2 and cell in wanted)]
    common = [cell for cell in COMMON[ours] if cell in plain]
    near = next(iter(sorted(inside, key=len) or difflib.get_close_matches(wanted, plain, 1, ALIKE) or common), "")
    return plain.get(near, "")


def no_column(named: Mapping[str, str], header: list[str], below: list[list[str]]) -> str:
    """Return the message for names that no column has. Its flags correct all of them."""
    columns = [cell.strip() for cell in header]
    exact = {column.lower(): column for column in reversed(columns)}
    named = {ours: exact.get(each.strip().lower(), each) for ours, each in named.items()}
    wrong = absent(named, columns)
    near = meant(wrong, named, columns, below)
    numbered = numbered_names(list(map(plain_name, header)), False)
    read = f'to read {", ".join(numbered)}, name no text: {key_flag("text")} ""'
    fix = read if numbered and near == {"text": ""} else right_flags(near, "column")
    names = " or ".join(quoted(each) for name in wrong.values() for each in name.split("|"))
    return f"no column has the name {names}; the columns are:\n{described(header, below)}\n{fix}"


def no_known_column(what: str, header: list[str], keys: list[str], below: list[list[str]]) -> str:
    """Return the message for a table whose columns have no known name of images or of texts. what: "image" or "text"."""
    if len(header) == 1:
        return (
            f"the table has only one column, {quoted(header[0].strip())}; it needs columns of images and "
            "of texts, with a comma, a semicolon, a tab or | between them"
        )
    fix = VIA_TABLE if "file_attributes" in keys else f"name the columns: {flags(header, keys, below)}"
    return f"no column has a known name for the {what}; the columns are:\n{described(header, below)}\n{fix}"


def keys_of_columns(path: Path, number: int, header: list[str], below: list[list[str]], named: Mapping[str, str]) -> list[str]:
    """Return the key that each column gets in an entry: "image", "text", "question", "answers", or the column's own name.

    named: {our key: name of the column}. The name of numbered columns is the name without the number.
    Raise DataError if the column of the image or of the text is unknown.
    """
    names, lower = list(map(plain_name, header)), [cell.strip().lower() for cell in header]
    result, taken = list(names), set()
    for ours, name in named.items():
        if (cell := name.strip().lower()) in lower:
            result[lower.index(cell)] = ours
        elif columns := numbered_of(names, ours, name):
            known = ANSWER_KEYS if ours == "answers" else TEXT_KEYS
            result = [f"column {key}" if key in known else key for key in result]  # otherwise it would be used instead
            for index, column in enumerate(columns, 1):
                result[names.index(column)] = f"{ours.removesuffix('s')}_{index}"
        else:
            raise DataError(f"{path}:{number}: {no_column(named, header, below)}")
        taken.add(ours)
    has_question = "question" in result
    for ours, known in (("image", IMAGE_KEYS), *((("answers", ANSWER_KEYS),) if has_question else (("text", TEXT_KEYS),))):
        first = next((name for name in known if name in result), None)
        if ours not in taken and first:
            result[result.index(first)] = ours
            taken.add(ours)
    if "image" not in taken or not ("text" in taken or has_question or numbered_names(result, False)):
        raise DataError(
            f"{path}:{number}: {no_known_column('image' if 'image' not in taken else 'text', header, result, below)}"
        )
    return result


def unknown_name(entry: Entry, named: Mapping[str, str]) -> str:
    """Return why an entry has no key with a name that the user gives, or "". Otherwise a common name would be used silently.

    An entry needs one of the names of text and question. It needs the name of the answers only if it has others.
    named: {our key: name in the file}.
    """
    lacks = absent(named, list(entry))
    contents = [ours for ours in ("text", "question") if ours in named]
    needed = ["image", *contents * (set(contents) <= lacks.keys()), *["answers"] * (not entry.keys().isdisjoint(ANSWER_KEYS))]
    wrong = {ours: lacks[ours] for ours in needed if ours in lacks}
    if not wrong:
        return ""
    values = [value if isinstance(value, str) else "" for value in entry.values()]
    near = meant(wrong, named, list(entry), [values])
    start = f"it has no {' and no '.join(map(quoted, wrong.values()))}; its keys are {shorten(quoted(list(entry))[1:-1])}; "
    here = (
        f"write {pasteable(json.dumps(name, ensure_ascii=False))} for {quoted(near[ours])}"
        if near[ours]
        else f"add {quoted(name)}"
        for ours, name in wrong.items()
    )
    return KeyFault(start, right_flags(near, "key"), " and ".join(here))


def renamed(entry: Entry, named: Mapping[str, str]) -> Entry | str:
    """Return an entry with our keys in place of the names that the user gives, or the reason of `unknown_name`.

    Numbered keys become one list: {"text": ["a", "b"]} for {"Satz 1": "a", "Satz 2": "b"}, if the user names "Satz".
    """
    for key, name in named.items():
        if name not in entry and (numbered := numbered_of(entry, key, name)):
            entry = {each: value for each, value in entry.items() if each not in numbered} | {name: listed(entry, numbered)}
    ours = {name: key for key, name in named.items()}
    return unknown_name(entry, named) or {
        ours.get(key, key): value for key, value in entry.items() if key in ours or key not in ours.values()
    }


def swapped(texts: Sequence[str]) -> str:
    """Return the fix for a source whose texts are all names of images, or ""."""
    if not texts or not all(map(IMAGE_NAME.fullmatch, texts)):
        return ""
    return f"its texts are names of images, such as {quoted(texts[0])}: swap the names of the two columns or keys"


def flags(header: Sequence[str], keys: Sequence[str], below: Sequence[Sequence[str]]) -> str:
    """Return flags such as --text-key "words" with the columns of `likely`."""
    return " ".join(flag_of(ours, name) for ours, name in likely(header, keys, below).items())


def likely(header: Sequence[str], keys: Sequence[str], below: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return the columns that are most likely the image and the text, {our key: column}, without those that are in `keys`.

    If most cells of a column end with a question mark, it and its answer are in place of the text. A column is "COLUMN" if none
    is likely. keys: the key that each column has, as far as it is known.
    """

    def share(column: int) -> tuple[float, float]:
        """Return the share of cells that are names of images, and the mean number of letters."""
        cells = [row[column].strip() for row in below]
        images = sum(bool(IMAGE_NAME.fullmatch(cell)) for cell in cells)
        letters = sum(
            len(re.sub(r"[^\w ]|\d", "", cell)) for cell in cells if not INTEGER.fullmatch(cell) and not _is_json(cell)
        )
        return images / max(len(cells), 1), letters / max(len(cells), 1)

    def best(ours: str, columns: Sequence[int], part: int) -> int:
        """Return the column that has the key `ours`, or else the one with the largest part of `share`."""
        return keys.index(ours) if ours in keys else max(columns, key=lambda column: (share(column)[part], -column))

    def name_of(ours: str, column: int) -> str:
        """Return the name of a column, without its number if other columns of texts have the same name with a number."""
        name = without_number(ours, header[column], header)
        columns = [index for index, each in enumerate(header) if each in numbered_of(header, ours, name)]
        are_texts = all(not share(each)[0] and (share(each)[1] or ours == "answers") for each in columns)
        return name if are_texts else header[column]

    image = best("image", range(len(header)), 0)
    if numbered_names(keys, False) and "text" not in keys:  # they are read without a flag
        return {"image": header[image]}
    others = [column for column in range(len(header)) if column != image] or [image]
    question = next((column for column in others if _asks(column, below)), -1)
    pairs = [("image", image)]
    if question >= 0 and len(others) > 1 and "text" not in keys:
        pairs += [("question", question), ("answers", best("answers", [each for each in others if each != question], 1))]
    else:
        text = best("text", others, 1)
        objects = any(_is_json(row[column].strip()) for row in below for column in others)
        pairs.append(("text", -1 if objects and not share(text)[1] else text))
    return {ours: name_of(ours, column) if column >= 0 else "COLUMN" for ours, column in pairs if ours not in keys}


def _is_json(cell: str) -> bool:
    """Return True for a cell that looks like an object or a list of JSON, which is not a text to learn."""
    return cell.startswith(("{", "["))


def _asks(column: int, below: Sequence[Sequence[str]]) -> bool:
    """Return True if most cells of a column end with a question mark."""
    return 2 * sum(row[column].strip().endswith("?") for row in below) > len(below)


def flag_of(ours: str, name: str) -> str:
    """Return a flag with the name of a column in double quotes, or quoted for the shell if it contains special characters."""
    name = name.strip()
    value = quoted_for_shell(name) if SPECIAL.search(name) else f'"{name}"'
    return f"{key_flag(ours)} {value}"


def key_flag(ours: str) -> str:
    """Return the flag that names a key: --image-key, --text-key, --question-key or --answer-key."""
    return f"--{'answer' if ours == 'answers' else ours}-key"
