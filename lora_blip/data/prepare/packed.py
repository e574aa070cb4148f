"""Unpack files that contain images: Parquet, the Arrow files of save_to_disk, and the tar shards of img2dataset.

`prepare` writes each image once to a folder next to its JSONL files. The file name of an image is the hash of its bytes.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_blip.data.columns import flags, renamed, unknown_name
from lora_blip.data.conversions import converted, needs_conversion
from lora_blip.data.entries import ANSWER_KEYS, SPLITS, TEXT_KEYS, Entry, LeftOut, Located, first_key, plain_name
from lora_blip.data.formats import LONGEST, TOO_LONG, Keys
from lora_blip.data.images import LARGEST_FILE, is_picture
from lora_blip.data.prepare.parquet_reader import ADDRESSES, COLUMNS, UNWRITABLE
from lora_blip.data.prepare.web_addresses import refusal
from lora_blip.data.several_files import chosen
from lora_blip.data.several_texts import gathered, questions_key, several
from lora_blip.data.shards import StrictTarInfo
from lora_blip.errors import DataError, FileError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import make_folder, write_new
from lora_blip.runtime.system_errors import file_error
from lora_blip.runtime.system_errors import quoted_for_shell as quote
from lora_blip.runtime.untrusted import open_regular, os_error_reason, parsed, printable, quoted, shorten

READER = Path(__file__).with_name("parquet_reader.py")
SUFFIXES = {".parquet": "parquet", ".arrow": "parquet", ".tar": "shard"}
PACKAGE_PATH = Path(__file__).parents[3]  # the folder that contains lora_blip, which may not be installed
KNOWN_COLUMNS = {*TEXT_KEYS, *ANSWER_KEYS, "question", "question_id", "split", "group"}  # in upper or lower case
CACHE_PREFIXES = ("cache-",)  # the datasets library's own caches


def packed_kind(path: Path, head: bytes) -> str:
    """Return "parquet" or "shard" for a file that contains images, or "" for another file. head: its first bytes."""
    return "parquet" if head.startswith((b"PAR1", b"ARROW1")) else SUFFIXES.get(path.suffix.lower(), "")


def packed_files(folder: Path) -> list[Path]:
    """Return the shards in a folder and its subfolders, or its Parquet files if there are none, or its Arrow files."""
    for suffix in (".tar", ".parquet", ".arrow"):
        paths = (path for path in folder.rglob(f"*{suffix}") if not path.name.startswith(CACHE_PREFIXES))
        if files := sorted(filter(Path.is_file, paths)):
            return files
    return []


def split_of(path: Path) -> str:
    """Return the split named by a file or its folder, such as "train" for train-00000-of-00002.parquet, or ""."""
    names = path.stem.replace("_", "-").lower().split("-")[0], path.absolute().parent.name.lower()
    return next((SPLITS[name] for name in names if name in SPLITS), "")


def refuse_packed(source: str) -> Iterator[Located]:
    """Raise DataError with the command that unpacks a source."""
    raise DataError(
        f"{source} contains images, or is a Parquet or tar file, which is not read directly; convert it once, then give "
        "prepared/train.jsonl instead of it:\n"
        f"lora-blip prepare --source {quote(source)} --output-dir prepared"
    )


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the folder of unpacked images if the block raises an error. Keep a folder that existed before the block."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.parent.iterdir()):
                folder.parent.rmdir()
        raise


# ---------------------------------------------------------------- Parquet and Arrow


def parquet_entries(path: Path, keys: Keys, target: Path) -> Iterator[Located]:
    """Yield an entry for each caption or question of a Parquet or Arrow file, and write its images to the folder `target`.

    Raise DataError if the file cannot be read.
    """
    if find_spec("pyarrow") is None:
        raise DataError(f'{path} is a Parquet or Arrow file; to read it, install pyarrow: pip install "lora_blip[parquet]"')
    make_folder(target)
    command = [sys.executable, "-P", str(READER), str(target.absolute()), str(path), keys.image]
    python_path = os.pathsep.join(filter(None, [str(PACKAGE_PATH), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        try:
            for line in child.stdout or ():
                if line.endswith(b"\n"):  # the last line of a crash may be incomplete
                    yield from _entries_of(json.loads(line), keys)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()
        if status:
            errors.seek(0)
            reason = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            if reason.startswith(UNWRITABLE):
                number = int(reason.removeprefix(UNWRITABLE))
                raise file_error(OSError(number, os.strerror(number)), target, "written")
            if columns := _columns_of_addresses(reason):
                raise refusal(path, "parquet", *columns)
            if status < 0:
                reason = f"the process that read the file ended with {signal.Signals(-status).name}"
            if reason.startswith(COLUMNS):
                raise DataError(printable(f"{path}: {reason.removeprefix(COLUMNS).strip()}"))
            raise DataError(printable(f"{path} cannot be read: {shorten(reason)}; download it again"))


def _columns_of_addresses(reason: str) -> list[str]:
    """Return the columns of the addresses and of the captions if the reader found web addresses in place of images, else []."""
    if not reason.startswith(ADDRESSES):
        return []
    try:
        return [str(name) for name in json.loads(reason.removeprefix(ADDRESSES))]
    except ValueError:  # a long name was cut
        return ["URL", "TEXT"]


def _entries_of(row: dict[str, Any], keys: Keys) -> Iterator[Located]:
    """Yield the entry of a row, or an entry for each caption if it has a list of captions."""
    at, entry = f"row {row['row']}", row.get("entry")
    if entry is None:
        yield at, str(row["reason"]) if "reason" in row else LeftOut(row["left_out"])
        return
    named = chosen(keys.named, entry)
    entry = renamed(entry, {key: name for key, name in named.items() if key != "image"})
    if isinstance(entry, str):
        yield at, entry
        return
    plain = Counter(map(plain_name, entry))
    for key in [key for key in entry if plain[plain_name(key)] == 1 and plain_name(key) in KNOWN_COLUMNS]:
        entry[plain_name(key)] = entry.pop(key)
    if needs_conversion(entry):
        yield from converted(at, entry)
        return
    entry = gathered(entry)
    name = next((key for key in TEXT_KEYS if key in entry), "")
    texts = entry.get(name)
    if "question" in entry or questions_key(entry) or (not isinstance(texts, list) and name in TEXT_KEYS):
        yield from several(at, entry)
        return
    rest: Entry = {key: value for key, value in entry.items() if key not in TEXT_KEYS}
    for text in texts if isinstance(texts, list) else [texts] if name else []:
        yield at, rest | {"text": text.get("raw") if isinstance(text, dict) else text}
    if not name:
        columns = [key for key in entry if key != "image"]
        flag = (
            flags(["image", *columns], ["image"], [["", *(str(entry[key]) for key in columns)]])
            if columns
            else "--text-key COLUMN"
        )
        reason = f"no column has a known name for the text; the columns are {quoted(', '.join(columns))}; name it: {flag}"
        yield at, reason


# ---------------------------------------------------------------- tar shards


def shard_entries(path: Path, keys: Keys, target: Path) -> Iterator[Located]:
    """Yield an entry for each image of a tar shard, such as 000000017.jpg, with its caption in 000000017.txt or .json.

    keys: only its name of the text is used. It is a key of the .json file.
    """
    make_folder(target)
    last = ""
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as archive:
            size = os.fstat(file.fileno()).st_size
            for key, members in groupby(_members(archive, size), lambda member: member.name.rpartition(".")[0]):
                files = {member.name.rpartition(".")[2].lower(): member for member in members}
                yield key, _sample(archive, files, target, keys.text)
                last = key
    except FileError:
        raise  # an image could not be written
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else shorten(str(error))
        yield f"after {quoted(last)}", f"the rest of the shard cannot be read ({reason}); download it again"


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a shard of `size` bytes. Raise ReadError if one is longer than the rest of the shard."""
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header in memory
        if info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
            raise tarfile.ReadError(f"{quoted(info.name)} is cut off")
        if info.isreg():
            yield info


def _sample(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo], target: Path, text_key: str) -> Entry | str:
    """Return the entry of a sample, or the reason why it has none. files: {suffix: member} of the members with one name.

    text_key: the key of the caption in the .json file; "": the .txt file, or a common key.
    """
    image = next((suffix for suffix, info in files.items() if is_picture(info.name.rpartition("/")[2], lambda: b"")), "")
    if not image:
        return LeftOut("this sample has no image: img2dataset did not download it")
    caption = next((suffix for suffix in (("json",) if text_key else ("txt", "caption", "json")) if suffix in files), "")
    if not caption:
        return f"it has no caption: the shard contains no .{'json' if text_key else 'txt'} file of the same name"
    if files[caption].size > LONGEST or not 0 < files[image].size <= LARGEST_FILE:
        return TOO_LONG if files[caption].size > LONGEST else f"its image has {counted(files[image].size, 'byte')}"
    text: Any = _content(archive, files[caption]).decode(errors="surrogateescape")
    if caption == "json":
        metadata = parsed(text)
        metadata = metadata if isinstance(metadata, dict) else {}
        text_key = chosen({"text": text_key}, metadata).get("text", "")
        if text_key and text_key not in metadata:
            return unknown_name(metadata, {"text": text_key}) or f"it has no {quoted(text_key)}"
        text = metadata.get(text_key or first_key(metadata, ("caption", *TEXT_KEYS)) or "caption")
    content = _content(archive, files[image])
    path = target.absolute() / f"{hashlib.sha256(content).hexdigest()[:24]}.{image}"
    if not path.exists() or path.stat().st_size != len(content):
        write_new(path, content)
    return {"image": str(path), "text": text}


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member."""
    file = archive.extractfile(info)
    return file.read() if file else b""


PACKED: dict[str, Callable[[Path, Keys, Path], Iterator[Located]]] = {"parquet": parquet_entries, "shard": shard_entries}
