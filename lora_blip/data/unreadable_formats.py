"""Formats that are not read as images, and what a user can do with such a file."""

from pathlib import Path

from lora_blip.runtime.system_errors import quoted_for_shell

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

XML = "an XML file, such as those of CVAT and Pascal VOC, which is not read; write its images and texts as CSV or JSON"
SOURCES = {  # suffixes of files with annotations → what the file is, and the fix
    (".xml",): XML,
    (".yaml", ".yml"): 'a YAML file, which is not read; convert it: python -c "import json, sys, yaml; '
    "json.dump(yaml.safe_load(open(sys.argv[1])), open(sys.argv[2], 'w'))\" {path} {json}",
    (".ods", ".numbers", ".xlsb"): "a spreadsheet of a format that is not read; save it as .xlsx or CSV",
    (".docx", ".odt", ".rtf"): "a text document; write the images and texts to a table, and save it as CSV",
    (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz"): "an archive; unpack it, and give the file or folder in it",
    (".db", ".sqlite", ".sqlite3"): "a database; export its table as CSV",
    (".pkl", ".pt", ".npy", ".npz"): "a file of Python objects, which is not read; save it as CSV or JSON",
}


def described_source(path: Path, head: bytes) -> str:
    """Return what a file of annotations is by its suffix, with the fix, or "" if the suffix is not listed or it contains JSON.

    head: the first bytes.
    """
    if head.lstrip()[:1] in (b"{", b"["):
        return ""
    text = next((text for suffixes, text in SOURCES.items() if path.suffix.lower() in suffixes), "")
    for name, value in (("{path}", path), ("{json}", path.with_suffix(".json"))):
        text = text.replace(name, quoted_for_shell(str(value)))
    return text


def described(path: str | Path) -> str:
    """Return what a file is by its suffix, with the fix, or "" if the suffix is not listed."""
    name = Path(path).name
    suffix = Path(path).suffix.lower()
    text = next((text for suffixes, text in NAMED.items() if suffix in suffixes), "")
    return text.replace("{name}", name).replace("{stem}", Path(path).stem)
