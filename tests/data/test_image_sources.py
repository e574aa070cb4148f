"""Test that the content decides which files are images, in folders, globs and shards, and that other files are counted."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import PIL.features
import pytest
from PIL import Image, features

from lora_blip.config import InferConfig
from lora_blip.data import annotations
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.data.images import FORMATS, kind_of, open_image
from lora_blip.errors import ImageError
from lora_blip.inference.commands import expand
from lora_blip.inference.image_inputs import open_input
from lora_blip.inference.pipeline import infer
from lora_blip.runtime.user_paths import local_path
from tests.support import tiny

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def content(kind: str, **more: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (200, 30, 30)).save(file, kind, **more)
    return file.getvalue()


def phone_folder() -> dict[str, bytes]:
    """Return {name: content} of files as phones and browsers write them."""
    frames = {"save_all": True, "append_images": [Image.new("RGB", (16, 12), "blue")]}
    files = {
        "D.JPG": content("JPEG"), "a.jpg": content("JPEG"), "b.jfif": content("JPEG"), "noext": content("JPEG"),
        "e.mpo": content("MPO", **frames), "g.apng": content("PNG", **frames), "h.gif": content("GIF", **frames),
        "i.TIF": content("TIFF"), "j.weird": content("WEBP"), "bitmap": content("BMP"),
    }  # fmt: skip
    files |= {"c.avif": content("AVIF")} if features.check("avif") else {}
    return files | ({"k.jp2": content("JPEG2000"), "l": content("JPEG2000")} if features.check("jpg_2000") else {})


OTHERS = {
    ".DS_Store": b"\0\0\0\1Bud1", "._a.jpg": b"\0\5\x16\7\0\2", ".hidden.jpg": content("JPEG"), "Thumbs.db": content("JPEG"),
    "a.txt": b"a cube", "b.json": b"{}", "notes": b"some words", "BMW": b"BMW is a car, and this is a text", "empty": b"",
    "movie.mp4": b"\0\0\0\x18ftypisom", "film": b"\0\0\0\x18ftypisom\0\0\0\0isommp41",
}  # fmt: skip
COUNTS = {"hidden": 3, ".db": 1, ".txt": 1, ".json": 1, "without a suffix": 4, ".mp4": 1}
BAD = {
    "f.heic": b"no picture",
    "m.heic": HEIC,
    "zero.png": b"",
    "n.jpg": b"a text",
    "o.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def shard_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"sub/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("where", ["folder", "glob", "shard"])
def test_images_are_detected_by_content_and_other_files_are_counted(tmp_path, where):
    """A folder, a glob and a tar file give the same images and the same counts, and each image opens."""
    files = phone_folder() | OTHERS
    folder = write(tmp_path / "photos", files)
    (folder / "dir.jpg").mkdir()
    source = {"folder": folder, "glob": folder / "*", "shard": tmp_path / "x.tar"}[where]
    images = ImageSource(str(shard_of(source, files) if where == "shard" else source))
    for _ in range(2):
        examples = list(images)
        assert sorted(e.image.name for e in examples) == sorted(phone_folder())
        assert dict(images.others) == COUNTS and "11 files (4 without a suffix, 3 hidden" in images.others_line()
    for one in examples:
        red, green, blue = open_example(one).getpixel((8, 6))
        assert red > 180 and green < 60 and blue < 60, one.image  # the first frame of several


def test_a_list_and_training_lines_read_every_kind(tmp_path):
    folder = write(tmp_path / "photos", phone_folder())
    (tmp_path / "list.txt").write_text("".join(f"photos/{name}\n" for name in phone_folder()))
    assert [e.image.name for e in ImageSource(tmp_path / "list.txt")] == list(phone_folder())
    lines = "".join(f'{{"image": "photos/{name}", "text": "red"}}\n' for name in phone_folder())
    (tmp_path / "x.jsonl").write_text(lines)
    assert len(annotations.read(tmp_path / "x.jsonl")[0]) == len(list(folder.iterdir()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_path_that_is_not_a_regular_file_is_never_opened(tmp_path):
    folder = write(tmp_path / "photos", {"a.jpg": content("JPEG")})
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path)
    (folder / "gone").symlink_to(tmp_path / "nothing")
    images = ImageSource(folder)
    assert [e.image.name for e in images] == ["a.jpg"]
    assert dict(images.others) == {"without a suffix": 2, "links to folders": 1}


def test_a_folder_without_an_image_says_what_is_in_it(tmp_path):
    with pytest.raises(ImageError, match=r"not images, left out: 2 files \(1 \.txt, 1 without a suffix\)"):
        ImageSource(write(tmp_path / "photos", {"a.txt": b"x", "b": b"y"}))


def test_many_suffixes_are_counted_in_little_memory_and_printed_in_a_line(tmp_path):
    images = ImageSource(write(tmp_path / "photos", {"a.jpg": content("JPEG")} | {f"x.n\x1b{n}": b"x" for n in range(300)}))
    list(images)
    assert images.others.total() == 300 and len(images.others) <= 101
    assert "\x1b" not in images.others_line() and len(images.others_line()) < 300


def test_an_image_that_cannot_be_read_is_in_errors_jsonl_with_what_to_do(tmp_path, checkpoints, capsys, monkeypatch):
    """The number of files that are not images is printed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = write(tmp_path / "photos", {"a.jpg": content("JPEG"), "x.txt": b"x"} | BAD)
    path = infer(InferConfig(str(checkpoints["blip"]), "none", images=str(folder), output_dir=str(tmp_path / "out")))
    errors = (path.parent / "errors.jsonl").read_text().splitlines()
    assert len(path.read_text().splitlines()) == 1 and len(errors) == len(BAD)
    error_of = dict(zip(sorted(BAD), errors, strict=True))
    for name in ("f.heic", "m.heic"):
        assert r"pip install \"lora_blip[heic]\"" in error_of[name]
    assert (
        "it is empty" in error_of["zero.png"]
        and "save it as JPEG or PNG" in error_of["n.jpg"]
        and "export it as PNG" in error_of["o.eps"]
    )
    assert "not images, left out: 1 file (1 .txt)" in capsys.readouterr().out


def test_a_run_in_which_no_image_can_be_read_ends_with_an_error(tmp_path, checkpoints):
    """The reasons are written before. A second run with the same settings ends with the same error."""
    folder = write(tmp_path / "photos", {"a.jpg": b"\xff\xd8\xff" + bytes(50), "b.png": b"\x89PNG\r\n\x1a\n"})
    config = InferConfig(str(checkpoints["blip"]), "none", images=str(folder), output_dir=str(tmp_path / "out"))
    for _ in range(2):
        with pytest.raises(ImageError, match=r"no image could be read, of 2 images; the reasons are in .*errors\.jsonl"):
            infer(config)
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 2


def test_file_addresses_are_paths_in_every_kind_of_input(tmp_path):
    """The setting, a line of a list and an image of a captioner may be addresses such as file:///my%20photos/a.jpg."""
    folder = write(tmp_path / "my photos", {"a.jpg": content("JPEG")})
    address = (folder / "a.jpg").as_uri()
    assert "%20" in address
    (tmp_path / "list.txt").write_text(f"{address}\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": address}) + "\n")
    for setting in (address, folder.as_uri(), tmp_path / "list.txt", tmp_path / "list.jsonl"):
        assert [open_example(example).size for example in ImageSource(setting)] == [(16, 12)]
    assert open_input(address, address).size == (16, 12)
    assert list(expand([address, folder.as_uri()])) == [str(folder / "a.jpg")] * 2


@pytest.mark.parametrize(
    "written", ["file://photos", "file://photos/a.jpg", "file://[1].jpg", "File:Cat.jpg", "file:a.jpg", "a/file:"]
)
def test_an_address_of_another_machine_or_a_name_is_not_changed(written):
    assert local_path(written) == written


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("file:///p/a#1?.jpg", "/p/a#1?.jpg"), ("FILE://localhost/p/a%20b.jpg", "/p/a b.jpg"), ("file:/p/ä.jpg", "/p/ä.jpg"),
        ("file:///C:/p/a.jpg", "C:/p/a.jpg"),
    ],
)  # fmt: skip
def test_an_address_of_this_machine_is_its_path(address, path):
    assert local_path(address) == path


def test_formats_that_run_programs_or_read_other_files_are_never_tried():
    assert not {"EPS", "WMF", "EMF", "PDF", "MPEG", "FPX", "MIC", "WAL", "GBR", "BUFR", "GRIB", "HDF5"} & {*FORMATS}
    assert kind_of(b"%!PS-Adobe-3.0 EPSF-3.0") == "" == kind_of(b"\xd7\xcd\xc6\x9a\0\0")


def test_a_raw_file_of_a_camera_is_refused_and_not_read_as_its_thumbnail(tmp_path):
    (tmp_path / "a.NEF").write_bytes(content("TIFF"))
    with pytest.raises(ImageError, match="raw file of a camera; export it as JPEG"):
        open_image(tmp_path / "a.NEF")
    assert [e.image.name for e in ImageSource(tmp_path)] == ["a.NEF"]
    (tmp_path / "b.CR2").write_bytes(content("JPEG"))  # whatever its name says
    assert open_image(tmp_path / "b.CR2").size == (16, 12)


def test_a_heic_image_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """Its opener is registered for the first such image, and not for other files."""
    registered = []

    def register() -> None:
        registered.append(1)
        monkeypatch.setitem(Image.OPEN, "HEIF", (lambda *_: Image.new("RGB", (3, 2), "red"), None))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    from lora_blip.data import images

    images._formats.cache_clear()
    for name, data in {"a.jpg": content("JPEG"), "b.heic": HEIC, "c": HEIC}.items():
        (tmp_path / name).write_bytes(data)
    assert open_image(tmp_path / "a.jpg").size == (16, 12) and not registered
    assert open_image(tmp_path / "b.heic").size == (3, 2) == open_image(tmp_path / "c").size and registered
    images._formats.cache_clear()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_first_bytes_tell_what_pillow_writes(kind):
    if (kind == "AVIF" and not features.check("avif")) or (kind == "JPEG2000" and not features.check("jpg_2000")):
        with pytest.raises((KeyError, OSError)):
            content(kind)
        return
    assert kind_of(content(kind)[:64]) == ("JPEG" if kind == "MPO" else kind)


def test_brands_distinguish_avif_heic_and_videos():
    def box(major: bytes, *others: bytes) -> bytes:
        return (16 + 4 * len(others)).to_bytes(4) + b"ftyp" + major + bytes(4) + b"".join(others)

    assert kind_of(box(b"avif", b"mif1")) == kind_of(box(b"mif1", b"miaf", b"avif")) == "AVIF"
    assert kind_of(box(b"heic")) == kind_of(box(b"mif1", b"heic")) == "HEIF"
    assert kind_of(box(b"isom", b"mp41")) == kind_of(box(b"qt  ")) == kind_of(b"\0\0\0\x08ftyp") == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.svg", "a vector drawing, which has no pixels; export it as PNG"),
        ("a b.mp4", 'a video; save some of its frames as images: ffmpeg -i "a b.mp4" -vf fps=1 "a b_%05d.jpg"'),
        ("a.PDF", 'a PDF document; save its pages as images: pdftoppm -png "a.PDF" "a"'),
        ("a.cr3", "it is a raw file of a camera; export it as JPEG or PNG"),
        ("a.psd", "a file of an image editor; export it as PNG"),
        ("a.jxl", 'a JPEG XL image; convert it: djxl "a.jxl" "a.png"'),
        ("a.heic", 'a HEIC image, which needs another package: pip install "lora_blip[heic]"'),
    ],
)
def test_a_file_of_an_unreadable_format_is_named_with_the_fix(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(b"no image\n" * 20)
    with pytest.raises(ImageError) as error:
        open_image(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} is ") and message in str(error.value)
    (tmp_path / name).write_bytes(content("JPEG"))  # the content decides, whatever the name says
    assert open_image(tmp_path / name).size == (16, 12)


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    (tmp_path / "a.avif").write_bytes(content("AVIF"))
    assert open_image(tmp_path / "a.avif").size == (16, 12)


def test_a_table_and_a_web_address_are_not_images(tmp_path):
    for suffix in ("csv", "json", "xlsx"):
        (tmp_path / f"x.{suffix}").write_text("image,text\n1.png,a cat\n")
        with pytest.raises(ImageError, match=r"is a table, not an image .* a \.txt file with a path in each line$"):
            ImageSource(tmp_path / f"x.{suffix}")
    with pytest.raises(ImageError, match=r"is a web address; download it first: curl -O 'https://a\.b/c\.jpg\?d=1&e=2'$"):
        ImageSource("https://a.b/c.jpg?d=1&e=2")


def test_a_missing_folder_of_images_suggests_the_nearest(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ImageError, match=r"no image found at '.*foto'.*; did you mean '.*photos'\? Otherwise give a file"):
        ImageSource(tmp_path / "foto")


@pytest.mark.parametrize("setting", ["", " "])
def test_an_empty_setting_is_not_the_current_folder(setting, tmp_path, monkeypatch):
    """Before, `infer` predicted all images below the working folder, also those of .venv."""
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 2)
    with pytest.raises(ImageError, match=r"IMAGES \(--images\) is empty; .* for the current folder, give '\.'"):
        ImageSource(setting)
    assert len(list(ImageSource("."))) == 2
