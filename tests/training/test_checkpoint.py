"""Test checkpoint folders, and the choice of the checkpoint to resume from, without training."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_blip.config import TrainConfig
from lora_blip.data.example import Example
from lora_blip.errors import CheckpointError
from lora_blip.models.identity import processors_digest, weights_digest
from lora_blip.runtime import lock
from lora_blip.runtime.files import sha256_of
from lora_blip.training import checkpoint, resume
from lora_blip.training.checkpoint import BEST, FOLDER, STATE, TENSORS

IDENTITY = {"lr": 0.1, "batch_size": 2, "training lines": "abc"}
TENSOR = {"parameter/a": torch.arange(6.0).reshape(2, 3)}


def write(run: Path, step: int = 1, age: float = 0.0, keep: int = 2, best: Path | None = None, **identity: Any) -> Path:
    """Write a checkpoint of `run`. age: seconds since the checkpoint folder was last changed."""
    state = {"identity": {**IDENTITY, **identity}, "run": {"name": run.name}, "progress": {"epoch": 0, "step": step}}
    folder = checkpoint.write(run, step, TENSOR, state, best or run / "none", keep)
    when = 1_700_000_000 - age
    os.utime(folder.parent, (when, when))
    return folder


def find(output_dir: Path, how: str | Path = "auto", **changes: Any) -> tuple[checkpoint.Saved | None, list[str]]:
    return resume.find(TrainConfig(output_dir=str(output_dir), resume=str(how), **changes), IDENTITY)


# ---------------------------------------------------------------- which one


@pytest.mark.parametrize("newer", ["lora_a", "lora_b"])
def test_the_newest_interrupted_run_is_resumed(tmp_path, newer):
    for name in ("lora_a", "lora_b"):
        write(tmp_path / name, age=0 if name == newer else 60)
    saved, notes = find(tmp_path)
    assert saved is not None and saved.run == tmp_path / newer and notes == []


def test_the_newest_run_with_the_same_settings_is_resumed_and_the_others_are_named(tmp_path):
    write(tmp_path / "lora_same", age=60)
    write(tmp_path / "lora_older", age=90)
    write(tmp_path / "lora_changed", lr=0.5)
    for allowed in (False, True):
        saved, notes = find(tmp_path, allow_changed=allowed)
        assert saved is not None and saved.run.name == "lora_same" and notes == []
    shutil.rmtree(tmp_path / "lora_same")
    shutil.rmtree(tmp_path / "lora_older")
    write(tmp_path / "lora_changed_long_ago", age=90, lr=0.7)
    saved, notes = find(tmp_path)
    (note,) = notes
    assert saved is None and "does not resume it, because lr was 0.5 and is 0.1. To resume it" in note
    assert note.endswith(f". Older interrupted runs with other settings: {tmp_path / 'lora_changed_long_ago'}")
    saved, notes = find(tmp_path, allow_changed=True)
    assert saved is not None and saved.run.name == "lora_changed" and notes == ["continuing although lr was 0.5 and is 0.1"]


def test_a_newer_copy_of_a_run_folder_is_not_resumed(tmp_path):
    write(tmp_path / "lora_a", age=60)
    shutil.copytree(tmp_path / "lora_a", tmp_path / "backup")
    os.utime(tmp_path / "backup" / FOLDER)
    saved, _ = find(tmp_path)
    assert saved is not None and saved.run.name == "lora_a"
    shutil.rmtree(tmp_path / "lora_a")
    saved, notes = find(tmp_path)
    assert saved is None and len(notes) == 1 and "interrupted and renamed (from lora_a)" in notes[0]


def test_an_incomplete_run_folder_is_not_resumed(tmp_path):
    write(tmp_path / ".lora_a")
    assert find(tmp_path) == (None, [])


def test_resume_off_finds_no_checkpoint(tmp_path):
    write(tmp_path / "lora_a")
    assert find(tmp_path, "off") == (None, [])


def test_a_damaged_checkpoint_is_reported_and_the_checkpoint_before_it_is_resumed(tmp_path):
    older, newer = write(tmp_path / "lora_a"), write(tmp_path / "lora_a", step=2)
    (newer / TENSORS).write_bytes(b"x")
    saved, notes = find(tmp_path)
    assert saved is not None and saved.folder == older and len(notes) == 1 and f"{newer} is damaged" in notes[0]


def test_a_run_without_a_complete_checkpoint_is_reported_and_not_resumed(tmp_path):
    (write(tmp_path / "lora_a") / TENSORS).write_bytes(b"x")
    saved, notes = find(tmp_path)
    assert saved is None and len(notes) == 1 and "is damaged" in notes[0]


def test_a_path_is_resumed_if_nothing_changed_or_changes_are_allowed(tmp_path):
    older, newer = (write(tmp_path / "lora_a", step=step, lr=0.5) for step in (1, 2))
    for path, folder in ((tmp_path / "lora_a", newer), (newer, newer), (older, older)):
        with pytest.raises(CheckpointError, match=r"lr was 0\.5 and is 0\.1.*--allow-changed"):
            find(tmp_path, path)
        saved, notes = find(tmp_path, path, allow_changed=True)
        assert saved is not None and saved.folder == folder and notes == ["continuing although lr was 0.5 and is 0.1"]
    saved, notes = resume.find(TrainConfig(resume=str(older)), {**IDENTITY, "lr": 0.5})
    assert saved is not None and saved.folder == older and notes == []


def test_a_path_to_a_removed_checkpoint_gives_the_newest_of_its_run(tmp_path):
    older, newer = write(tmp_path / "lora_a", keep=1), write(tmp_path / "lora_a", step=2, keep=1)
    assert not older.exists() and checkpoint.locate(older).folder == newer
    (tmp_path / "lora_b").mkdir()
    for wrong, message in (
        (tmp_path / "lora_b", "it has no checkpoint: the run is finished"),
        (tmp_path / "lora_a" / FOLDER, "it has no checkpoint: the run is finished"),
        (tmp_path / "nowhere", "the folder does not exist"),
        (tmp_path / "nowhere" / FOLDER / "000001_step1", "the folder does not exist"),
        (tmp_path, "it has no checkpoint: the run is finished"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.locate(wrong)
    for name in (TENSORS, STATE):
        (newer / name).unlink()
    with pytest.raises(CheckpointError, match=rf"is damaged .*--resume {tmp_path / 'lora_a'} resumes from its newest"):
        checkpoint.locate(newer)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.locate(tmp_path / "lora_a")


def test_the_checkpoint_read_under_the_lock_is_the_newest_or_the_named_one(tmp_path, monkeypatch):
    """The folder of the run is locked until `held` is closed."""
    locked: list[Path] = []

    @contextmanager
    def hold(folder: Path) -> Iterator[None]:
        locked.append(folder)
        yield
        locked.remove(folder)

    monkeypatch.setattr(lock, "held", hold)
    older, newer = (write(tmp_path / "lora_a", step=step) for step in (1, 2))
    for how, folder in (("auto", newer), (older, older)):
        with ExitStack() as held:
            saved, _ = resume.acquire(TrainConfig(output_dir=str(tmp_path), resume=str(how)), IDENTITY, held)
            assert saved is not None and saved.folder == folder
            assert locked == [tmp_path / "lora_a"]
    with ExitStack() as held:
        assert resume.acquire(TrainConfig(output_dir=str(tmp_path / "none")), IDENTITY, held) == (None, []) and not locked


def test_a_run_that_another_process_has_just_finished_is_not_resumed(tmp_path, monkeypatch):
    write(tmp_path / "lora_a")
    found_before = find(tmp_path)
    checkpoint.delete_all(tmp_path / "lora_a")
    monkeypatch.setattr(resume, "find", lambda *_: found_before)
    with ExitStack() as held, pytest.raises(CheckpointError, match=r"another process has just finished .*lora_a"):
        resume.acquire(TrainConfig(output_dir=str(tmp_path)), IDENTITY, held)


# ---------------------------------------------------------------- the folders


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    """Tensors, state and best adapter are equal bit for bit. The name contains a counter and the step."""
    best = tmp_path / "best"
    best.write_bytes(b"best")
    folders = [write(tmp_path / "lora_a", step=step, keep=3, best=best if step == 7 else None) for step in (0, 7, 7, 12)]
    assert [folder.name for folder in folders] == ["000001_step0", "000002_step7", "000003_step7", "000004_step12"]
    assert sorted(path.name for path in folders[0].parent.iterdir()) == [folder.name for folder in folders[1:]]
    saved = checkpoint.read(folders[1])
    assert (
        saved.run == tmp_path / "lora_a"
        and saved.state["progress"] == {"epoch": 0, "step": 7}
        and saved.state["identity"] == IDENTITY
    )
    assert list(saved.tensors()) == list(TENSOR) and torch.equal(saved.tensors()["parameter/a"], TENSOR["parameter/a"])
    assert (folders[1] / BEST).read_bytes() == b"best" and not (folders[3] / BEST).exists()
    assert saved.state["sha256"].keys() == {TENSORS, BEST}
    checkpoint.delete_all(tmp_path / "lora_a")
    assert list((tmp_path / "lora_a").iterdir()) == [] and checkpoint.newest(tmp_path / "lora_a") == (None, [])


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    """Checkpoint 1,000,000 comes after checkpoint 999,999."""
    folder = write(tmp_path / "lora_a")
    for name in ("999999_step1", "1000000_step1"):
        shutil.copytree(folder, folder.with_name(name))
    saved, _ = checkpoint.newest(tmp_path / "lora_a")
    assert saved is not None and saved.folder.name == "1000000_step1"
    assert write(tmp_path / "lora_a", step=3, keep=9).name == "1000001_step3"


def test_other_files_among_the_checkpoints_are_left_alone(tmp_path):
    folder = write(tmp_path / "lora_a")
    for name in ("notes", "12_step3", "000009_step", "x000009_step1", "000009_step1.bak"):
        (folder.parent / name).mkdir()
    saved, wrong = checkpoint.newest(tmp_path / "lora_a")
    assert saved is not None and saved.folder == folder and wrong == []
    assert write(tmp_path / "lora_a").name == "000002_step1" and (folder.parent / "12_step3").exists()


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch):
    first = write(tmp_path / "lora_a", keep=1)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "serialize", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "lora_a", step=2, keep=1)
    assert [path.name for path in first.parent.iterdir()] == [first.name] and checkpoint.read(first)


@pytest.mark.parametrize("name", [TENSORS, BEST])
def test_one_changed_byte_is_reported_as_damage(tmp_path, name):
    best = tmp_path / "best"
    best.write_bytes(b"best")
    folder = write(tmp_path / "lora_a", best=best)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged: {name} has changed since it was written"):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": {"step": 9}}, f"{STATE} has changed since it was written"),
        ({"sha256": {}}, f"{STATE}, {TENSORS} has|{STATE} has"),
        ({"format_version": None}, f"{STATE} has changed"),
    ],
)
def test_a_changed_state_file_is_reported_as_damaged(tmp_path, change, message):
    folder = write(tmp_path / "lora_a")
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, **change}))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the state, and update its digest."""
    state = {**json.loads((folder / STATE).read_text()), **changes}
    state.pop("sha256 of the rest")
    (folder / STATE).write_text(json.dumps({**state, "sha256 of the rest": checkpoint._digest(state)}))


def test_another_format_is_refused_by_its_number(tmp_path):
    folder = write(tmp_path / "lora_a")
    rewrite(folder, format_version=checkpoint.FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match="has format 2, but this version of lora_blip reads format 1"):
        checkpoint.read(folder)


def test_a_state_without_its_tensors_is_reported_as_damage(tmp_path):
    folder = write(tmp_path / "lora_a")
    rewrite(folder, sha256={})
    with pytest.raises(CheckpointError, match=f"damaged: {TENSORS} has changed since it was written"):
        checkpoint.read(folder)


def test_a_digest_with_a_path_does_not_open_a_file_outside_the_checkpoint(tmp_path):
    """The names in the state are file names in the folder. A path in the state is not opened."""
    folder = write(tmp_path / "lora_a")
    (tmp_path / "secret").write_text("x")
    sums = json.loads((folder / STATE).read_text())["sha256"]
    rewrite(folder, sha256={**sums, "../../../secret": sha256_of(tmp_path / "secret")})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(folder)


def test_a_missing_tensor_or_one_of_another_shape_is_named():
    like = torch.zeros(2, 3)
    assert checkpoint.checked_tensor(TENSOR, "parameter/a", like) is TENSOR["parameter/a"]
    for name, expected_tensor, message in (
        (
            "parameter/b",
            like,
            r"'parameter/b' is missing in the checkpoint; set MODEL, TARGETS, R and VARIANT to the values of that run",
        ),
        (
            "parameter/a",
            torch.zeros(3, 2),
            r"'parameter/a' has the shape \(2, 3\) in the checkpoint and \(3, 2\) in this run; set MODEL, TARGETS",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.checked_tensor(TENSOR, name, expected_tensor)


# ---------------------------------------------------------------- what identifies a run


SIZE = 10 * resume.SAMPLE


@pytest.fixture
def line(tmp_path: Path) -> Example:
    image = tmp_path / "a.png"
    image.write_bytes(bytes(SIZE))
    return Example(image, "a cube", "a.png", 1)


@pytest.mark.parametrize("place", [0, resume.SAMPLE - 1, SIZE // 2, SIZE // 2 + resume.SAMPLE - 1, -resume.SAMPLE, -1])
def test_a_changed_byte_at_the_start_middle_or_end_of_an_image_changes_the_digest(line, place):
    before = resume.lines_digest([line], True), resume.lines_digest([line], False)
    content = bytearray(SIZE)
    content[place] = 1
    line.image.write_bytes(content)
    after = resume.lines_digest([line], True), resume.lines_digest([line], False)
    assert before[0] != after[0] and before[1] == after[1]


@pytest.mark.parametrize("size", [0, 1, resume.SAMPLE, resume.SAMPLE + 1, SIZE + 1])
def test_the_size_of_an_image_is_part_of_its_data_set(line, size):
    before = resume.lines_digest([line], True)
    line.image.write_bytes(bytes(size))
    assert resume.lines_digest([line], True) != before


def test_every_word_and_the_order_of_the_lines_are_part_of_a_data_set(line):
    """This also holds for lines after the first chunk. The paths of the files are not part of it."""
    many = [replace(line, text=f"text {n}") for n in range(resume.CHUNK + 2)]
    changed = [
        [*many[:-1], replace(many[-1], text="other")],
        [replace(many[0], name="b.png"), *many[1:]],
        [replace(many[0], question="what?"), *many[1:]],
        [replace(many[0], answers=("a",)), *many[1:]],
        [many[1], many[0], *many[2:]],
        many[:-1],
        many[: resume.CHUNK],
    ]
    for with_images in (False, True):
        digests = [resume.lines_digest(each, with_images) for each in (many, *changed)]
        assert len(set(digests)) == len(digests)
        assert resume.lines_digest([replace(each, line=7) for each in many], with_images) == digests[0]


BASE_CONFIG = {"_name_or_path": "/here", "transformers_version": "5", "hidden_size": 32, "folder": Path("x")}
PROCESSOR = {"image_mean": [0.5], "_name_or_path": "/here", "size": {"height": 32}}


def backbone_of(config: dict = BASE_CONFIG, processor: dict = PROCESSOR, vocabulary: dict | None = None) -> Any:
    """Return an object with the attributes of a backbone that `identity` reads."""
    model = torch.nn.Linear(4, 3).requires_grad_(False)
    model.weight.data.fill_(1), model.bias.data.fill_(2)
    model.config = SimpleNamespace(to_dict=lambda: config)
    return SimpleNamespace(
        model=model,
        device=torch.device("cpu"),
        chosen_size=48,
        image_processor=SimpleNamespace(to_dict=lambda: processor),
        tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary or {"a": 0, "b": 1}),
    )


def identity(
    config: TrainConfig, training: list[Example], validation: list[Example], backbone: Any = None, **other: Any
) -> dict:
    values = {"precision": "fp32", "ranks": 2, **other}
    return resume.identity(config, values["precision"], backbone or backbone_of(), training, validation, values["ranks"])


def test_the_identity_contains_exactly_what_determines_an_update(line):
    config, other = TrainConfig(check_images="all"), replace(line, text="other")
    now = identity(config, [line], [other])
    json.dumps(now)
    free = {
        "model": "x", "annotations": "x", "image_root": "x", "on_bad_data": "skip", "output_dir": "x", "num_workers": 7,
        "log_every": 7, "tensorboard": True, "resume": "x", "allow_changed": True, "checkpoint_seconds": 7,
        "keep_checkpoints": 7, "cache_gb": 7.0,
    }  # fmt: skip
    assert identity(replace(config, **free), [line], [other]) == now and not free.keys() & now.keys()
    for changed in ({"lr": 9.0}, {"seed": 9}, {"dropout": 0.9}, {"batch_size": 9}, {"targets": "x"}, {"epochs": 9}):
        (name,) = changed
        assert resume.differences(now, identity(replace(config, **changed), [line], [other]))[0].startswith(f"{name} was ")
    for changed, name in (
        (identity(config, [other], [other]), "training lines are not the same"),
        (identity(config, [line], [line]), "validation lines are not the same"),
        (identity(config, [line], [other], ranks=3), "processes was 2 and is 3"),
        (identity(config, [line], [other], precision="bf16"), "precision was 'fp32' and is 'bf16'"),
        (identity(config, [line], [other], backbone_of(vocabulary={"a": 1, "b": 0})), "base processors are not the same"),
    ):
        assert resume.differences(now, changed) == [name]
    assert now["image_size"] == 48 and now["device"] == "cpu" and now["torch"] == torch.__version__
    for checked in ("all", "lazy"):
        config = replace(config, check_images=checked)
        line.image.write_bytes(bytes(SIZE))
        before = identity(config, [line], [line])
        line.image.write_bytes(bytes(SIZE + 1))
        expected = ["training lines are not the same", "validation lines are not the same"] if checked == "all" else []
        assert resume.differences(before, identity(config, [line], [line])) == expected


def test_the_path_of_a_base_may_change_but_not_its_content():
    before = processors_digest(backbone_of())
    moved = {"transformers_version": "6", "hidden_size": 32, "folder": Path("x"), "_name_or_path": "/there"}
    assert processors_digest(backbone_of(moved)) == before
    assert processors_digest(backbone_of(processor={"size": {"height": 32}, "image_mean": [0.5]})) == before
    for changed in (
        backbone_of({**BASE_CONFIG, "hidden_size": 64}),
        backbone_of({**BASE_CONFIG, "folder": Path("y")}),
        backbone_of(processor={**PROCESSOR, "image_mean": [0.6]}),
        backbone_of(vocabulary={"a": 0, "c": 1}),
    ):
        assert processors_digest(changed) != before


def test_differences_name_the_changed_setting_or_content():
    then = {"lr": 0.1, "training lines": "a", "base weights": "b", "base processors": "c", "seed": 3, "gone": 1}
    now = {"lr": 0.2, "training lines": "x", "base weights": "y", "base processors": "z", "seed": 3, "new": 5}
    assert resume.differences(then, now) == [
        "lr was 0.1 and is 0.2",
        "training lines are not the same",
        "base weights are not the same",
        "base processors are not the same",
        "new was not set and is 5",
    ]
    assert resume.differences(now, now) == []


def test_a_setting_that_an_older_version_did_not_have_has_its_default():
    """The default is used for the settings of a training run, and for the image size of every run."""
    now = {"training lines": "a", "dropout": TrainConfig().dropout, "image_size": 0}
    assert resume.differences({"training lines": "a"}, now) == []
    assert resume.differences({"training lines": "a"}, {**now, "dropout": 0.9, "image_size": 64}) == [
        f"dropout was {TrainConfig().dropout} and is 0.9",
        "image_size was 0 and is 64",
    ]
    assert resume.differences({}, {"image_size": 0, "dropout": 0.0}) == ["dropout was not set and is 0.0"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.fc.weight.data[1, 2].add_(1e-3),
        lambda model: model.half(),
        lambda model: setattr(model.fc, "weight", torch.nn.Parameter(model.fc.weight.data.reshape(4, 3), False)),
        lambda model: model.fc.bias.requires_grad_(True),
        lambda model: setattr(model, "fd", model.__delattr__("fc") or torch.nn.Linear(4, 3).requires_grad_(False)),
    ],
)
def test_values_dtypes_shapes_and_names_of_frozen_weights_identify_a_base(change):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.fc = torch.nn.Linear(4, 3).requires_grad_(False)
    model.empty = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    before = weights_digest(model)
    assert before == weights_digest(model)
    change(model)
    assert weights_digest(model) != before


def test_trained_parameters_are_not_part_of_the_digest_of_a_base():
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    before = weights_digest(model)
    model.weight.data.add_(1)
    assert weights_digest(model) == before


def test_two_swapped_values_change_the_digest_of_a_base():
    """Swapped values have the same exclusive or. The digest also contains samples of each weight, and these change."""
    model = torch.nn.Linear(4, 3).requires_grad_(False)
    before = weights_digest(model)
    model.weight.data = model.weight.data.flip(0)
    assert weights_digest(model) != before


def test_digests_stay_the_same_from_version_to_version(tmp_path):
    """A run can be resumed after an update of lora_blip. These digests are those of the first version."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.arange(100.0).reshape(4, 25) / 7, requires_grad=False)
    model.h = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half(), requires_grad=False)
    model.none = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    model.large = torch.nn.Parameter(torch.zeros(2**24 + 50, dtype=torch.float16), requires_grad=False)
    model.large.data[-1] = 1  # the index of this element is not exact in float32
    image = tmp_path / "a.png"
    image.write_bytes(bytes(place % 251 for place in range(SIZE)))
    lines = [
        Example(image, f"text {n} é", "a.png", n, question="q" * (n % 2), answers=("x", "y") * (n % 2))
        for n in range(resume.CHUNK + 6)
    ]
    assert [weights_digest(model), resume.lines_digest(lines, True), resume.lines_digest(lines, False)] == [
        "b26a88b2d3459295ad82fb00854e2f336c4cc694398ccafdd5d6cbef21dc2f40",
        "39b4c6f36ca2fe393d9d5b8896597de1e8d0b060a17546102aebf3e284601378",
        "df9f48bf2d1d6be6edaeb7fd62b9419d0cc5c4ac0f6c1a42607cba56c905c3b2",
    ]


def test_an_image_with_several_lines_is_read_once(line, monkeypatch):
    read = []
    monkeypatch.setattr(resume, "_samples_of", lambda image: read.append(image) or ["x"])
    resume.lines_digest([line, replace(line, text="other"), line], True)
    assert read == [line.image]
