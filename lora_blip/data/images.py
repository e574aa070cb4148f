"""Image files → upright RGB pictures, and gentle augmentation."""

import logging
import random
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_blip.errors import ImageError
from lora_blip.runtime.untrusted import UnreadableError, cut, open_regular, printable, why

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")  # of Pillow's fifty; others run programs
SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
}  # fmt: skip
HEIC = {".heic", ".heics", ".heif", ".heifs", ".hif"}
RAW = {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"}  # of cameras
OTHERS = {".emf", ".eps", ".ico", ".jxl", ".pcx", ".pgm", ".ppm", ".psd", ".svg", ".tga", ".wmf"}
PICTURES = SUFFIXES | HEIC | RAW | OTHERS  # files that a user takes for images: one that is not read is reported
NO_PICTURES = {
    ".7z", ".bin", ".caption", ".cls", ".csv", ".db", ".gz", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".mov", ".mp4",
    ".npy", ".npz", ".parquet", ".pdf", ".pt", ".py", ".safetensors", ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip
HEAD = 64  # bytes from which the kind of a file is known
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000", b"\xff\x4f\xff\x51": "JPEG2000",
}  # fmt: skip
BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), "HEIF"),
}  # of ISO base media files
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes
LARGEST = 2**27  # pixels: 134 million, 400 MB in RGB; a telephone's picture has up to 108 million
LARGEST_FILE = 2**28  # bytes: what is no picture in a GIF is passed over one by one, at 70 ns
MOST_SCANS = 100  # of a progressive JPEG, each of which costs a pass over all pixels; encoders write about ten
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
SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)  # a mirrored picture would make such a caption false
SHIFT, ZOOM, BRIGHTNESS = 0.05, 0.1, 0.15  # shares of the side, of the scale, of the grey level
LEVELS = np.arange(256)

# what is wrong with a picture either makes it unreadable, and is an ImageError, or is not worth a line of the terminal
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_image(path: str | Path, content: BinaryIO | None = None) -> Image.Image:
    """The picture in RGB, turned upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Of several frames it is the first. `content`: the image, where `path` only names it. Raises ImageError when the file
    is missing, is no image of FORMATS, is damaged, or is too large to be one. A HEIC image needs pillow-heif.
    """
    kind = ""
    try:
        with content or open_regular(path, LARGEST_FILE) as file:
            kind = kind_of(file.read(HEAD))
            file.seek(0)
            _refuse_raw(path, kind)
            with Image.open(file, formats=_formats(kind)) as image:
                _refuse_bomb(image, file)
                image.load()
                return to_rgb(upright(image))
    except FileNotFoundError:
        raise ImageError(printable(f"{path} does not exist")) from None
    except UnidentifiedImageError:
        raise ImageError(printable(f"{path} is {_unknown(path, kind)}")) from None
    except UnreadableError as error:
        raise ImageError(printable(f"{path} is no image: {error}")) from None
    except Image.DecompressionBombError:  # Pillow's own end lies beyond LARGEST
        raise ImageError(printable(f"{path} is no image: it has more than {LARGEST:,} pixels; make it smaller")) from None
    except OSError as error:
        raise ImageError(printable(f"{path} cannot be decoded ({cut(why(error))})")) from None
    except Exception as error:  # decoders raise whatever they stumble over: struct.error, KeyError, MemoryError …
        told = ": ".join(filter(None, (type(error).__name__, cut(str(error)))))
        raise ImageError(printable(f"{path} cannot be decoded ({told})")) from None


def kind_of(head: bytes) -> str:
    """Return the kind of image whose file begins with `head`, HEAD bytes or all there are: of FORMATS, HEIF or "" for none."""
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
    """Whether a file is an image, or one that a user takes for an image: by its suffix, or else by its first bytes.

    Hidden files are none. `head` is called only if the suffix does not decide.
    """
    dot = name.rfind(".")
    suffix = name[dot:].lower() if dot > 0 else ""
    if name.startswith(".") or suffix in NO_PICTURES:
        return False
    if suffix in PICTURES:
        return True
    return kind_of(head()) not in (("", "TIFF") if suffix else ("",))  # TIFF's signature begins many other formats


@lru_cache
def _formats(kind: str) -> tuple[str, ...]:
    """The formats that Pillow may try. HEIF is among them if the content is one and pillow-heif is installed."""
    Image.init()
    there = tuple(name for name in FORMATS if name in Image.OPEN)
    return (*there, "HEIF") if kind == "HEIF" and _heif_reader() else there


def _heif_reader() -> bool:
    """Register pillow-heif; False if it is not installed."""
    try:
        pillow_heif: Any = import_module("pillow_heif")
    except (ImportError, OSError):  # OSError: a library of its own is missing
        return False
    pillow_heif.register_heif_opener()
    return True


def _refuse_raw(path: str | Path, kind: str) -> None:
    """Pillow would read the thumbnail of such a file without saying so."""
    if kind == "TIFF" and Path(path).suffix.lower() in RAW:
        raise UnreadableError("it is a raw file of a camera; export it as JPEG or PNG")


def _unknown(path: str | Path, kind: str) -> str:
    """What a file is that Pillow does not know, and what to do."""
    suffix = Path(path).suffix.lower()
    if kind == "HEIF" or (suffix in HEIC and not _heif_reader()):
        return "a HEIC image, which needs another package: pip install pillow-heif (or save it as JPEG)"
    if kind in FORMATS and kind not in _formats(kind):
        return f"a {kind} image, which Pillow {PIL.__version__} cannot read: pip install --upgrade pillow"
    return f"no image of a kind that is read here ({', '.join(FORMATS)}); save it as JPEG or PNG"


def _refuse_bomb(image: Image.Image, file: BinaryIO) -> None:
    """A small file may claim a picture that fills the memory, or hours of passes over it."""
    pixels = image.width * image.height
    if not 0 < pixels <= LARGEST:
        told = f"it has {image.width} × {image.height} pixels"
        raise UnreadableError(f"{told}, more than {LARGEST:,}; make it smaller" if pixels else told)
    if "progressive" in image.info:
        place = file.tell()
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # a marker, which pixels never look like: their 0xff is followed by 0
        file.seek(place)
        if scans > MOST_SCANS:
            raise UnreadableError(f"a progressive JPEG of {scans:,} scans, more than {MOST_SCANS}; save it again")


def upright(image: Image.Image) -> Image.Image:
    """Turned as the camera was held. Tags that cannot be read turn nothing: so do viewers show such a picture."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of whatever kind a broken tag makes it
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow → RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), copy=False)
        values *= 255.0 / (65535.0 if values.max(initial=0) > 255 else 255.0)
        image = Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def names_side(text: str) -> bool:
    """Whether a text says left or right."""
    if text.isascii() and "left" not in (lower := text.lower()) and "right" not in lower:
        return False  # a tenth of the time of the search
    return SIDED.search(text) is not None


def augment(image: Image.Image, text: str, rng: random.Random, side: int = 384) -> Image.Image:
    """Shift, scale and brightness a little; mirror half of the time, never when the text says left or right.

    side: pixels of the model's input, to which the picture is shrunk afterwards.
    """
    if rng.random() < 0.5 and not names_side(text):
        image = ImageOps.mirror(image)
    if min(image.size) > 2 * side:  # a camera's picture: what the model will not see need not be moved about
        scale = 2 * side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    width, height = image.size
    margin = (round(width * (SHIFT + ZOOM)), round(height * (SHIFT + ZOOM)))
    pixels = np.asarray(image)
    padded = Image.fromarray(np.pad(pixels, ((margin[1],) * 2, (margin[0],) * 2, (0, 0)), mode="edge"))
    zoom = 1 + rng.uniform(-ZOOM, ZOOM)
    left = margin[0] + width * (rng.uniform(-SHIFT, SHIFT) + (1 - zoom) / 2)
    top = margin[1] + height * (rng.uniform(-SHIFT, SHIFT) + (1 - zoom) / 2)
    box = (max(0.0, left), max(0.0, top), min(padded.width, left + width * zoom), min(padded.height, top + height * zoom))
    moved = padded.resize(image.size, Image.Resampling.BILINEAR, box=box)
    light = 1 + rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    table = np.rint(LEVELS * light).clip(max=255).astype(int).tolist()
    return moved.point(table * 3)
