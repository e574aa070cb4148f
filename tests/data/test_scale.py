"""Test that the fast paths for a million lines equal the plain ones, open no image, and need little memory."""

import dataclasses
import gc
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from benchmarks.studies.lines import KINDS, STAGES, lines_of, measure
from lora_blip.config import TrainConfig
from lora_blip.data import annotations, images, splits
from lora_blip.data.augmentation import LEFT_OR_RIGHT, names_side
from lora_blip.data.dataset import ImageDataset
from lora_blip.data.entries import as_text, canonical
from lora_blip.data.example import Example, ExampleBuilder
from lora_blip.data.formats import STRICT, _object
from lora_blip.data.image_folders import MissingImage
from lora_blip.data.loader import loader
from lora_blip.data.paths import FEW, resolved
from lora_blip.data.shards import ShardImage
from lora_blip.errors import DataError
from lora_blip.models.text_check import UNBOUNDED, TokenBounds
from lora_blip.models.token_rows import plain_ids, special_ids
from lora_blip.runtime.untrusted import parsed
from lora_blip.tasks.registry import TASKS
from lora_blip.tasks.retrieval import positives
from lora_blip.training import loop, resume
from tests.support import tiny

often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PIECES = (
    *"a the red cube cubes on top of blue table 7 1,024 don't ... ! ? - _ ~ \\ ` # $ %".split(),
    "[SEP]", "[sep]", "<image>", "</s>", "<pad>", "[DEC]", "[", "<", "]", "Ünïcödé", "日本", "ß", "\u0301", "🙂", "\u200b", "ﬁ",
    "İ", "supercalifragilistic", "x" * 40, "y" * 101, "CUBE", "Red", "\x07", "\x7f", "–",
)  # fmt: skip


def some_text(rng: random.Random) -> str:
    """Return a random tidy text of 1 to 40 pieces, with or without spaces. Half of all texts have only ordinary words."""
    pool = PIECES[:12] if rng.random() < 0.5 else PIECES
    text = "".join(rng.choice(pool) + rng.choice((" ", " ", " ", "")) for _ in range(rng.choice((1, 2, 5, 9, 14, 40))))
    return " ".join(text.split()) or "a"


# ---------------------------------------------------------------- texts


def tokenizers(make: Any) -> dict[str, Any]:
    """Return the kinds of tokenizers in use, and some for which bounds are not valid."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    poor = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "red", "##s"]  # no digits, no punctuation
    unigram = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁red", -3.0), ("▁the", -3.0)]
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "cube": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    longer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    longer.normalizer, longer.pre_tokenizer = normalizers.Replace("a", "bbbbbbbb"), pre_tokenizers.ByteLevel()
    return {
        "word pieces": make("blip").tokenizer,
        "byte-level BPE": make("opt").tokenizer,
        "unigram": T5Tokenizer(vocab=[*unigram, *((chr(c), -5.0 - c / 100) for c in range(33, 127))]),
        "unigram without digits": T5Tokenizer(vocab=[*unigram, *((c, -5.0) for c in letters)]),
        "cased word pieces": BertTokenizer(vocab={p: i for i, p in enumerate(poor)}, do_lower_case=False),
        "poor word pieces": BertTokenizer(vocab={p: i for i, p in enumerate(poor)}, do_lower_case=True),
        "whole words": PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"),
        "one that makes texts longer": PreTrainedTokenizerFast(tokenizer_object=longer),
    }


UNDERSTOOD = ("word pieces", "byte-level BPE", "unigram")


def test_a_bound_is_at_least_the_number_of_tokens(make):
    """A text with a bound contains no special token, and not only unknown tokens."""
    rng, bounded = random.Random(0), dict.fromkeys(UNDERSTOOD, 0)
    for name, tokenizer in tokenizers(make).items():
        special = special_ids(tokenizer)
        bounds = TokenBounds(tokenizer, special)
        assert (bounds.longest_word > 0) is (name in UNDERSTOOD), name
        for _ in range(600):
            text = some_text(rng)
            ids = plain_ids(tokenizer, text)
            for most in (bounds.upper_bound(text), bounds.upper_bound(text, 0), bounds.upper_bound_of_longest([text, "a"])):
                assert len(ids) <= most, (name, text)
                if most < UNBOUNDED:
                    assert not special & {*ids} and {*ids} - {tokenizer.unk_token_id}, (name, text)
                    bounded[name] += 1
    assert min(bounded.values()) > 600  # bounds exist for most texts, so the test compares something


def test_closer_bounds_are_exact_for_word_pieces(make):
    tokenizer = make("blip").tokenizer
    bounds, rng = TokenBounds(tokenizer, special_ids(tokenizer)), random.Random(1)
    for _ in range(200):
        text = " ".join(rng.choices(PIECES[:12], k=rng.randint(1, 30)))
        assert bounds.upper_bound(text, 0) == len(plain_ids(tokenizer, text))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("blip", "caption"), ("opt", "caption"), ("t5", "caption"), ("vqa", "vqa"), ("blip", "vqa"), ("opt", "vqa"), ("t5", "vqa"),
     ("itm", "retrieval"), ("itm2", "retrieval")],
)  # fmt: skip
def test_a_line_is_accepted_or_refused_as_if_it_were_tokenized(make, monkeypatch, kind, name):
    """For random lines, the bounds, `pretokenize` and a plain tokenization give the same reason. Few lines are tokenized."""
    task, rng = TASKS[name](make(kind)), random.Random(2)
    lines = [
        Example(Path("a.png"), "" if name == "vqa" else some_text(rng), "a.png", 1, "", some_text(rng),
                tuple(some_text(rng) for _ in range(rng.randint(1, 4))))
        for _ in range(400)
    ]  # fmt: skip
    quick = [task.check(line) for line in lines]
    task.pretokenize(lines)
    assert [task.check(line) for line in lines] == quick
    task.pretokenize([])
    monkeypatch.setattr(TokenBounds, "upper_bound", lambda *_: UNBOUNDED)
    monkeypatch.setattr(TokenBounds, "upper_bound_of_longest", lambda *_: UNBOUNDED)
    assert [task.check(line) for line in lines] == quick
    assert sum(not reason for reason in quick) > 20 and len({reason[:20] for reason in quick}) > 3


def test_ordinary_captions_and_answers_are_not_tokenized(make, monkeypatch):
    tasks = [TASKS["caption"](make("blip")), TASKS["vqa"](make("vqa"))]
    texts = ("a red cube", "what is it?", ("a red cube", "red"))
    for task in tasks:
        line = Example(Path("a.png"), texts[0], "a.png", 1, "", *texts[1:])
        assert task.check(line) == ""  # which looks at the tokenizer once
        monkeypatch.setattr(type(task.backbone.tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized"))
        task.pretokenize([line])
        assert task.check(line) == ""
        monkeypatch.undo()


# ---------------------------------------------------------------- lines

odd = st.sampled_from(["a", " a  b ", "a\tb", "\ud800", "é", ""])
values = st.none() | st.booleans() | st.integers() | st.text(max_size=9) | odd
keys = (
    "image", "image_path", "file_name", "text", "caption", "question", "answers", "answer", "group", "id", "prompt",
    "question_id",
)  # fmt: skip
entries = st.dictionaries(
    st.sampled_from(keys), values | st.lists(values | st.fixed_dictionaries({"answer": values}), max_size=3), max_size=6
)


def plainly(entry: dict[str, Any], root: Path) -> Example | str:
    """Return the Example of an entry, computed by `canonical` and a Path."""
    line = canonical(entry, answered=False)
    if isinstance(line, str):
        return line
    asked = "question" in line
    return Example(
        root / line["image"], "" if asked else line["text"], line["image"], 1, as_text(line.get("group")) or "",
        line["question"] if asked else "", tuple(line["answers"]) if asked else (), prompt=line.get("prompt", ""),
        question_id=line.get("question_id", "") if asked else "",
    )  # fmt: skip


@often
@given(records=st.lists(entries, min_size=1, max_size=4), root=st.sampled_from(["", ".", "/", "a/b", "/a//b/", "../c"]))
def test_the_quick_path_of_the_builder_gives_the_same_example(records, root):
    builder = ExampleBuilder(Path("x.jsonl"), Path(root))
    for entry in records:
        result = builder.build(dict(entry), 1)
        assert (result[1] if isinstance(result, tuple) else result) == plainly(dict(entry), Path(root))


@pytest.mark.parametrize("group", [0, 0.0, False, None, [], {}, "", "g"])
def test_both_paths_of_the_builder_give_the_same_group(group):
    entry = {"image": "a.png", "text": "a cube", "group": group}
    assert ExampleBuilder(Path("x.jsonl"), Path()).build(dict(entry), 1) == plainly(dict(entry), Path())


@often
@given(
    name=st.lists(st.sampled_from(["a", "b.png", ".", "..", "/", "//", "./", "../", ".hidden", "é", "\\", " "]), min_size=1),
    root=st.sampled_from(["", ".", "/", "a/b", "/a//b/", "../c", "./d"]),
)
def test_a_name_becomes_the_path_that_pathlib_makes_of_it(name, root):
    image = "".join(name)
    assert ExampleBuilder(Path("x"), Path(root))._file(image) == str(Path(root) / image)


@often
@given(
    st.recursive(values, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3)).map(
        json.dumps
    )
    | st.lists(st.sampled_from(['{"a": 1', '"a":', "2", ",", "{", "}", "[", "]", '"b: c"', "NaN", " ", "1e999"])).map("".join)
    | st.sampled_from(['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}', '{"a": ":", "a": 1}', '{"a": NaN}', "[" * 99 + "]" * 99])
)
def test_a_json_line_means_what_the_strict_reader_says(line):
    """Repeated keys, invalid constants and deep brackets give the same message by both decoders."""
    messages = []
    for read in (_object, lambda text: parsed(text, STRICT)):
        try:
            messages.append(repr(read(line)))
        except ValueError as error:
            messages.append(f"refused: {error}")
    assert messages[0] == messages[1]


def test_an_example_behaves_as_a_frozen_dataclass():
    """An Example is compared, hashed, replaced, pickled and printed by its values. It is immutable and has no __dict__."""
    one = Example(Path("a") / "b.png", "a cube", "b.png", 3, "g", "q", ("x", "y"))
    assert one.image == Path("a/b.png") and isinstance(one.image, Path) and one.file == "a/b.png"
    assert one == Example(Path("a/./b.png"), "a cube", "b.png", 3, "g", "q", ("x", "y")) != dataclasses.replace(one, text="c")
    moved = dataclasses.replace(one, image=Path("c.png"))
    assert moved.image == Path("c.png") and one.image == Path("a/b.png")
    assert pickle.loads(pickle.dumps(one)) == one and len({one, dataclasses.replace(one)}) == 1
    assert one == dataclasses.replace(one, source="elsewhere.jsonl")  # `source` is not part of the comparison
    assert repr(one).startswith("Example(image=PosixPath('a/b.png'), text='a cube', name='b.png', line=3")
    for name in ("image", "text", "new"):
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
            setattr(one, name, "x")
    assert not hasattr(one, "__dict__") and one.words == "a cube q x y"


def test_images_in_shards_are_examples_too():
    member = ShardImage(Path("s.tar/a.png"), "", "s.tar/a.png", 0, shard="s.tar", offset=512, size=9)
    gone = MissingImage(Path("x"), "", "x", 0, reason="closed")
    for one in (member, gone):
        assert pickle.loads(pickle.dumps(one)) == one and not hasattr(one, "__dict__") and isinstance(one.image, Path)
        assert dataclasses.replace(one, question="what?").question == "what?"
    assert dataclasses.replace(member, question="what?").offset == 512 and member != dataclasses.replace(member, offset=0)


@often
@given(
    st.text(alphabet="lefTrighİıſ\u212a -x", max_size=12) | st.sampled_from(["on the LEFT", "upright", "a rightmost", "bright"])
)
def test_the_quick_search_for_left_and_right_equals_the_regex(text):
    assert names_side(text) is (LEFT_OR_RIGHT.search(text) is not None)


# ---------------------------------------------------------------- places


@pytest.fixture
def linked(tmp_path: Path) -> list[str]:
    """A few hundred files, with paths through links to folders, links to files, and ".."."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    for number in range(FEW + 20):
        (tmp_path / "real" / f"{number}.png").touch()
    (tmp_path / "real" / "again.png").symlink_to("3.png")
    (tmp_path / "real" / "chain.png").symlink_to(tmp_path / "link" / "again.png")
    (tmp_path / "real" / "broken.png").symlink_to("gone.png")
    (tmp_path / "real" / "below" / "up").symlink_to("..")
    names = [*(f"{number}.png" for number in range(FEW + 20)), "again.png", "chain.png", "broken.png", "never.png", ".", "a/.."]
    ways = ["real", "link", "real/below/..", "link/below/up", "gone", "real/below/up/below", ""]
    return [f"{tmp_path}/{way}/{name}" if way else name for way in ways for name in names]


def test_resolved_paths_equal_those_of_pathlib(linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "link")
    relative = [*linked, "3.png", "./3.png", "../real/again.png", "below/up/3.png", ".."]
    assert resolved(relative) == {file: str(Path(file).resolve()) for file in relative}


def test_a_folder_that_cannot_be_listed_is_resolved_file_by_file(linked, monkeypatch):
    def closed(_: Any) -> Any:
        raise PermissionError(13, "closed")

    monkeypatch.setattr(os, "scandir", closed)
    assert resolved(linked) == {file: str(Path(file).resolve()) for file in linked}


def split_plainly(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the split, computed image by image with Paths."""
    files = {image: image.resolve() for image in {example.image for example in examples}}
    images = sorted(set(files.values()))
    random.Random(seed).shuffle(images)
    held_out = set(images[: max(1, round(len(images) * fraction))])
    train = [example for example in examples if files[example.image] not in held_out]
    return train, [example for example in examples if files[example.image] in held_out]


def test_the_split_equals_one_computed_with_pathlib(linked):
    """The order is also that of Path for names that sort differently as text: a-b/x, a/x."""
    spelled = [*linked, *(f"/{folder}/{name}" for folder in ("a", "a-b", "a.b", "a/c") for name in "xyz")]
    examples = [Example(Path(file), "t", file, number) for number, file in enumerate(spelled) if not file.endswith(".")]
    for seed in range(3):
        assert splits.split_by_image(examples, 0.3, seed) == split_plainly(examples, 0.3, seed)


def test_positives_are_all_texts_of_the_same_image(linked):
    """A text is right for an image if it is in the set of all texts of the image."""
    rng = random.Random(0)
    some = [*rng.sample([file for file in linked if not file.endswith(".")], 60), *linked[:20]]
    examples = [Example(Path(file), rng.choice("abcdefgh"), file, n) for n, file in enumerate([*some, *some])]
    task = SimpleNamespace()
    TASKS["retrieval"].prepare_data(task, examples)
    every: dict[Path, set[str]] = {}
    for example in examples:
        every.setdefault(example.image.resolve(), set()).add(example.text)
    expected = torch.tensor([[other.text in every[one.image.resolve()] for other in examples] for one in examples])
    assert torch.equal(positives(examples, task.texts_of_image), expected) and 0 < expected.float().mean() < 1


# ---------------------------------------------------------------- pictures that are looked at late


def lazily(tmp_path: Path, source: Path, **options: Any) -> TrainConfig:
    chosen: dict[str, Any] = {
        "epochs": 1, "batch_size": 4, "num_workers": 0, "precision": "fp32", "targets": "vit:r=2", "check_images": "lazy",
        "model": str(tmp_path / "model"), "annotations": str(source), "output_dir": str(tmp_path / "runs"), "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**chosen | options)


@pytest.fixture
def source(tmp_path: Path, checkpoints: dict[str, Path]) -> Path:
    (tmp_path / "model").symlink_to(checkpoints["blip"])
    return tiny.write_photos(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_broken_image_stops_a_lazy_run_with_its_line(source, tmp_path, workers, damage):
    path = tmp_path / "photos" / "7.png"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"annotations\.jsonl:8: .*7\.png (does not exist|cannot be decoded)") as error:
        loop.train(lazily(tmp_path, source, num_workers=workers, val_fraction=0.0))
    assert "fix the line" in str(error.value)
    with pytest.raises(DataError, match=r"annotations\.jsonl:8: "):
        loop.train(lazily(tmp_path, source, check_images="all"))


@pytest.mark.slow
def test_the_command_prints_the_error_of_a_broken_image_in_one_line(source, tmp_path):
    """This also holds in a worker process, whose traceback would need twenty lines."""
    (tmp_path / "photos" / "7.png").unlink()
    config = lazily(tmp_path, source, val_fraction=0.0)
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("model", "annotations", "output_dir")]
    command = [sys.executable, "train.py", *flags, "--check-images=lazy", "--val-fraction=0", "--device=cpu", "--num-workers=1"]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, "--targets=vit:r=2"], check=False, capture_output=True, text=True, env=alone)
    error_lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert (
        ended.returncode == 2
        and len(error_lines) == 1
        and "annotations.jsonl:8: " in error_lines[0]
        and "Traceback" not in ended.stderr
    )


def test_lazy_image_checks_train_the_same_adapter(source, tmp_path):
    late, early = (load_file(loop.train(lazily(tmp_path, source, check_images=how))) for how in ("lazy", "all"))
    assert late.keys() == early.keys() and all(torch.equal(late[key], early[key]) for key in late)


def test_lazy_image_checks_find_bad_lines_before_the_first_step(source, tmp_path):
    source.write_text(source.read_text() + '{"image": "photos/1.png"}\n')
    with pytest.raises(DataError, match=r"annotations\.jsonl:13: no text"):
        loop.train(lazily(tmp_path, source))


def test_lazy_image_checks_open_no_image_before_it_is_needed(source, monkeypatch, make):
    """Reading, checking, splitting and the digest of the lines do not access an image file."""
    for path in (source.parent / "photos").iterdir():
        path.unlink()
    monkeypatch.setattr(images, "open_image", lambda *_: pytest.fail("opened"))
    task = TASKS["caption"](make("blip"))
    examples, _ = annotations.read(source, check=task.check, decode=False, pretokenize=task.pretokenize)
    training, validation = splits.split_by_image(examples, 0.25, 0)
    assert len(training) == 9 and resume.lines_digest(training, False) != resume.lines_digest(validation, False)
    with pytest.raises(OSError, match=r"\.png"):
        resume.lines_digest(training, True)


def test_different_lines_have_different_digests(source):
    examples, _ = annotations.read(source)
    whole = resume.lines_digest(examples, False)
    assert resume.lines_digest(list(examples), False) == whole
    for change in ({"text": "x"}, {"name": "x"}, {"question": "x"}, {"answers": ("x",)}):
        assert resume.lines_digest([dataclasses.replace(examples[0], **change), *examples[1:]], False) != whole
    assert resume.lines_digest(examples[::-1], False) != whole != resume.lines_digest(examples[1:], False)
    plain = hashlib.sha256()
    for e in examples:
        plain.update(json.dumps([e.name, e.text, e.question, e.answers, *resume._samples_of(e.image)]).encode())
    assert resume.lines_digest(examples, True) == plain.hexdigest()  # the digest in existing checkpoints


def test_another_value_of_check_images_makes_another_run(source, tmp_path, make):
    """A digest of only the lines does not change if an image file is replaced."""
    backbone, (examples, _) = make("blip"), annotations.read(source)
    configs = [lazily(tmp_path, source, check_images=how) for how in ("lazy", "all")]
    now = [resume.identity(config, "fp32", backbone, examples, [], 1) for config in configs]
    assert {*resume.differences(*now)} >= {"check_images was 'lazy' and is 'all'", "training lines are not the same"}
    Image.new("RGB", (9, 9), "red").save(tmp_path / "photos" / "1.png")
    again = [resume.identity(config, "fp32", backbone, examples, [], 1) for config in configs]
    changed = [resume.differences(*pair) for pair in zip(now, again, strict=True)]
    assert changed == [[], ["training lines are not the same"]]


def test_workers_return_the_same_items_as_one_process(source, make):
    examples, _ = annotations.read(source, decode=False)
    pictures = ImageDataset(examples, make("blip").image_processor, True, 1)
    stacks = [torch.cat([s.pixel_values for s in loader(pictures, 4, False, 1, workers, False)]) for workers in (0, 2)]
    assert torch.equal(*stacks)


# ---------------------------------------------------------------- how long, how much


def prepared(kind: str, count: int, path: Path, make) -> tuple[list[Example], list[Example]]:
    """Do all that a run does with its lines before the first step: read, check, count tokens, split, and digest."""
    task = TASKS["caption" if kind.startswith("captions") else "vqa"](make("blip"))
    task.checker.bounds.upper_bound("a", 0)
    path.write_text("".join(lines_of(kind, count)))
    examples, _ = annotations.read(path, check=task.check, decode=False, find_all=False, pretokenize=task.pretokenize)
    training, validation = splits.split_by_image(examples, 0.1, 0)
    resume.lines_digest(training, False)
    return training, validation


CALLS = {"captions, 5 an image": 150, "questions, 1 an image": 375}  # 106 and 248 today, with those that make the lines


def calls_of(act: Callable[[], object]) -> int:
    """Return the number of calls of Python and C functions. Unlike seconds, it does not depend on the load of the machine."""
    calls = 0

    def count(_frame, event: str, _argument) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("kind", ["captions, 5 an image", pytest.param("questions, 1 an image", marks=pytest.mark.slow)])
def test_the_work_for_a_line_is_constant(kind, tmp_path, make):
    """Twice as many lines need twice as many calls, and at most CALLS per line. `benchmarks.studies.lines` measures seconds."""
    prepared(kind, 100, tmp_path / "x.jsonl", make)  # the model and the tokens of the words are cached from now on
    few, many = (calls_of(lambda n=n: prepared(kind, n, tmp_path / "x.jsonl", make)) for n in (5_000, 10_000))
    assert (many - few) / 5_000 < CALLS[kind] and many < 2.05 * few


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions, 5 an image", "questions, 1 an image"])
def test_a_hundred_thousand_lines_take_at_most_800_bytes_each(kind, tmp_path, make):
    prepared(kind, 5_000, tmp_path / "x.jsonl", make)  # the model, the tokens of the words and the heap exist from now on
    gc.collect()
    before = resident()
    training, validation = prepared(kind, 100_000, tmp_path / "x.jsonl", make)
    assert len(training) + len(validation) == 100_000 and resident() - before < 100_000 * 800
    gc.unfreeze()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_of_lines_runs(tmp_path, kind):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(lines_of(kind, 100)))
    assert {*STAGES, "peak"} == measure(kind, str(path)).keys()
