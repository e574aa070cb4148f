"""Test `Captioner`: accepted inputs, order and errors of a list, scores, and threads that share it."""

import asyncio
import base64
import copy
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageSequence
from torch import Tensor
from transformers.image_utils import SizeDict
from transformers.initialization import no_tie_weights

import lora_blip
from lora_blip.data.image_folders import example_of
from lora_blip.errors import AdapterError, ConfigError, ImageError, InputError, LoRAError, ModelError
from lora_blip.inference import image_inputs
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.image_inputs import open_input
from lora_blip.inference.prediction import line_of
from lora_blip.lora import adapter_file, attached
from lora_blip.lora.layer import LoRA
from lora_blip.models import library
from lora_blip.models.loading import as_backbone, load_backbone
from lora_blip.models.unknown_tokens import MOST_WARNED
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.tasks.verification_record import is_verified
from tests.lora.test_edited_forward import with_relu
from tests.support import tiny
from tests.support.api import ROOT, make_workplace, save_adapter
from tests.support.models import carry, inject
from tests.support.runs import adapter_of

FEW = Generation(max_new_tokens=6)
QUESTIONS = ["what is it?", "what color is the cube?"]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    tiny.write_photos(tmp_path, 4)
    return sorted((tmp_path / "photos").iterdir())[:4]


@pytest.fixture
def captioner(make: Any) -> Captioner:
    backbone = make("blip")
    inject(backbone)
    return Captioner(CaptionTask(backbone, "", FEW), batch_size=3)


# ---------------------------------------------------------------- what is accepted


def test_every_kind_of_image_has_the_caption_and_the_score_of_its_file(captioner, photos):
    """Test paths, PIL images, uint8 and float arrays and tensors, and the bytes of a file, alone and in a list."""
    file, pixels = photos[0], np.asarray(Image.open(photos[0]).convert("RGB"))
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    kinds = [
        file, str(file), Image.open(file), pixels, opaque, pixels.astype(np.float32) / 255, pixels / 255, channels_first,
        channels_first / 255, file.read_bytes(), bytearray(file.read_bytes()),
    ]  # fmt: skip
    expected = captioner(file)
    assert expected.text and 0 < expected.score < 1 and not expected.error and expected.image == file
    for image in kinds:
        prediction = captioner(image)
        assert (prediction.text, prediction.error) == (expected.text, "") and prediction.score == pytest.approx(expected.score)
    many = captioner(kinds)
    assert [each.text for each in many] == [expected.text] * len(kinds)
    assert [str(each.image) for each in many[1:4]] == [str(file), "images[2]", "images[3]"]
    grey = captioner([np.asarray(Image.open(file).convert("L")), Image.open(file).convert("L")])
    assert grey[0].text == grey[1].text


class SmallParts(io.RawIOBase):
    """A stream that cannot seek and returns at most 100 bytes, as that of a network."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self.content.read(min(size, 100))


class AsyncUpload:
    """An upload of a web framework for asyncio."""

    async def read(self, _size: int = -1) -> bytes:
        return b""

    async def seek(self, _offset: int) -> None:
        """Do nothing."""


def test_open_files_are_images_that_are_read_once_and_from_their_start(captioner, photos):
    """Test open files, io.BytesIO after it was written, temporary files, members of an archive, and streams without seek."""
    content, expected = photos[0].read_bytes(), captioner(photos[0]).text
    written, archive = io.BytesIO(), io.BytesIO()
    written.write(content)  # its position is at the end
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("a.jpg", content)
    with (
        photos[0].open("rb") as file, tempfile.TemporaryFile() as temporary, zipfile.ZipFile(archive).open("a.jpg") as member,
        tempfile.SpooledTemporaryFile() as spooled, photos[0].open("rb", buffering=0) as raw,
    ):  # fmt: skip
        temporary.write(content)
        spooled.write(content)
        files = [file, written, temporary, spooled, member, raw, SmallParts(content)]
        for image in files[:-1]:
            prediction = captioner(image)
            assert (prediction.text, prediction.error, str(prediction.image)) == (expected, "", "the image")
        listed = captioner(files)
        assert [each.text for each in listed] == [expected] * 7 and str(listed[1].image) == "images[1]"
        streamed = captioner.stream(iter(files[:-1]))
        assert [each.text for each in streamed] == [expected] * 6


def test_a_file_that_cannot_be_read_is_an_error_of_this_image_alone(captioner, photos, monkeypatch):
    """Test a closed file, an empty one, one that is no image, and one over the limit. The others keep their captions."""
    closed = photos[0].open("rb")
    closed.close()
    good, large = captioner(photos[0]).text, io.BytesIO(bytes(photos[0].stat().st_size + 2))
    monkeypatch.setattr(image_inputs, "LARGEST_FILE", photos[0].stat().st_size)
    predictions = captioner([closed, io.BytesIO(photos[0].read_bytes()), io.BytesIO(), io.BytesIO(b"no image"), large])
    assert [bool(each.text) for each in predictions] == [False, True, False, False, False] and predictions[1].text == good
    reasons = ("images[0] cannot be read from its file", "", "it is empty", "images[3] is", "images[4] is a file of more than")
    assert all(reason in each.error for reason, each in zip(reasons, predictions, strict=True))
    with pytest.raises(ImageError, match="open it again"):
        captioner(closed, strict=True)


SWAPPED: dict[str, Any] = {
    "a path": "photo.png",
    "a list of paths": ["a.png", "b.png"],
    "a Path": Path("photo.png"),
    "a PIL image": Image.new("RGB", (4, 4)),
    "an array": np.zeros((4, 4, 3), np.uint8),
    "bytes": b"x",
    "an open file": io.BytesIO(b"x"),
}


@pytest.mark.parametrize("image", SWAPPED.values(), ids=SWAPPED)
def test_swapped_arguments_give_the_right_call(make, image):
    """A question in the place of the image, and texts to rank in its place."""
    captioner = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    with pytest.raises(
        InputError, match=r"the arguments are swapped: 'what color\?' is a text, .*call captioner\.answer\(image,"
    ):
        captioner.answer("what color?", image)
    with pytest.raises(InputError, match=r"the arguments are swapped: 'red' is a text, .*call captioner\.rank\(image, \["):
        captioner.rank(["red", "blue"], image)


def test_more_arguments_than_images_give_the_right_call(make, photos):
    """A question, texts, or a second image after the image."""
    image = photos[0]
    captioner: Any = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    with pytest.raises(InputError, match=r"has one argument; call captioner\.answer\(image, "):
        captioner(image, "what color?")
    with pytest.raises(InputError, match=r"has one argument; call captioner\.answer\(image, "):
        captioner(image, question="what color?")
    with pytest.raises(TypeError, match=r"captioner\(image\) has no argument 'prompt'; its only one is strict, and options"):
        captioner(image, prompt="a")
    with pytest.raises(InputError, match=r"several images need a list: captioner\(\[image, other_image\]\)"):
        captioner(image, image, "photos/1.png")
    captioner = Captioner(TASKS["caption"](make("blip"), "", FEW))
    for call in (lambda: captioner(image, "what color?"), lambda: captioner.answer(image, "what color?")):
        with pytest.raises(InputError, match=r"call captioner\(image\)\. For answers, open an adapter of the task vqa"):
            call()


def test_texts_without_a_list_and_a_question_before_the_image_give_the_right_call(make, photos):
    captioner: Any = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    with pytest.raises(InputError, match=r"several texts need a list: captioner\.rank\(image, \["):
        captioner.rank(photos[0], "red", "blue")
    with pytest.raises(InputError, match=r'call: captioner\.rank\(image, \["red", "blue"\], question='):
        captioner.rank(photos[0], "what color?", ["red", "blue"])
    with pytest.raises(InputError, match=r"the arguments are swapped: 'what color\?' is a text"):
        captioner("what color?", photos[0])


def test_a_stream_of_one_image_is_a_list_of_it(make, photos):
    """A path is not read letter by letter. An array of four dimensions is an iterable of images."""
    captioner = Captioner(TASKS["caption"](make("blip"), "", FEW))
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    for image, count in ((photos[0], 1), (str(photos[0]), 1), (Path(photos[0]).read_bytes(), 1), (pixels[0], 1), (pixels, 2)):
        predictions = list(captioner.stream(image))
        assert len(predictions) == count and not any(prediction.error for prediction in predictions)
    with pytest.raises(InputError, match="is of type NoneType"):
        next(captioner.stream(None))  # type: ignore[arg-type]


def test_a_missing_image_is_not_called_swapped(make, photos):
    """Also if the question mentions a file, or the path of the existing image has no suffix of an image."""
    captioner = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    plain_name = photos[0].rename(photos[0].with_suffix(""))
    assert "does not exist" in captioner.answer("missing.png", "is this like photo.png").error
    assert captioner.answer(str(plain_name), "is it photo.png").text


NOT_IMAGES: dict[str, tuple[Any, str]] = {
    "None": (None, "is of type NoneType; expected a path, a PIL image"),
    "a number": (3, "is of type int; expected a path"),
    "a list": ([1, 2], "is of type list; expected a path"),
    "a dict": ({"image": "a.jpg"}, r'is of type dict; .*; of a list of rows: \[row\["image"\] for row in images\]$'),
    "a set": ({"a.jpg"}, "is of type set; expected a path"),
    "a file of text": (io.StringIO("x"), r'is a file whose read\(\) returns str; open it for bytes: open\(path, "rb"\)'),
    "an asynchronous upload": (AsyncUpload(), r"whose read\(\) must be awaited; give its bytes: await file\.read\(\)"),
    "a batch": (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\); for a batch, give a list of images: list\(images\)"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\); .*; give image\.transpose\(1, 2, 0\)"),
    "channels last": (torch.zeros(8, 8, 3), r"a tensor of shape \(8, 8, 3\); .*; give image\.permute\(2, 0, 1\)"),
    "no pixel": (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\); expected .*; it has no pixels$"),
    "integers": (np.full((8, 8, 3), 7, np.int64), r"has the dtype int64; .*; give image\.astype\(numpy\.uint8\)$"),
    "an integer tensor": (torch.full((3, 8, 8), 255), r"has the dtype int64; .*; give image\.byte\(\)$"),
    "16 bits": (np.full((8, 8), 3000, np.uint16), "dtype uint16; .*; divide it by its largest possible value: image / 4095"),
    "8 of 16 bits": (np.full((8, 8), 200, np.int16), r"has the dtype int16; .*; give image\.astype\(numpy\.uint8\)$"),
    "resized levels": (torch.full((3, 8, 8), 274.4), r"from 274.4 to 274.4; .*: clip it and .*, image\.clamp\(0, 255\) / 255$"),
    "16 bits as floats": (np.full((8, 8), 60000.0), "from 60000 to 60000; .*: divide it by its largest possible value"),
    "a mask": (np.ones((8, 8), bool), r"has the dtype bool; .*; give image\.astype\(numpy\.uint8\) \* 255$"),
    "a mask of integers": (np.eye(8, dtype=np.int64), r"dtype int64; .*; give image\.astype\(numpy\.uint8\) \* 255$"),
    "negative integers": (np.full((8, 8), -1), r"has the dtype int64; expected uint8 \(0 to 255\) or float \(0 to 1\)$"),
    "complex numbers": (np.ones((8, 8), complex), r"expected uint8 \(0 to 255\) or float \(0 to 1\)$"),
    "levels as floats": (np.full((8, 8, 3), 200.0), "values from 200 to 200; .*: divide it by 255"),
    "a resized array": (np.full((8, 8, 3), 1.067), "values from 1.067 to 1.067; .*: clip it, image.clip\\(0, 1\\)"),
    "a resized tensor": (torch.full((3, 8, 8), -0.03), "from -0.03 to -0.03; .*: clip it, image.clamp\\(0, 1\\)"),
    "dark levels as floats": (np.full((8, 8, 3), 2.0), "values from 2 to 2; .*: divide it by 255"),
    "pixel values": (torch.full((3, 8, 8), -1.5), "values from -1.5 to -1.5; .*: give the image before it is normalized"),
    "a sparse tensor": (torch.eye(9).to_sparse(), "is a tensor that is sparse, nested, quantized or without values"),
    "a meta tensor": (torch.empty(3, 9, 9, device="meta"), "is a tensor that is sparse, nested, quantized or without values"),
}


@pytest.mark.parametrize("excess", [1e-7, 0.0019])
def test_float_values_that_round_to_the_levels_of_an_image_are_accepted(captioner, excess):
    """Before, the advice was to divide by 255, which makes the image black."""
    image = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0))
    image[0, 0, 0], image[1, 1, 1] = 0.0, 1.0
    outside = image.clone()
    outside[0, 0, 0], outside[1, 1, 1] = -excess, 1 + excess
    for convert in (Tensor.clone, lambda values: values.permute(1, 2, 0).numpy()):
        assert captioner(convert(outside)) == captioner(convert(image))


@pytest.mark.parametrize(("image", "message"), NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_an_input_that_is_no_image_is_an_error_with_its_position(captioner, photos, image, message, monkeypatch, recwarn):
    """The error is raised before any computation, also without `strict`, because it is a mistake in the caller's code."""
    monkeypatch.setattr(captioner.runner, "compute", None)
    with pytest.raises(InputError, match=rf"images\[1\] .*{message}"):
        captioner([photos[0], image])
    if not isinstance(image, list):
        with pytest.raises(TypeError, match=f"the image .*{message}"):
            captioner(image)
    assert not [each for each in recwarn.list if "never awaited" in str(each.message)]


def test_a_broken_image_keeps_its_position_and_has_the_reason(captioner, photos, tmp_path):
    """Test every position of a batch, and a single image. `strict` raises ImageError."""
    (tmp_path / "torn.png").write_bytes(photos[1].read_bytes()[:60])
    truncated = Image.open(io.BytesIO(photos[1].read_bytes()[:60]))
    alone = {photo: captioner(photo).text for photo in photos}
    torn = tmp_path / "torn.png"
    closed = Image.new("RGB", (8, 8))
    closed.close()
    broken = [
        ("nowhere.jpg", "does not exist"), (b"no image", "supported format"), (truncated, "cannot be decoded"),
        (closed, "; it is closed: open it again"),
        (torn, "cannot be decoded"), ("https://x.org/a.png", "download it first: curl -O"),
        ("", "path of the image is empty"), ("data:image/png;base64,AA", "give its bytes: base64.b64decode"),
        ("data:image/png;base64," + "A" * 9999, "is a data URL; give its bytes: base64.b64decode"),
        (base64.b64encode(photos[1].read_bytes()).decode() * 9, "in base64; give its bytes: base64.b64decode(image)"),
        (base64.b64encode(photos[1].read_bytes()), "in base64; give its bytes: base64.b64decode(image)"),
        (base64.urlsafe_b64encode(photos[1].read_bytes() + b"\xff\xff\xff"), "give its bytes: base64.urlsafe_b64decode(image)"),
        (str(tmp_path), "is a folder, not an image; give its images: sorted(glob.glob("),
        (str(tmp_path / "*.png"), "is a glob, not an image; give its images: sorted(glob.glob("),
    ]  # fmt: skip
    mixed: list[tuple[Any, str]] = [broken[0], (photos[0], ""), (photos[1], ""), *broken[1:], (photos[2], "")]
    predictions = captioner([image for image, _ in mixed])
    assert len(predictions) == len(mixed)
    for (image, reason), prediction in zip(mixed, predictions, strict=True):
        if reason:
            assert (prediction.text, prediction.score) == ("", None) and reason in prediction.error
        else:
            assert (prediction.text, prediction.error) == (alone[image], "")
    assert captioner("nowhere.jpg").error == "nowhere.jpg does not exist"
    assert captioner(b"").error == "the image is not a usable image: it is empty"
    with pytest.raises(ImageError, match=r"nowhere\.jpg does not exist"):
        captioner([photos[0], "nowhere.jpg"], strict=True)


def test_a_list_keeps_its_order_and_one_image_is_one_prediction(captioner, photos):
    """Test several batches, tuples, iterators and an empty list."""
    images = [photos[n] for n in (3, 0, 2, 1, 0, 3, 1)]
    expected = [(image, captioner(image).text) for image in images]
    assert len({text for _, text in expected}) > 1
    for many in (images, tuple(images), iter(images)):
        assert [(p.image, p.text) for p in captioner(many)] == expected
    assert captioner([]) == [] and len(captioner(images[:1])) == 1


def test_a_stream_reads_a_batch_ahead_and_no_more(captioner, photos):
    """The images may come from an endless iterable. An error of the iterable is raised after the predictions before it."""
    read = itertools.count()
    stream = captioner.stream(photos[next(read) % 4] for _ in itertools.repeat(None))
    assert [next(stream).image for _ in range(7)] == [photos[n % 4] for n in range(7)]
    assert next(read) <= 12  # three batches, and one ahead
    stream.close()

    def failing() -> Any:
        yield from photos
        raise OSError("the source is gone")

    received, stream = [], captioner.stream(failing())
    with pytest.raises(OSError, match="the source is gone"):
        while True:
            received.append(next(stream).image)
    assert received == photos


def test_an_iterator_may_write_each_image_into_the_same_object(captioner, photos):
    """A video reader reuses its array, and the frames of an animation are one PIL image. Each has its own caption."""
    frames = [Image.open(photo).convert("RGB").resize((96, 96)).quantize(64) for photo in photos]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])

    def frame(number: int) -> Image.Image:
        animation = Image.open(io.BytesIO(buffer.getvalue()))
        animation.seek(number)
        return animation.convert("RGB")

    def reused(kind: Any) -> Any:
        array = np.zeros((96, 96, 3), np.uint8)
        image = kind(array)
        for number in range(4):
            array[:] = np.asarray(frame(number))
            yield image

    expected = [captioner(frame(number)).text for number in range(4)]
    assert len(set(expected)) > 1
    for kind in (np.asarray, lambda array: torch.from_numpy(array).permute(2, 0, 1)):
        assert [p.text for p in captioner(reused(kind))] == expected
        assert [p.text for p in captioner.stream(reused(kind))] == expected
    animation = ImageSequence.Iterator(Image.open(io.BytesIO(buffer.getvalue())))
    assert [p.text for p in captioner(animation)] == expected


def test_threads_that_share_an_image_use_its_orientation(monkeypatch):
    """Pillow parses EXIF at its first use. A second thread must not see the image without its EXIF meanwhile."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(buffer, "JPEG", exif=exif)
    image, load = Image.open(buffer), Image.Exif.load

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        load(*arguments)

    monkeypatch.setattr(Image.Exif, "load", slow)
    with ThreadPoolExecutor(4) as pool:
        assert {each.size for each in pool.map(lambda _: open_input(image, "image"), range(4))} == {(20, 40)}


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_a_score_is_that_of_transformers(make, photos, kind, beams, monkeypatch):
    """The oracle is exp(mean log p) of the transition scores of `generate`, or exp of its `sequences_scores` for beams."""
    backbone = make(kind)
    task = CaptionTask(backbone, "", Generation(max_new_tokens=6, num_beams=beams))
    predictions = Captioner(task)(photos)
    outputs: list[Any] = []
    model = backbone.model.text_decoder if kind == "blip" else backbone.model.language_model
    real = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        outputs.append(real(*args, **kwargs | {"output_scores": True}))
        return outputs[-1]

    monkeypatch.setattr(model, "generate", generate)
    assert Captioner(task)(photos) == predictions
    (output,) = outputs
    indices = getattr(output, "beam_indices", None)
    transitions = model.compute_transition_scores(output.sequences, output.scores, indices, normalize_logits=beams == 1)
    new = output.sequences[:, -transitions.shape[1] :]
    for row, prediction in enumerate(predictions):
        ends = (new[row] == task.language.end_id).nonzero()
        length = int(ends[0]) + 1 if len(ends) else new.shape[1]
        assert prediction.score == pytest.approx(float(transitions[row, :length].mean().exp()), rel=1e-4)
        if beams > 1:
            assert prediction.score == pytest.approx(float(output.sequences_scores[row].exp()), rel=1e-4)
    assert len({p.score for p in predictions}) > 1


def test_computing_scores_changes_no_text(make, photos):
    """The generated texts are the same with and without scores."""
    task = CaptionTask(make("blip"), "", FEW)
    pixels = torch.stack([task.backbone.image_processor(Image.open(p), return_tensors="pt")["pixel_values"][0] for p in photos])
    examples = [example_of(photo) for photo in photos]
    assert [text for ((text, _),) in task.predict_scored(pixels, examples)] == task.predict(pixels, examples)


# ---------------------------------------------------------------- questions and rankings


def test_questions_and_images_are_paired(make, photos):
    """One question for all images, several for one image, and one for each image give the answers of single calls."""
    captioner = Captioner(TASKS["vqa"](make("vqa"), "", FEW), batch_size=3)
    alone = {(image, q): captioner.answer(image, q).text for image in photos[:2] for q in QUESTIONS}
    for images, questions, pairs in (
        (photos[:2], QUESTIONS[0], [(photos[0], QUESTIONS[0]), (photos[1], QUESTIONS[0])]),
        (photos[0], QUESTIONS, [(photos[0], QUESTIONS[0]), (photos[0], QUESTIONS[1])]),
        (photos[:2], QUESTIONS, list(zip(photos[:2], QUESTIONS, strict=True))),
    ):
        predictions = captioner.answer(images, questions)
        assert [(p.image, p.question) for p in predictions] == pairs and [p.text for p in predictions] == [
            alone[pair] for pair in pairs
        ]
    with pytest.raises(InputError, match="2 images and 3 questions"):
        captioner.answer(photos[:2], [*QUESTIONS, "why?"])
    with pytest.raises(InputError, match=r"questions\[1\] is ''"):
        captioner.answer(photos[0], [QUESTIONS[0], ""])
    long = "what is " + "a cube and " * 100 + "?"
    predictions = captioner.answer(photos[0], [QUESTIONS[0], long])
    assert predictions[0].text == alone[photos[0], QUESTIONS[0]] and "too many tokens" in predictions[1].error
    ranked = captioner.rank(photos[0], ["red", "blue", "red"], question=QUESTIONS[1])
    assert sorted(text for text, _ in ranked.ranking) == ["blue", "red"]


@pytest.mark.parametrize("kind", ["blip", "itm", "itm2"])
def test_a_ranking_is_a_distribution_with_the_best_text_first(make, photos, kind):
    """The ranking equals that of the task's `rank`, for any batch."""
    name = "caption" if kind == "blip" else "retrieval"
    captioner = Captioner(TASKS[name](make(kind)), batch_size=3)
    texts = ["a red cube", "a single blue cube on top of the table", "nothing"]
    for image, prediction in zip(photos, captioner.rank(photos, texts), strict=True):
        chances = [chance for _, chance in prediction.ranking]
        assert sum(chances) == pytest.approx(1) and chances == sorted(chances, reverse=True)
        assert prediction.score == chances[0] and prediction.text == prediction.ranking[0][0]
        assert sorted(text for text, _ in prediction.ranking) == sorted(texts)
        alone = captioner.rank(image, texts)
        assert dict(alone.ranking) == pytest.approx(dict(prediction.ranking), rel=1e-4)
    for wrong, message in (
        ("a red cube", "give a list"),
        ([], "texts is empty"),
        (["a", 3], r"texts\[1\] is 3: expected a text"),
    ):
        with pytest.raises(InputError, match=message):
            captioner.rank(photos[0], wrong)
    with pytest.raises(InputError, match=r"uses no question; call captioner\.rank"):
        captioner.rank(photos[0], texts, question="what?")


@pytest.mark.parametrize(
    ("kind", "task", "call", "right"),
    [
        ("vqa", "vqa", lambda c: c("a.png"), r"answers questions; call captioner\.answer\(image, "),
        ("itm", "retrieval", lambda c: c("a.png"), r"ranks texts; call captioner\.rank\(image, \["),
        ("blip", "caption", lambda c: c.answer("a.png", "what?"), r"captions images; call captioner\(image\)"),
        ("itm", "retrieval", lambda c: c.answer("a.png", "what?"), r"ranks texts; call captioner\.rank\(image, \["),
        ("blip", "caption", lambda c: list(c.stream(["a.png"], question="what?")), r"captions images; call captioner\(image\)"),
        ("vqa", "vqa", lambda c: c.rank("a.png", ["red"]), r".* it ranks answers; give their question: captioner\.rank\("),
    ],
)
def test_a_method_of_another_task_names_the_right_one(make, kind, task, call, right):
    with pytest.raises(InputError, match=f"this model {right}"):
        call(Captioner(TASKS[task](make(kind))))


# ---------------------------------------------------------------- adapters, bases, threads


def test_base_none_is_the_base_of_the_adapter(workplace):
    """A service passes `base=settings.get("base")`, which is None if the setting is missing."""
    captioner = lora_blip.Captioner.from_adapter(workplace / "adapter1", base=None)
    assert captioner.backbone.name == captioner.adapter.base
    with pytest.raises(InputError, match="base is empty"):
        lora_blip.Captioner.from_adapter(None, base=None)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    make_workplace(folder)
    for seed in (1, 2):
        save_adapter(folder / f"adapter{seed}" / "adapter.safetensors", seed, size=0.1)
    return folder


def test_an_adapter_predicts_what_infer_writes(workplace, monkeypatch):
    """A run folder, its file and "latest" give the texts of predictions.jsonl, merged or with hooks."""
    monkeypatch.chdir(workplace)
    run = Path("lora_blip_output", "caption_tiny-blip_vit")
    predictions_file = lora_blip.infer(
        lora_blip.InferConfig(adapter=str(run), images="image_test", output_dir=f"out{run.name}")
    )
    lines = [json.loads(line) for line in predictions_file.read_text(encoding="utf-8").splitlines()]
    assert {tuple(line) for line in lines} == {("image", "text")}  # a score would be another format
    for adapter, merge in ((run, True), ("latest", True), (str(run / "adapter.safetensors"), False)):
        captioner = Captioner.from_adapter(adapter, merge=merge)
        predictions = captioner([line["image"] for line in lines])
        assert [p.text for p in predictions] == [line["text"] for line in lines]
        assert bool(attached.names(captioner.backbone.model)) is not merge
        assert str(run) in repr(captioner) and captioner.task == "caption" and captioner.device == captioner.backbone.device


@pytest.mark.parametrize("fast", [True, False])
def test_an_adapter_whose_forward_was_edited_predicts_with_it(workplace, monkeypatch, capsys, fast):
    """Before, `infer`, `evaluate` and `Captioner` merged ΔW without a warning: the texts of an update that was not trained."""

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(LoRA, "forward", with_relu)
    images = sorted(str(path) for path in Path("image_test").iterdir())[:4]
    expected = Captioner.from_adapter("adapter1", merge=False, fast=False)(images)
    capsys.readouterr()
    captioner = Captioner.from_adapter("adapter1", fast=fast)
    warning = "adds something other than ΔW x"
    assert warning in capsys.readouterr().out and attached.names(captioner.backbone.model) == ["default"]
    assert [p.text for p in captioner(images)] == [p.text for p in expected]
    torch.testing.assert_close([p.score for p in captioner(images)], [p.score for p in expected], rtol=1e-4, atol=1e-4)
    merged = [p.score for p in Captioner.from_adapter(None, base=captioner.backbone.name, fast=False)(images)]
    assert merged != pytest.approx([p.score for p in expected], rel=1e-3)  # the update is large enough to be seen
    predictions = lora_blip.infer(
        lora_blip.InferConfig(adapter="adapter1", images="image_test", output_dir=f"out-edit-{fast}", fast=fast)
    )
    texts = {line["image"]: line["text"] for line in map(json.loads, predictions.read_text(encoding="utf-8").splitlines())}
    assert warning in capsys.readouterr().out and [texts[image] for image in images] == [p.text for p in expected]


def test_a_model_of_transformers_predicts_as_its_folder_does(workplace, monkeypatch):
    """The captioner does not change the weights, classes and image processor. Its adapter is active only in the captioner."""
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    monkeypatch.chdir(workplace)
    base = str(workplace / "assets" / "tiny-blip")
    model = BlipForConditionalGeneration.from_pretrained(base)
    image_processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    image_processor.size = {"height": 48, "width": 48}
    processor = type("Processor", (), {"tokenizer": AutoTokenizer.from_pretrained(base), "image_processor": image_processor})()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    images = ["image_test/000.png", "image_test/001.png"]
    for adapter in (None, Path("adapter1")):
        expected = Captioner.from_adapter(adapter, base=base if adapter is None else "", fast=False)(images)
        predictions = Captioner.from_adapter(adapter, base=model, processor=processor)(images)
        assert [p.text for p in predictions] == [p.text for p in expected]
        # transformers keeps the 16-bit weights of the file, and a processor with fp16 instructions rounds more
        assert [p.score for p in predictions] == pytest.approx([p.score for p in expected], rel=5e-3)
    assert dict(image_processor.size) == {"height": 48, "width": 48}
    lora_blip.eject(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert as_backbone(model, processor).image_size == 96


def test_captioners_share_a_base_and_each_has_its_own_adapter(workplace, monkeypatch):
    """The results equal those on separate bases. An adapter is loaded once. adapter=None uses the adapters of the caller."""
    monkeypatch.chdir(workplace)
    images = [f"image_test/{n:03}.png" for n in range(4)]
    paths = ["adapter1", "adapter2", "lora_blip_output"]
    separate = [[p.text for p in Captioner.from_adapter(path, merge=False)(images)] for path in paths]
    assert len(set(map(tuple, separate))) == 3
    base = load_backbone("assets/tiny-blip", "cpu")
    plain = Captioner.from_adapter(None, base=base)
    alone = [p.text for p in plain(images)]
    captioners = [Captioner.from_adapter(path, base=base) for path in paths]
    again = Captioner.from_adapter(paths[0], base=base)
    assert len(attached.names(base.model)) == 3 and again.adapter_name == captioners[0].adapter_name
    assert [[p.text for p in captioner(images)] for captioner in captioners] == separate
    assert [p.text for p in plain(images)] == alone
    lora_blip.load_adapter(base, paths[1], name="mine")
    assert [p.text for p in plain(images)] == separate[1]


def test_a_captioner_changes_nothing_in_the_callers_use_of_the_base(workplace, monkeypatch):
    """A captioner changes no output, gradient, state_dict, trained parameter or mode of the base. Test a copy and a merge."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    model, x = base.model, torch.randn(1, 3, 96, 96)
    model.vision_model.requires_grad_(True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.vision_model(x).last_hidden_state
    captioner = Captioner.from_adapter("adapter1", base=base)
    text = captioner("image_test/000.png").text
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each.vision_model(x).last_hidden_state, expected)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    assert captioner("image_test/000.png").text == text
    model.save_pretrained("saved")  # the base alone
    model.train()
    model.vision_model.eval()
    captioner("image_test/000.png")
    assert model.training and not model.vision_model.training
    model.eval()
    lora_blip.load_adapter(base, "adapter2", name="mine")
    with lora_blip.use_adapters(model, "mine"):
        alone = model.vision_model(x).last_hidden_state
    assert torch.equal(model.vision_model(x).last_hidden_state, alone) and not torch.equal(alone, expected)
    lora_blip.merge(model)
    assert torch.allclose(model.vision_model(x).last_hidden_state, alone, atol=1e-4)
    lora_blip.restore(model)
    lora_blip.bake(model)
    assert torch.allclose(model.vision_model(x).last_hidden_state, alone, atol=1e-4) and not attached.names(model)
    with pytest.raises(LoRAError, match=r"was removed from its base by lora_blip\.eject or lora_blip\.bake; open it again"):
        captioner("image_test/000.png")


def test_settings_that_a_loaded_base_does_not_have_are_errors(workplace, monkeypatch):
    """A setting that the base has is accepted."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    for settings, message in (
        ({"device": "cuda"}, r"device = 'cuda', but the loaded base is on cpu; .*load_backbone\(…, device='cuda'\)"),
        ({"device": "cpu:1"}, "device = 'cpu:1', but the loaded base is on cpu"),
        ({"image_size": 64}, r"the loaded base has images of 96 pixels; .*load_backbone\(…, image_size=64\)"),
        ({"fast": False}, r"load_backbone\(…, fast=False\)"),
        ({"base_dtype": "int8"}, r"the loaded base is in fp32; .*load_backbone\(…, dtype='int8'\)"),
        ({"base_dtype": "bf16"}, r"the loaded base is in fp32; .*load_backbone\(…, dtype='bf16'\)"),
    ):
        with pytest.raises(InputError, match=message):
            Captioner.from_adapter("adapter1", base=base, **settings)
    assert not attached.names(base.model)
    assert Captioner.from_adapter("adapter1", base=base, device="cpu", image_size=96, base_dtype="fp32").backbone is base
    other = Captioner.from_adapter("adapter1", base=load_backbone("assets/tiny-blip", "cpu", fast=False), fast=True)
    assert other.task == "caption"


def test_a_prediction_is_json_in_one_step(photos, make):
    """The keys are those of predictions.jsonl, with the score, the whole ranking, and the error."""
    captioner = Captioner(
        CaptionTask(make("blip"), "", Generation.of({"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}))
    )
    prediction = captioner(photos[0])
    value = json.loads(json.dumps(prediction.to_dict()))
    assert value["score"] == prediction.score and len(value["alternatives"]) == 2
    assert {key: each for key, each in value.items() if key != "score"} == line_of(prediction) and "ranking" not in value
    assert list(line_of(prediction, "a base")) == ["image", "text", "base_text", "alternatives"]
    texts = [f"a cube of {number}" for number in range(12)]
    ranked = captioner.rank(photos[0], texts)
    value = json.loads(json.dumps(ranked.to_dict()))
    assert [(each["text"], each["probability"]) for each in value["ranking"]] == ranked.ranking
    assert line_of(ranked)["ranking"] == value["ranking"][:10]
    assert captioner(b"broken").to_dict().keys() == {"image", "error"}


def test_after_a_fault_of_the_device_a_captioner_without_merge_still_has_its_hooks(workplace, monkeypatch):
    """The base is loaded again on the CPU. The adapter must not be merged there, because the captioner looks for its hooks."""
    monkeypatch.chdir(workplace)
    captioner = Captioner.from_adapter("adapter1", merge=False, max_new_tokens=4)
    expected = captioner("image_test/000.png").text
    assert captioner.runner.reload_on_cpu is not None
    captioner.runner.task = captioner.runner.reload_on_cpu()
    assert attached.names(captioner.backbone.model) and captioner("image_test/000.png").text == expected


def test_the_error_for_a_moved_base_names_the_adapter_and_the_argument(tmp_path):
    shutil.copytree("assets/tiny-blip", tmp_path / "base")
    path = save_adapter(tmp_path / "run" / "adapter.safetensors", base=str(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=rf"does not exist(.|\n)*The adapter {path} was trained on .*base'; .*base=PATH"):
        Captioner.from_adapter(path)
    assert Captioner.from_adapter(path, base=str(tmp_path / "moved"))("image_test/000.png").text


def test_the_hint_about_a_moved_base_is_only_for_a_base_that_is_not_found(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    with pytest.raises(ModelError, match="device 'cuda:77' cannot be used here") as error:
        Captioner.from_adapter("adapter1", device="cuda:77")
    assert "was trained on" not in str(error.value)


def test_a_base_of_another_task_names_the_setting_of_the_adapter_s_base(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    with pytest.raises(
        ConfigError, match=r"is a BlipForQuestionAnswering, but the adapter .* is for the task caption; to use the"
    ):
        Captioner.from_adapter("adapter1", base="assets/tiny-blip-vqa")


def test_the_fast_path_is_checked_once_for_all_merged_adapters_of_a_base(workplace, monkeypatch, tmp_path, capsys):
    """Before, each merged adapter was another base, and the check of a large one takes many seconds."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_blip.tasks.verification_record.is_verified", is_verified)  # conftest.py has replaced it
    checks = []
    for adapter in ("adapter1", "adapter2"):
        assert Captioner.from_adapter(adapter, device="cpu")("image_test/000.png").text
        checks.append(capsys.readouterr().err.count("comparing the fast path"))
    assert checks == [1, 0]


def test_a_task_that_the_base_of_the_adapter_cannot_do_names_that_of_the_adapter(workplace, monkeypatch):
    """Before, the message asked for another base, and with that base, the next message asked for the first one."""
    monkeypatch.chdir(workplace)
    path = save_adapter(workplace / "answers" / "adapter.safetensors", base="assets/tiny-blip-vqa", name="vqa")
    fix = r'set TASK = "auto" \(--task auto; in Python: task="auto"\)'
    with pytest.raises(ConfigError, match=f"is for the task vqa; {fix}") as error:
        Captioner.from_adapter(path, task="caption")
    assert str(error.value).startswith("TASK = 'caption', but the adapter ")
    assert Captioner.from_adapter(path).task == "vqa"


def test_a_captioner_that_is_sent_to_another_process_is_an_error_with_the_fix(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    captioner = Captioner.from_adapter("adapter1")
    for send in (pickle.dumps, copy.deepcopy):
        with pytest.raises(ModelError, match="cannot be sent to another process or copied; open it in each process"):
            send(captioner)


def test_a_model_of_peft_as_base_gives_the_call_that_merges_it():
    model = get_peft_model(load_backbone("assets/tiny-blip", "cpu").model, LoraConfig(target_modules=["qkv"]))
    with pytest.raises(
        InputError, match=r"PeftModel; give base=model\.unload\(\) for the base alone, or base=model\.merge_and"
    ):
        Captioner.from_adapter(None, base=model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_captioner_from_before_a_fork_raises_an_error_instead_of_waiting(workplace, monkeypatch):
    """With several threads of PyTorch, a forked process waits forever. Each kind of call raises the error."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    captioner = Captioner.from_adapter("adapter1", base=base, max_new_tokens=4)
    calls = (
        lambda: captioner("image_test/000.png"),
        lambda: list(captioner.stream(["image_test/000.png"])),
        lambda: captioner.rank("image_test/000.png", ["a", "b"]),
        lambda: Captioner.from_adapter("adapter2", base=base),
    )
    for call in calls:
        if not (child := os.fork()):
            with suppress(BaseException):
                with pytest.raises(ModelError, match=r"opened before a fork.*gunicorn: without --preload"):
                    call()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert captioner("image_test/000.png").text


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["tensor", "array", "float16"])
def test_an_image_with_nan_keeps_its_position_and_the_others_are_captioned(workplace, monkeypatch, value, kind):
    """Damaged data, such as a frame of a depth camera, does not stop a list or a stream."""
    monkeypatch.chdir(workplace)
    captioner = Captioner.from_adapter("adapter1", max_new_tokens=4)
    image: Any = torch.full((3, 8, 8), 0.5)
    image[1, 2, 3] = value
    image = {"tensor": image, "array": image.permute(1, 2, 0).numpy(), "float16": image.half()}[kind]
    for predictions in (captioner(["image_test/000.png", image]), list(captioner.stream(["image_test/000.png", image]))):
        assert predictions[0].text and not predictions[0].error and not predictions[1].text
        assert predictions[1].error == "images[1] contains NaN or infinity; a float image has values from 0 to 1"
    with pytest.raises(ImageError, match="contains NaN or infinity"):
        captioner(image, strict=True)


def test_a_file_that_is_open_for_text_is_an_error_with_the_fix(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    captioner = Captioner.from_adapter("adapter1", max_new_tokens=4)
    with (
        open("image_test/000.png", encoding="utf-8") as file,  # noqa: PTH123
        pytest.raises(InputError, match=r'read\(\) returns str; open it for bytes: open\(path, "rb"\)'),
    ):
        captioner(file)  # type: ignore[call-overload]


def test_strict_is_a_truth_value(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    captioner = Captioner.from_adapter("adapter1", max_new_tokens=4)
    with pytest.raises(InputError, match="strict = 'no'; expected True or False"):
        captioner("image_test/000.png", strict="no")  # type: ignore[call-overload]


def test_a_compiled_or_parallel_model_as_base_names_the_model_inside():
    model = load_backbone("assets/tiny-blip", "cpu").model
    for wrapped, inner in ((torch.compile(model), "_orig_mod"), (torch.nn.DataParallel(model), "module")):
        with pytest.raises(InputError, match=rf"; give base=model\.{inner}$"):
            Captioner.from_adapter(None, base=wrapped)


POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import lora_blip

torch.set_num_threads(2)

def open_captioner():
    global captioner
    captioner = lora_blip.Captioner.from_adapter("adapter1", max_new_tokens=4)

def caption(image):
    return captioner(image).text

if __name__ == "__main__":
    open_captioner()
    expected = caption("image_test/000.png")  # the threads of OpenMP now exist in this process
    torch.ones(1000, 1000) @ torch.ones(1000, 1000)
    with ProcessPoolExecutor(2, initializer=open_captioner) as pool:
        assert list(pool.map(caption, ["image_test/000.png"] * 4)) == [expected] * 4
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_captioner_opens_in_a_process_that_was_forked_after_another_one_was_used(workplace):
    """The threads of OpenMP do not exist in the child, so it uses one thread, and reports it. Otherwise it waits forever."""
    (workplace / "pool.py").write_text(POOL, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(lora_blip.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "pool.py"]
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: this process was forked from one that had loaded a model") == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_a_precision_that_does_not_fit_a_loaded_base_is_an_error_before_the_first_prediction(dtype, precision):
    backbone = load_backbone("assets/tiny-blip", "cpu")
    backbone.model.to(dtype)
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    if wanted and dtype not in (torch.float32, wanted):
        with pytest.raises(InputError, match=rf"precision = '{precision}', but the loaded base is in {str(dtype)[6:]}; leave"):
            Captioner.from_adapter(None, base=backbone, precision=precision)
    else:
        captioner = Captioner.from_adapter(None, base=backbone, precision=precision, max_new_tokens=4)
        assert captioner("image_test/000.png").text


def test_nothing_is_printed_on_stdout(workplace, monkeypatch, capsys):
    """A program may write its results there. The check of the fast path is reported on stderr."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("lora_blip.tasks.verification_record.is_verified", lambda _: False)
    captioner = Captioner.from_adapter("adapter1", max_new_tokens=4)
    capsys.readouterr()
    captioner(["image_test/000.png", b"broken"])
    printed = capsys.readouterr()
    assert not printed.out and "comparing the fast path" in printed.err


def test_operations_under_a_captioner_say_what_holds_the_adapter(workplace, monkeypatch):
    """Each error names the captioner's adapter and the call that helps. No other adapter is affected."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    captioner = Captioner.from_adapter("adapter1", base=base, max_new_tokens=4)
    expected, name = captioner("image_test/000.png"), str(captioner.adapter_name)
    for operation in (
        lambda: lora_blip.inject(base, "text", name=name),
        lambda: lora_blip.load_adapter(base, "adapter2", name=name),
        lambda: lora_blip.merge(base, name),
    ):
        with pytest.raises(LoRAError, match=rf"'{name}' belongs to a Captioner on this model.*name='mine'"):
            operation()
    with pytest.raises(LoRAError, match=rf"no adapter 'default'; it has {name} \(of a Captioner\)"):
        lora_blip.eject(base, "default")
    with pytest.raises(LoRAError, match=r"type Captioner; give .* captioner\.backbone"):
        lora_blip.eject(captioner)  # type: ignore[arg-type]
    with (
        pytest.raises(LoRAError, match=rf"'{name}' belongs to a Captioner"),
        lora_blip.disable_adapters(base, name),
    ):
        pass
    with lora_blip.disable_adapters(base):  # those of the caller
        assert captioner("image_test/000.png") == expected
    lora_blip.load_adapter(base, "adapter2", name="mine")
    lora_blip.merge(base)
    with pytest.raises(LoRAError, match=r"merged into the base that this captioner uses; call lora_blip\.restore\(backbone\)"):
        captioner("image_test/000.png")
    with pytest.raises(LoRAError, match=r"merged into the base that this captioner uses"):  # when it is opened, too
        Captioner.from_adapter("adapter1", base=base)
    lora_blip.restore(base)
    assert captioner("image_test/000.png") == expected
    stream = captioner.stream(itertools.repeat("image_test/000.png"))
    next(stream)
    lora_blip.eject(base)
    again = (
        r"adapter1/adapter\.safetensors, was removed from its base by lora_blip\.eject .* open it again: lora_blip\.Captioner"
    )
    with pytest.raises(LoRAError, match=again):
        captioner("image_test/000.png")
    with pytest.raises(LoRAError, match=again):
        list(itertools.islice(stream, 40))
    assert Captioner.from_adapter("adapter1", base=base, max_new_tokens=4)("image_test/000.png") == expected
    own = Captioner.from_adapter("adapter1", merge=False)
    lora_blip.eject(own.backbone)
    with pytest.raises(LoRAError, match=again):
        own("image_test/000.png")


def test_an_adapter_is_identified_by_its_weights_and_removed_with_its_captioners(workplace, monkeypatch):
    """The adapters of deleted captioners are removed. An adapter with other weights has another name."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    content = adapter_file.read("adapter1/adapter.safetensors")
    first = Captioner.from_adapter(content, base=base)
    for factor in (2, 3, 4):
        other: Any = None  # delete the captioner of the last iteration
        scaled = {key: value * factor if key.endswith("B") else value for key, value in content.tensors.items()}
        other = Captioner.from_adapter(replace(content, tensors=scaled), base=base)
        assert other.adapter_name != first.adapter_name and len(attached.names(base.model)) == 2
        lora = attached.adapters(base.model, str(other.adapter_name))
        assert all(torch.equal(each.B, scaled[f"{address}.lora_B"]) for address, each in lora.items())
    del other
    (last,) = set(attached.names(base.model)) - {first.adapter_name}
    lora_blip.eject(base, last)
    lora_blip.load_adapter(base, content, name=last)  # an adapter of the caller, which is active
    x = torch.randn(1, 3, 96, 96)
    with lora_blip.use_adapters(base, last):
        expected = base.model.vision_model(x).last_hidden_state
    assert torch.equal(base.model.vision_model(x).last_hidden_state, expected)


def test_a_captioner_with_a_part_of_its_adapter_is_an_error(make, photos, tmp_path):
    """`eject` and `bake` of a part of the model take a part of the adapter off."""
    source, backbone = make("blip"), make("blip")
    for lora in lora_blip.inject(source, "vit,text").values():
        torch.nn.init.normal_(lora.B, std=0.1)
    adapter = adapter_file.read(lora_blip.save_adapter(tmp_path / "adapter.safetensors", source, task={"name": "caption"}))
    first = Captioner.from_adapter(adapter, base=backbone, max_new_tokens=4)
    expected = first(photos[0])
    lora_blip.eject(backbone.model.vision_model)
    with pytest.raises(LoRAError, match="was removed from its base"):
        first(photos[0])
    assert Captioner.from_adapter(adapter, base=backbone, max_new_tokens=4)(photos[0]) == expected


def test_a_captioner_never_gets_the_adapter_of_a_later_one(workplace, monkeypatch):
    """After `eject`, the next captioner has a new name. The deletion of the first one does not take its adapter off."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    first = Captioner.from_adapter("adapter1", base=base, max_new_tokens=4)
    lora_blip.eject(base)
    second = Captioner.from_adapter("adapter2", base=base, max_new_tokens=4)
    expected = second("image_test/000.png")
    with pytest.raises(LoRAError, match=r"was removed from its base by lora_blip\.eject"):
        first("image_test/000.png")
    del first
    Captioner.from_adapter("adapter1", base=base)
    assert second("image_test/000.png") == expected


def test_eight_threads_with_a_broken_image_and_several_adapters(workplace, monkeypatch):
    """Each thread gets the results of a single thread, from captioners on one base and on separate bases."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    some: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 6}
    captioners = [Captioner.from_adapter(path, base=base, **some) for path in ("adapter1", "adapter2", None)]
    captioners.append(Captioner.from_adapter("adapter1", **some))
    images = ["image_test/000.png", b"broken", "image_test/001.png", Image.open("image_test/002.png")]
    expected = [[(p.text, p.error) for p in captioner(images)] for captioner in captioners]
    assert len({tuple(each) for each in expected}) == 3 and all(each[1][1] and not each[0][1] for each in expected)

    def work(thread: int) -> bool:
        number = thread % len(captioners)
        results = [[(p.text, p.error) for p in captioners[number](images)] for _ in range(2)]
        results += [[(p.text, p.error) for p in map(captioners[number], images)]]
        return all(
            [text for text, _ in each] == [text for text, _ in expected[number]] and bool(each[1][1]) for each in results
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))

    async def tasks() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(captioners[n % 4], images) for n in range(8)))

    for number, results in enumerate(asyncio.run(tasks())):
        assert [(p.text, p.error) for p in results] == expected[number % 4]


def test_adapters_may_change_while_other_threads_predict(workplace, monkeypatch):
    """Each batch is computed before or after a change of the model, not during it. Own adapters act for the base alone."""
    monkeypatch.chdir(workplace)
    base = load_backbone("assets/tiny-blip", "cpu")
    some: dict[str, Any] = {"base": base, "batch_size": 2, "max_new_tokens": 6}
    adapted, plain = Captioner.from_adapter("adapter1", **some), Captioner.from_adapter(None, **some)
    images = ["image_test/000.png", "image_test/001.png"]
    results = lambda captioner: [(p.text, p.score) for p in captioner(images)]  # noqa: E731
    expected, of_base = results(adapted), results(plain)
    lora_blip.load_adapter(base, "adapter2", name="own")
    of_own = results(plain)
    lora_blip.merge(base, "own")
    of_merged = results(plain)
    lora_blip.eject(base, "own")
    stop, others, merged, found = threading.Event(), [], 0, set[Any]()

    def predict(captioner: Captioner, allowed: list[Any]) -> None:
        nonlocal merged
        while not stop.is_set():
            try:
                found.add(str(result := results(captioner)))
                others.extend([result] * (result not in allowed))
            except LoRAError as error:
                assert captioner is adapted and "an adapter is merged into the base" in str(error)
                merged += 1

    with ThreadPoolExecutor(3) as pool:
        threads = [pool.submit(predict, adapted, [expected])]
        threads += [pool.submit(predict, plain, [of_base, of_own, of_merged]) for _ in range(2)]
        try:
            until = time.monotonic() + 6
            while time.monotonic() < until:
                lora_blip.load_adapter(base, "adapter2", name="own")
                lora_blip.merge(base, "own")
                lora_blip.restore(base)
                lora_blip.inject(base, "text", name="new")
                lora_blip.eject(base, "own")
                lora_blip.eject(base, "new")
        finally:
            stop.set()
        for thread in threads:
            thread.result()
    assert not others and len(found) > 2 and results(adapted) == expected and results(plain) == of_base


def test_threads_may_open_bases_at_the_same_time(checkpoints):
    """transformers changes the whole process while it loads. Two loads at a time left tied weights out, in later loads too."""
    names = [str(checkpoints[kind]) for kind in ("blip", "vqa", "opt")] * 5
    with ThreadPoolExecutor(8) as pool:
        backbones = list(pool.map(lambda name: load_backbone(name, "cpu"), names))
    for name, backbone in zip(names, backbones, strict=True):
        alone = load_backbone(name, "cpu").model.state_dict()
        assert all(torch.equal(value, alone[key]) for key, value in backbone.model.state_dict().items())


def test_a_load_waits_for_transformers_in_another_thread_and_names_a_lasting_fault(checkpoints, monkeypatch):
    """`from_pretrained` of transformers turns `tie_weights` off. Two at the same time leave it off."""
    loading = threading.Event()

    def load() -> None:
        with no_tie_weights():
            loading.set()
            time.sleep(0.3)

    thread = threading.Thread(target=load)
    thread.start()
    assert loading.wait(10) and load_backbone(str(checkpoints["blip"]), "cpu")
    thread.join()
    monkeypatch.setattr(library, "LONGEST_WAIT", 0.0)
    for _ in range(2):  # the lock is released
        with no_tie_weights(), pytest.raises(ModelError, match=r"two threads .*: start the program again, and load models one"):
            load_backbone(str(checkpoints["blip"]), "cpu")
    assert load_backbone(str(checkpoints["blip"]), "cpu")


WRONG_TEXTS = (["a", 5], [["a"], "b"], [{}], {"a": 1}, None, [None], "one text")


@pytest.mark.parametrize("texts", WRONG_TEXTS, ids=repr)
def test_wrong_types_of_texts_and_questions_are_input_errors(make, photos, texts):
    """A client of a service can send any JSON."""
    vqa = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    with pytest.raises(InputError, match="texts"):
        vqa.rank(photos[0], texts, question="what?")
    for question in (5, True, ["x"], {"a": 1}, b"x", None):
        with pytest.raises(InputError, match="the question is of type"):
            vqa.rank(photos[0], ["a", "b"], question=question)
        with pytest.raises(InputError, match="the question is of type"):
            next(vqa.stream(photos, question=question))
    with pytest.raises(InputError, match="the question is of type dict"):
        vqa.answer(photos[0], {"what?": 1})
    for text in (b"what?", bytearray(b"x")):  # Python iterates over the numbers of bytes
        with pytest.raises(InputError, match="texts is "):
            vqa.rank(photos[0], text, question="what?")
    with pytest.raises(InputError, match="the question is of type bytes"):
        vqa.answer(photos[0], b"what?")
    with pytest.raises(InputError, match="2 images and 1 question; give one question as a text, or a list with one question"):
        vqa.answer(photos[:2], ["what?"])


def test_errors_do_not_repeat_a_long_input(captioner, workplace, monkeypatch):
    monkeypatch.chdir(workplace.parents[2])
    for image in ("z" * 10_000, "z/" * 5000, f"http://{'z' * 10_000}"):
        assert 20 < len(captioner(image).error) < 400
    long = "z" * 10_000
    calls: list[Any] = [
        lambda: captioner.rank("a.png", long), lambda: captioner.rank("a.png", int("9" * 4000)),
        lambda: Captioner.from_adapter(long), lambda: Captioner.from_adapter("z" * 300), lambda: load_backbone("z" * 300),
        lambda: Captioner.from_adapter(None, base=long),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(lora_blip.LoraBlipError) as raised:
            call()
        assert len(str(raised.value)) < 400


def test_a_base_with_weights_on_the_meta_device_is_refused(make):
    """transformers leaves them there if two threads load at the same time. The texts would be random."""
    backbone = make("blip")
    head = backbone.model.text_decoder.cls.predictions.decoder
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight, device="meta"))
    with pytest.raises(InputError, match=r"decoder.weight' of the loaded base has no values"):
        Captioner.from_adapter(None, base=backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["blip", "vqa", "itm", "opt", "t5"])
def test_predictions_do_not_depend_on_the_default_dtype(make, photos, kind, dtype):
    """It is that of the whole process, and transformers changes it while another thread loads a base in 16 bits."""
    captioner = Captioner(TASKS[default_task(make(kind).architecture)](make(kind)), batch_size=2)

    def results() -> list[Any]:
        question = {"question": QUESTIONS[0]} if kind == "vqa" else {}
        ranked = captioner.rank(photos, ["a red cube", "a blue cube"], **question)
        written = captioner.answer(photos, QUESTIONS[0]) if kind == "vqa" else [] if kind == "itm" else captioner(photos)
        return [(each.text, each.score, each.ranking) for each in (*ranked, *written)]

    expected, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert results() == expected
    finally:
        torch.set_default_dtype(before)


def test_the_temperature_of_a_new_task_is_float32(make):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert TASKS["retrieval"](make("itm")).log_temperature.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


HALF = "a red \ud83d cube"  # json.loads accepts half of a surrogate pair


def test_a_text_with_half_of_a_character_is_an_error_with_its_position(make, photos):
    """A question has it in `error`, and the other questions are answered. A text, a prompt and a path are errors too."""
    vqa = Captioner(TASKS["vqa"](make("vqa"), "", FEW))
    first, second = vqa.answer(photos[0], ["what is it?", HALF])
    assert first.text and not first.error and "contains '\\ud83d', which is half of a character" in second.error
    with pytest.raises(InputError, match=r"the question cannot be used: .* half of a character"):
        vqa.rank(photos[0], ["a", "b"], question=HALF)
    for kind in ("blip", "vqa", "itm", "opt", "t5"):
        ranker = Captioner(TASKS[default_task(make(kind).architecture)](make(kind)))
        with pytest.raises(InputError, match=r"texts\[1\] is .* half of a character"):
            ranker.rank(photos[0], ["a cube", HALF], question="what?" if kind == "vqa" else "")
    with pytest.raises(ConfigError, match=r"prompt = .* half of a character"):
        CaptionTask(make("blip"), HALF, FEW)
    assert "half of a character" in vqa.answer("a\ud800.png", "what is it?").error
    assert "half of a character" in vqa.answer(photos[0], "\ud83d").error  # and not an unknown token, with another fix


def test_a_long_text_is_shortened_in_the_error(make, photos):
    with pytest.raises(InputError) as raised:
        Captioner(CaptionTask(make("blip"))).rank(photos[0], ["a cube", "cube " * 3000])
    assert "has room for" in str(raised.value) and len(str(raised.value)) < 400


def test_the_name_of_the_adapter_cannot_be_empty(workplace, monkeypatch):
    """An empty path is the current folder for Python, so any adapter below it would be used."""
    monkeypatch.chdir(workplace.parent)
    with pytest.raises(AdapterError, match="the path of the adapter is empty"):
        Captioner.from_adapter("")


def test_a_model_in_training_stays_in_training(make, photos):
    """Captions within a training loop are generated without dropout, and the mode is the same afterwards."""
    backbone = carry(make("blip"), dropout=0.5)
    captioner = Captioner(CaptionTask(backbone, "", FEW))
    expected = captioner(photos)
    backbone.model.train()
    assert captioner(photos) == expected and backbone.model.training


def test_unknown_tokens_of_questions_and_texts_are_printed_once_with_their_number(make, capsys):
    """Before, only `infer` printed them; `ask`, `rank` and a service lost a part of the question silently."""
    image = Image.new("RGB", (30, 30), "red")
    vqa, caption = Captioner(TASKS["vqa"](make("vqa"))), Captioner(CaptionTask(make("blip")))
    lost = "what is \N{SLIGHTLY SMILING FACE} top?"
    start = "warning: the tokenizer does not know 1 of its "
    for _ in range(2):
        assert not vqa.answer(image, [lost, "what is on top?"])[0].error
    assert (printed := capsys.readouterr().err).count("\n") == 1
    assert printed.startswith(start) and f"so they are lost: {lost!r}; a base with a byte-level" in printed
    next(vqa.stream([image], question="a \N{SLIGHTLY SMILING FACE}?"))
    caption.rank(image, ["a \N{SLIGHTLY SMILING FACE} cube", "a cube"])
    vqa.rank(image, ["a \N{SLIGHTLY SMILING FACE} ball", "a cube"], question=lost)
    printed = capsys.readouterr().err
    assert [line.startswith(start) for line in printed.splitlines()] == [True] * 3
    for number in range(2 * MOST_WARNED):
        vqa.answer(image, f"what is \N{SLIGHTLY SMILING FACE} {number}?")
    assert capsys.readouterr().err.count("\n") < MOST_WARNED  # a service does not fill its log


def test_a_white_image_with_half_a_level_too_much_stays_white():
    """255.5 rounds to 256, which is 0 in a byte. The values of (levels + 0.5) / 255 reach it."""
    levels = (np.arange(256) + 0.5) / 255
    for dtype in (np.float64, np.float32):
        image = levels.astype(dtype).reshape(16, 16)
        assert image_inputs._uint8_array(image, "x").min() >= 0 and image_inputs._uint8_array(image, "x")[-1, -1] == 255


def test_a_damaged_newest_run_is_an_error_and_not_replaced_by_an_older_one(checkpoints, tmp_path, monkeypatch):
    """Otherwise a service would silently use another adapter."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        path = tmp_path / "lora_blip_output" / name / "adapter.safetensors"
        path.parent.mkdir(parents=True)
        adapter_of(checkpoints["blip"], tmp_path).rename(path)
        os.utime(path, (time.time() - 100 * age,) * 2)
    new = tmp_path / "lora_blip_output/new/adapter.safetensors"
    for task in ("vqa", "retrieval"):  # before, the caption run was opened, and answered questions
        with pytest.raises(
            AdapterError, match=rf"no run in 'lora_blip_output' is of the task {task}; .* newest run is of the task caption: "
        ):
            Captioner.from_adapter("latest", task=task, device="cpu")
    with pytest.raises(ConfigError, match="expected one of auto, caption, vqa, retrieval"):
        Captioner.from_adapter("latest", task="captions", device="cpu")
    training = tmp_path / "lora_blip_output/training/best.safetensors"  # a run that has not ended has only its best weights
    training.parent.mkdir()
    shutil.copy(new, training)
    for task in ("auto", "caption"):
        opened = Captioner.from_adapter("latest", task=task, device="cpu").adapter
        assert opened is not None and opened.path.resolve() == new
    damaged = new.read_bytes()[:1000]
    new.write_bytes(damaged)
    with pytest.raises(AdapterError, match=r"new/adapter\.safetensors"):
        Captioner.from_adapter("latest", task="caption", device="cpu")


def test_the_filters_of_the_user_for_warnings_of_pillow_come_first():
    """Before, a service that refuses large uploads by a filter accepted them after the import of the captioner."""
    code = """
import io, warnings
from PIL import Image
warnings.simplefilter("error", Image.DecompressionBombWarning)
import lora_blip
lora_blip.Captioner
upload = io.BytesIO()
Image.new("1", (10000, 10000)).save(upload, "PNG")
try:
    Image.open(upload).load()
except Image.DecompressionBombWarning:
    print("refused")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "refused"


def test_a_pipeline_as_the_base_names_its_model(make):
    from types import SimpleNamespace

    pipeline = SimpleNamespace(model=make("blip").model)
    for options in ({}, {"processor": object()}):
        with pytest.raises(InputError, match=r"base is of type SimpleNamespace; give its model: base=pipe\.model"):
            Captioner.from_adapter(None, base=pipeline, **options)


def test_a_crop_size_that_the_user_has_set_as_a_dict(workplace, monkeypatch):
    """Before, it was an AttributeError. transformers itself accepts the dict."""
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    monkeypatch.chdir(workplace)
    base = str(workplace / "assets" / "tiny-blip")
    model = BlipForConditionalGeneration.from_pretrained(base)
    texts = []
    for crop_size in ({"height": 48, "width": 48}, SizeDict(height=48, width=48)):
        image_processor = AutoImageProcessor.from_pretrained(base, backend="pil")
        image_processor.do_center_crop, image_processor.crop_size = True, crop_size
        parts = {"tokenizer": AutoTokenizer.from_pretrained(base), "image_processor": image_processor}
        processor = type("Processor", (), parts)()
        texts.append(Captioner.from_adapter(None, base=model, processor=processor)("image_test/000.png").text)
    assert texts[0] == texts[1]
