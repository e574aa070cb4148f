"""Images of every kind that users have become RGB with 8 bits, by the rule of their kind."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lora_blip.data import annotations, images
from lora_blip.data.deep_images import DarkImages, FirstDarkImage
from lora_blip.data.images import open_image
from lora_blip.errors import ImageError
from lora_blip.inference.image_inputs import open_input


def saved(path: Path, values: np.ndarray, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


def grey(path: Path) -> list[int]:
    return np.asarray(open_image(path, dark=DarkImages()))[..., 0].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("name", "values", "levels"),
    [
        ("a.png", np.array([[0, 255, 256, 32768, 65535]], np.uint16), [0, 0, 0, 127, 255]),
        ("a.tif", np.array([[0, 255, 256, 32768, 65535]], np.uint16), [0, 0, 0, 127, 255]),
        ("a.png", np.array([[0, 255]], np.uint16), [0, 0]),  # its own maximum has no effect
        ("a.tif", np.array([[0, 2**30, 2**31 - 1, -5]], np.int32), [0, 127, 255, 0]),
        ("a.tif", np.array([[0, 0.5, 1, 2, -1, np.nan]], np.float32), [0, 127, 255, 255, 0, 0]),
    ],
)
def test_a_deep_grey_image_is_scaled_by_the_range_of_its_type(tmp_path, name, values, levels):
    """v × 255 / 65535 for 16 bits, / (2³¹ - 1) for signed 32 bits, and floats from 0 to 1."""
    assert grey(saved(tmp_path / name, values)) == levels


def test_floats_up_to_255_are_an_error(tmp_path):
    """1 is white, so each pixel would be white. Pillow's own mode F has values up to 255."""
    path = saved(tmp_path / "a.tif", np.array([[0, 3, 209]], np.float32))
    with pytest.raises(
        ImageError, match=r"a\.tif is not a usable image: its values are floats up to 209, but white must be 1; divide"
    ):
        open_image(path)
    highlights = saved(tmp_path / "b.tif", np.array([[0.5, 0.2, 0, 5, np.inf, 3.4e38, 0.1, 0.3]], np.float32))
    assert grey(highlights) == [127, 51, 0, 255, 255, 255, 25, 76]  # few bright pixels are clipped
    with pytest.raises(ImageError, match="divide the values by 255"):
        open_input(Image.new("L", (4, 4), 200).convert("F"), "the image")


def test_unsigned_32_bits_have_their_own_range(tmp_path):
    path = saved(tmp_path / "a.tif", np.array([[0, -1, -(2**31)]], np.int32))
    content = path.read_bytes()  # SampleFormat: 2, signed → 1, unsigned
    path.write_bytes(content.replace(struct.pack("<HHIHH", 339, 3, 1, 2, 0), struct.pack("<HHIHH", 339, 3, 1, 1, 0)))
    assert path.read_bytes() != content
    assert grey(path) == [0, 255, 127]


def test_a_rotated_tiff_keeps_the_range_of_its_type(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 2**31 - 1]], np.int32)).save(path, tiffinfo={274: 6})
    assert open_image(path).size == (1, 2)
    assert sorted(grey(path)) == [0, 255]


def test_the_transparent_value_of_a_deep_png_is_white(tmp_path):
    chunk = b"tRNS" + struct.pack(">H", 7)
    path = saved(tmp_path / "a.png", np.array([[7, 65535, 0]], np.uint16))
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[at:])
    assert grey(path) == [255, 255, 0]


def test_training_names_the_nearly_black_images_in_one_line(tmp_path):
    """Four images use 12 of their 16 bits: one line counts them and names three. A black 8-bit image is not named."""
    for name in "abcd":
        saved(tmp_path / f"{name}.png", np.full((4, 4), 4095, np.uint16))
    saved(tmp_path / "e.png", np.zeros((4, 4), np.uint8))
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(f'{{"image": "{name}.png", "text": "a scan"}}\n' for name in "abcde"))
    reports: list[str] = []
    examples, problems = annotations.read(lines, report=reports.append)
    assert (len(examples), problems, len(reports)) == (5, [], 2)  # and the table
    assert reports[0].startswith("4 images") and reports[0].count(".png") == 3
    assert "and 1 more" in reports[0] and "e.png" not in reports[0]


def test_outside_of_training_the_first_nearly_black_image_gives_the_warning(tmp_path, capsys):
    first = FirstDarkImage()
    for name in "ab":
        open_image(saved(tmp_path / f"{name}.png", np.array([[0, 100]], np.uint16)), dark=first)
    out = capsys.readouterr().out
    assert out.count("nearly black") == 1 and "a.png" in out and "b.png" not in out


def test_transparent_pixels_are_white_in_each_mode(tmp_path):
    clear = Image.new("RGBA", (1, 1), (200, 0, 0, 0))
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    for name, image in {"rgba.png": clear, "la.png": clear.convert("LA"), "p.png": palette, "w.webp": clear}.items():
        image.save(tmp_path / name, **({"lossless": True} if name == "w.webp" else {}))
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255), name


def test_cmyk_lab_mpo_and_animations_are_read(tmp_path):
    """CMYK and L*a*b* keep their colors. For an MPO or an animation, the first frame is used."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.convert("CMYK").save(tmp_path / "c.jpg")
    red.save(tmp_path / "m.mpo", save_all=True, append_images=[blue])
    for name in ("a.gif", "a.png", "a.webp"):
        red.save(tmp_path / name, save_all=True, append_images=[blue])
    Image.new("LAB", (8, 8), (136, 208, 195)).save(tmp_path / "lab.tif")
    for path in tmp_path.iterdir():
        red_level, green, blue_level = open_image(path).getpixel((4, 4))
        assert red_level > 180 and green < 60 and blue_level < 60, path.name


def test_a_png_with_megabytes_of_metadata_is_read(tmp_path):
    """Pillow refuses a text chunk of more than a megabyte. It has no effect on pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        Image.open(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    content = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ImageError, match="cannot be decoded"):
        open_image("cut.png", BytesIO(content[: content.index(b"IDAT") + 6]))


def test_a_heic_image_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_heif_reader", lambda: False)
    images._formats.cache_clear()
    (tmp_path / "f.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(ImageError, match=re.escape('pip install "lora_blip[heic]"')):
        open_image(tmp_path / "f.heic")
    images._formats.cache_clear()
