"""Image files → upright RGB pictures, and gentle augmentation."""

import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)  # a mirrored picture would make such a caption false
SHIFT, ZOOM, BRIGHTNESS = 0.05, 0.1, 0.15  # shares of the side, of the scale, of the grey level


class ImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def open_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned upright by its EXIF tag, transparency laid on white, 16 bits scaled to 8.

    Raises ImageError when the file is missing, is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is no image that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be decoded ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow → RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        deepest = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values * (255.0 / deepest)).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def augment(image: Image.Image, text: str, rng: random.Random, side: int = 384) -> Image.Image:
    """Shift, scale and brightness a little; mirror half of the time, never when the text says left or right.

    side: pixels of the model's input, to which the picture is shrunk afterwards.
    """
    if rng.random() < 0.5 and not SIDED.search(text):
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
    return moved.point([min(255, round(level * light)) for level in range(256)] * 3)


def find_images(where: str | Path) -> list[Path]:
    """The image files of a file, a folder (with its subfolders) or a glob, sorted. ImageError if there are none."""
    path = Path(where)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES]
    else:
        root = Path(path.anchor) if path.is_absolute() else Path()
        try:
            found = [p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file()]
        except ValueError as error:
            raise ImageError(
                f"{str(where)!r} is no glob ({error}); give a file, a folder or one such as 'photos/*.jpg'"
            ) from None
    if not found:
        raise ImageError(f"no image found at {str(where)!r}; give a file, a folder or a glob such as 'photos/*.jpg'")
    return sorted(found)
