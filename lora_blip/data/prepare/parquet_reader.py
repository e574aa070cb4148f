"""Read a Parquet or Arrow file. `packed` runs this script in a child process, so that a crash of C++ code gives a message.

`python parquet_reader.py FOLDER FILE IMAGE_COLUMN` writes each image of FILE once to FOLDER, named by the hash of its bytes.
It prints a JSON line for each row: {"row": 1, "entry": {…}} or {"row": 1, "reason": "…"}. It limits its memory, file size and
processor time.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.columns import flag_of, flags, near_column
from lora_blip.data.entries import IMAGE_KEYS, plain_name
from lora_blip.data.several_files import chosen
from lora_blip.runtime.counts import counted

IMAGE_COLUMNS = ("image", "images", "img", "jpg", "png", "webp", *IMAGE_KEYS)
LARGEST_IMAGE = 2**28  # largest number of bytes of an image
LONGEST = 2**20  # largest number of characters of a text
SHOWN = 8  # largest number of columns in a message
MOST_ITEMS = 1000  # largest number of items of a list, such as the captions of an image
URL_COLUMNS = ("url", "image_url", "img_url", "link")
CAPTION_NAMES = ("caption", "text", "captions", "alt_text", "title")
ADDRESSES = "ADDRESSES"  # starts the message, before the names of two columns as JSON, if the images are web addresses
COLUMNS = "COLUMNS"  # starts a message about unknown columns, which is not cut
LONGEST_MESSAGE = 3000  # characters
UNWRITABLE = "UNWRITABLE"  # starts the message, before an errno, if an image cannot be written
SPARE_MEMORY = 2**32  # bytes that reading a small file may need
SIGNATURES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp", b"II*\0": ".tif"}


def main(target: Path, path: Path, image_column: str) -> None:
    """Print a line for each row of the file, and write its images. Raise ValueError if the image column is unknown."""
    import pyarrow as pa

    limit(path.stat().st_size)
    schema, batches = open_table(path)
    plain = {plain_name(name): name for name in reversed(schema.names)} | {name: name for name in schema.names}
    image_column = chosen({"image": image_column}, schema.names).get("image", "")
    image = image_column or next((plain[name] for name in IMAGE_COLUMNS if name in plain), "")
    image = image or only_one([field.name for field in schema if is_binary(field.type)])
    image = image or next((field.name for field in schema if pa.types.is_struct(field.type)), "")
    image = image or next((name for name in schema.names if name.lower() in URL_COLUMNS), "")
    if image not in schema.names:
        raise ValueError(unknown_column(image_column, schema, batches))
    columns = [field.name for field in schema if field.name == image or not is_binary(field.type)]
    row = 0
    for batch in batches(columns):
        for values in batch.select([name for name in columns if name in batch.schema.names]).to_pylist():
            row += 1
            if isinstance(values[image], str) and values[image].lower().startswith(("http://", "https://")):
                caption = next((name for name in columns if name.lower() in CAPTION_NAMES), "caption")
                raise ValueError(f"{ADDRESSES} {json.dumps([image, caption])}")
            print(json.dumps({"row": row} | entry_of(values, image, target), default=str))


def unknown_column(named: str, schema: Any, batches: Any) -> str:
    """Return the message for a file whose image column is unknown. named: the name that the user gives, or ""."""
    columns = [field.name for field in schema if not is_binary(field.type)]
    images = [field.name for field in schema if is_binary(field.type)]
    problem = f"no column has the name {named!r}" if named else "no column has a known name for the image"
    near = near_column("image", named, schema.names) if named else ""
    fix = f"did you mean {flag_of('image', near)}?" if near else ""
    if not fix and len(images) == 1:
        fix = f"name the column: {flag_of('image', images[0])}"
    rows: list[dict[str, Any]] = [] if fix else next((batch.to_pylist() for batch in batches(columns)), [])
    if rows:
        below = [[str(row[name]) for name in columns] for row in rows]
        fix = f"name the columns: {flags(columns, [plain_name(name) for name in columns], below)}"
    listed = ", ".join(schema.names[:SHOWN]) + ", …" * (len(schema.names) > SHOWN)
    return f"{COLUMNS} {problem}; the columns are {listed}; {fix or 'name it: --image-key COLUMN'}"


def only_one(columns: list[str]) -> str:
    """Return the only column, or "" if there is none. Raise ValueError if there are several, because any may be the image."""
    if len(columns) > 1:
        names = ", ".join(columns[:SHOWN])
        raise ValueError(f"{COLUMNS} the columns {names} contain bytes; name that of the image: {flag_of('image', columns[0])}")
    return next(iter(columns), "")


def open_table(path: Path) -> tuple[Any, Any]:
    """Return the schema, and a function that takes column names and yields batches of rows."""
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
        return reader.schema, lambda _: slices(reader.get_batch(index) for index in range(reader.num_record_batches))
    return stream.schema, lambda _: slices(stream)


def slices(batches: Any) -> Iterator[Any]:
    """Yield the batches in parts of 64 rows, because the rows need more memory as Python objects than in Arrow."""
    for batch in batches:
        for start in range(0, batch.num_rows, 64):
            yield batch.slice(start, 64)


def is_binary(column_type: Any) -> bool:
    """Return True for the type of a column that contains bytes, as images do."""
    import pyarrow as pa

    is_bytes = pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type)
    return is_bytes or "bytes" in [field.name for field in fields_of(column_type)]


def fields_of(column_type: Any) -> list[Any]:
    """Return the fields of a struct type, or [] for another type."""
    import pyarrow as pa

    return [column_type.field(index) for index in range(column_type.num_fields)] if pa.types.is_struct(column_type) else []


def entry_of(values: dict[str, Any], image: str, target: Path) -> dict[str, Any]:
    """Return {"entry": …} with the path of the image, or {"reason": …} if the row has no usable image or text.

    values: {column: value} of a row. image: the name of the image column. The image is written to `target`.
    """
    value = values.pop(image)
    if isinstance(value, list):
        if len(value) != 1:
            return {"left_out": f"it has {len(value)} images; an example has one"}
        value = value[0]
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(content, str):
        content, name = None, content
    if content is None and not isinstance(name, str):
        return {"reason": f"the column {image!r} has no image in this row"}
    if content is not None and not isinstance(content, bytes):
        return {"reason": f"the column {image!r} has a {type(content).__name__}; expected the bytes or the path of an image"}
    if content is not None and not 0 < len(content) <= LARGEST_IMAGE:
        return {"reason": f"its image has {counted(len(content), 'byte')}; expected 1 to {LARGEST_IMAGE:,}"}
    entry = {key: simple for key, value in values.items() if (simple := simple_value(value)) is not None}
    if any(isinstance(value, str) and len(value) > LONGEST for value in entry.values()):
        return {"reason": f"it has a text of more than {LONGEST:,} characters"}
    return {"entry": entry | {"image": str(write_image(content, target)) if content is not None else name}}


def write_image(content: bytes, target: Path) -> Path:
    """Write an image to the folder `target`, unless the same image is already there. Return its path."""
    suffix = next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), "")
    path = target / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
    if not path.exists() or path.stat().st_size != len(content):
        try:
            path.write_bytes(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            sys.exit(f"{UNWRITABLE} {error.errno}")
    return path


def simple_value(value: Any) -> Any:
    """Return a text, a number, or a list of texts or objects. Return None for other values, such as vectors."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, list) and value and len(value) <= MOST_ITEMS:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, dict) for item in value):
            return [_simple_object(item) for item in value]
    return None


def _simple_object(item: dict[str, Any]) -> dict[str, Any]:
    """Return the texts and whole numbers of an object, and its lists, such as the parts of a turn of a chat."""
    simple = {key: simple_value(each) if isinstance(each, list) else each for key, each in item.items()}
    return {key: each for key, each in simple.items() if isinstance(each, str | int | list)}


def limit(size: int) -> None:
    """Limit the memory, the file size and the processor time of this process, if the system supports it.

    size: the number of bytes of the file to read.
    """
    try:
        import resource  # not on Windows
    except ImportError:
        return
    limits = {
        "RLIMIT_DATA": used_memory() + SPARE_MEMORY + min(4 * size, 2**34),
        "RLIMIT_FSIZE": LARGEST_IMAGE,
        "RLIMIT_CPU": 120 + size // 2**20,
    }
    for name, largest in limits.items():
        resource_id = getattr(resource, name, None)
        if resource_id is not None:
            _, hard = resource.getrlimit(resource_id)
            resource.setrlimit(resource_id, (largest if hard == resource.RLIM_INFINITY else min(largest, hard), hard))


def used_memory() -> int:
    """Return the number of bytes of data memory that this process uses."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))
    except (OSError, StopIteration):
        return 2**36  # this system is not Linux, and does not enforce the limit


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except MemoryError:
        sys.exit("it needs more memory than a valid file of its size")
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        sys.exit((" ".join(lines) if lines[0].startswith(COLUMNS) else lines[0])[:LONGEST_MESSAGE])
