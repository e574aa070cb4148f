"""Training reports validation images that are in the training data before its first step, and changes nothing by it."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_blip.config import TrainConfig
from lora_blip.data import annotations, split_leaks, splits
from lora_blip.data.leaks import find_leaks, leak_warning
from lora_blip.data.split_leaks import Thumbnails, report_split_leaks
from lora_blip.errors import ConfigError, DataError
from lora_blip.training import setup
from lora_blip.training.learner import Learner
from lora_blip.training.loop import train
from lora_blip.training.setup import grouping_of
from tests.support.kill import killed_at, run_processes
from tests.support.runs import assert_same, metrics_of, only_run, settings


def frames(folder: Path, scenes: int, each: int) -> list[str]:
    """Scenes of random colours, with `each` frames that differ by a little noise, as in a video."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(5), []
    for scene in range(scenes):
        pixels = rng.uniform(0, 255, (24, 24, 3))
        for frame in range(each):
            names.append(f"frames/{scene:02d}_{frame:02d}.png")
            levels = (pixels + rng.uniform(-2, 2, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(levels).save(folder / names[-1])
    return names


def lines(path: Path, names: list[str], kind: str = "blip") -> Path:
    texts = [f"{number} pictures" for number in range(len(names))]
    asked = [{"question": "what is it?", "answers": [text]} if kind == "vqa" else {"text": text} for text in texts]
    path.write_text("\n".join(json.dumps({"image": name, **messages}) for name, messages in zip(names, asked, strict=True)))
    return path


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path) -> TrainConfig:
    """Two validation images of eight, of two scenes of four frames; one epoch."""
    return settings(checkpoints["blip"], lines(tmp_path / "a.jsonl", frames(tmp_path, 2, 4)), epochs=1)


@pytest.fixture
def before_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed when the first step began."""
    printed: list[str] = []
    real = Learner.begin_step

    def begin_step(learner: Learner, *rest: object) -> None:
        printed.append(capsys.readouterr().out)
        real(learner, *rest)

    monkeypatch.setattr(Learner, "begin_step", begin_step)
    return printed


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search("validation images (is|are) in the training data", line)]


@pytest.mark.parametrize("check_images", ["all", "lazy"])
def test_a_random_split_of_video_frames_is_reported_before_the_first_step(config, before_steps, check_images):
    """The warning is the one of `evaluate`, over the images of the split; the fix names the setting."""
    train(replace(config, check_images=check_images))
    sides = splits.split_by_image(annotations.read(config.annotations)[0], config.val_fraction, config.seed)
    training, validation = ([example.image for example in side] for side in sides)
    (warning,) = warnings_in(before_steps[0])
    leaks = find_leaks(sorted(validation), training)
    assert len(leaks) == 2 and warning.startswith("WARNING: 2 of 2 validation images are in the training data (2 nearly")
    assert all(str(leak) in warning for leak in leaks)
    assert leak_warning(leaks, 2, "evaluation").split(":")[0].replace("evaluation", "validation") in warning
    assert "val.jsonl, and set VAL_ANNOTATIONS to it (--val-annotations)" in warning


@pytest.mark.parametrize(
    ("kind", "how"),
    [("blip", "same path"), ("blip", "hard link"), ("blip", "other spelling"), ("vqa", "same path"), ("itm", "copy")],
)
def test_an_image_of_the_validation_file_that_is_trained_on_is_reported(checkpoints, tmp_path, before_steps, kind, how):
    """This holds for every task, and for a copy of the image with another name."""
    names = frames(tmp_path, 6, 1)
    other = {"same path": names[0], "other spelling": f"frames/../{names[0]}"}.get(how, "frames/other.png")
    if how in ("copy", "hard link"):
        (shutil.copy if how == "copy" else os.link)(tmp_path / names[0], tmp_path / other)
    source = lines(tmp_path / "a.jsonl", names[:5], kind)
    val = lines(tmp_path / "val.jsonl", [other, names[5]], kind)
    path = train(settings(checkpoints[kind], source, epochs=1, val_annotations=str(val), val_fraction=0.0))
    (warning,) = warnings_in(before_steps[0])
    assert warning.startswith("WARNING: 1 of 2 validation images is in the training data (1 same bytes)")
    assert f"Remove them from {val} or from {source}" in warning
    assert any("val_loss" in entry for entry in metrics_of(path))


def test_a_grouping_is_proposed_only_if_there_are_many_groups():
    """With few groups, the held-out ones may be all images of a class."""
    classes = [f"photos/{name}_{number:04}.jpg" for name in ("red", "blue", "green") for number in range(5)]
    assert grouping_of(classes) == grouping_of([f"{file[:-9]}/{number}.jpg" for number, file in enumerate(classes)]) == ""
    scenes = [f"photos/scene{scene}_{number:04}.jpg" for scene in range(12) for number in range(5)]
    assert grouping_of(scenes) == "r\"(.+?)_\\d+\" (--group-by '(.+?)_\\d+')"
    assert grouping_of([f"photos/{scene}/1.jpg" for scene in range(12)]) == '"folder" (--group-by folder)'
    assert grouping_of([f"photos/img_{number}.jpg" for number in range(50)]) == ""
    assert grouping_of([f"photos/cube{number}_1.jpg" for number in range(50)]) == ""  # each image is a group


def test_a_clean_split_is_not_reported_and_no_generator_moves(tmp_path, capsys):
    """Six scenes, one frame each: nothing is printed, and every global generator is as before."""
    source = lines(tmp_path / "a.jsonl", frames(tmp_path, 6, 1))
    stored = Thumbnails()
    examples, _ = annotations.read(source, on_decoded=stored.add)
    training, validation = splits.split_by_image(examples, 0.4, 0)
    capsys.readouterr()  # the table of the reading
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    report_split_leaks([e.file for e in validation], [e.file for e in training], stored, "")
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not capsys.readouterr().out and len(stored.by_file) == 6


def test_the_search_changes_no_result(config, monkeypatch):
    """The same adapter and the same metrics with and without it, and after a resume."""
    whole = train(replace(config, epochs=2))
    again = replace(config, epochs=2, output_dir=f"{config.output_dir}_again")
    with killed_at(2):
        train(again)
    resumed = train(again)
    monkeypatch.setattr(setup, "warn_of_leaks", lambda *_: None)
    without = train(replace(config, epochs=2, output_dir=f"{config.output_dir}_without"))
    assert_same(whole, without)
    assert_same(whole, resumed)


def test_a_failure_of_the_search_stops_no_training(config, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(split_leaks, "compare", fail)
    assert train(config).exists()
    assert "warning: no search for validation images in the training data (MemoryError: no room)" in capsys.readouterr().out


# ---------------------------------------------------------------- bounded time


def split_of(folder: Path, scenes: int = 10, each: int = 6) -> tuple[list[str], list[str]]:
    """The second frame of each scene is for validation."""
    files = [str(folder / name) for name in frames(folder, scenes, each)]
    return files[1::each], [file for number, file in enumerate(files) if number % each != 1]


def test_a_large_split_is_compared_in_part_and_the_number_is_printed(tmp_path, monkeypatch):
    """More pairs than the bound: a sample is compared for similar images, and all images for copies."""
    validation, training = split_of(tmp_path)
    shutil.copy(training[0], tmp_path / "frames" / "zz_copy.png")
    validation.append(str(tmp_path / "frames" / "zz_copy.png"))
    stored, messages = Thumbnails(), []
    for file in (*validation, *training):
        stored.add(file, Image.open(file))
    monkeypatch.setattr(split_leaks, "PAIRS", 3 * len(training))
    monkeypatch.setattr(split_leaks, "BLOCK", 7)
    report_split_leaks(validation, training, stored, "", messages.append)
    assert messages[0] == "comparing 3 of 11 validation images with 50 of 50 training images"
    (count,) = re.findall(r"WARNING: at least (\d) of 11 validation", messages[1])
    assert int(count) in (3, 4) and "1 same bytes" in messages[1]


def test_images_that_are_not_decoded_yet_are_compared_with_their_neighbours(tmp_path, monkeypatch):
    """If there are too many images, only those with the nearest names are decoded. Frames of one scene are reported."""
    validation, training = split_of(tmp_path)
    opened, messages, real = [], [], split_leaks.open_image
    monkeypatch.setattr(split_leaks, "open_image", lambda file: (opened.append(file), real(file))[1])
    monkeypatch.setattr(split_leaks, "DECODED", 20)
    monkeypatch.setattr(split_leaks, "SAMPLE", 4)
    monkeypatch.setattr(split_leaks, "NEIGHBOURS", 1)
    report_split_leaks(validation, training, Thumbnails(), "", messages.append)
    assert messages[0] == "comparing validation images with training images, for at most 5 s"
    assert messages[1] == "comparing 4 of 10 validation images with 8 of 50 training images (those with the nearest names)"
    assert messages[2].startswith("WARNING: at least 4 of 10 validation images") and len(opened) == 12


@pytest.mark.parametrize("decoded", [20, 2048])
def test_decoding_ends_when_its_time_is_over(tmp_path, monkeypatch, decoded):
    """The printed line contains the numbers of compared images and of all images."""
    validation, training = split_of(tmp_path)
    messages: list[str] = []
    monkeypatch.setattr(split_leaks, "DECODED", decoded)
    monkeypatch.setattr(split_leaks, "SECONDS", 0.0)
    report_split_leaks(validation, training, Thumbnails(), "", messages.append)
    assert messages[1].startswith("comparing 0 of 10 validation images with 0 of 50 training images") and len(messages) == 2


def test_an_image_that_cannot_be_read_is_left_to_training(tmp_path):
    validation, training = split_of(tmp_path, 2)
    Path(training[0]).write_bytes(b"broken")
    messages: list[str] = []
    report_split_leaks(validation, training, Thumbnails(), "the fix", messages.append)
    assert messages[1] == "comparing 2 of 2 validation images with 9 of 10 training images" and messages[2].endswith("the fix")


# ---------------------------------------------------------------- the validation file


def test_all_lines_are_trained_on_if_a_file_names_the_validation_images(checkpoints, tmp_path, capsys):
    names = frames(tmp_path, 7, 1)
    source, val = lines(tmp_path / "a.jsonl", names[:5]), lines(tmp_path / "val.jsonl", names[5:])
    config = settings(checkpoints["blip"], source, epochs=1, val_annotations=str(val), best_by="loss", val_fraction=0.0)
    with killed_at(2):
        train(config)
    assert "5 training lines, 2 validation lines" in capsys.readouterr().out
    val.rename(tmp_path / "moved.jsonl")
    path = train(replace(config, val_annotations=str(tmp_path / "moved.jsonl")))
    assert path.parent == only_run(config)
    for missing, message in (("gone.jsonl", "gone.jsonl' .*annotations do not exist"), ("", "set VAL_FRACTION")):
        with pytest.raises((ConfigError, DataError), match=message):
            train(replace(config, val_annotations=missing))


def test_of_several_processes_the_main_one_searches_and_prints(config, capfd, monkeypatch):
    """One warning; the other process keeps no thumbnails."""
    real = setup.warn_of_leaks

    def warn(*given: object) -> None:
        assert os.environ["RANK"] == "0"
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(setup, "warn_of_leaks", warn)
    assert run_processes(2, lambda: train(config)) == [0, 0]
    printed = capfd.readouterr().out
    assert len(warnings_in(printed)) == 1 and "AssertionError" not in printed
