"""The shipped bases and annotation files equal what their generators produce."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_blip.data.example import Example
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.registry import TASKS, default_task
from toyworld.cubes import cube_scene, ten_answers
from toyworld.pretrain import pixels
from toyworld.questions import finetuning_questions, pretraining_questions, sentences
from toyworld.scenes import Scene, Thing, flat_scene, render_flat

ROOT = Path(__file__).resolve().parent.parent
BASES = {
    "tiny-blip": "BlipForConditionalGeneration",
    "tiny-blip2": "Blip2ForConditionalGeneration",
    "tiny-blip-vqa": "BlipForQuestionAnswering",
    "tiny-blip-itm": "BlipForImageTextRetrieval",
}
WORDS = (
    "annotations.jsonl",
    *(f"image_{part}/{name}.jsonl" for part in ("train", "test") for name in ("questions", "sentences")),
)
RED_ON_BLUE = Scene((Thing("cube", "red"), Thing("cube", "blue")), "on top of")


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_small_and_knows_its_own_world(name):
    """A shipped base predicts at least 38 of 40 texts of new drawn images exactly."""
    folder = ROOT / "assets" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
    backbone = load_backbone(str(folder), "cpu")
    assert backbone.architecture == BASES[name]
    task = TASKS[default_task(backbone.architecture)](backbone)
    rng = random.Random(5)
    scenes = [flat_scene(rng) for _ in range(40)]
    pictures = pixels([np.asarray(render_flat(scene, rng)[0]) for scene in scenes], backbone)
    texts = [scene.caption("shape") for scene in scenes]
    pairs = [rng.choice(pretraining_questions(scene, rng)) for scene in scenes]
    examples = [example(text, question) for text, (question, _) in zip(texts, pairs, strict=True)]
    if name == "tiny-blip-itm":
        choices = list(dict.fromkeys(texts))
        predicted = [choices[best] for best in task.rank(pictures, examples, choices).argmax(1).tolist()]
    else:
        predicted = task.predict(pictures, examples)
    expected = [answer for _, answer in pairs] if name == "tiny-blip-vqa" else texts
    assert sum(a == b for a, b in zip(predicted, expected, strict=True)) >= 38


def example(text: str, question: str) -> Example:
    return Example(Path(f"{text}.png"), text, text, 1, question=question)


def test_the_shipped_words_are_what_the_generator_writes(tmp_path):
    subprocess.run([sys.executable, "-m", "toyworld.cubes", "--out", str(tmp_path)], check=True, cwd=ROOT)
    for name in (*WORDS, "image_test/annotations.jsonl"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_the_candidates_are_fifty_and_no_two_alike():
    lines = [json.loads(line) for line in (ROOT / "image_test/sentences.jsonl").read_text().splitlines()]
    assert len({line["text"] for line in lines}) == len({line["image"] for line in lines}) == len(lines) == 50


def test_questions_and_sentences_are_true_of_the_scene():
    assert sentences(RED_ON_BLUE) == ["a red cube on top of a blue cube", "a blue cube under a red cube"]
    assert dict(finetuning_questions(RED_ON_BLUE)) == {
        "what is on top of the blue cube?": "a red cube",
        "what is under the red cube?": "a blue cube",
        "where is the blue cube?": "under a red cube",
        "how many cubes are there?": "two",
    }
    assert sentences(Scene(())) == ["no cube is present in the image"]
    assert dict(finetuning_questions(Scene((Thing("cube", "orange"),))))["what is on the table?"] == "an orange cube"


@pytest.mark.parametrize("seed", range(20))
def test_no_question_has_two_answers(seed):
    """A generated question has one answer, because a second one would be noise in training."""
    rng = random.Random(seed)
    for scene in (flat_scene(rng), cube_scene(rng, unseen=False)):
        pairs = (
            pretraining_questions(scene, rng)
            if scene.things and scene.things[0].noun != "cube"
            else finetuning_questions(scene)
        )
        assert len(dict(pairs)) == len(set(pairs))


def test_ten_people_answer():
    assert ten_answers("two") == ["two"] * 10
    assert sorted(set(ten_answers("a red cube"))) == ["a red cube", "red", "red cube"] and len(ten_answers("a red cube")) == 10


def test_a_base_answers_alike_whatever_the_batch():
    """Questions of different lengths in one batch get the answers of each alone."""
    backbone = load_backbone(str(ROOT / "assets/tiny-blip-vqa"), "cpu")
    task, rng = TASKS["vqa"](backbone), random.Random(1)
    scene = flat_scene(rng, share_single=0, share_empty=0)
    picture = pixels([np.asarray(render_flat(scene, rng)[0])], backbone)
    examples = [example("", question) for question, _ in pretraining_questions(scene, rng)]
    together = task.predict(torch.cat([picture] * len(examples)), examples)
    assert together == [task.predict(picture, [one])[0] for one in examples]
