"""Recognize the annotations of a training again: an adapter file contains their path, and a digest of their content."""

import hashlib

from lora_blip.runtime.user_paths import paths_of

END = 2**20  # bytes at the start and at the end of a file that are read, because tables may have many gigabytes


def source_digest(source: str) -> str:
    """Return a digest of the files of ANNOTATIONS, 16 hex digits, or "" if one is no file, for example a folder.

    It covers the size of each file, and its first and last MiB.
    """
    digest = hashlib.sha256()
    try:
        for path in paths_of(source):
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
