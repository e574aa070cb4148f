"""Formats that are not read as images, and what a user can do with such a file."""

from pathlib import Path

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
RAW = {  # raw files of cameras
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw",
}  # fmt: skip
PROJECTS = {".ai", ".clip", ".kra", ".psd", ".xcf"}
DRAWINGS = {".emf", ".eps", ".svg", ".svgz", ".wmf"}
RAW_ADVICE = "it is a raw file of a camera; export it as JPEG or PNG"
NAMED = {  # suffixes → what the file is, and the fix
    frozenset(VIDEOS): 'a video; save some of its frames as images: ffmpeg -i "{name}" -vf fps=1 "{stem}_%05d.jpg"',
    frozenset(RAW): "not a usable image: " + RAW_ADVICE,
    frozenset(PROJECTS): "a file of an image editor; export it as PNG",
    frozenset(DRAWINGS): "a vector drawing, which has no pixels; export it as PNG",
    frozenset((".pdf",)): 'a PDF document; save its pages as images: pdftoppm -png "{name}" "{stem}"',
    frozenset((".jxl",)): 'a JPEG XL image; convert it: djxl "{name}" "{stem}.png"',
}


def described(path: str | Path) -> str:
    """Return what a file is by its suffix, with the fix, or "" if the suffix is not listed."""
    name = Path(path).name
    suffix = Path(path).suffix.lower()
    text = next((text for suffixes, text in NAMED.items() if suffix in suffixes), "")
    return text.replace("{name}", name).replace("{stem}", Path(path).stem)
