"""Test gallery.html: the first images with their texts, with and without references, and with a bounded size."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_blip.config import InferConfig
from lora_blip.data.image_folders import example_of
from lora_blip.inference import gallery
from lora_blip.inference.output import ERRORS_NAME, FILE_NAME
from lora_blip.inference.pipeline import infer
from lora_blip.inference.prediction import report
from lora_blip.runtime.runs import GALLERY_NAME
from lora_blip.runtime.untrusted import printable
from tests.reports.test_report import NASTY, Tags, picture, read
from tests.support import tiny


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferConfig:
    """Return settings to caption six photos, the third of which is broken. Change to their folder."""
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 6)
    Path("photos/2.png").write_bytes(b"broken")
    return InferConfig(
        model=str(checkpoints["blip"]), adapter="none", images="photos", max_new_tokens=5, output_dir="out", device="cpu"
    )


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


@pytest.mark.parametrize("has_references", [False, True])
def test_infer_writes_a_card_for_each_image_and_prints_where_the_page_is(config, capsys, has_references):
    """A card has a score, its name and a mark only if there are references."""
    if has_references:
        refs = [{"image": f"photos/{n}.png", "text": f"a cube {n}", "group": "even"} for n in (0, 2, 4)]
        Path("refs.jsonl").write_text("\n".join(map(json.dumps, refs)))
        config = replace(config, references="refs.jsonl")
    infer(config)
    page = Path("out", GALLERY_NAME)
    assert f"gallery: {page.resolve().as_uri()}\n" in capsys.readouterr().out
    data, texts = read(page), {line["image"]: line["text"] for line in lines_of(FILE_NAME)}
    cards = {card["image"]: card for card in data["cards"]}
    assert {image: card["adapted"] for image, card in cards.items()} == {**texts, "photos/2.png": ""}
    shots = {image: data["pictures"][card["picture"]] for image, card in cards.items()}
    assert [image for image, shot in shots.items() if "jpeg" not in shot] == ["photos/2.png"]
    assert "is not a usable image" in shots["photos/2.png"]["problem"] and data["note"] == ""
    scored = {image for image, card in cards.items() if "score" in card}
    assert scored == ({"photos/0.png", "photos/4.png"} if has_references else set())
    if has_references:
        assert data["score_name"] == "exact match" and cards["photos/4.png"]["references"] == ["a cube 4"]
        assert cards["photos/4.png"]["score"] == 0.0 and cards["photos/4.png"]["right"] is False
        assert list(cards)[:2] == ["photos/0.png", "photos/4.png"]  # the lowest score first, then the cards without a score
    else:
        assert list(cards) == [f"photos/{n}.png" for n in range(6)]


def test_a_page_shows_the_first_of_many_images_and_their_number(config, monkeypatch):
    """The page does not grow with the number of images, also if they are in shards."""
    monkeypatch.setattr(gallery, "SHOWN", 4)
    with tarfile.open("shard.tar", "w") as shard:
        shard.add("photos")
    infer(replace(config, images="shard.tar"))
    data = read(Path("out", GALLERY_NAME))
    assert [Path(card["image"]).name for card in data["cards"]] == ["0.png", "1.png", "2.png", "3.png"]
    assert [sorted(shot) for shot in data["pictures"]] == [["jpeg", "size"]] * 2 + [["problem"]] + [["jpeg", "size"]]
    assert data["note"] == "The first 4 of 6 are on this page; predictions.jsonl contains all."


def page_of(folder: Path, texts: list[str]) -> Path:
    """Write the gallery of two images with `texts` in every field that may contain untrusted text."""
    folder.mkdir()
    image = picture(folder / "a.png")
    examples = [example_of(image, text) for text in texts]
    lines = [
        {"image": str(image), "question": text, "text": text, "base_text": text, "ranking": [{"text": text, "probability": 1}]}
        for text in texts
    ]
    (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    (folder / ERRORS_NAME).write_text(json.dumps({"image": str(image), "question": texts[-1], "error": texts[-1]}) + "\n")
    references = {image: [replace(example, answers=(text,)) for example, text in zip(examples, texts, strict=True)]}
    task: Any = SimpleNamespace(
        name="vqa",
        takes_question=True,
        writes_text=True,
        correctness_name="VQA accuracy",
        subject=lambda e: e.question,
        correctness=lambda *_: 0.5,
    )
    facts = {"images": texts[0], texts[1]: texts[2]}
    return gallery.write_gallery(folder, task, examples, references, facts, "adapted", len(texts))


def test_untrusted_texts_add_no_tag_to_a_gallery(tmp_path):
    """Questions, answers, references, rankings and names add no tag to the page, and can be read from it unchanged."""
    page, plain = page_of(tmp_path / "odd", NASTY), page_of(tmp_path / "plain", ["a", "b", "c", "d", "e", "f"])
    tags, plain_tags = ([tag for tag, _ in Tags(path.read_text("utf-8")).tags if tag != "wbr"] for path in (page, plain))
    assert tags == plain_tags
    data = read(page)
    for card, text in zip(data["cards"][:-1], map(printable, NASTY), strict=False):
        assert card["question"] == card["adapted"] == card["base"] == text
        assert card["references"] == [text] and card["ranking"] == [[text, 1.0]]
    assert data["score_name"] == "VQA accuracy" and data["cards"][0]["score"] == 0.5


def test_rankings_have_the_score_of_retrieval(config, checkpoints, capsys):
    """The table and the page name recall at 1, which `evaluate` prints too."""
    Path("refs.jsonl").write_text("".join(json.dumps({"image": f"photos/{n}.png", "text": "a"}) + "\n" for n in range(2)))
    infer(replace(config, model=str(checkpoints["itm"]), texts="a|b", references="refs.jsonl", max_new_tokens=0))
    printed = capsys.readouterr().out
    assert "\nR@1 image→text " in printed and "exact match" not in printed
    assert read(Path("out", GALLERY_NAME))["score_name"] == "R@1 image→text"


@pytest.mark.parametrize("name", ["base", "adapted"])
def test_scores_of_an_adapter_say_that_training_images_are_not_searched(capsys, name):
    task: Any = SimpleNamespace(
        takes_question=False, writes_text=True, subject=lambda e: e.image, correctness=lambda *_: 1.0, correctness_name="match"
    )
    example = replace(example_of("a.png"), text="a cube")
    report(task, {example.image: [example]}, {name: {example.image: "a cube"}})
    printed = capsys.readouterr().out
    assert "100.0%" in printed and ("`lora-blip evaluate` does" in printed) == (name == "adapted")


@pytest.mark.parametrize(
    ("takes_question", "question", "fix"),
    [
        (False, "", 'no texts of these images; add "text" to their lines in the file of REFERENCES (--references)'),
        (False, "what is it?", "the references are questions with answers, and the task needs texts; give an adapter that"),
        (True, "what is it?", 'no answers to these questions; name their column or key, --answer-key COLUMN, or add "answers"'),
    ],
)
def test_a_missing_score_is_explained_with_a_fix(capsys, takes_question, question, fix):
    task: Any = SimpleNamespace(takes_question=takes_question, writes_text=True, subject=lambda example: example.image)
    example = example_of("a.png", question)
    report(task, {example.image: [example]}, {"adapted": {example.image: "a cube"}})
    assert fix in capsys.readouterr().out
