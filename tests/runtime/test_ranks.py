"""A difference between processes, or an error of one, ends all with one message before the first step or caption."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_blip.cli import report_errors
from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.errors import CheckpointError, ConfigError, PeerError, PreflightError
from lora_blip.evaluation.comparison import evaluate
from lora_blip.inference import output, pipeline
from lora_blip.inference.pipeline import infer
from lora_blip.runtime.distributed import joined
from lora_blip.tasks import verification, verification_record
from lora_blip.training import resume, session, setup
from lora_blip.training.loop import train
from lora_blip.training.run_folder import Run
from tests.support import tiny
from tests.support.kill import run_processes
from tests.support.models import inject
from tests.support.runs import config_of

ROOT = Path(__file__).resolve().parents[2]


def ends(ranks: int, act: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> tuple[list[int], list[str]]:
    """Run `act` in several processes as a command does. Return the exit codes and the error messages."""
    start = time.monotonic()
    codes = run_processes(ranks, lambda: report_errors(act))
    assert time.monotonic() - start < 60, "they waited for each other"
    return codes, [line for line in capfd.readouterr().err.splitlines() if "rror" in line]


def on_rank(number: int) -> bool:
    return os.environ.get("RANK") == str(number)


def raising(owner: Any, name: str, rank: int, error: Exception) -> Callable[[], None]:
    """Return a patch that makes a function raise `error` on one rank."""

    def patch() -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        if on_rank(rank):
            setattr(owner, name, fail)

    return patch


@pytest.mark.parametrize(
    ("owner", "name", "error", "rank"),
    [
        (setup, "read_examples", ConfigError("no room"), 0),
        (setup.caching, "caches_for", ConfigError("no room"), 1),
        (setup.preflight, "check", PreflightError("no room"), 0),
        (setup.preflight, "check", PreflightError("no room"), 1),
        (setup, "first_batch", ConfigError("no room"), 1),
        (resume, "acquire", CheckpointError("no room"), 0),  # only the main process does this and the next
        (Run, "_open", ConfigError("no room"), 0),
    ],
)
def test_an_error_of_one_process_before_the_first_step_stops_all_with_one_message(
    checkpoints, tmp_path, capfd, owner, name, error, rank
):
    patch, config = raising(owner, name, rank, error), config_of(checkpoints, tmp_path)
    codes, error_lines = ends(2, lambda: (patch(), train(config)), capfd)
    expected = f"error: process 1 failed, and all stop: {type(error).__name__}: no room" if rank else "error: no room"
    assert codes == [2, 2] and error_lines == [expected]
    assert not list(Path(config.output_dir).glob("20*"))


def test_an_unknown_error_of_another_process_keeps_its_traceback(checkpoints, tmp_path, capfd):
    """An unexpected error of another process is reported by that process with its traceback, and by the main process."""
    patch, config = raising(setup.preflight, "check", 1, ZeroDivisionError("a bug")), config_of(checkpoints, tmp_path)
    codes, error_lines = ends(2, lambda: (patch(), train(config)), capfd)
    assert codes == [2, 2]
    error_lines = sorted(line for line in error_lines if not line.startswith(" "))
    assert error_lines == ["ZeroDivisionError: a bug", "error: process 1 failed, and all stop: ZeroDivisionError: a bug"]


def test_a_failing_comparison_on_one_process_switches_the_fast_path_off_on_all(checkpoints, tmp_path, capfd):
    """An error in the fast-path check of one process switches the fast path off on all. The run ends without an error."""

    def act() -> None:
        verification_record.is_verified = lambda _: False
        if on_rank(1):
            raising(verification, "training_differences", 1, OSError("no device"))()
        train(config)

    config = config_of(checkpoints, tmp_path, epochs=1)
    codes, error_lines = ends(2, act, capfd)
    assert codes == [0, 0] and not error_lines


def test_a_process_that_dies_before_the_first_step_is_named_as_lost(checkpoints, tmp_path, capfd):
    def act() -> None:
        if on_rank(1):
            raising(session, "total_steps", 1, SystemExit(9))()  # type: ignore[arg-type]
        train(config)

    config = config_of(checkpoints, tmp_path)
    codes, error_lines = ends(2, act, capfd)
    assert codes == [2, 9]
    assert error_lines == ["error: another process ended before the first step; see its own error message"]


# ---------------------------------------------------------------- inference


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferConfig:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tiny.write_photos(tmp_path / folder, 5)
    return InferConfig(
        model=str(checkpoints["blip"]), adapter="none", images="photos", max_new_tokens=3, batch_size=2,
        output_dir=str(tmp_path / "out"), device="cpu", image_root="",
    )  # fmt: skip


def adapter_in(folder: Path, make: Callable[..., Any], seed: float) -> str:
    from lora_blip.lora import adapter_file
    from lora_blip.tasks.caption import CaptionTask

    backbone = make("blip")
    for each in inject(backbone, "vit").values():
        each.B.data.mul_(seed)
    return str(adapter_file.save(folder / f"{seed}.safetensors", backbone, task=CaptionTask(backbone).metadata(), training={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "photos/*.png"}, "images is 'photos/*.png' there and 'photos' in process 0"),
        ({"prompt": "a photo of"}, "prompt is 'a photo of' there"),
        ({"max_new_tokens": 5}, "max_new_tokens is 5 there"),
        ({"fast": False}, "fast is False there"),
        ({"texts": "a cube|two cubes"}, "texts is"),
        ({"model": "other"}, "base weights are not the same"),
        ({"adapter": "other"}, "adapter is"),
        ({"images": "gone"}, "process 1 failed, and all stop: ImageError"),
        ({"adapter": "gone.safetensors"}, "process 1 failed, and all stop: AdapterError"),
    ],
)
def test_processes_that_would_predict_something_else_stop_before_a_caption(config, make, capfd, tmp_path, changes, message):
    """Processes with other settings, texts, adapters or bases stop with one message before the first caption."""
    if changes.get("model"):
        backbone = make("blip")
        backbone.model.vision_model.post_layernorm.bias.data[3] += 0.5
        tiny.save(backbone.model, backbone.tokenizer, tmp_path / "other")
        changes = {"model": str(tmp_path / "other")}
    if changes.get("adapter") == "other":
        config = replace(config, adapter=adapter_in(tmp_path, make, 1.0))
        changes = {"adapter": adapter_in(tmp_path, make, 2.0)}

    def act() -> None:
        os.chdir(tmp_path / "a")
        infer(replace(config, **(changes if on_rank(1) else {})))

    codes, error_lines = ends(2, act, capfd)
    assert codes == [2, 2] and len(error_lines) == 1 and message in error_lines[0], error_lines
    assert not (tmp_path / "out" / output.FILE_NAME).exists()


@pytest.mark.parametrize("change", ["other picture", "missing"])
def test_processes_that_find_other_pictures_under_one_name_stop_before_a_caption(config, capfd, tmp_path, change):
    """Processes whose folders have different images of one name stop before the first caption. Equal images are accepted."""
    picture = tmp_path / "b" / "photos" / "3.png"
    if change == "missing":
        picture.unlink()
    else:
        Image.new("RGB", (30, 30), "yellow").save(picture)

    def act() -> None:
        os.chdir(tmp_path / ("b" if on_rank(1) else "a"))
        infer(config)

    codes, error_lines = ends(2, act, capfd)
    assert (
        codes == [2, 2]
        and len(error_lines) == 1
        and "photos/3.png has other pixels on process 1 than on process 0; copy the file" in error_lines[0]
    ), error_lines
    (tmp_path / "b" / "photos" / "3.png").write_bytes((tmp_path / "a" / "photos" / "3.png").read_bytes())
    codes, error_lines = ends(2, act, capfd)
    assert codes == [0, 0] and not error_lines


@pytest.mark.parametrize(("owner", "name"), [(pipeline, "apply_adapter"), (output, "opened"), (output, "folder_of")])
def test_an_error_of_one_process_before_the_first_caption_stops_all_with_one_message(
    config, make, tmp_path, capfd, owner, name
):
    rank = 1 if name == "apply_adapter" else 0
    patch, config = raising(owner, name, rank, ConfigError("no room")), replace(config, adapter=adapter_in(tmp_path, make, 1.0))

    def act() -> None:
        os.chdir(tmp_path / "a")
        patch()
        infer(config)

    codes, error_lines = ends(2, act, capfd)
    assert codes == [2, 2] and error_lines == [
        "error: process 1 failed, and all stop: ConfigError: no room" if rank else "error: no room"
    ]


def test_evaluate_is_refused_under_torchrun_with_one_message(tmp_path, capfd):
    codes, error_lines = ends(2, lambda: evaluate(EvaluateConfig(references=str(tmp_path / "x.jsonl"))), capfd)
    assert codes == [2, 2] and error_lines == [
        "error: evaluate runs in one process; start it without torchrun: lora-blip evaluate …"
    ]


def test_a_peer_raises_an_error_that_python_code_can_catch():
    """An error of one process raises an exception with its message on every rank."""

    def act() -> None:
        with joined() as ranks, pytest.raises(ConfigError, match="process 1 failed, and all stop: KeyError: 'x'") as caught:
            ranks.together(lambda: {}["x"] if ranks.rank == 1 else None)
        assert isinstance(caught.value, PeerError) == (ranks.rank > 0)

    assert run_processes(3, act) == [0, 0, 0]


AFTER_A_LOST_PEER = """
import signal
from lora_blip.cli import report_errors
from lora_blip.errors import OutputError, PeerError, TrainingError

class Gloo:
    def __del__(self):
        signal.pause()  # waits forever for the lost process when the frames of the error are freed

def collective():
    gloo = Gloo()
    raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

def run():
    print("saved")
    {run}

report_errors(run)
"""


@pytest.mark.parametrize(
    ("run", "status", "printed"),
    [
        ("collective()", 1, "RuntimeError: Connection closed by peer"),
        (
            "try: collective()\n    except RuntimeError: raise TrainingError('a process was lost') from None",
            2,
            "error: a process",
        ),
        (
            "try: collective()\n    except RuntimeError as error: raise OutputError('the lines are safe') from error",
            2,
            "error: the",
        ),
        ("try: collective()\n    except RuntimeError as error: raise PeerError('process 0 failed') from error", 2, ""),
    ],
)
def test_a_process_that_lost_a_peer_reports_and_ends_without_freeing_the_error(run, status, printed):
    """A process that lost a peer prints its error and exits. Freeing the frames of the error would block in gloo."""
    environment = os.environ | {"WORLD_SIZE": "2"}
    command = [sys.executable, "-c", AFTER_A_LOST_PEER.format(run=run)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status and ended.stdout == "saved\n" and printed in ended.stderr
    assert bool(ended.stderr) == bool(printed)
