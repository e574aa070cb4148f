"""What `make demo` prints at its end, and the picture of the README: the current texts, coloured by the references."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from toyworld import demo


def test_the_table_has_the_exact_match_of_base_and_adapter_per_split() -> None:
    references = [
        {"image": "0.png", "text": "a red cube", "group": "new"},
        {"image": "1.png", "text": "a blue cube", "group": "new"},
        {"image": "2.png", "text": "a green cube", "group": "unseen"},
    ]
    predictions = [
        {"image": "x/0.png", "base_text": "a red circle", "text": "a red cube"},
        {"image": "x/1.png", "base_text": "a blue cube", "text": "a blue cube"},
        {"image": "x/2.png", "base_text": "a circle", "text": "a red cube"},
    ]
    rows = [line.split() for line in demo.table(predictions, references).splitlines()]
    assert rows[1] == ["new", "2", "50.0%", "100.0%", "100.0%", "100.0%"]
    assert rows[2] == ["unseen", "1", "0.0%", "0.0%", "0.0%", "0.0%"]


def test_the_scores_of_an_evaluation_are_one_table(tmp_path: Path) -> None:
    scores = {"VQA accuracy": {"base": {"value": 0.3312}, "adapted": {"value": 1.0}}, "x": {"base": None, "adapted": None}}
    (tmp_path / "metrics.json").write_text(json.dumps({"scores": scores}))
    rows = [line.split() for line in demo.score_table(tmp_path / "metrics.json").splitlines()]
    assert rows[1:] == [["VQA", "accuracy", "0.331", "1.000"], ["x", "–", "–"]]


@pytest.mark.parametrize("task", list(demo.FLAGS))
def test_the_next_commands_can_be_pasted(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start this Python, quote what a shell would split, and use the adapter of this demo."""
    monkeypatch.setattr(sys, "executable", str(Path("a venv/bin/python").absolute()))
    lines = demo.next_commands(task, Path("lora_blip_output/demo")).splitlines()
    assert all("'a venv/bin/python' " in line for line in lines)
    assert "infer.py --adapter lora_blip_output/demo" in lines[0] and "--model Salesforce/" in lines[-1]
    assert ("--question 'what color is it?'" in lines[0]) is (task == "vqa")


def test_the_picture_shows_drawn_images_with_right_and_wrong_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is green if it equals the reference, else red; the seed alone selects the images, so failures are among them."""
    pytest.importorskip("matplotlib")
    from toyworld import picture

    references, predictions = tmp_path / "annotations.jsonl", tmp_path / "predictions.jsonl"
    known, predicted = [], []
    for number in range(24):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{number}.png")
        group = "new cubes" if number < 12 else "unseen colour pairs"
        known.append({"image": f"{number}.png", "text": f"a cube {number}", "group": group})
        text = f"A cube {number}." if number % 2 else "a thing"
        predicted.append({"image": f"photos/{number}.png", "base_text": "a thing", "text": text})
    references.write_text("\n".join(map(json.dumps, known)))
    predictions.write_text("\n".join(map(json.dumps, predicted)))
    written: list[tuple[str, str]] = []
    monkeypatch.setattr(picture, "write", lambda *line: written.append(line[2:]))
    picture.draw(predictions, references, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000 and len(written) == 3 * picture.SHOWN
    shown = [int(text.rsplit(" ", 1)[1]) for text, _ in written if text.startswith("reference")]
    assert sum(number < 12 for number in shown) == picture.SHOWN // 2
    for number, (text, color) in zip(shown, [line for line in written if "LoRA" in line[0]], strict=True):
        assert (text, color) == (
            (f"✓ LoRA: A cube {number}.", picture.RIGHT) if number % 2 else ("✗ LoRA: a thing", picture.WRONG)
        )
    assert {color for text, color in written if "base" in text} == {picture.WRONG}
    first = list(written)
    written.clear()
    picture.draw(predictions, references, tmp_path / "again.png")
    assert written == first
    written.clear()
    picture.draw(predictions, references, tmp_path / "other.png", seed=1)
    assert written != first


def test_the_columns_of_scores_with_long_names_are_aligned(tmp_path):
    """A name such as "R@1 image→text: unseen colour pairs (12)" is longer than the others."""
    score = {"base": {"value": 0.5}, "adapted": {"value": 1.0}}
    names = ["R@1", "R@1 image→text: unseen colour pairs (12)"]
    (tmp_path / "metrics.json").write_text(json.dumps({"scores": dict.fromkeys(names, score)}))
    rows = demo.score_table(tmp_path / "metrics.json").splitlines()
    assert len({len(row) for row in rows}) == 1 and rows[1].index("0.500") == rows[2].index("0.500")
