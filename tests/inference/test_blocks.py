"""Test runs over any number of images: each image gets one line, with any number of kills, resumes and processes."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lora_blip.cli import run_infer
from lora_blip.config import InferConfig
from lora_blip.data.image_folders import MissingImage
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.data.shards import expanded
from lora_blip.errors import ConfigError, ImageError, LockedError, OutputError
from lora_blip.inference import blocks, output
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.finished import FinishedExamples, key_of
from lora_blip.inference.pipeline import infer
from lora_blip.inference.setup import open_task
from lora_blip.lora import injection
from lora_blip.runtime import lock, signals
from lora_blip.tasks.caption import CaptionTask
from tests.support import tiny
from tests.support.kill import forked, run_processes
from tests.support.shards import packed

FILES = (output.FILE_NAME, output.ERRORS_NAME)
COUNT, BROKEN = 23, (3, 8, 22)  # the number of photos, and the indices of the broken ones


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferConfig:
    """Return settings to caption photos in two folders, three of them broken. Change to the parent folder."""
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, COUNT)
    for number in BROKEN:
        Path(f"photos/{number}.png").write_bytes(b"broken")
    Path("photos/deeper").mkdir()
    for number in range(10, 15):
        Path(f"photos/{number}.png").rename(f"photos/deeper/{number}.png")
    return InferConfig(
        model=str(checkpoints["blip"]), adapter="none", images="photos", max_new_tokens=5, batch_size=4, output_dir="out",
        device="cpu",
    )  # fmt: skip


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in FILES if (Path(folder) / name).exists()}


def lines_of(folder: str | Path) -> list[dict]:
    return [json.loads(line) for content in bytes_of(folder).values() for line in content.splitlines()]


def uninterrupted(config: InferConfig) -> dict[str, bytes]:
    """Return both output files of a run that is not killed."""
    return bytes_of(infer(replace(config, output_dir="whole")).parent)


def killed(config: InferConfig, keep: dict[str, int]) -> None:
    """Turn the folder of a finished run into that of a run that was killed when its files had the lengths `keep`."""
    shutil.rmtree(config.output_dir, ignore_errors=True)
    shutil.copytree("whole", config.output_dir)
    settings_file = Path(config.output_dir, output.SETTINGS_NAME)
    settings_file.write_text(settings_file.read_text().replace('"finished": true', '"finished": false'))
    for name, length in keep.items():
        os.truncate(Path(config.output_dir, name), length)


def slowly(seconds: float) -> None:
    """Make every batch of this process take `seconds` from now on."""
    real = CaptionTask.predict

    def predict(*arguments, **named):
        time.sleep(seconds)
        return real(*arguments, **named)

    CaptionTask.predict = predict  # type: ignore[method-assign]


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- sources


def names(where: object) -> list[str]:
    return [str(example.image) for example in ImageSource(str(where)) if not isinstance(example, MissingImage)]


def reasons(where: object) -> list[str]:
    return [example.reason for example in ImageSource(str(where)) if isinstance(example, MissingImage)]


def test_images_are_found_by_file_folder_and_glob(tmp_path):
    photo = tmp_path / "a.png"
    (tmp_path / "deeper").mkdir()
    for path in (photo, tmp_path / "deeper" / "b.JPG", tmp_path / "notes.txt.bak"):
        path.touch()
    assert names(photo) == [str(photo)]
    assert names(tmp_path) == [str(photo), str(tmp_path / "deeper" / "b.JPG")]
    assert names(f"{tmp_path}/*.png") == [str(photo)]
    for nothing in ("*.webp", "x.txt", "deeper/b{0..3}.tar"):
        with pytest.raises(ImageError, match="no image found"):
            ImageSource(tmp_path / nothing)


@pytest.mark.parametrize("seed", range(5))
def test_images_of_a_folder_are_in_the_order_of_their_paths(tmp_path, seed):
    """The order is that of sorted(rglob), also for names that sort before or after the separator, and for link cycles."""
    rng = random.Random(seed)
    folders = [tmp_path]
    for _ in range(40):
        path = rng.choice(folders) / f"{rng.choice('aA.-é')}{rng.choice('b.0 ')}{rng.choice(['', '.png', '.JPG', '.txt'])}"
        if path.exists():
            continue
        if rng.random() < 0.3:
            path.mkdir()
            folders.append(path)
        else:
            path.touch()
    (tmp_path / "last.png").touch()
    (folders[-1] / "circle").symlink_to(tmp_path, target_is_directory=True)
    files = (p for p in tmp_path.rglob("*") if not p.is_dir() and not p.name.startswith("."))  # hidden files are not images
    expected = sorted(p for p in files if p.suffix.lower() in (".png", ".jpg"))
    assert names(tmp_path) == [str(path) for path in expected]


def test_the_search_for_images_keeps_one_folder_in_memory(tmp_path):
    """There are 6,000 images in 30 folders. A list of all examples would need 3 MB."""
    for number in range(6000):
        folder = tmp_path / f"{number // 200:02}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").touch()
    images, peaks = ImageSource(tmp_path), []
    for _ in range(3):  # threads of other tests may allocate meanwhile
        tracemalloc.start()
        assert sum(1 for _ in images) == 6000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 300_000


def test_a_folder_that_cannot_be_listed_is_reported_and_the_others_are_read(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: _closed() if str(path).endswith("b") else real(path))
    assert names(tmp_path) == [str(tmp_path / "a/1.png"), str(tmp_path / "c/3.png")]
    assert reasons(tmp_path) == [f"{tmp_path / 'b'} cannot be listed (Permission denied)"]


def _closed() -> None:
    raise PermissionError(13, "Permission denied")


def test_paths_in_a_list_are_relative_to_the_list(tmp_path):
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (tmp_path / "list.txt").write_bytes("\ufeffa.png\r\n\n  b.png \na.png\n/tmp/c.png\n".encode() + b"caf\xe9.png\n")
    expected = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), str(tmp_path / "a.png"), "/tmp/c.png", str(tmp_path / odd)]
    assert names(tmp_path / "list.txt") == expected
    lines = ['{"image": "a.png", "text": "x"}', "{", '{"text": "x"}', '{"file_name": "b.png"}', '["a.png"]']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert names(tmp_path / "list.jsonl") == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    messages = reasons(tmp_path / "list.jsonl")
    assert [reason.removeprefix(f"{tmp_path}/").split(":")[:2] for reason in messages] == [["list.jsonl", n] for n in "235"]


def test_braces_are_expanded_as_webdataset_does():
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("a{0..12}.tar", "a{0008..0011}.tar", "{x,y}/a{07..08}.tar", "{x}.tar", "a.tar"):
        assert list(expanded(pattern)) == (list(braceexpand(pattern)) if pattern != "{x}.tar" else ["x.tar"])


# ---------------------------------------------------------------- shards


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 9), (10 * number, 99, 30)).save(file, "png")
    return file.getvalue()


def test_the_images_of_a_shard_are_those_that_webdataset_reads(tmp_path):
    """Shards of webdataset's writer, with names too long for a header, are compared with webdataset's reader."""
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as sink:
        for number in range(5):
            key = f"{'long/' * (30 * (number % 2))}{number:06}"
            sink.write({"__key__": key, "png": png(number), "txt": "a cube", "json": {"n": number}, "pyd": {"n": number}})
    with path.open("rb") as file:
        samples = [s for s in webdataset.tariterators.tar_file_iterator(file) if s["fname"].endswith(".png")]
    assert names(path) == [f"{path}/{sample['fname']}" for sample in samples] and len(samples) == 5
    for example, sample in zip(ImageSource(path), samples, strict=True):
        assert open_example(example).tobytes() == Image.open(io.BytesIO(sample["data"])).convert("RGB").tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_a_truncated_or_damaged_shard_is_an_error(tmp_path, seed):
    """A truncated or damaged shard yields its complete members and then an error that names the position."""
    rng = random.Random(seed)
    path = packed(tmp_path / "0.tar", {f"{n}.png": png(n) + b"\0" * rng.randrange(2000) for n in range(6)})
    content, every = path.read_bytes(), names(path)
    with tarfile.open(path) as archive:
        ends = [info.offset_data + info.size for info in archive]
        headers = [info.offset for info in archive]
    padded = [-(-end // 512) * 512 for end in ends]
    for length in [*(rng.randrange(1, padded[-1] + 1) for _ in range(60)), *padded, 512]:
        path.write_bytes(content[:length])
        complete = sum(end <= length for end in ends)
        if complete:
            assert names(path) == every[:complete] and len(reasons(path)) == 1
        else:
            with pytest.raises(ImageError, match="cannot be read"):
                ImageSource(path)
    for place in [start + rng.randrange(512) for start in headers[1:] for _ in range(8)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        assert names(path) == every or len(reasons(path)) == 1
    path.write_bytes(content + content)
    assert names(path) == every and "data follows its end" in reasons(path)[0]
    path.write_bytes(content[: headers[3]] + bytes(2**21))  # a download that left a hole
    assert names(path) == every[:3] and "data follows its end" in reasons(path)[0]


def test_other_files_in_shards_are_never_decoded(config, tmp_path):
    """The shards contain a pickle that would create a file, a link, an empty image, and the files of img2dataset."""
    evil = pickle.dumps(Mark(tmp_path / "mark"))
    files = {"0.png": png(1), "0.pyd": evil, "0.pickle": evil, "0.pth": evil, "0.txt": b"x", "1.png": b"", "__key__": evil}
    packed(tmp_path / "shards" / "0.tar", files)
    with tarfile.open(tmp_path / "shards" / "0.tar", "a") as archive:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "shards" / "0_stats.json").write_text("{}")
    infer(replace(config, images="shards"))
    assert [line["image"] for line in lines_of("out")] == ["shards/0.tar/0.png", "shards/0.tar/1.png", "shards/0.tar/2.png"]
    assert not (tmp_path / "mark").exists()
    errors = [line["error"] for line in lines_of("out") if "error" in line]
    assert errors[0] == "shards/0.tar/1.png is not a usable image: it is empty" and "is a link" in errors[1]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_that_would_need_hours_or_all_memory_are_an_error_at_once(tmp_path, kind):
    """Python's own reader takes a time that is quadratic in the digits: 10 s for 64 kB, hours for a megabyte."""

    def header(kind: bytes, content: bytes) -> bytes:
        info = tarfile.TarInfo("a.png")
        info.type, info.size = kind, len(content)
        return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)

    shard, image = tmp_path / "a.tar", header(tarfile.REGTYPE, png(1))
    start = time.perf_counter()
    for content in (b"1" * 200_000, b"hdrcharset=" + b"1" * 200_000, b"9" * 5000 + b" path=b\n", bytes(2**20 + 1)):
        shard.write_bytes(image + header(kind, content) + image + bytes(1024))
        assert names(shard) == [f"{shard}/a.png"] and "which no program writes" in reasons(shard)[0]
    assert time.perf_counter() - start < 60
    shard.write_bytes(header(kind, b"11 path=b1\n") + image + bytes(1024))
    assert len(names(shard)) == 1 and not reasons(shard)


class Mark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_shards_give_the_same_predictions_as_their_folder(config):
    """The same images in shards of 5 give the same lines. A damaged shard loses only its remaining images."""
    one = uninterrupted(config)
    paths = names("photos")
    for start in range(0, COUNT, 5):
        packed(Path(f"shards/{start // 5:04}.tar"), {path: Path(path).read_bytes() for path in paths[start : start + 5]})
    for number, source in enumerate(("shards", "shards/{0000..0004}.tar", "shards/*.tar")):
        infer(replace(config, images=source, output_dir=f"out{number}"))
        for name, content in bytes_of(f"out{number}").items():
            plain = content.decode()
            for shard in range(5):
                plain = plain.replace(f"shards/{shard:04}.tar/", "")
            assert plain.encode() == one[name]
    os.truncate("shards/0001.tar", 3000)
    infer(replace(config, images="shards"))
    counts = Counter(line["image"].split("/")[1] for line in lines_of("out") if line["image"].endswith("png"))
    assert {shard: counts[shard] for shard in sorted(counts)} == {
        "0000.tar": 5, "0001.tar": counts["0001.tar"], "0002.tar": 5, "0003.tar": 5, "0004.tar": 3
    }  # fmt: skip
    (damaged,) = [line for line in lines_of("out") if line["image"] == "shards/0001.tar"]
    assert counts["0001.tar"] < 5 and "cannot be read after" in damaged["error"]


# ---------------------------------------------------------------- every image has its line


def test_every_image_has_one_line_with_the_text_of_the_api(config, capsys):
    content = uninterrupted(config)
    paths = names("photos")
    task, _ = open_task(config, None)
    expected = [(str(p.image), p.text) for p in Captioner(task, 4)(paths) if not p.error]
    predictions = [json.loads(line) for line in content[output.FILE_NAME].splitlines()]
    left_out = [json.loads(line) for line in content[output.ERRORS_NAME].splitlines()]
    assert [(line["image"], line["text"]) for line in predictions] == expected
    assert Counter(line["image"] for line in predictions + left_out) == Counter(paths) and len(left_out) == len(BROKEN)
    assert all("is not a usable image" in line["error"] for line in left_out)
    count = len(predictions)
    printed = capsys.readouterr().out
    assert f"wrote {count} of {count} lines of whole/predictions.jsonl; 3 could not be read, see whole/errors.jsonl" in printed


def test_the_terminal_shows_the_first_predictions_and_names_the_file_of_all(config, capsys):
    infer(config)
    printed = capsys.readouterr().out
    assert printed.count("Image:") + printed.count("left out:") == blocks.SHOWN < COUNT
    assert (
        "the other predictions are written to out/predictions.jsonl" in printed
        and "--output-dir out with the same settings resumes it" in printed
    )


@pytest.mark.parametrize("sample", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_byte_resumes_to_the_same_files(config, sample):
    """The files may end within a line or a character. Sampled texts are also the same after the resume."""
    config = replace(config, sample=sample)
    Path("photos/ünï.png").write_bytes(png(3))
    content = uninterrupted(config)
    rng = random.Random(int(sample))
    lengths = [{name: rng.randrange(len(text) + 1) for name, text in content.items()} for _ in range(8)]
    lengths += [dict.fromkeys(content, 0), {name: len(text) for name, text in content.items()}]
    lengths += [{output.FILE_NAME: content[output.FILE_NAME].index("ü".encode()) + 1, output.ERRORS_NAME: 0}]
    for keep in lengths:
        killed(config, keep)
        infer(config)
        assert bytes_of("out") == content, keep


def test_a_run_that_is_killed_several_times_writes_the_same_bytes(config):
    """The run is killed at random moments until it is finished."""
    content = uninterrupted(config)
    rng, kills = random.Random(0), 0

    def run() -> None:
        slowly(0.15)
        infer(config)

    while not (settings := output._read_settings(Path("out"))) or not settings["finished"]:
        before = length_of("out")
        child = forked(run)
        if kills == 0:
            time.sleep(0.1)  # kill the first process before it writes
        else:  # kill a later process only after it has written more, because otherwise a slow machine would make no progress
            while length_of("out") == before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == -signal.SIGKILL
        assert all(full.startswith(part[: part.rfind(b"\n") + 1]) for full, part in zip_files(content, bytes_of("out")))
    assert kills > 1 and bytes_of("out") == content


def length_of(folder: str) -> int:
    return len(bytes_of(folder).get(output.FILE_NAME, b""))


def zip_files(one: dict[str, bytes], other: dict[str, bytes]) -> list[tuple[bytes, bytes]]:
    return [(one[name], other[name]) for name in other]


def test_an_image_that_is_listed_twice_is_predicted_twice(config):
    paths = [path.removeprefix("photos/") for path in names("photos")]
    Path("photos/list.txt").write_text("\n".join(paths[:6] + paths[:3] + paths[2:9] + ["gone.png"] * 2))
    config = replace(config, images="photos/list.txt")
    content = uninterrupted(config)
    assert Counter(line["image"] for line in lines_of("whole")) == Counter(names("photos/list.txt"))
    for part in (0.3, 0.7):
        killed(config, {name: int(part * len(text)) for name, text in content.items()})
        infer(config)
        assert bytes_of("out") == content


def test_images_added_before_a_resume_are_predicted_and_no_image_twice(config):
    content = uninterrupted(config)
    killed(config, {output.FILE_NAME: len(content[output.FILE_NAME]) // 2})
    for name in ("0000.png", "15b.png", "99.png", "deeper/0.png"):
        Path("photos", name).write_bytes(png(4))
    before = bytes_of("out")[output.FILE_NAME]
    Path("photos/7.png").unlink()  # no other image is affected, whether this one was already predicted or not
    infer(config)
    counts = Counter(line["image"] for line in lines_of("out"))
    assert set(counts) - {"photos/7.png"} == set(names("photos")) and set(counts.values()) == {1}
    assert bytes_of("out")[output.FILE_NAME].startswith(before[: before.rfind(b"\n") + 1])


def test_finished_examples_are_counted_as_a_multiset():
    """Compare with collections.Counter, with examples in any order."""
    rng = random.Random(0)
    examples = [e for e in _examples(60) for _ in range(rng.randrange(4))]
    rng.shuffle(examples)
    keys = [key_of(e) for e in examples[:50]]
    take, left = FinishedExamples(output.array("Q", keys)).matcher(), Counter(keys)
    for example in [*examples, *_examples(80)]:
        key = key_of(example)
        assert take(example) == (left[key] > 0)
        left[key] -= left[key] > 0


def _examples(count: int) -> list:
    from lora_blip.data.image_folders import example_of

    return [example_of(f"{n // 2}.png", "what?" * (n % 2)) for n in range(count)]


def test_after_a_resume_scores_and_base_texts_include_earlier_images(config, checkpoints, capsys):
    """With COMPARE and REFERENCES, the table of a killed and resumed run is that of a run that was not killed."""
    from lora_blip.lora import adapter_file, targets
    from lora_blip.models.loading import load_backbone

    backbone = load_backbone(str(checkpoints["blip"]), "cpu")
    for x in injection.inject(backbone.model, targets.find(backbone.model, "vit,text", 2, 8.0)).values():
        x.B.data.normal_(std=0.2)
    adapter_file.save("a.safetensors", backbone, task={"name": "caption"})
    Path("refs.jsonl").write_text(
        "".join(json.dumps({"image": path, "text": "a cube", "group": path[7]}) + "\n" for path in names("photos"))
    )
    config = replace(config, adapter="a.safetensors", compare=True, references="refs.jsonl")
    content = uninterrupted(config)
    table = capsys.readouterr().out.split("exact match")[1].split("wrote")[0]
    killed(config, {name: len(text) // 2 for name, text in content.items()})
    infer(config)
    assert bytes_of("out") == content and b"base_text" in content[output.FILE_NAME]
    assert capsys.readouterr().out.split("exact match")[1].split("wrote")[0] == table


# ---------------------------------------------------------------- what is refused


def test_a_run_with_other_settings_is_not_resumed(config, checkpoints):
    content = uninterrupted(config)
    killed(config, {output.FILE_NAME: 300})
    before = bytes_of("out")
    for change, name in (
        ({"max_new_tokens": 6}, "max_new_tokens was 5 and is 6"),
        ({"images": "photos/*.png"}, "images was 'photos' and is 'photos/*.png'"),
        ({"prompt": "a picture of"}, "prompt was not set and is 'a picture of'"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"model": str(checkpoints["opt"])}, "model was"),
        ({"texts": "a cube|two cubes"}, "texts was not set and is"),
        ({"sample": True}, "do_sample was False and is True"),
        ({"resume": False}, "set resume = True to continue it"),
    ):
        with pytest.raises(OutputError) as caught:
            infer(replace(config, **change))
        assert name in str(caught.value) and "OUTPUT_DIR" in str(caught.value)
    assert bytes_of("out") == before
    infer(replace(config, batch_size=7))  # this setting does not change the predictions
    assert {name: sorted(text.splitlines()) for name, text in bytes_of("out").items()} == {
        name: sorted(text.splitlines()) for name, text in content.items()
    }


def test_a_second_start_of_a_finished_run_predicts_only_new_images(config, capsys):
    """A second start adds no line, a new image is added, and an error names changed settings."""
    uninterrupted(config)
    before = bytes_of("whole")
    same = replace(config, output_dir="whole")
    infer(same)
    printed = capsys.readouterr().out
    assert bytes_of("whole") == before and "nothing new to write: an earlier run has written " in printed
    assert "to try an image of an earlier run again, remove its line from that file" in printed
    errors = Path("whole", output.ERRORS_NAME)
    first, *rest = errors.read_text(encoding="utf-8").splitlines(keepends=True)
    shutil.copy("photos/1.png", json.loads(first)["image"])
    errors.write_text("".join(rest), encoding="utf-8")  # as the line says
    infer(same)
    assert json.loads(first)["image"] in {line["image"] for line in lines_of("whole")}
    before = bytes_of("whole")
    shutil.copy("photos/1.png", "photos/zz.png")
    infer(same)
    after = bytes_of("whole")[output.FILE_NAME]
    assert after.startswith(before[output.FILE_NAME]) and after.count(b"\n") == before[output.FILE_NAME].count(b"\n") + 1
    with pytest.raises(OutputError, match="max_new_tokens was"):
        infer(replace(same, max_new_tokens=2))
    with pytest.raises(OutputError, match="exists already"):
        infer(replace(same, resume=False))


def test_a_folder_with_files_of_another_program_is_not_used(config):
    content = uninterrupted(config)
    old = {output.FILE_NAME: b"{}\n"}  # written by a version without run.json
    for files in (old, {output.SETTINGS_NAME: b"{"}, {output.ERRORS_NAME: b"{}\n"}):
        shutil.rmtree("out", ignore_errors=True)
        Path("out").mkdir()
        for name, text in files.items():
            Path("out", name).write_bytes(text)
        before = sorted((p.name, p.read_bytes()) for p in Path("out").iterdir())
        with pytest.raises(ConfigError, match="exists already"):
            infer(config)
        assert sorted((p.name, p.read_bytes()) for p in Path("out").iterdir()) == before
    killed(config, {})
    with Path("out/predictions.jsonl").open("ab") as file:
        file.write(b"mine\n")
    with pytest.raises(OutputError, match=r"predictions.jsonl:21 is not a prediction line"):
        infer(config)
    assert bytes_of("out")[output.FILE_NAME] == content[output.FILE_NAME] + b"mine\n"


def test_two_processes_never_write_into_one_folder(config):
    """The second process raises LockedError while the first one runs. After the first one is killed, it resumes the run."""
    content = uninterrupted(config)
    killed(config, {output.FILE_NAME: 100})
    read_end, write_end = os.pipe()

    def hold() -> None:
        with lock.held(Path("out")):
            os.write(write_end, b"x")
            time.sleep(60)

    child = forked(hold)
    os.read(read_end, 1)
    with pytest.raises(LockedError):
        infer(config)
    os.kill(child, signal.SIGKILL)
    ended(child)
    infer(config)
    assert bytes_of("out") == content


# ---------------------------------------------------------------- errors that are reported


def test_a_full_disk_is_one_message_and_the_run_can_be_resumed(config):
    content = uninterrupted(config)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        sys.stdout, sys.stderr = open(os.devnull, "w"), open("stderr.txt", "w", buffering=1)  # noqa: PTH123, SIM115
        flags = {"output_dir": "out", **{name: getattr(config, name) for name in ("model", "adapter", "images", "device")}}
        flags |= {"batch_size": config.batch_size, "max_new_tokens": config.max_new_tokens}
        sys.argv = ["infer.py", *(part for key, value in flags.items() for part in (f"--{key.replace('_', '-')}", str(value)))]
        run_infer({}, "")

    assert ended(forked(run)) == 2
    stderr = Path("stderr.txt").read_text()
    assert stderr.startswith("error: no room left to write in out (") and "to resume" in stderr and stderr.count("\n") == 1
    assert 0 < len(bytes_of("out")[output.FILE_NAME]) <= 1000
    infer(config)
    assert bytes_of("out") == content


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, signals.SAVED), (signal.SIGUSR1, signals.SAVED), (signal.SIGINT, signals.INTERRUPTED)],
)
def test_a_signal_stops_inference_after_the_batch(config, number, status):
    content = uninterrupted(config)

    def run() -> None:
        real, calls = CaptionTask.predict, []

        def predict(*arguments, **named):
            calls.append(0)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
            return real(*arguments, **named)

        CaptionTask.predict = predict  # type: ignore[method-assign]
        infer(config)

    assert ended(forked(run)) == status
    assert len(lines_of("out")) == 3 * config.batch_size
    infer(config)
    assert bytes_of("out") == content


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {}), pytest.param(3, {"sample": True}, marks=pytest.mark.slow), (2, {"texts": "a cube|two cubes|nothing"})],
)
def test_several_processes_write_the_files_of_one_process(config, ranks, changes):
    """A new run and a run that resumes after any byte write the same files, with several processes or one."""
    config = replace(config, **changes)
    content = uninterrupted(config)
    assert run_processes(ranks, lambda: infer(config)) == [0] * ranks
    assert bytes_of("out") == content
    for part in (0.4, 0.9):
        killed(config, {name: int(part * len(text)) for name, text in content.items()})
        assert run_processes(ranks, lambda: infer(config)) == [0] * ranks
        assert bytes_of("out") == content


def test_several_processes_end_together(config, capfd):
    """An error on one rank stops all. A signal to one rank stops all after their batches. Without a folder, no run starts."""
    content = uninterrupted(config)
    assert run_processes(2, lambda: infer(replace(config, output_dir=""))) == [1, 1]
    assert "set OUTPUT_DIR (or --output-dir) to a new folder" in capfd.readouterr().err
    killed(config, {output.FILE_NAME: 100})
    assert run_processes(2, lambda: infer(replace(config, max_new_tokens=6))) == [1, 1]
    assert capfd.readouterr().err.count("max_new_tokens was 5 and is 6") == 2

    def send_signal() -> None:
        if os.environ["RANK"] == "1":
            real = CaptionTask.predict

            def predict(*arguments, **named):
                os.kill(os.getpid(), signal.SIGTERM)
                return real(*arguments, **named)

            CaptionTask.predict = predict  # type: ignore[method-assign]
        infer(config)

    assert run_processes(2, send_signal) == [signals.SAVED] * 2
    assert 0 < len(lines_of("out")) < COUNT
    assert run_processes(2, lambda: infer(config)) == [0, 0] and bytes_of("out") == content


def test_after_a_rank_is_killed_the_output_is_complete(config, capfd):
    """Rank 1 is killed in a batch, then rank 0. All ranks restart each time, and every image is in the output once."""
    content = uninterrupted(config)
    deaths = [("1", "0", 2), ("0", "1", 1)]

    def act() -> None:
        real, calls = CaptionTask.predict, []

        def predict(*arguments, **named):
            calls.append(0)
            if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], len(calls)) in deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        CaptionTask.predict = predict  # type: ignore[method-assign]
        infer(config)

    assert run_processes(2, act, restarts=2) == [0, 0]
    printed = capfd.readouterr().out
    assert printed.count("resuming after") == 2 and "already done" not in printed and bytes_of("out") == content
