"""Unpack files that contain images: Parquet, the Arrow files of save_to_disk, and the tar shards of img2dataset.

`prepare` unpacks each image once to a folder next to its JSONL. An image is named by the hash of its bytes.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

from lora_blip.data.entries import SPLITS, TEXT_KEYS, Entry
from lora_blip.data.formats import LONGEST, TOO_LONG, Keys, LeftOut, Located
from lora_blip.data.images import LARGEST_FILE, is_picture
from lora_blip.data.shards import StrictTarInfo
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import cut, open_regular, parsed, printable, quoted, why

READER = Path(__file__).with_name("parquet_reader.py")
SUFFIXES = {".parquet": "parquet", ".arrow": "parquet", ".tar": "shard"}
CAPTIONS = (*TEXT_KEYS, "captions", "sentences")  # columns that may have a list of captions
INTERNAL = ("cache-",)  # Arrow files that the datasets library writes for itself


def packed_kind(path: Path, head: bytes) -> str:
    """Return "parquet" or "shard" for a file that contains images, or ""."""
    return "parquet" if head.startswith((b"PAR1", b"ARROW1")) else SUFFIXES.get(path.suffix.lower(), "")


def packed_files(folder: Path) -> list[Path]:
    """Return the shards of a folder and its subfolders, or else its Parquet files, or else its Arrow files."""
    for suffix in (".tar", ".parquet", ".arrow"):
        found = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file() and not path.name.startswith(INTERNAL))
        if found:
            return found
    return []


def split_of(path: Path) -> str:
    """Return the split that the name of a file or of its folder contains: train-00000-of-00002.parquet, or validation/."""
    names = path.stem.replace("_", "-").lower().split("-")[0], path.absolute().parent.name.lower()
    return next((SPLITS[name] for name in names if name in SPLITS), "")


def refuse_packed(source: str) -> Iterator[Located]:
    """Raise DataError with the command that unpacks a source."""
    raise DataError(
        f"{source} contains the images themselves; unpack them once, and then train with --annotations prepared/train.jsonl:\n"
        f"lora-blip prepare --source {quote(source)} --output-dir prepared"
    )


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the unpacked images if an error prevents that their lines are written, unless the folder existed before."""
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
    """Yield an entry for each caption or question of a Parquet or Arrow file, whose images are unpacked to `target`."""
    if find_spec("pyarrow") is None:
        raise DataError(f'{path} is a Parquet or Arrow file, which needs another package: pip install "lora_blip[parquet]"')
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", str(READER), str(target.absolute()), str(path), keys.image]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            for line in child.stdout or ():
                if line.endswith(b"\n"):  # the last line of a crash may be incomplete
                    yield from _rows_of(json.loads(line), keys)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            if child.stdout:
                child.stdout.close()
        if status:
            errors.seek(0)
            reason = (errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            if status < 0:
                reason = f"the process that read it ended with {signal.Signals(-status).name}"
            raise DataError(printable(f"{path} cannot be read: {cut(reason)}; download it again"))


def _rows_of(found: dict[str, Any], keys: Keys) -> Iterator[Located]:
    """Yield the entry of a row, or an entry for each caption of a list."""
    at, entry = f"row {found['row']}", found.get("entry")
    if entry is None:
        yield at, str(found["reason"])
        return
    ours = {name: key for key, name in keys.named.items() if key != "image"}
    entry = {ours.get(key, key): value for key, value in entry.items() if key in ours or key not in ours.values()}
    name = next((key for key in CAPTIONS if key in entry), "")
    texts = entry.get(name)
    if "question" in entry or (not isinstance(texts, list) and name in TEXT_KEYS):
        yield at, entry
        return
    rest: Entry = {key: value for key, value in entry.items() if key not in CAPTIONS}
    for text in texts if isinstance(texts, list) else [texts] if name else []:
        yield at, rest | {"text": text.get("raw") if isinstance(text, dict) else text}
    if not name:
        columns = ", ".join(key for key in entry if key != "image")
        yield at, f"no column of a text; the others are {quoted(columns)}; set --text-key, or --question-key and --answer-key"


# ---------------------------------------------------------------- tar shards


def shard_entries(path: Path, keys: Keys, target: Path) -> Iterator[Located]:  # noqa: ARG001  # one signature for all
    """Yield an entry for each image of a tar shard: 000000017.jpg with its caption in 000000017.txt or .json."""
    target.mkdir(parents=True, exist_ok=True)
    last = ""
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as archive:
            size = os.fstat(file.fileno()).st_size
            for key, members in groupby(_members(archive, size), lambda member: member.name.rpartition(".")[0]):
                files = {member.name.rpartition(".")[2].lower(): member for member in members}
                yield key, _sample(archive, files, target)
                last = key
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        reason = why(error) if isinstance(error, OSError) else cut(str(error))
        yield f"after {quoted(last)}", f"the shard cannot be read further ({reason}); download it again"


def _members(archive: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        if info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
            raise tarfile.ReadError(f"{quoted(info.name)} is cut off")
        if info.isreg():
            yield info


def _sample(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo], target: Path) -> Entry | str:
    """Return the entry of the files with one name, or the reason why it has none."""
    image = next((suffix for suffix, info in files.items() if is_picture(info.name.rpartition("/")[2], lambda: b"")), "")
    if not image:
        return LeftOut("a sample without an image: img2dataset did not download it")
    caption = next((suffix for suffix in ("txt", "caption", "json") if suffix in files), "")
    if not caption:
        return "it has no caption; a .txt of the same name is missing in the shard"
    if files[caption].size > LONGEST or not 0 < files[image].size <= LARGEST_FILE:
        return TOO_LONG if files[caption].size > LONGEST else f"its image has {files[image].size:,} bytes"
    text: Any = _content(archive, files[caption]).decode(errors="surrogateescape")
    if caption == "json":
        found = parsed(text)
        text = found.get("caption") if isinstance(found, dict) else None
    content = _content(archive, files[image])
    path = target.absolute() / f"{hashlib.sha256(content).hexdigest()[:24]}.{image}"
    if not path.exists() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return {"image": str(path), "text": text}


def _content(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    return file.read() if file else b""


PACKED: dict[str, Callable[[Path, Keys, Path], Iterator[Located]]] = {"parquet": parquet_entries, "shard": shard_entries}
