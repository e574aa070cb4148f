"""Decode image files into upright RGB images, and augment them."""

import logging
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import PIL
from PIL import Image, ImageCms, UnidentifiedImageError

from lora_blip.data.deep_images import DarkImages, FirstDarkImage, highest_value, is_deep, to_grey
from lora_blip.data.unreadable_formats import RAW, RAW_ADVICE, described
from lora_blip.errors import ImageError
from lora_blip.runtime.system_errors import missing_file, reason_and_fix
from lora_blip.runtime.untrusted import UnreadableError, open_regular, os_error_reason, printable, shorten

# the formats that Pillow may read; some of its other formats start a program
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "AVIF",
    "JPEG2000",
)
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
}  # fmt: skip
HEIC = {".heic", ".heics", ".heif", ".heifs", ".hif"}
OTHER_SUFFIXES = {".emf", ".eps", ".ico", ".jxl", ".pcx", ".pgm", ".ppm", ".psd", ".svg", ".tga", ".wmf"}
PICTURES = SUFFIXES | HEIC | RAW | OTHER_SUFFIXES  # files that a user calls images; each that cannot be read is reported
NO_PICTURES = {  # common files next to images; they are not opened
    ".7z", ".bin", ".caption", ".cls", ".csv", ".db", ".gz", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".mov", ".mp4",
    ".npy", ".npz", ".parquet", ".pdf", ".pt", ".py", ".safetensors", ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip
HEAD = 64  # number of bytes at the start of a file that identify its format
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000", b"\xff\x4f\xff\x51": "JPEG2000",
}  # fmt: skip
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), "HEIF"),
}  # brands in the header of an ISO base media file, and their formats
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes
LARGEST = 2**27  # largest number of pixels: 134 million, 400 MB in RGB; phones take photos of up to 108 million
LARGEST_FILE = 2**28  # largest number of bytes; without a limit, junk in a GIF takes Pillow 70 ns for each byte
MOST_SCANS = 100  # largest number of scans of a progressive JPEG; each is a pass over all pixels. Encoders write about ten
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_DARK = FirstDarkImage()  # one warning per process
PNG_START = 8  # bytes of a PNG's signature
PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}  # chunks that do not change a pixel, and may be large

# hide Pillow's warnings: we raise ImageError for each fault that matters. The filters of the user come first
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)
warnings.filterwarnings("ignore", category=ResourceWarning, module=r"PIL\.")  # Pillow leaves files of TIFF open
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_image(path: str | Path, content: BinaryIO | None = None, dark: DarkImages = FIRST_DARK) -> Image.Image:
    """Return an image in RGB with 8 bits. Rotate it by its EXIF tag, and put transparent pixels on white.

    Return the first frame of an animation. content: an open file to read; `path` is then only its name in messages.
    dark: collects the names of images with more than 8 bits that are nearly black. By default, the first gives a warning.
    Raise ImageError if the file is missing, damaged, too large, or not in one of FORMATS. A HEIC image needs pillow-heif.
    """
    kind = ""
    try:
        with content or open_regular(path, LARGEST_FILE) as file:
            head = file.read(HEAD)
            if not head:
                raise UnreadableError("it is empty")
            kind = kind_of(head)
            file.seek(0)
            _refuse_raw(path, kind)
            try:
                return _decode(file, kind, path, dark)
            except ValueError:
                if kind != "PNG":
                    raise
                file.seek(0)  # Pillow refuses a PNG with more than a megabyte of metadata
                return _decode(_without_texts(file.read()), kind, path, dark)
    except FileNotFoundError:
        raise ImageError(printable(missing_file(path))) from None
    except UnidentifiedImageError:
        raise ImageError(printable(f"{path} is {_unknown(path, kind)}")) from None
    except UnreadableError as error:
        raise ImageError(printable(f"{path} is not a usable image: {error}")) from None
    except Image.DecompressionBombError:  # Pillow's own limit is above LARGEST
        raise ImageError(
            printable(f"{path} is not a usable image: it has more than {LARGEST:,} pixels; make it smaller")
        ) from None
    except OSError as error:
        if reason := reason_and_fix(error, path):
            raise ImageError(printable(f"{path} cannot be read: {reason}")) from None
        raise ImageError(printable(f"{path} cannot be decoded ({shorten(os_error_reason(error))})")) from None
    except Exception as error:  # decoders raise any error on damaged files: struct.error, KeyError, MemoryError …
        reason = ": ".join(filter(None, (type(error).__name__, shorten(str(error)))))
        raise ImageError(printable(f"{path} cannot be decoded ({reason})")) from None


def _decode(file: BinaryIO, kind: str, path: str | Path, dark: DarkImages) -> Image.Image:
    """Return the image of an open file as `open_image` does. kind: the format by the first bytes, or ""."""
    with Image.open(file, formats=_formats(kind)) as image:
        _refuse_bomb(image, file)
        image.load()
        highest = highest_value(image)  # before `upright`, which drops the tags of a TIFF
        return to_rgb(upright(image), highest, lambda: dark.add(printable(str(path))))


def _without_texts(png: bytes) -> BinaryIO:
    """Return a PNG file without its chunks of texts and color profiles."""
    kept, position = [png[:PNG_START]], PNG_START
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4])  # length, type, content, checksum
        if png[position + 4 : position + 8] not in PNG_TEXTS:
            kept.append(png[position:end])
        position = end
    return BytesIO(b"".join(kept))


def kind_of(head: bytes) -> str:
    """Return the format of a file from its first HEAD bytes: one of FORMATS, "HEIF", or "" if it is not an image."""
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if head[4:8] != b"ftyp":
        return ""
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4]), len(head)), 4))]
    kinds = [BRANDS[brand] for brand in brands if brand in BRANDS]
    return "AVIF" if "AVIF" in kinds else "HEIF" if "HEIF" in kinds else ""


def is_picture(name: str, head: Callable[[], bytes]) -> bool:
    """Return True if a file is an image, or has the suffix of an image format that cannot be read, such as .cr2.

    If the suffix is neither in PICTURES nor in NO_PICTURES, the first bytes decide. `head` returns them, and is called only
    in this case. A hidden file is not an image.
    """
    dot = name.rfind(".")
    suffix = name[dot:].lower() if dot > 0 else ""
    if name.startswith(".") or suffix in NO_PICTURES:
        return False
    if suffix in PICTURES:
        return True
    return kind_of(head()) not in (("", "TIFF") if suffix else ("",))  # many other formats have TIFF's signature


@lru_cache
def _formats(kind: str) -> tuple[str, ...]:
    """Return the formats that Pillow may try: FORMATS, and HEIF if the content is HEIF and pillow-heif is installed."""
    Image.init()
    formats = tuple(name for name in FORMATS if name in Image.OPEN)
    return (*formats, "HEIF") if kind == "HEIF" and _heif_reader() else formats


def _heif_reader() -> bool:
    """Register pillow-heif. Return False if it is not installed."""
    try:
        pillow_heif: Any = import_module("pillow_heif")
    except (ImportError, OSError):  # OSError: its C library is missing
        return False
    pillow_heif.register_heif_opener()
    return True


def _refuse_raw(path: str | Path, kind: str) -> None:
    """Raise UnreadableError for a raw file of a camera. Pillow would return its thumbnail without a warning."""
    if kind == "TIFF" and Path(path).suffix.lower() in RAW:
        raise UnreadableError(RAW_ADVICE)


def _unknown(path: str | Path, kind: str) -> str:
    """Return the end of the message about a file that Pillow cannot identify: its kind, and the fix."""
    suffix = Path(path).suffix.lower()
    if kind == "HEIF" or (suffix in HEIC and not _heif_reader()):
        return 'a HEIC image, which needs another package: pip install "lora_blip[heic]" (or save it as JPEG)'
    if kind in FORMATS and kind not in _formats(kind):
        return f"a {kind} image, which Pillow {PIL.__version__} cannot read: pip install --upgrade pillow"
    if kind not in FORMATS and (description := described(path)):
        return description
    return f"not a usable image: it has no supported format ({', '.join(FORMATS)}); save it as JPEG or PNG"


def _refuse_bomb(image: Image.Image, file: BinaryIO) -> None:
    """Raise UnreadableError for an image with too many pixels or scans, which could fill the memory or take hours."""
    pixels = image.width * image.height
    if not 0 < pixels <= LARGEST:
        reason = f"it has {image.width} × {image.height} pixels"
        raise UnreadableError(f"{reason}, more than {LARGEST:,}; make it smaller" if pixels else reason)
    if "progressive" in image.info:
        position = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # the marker of a scan; in pixel data, 0xff is followed by 0
        file.seek(position)
        if scans > MOST_SCANS:
            reason = f"it is a progressive JPEG with {scans:,} scans, more than {MOST_SCANS}"
            raise UnreadableError(f"{reason}; save it as a baseline JPEG")


def upright(image: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF tag. Ignore an unreadable tag, as image viewers do."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken tag can raise any error
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, highest: float | None = None, on_dark: Callable[[], object] | None = None) -> Image.Image:
    """Convert an image of any mode to RGB, with transparent pixels on white.

    An image with more than 8 bits is scaled by its full range. highest: the value that becomes white; None: `highest_value`.
    on_dark: called if such an image is nearly black. None: the first one gives a warning.
    """
    if is_deep(image):
        highest = highest_value(image) if highest is None else highest
        image = to_grey(image, highest, on_dark or (lambda: FIRST_DARK.add("an image without a name")))
    if image.mode == "LAB":  # its A is a color; Pillow converts it only by a color profile
        profile = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profile, outputMode="RGB") or image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
