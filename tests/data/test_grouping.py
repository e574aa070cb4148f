"""Groups of images, and images with equal bytes, are in one part of each split."""

import json
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lora_blip.config import TrainConfig
from lora_blip.data import annotations, grouping, splits
from lora_blip.data.grouping import Groups, components, draw, equal_files
from lora_blip.data.prepare.command import PrepareConfig, prepare
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.regex_limit import LimitedRegex
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.examples import read_examples


def transitive_closure(images: list[int], links: list[tuple[int, str]]) -> set[frozenset[int]]:
    """Return the groups by repeated comparison of all pairs: the oracle of `components`."""
    groups = [{image} for image in images]
    labels = [{link for image, link in links if image in group} for group in groups]
    changed = True
    while changed:
        changed = False
        for one in range(len(groups)):
            for other in range(one + 1, len(groups)):
                if not changed and labels[one] & labels[other]:
                    groups[one] |= groups.pop(other)
                    labels[one] |= labels.pop(other)
                    changed = True
    return set(map(frozenset, groups))


@pytest.mark.parametrize("seed", range(60))
def test_components_are_the_transitive_closure_in_the_order_of_their_first_images(seed):
    rng = random.Random(seed)
    images = rng.sample(range(100), rng.randint(1, 12))
    links = [(rng.choice(images), rng.choice("abcdefg")) for _ in range(rng.randint(0, 14))]
    groups = components(images, links)
    assert set(map(frozenset, groups)) == transitive_closure(images, links)
    assert [group[0] for group in groups] == sorted((group[0] for group in groups), key=images.index)


@pytest.mark.parametrize("seed", range(40))
def test_a_part_has_whole_groups_and_about_the_size(seed):
    rng = random.Random(seed)
    groups = [[(number, image) for image in range(rng.randint(1, 6))] for number in range(rng.randint(2, 15))]
    size = rng.randint(1, sum(map(len, groups)))
    taken, rest = draw(groups, size)
    assert taken and sorted(taken + [image for group in rest for image in group]) == sorted(i for g in groups for i in g)
    assert not {number for number, _ in taken} & {number for group in rest for number, _ in group}
    assert abs(len(taken) - size) <= 6


def frames(folder: Path, videos: int = 6, count: int = 5) -> Path:
    """Write frames of several videos, each with other bytes, and lines with a column `video`."""
    lines = []
    for video in range(videos):
        for frame in range(count):
            path = folder / f"clip{video}" / f"vid{video}_{frame}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (2, 2), (video, frame, 9)).save(path)
            lines.append({"image": str(path.relative_to(folder)), "text": "a", "video": f"v{video}"})
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "x.jsonl"


def videos_of(names: list[str]) -> set[str]:
    return {Path(name).parent.name for name in names}


@pytest.mark.parametrize("by", ["folder", "video", r"vid(\d+)_", r"(clip\d)"])
def test_groups_stay_on_one_side_in_training_and_in_prepare(tmp_path, by):
    source = frames(tmp_path)
    groups = Groups(by)
    examples, _ = annotations.read(source, groups=groups)
    training, validation = splits.split_by_image(examples, 0.3, 0, groups, compare_bytes=True)
    sides = [videos_of([example.name for example in side]) for side in (training, validation)]
    assert all(sides) and not sides[0] & sides[1] and len(training) + len(validation) == 30 and len(validation) == 10
    files = prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out"), splits="0.6,0.2,0.2", group_by=by))
    parts = [videos_of([json.loads(line)["image"] for line in path.read_text().splitlines()]) for path in files.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 6 and len(parts) == 3


def test_a_csv_column_names_the_groups(tmp_path):
    frames(tmp_path)
    (tmp_path / "x.csv").write_text(
        "file;caption;Series\n" + "".join(f"clip{v}/vid{v}_{f}.png;a;{v // 2}\n" for v in range(6) for f in range(5))
    )
    groups = Groups("series")
    examples, _ = annotations.read(tmp_path / "x.csv", groups=groups)
    training, validation = splits.split_by_image(examples, 0.3, 1, groups)
    assert len(validation) == 10 and len(training) == 20


def test_without_groups_and_copies_the_split_is_the_old_one(tmp_path):
    """The images are drawn as before, whether or not their bytes are compared."""
    examples, _ = annotations.read(frames(tmp_path))
    assert splits.split_by_image(examples, 0.3, 5, Groups(""), True) == splits.split_by_image(examples, 0.3, 5)


def test_images_with_equal_bytes_are_on_one_side_and_counted(tmp_path, capsys):
    source = frames(tmp_path)
    copies = []
    for number in range(10):
        original = tmp_path / "clip0" / f"vid0_{number % 5}.png"
        copy = tmp_path / f"copy{number}.png"
        copy.write_bytes(original.read_bytes())
        copies.append({"image": copy.name, "text": "b"})
    with source.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in copies)
    examples, _ = annotations.read(source)
    for seed in range(10):
        sides = splits.split_by_image(examples, 0.3, seed, compare_bytes=True)
        training, validation = ({example.image.read_bytes() for example in side} for side in sides)
        assert training and validation and not training & validation
    assert "15 images have the same bytes as another one; copies are in one part" in capsys.readouterr().out
    prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out")))
    assert "15 images have the same bytes" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(10))
def test_equal_files_are_those_of_equal_bytes(tmp_path, seed):
    """The oracle compares all pairs. Sizes and ends are often equal, so that each stage of the comparison decides."""
    rng = random.Random(seed)
    contents = [bytes([rng.randrange(2)]) * 5000 + bytes([rng.randrange(2)]) + bytes(rng.choice((1, 5000))) for _ in range(12)]
    paths = []
    for number, content in enumerate(contents):
        paths.append((number, tmp_path / str(number)))
        paths[-1][1].write_bytes(content)
    links = equal_files([*paths, (99, tmp_path / "missing")])
    equal = {(a, b) for a, link in links for b, other in links if a < b and link == other}
    assert equal == {(a, b) for a in range(12) for b in range(a + 1, 12) if contents[a] == contents[b]}


@pytest.mark.parametrize("by", ["Szene 1", "szene_1", "SZENE-1"])
def test_a_training_groups_by_a_column_of_a_table_in_any_spelling(tmp_path, by, capsys, make):
    """Before, only `prepare` did."""
    for n in range(12):
        Image.new("RGB", (9, 9), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "x.csv").write_text("image;text;Szene 1\n" + "".join(f"{n}.png;a {n};{n // 3}\n" for n in range(12)))
    config = TrainConfig(annotations=str(tmp_path / "x.csv"), group_by=by, val_fraction=0.25)
    training, validation, _, _ = read_examples(config, CaptionTask(make("blip")))
    scenes = [{int(e.image.stem) // 3 for e in lines} for lines in (training, validation)]
    printed = capsys.readouterr().out
    assert scenes[0] and scenes[1] and not scenes[0] & scenes[1] and "group" in printed
    assert "ignored" not in printed  # the column is used


def test_an_impossible_group_by_names_the_columns_and_the_fix(tmp_path):
    source = frames(tmp_path, 2, 2)
    with pytest.raises(ConfigError, match="not a valid regex"):
        Groups("(vid")
    for by, message in (
        ("scene", "first line are 'image', 'text', 'video'"),
        ("(xyz)", "matches no image path"),
    ):
        groups = Groups(by)
        annotations.read(source, groups=groups)
        with pytest.raises(DataError, match=message):
            groups.require_found()
        with pytest.raises(DataError, match=message):
            prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out"), group_by=by))
    groups = Groups("(clip)")
    examples, _ = annotations.read(source, groups=groups)
    with pytest.raises(DataError, match="one group of all images; choose another column or regex"):
        splits.split_by_image(examples, 0.3, 0, groups)
    with pytest.raises(DataError, match=r"no group is left for .*; give --splits 1"):
        prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out"), group_by="(clip)"))


def test_two_spellings_of_a_folder_or_of_a_value_are_one_group(tmp_path):
    """A link, "..", spaces around a value, and the name of a table's column in capitals."""
    frames(tmp_path, 1, 1)
    (tmp_path / "link").symlink_to(tmp_path / "clip0")
    by_folder, by_column = Groups("folder"), Groups("Video ID")
    for number, folder in enumerate(("clip0", "clip0/../clip0", "link")):
        by_folder.add(number, f"{folder}/x.png", tmp_path / folder / "x.png")
    for number, value in enumerate(("v1", " v1", "v1 ")):
        by_column.add(number, "x.png", "x.png", {"video_id": value})
    for groups in (by_folder, by_column):
        assert len({group for _, group in groups.links}) == 1 and len(groups.links) == 3


def test_images_without_a_group_are_counted(tmp_path, capsys):
    """An empty value is no group; otherwise all images without a value would be one group."""
    source = frames(tmp_path, 4, 3)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    empty = ["", "  ", None, []]
    changed = [line | {"video": empty[number]} if number < 4 else line for number, line in enumerate(lines)]
    source.write_text("".join(json.dumps(line) + "\n" for line in changed))
    groups = Groups("video")
    examples, _ = annotations.read(source, groups=groups)
    assert len(groups.links) == 8
    splits.split_by_image(examples, 0.3, 0, groups)
    assert (
        "WARNING: 4 of 12 images have no group (--group-by), so the split does not keep them with others"
        in capsys.readouterr().out
    )


def test_a_misspelled_group_column_has_a_fix(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    source = tmp_path / "lines.jsonl"
    source.write_text(json.dumps({"image": "1.png", "text": "a", "Día": "lunes"}) + "\n")
    with pytest.raises(DataError, match=r"did you mean --group-by 'Día'\? Otherwise give one of them"):
        groups = Groups("Dia")
        annotations.read(source, groups=groups)
        groups.require_found()


@pytest.mark.parametrize("folders", [1, 2])
def test_a_group_column_without_values_suggests_folders_only_if_there_are_several(tmp_path, folders):
    lines = [{"image": f"f{number % folders}/{number}.png", "text": f"text {number}"} for number in range(4)]
    for line in lines:
        path = tmp_path / line["image"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (40 * len(path.stem), 9 * int(path.stem), 0)).save(path)
    source = tmp_path / "lines.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="no line has a value in this column") as error:
        prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out"), group_by="video"))
    assert ("--group-by folder" in str(error.value)) is (folders > 1)


def test_group_by_without_an_effect_is_reported(tmp_path, capsys):
    """With validation lines of their own, with the column `split`, without validation, and in prepare."""
    source = frames(tmp_path, 4, 3)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    divided = [line | {"split": "val" if number < 2 else "train"} for number, line in enumerate(lines)]
    (tmp_path / "split.jsonl").write_text("".join(json.dumps(line) + "\n" for line in divided))
    task = SimpleNamespace(check=None, pretokenize=None, trim=None, unknown_report=lambda _: "", prepare_data=lambda _: None)
    config = TrainConfig(annotations=str(source), group_by="video")
    for changes, reason in (
        ({"val_annotations": str(source)}, "the validation lines are those of"),
        ({"annotations": str(tmp_path / "split.jsonl")}, "the data have splits of their own"),
        ({"val_fraction": 0.0}, "VAL_FRACTION is 0"),
        ({}, ""),
    ):
        read_examples(replace(config, **changes), task)
        printed = capsys.readouterr().out
        assert f"group_by = 'video' has no effect: {reason}" in printed if reason else "no effect" not in printed
    prepare(PrepareConfig(source=str(tmp_path / "split.jsonl"), output_dir=str(tmp_path / "out"), group_by="video"))
    assert "group_by = 'video' has no effect: the data have splits of their own" in capsys.readouterr().out
    prepare(PrepareConfig(source=str(tmp_path / "split.jsonl"), output_dir=str(tmp_path / "out2"), splits="0.5,0.5"))
    assert "splits = '0.5,0.5' has no effect: the data have splits of their own" in capsys.readouterr().out
    prepare(PrepareConfig(source=str(source), output_dir=str(tmp_path / "out3"), splits="0.5,0.5"))
    assert "no effect" not in capsys.readouterr().out


def test_a_regex_that_takes_years_is_one_error(monkeypatch):
    monkeypatch.setattr(grouping, "SECONDS", 0.3)
    groups, before = Groups("(a+)+b"), signal.getsignal(signal.SIGALRM)
    with pytest.raises(ConfigError, match=r"takes more than 0.3 s, at the path 'aaa.*no repetition inside a repetition"):
        groups.add(0, "a" * 60, "x.png")
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def in_thread(call):
    """Return the result of a call in another thread, where no signal can limit a regex. An error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_regex_that_takes_years_is_one_error_in_another_thread_too(monkeypatch):
    """The search is in another process, which is ended."""
    monkeypatch.setattr(grouping, "SECONDS", 0.3)
    groups = Groups("(a+)+b")
    assert groups.pattern
    with pytest.raises(ConfigError, match=r"takes more than 0.3 s, at the path 'aaa.*no repetition inside a repetition"):
        in_thread(lambda: groups.add(0, "a" * 60, "x.png"))
    assert groups.pattern.process
    assert groups.pattern.process.poll() is not None


def test_a_regex_finds_the_same_groups_in_every_thread():
    names = ["video1/a.png", "vidéo2/\udc80.png", 'x"\\y\n.png', "", "video22/b.png", "cut_7.png"]
    links_of_threads = []
    for run in (lambda call: call(), in_thread):
        groups = Groups(r"(vid[eé]o\d+)|cut_(\d)|y(?=\n)()")
        for number, name in enumerate(names):
            run(lambda groups=groups, number=number, name=name: groups.add(number, name, "x.png"))
        links_of_threads.append(groups.links)
    assert links_of_threads[0] == links_of_threads[1] and [image for image, _ in links_of_threads[0]] == [0, 1, 2, 4, 5]
    process = groups.pattern.process if groups.pattern else None
    assert process and process.poll() is None
    del groups, run
    assert process.wait(10) is not None  # it ends with its regex


def test_a_process_that_has_died_is_an_error_and_no_endless_wait():
    regex = LimitedRegex("(a)", 60)
    assert in_thread(lambda: regex.search("xa")) == ["a", "a"] and regex.process
    regex.process.kill()
    with pytest.raises(TimeoutError):
        in_thread(lambda: regex.search("xa"))
