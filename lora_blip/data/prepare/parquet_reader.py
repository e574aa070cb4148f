"""Read a Parquet or Arrow file: the child process of `packed`, so that a crash of its C++ code is one error.

`python parquet_reader.py FOLDER FILE IMAGE_COLUMN` writes the images of FILE to FOLDER, each once, under the hash of its bytes.
It prints a JSON line for each row: {"row": 1, "entry": {…}} or {"row": 1, "reason": "…"}. It limits its memory, file size and
processor time, and imports nothing of lora_blip.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "image_path", "file_name", "filepath", "path", "photo", "picture")
LARGEST_IMAGE = 2**28  # bytes
LONGEST = 2**20  # characters of a text
MOST_ITEMS = 1000  # of a list, such as the captions of an image
SPARE = 2**32  # bytes of memory that a small file may need
SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp", b"II*\0": ".tif"}


def main(target: Path, path: Path, image_column: str) -> None:
    import pyarrow as pa

    limit(path.stat().st_size)
    schema, batches = opened(path)
    image = image_column or next((name for name in IMAGE_COLUMNS if name in schema.names), "")
    image = image or next((field.name for field in schema if pa.types.is_struct(field.type)), "")
    if image not in schema.names:
        raise ValueError(f"no column {image or 'image'!r}; its columns are {', '.join(schema.names[:20])}; set --image-key")
    columns = [field.name for field in schema if field.name == image or not is_binary(field.type)]
    row = 0
    for batch in batches(columns):
        for values in batch.select([name for name in columns if name in batch.schema.names]).to_pylist():
            row += 1
            print(json.dumps({"row": row} | result(values, image, target), default=str))


def opened(path: Path) -> tuple[Any, Any]:
    """Return the schema, and a function from column names to batches of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        table = pq.ParquetFile(path)
        return table.schema_arrow, lambda columns: table.iter_batches(64, columns=columns, use_threads=False)
    source = pa.memory_map(str(path))
    try:
        stream = pa.ipc.open_stream(source)  # what save_to_disk writes
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(source)
        return reader.schema, lambda _: sliced(reader.get_batch(index) for index in range(reader.num_record_batches))
    return stream.schema, lambda _: sliced(stream)


def sliced(batches: Any) -> Iterator[Any]:
    """Yield the batches in parts of 64 rows: Python objects need more memory than Arrow's."""
    for batch in batches:
        for start in range(0, batch.num_rows, 64):
            yield batch.slice(start, 64)


def is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in [field.name for field in fields_of(kind)]


def fields_of(kind: Any) -> list[Any]:
    import pyarrow as pa

    return [kind.field(index) for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def result(values: dict[str, Any], image: str, target: Path) -> dict[str, Any]:
    """Return {"entry": …} with the path of the image, or {"reason": …}."""
    found = values.pop(image)
    content, name = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
    if isinstance(content, str):
        content, name = None, content
    if content is None and not isinstance(name, str):
        return {"reason": f"the column {image!r} has no image"}
    if content is not None and not isinstance(content, bytes):
        return {"reason": f"the column {image!r} has a {type(content).__name__}, expected the bytes or the path of an image"}
    if content is not None and not 0 < len(content) <= LARGEST_IMAGE:
        return {"reason": f"its image has {len(content):,} bytes"}
    entry = {key: kept for key, value in values.items() if (kept := plain(value)) is not None}
    if any(isinstance(value, str) and len(value) > LONGEST for value in entry.values()):
        return {"reason": f"a text of more than {LONGEST:,} characters"}
    return {"entry": entry | {"image": str(unpacked(content, target)) if content is not None else name}}


def unpacked(content: bytes, target: Path) -> Path:
    """Write an image, unless an image with the same bytes was written before. Return its path."""
    suffix = next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), "")
    path = target / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
    if not path.exists() or path.stat().st_size != len(content):
        path.write_bytes(content)
    return path


def plain(value: Any) -> Any:
    """Return a text, a number or a list of texts or objects. Return None for values that no example has, such as vectors."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, list) and value and len(value) <= MOST_ITEMS:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, dict) for item in value):
            return [{key: each for key, each in item.items() if isinstance(each, str | int)} for item in value]
    return None


def limit(size: int) -> None:
    """Limit the memory, the files and the processor time of this process, on systems that can."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    limits = {
        "RLIMIT_DATA": memory() + SPARE + min(4 * size, 2**34),
        "RLIMIT_FSIZE": LARGEST_IMAGE,
        "RLIMIT_CPU": 120 + size // 2**20,
    }
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def memory() -> int:
    """Return the bytes of data that this process uses now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))
    except (OSError, StopIteration):
        return 2**36  # not Linux, which does not enforce this limit either


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except MemoryError:
        sys.exit("it needs more memory than its size explains")
    except Exception as error:
        sys.exit((str(error).splitlines() or [type(error).__name__])[0][:300])
