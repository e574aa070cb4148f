"""Test `evaluate`: texts and scores are right, and leaks and missing images are reported."""

import builtins
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_blip.config import EvaluateConfig
from lora_blip.data import annotations
from lora_blip.data.image_folders import example_of
from lora_blip.data.images import open_image
from lora_blip.data.source_digest import source_digest
from lora_blip.errors import ConfigError, DataError
from lora_blip.evaluation import comparison, measures, outputs
from lora_blip.evaluation.leak_search import LeakSearch
from lora_blip.flags import parse
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.setup import apply_adapter
from lora_blip.lora import adapter_file
from lora_blip.metrics import captions
from lora_blip.metrics.bootstrap import Interval
from lora_blip.models.loading import load_backbone
from lora_blip.reports.score_table import scores_html
from lora_blip.runtime.progress import _phases
from lora_blip.tasks.base import Generation
from lora_blip.tasks.registry import TASKS
from tests.support.runs import adapter_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java, which takes seconds to start; see the slow test
    return tmp_path


def scene(path: Path, seed: int, **options: Any) -> Path:
    """Return an image of coloured cells that depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = torch.randint(0, 255, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(cells.numpy()).resize((60, 60), Image.Resampling.BICUBIC).save(path, **options)
    return path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def references(folder: Path, count: int = 6) -> Path:
    """Write images with two right captions each, in two groups."""
    lines = [
        {"image": str(scene(folder / "eval" / f"{n}.png", n).relative_to(folder)), "text": text, "group": "ab"[n % 2]}
        for n in range(count)
        for text in (f"a red cube on cube {n}", "a blue cube")
    ]
    return write_lines(folder / "refs.jsonl", lines)


def evaluated(refs: Path, **settings: Any) -> tuple[dict[str, Any], list[dict[str, str]], str]:
    """Return the contents of metrics.json, comparison.csv and report.html."""
    folder = comparison.evaluate(EvaluateConfig(references=str(refs), device="cpu", **settings))
    strict = json.loads((folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    with (folder / "comparison.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return strict, rows, (folder / "report.html").read_text()


def test_figures_and_tables_are_those_of_base_and_adapter(checkpoints, here, capsys):
    """The texts are those of each model, the scores those of the metrics, and the gains their differences, with intervals."""
    refs, path = references(here), adapter_of(checkpoints["blip"], here)
    figures, rows, page = evaluated(refs, adapter=str(path), output_dir="out")
    assert '"score_name":"CIDEr"' in page.replace(" ", "")  # each card names its score
    backbone = load_backbone(str(checkpoints["blip"]), "cpu")
    task = TASKS["caption"](backbone, "", Generation(6))
    images = [here / "eval" / f"{n}.png" for n in range(6)]
    right = [[f"a red cube on cube {n}", "a blue cube"] for n in range(6)]
    generated = {"base": [p.text for p in Captioner(task)(images)]}
    apply_adapter(task, adapter_file.read(path), merge=True)
    generated["adapted"] = [p.text for p in Captioner(task)(images)]
    assert generated["base"] != generated["adapted"]
    for who, texts in generated.items():
        expected = captions.caption_scores(texts, right)
        assert [row[who] for row in rows] == texts
        for name in ("exact match", "BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"):
            assert figures["scores"][name][who]["value"] == pytest.approx(expected.values[name])
    assert [row["references"] for row in rows] == [" | ".join(texts) for texts in right]
    assert [row["group"] for row in rows] == ["a", "b"] * 3 and {row["question"] for row in rows} == {""}
    for name, score in figures["scores"].items():
        if score["gain"]:
            assert score["gain"]["value"] == pytest.approx(score["adapted"]["value"] - score["base"]["value"])
            assert score["gain"]["low"] <= score["gain"]["value"] <= score["gain"]["high"], name
    assert figures["scores"]["ROUGE-L"]["gain"] and figures["scores"]["exact match: a (3)"]["gain"]
    meteor = figures["scores"]["METEOR"]
    assert meteor == {"base": None, "adapted": None, "gain": None, "note": meteor["note"]}
    assert "java" in meteor["note"] and figures["scores"]["CIDEr"]["note"] == ""
    assert figures["facts"]["scored"] == "6 of 6 images" and figures["settings"]["references"] == str(refs)
    assert (
        figures["facts"]["leaks"] == "not searched: the training data are unknown; give them with --train-annotations"
        and figures["leaks"] == []
    )
    assert "exact match" in page and "a red cube on cube 3" in page
    printed = capsys.readouterr().out
    assert "caption: 6 predictions" in printed and "-0.0" not in printed
    assert re.search(r"\n\[95 % interval\] +base +adapted +gain\n", printed)
    assert re.search(r"ROUGE-L .*\[.*\[.*\[", printed) and "wrote out/metrics.json, out/comparison.csv" in printed
    assert f"report: {Path('out/report.html').resolve().as_uri()}\n" in printed


@pytest.mark.parametrize("layout", ["column", "files", "folders"])
def test_of_references_with_several_splits_only_the_test_is_scored(checkpoints, here, layout, capsys):
    """Otherwise most of the scored images are those of the training. Before, all lines were scored."""
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        images = [scene(here / "data" / split / f"{split}{n}.png", n) for n in range(count)]
        for image in images if layout == "folders" else ():
            image.with_suffix(".txt").write_text("a cube")
        lines = [f"data/{split}/{image.name},a cube,{split if layout == 'column' else ''}\n" for image in images]
        if layout != "folders":
            (here / f"{split}.csv").write_text(f"image,text,split\n{''.join(lines)}")
    whole = here / "all.csv"
    rows = "".join(
        (here / f"{split}.csv").read_text().partition("\n")[2] for split in "train val test".split() if layout == "column"
    )
    whole.write_text(f"image,text,split\n{rows}")
    source = {"column": str(whole), "files": "train.csv,val.csv,test.csv", "folders": "data"}[layout]
    config = EvaluateConfig(references=source, adapter="none", model=str(checkpoints["blip"]), device="cpu")
    task, _ = comparison.open_task(config, None)
    scored = comparison.read_references(config, task)
    assert sorted(example.image.stem for example in scored) == ["test0", "test1", "test2"]
    message = f"{source}: its split test is used: 3 lines, 7 lines left out; to use other lines, "
    assert message in capsys.readouterr().out
    if layout == "column":
        whole.write_text(whole.read_text().replace(",test\n", ",val\n"))
        assert len(comparison.read_references(config, task)) == 5  # val, because no line is in test
        whole.write_text(whole.read_text().replace(",val\n", ",train\n"))
        assert len(comparison.read_references(config, task)) == 10  # a single split: the user has chosen these lines
        assert "its split val is used" in (printed := capsys.readouterr().out) and printed.count("is used") == 1


def test_a_score_that_is_no_number_is_null():
    """JSON has no NaN, so ends of intervals and values are null."""
    nan = float("nan")
    assert outputs.numbers(Interval(0.5, nan, nan)) == {"value": 0.5, "low": None, "high": None}
    assert outputs.numbers(Interval(nan, nan, nan)) is None and outputs.numbers(None) is None


def test_a_score_that_has_no_interval_is_still_json(checkpoints, tmp_path, monkeypatch):
    """METEOR of a set is not the mean over its images. So both ends of its interval are null."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captions.java, "meteor", lambda generated, _right, _package: (0.25, [0.5] * len(generated)))
    figures, _, page = evaluated(references(tmp_path, 3), adapter=str(adapter_of(checkpoints["blip"], tmp_path)))
    meteor = figures["scores"]["METEOR"]
    assert meteor["adapted"] == {"value": 0.25, "low": None, "high": None} and meteor["gain"] is None
    assert "no interval" in page


def test_without_the_scorers_exact_match_comes_with_the_reasons(checkpoints, here, monkeypatch, capsys):
    real = builtins.__import__
    monkeypatch.setattr(captions, "import_module", lambda name: real("nowhere_" + name))
    figures, rows, _ = evaluated(references(here, 3), adapter=str(adapter_of(checkpoints["blip"], here)))
    assert figures["scores"]["exact match"]["adapted"]["value"] == 0
    assert all('pip install "lora_blip[metrics]"' in figures["scores"][name]["note"] for name in captions.COCO)
    assert "exact match" in rows[0]
    printed = capsys.readouterr().out
    assert printed.count('pip install "lora_blip[metrics]"') == 1  # one line for all of them
    (line,) = [line for line in printed.splitlines() if line.startswith("8 other scores ")]
    assert all(name in line for name in captions.COCO)


def test_evaluate_can_score_the_base_alone_or_the_adapter_alone(checkpoints, here):
    refs, path = references(here, 3), adapter_of(checkpoints["blip"], here)
    both, rows, _ = evaluated(refs, adapter=str(path))
    base, base_rows, _ = evaluated(refs, adapter="none", model=str(checkpoints["blip"]), max_new_tokens=6)
    alone, alone_rows, page = evaluated(refs, adapter=str(path), base=False)
    for name, score in both["scores"].items():
        assert base["scores"][name] == score | {"adapted": None, "gain": None}
        assert alone["scores"][name] == score | {"base": None, "gain": None}
    assert [row["base"] for row in base_rows] == [row["base"] for row in rows] and {row["adapted"] for row in base_rows} == {""}
    assert [row["adapted"] for row in alone_rows] == [row["adapted"] for row in rows]
    assert 'data-name="base"' not in page and "adapter" not in base["facts"]


def test_leaks_are_found_and_printed_before_the_scores(checkpoints, here, capsys):
    """The leaks are a copy and a JPEG of half the size. The adapter file names the training data."""
    refs = references(here)
    for n, name in enumerate(("x", "y", "z")):
        scene(here / "train" / f"{name}.png", 100 + n)
    (here / "train" / "x.png").write_bytes((here / "eval" / "2.png").read_bytes())
    Image.open(here / "eval" / "4.png").resize((30, 30), Image.Resampling.BOX).save(here / "train" / "y.jpg", quality=80)
    names = ("x.png", "y.jpg", "z.png", "gone.png")
    source = write_lines(here / "train.jsonl", [{"image": f"train/{name}", "text": "a"} for name in names])
    path = adapter_of(checkpoints["blip"], here, settings={"annotations": "train.jsonl", "image_root": ""})
    figures, _, page = evaluated(refs, adapter=str(path))
    assert [(Path(x["evaluation"]).name, Path(x["training"]).name, x["kind"]) for x in figures["leaks"]] == [
        ("2.png", "x.png", "same bytes"),
        ("4.png", "y.jpg", "nearly the same picture"),
    ]
    (warning,) = [text for text in figures["warnings"] if "training data" in text]
    assert warning.startswith("2 of 6 evaluation images are in the training data")
    assert figures["facts"]["leaks"] == "2 found among the 3 images of train.jsonl"
    printed = capsys.readouterr().out
    assert "evaluation images in the training data: 2 found among the 3 images of train.jsonl\n" in printed
    assert printed.index("WARNING: 2 of 6") < printed.index("adapted  ") and "Read " in page and warning[:40] in page
    without_search = evaluated(refs, adapter=str(path), train_annotations="none")[0]
    assert page.count("same bytes as") >= 1 and without_search["leaks"] == []
    assert without_search["facts"]["leaks"] == "not searched: --train-annotations is none"
    with_flag = evaluated(refs, adapter="none", model=str(checkpoints["blip"]), train_annotations=str(source))[0]
    assert len(with_flag["leaks"]) == 2


@pytest.mark.parametrize(
    ("rules", "lines", "found"),
    [
        ({}, "folders", 3),  # an earlier version trained on all lines
        ({"data_rules": 2}, "folders", 0),
        ({}, "column", 0),
        ({"data_rules": 2}, "column", 0),
        ({}, "test only", 3),
        ({"data_rules": 2}, "test only", 0),
    ],
)
def test_training_data_are_searched_by_the_rules_of_the_training(checkpoints, here, rules, lines, found):
    """Earlier versions trained on all lines of a table with images in train/ and test/, and on marked test lines."""
    refs = references(here, 3)
    marked = {"folders": (), "column": ("train", "test"), "test only": ("test",)}[lines]
    rows = []
    for split in ("train", "test"):
        folder = f"{'' if lines == 'folders' else 'photos_'}{split}"
        for n in range(3):
            image = scene(here / folder / f"{n}.png", 200 + n)
            if split == "test":
                image.write_bytes((here / "eval" / f"{n}.png").read_bytes())
            rows.append({"image": f"{folder}/{n}.png", "text": "a"} | ({"split": split} if split in marked else {}))
    write_lines(here / "all.jsonl", rows)
    path = adapter_of(checkpoints["blip"], here, settings={"annotations": "all.jsonl", "image_root": ""}, **rules)
    figures = evaluated(refs, adapter=str(path))[0]
    assert len(figures["leaks"]) == found, figures["facts"]["leaks"]


def test_the_training_data_of_the_initial_adapter_are_searched_too(checkpoints, here, capsys):
    """An adapter that continued another one has learned the images of both trainings."""
    refs = references(here, 3)
    other = write_lines(here / "other.jsonl", [{"image": "own/7.png", "text": "x"}])
    scene(here / "own" / "7.png", 7)
    first = adapter_of(checkpoints["blip"], here, settings={"annotations": str(refs)})
    second = here / "second" / "adapter.safetensors"
    second.parent.mkdir()
    content = adapter_file.read(first)
    initial = {"path": str(first), "sha256": adapter_file.digest(content.tensors)[:16]}
    training = {"steps": 1, "settings": {"annotations": str(other)}, "init_adapter": initial}
    adapter_file.write(second, content.tensors, content.metadata | {"training": training})
    figures = evaluated(refs, adapter=str(second))[0]
    assert len(figures["leaks"]) == 3
    assert "0 found among the 1 image of" in figures["facts"]["leaks"]
    assert f"of the initial adapter run: 3 found among the 3 images of {refs}" in figures["facts"]["leaks"]
    assert "WARNING: 3 of 3 evaluation images are in the training data" in capsys.readouterr().out
    training["data_changed"] = True
    adapter_file.write(second, content.tensors, content.metadata | {"training": training})
    note = evaluated(refs, adapter=str(second), output_dir="changed")[0]["facts"]["leaks"]
    assert "not searched: the earlier training data of this run" in note and "3 found among the 3 images" in note
    first.unlink()
    note = evaluated(refs, adapter=str(second), output_dir="again")[0]["facts"]["leaks"]
    assert note.endswith(f"not searched: the training data of the initial adapter {str(first)!r}, which cannot be read")


def test_another_file_with_the_name_of_the_training_data_is_not_searched(checkpoints, here):
    """Before, an evaluation in another folder searched the file of the same name there, and reported its result."""
    refs = references(here, 3)
    lines = [{"image": f"eval/{n}.png", "text": "a"} for n in range(2)]
    write_lines(here / "train.jsonl", lines)
    path = adapter_of(
        checkpoints["blip"], here, settings={"annotations": "train.jsonl"}, data_digest=source_digest("train.jsonl")
    )
    figures = evaluated(refs, adapter=str(path), output_dir="same")[0]
    assert len(figures["leaks"]) == 2
    write_lines(here / "train.jsonl", [{"image": "eval/2.png", "text": "a"}])
    figures = evaluated(refs, adapter=str(path), output_dir="other")[0]
    assert figures["leaks"] == [] and figures["facts"]["leaks"].startswith("not searched: train.jsonl has changed since")
    assert figures["warnings"][0].startswith("these images may be training images: not searched: train.jsonl has changed")
    assert len(evaluated(refs, adapter=str(path), train_annotations="train.jsonl", output_dir="given")[0]["leaks"]) == 1


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (None, "not searched: train.jsonl does not exist; give the file with --train-annotations"),
        ([], "not searched: train.jsonl: no usable line"),
        (
            [{"image": "gone.png", "text": "a"}],
            "not searched: no image of train.jsonl exists; give their folder with --train-image-root",
        ),
    ],
)
def test_missing_training_data_is_a_printed_note_and_not_an_error(checkpoints, here, lines, why, capsys):
    if lines is not None:
        write_lines(here / "train.jsonl", lines)
    path = adapter_of(checkpoints["blip"], here, settings={"annotations": "train.jsonl"})
    refs = references(here, 2)
    assert evaluated(refs, adapter=str(path))[0]["facts"]["leaks"].startswith(why)
    assert f"evaluation images in the training data: {why}" in capsys.readouterr().out
    if not lines:  # an error, if --train-annotations names the file
        with pytest.raises(DataError, match=r"train\.jsonl"):
            evaluated(refs, adapter=str(path), train_annotations="train.jsonl")


def test_existing_files_are_never_overwritten_and_predictions_survive_an_error(checkpoints, here, monkeypatch):
    refs, path = references(here, 2), adapter_of(checkpoints["blip"], here)
    monkeypatch.setattr(comparison, "open_task", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in outputs.FILES:
        (here / "out").mkdir(exist_ok=True)
        (here / "out" / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name} exists already"):
            evaluated(refs, adapter=str(path), output_dir="out")
        assert (here / "out" / name).read_text() == "mine"
        (here / "out" / name).unlink()
    (here / "file").write_text("")
    with pytest.raises(ConfigError, match="it is not a folder; give a folder that can be written"):
        evaluated(refs, adapter=str(path), output_dir="file/out")
    with pytest.raises(ConfigError, match="references is empty"):
        EvaluateConfig()


def test_invalid_lines_stop_evaluate_or_are_left_out(checkpoints, here, capsys):
    refs, path = references(here, 3), adapter_of(checkpoints["blip"], here)
    (here / "eval" / "broken.png").write_bytes(b"broken")
    refs.write_text(
        refs.read_text() + '{"image": "eval/broken.png", "text": "a cube"}\n{"image": "eval/1.png"}\nno json\n'
        '{"image": "eval/0.png", "text": "' + "cube " * 90 + '"}\n'
    )
    with pytest.raises(
        DataError, match=r"refs\.jsonl:7: .*broken\.png[^$]*refs\.jsonl:8[^$]*refs\.jsonl:9[^$]*:10: .*90 tokens"
    ):
        evaluated(refs, adapter=str(path))
    assert not (here / "lora_blip_output").exists()
    figures, rows, _ = evaluated(refs, adapter=str(path), on_bad_data="skip")
    assert len(rows) == 3 and figures["facts"]["scored"] == "3 of 3 images" and "left out  4 lines" in capsys.readouterr().out


def test_an_image_deleted_during_the_evaluation_is_left_out_of_both(checkpoints, here, monkeypatch, capsys):
    """The image is deleted after the lines are checked. The other images are scored and paired."""
    refs, path = references(here, 4), adapter_of(checkpoints["blip"], here)
    real = comparison.search_leaks

    def vanishing(*arguments: Any) -> Any:
        (here / "eval" / "1.png").unlink()
        return real(*arguments)

    monkeypatch.setattr(comparison, "search_leaks", vanishing)
    figures, rows, page = evaluated(refs, adapter=str(path))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "2.png", "3.png"] and figures["scores"]["CIDEr"]["gain"]
    assert figures["facts"]["scored"] == "3 of 4 images" and capsys.readouterr().out.count("left out: ") == 1
    assert "a red cube on cube 1" not in page


def test_if_no_image_can_be_read_there_is_one_error(checkpoints, here, monkeypatch):
    refs, path = references(here, 2), adapter_of(checkpoints["blip"], here)
    monkeypatch.setattr(
        comparison,
        "search_leaks",
        lambda *_: LeakSearch([image.unlink() for image in (here / "eval").iterdir()] and [], "gone"),
    )
    with pytest.raises(DataError, match="no image of 2 can be read"):
        evaluated(refs, adapter=str(path))


# ---------------------------------------------------------------- answers, retrieval


def test_answers_are_scored_by_question(checkpoints, here):
    """The oracle is the official accuracy: the mean over the subsets of nine answers of min(equal answers / 3, 1)."""
    scene(here / "a.png", 1), scene(here / "b.png", 2)
    path = adapter_of(checkpoints["vqa"], here)
    task = TASKS["vqa"](load_backbone(str(checkpoints["vqa"]), "cpu"), "", Generation(6))
    apply_adapter(task, adapter_file.read(path), merge=True)
    questions = [("a.png", "what is it?"), ("a.png", "what colour?"), ("b.png", "what is it?")]
    generated = [p.text for p in Captioner(task).answer(*map(list, zip(*questions, strict=True)))]
    votes = [[generated[0]] * 2 + ["zebra"] * 8, [generated[1]] * 10, ["zebra"] * 10]
    lines = [{"image": i, "question": q, "answers": v} for (i, q), v in zip(questions, votes, strict=True)]
    figures, rows, _ = evaluated(write_lines(here / "refs.jsonl", lines), adapter=str(path))
    accuracy = (2 * (1 / 3) + 8 * (2 / 3)) / 10
    assert [float(row["VQA accuracy"]) for row in rows] == pytest.approx([accuracy, 1, 0])
    score = figures["scores"]["VQA accuracy"]
    assert score["adapted"]["value"] == pytest.approx((accuracy + 1) / 3) and score["base"]["value"] == 0
    assert score["gain"]["value"] == pytest.approx(score["adapted"]["value"] - score["base"]["value"])
    assert [(row["question"], row["adapted"]) for row in rows] == [
        (q, s) for (_, q), s in zip(questions, generated, strict=True)
    ]
    assert figures["facts"]["scored"] == "2 of 2 images, 3 questions"


@pytest.mark.parametrize("kind", ["itm", "itm2"])
@pytest.mark.parametrize("count", [2, 99])
def test_retrieval_equals_brute_force(checkpoints, here, monkeypatch, kind, count):
    """The oracle sorts all pairs: the `count` most probable pairs by ITC are sorted by ITC + ITM, and the others follow."""
    monkeypatch.setattr(measures, "RERANKED", count)
    texts = ["a red cube", "a blue cube", "a green cube on a red cube", "two cubes", "nothing", "a white cube"]
    owners = [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (3, 0), (4, 5)]  # image, text: some have two, one text has two images
    for n in range(5):
        scene(here / f"{n}.png", n)
    refs = write_lines(here / "refs.jsonl", [{"image": f"{i}.png", "text": texts[t], "group": "ab"[i % 2]} for i, t in owners])
    task: Any = TASKS["retrieval"](load_backbone(str(checkpoints[kind]), "cpu"))
    examples = annotations.read(refs)[0]
    measured = measures.measure(Runner(task, 3), examples, 0, lambda results, _: results)

    processor = task.backbone.image_processor
    files = dict.fromkeys(example.image for example in examples)
    pixels = [processor(open_image(file), return_tensors="pt")["pixel_values"][0] for file in files]
    with torch.no_grad():
        similarity, odds = torch.zeros(5, 6), torch.zeros(5, 6)
        for i, picture in enumerate(pixels):
            for t, text in enumerate(texts):
                states, tokens = task.matcher.encode_images(picture[None]), task.matcher.tokenize([text])
                views, word = task.matcher.image_features(states)[0], task.matcher.text_features(tokens)[0]
                similarity[i, t] = max(float(view @ word) for view in views) / 0.07
                odds[i, t] = task.matcher.matching(states, tokens)[0]

    def rank(row: int, table: torch.Tensor, bonus: torch.Tensor, right: set[int]) -> int:
        order = sorted(range(table.shape[1]), key=lambda j: -float(table[row, j]))
        reranked = sorted(order[:count], key=lambda j: -float(table[row, j] + bonus[row, j]))
        return min(position for position, j in enumerate(reranked + order[count:], 1) if j in right)

    by_image = [rank(i, similarity, odds, {t for o, t in owners if o == i}) for i in range(5)]
    by_text = [rank(t, similarity.T, odds.T, {o for o, s in owners if s == t}) for t in range(6)]
    for direction, ranks in (("image→text", by_image), ("text→image", by_text)):
        for k in (1, 5, 10):
            value = sum(r <= k for r in ranks) / len(ranks)
            assert measured.scores[f"R@{k} {direction}"].value == pytest.approx(value), (direction, k, ranks)
        assert measured.scores[f"mean rank {direction}"].value == pytest.approx(sum(ranks) / len(ranks))
        assert measured.scores[f"median rank {direction}"].value == sorted(ranks)[len(ranks) // 2] or len(ranks) % 2 == 0
    assert measured.points == pytest.approx([1 / r for r in by_image])
    assert len({*by_image, *by_text}) > 1


def test_retrieval_is_reported_both_ways_with_gains(checkpoints, here):
    for n in range(4):
        scene(here / f"{n}.png", n)
    lines = [{"image": f"{n}.png", "text": text} for n, text in enumerate(["a red cube", "a cube", "two cubes", "nothing"])]
    path = adapter_of(checkpoints["itm"], here)
    figures, rows, page = evaluated(write_lines(here / "refs.jsonl", lines), adapter=str(path))
    for name in ("R@1 image→text", "R@10 text→image", "mean rank image→text", "median rank text→image"):
        assert figures["scores"][name]["base"] and figures["scores"][name]["adapted"]
    assert (
        figures["scores"]["R@10 text→image"]["adapted"]["value"] == 1
        and "by ITC alone" in figures["scores"]["R@1 image→text"]["note"]
    )
    assert figures["scores"]["R@1 image→text"]["gain"] and len(rows) == 4 and "R@1" in page
    assert figures["facts"]["candidates"].startswith("4 texts, 4 images")


# ---------------------------------------------------------------- on the embedded base, and the command line


def test_evaluate_runs_on_the_embedded_base(here, capsys):
    """The reference is the caption that tiny-blip generates, so the exact match of the base is 1."""
    scene(here / "a.png", 1)
    base = str(ROOT / "assets" / "tiny-blip")
    task = TASKS["caption"](load_backbone(base, "cpu"))
    (generated,) = Captioner(task)([here / "a.png"])
    refs = write_lines(here / "refs.jsonl", [{"image": "a.png", "text": generated.text}])
    figures, rows, _ = evaluated(refs, adapter="none", model=base)
    assert figures["scores"]["exact match"]["base"]["value"] == 1 and rows[0]["base"] == generated.text
    assert "CIDEr" in capsys.readouterr().out


def test_a_score_without_meaning_has_no_gain():
    """BLEU-4 of texts of three words is a constant, so neither the table nor the page says that it is better."""
    right = [["one blue cube", "there is one blue cube"]]

    def scored(text: str) -> measures.ModelScores:
        result = measures.ModelScores([0], [[example_of("", "")]], [text], [0.0], [True], "CIDEr")
        result.columns = {"exact match": measures.Column([0.0], [Path()])}
        result.coco = captions.caption_scores([text], right, [])
        result.notes = dict(result.coco.reasons)
        result.scores = {name: Interval(result.coco.values[name], 0, 0) for name in captions.BLEU}
        return result

    task: Any = SimpleNamespace(name="caption")
    comparison_of_both = outputs.Comparison(scored("a red ball on a table"), scored("one blue cube"))
    *others, row = outputs.score_rows(comparison_of_both, task, 0)
    assert row.name == "BLEU-4" and row.note.startswith("adapted: no meaning: no generated text has 4 words")
    assert row.base.value < row.adapted.value == pytest.approx(0.0316, abs=1e-4)
    assert outputs.gain_of(row) is None and "better" not in scores_html([row])
    assert all(outputs.gain_of(other) and "better" in scores_html([other]) for other in others)


def test_the_log_names_the_score_that_runs(checkpoints, here, monkeypatch):
    """The line of the heartbeat has the model and the score."""
    lines = []
    monkeypatch.setattr(captions.java, "tokenize", lambda texts, _package: texts)
    monkeypatch.setattr(captions.java, "spice", lambda texts, *_: lines.append(_phases[-1]()) or (0.0, [0.0] * len(texts)))
    monkeypatch.setattr(captions.java, "meteor", lambda texts, *_: lines.append(_phases[-1]()) or (0.0, [0.0] * len(texts)))
    evaluated(references(here, 2), adapter=str(adapter_of(checkpoints["blip"], here)))
    names = [
        f"scoring the texts of the {model}: {name}, by Java" for model in ("base", "adapter") for name in ("METEOR", "SPICE")
    ]
    assert lines == names


@pytest.mark.parametrize("command", [[], ["--help"], ["evalute"], ["evaluate", "--help"], ["prepare", "--help"], ["evaluate"]])
def test_the_help_lists_the_commands_and_their_flags(command):
    done = subprocess.run([sys.executable, "-m", "lora_blip", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert "Traceback" not in output and done.returncode == (2 if command in (["evalute"], ["evaluate"]) else 0)
    if len(command) == 2:
        assert (f"lora-blip {command[0]}" in done.stdout and "--on-bad-data" in output) or command[0] == "prepare"
    elif command == ["evaluate"]:
        assert done.stderr.startswith("error: references is empty")
    else:
        assert all(name in output for name in ("prepare", "evaluate", "doctor"))
        assert done.stderr.startswith("error: 'evalute' is not a command") == (command == ["evalute"])


def test_flags_of_evaluate():
    assert parse(EvaluateConfig, {}, "--references x.jsonl --base false --adapter run".split()) == EvaluateConfig(
        references="x.jsonl", base=False, adapter="run"
    )
    with pytest.raises(ConfigError, match="MODEL"):
        parse(EvaluateConfig, {}, "--references x.jsonl --adapter none".split())


def test_intervals_draw_images_not_questions():
    """With ten equal questions per image, the interval is as wide as that of the images alone, not three times narrower."""
    values = np.random.default_rng(0).random(100)
    images = [Path(f"{n}.png") for n in range(100)]
    alone = measures.Column(values.tolist(), images).interval(0)
    tenfold = measures.Column(np.repeat(values, 10).tolist(), [image for image in images for _ in range(10)]).interval(0)
    assert tenfold.value == pytest.approx(alone.value)
    assert (tenfold.high - tenfold.low) == pytest.approx(alone.high - alone.low, rel=0.15)
    assert measures.Column([1.0] * 20, images[:4] * 5).interval(0) == (1.0, 1.0, 1.0)
