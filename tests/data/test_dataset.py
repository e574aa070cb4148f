"""Test that every line is checked, that images are decoded correctly, and that orders depend only on the seed."""

import copy
import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_blip.data import annotations, splits
from lora_blip.data.augmentation import augment, padded_by_edges
from lora_blip.data.dataset import ImageDataset
from lora_blip.data.images import open_image
from lora_blip.data.loader import EpochBatches, loader, pixel_values
from lora_blip.errors import DataError
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.setup import default_workers
from tests.support import tiny


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("image", ["image", "image_path", "file_name"])
@pytest.mark.parametrize("text", ["text", "caption"])
def test_every_common_key_name_is_read(photo, image, text):
    source = write(photo.parent / "x.jsonl", json.dumps({image: "a.png", text: " a  red thing "}), "", "")
    (example,), problems = annotations.read(source)
    assert (example.image, example.text, example.line, problems) == (photo, "a red thing", 1, [])


def test_paths_are_relative_to_the_file_or_to_a_root(photo, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    source = write(tmp_path / "elsewhere" / "x.jsonl", json.dumps({"image": "a.png", "text": "t"}))
    with pytest.raises(DataError, match="does not exist"):
        annotations.read(source)
    assert annotations.read(source, image_root=tmp_path)[0][0].image == photo


def bad_lines(photo: Path) -> dict[str, str]:
    """Return {fault: a line with this fault}."""
    (photo.parent / "text.jpg").write_text("not an image")
    whole = photo.with_suffix(".jpg")
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
    (photo.parent / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (photo.parent / "empty.png").touch()
    return {
        "not valid JSON": '{"image": "a.png", "text": ',
        "expected an object": '["a.png", "t"]',
        "no image": '{"text": "t"}',
        "no text": '{"image": "a.png", "headline": "t"}',
        "the text is null": '{"image": "a.png", "caption": null}',
        "not UTF-8": '{"image": "a.png", "text": "half \\ud83d"}',
        "the text is empty": '{"image": "a.png", "text": "  "}',
        r"it has only invisible characters, '\u200b \ufeff'": '{"image": "a.png", "text": " \\u200b \\ufeff"}',
        "gone.png does not exist": '{"image": "gone.png", "text": "t"}',
        "text.jpg is not a usable image": '{"image": "text.jpg", "text": "t"}',
        "cut.jpg cannot be decoded": '{"image": "cut.jpg", "text": "t"}',
        "empty.png is not a usable image": '{"image": "empty.png", "text": "t"}',
    }


def test_each_bad_line_is_named_with_its_reason(photo, tmp_path):
    good = '{"image": "a.png", "text": "good"}'
    broken = bad_lines(photo)
    source = write(tmp_path / "x.jsonl", good, *broken.values(), good)
    with pytest.raises(DataError) as error:
        annotations.read(source)
    for number, reason in enumerate(broken, 2):
        assert f"{source}:{number}: " in str(error.value) and reason in str(error.value)
    assert 'ON_BAD_DATA = "skip"' in str(error.value)
    examples, problems = annotations.read(source, on_bad_data="skip")
    assert [e.line for e in examples] == [1, 2 + len(broken)] and [p.line for p in problems] == list(range(2, 2 + len(broken)))


def test_a_file_without_a_good_line_is_an_error_even_when_skipping(tmp_path):
    for lines in ([], ["nonsense"]):
        with pytest.raises(DataError, match="no usable line"):
            annotations.read(write(tmp_path / "x.jsonl", *lines), on_bad_data="skip")


@pytest.mark.usefixtures("photo")
def test_a_text_of_unknown_tokens_alone_or_too_long_is_bad(make, tmp_path):
    task = CaptionTask(make("blip"))
    lines = [json.dumps({"image": "a.png", "text": text}) for text in ("ok", "你好", "cube " * 80)]
    source = write(tmp_path / "x.jsonl", *lines)
    examples, problems = annotations.read(source, on_bad_data="skip", check=task.check)
    assert [e.text for e in examples] == ["ok"]
    assert "only tokens that" in problems[0].reason and "room for 62" in problems[1].reason


def test_bytes_that_are_no_utf8_are_named(photo, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"image": "' + photo.name.encode() + b'", "text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: it is not UTF-8"):
        annotations.read(tmp_path / "x.jsonl")


def test_a_byte_order_mark_and_windows_line_ends_are_read(photo, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "' + photo.name.encode() + b'", "text": "ok"}\r\n\r\n')
    assert annotations.read(tmp_path / "x.jsonl")[0][0].text == "ok"


def test_a_large_photo_is_augmented_at_the_model_s_scale():
    augmented = augment(Image.new("RGB", (3000, 2000), "red"), "a cube", random.Random(0), side=100)
    assert augmented.size == (300, 200)


def test_the_split_is_by_image_seeded_and_random(tmp_path):
    source = tiny.write_photos(tmp_path, 12)
    lines = source.read_text() * 2  # two lines an image
    source.write_text(lines)
    examples, _ = annotations.read(source)
    train, held_out = splits.split_by_image(examples, 0.25, seed=1)
    assert len({e.image for e in held_out}) == 3 and len(train) + len(held_out) == 24
    assert not {e.image for e in train} & {e.image for e in held_out}
    assert splits.split_by_image(examples, 0.25, seed=1) == (train, held_out)
    assert splits.split_by_image(examples, 0.25, seed=2)[1] != held_out
    assert splits.split_by_image(examples, 0.0, seed=1) == (examples, [])
    spelled = [dataclasses.replace(e, image=e.image.parent / ".." / "photos" / e.image.name) for e in examples[12:]]
    train, held_out = splits.split_by_image(examples[:12] + spelled, 0.25, seed=1)
    assert len(held_out) == 6 and not {e.image.resolve() for e in train} & {e.image.resolve() for e in held_out}
    with pytest.raises(DataError, match="leaves none for training"):
        splits.split_by_image(examples[:1], 0.5, seed=1)


def corner(image: Image.Image) -> tuple[int, ...]:
    return image.getpixel((1, 1))


def test_every_mode_of_picture_comes_out_right(tmp_path):
    """An image is rotated by EXIF. Palette, grey, alpha and 16-bit images look as in an image viewer."""
    upright = Image.new("RGB", (20, 10), "blue")
    upright.paste("red", (0, 0, 10, 10))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = open_image(tmp_path / "turned.png")
    assert turned.size == (10, 20) and corner(turned) == (255, 0, 0)  # red on top

    upright.convert("P").save(tmp_path / "palette.png")
    assert corner(open_image(tmp_path / "palette.png")) == (255, 0, 0)
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert corner(open_image(tmp_path / "grey.png")) == (77, 77, 77)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert corner(open_image(tmp_path / "clear.png")) == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "half.png")
    assert corner(open_image(tmp_path / "half.png")) == (127, 127, 127)
    see_through = Image.new("P", (4, 4), 0)
    see_through.putpalette([0, 0, 0, 255, 255, 255])
    see_through.save(tmp_path / "key.png", transparency=0)
    assert corner(open_image(tmp_path / "key.png")) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert corner(open_image(tmp_path / "deep.png")) == (127, 127, 127)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert corner(open_image(tmp_path / "print.jpg"))[0] > 200 > 60 > corner(open_image(tmp_path / "print.jpg"))[1]


def test_pixels_are_exactly_the_processor_s(make, tmp_path):
    """Our pixel values equal those of the Hugging Face processor, bit for bit."""
    backbone = make("blip")
    Image.effect_noise((50, 41), 60).convert("RGB").save(tmp_path / "n.png")
    image = open_image(tmp_path / "n.png")
    theirs = backbone.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixel_values(image, backbone.image_processor), theirs) and theirs.shape == (3, tiny.SIDE, tiny.SIDE)


def test_padding_by_edges_is_that_of_numpy():
    for seed in range(8):
        draw = np.random.default_rng(seed)
        pixels = draw.integers(0, 256, (*draw.integers(1, 30, 2), 3), dtype=np.uint8)
        across, down = draw.integers(0, 9, 2)
        expected = np.pad(pixels, ((down, down), (across, across), (0, 0)), mode="edge")
        assert np.array_equal(padded_by_edges(pixels, across, down), expected)


def test_augmentation_is_gentle_and_mirrors_no_left_or_right():
    image = Image.new("RGB", (60, 40), (100, 100, 100))
    image.paste((200, 0, 0), (0, 0, 30, 40))
    left_half_red = {}
    for text in ("a cube to the LEFT of it", "the rightmost", "a cube", "alright"):
        sides = []
        for seed in range(40):
            augmented = np.asarray(augment(image, text, random.Random(seed)))
            assert augmented.shape == (40, 60, 3)
            sides.append(augmented[20, 8, 0] > 130)
        left_half_red[text] = sum(sides) / 40
    assert left_half_red["a cube to the LEFT of it"] == left_half_red["the rightmost"] == 1
    assert all(0.2 < left_half_red[text] < 0.8 for text in ("a cube", "alright"))


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(make, tmp_path):
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 10))
    processor = make("blip").image_processor

    def epoch_of(workers: int, epoch: int, seed: int = 5) -> tuple[list[int], torch.Tensor]:
        batches = loader(ImageDataset(examples, processor, True, seed), 4, True, seed, workers, pin=False)
        batches.batch_sampler.epoch = epoch
        host_batches = list(batches)
        assert [len(host_batch.examples) for host_batch in host_batches] == [4, 4, 2]
        return [e.line for host_batch in host_batches for e in host_batch.examples], torch.cat(
            [host_batch.pixel_values for host_batch in host_batches]
        )

    order, pixels = epoch_of(0, 3)
    again, same = epoch_of(2, 3)
    assert order == again and torch.equal(pixels, same) and sorted(order) == list(range(1, 11))
    assert epoch_of(0, 4)[0] != order and epoch_of(0, 3, seed=6)[0] != order


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_contain_bytes_and_a_task_computes_the_values_of_the_processor(make, tmp_path, workers):
    """A processor that does more than resize makes its own values, in the worker."""
    examples, _ = annotations.read(tiny.write_photos(tmp_path, 5))
    task = CaptionTask(make("blip"))
    processor = task.backbone.image_processor
    expected = [processor(open_image(e.image), return_tensors="pt")["pixel_values"][0] for e in examples]
    for exact in (True, False):
        dataset = ImageDataset(examples, processor, False, 0)
        dataset.pixels = copy.copy(dataset.pixels)
        dataset.pixels.exact = exact
        host_batches = list(loader(dataset, 2, False, 0, workers, pin=False))
        assert {batch.pixel_values.dtype for batch in host_batches} == {torch.uint8 if exact else torch.float32}
        assert torch.equal(torch.cat([task.batch(batch).pixel_values for batch in host_batches]), torch.stack(expected))


def test_images_are_loaded_by_one_process_per_core_of_each_rank(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    assert [default_workers(device) for device in ("cpu", "cuda", "mps")] == [0, 16, 16]
    for ranks, workers in (("2", 12), ("8", 3), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers("cuda") == workers


def test_no_line_is_lost_or_repeated_without_shuffling():
    batches = EpochBatches(7, 3, shuffle=False, seed=0)
    assert [[i for _, i in keys] for keys in batches] == [[0, 1, 2], [3, 4, 5], [6]] and len(batches) == 3


def test_training_reads_a_csv_and_a_json_document_as_prepare_does(tmp_path):
    """Both use the same readers. A problem in a JSON document names its entry."""
    tiny.write_photos(tmp_path, 2)
    photos = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert len(photos) == 2
    table = write(tmp_path / "x.csv", "image,caption", *(f"{name},a cube" for name in photos))
    (tmp_path / "x.json").write_text(json.dumps([{"image": name, "caption": "a cube"} for name in photos] + [{"image": 3}]))
    assert [e.text for e in annotations.read(table)[0]] == ["a cube"] * len(photos)
    examples, problems = annotations.read(tmp_path / "x.json", on_bad_data="skip")
    assert [e.line for e in examples] == [f"[{n}]" for n in range(len(photos))]
    assert str(problems[0]).startswith(f"{tmp_path / 'x.json'}: [{len(photos)}]: no image")
