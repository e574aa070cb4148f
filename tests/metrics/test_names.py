"""Every score has one name and one format, on the terminal and on the pages."""

import pytest

from lora_blip.metrics.names import named_score, score_name, validation_score, validation_scores
from lora_blip.tasks.caption import COCO_KEYS
from lora_blip.tasks.registry import TASKS


def test_captioning_metrics_have_their_published_names() -> None:
    assert {key: score_name(key) for key in COCO_KEYS} == COCO_KEYS


def test_every_score_of_a_task_has_a_name_for_people() -> None:
    names = {score_name(key) for task in TASKS.values() for key in task.score_names}
    assert {"exact match", "CIDEr", "VQA accuracy", "R@1", "R@5 image→text", "R@10 text→image"} <= names
    assert not [name for name in names if "_" in name]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [("cider", 0.08, "CIDEr 0.0800"), ("exact_match", 0.975, "exact match 97.5%"), ("loss", 0.5, "loss 0.5000")],
)
def test_a_score_is_shown_with_its_name_and_its_unit(key: str, value: float, text: str) -> None:
    assert named_score(key, value) == text


def test_the_score_of_an_adapter_is_the_one_that_selected_it() -> None:
    """The score is that of `best_by`. Missing and invalid entries give an empty text."""
    scores = {"val_loss": 0.1, "val_exact_match": 0.5, "val_cider": 2.0}
    assert validation_score({**scores, "settings": {"best_by": "cider"}}) == "CIDEr 2.0000"
    assert validation_score({**scores, "settings": {"best_by": "loss"}}) == "loss 0.1000"
    assert validation_score(scores) == validation_score({**scores, "settings": {"best_by": "auto"}}) == "exact match 50.0%"
    assert validation_score({}) == validation_score({"settings": [], "val_x": "y", "val_loss": None}) == ""


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), True, "0.5", None, [1]])
def test_a_score_that_is_no_number_of_a_sensible_size_is_left_out(value: object) -> None:
    """An adapter file of a stranger may contain anything: an integer of 400 digits cannot be a float."""
    assert validation_score({"val_cider": value}) == ""
    assert validation_scores({"val_cider": value, "val_loss": 0.25, "steps": 3}) == ["loss 0.2500"]
