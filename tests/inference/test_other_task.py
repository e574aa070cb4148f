"""An adapter that is used for another task than its own: an error for "latest", and otherwise a warning."""

import os
import time
from pathlib import Path

import pytest

import lora_blip
from lora_blip import EvaluateConfig, InferConfig
from lora_blip.errors import AdapterError, ConfigError, DataError
from lora_blip.inference.adapter_choice import chosen_adapter
from tests.support import tiny
from tests.support.runs import adapter_of

QUESTION = "what is on top?"
WARNING = "warning: the task is "


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 2)
    return tmp_path


def add_run(base: Path, here: Path, name: str, age: int = 0, task: str = "") -> str:
    """Write a run with an adapter on this base, `age` seconds old. Return its folder."""
    adapter = here / "lora_blip_output" / name / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter_of(base, here, **({"task": task} if task else {})).rename(adapter)
    os.utime(adapter, (time.time() - age,) * 2)
    return f"lora_blip_output/{name}"


def infer(**settings: object) -> str:
    """Run inference on the photos, and return the text of the first prediction."""
    return lora_blip.infer(InferConfig(images="photos", device="cpu", **settings)).read_text()  # type: ignore[arg-type]


def test_latest_is_the_newest_run_of_the_task(checkpoints, here, capsys):
    """Before, `infer` and `evaluate` took the newest run of all: a caption adapter answered questions without a warning."""
    caption = add_run(checkpoints["blip"], here, "2_caption")
    for task, other in (("vqa", {"question": QUESTION}), ("retrieval", {"texts": "a|b"})):
        with pytest.raises(AdapterError) as error:
            infer(task=task, **other)
        assert f"no run in 'lora_blip_output' is of the task {task}; train one" in str(error.value)
        assert f"The newest run is of the task caption: {caption!r}; to use it for caption, set TASK" in str(error.value)
    vqa = add_run(checkpoints["vqa"], here, "1_vqa", age=100)
    assert infer(task="vqa", question=QUESTION)
    printed = capsys.readouterr().out
    assert f"adapter {vqa}/adapter.safetensors: vqa" in printed and WARNING not in printed
    Path("questions.jsonl").write_text(f'{{"image": "photos/0.png", "question": "{QUESTION}", "answers": ["red"]}}\n')
    lora_blip.evaluate(EvaluateConfig(references="questions.jsonl", task="vqa", train_annotations="none", device="cpu"))
    assert f"adapter {vqa}/adapter.safetensors: vqa" in capsys.readouterr().out
    assert chosen_adapter("latest").path == Path(caption, "adapter.safetensors")


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (
            "blip",
            "the base is a BlipForConditionalGeneration, which is trained for the task caption: the predictions may mean",
        ),
        ("opt", "caption: the predictions may be worse than those of the base alone"),  # a BLIP-2 answers questions
    ],
)
def test_an_adapter_of_another_task_is_a_warning(checkpoints, here, capsys, kind, end):
    """In `infer`, `evaluate` and Python. The message says if the base has learned the task."""
    run = add_run(checkpoints[kind], here, "run", task="caption")
    start = f"{WARNING}vqa, but the adapter {run}/adapter.safetensors was trained for the task caption"
    Path("questions.jsonl").write_text(f'{{"image": "photos/0.png", "question": "{QUESTION}", "answers": ["red"]}}\n')
    for work in (
        lambda: infer(adapter=run, task="vqa", question=QUESTION),
        lambda: lora_blip.evaluate(
            EvaluateConfig(
                adapter=run, references="questions.jsonl", task="vqa", train_annotations="none", device="cpu", base=False
            )
        ),
        lambda: lora_blip.Captioner.from_adapter(run, task="vqa", device="cpu").answer("photos/0.png", QUESTION),
        lambda: lora_blip.Captioner.from_adapter(
            run, task="vqa", base=lora_blip.load_backbone(str(checkpoints[kind]), device="cpu")
        ),
    ):
        work()
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(WARNING)]
        assert line.startswith(start) and end in line and line.endswith("or train one (--task vqa)")
    infer(adapter=run)
    assert WARNING not in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_a_base_that_never_learned_the_task_is_a_warning(checkpoints, capsys):
    for kind, expected in (("blip", True), ("opt", False), ("vqa", False)):
        infer(adapter="none", model=str(checkpoints[kind]), task="vqa", question=QUESTION)
        assert (
            "but the base is a BlipForConditionalGeneration, which is trained for the task caption: the"
            in capsys.readouterr().out
        ) == expected


def test_a_missing_question_does_not_lead_to_the_same_adapter(checkpoints, here):
    """Before, the message named the adapter itself as one that captions images, with TASK still "vqa"."""
    run = add_run(checkpoints["blip"], here, "run")
    fix = rf'The adapter {run}/adapter\.safetensors captions images: set TASK = "auto" \(--task auto\)$'
    with pytest.raises(ConfigError, match=fix):
        infer(adapter=run, task="vqa")
    Path("captions.jsonl").write_text('{"image": "photos/0.png", "text": "a cube"}\n')
    with pytest.raises(DataError, match=fix) as error:
        lora_blip.evaluate(
            EvaluateConfig(adapter=run, references="captions.jsonl", task="vqa", train_annotations="none", device="cpu")
        )
    assert "give references of this task" not in str(error.value)


def test_a_question_for_a_captioning_base_does_not_advise_another_task(checkpoints, here):
    """TASK = "vqa" helps only if the base answers questions."""
    for kind, fix in (
        ("blip", r"or ADAPTER \(or --adapter\) to an adapter that answers"),
        ("opt", r"or TASK \(or --task\) to vqa"),
    ):
        run = add_run(checkpoints[kind], here, kind, task="caption")
        with pytest.raises(ConfigError, match=fix):
            infer(adapter=run, question=QUESTION)
