"""Check and open the images that Python callers pass: paths, PIL images, arrays, tensors, bytes or open files."""

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_blip.data.images import LARGEST, LARGEST_FILE, open_image, to_rgb, upright
from lora_blip.errors import ImageError, InputError
from lora_blip.runtime.untrusted import LONGEST_QUOTE, UnreadableError, is_too_long, printable, shorten
from lora_blip.runtime.user_paths import local_path


class BinaryFile(Protocol):
    """A file that is open for reading bytes: `open(path, "rb")`, `io.BytesIO`, `tempfile`, or an upload of a web framework."""

    def read(self, size: int = ..., /) -> bytes: ...


ImageInput: TypeAlias = "str | Path | bytes | bytearray | memoryview | BinaryFile | Image.Image | np.ndarray[Any, Any] | Tensor"

BASE64 = ("/9j/", "_9j_", "iVBO", "R0lG", "UklG")  # the first letters of a JPEG, PNG, GIF and WebP file in base64
ACCEPTED = (
    "a path, a PIL image, an array (height, width) or (height, width, 1, 3 or 4), a tensor (height, width) or (1, 3 or 4, "
    "height, width), the bytes of a file, or a file that is open for reading bytes"
)
SINGLE = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray, Tensor)
CHANNELS = (1, 3, 4)
ROUNDING = 0.5 / 255  # a float value this far outside 0 to 1 is a rounding error
OVERSHOOT = 0.25  # how far outside 0 to 1 a resize or a filter moves values; normalized values are farther away
BY_LARGEST = "divide it by its largest possible value: image / 4095 for 12 bits per value, image / 65535 for 16 bits"
PIL_LOCK = threading.Lock()  # Pillow reads the file of an image at its first use, and threads may share the image


def as_list(images: Any) -> tuple[list[tuple[str, Any]], bool]:
    """Return [(name, image)], and True if `images` is one image and not a list. Raise InputError as `check_input` does."""
    single = is_single(images)
    is_iterator = not single and not isinstance(images, list | tuple)
    listed = []
    for position, image in enumerate([images] if single else images):
        name = name_of(image, None if single else position)
        listed.append((check_input(image, name), snapshot(image, name) if is_iterator else read_once(image, name)))
    return listed, single


def is_single(images: Any) -> bool:
    """Return True for anything but a list or another iterable of images."""
    no_list = isinstance(images, Mapping | Set) or is_file(images)  # iterable, but not lists of images
    return no_list or isinstance(images, SINGLE) or not isinstance(images, Iterable)


def each_of(images: Any) -> Iterable[Any]:
    """Return the images of an iterable, or a list of the one image. An array of four dimensions is an iterable of images."""
    return [images] if is_single(images) and getattr(images, "ndim", 0) != 4 else images


def is_file(image: Any) -> bool:
    """Return True for an open file, which has a method `read`."""
    return not isinstance(image, SINGLE) and callable(getattr(image, "read", None))


def read_once(image: Any, name: str) -> Any:
    """Return the bytes of an open file from its start, or the ImageError if it cannot be read; return another image as it is.

    A file is read here, in the thread of the caller and once: the caller may close it after the call, and several questions
    may be about it. At most LARGEST_FILE bytes are kept. Raise InputError if the file gives no bytes.
    """
    if not is_file(image):
        return image
    try:
        with suppress(AttributeError, OSError):  # a stream such as that of a network cannot seek
            _close_coroutine(image.seek(0))
        content = bytearray()
        while len(content) <= LARGEST_FILE and (part := image.read(LARGEST_FILE + 1 - len(content))):
            if not isinstance(part, bytes | bytearray | memoryview):
                raise _not_bytes(part, name)
            content += part
    except UnicodeDecodeError:
        raise _not_bytes("", name) from None
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        return ImageError(printable(f"{name} cannot be read from its file ({shorten(str(error))}); open it again"))
    if len(content) > LARGEST_FILE:
        return ImageError(f"{name} is a file of more than {LARGEST_FILE:,} bytes; make the image smaller")
    return bytes(content)


def _close_coroutine(result: Any) -> None:
    """Close a coroutine that is not awaited. Otherwise Python prints a warning."""
    if inspect.iscoroutine(result):
        result.close()


def _not_bytes(part: Any, name: str) -> InputError:
    """Return the error for a file that is open for text, or that must be awaited."""
    if inspect.isawaitable(part):
        _close_coroutine(part)
        return InputError(f"{name} is a file whose read() must be awaited; give its bytes: await file.read()")
    return InputError(f'{name} is a file whose read() returns {type(part).__name__}; open it for bytes: open(path, "rb")')


def snapshot(image: Any, name: str) -> Any:
    """Return a copy of an image of an iterator, because the iterator may change the image in place for its next item.

    A video reader may write each frame into the same array, and the frames of an animation are one PIL image. An open file is
    read, as by `read_once`.
    """
    if isinstance(image, np.ndarray | bytearray | memoryview):
        return bytes(image) if isinstance(image, memoryview) else image.copy()
    if isinstance(image, Tensor):
        return image.detach().clone()
    if is_file(image):
        return read_once(image, name)
    try:
        return image.copy() if isinstance(image, Image.Image) and getattr(image, "is_animated", False) else image
    except Exception:  # a decoder can raise any error; `decode` reports it for this image
        return image


def name_of(image: Any, position: int | None) -> str:
    """Return the path of an image, or its position in the list: "images[2]". Shorten a text that is too long for a path."""
    if isinstance(image, str | Path):
        return shorten(str(image)) if is_too_long(str(image)) else str(image)
    return "the image" if position is None else f"images[{position}]"


def check_input(image: Any, name: str) -> str:
    """Return `name`. Raise InputError with a fix if the type, shape, dtype or range of the image is not accepted."""
    if is_file(image):
        return name
    if not isinstance(image, SINGLE):
        fix = "; give its image, or a list of its images: list(images.values())" if isinstance(image, Mapping) else ""
        fix = '; give its image, image["image"]; of a list of rows: [row["image"] for row in images]' if is_row(image) else fix
        fix = "; give one list of images, without lists inside" if isinstance(image, list | tuple) else fix
        raise InputError(f"{name} is of type {type(image).__name__}; expected {ACCEPTED}{fix}")
    if isinstance(image, np.ndarray | Tensor):
        _check_shape(image, name)
        _check_values(image, name)
    return name


def is_row(image: Any) -> bool:
    """Return True for a row of a data set: a mapping with the key "image"."""
    return isinstance(image, Mapping) and "image" in image


def _check_shape(image: Any, name: str) -> None:
    if isinstance(image, Tensor) and (image.is_meta or image.is_quantized or image.is_nested or image.layout != torch.strided):
        raise InputError(f"{name} is a tensor that is sparse, nested, quantized or without values; give a dense one")
    shape, kind = tuple(image.shape), "a tensor" if isinstance(image, Tensor) else "an array"
    if len(shape) == 4:
        raise InputError(f"{name} is {kind} of shape {shape}; for a batch, give a list of images: list(images)")
    is_3d = len(shape) == 3
    channels_first, channels_last = is_3d and shape[0] in CHANNELS, is_3d and shape[-1] in CHANNELS
    if 0 in shape or not (len(shape) == 2 or (channels_first if isinstance(image, Tensor) else channels_last)):
        fix = ""
        if 0 in shape:
            fix = "; it has no pixels"
        elif channels_first or channels_last:
            fix = "; give image.permute(2, 0, 1)" if isinstance(image, Tensor) else "; give image.transpose(1, 2, 0)"
        raise InputError(f"{name} is {kind} of shape {shape}; expected {ACCEPTED}{fix}")


def _check_values(image: Any, name: str) -> None:
    dtype = str(image.dtype).removeprefix("torch.")
    if dtype == "uint8":
        return
    if "float" not in dtype:
        raise InputError(f"{name} has the dtype {dtype}; expected uint8 (0 to 255) or float (0 to 1){_conversion(image)}")
    values = image.detach() if isinstance(image, Tensor) else image
    smallest, largest = float(values.min()), float(values.max())
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        return  # damaged data, and no wrong call: `decode` returns the error of this image alone
    if smallest >= -ROUNDING and largest <= 1 + ROUNDING:
        return
    fix, clip = "give the image before it is normalized", "clamp" if isinstance(image, Tensor) else "clip"
    if smallest >= -OVERSHOOT and largest <= 1 + OVERSHOOT:
        fix = f"clip it, image.{clip}(0, 1)"
    elif smallest >= 0 and largest <= 255:
        fix = "divide it by 255"
    elif smallest >= -OVERSHOOT * 255 and 16 < largest <= (1 + OVERSHOOT) * 255:
        fix = f"clip it and divide it by 255, image.{clip}(0, 255) / 255"
    elif smallest >= 0:
        fix = BY_LARGEST
    raise InputError(f"{name} has values from {smallest:.6g} to {largest:.6g}; a float image has values from 0 to 1: {fix}")


def _conversion(image: Any) -> str:
    """Return the end of a message about a dtype: the expression that converts whole numbers or booleans, or ""."""
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    to_bytes = "image.byte()" if isinstance(image, Tensor) else "image.astype(numpy.uint8)"
    if array.dtype.kind not in "biu" or array.min() < 0:
        return ""
    if array.max() <= 1:  # a mask
        return f"; give {to_bytes} * 255"
    return f"; {BY_LARGEST}" if array.max() > 255 else f"; give {to_bytes}"


def decode(image: Any, name: str, pixels: Callable[[Any], Tensor]) -> Tensor | ImageError:
    """Return the pixel values (3, H, W) float32 of a checked image, or the error if it cannot be read.

    image: as `read_once` returns it, so it may be an ImageError, which is returned.
    """
    if isinstance(image, ImageError):
        return image
    try:
        return pixels(open_input(image, name))
    except ImageError as error:
        return ImageError(str(error))  # a new error: the traceback of the old one would keep the image in memory


def open_input(image: Any, name: str) -> Image.Image:
    """Return a checked image as upright RGB. Raise ImageError if a file or bytes cannot be read."""
    if isinstance(image, str | Path):
        if str(image).startswith(("http://", "https://")):
            name, fix = shorten(str(image)), f": curl -O {image}" * (len(str(image)) <= LONGEST_QUOTE)
            reason = f"{name} is a web address, and lora_blip downloads no images; download it first{fix}"
            raise ImageError(printable(reason))
        path = local_path(str(image))
        _check_path(path)
        return open_image(path)
    if isinstance(image, bytes | bytearray | memoryview):
        if bytes(image[:4]).decode("latin-1") in BASE64:
            raise ImageError(f"{name} is in base64; give its bytes: {decoder_of(bytes(image))}")
        return open_image(name, BytesIO(image))
    if isinstance(image, Image.Image):
        return _rgb_copy(image, name)
    return to_rgb(Image.fromarray(_uint8_array(image, name)))


def decoder_of(content: bytes) -> str:
    """Return the expression that decodes a content in base64, or in the base64 of URLs, which has - and _ for + and /."""
    return "base64.urlsafe_b64decode(image)" if b"-" in content or b"_" in content else "base64.b64decode(image)"


def _check_path(path: str) -> None:
    """Raise ImageError with a fix if a text is not the path of one file: empty, a data URL, a folder or a glob."""
    if not path:
        raise ImageError("the path of the image is empty; give the path of a file")
    if path.startswith(BASE64) and len(path) > LONGEST_QUOTE and not os.path.lexists(path):
        raise ImageError(f"the image is a text in base64; give its bytes: {decoder_of(path.encode(errors='replace'))}")
    if path.startswith("data:"):
        raise ImageError("the image is a data URL; give its bytes: base64.b64decode(url.partition(',')[2])")
    if is_too_long(path):
        raise ImageError(f"{shorten(path)} does not exist: the name is too long for a path")
    is_folder = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises OSError for a path that is too long)
    if is_folder or ("*" in path and not os.path.lexists(path)):
        pattern, kind = (f"{path.rstrip('/')}/*", "a folder") if is_folder else (path, "a glob")
        raise ImageError(printable(f"{path} is {kind}, not an image; give its images: sorted(glob.glob({pattern!r}))"))


def _check_size(width: int, height: int, name: str) -> None:
    """Raise ImageError if an image has no pixels, or too many."""
    if not 0 < width * height <= LARGEST:
        raise ImageError(f"{name} has {width} × {height} pixels; expected 1 to {LARGEST:,}")


def _rgb_copy(image: Image.Image, name: str) -> Image.Image:
    """Return a copy of a PIL image in RGB, as `open_image` does for its file."""
    _check_size(image.width, image.height, name)
    try:
        with PIL_LOCK:
            image.load()
            turned = upright(image)  # in the lock, because another thread must not read the EXIF while Pillow parses it
        return to_rgb(turned)
    except UnreadableError as error:
        raise ImageError(printable(f"{name} is not a usable image: {error}")) from None
    except Exception as error:  # decoders raise any error on damaged files
        reason = ": ".join(filter(None, (type(error).__name__, shorten(str(error)))))
        fix = "; it is closed: open it again" * ("closed image" in reason)
        raise ImageError(printable(f"{name} cannot be decoded ({reason}){fix}")) from None


def _uint8_array(image: Any, name: str) -> Any:
    """Return the pixel values of an array or tensor as uint8, shape (height, width) or (height, width, 3 or 4).

    Raise ImageError if a value is NaN or infinite, or if there are too many pixels.
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    _check_size(image.shape[1], image.shape[0], name)
    if image.dtype != np.uint8:
        if not np.isfinite(image).all():
            raise ImageError(f"{name} contains NaN or infinity; a float image has values from 0 to 1")
        image = np.rint(image.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
