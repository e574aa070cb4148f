"""Recognize the annotations of a training again: an adapter file contains their path, and a digest of their content."""

import hashlib
from pathlib import Path

END = 2**20  # bytes at the start and at the end of a file that are read, because tables may have many gigabytes


def source_digest(source: str) -> str:
    """Return a digest of the files of ANNOTATIONS, 16 hex digits, or "" if one is no file, for example a folder.

    It covers the size of each file, and its first and last MiB.
    """
    paths = [Path(source)] if Path(source).exists() else [Path(part.strip()) for part in source.split(",") if part.strip()]
    digest = hashlib.sha256()
    try:
        for path in paths:
            if not path.is_file():
                return ""
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{size},".encode() + file.read(END))
                file.seek(max(END, size - END))
                digest.update(file.read())
    except OSError:
        return ""
    return digest.hexdigest()[:16]
