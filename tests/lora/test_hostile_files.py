"""Files of strangers: whatever is in them is read or refused by the one error of its reader, soon and in little memory."""

import io
import json
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lora_blip.data import annotations, formats, images
from lora_blip.data.entries import canonical
from lora_blip.data.formats import jsonl_entries
from lora_blip.data.images import open_image
from lora_blip.data.prepare.folders import Folder
from lora_blip.data.prepare.sources import find_sources
from lora_blip.data.tables import csv_entries, tsv_entries
from lora_blip.errors import AdapterError, DataError, ImageError
from lora_blip.inference.setup import describe, task_of
from lora_blip.lora import adapter_file, attached, header
from lora_blip.lora.fingerprint import sample
from lora_blip.runtime import runs, untrusted
from lora_blip.runtime.runs import ADAPTER_NAME

often = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
MESSAGE = 1500  # characters that an error may have
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest forgets what images.py asks for


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """What would hang fails."""

    def overdue(*_: object) -> None:
        raise TimeoutError("not done in 20 s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def megabytes(work: Callable[[], object]) -> float:
    """By how much the process grows at most meanwhile."""
    if not Path("/proc/self/clear_refs").exists():
        work()
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = in_status("VmRSS")
    work()
    return in_status("VmHWM") - before


def in_status(what: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def no_file(folder: Path) -> dict[str, Path]:
    """What a path can lead to that is no file to read → such a path."""
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "to a pipe").symlink_to(folder / "pipe")
    (folder / "empty").touch()
    names = ("a folder", "pipe", "loop", "dangling", "to a pipe", "empty", "n\0l", "x" * 300, "a/" * 3000)
    return {name[:20]: folder / name for name in names} | {
        name: Path(name) for name in ("/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kcore") if Path(name).exists()
    }


# ---------------------------------------------------------------- adapters

MODULE = "part.linear"
WEIGHT = torch.arange(12.0).reshape(3, 4)  # (out, in)


class Model(nn.Module):
    """A linear at MODULE, and a head whose weight is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"linear": nn.Linear(4, 3, bias=False), "head": nn.Linear(4, 3, bias=False)})
        self.part["linear"].weight.data.copy_(WEIGHT)
        self.part["tied"] = nn.Linear(4, 3, bias=False)
        self.part["tied"].weight = self.part["head"].weight


def about() -> dict[str, Any]:
    """A header as one is saved."""
    return {
        "format_version": 1,
        "lora": {"dropout": 0.0, "modules": {MODULE: {"module": MODULE, "r": 2, "alpha": 4.0}}},
        "base": {"name": "b", "architecture": "Model", "samples": {MODULE: sample(Model().part["linear"])}},
        "task": {"name": "caption", "prompt": "", "generation": {"max_new_tokens": 9, "num_beams": 1, "do_sample": False}},
        "training": {"steps": 3, "finished": True, "settings": {"annotations": "a.jsonl", "image_root": ""}},
        "merge_drift": {},
        "versions": {},
    }


def entries(dtype: str = "F32", a: Any = (2, 4), b: Any = (3, 2)) -> dict[str, Any]:
    sizes = [4 * int(np.prod(shape)) for shape in (a, b)]
    return {
        f"{MODULE}.lora_A": {"dtype": dtype, "shape": list(a), "data_offsets": [0, sizes[0]]},
        f"{MODULE}.lora_B": {"dtype": dtype, "shape": list(b), "data_offsets": [sizes[0], sum(sizes)]},
    }


BODY = struct.pack("<14f", *(0.5 + number for number in range(14)))  # A (2, 4), B (3, 2)


def packed(told: Any, tensors: Any = None, body: bytes = BODY, claimed: int | None = None) -> bytes:
    """A .safetensors file, however wrong; `told` is its metadata, as a text or an object."""
    text = told if isinstance(told, str) else json.dumps(told)
    head = json.dumps({"__metadata__": {"lora_blip": text}} | (entries() if tensors is None else tensors)).encode()
    return (len(head) if claimed is None else claimed).to_bytes(8, "little") + head + body


def put(value: Any, *place: str) -> dict[str, Any]:
    """The good header with something else at a place."""
    made = found = about()
    for key in place[:-1]:
        found = found[key]
    found[place[-1]] = value
    return made


def entry(**other: Any) -> dict[str, Any]:
    return put({"module": MODULE, "r": 2, "alpha": 4.0} | other, "lora", "modules", MODULE)


def renamed(name: str) -> bytes:
    """The good adapter, its module called otherwise throughout."""
    told = json.loads(json.dumps(about()).replace(MODULE, "NAME").replace("NAME", json.dumps(name)[1:-1]))
    return packed(told, {key.replace(MODULE, name): value for key, value in entries().items()})


def test_the_good_file_is_read_and_loaded(tmp_path):
    (tmp_path / "a").write_bytes(packed(about()))
    model = Model()
    adapter_file.load(model, tmp_path / "a")
    assert list(attached.adapters(model)) == [MODULE] and torch.equal(model.part["linear"].weight, WEIGHT)


BOTH = entries().items()
HOSTILE: dict[str, tuple[bytes, str]] = {  # what is wrong → the file, what is said
    "a header of 100 GB is claimed": (packed(about(), claimed=10**11), "its header has 100,000,000,000 bytes"),
    "a header as long as a number can say": (packed(about(), claimed=2**64 - 1), "more than 8,388,608"),
    "a header longer than the file": (packed(about(), claimed=2**20), "not a complete"),
    "no header": (packed(about(), claimed=0), "not a complete"),
    "a metadata of 50 MB": (packed("x" * 50_000_000), "its header has 50,"),
    "a tensor of 100 GB is claimed": (
        packed(about(), entries(a=(2, 12_500_000_000))), "not a complete",
    ),
    "a shape past 64 bits": (packed(about(), entries(a=(2**40, 2**40))), "not a complete"),
    "nothing, a billion times": (packed(about(), entries(a=(2, 0), b=(10**9, 2)), b""), "not a complete"),
    "an empty tensor": (packed(about(), entries(a=(2, 0)), BODY[-24:]), "but its header says"),
    "zero by more than 64 bits": (
        packed(entry(r=2**31 - 1), entries(a=(0, 2**63), b=(3, 0)), b""), "but its header says",
    ),
    "offsets that overlap": (
        packed(about(), {key: value | {"data_offsets": [0, 32]} for key, value in BOTH}), "not a complete",
    ),
    "offsets below zero": (packed(about(), {key: value | {"data_offsets": [-32, 0]} for key, value in BOTH}), "not a complete"),
    "offsets beyond the end": (packed(about(), entries(), BODY[:-1]), "not a complete"),
    "bytes that no tensor has": (packed(about(), entries(), BODY + b"\0"), "not a complete"),
    "no dimension": (packed(about(), entries(a=(), b=(3, 2)), BODY[:28]), "but its header says"),
    "three dimensions": (packed(about(), entries(a=(2, 2, 2))), "but its header says"),
    "a hundred dimensions": (packed(about(), entries(a=[1] * 100), BODY[:28]), "but its header says"),
    "r of a billion": (packed(entry(r=10**9)), r"its header says r=1000000000 in float32"),
    "r of 10**40": (packed(entry(r=10**40)), "cannot be understood"),
    "r of no number": (packed(entry(r="2")), "entry for 'part.linear' cannot be understood"),
    "r true": (packed(entry(r=True)), "cannot be understood"),
    "alpha infinite": (packed(json.dumps(entry()).replace("4.0", "1e999")), "cannot be understood"),
    "alpha NaN": (packed(entry(alpha=float("nan"))), "cannot be understood"),
    "alpha zero": (packed(entry(alpha=0)), "cannot be understood"),
    "alpha below zero": (packed(entry(alpha=-1)), "cannot be understood"),
    "alpha 1e308": (packed(entry(alpha=1e299)), "update of 'part.linear' overflows float32"),
    "rows without a block": (packed(entry(rows=[0, 3])), "cannot be understood"),
    "huge rows": (packed(entry(rows=[0, 10**30], block="")), "cannot be understood"),
    "rows below zero": (packed(entry(rows=[-3, 0], block="")), "cannot be understood"),
    "rows that are not B's": (packed(entry(rows=[0, 2], block="")), r"its header says r=2 in float32 for 2 rows"),
    "a block with a dot": (packed(entry(rows=[0, 3], block="a.b")), "cannot be understood"),
    "an entry of another module": (packed(entry(module="x")), "the entry for"),
    "an entry under another name": (packed(entry(block="q", rows=[0, 3])), "describes 'part.linear.q'"),
    "brackets, a million deep": (packed("[" * 1_000_000), "nested too deeply"),
    "brackets, 900 deep": (packed('{"a": ' + "[" * 900 + "]" * 900 + "}"), "nested too deeply"),
    "no JSON": (packed("hello"), "header cannot be understood"),
    "a list": (packed("[1, 2]"), "header cannot be understood"),
    "a key twice": (packed(json.dumps(about())[:-1] + ', "task": {}}'), "the key 'task' occurs twice"),
    "a number of 100,000 digits": (packed(json.dumps(about()).replace("9", "9" * 100_000)), "header cannot be understood"),
    "half a surrogate pair": (packed(put("\ud800", "task", "prompt")), "task.prompt is"),
    "a prompt that clears the screen": (packed(put("\x1b[2J", "task", "prompt")), "task.prompt is"),
    "a key of a megabyte": (packed(about(), entries() | {"k" * 10**6: entries()[f"{MODULE}.lora_A"]}), "not a complete"),
    "a module of a megabyte": (renamed("m" * 10**6), "no linear 'mmmm"),
    "a module up the tree": (renamed("../../etc"), r"no linear '\.\./\.\./etc'"),
    "a module with NUL": (renamed("a\0b"), r"no linear 'a\\x00b'"),
    "a module that is Python's": (renamed("__class__"), "no linear '__class__'"),
    "a module that is a container": (renamed("part"), "no linear 'part'"),
    "a module that is the model": (renamed(""), "no linear ''"),
    "a sample of a million": (packed(put([1.0] * 10**6, "base", "samples", MODULE, "values")), "the entry for 'part.linear'"),
    "a sample NaN": (packed(put([float("nan")], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of lists": (packed(put([[1.0]], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of 10**400": (packed(put([10**400], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of whole numbers": (packed(put({"dtype": "", "values": [1] * 12}, "base", "samples", MODULE)), "are not those"),
    "a dtype that is none": (packed(put({"dtype": 3, "values": [1.0]}, "base", "samples", MODULE)), "the entry for"),
    "a base with NUL": (packed(put("a\0b", "base", "name")), "base.name is"),
    "a base of 5,000 letters": (packed(put("x" * 5000, "base", "name")), "base.name is"),
    "no task": (packed(put([], "task")), "task is"),
    "a task's name that is none": (packed(put(["caption"], "task", "name")), "task.name is"),
    "generation that is none": (packed(put("fast", "task", "generation")), "task.generation is 'fast'"),
    "tokens by name": (packed(put("9", "task", "generation", "max_new_tokens")), "max_new_tokens is '9'"),
    "a number for an option": (packed(put(7, "task", "generation")), "task.generation is 7"),
    "an option with an escape": (packed(put(1, "task", "generation", "\x1b[2J")), "task.generation is"),
    "too many options": (packed(put({f"o{n}": 1 for n in range(65)}, "task", "generation")), "at most 64 options"),
    "an option of a megabyte": (packed(put("x" * 10**6, "task", "generation", "top_p")), "small values"),
    "a huge integer": (packed(put(10**30, "task", "generation", "top_k")), "small values"),
    "an infinite option": (packed(put(float("inf"), "task", "generation", "top_p")), "task.generation is"),
    "control characters in a list": (packed(put([["\x1b"]], "task", "generation", "bad_words_ids")), "small values"),
    "a billion beams": (packed(put(10**9, "task", "generation", "num_beams")), "num_beams is"),
    "a temperature of nothing": (packed(put(0, "task", "temperature")), "temperature is 0"),
    "a temperature of 10**400": (packed(put(10**400, "task", "temperature")), "temperature is"),
    "a training that is none": (packed(put(3, "training")), "training is 3"),
    "settings that are none": (packed(put([1], "training", "settings")), "training.settings is"),
    "training data that are none": (packed(put(["a"], "training", "settings", "annotations")), "annotations is"),
    "steps that are none": (packed(put("many", "training", "steps")), "training.steps is 'many'"),
    "version true": (packed(put(True, "format_version")), "format_version is True"),
    "a version to come": (packed(put(2, "format_version")), "reads formats up to 1; upgrade"),
    "a dropout of 1": (packed(put(1.0, "lora", "dropout")), "lora.dropout is 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_adapter_is_refused_in_a_short_message_and_leaves_the_model_alone(what, tmp_path):
    """AdapterError, of a line's length, in memory of the file's size; no hook is put on."""
    data, expected = HOSTILE[what]
    (tmp_path / "a.safetensors").write_bytes(data)
    model = Model()

    def load() -> None:
        with pytest.raises(AdapterError, match=expected) as told:
            adapter_file.load(model, tmp_path / "a.safetensors")
        assert len(str(told.value)) < MESSAGE and "\x1b" not in str(told.value) and "\0" not in str(told.value)

    assert megabytes(load) < 20 + 10 * len(data) / 2**20
    assert not attached.names(model) and list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_a_tied_head_is_refused_as_an_adapter_is(tmp_path):
    """`load` promises AdapterError: a LoRAError of what it calls is turned into one."""
    told = json.loads(json.dumps(about()).replace(MODULE, "part.head"))
    told["base"]["samples"]["part.head"] = {}
    (tmp_path / "a").write_bytes(packed(told, {key.replace(MODULE, "part.head"): value for key, value in entries().items()}))
    with pytest.raises(AdapterError, match="shares its weight"):
        adapter_file.load(Model(), tmp_path / "a")


def test_an_adapter_that_is_cut_anywhere_is_refused(tmp_path):
    """Every shorter beginning of a good file, byte by byte."""
    whole = packed(about())
    for end in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:end])
        with pytest.raises(AdapterError, match="not a complete"):
            adapter_file.read(tmp_path / "a")


@pytest.mark.parametrize(
    "dtype", "F64 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 X".split()
)
def test_only_float32_is_read(dtype, tmp_path):
    """Any other dtype is refused, whether torch has it or not, with as many bytes as it takes."""
    for width in (1, 2, 4, 8):
        tensors = {
            key: value | {"data_offsets": [width * n // 4 for n in value["data_offsets"]]}
            for key, value in entries(dtype).items()
        }
        (tmp_path / "a").write_bytes(packed(about(), tensors, bytes(14 * width)))
        with pytest.raises(AdapterError, match=r"not a complete|but its header says"):
            adapter_file.read(tmp_path / "a")


def test_a_path_that_is_no_regular_file_is_an_adapter_error(tmp_path):
    """A pipe, a folder, a device, /proc, a loop of links, names that cannot be: AdapterError from `read` and `locate`."""
    for what, path in no_file(tmp_path).items():
        with pytest.raises(AdapterError):
            adapter_file.read(path)
        if what not in ("/proc/self/mem", "empty", "/proc/kcore"):
            with pytest.raises(AdapterError, match="no adapter at"):
                runs.locate(path)


def test_the_newest_run_is_found_among_links_folders_and_pipes(tmp_path):
    """A link to nowhere, a folder and a pipe of the adapter's name are passed over."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / ADAPTER_NAME).symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / ADAPTER_NAME).mkdir()
    os.mkfifo(tmp_path / "c" / ADAPTER_NAME)
    (tmp_path / "d" / ADAPTER_NAME).write_bytes(b"x")
    assert runs.locate(tmp_path) == tmp_path / "d" / ADAPTER_NAME


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


def test_a_pickle_is_never_opened(tmp_path):
    """Neither a pickle nor torch's archive of one runs, whatever it is called; each would have written a file."""
    pickle.loads(pickle.dumps(Planted(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()  # so it works
    torch.save(Planted(tmp_path / "ran"), tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    (tmp_path / "c.safetensors").write_bytes(packed(about(), entries(), pickle.dumps(Planted(tmp_path / "ran"))))
    for name in "abc":
        with pytest.raises(AdapterError):
            adapter_file.read(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "ran").exists()


def test_many_tensors_end_at_the_header_s_size(tmp_path):
    """A file of a million tensors is refused before they are looked at."""
    (tmp_path / "a").write_bytes((60_000_000).to_bytes(8, "little") + b" " * 60_000_000)
    with pytest.raises(AdapterError, match="its header has 60,000,000 bytes"):
        adapter_file.read(tmp_path / "a")


def test_a_run_that_ended_in_nan_can_be_read_again(tmp_path):
    """Python writes NaN for a loss that is none; the adapter's header may hold one."""
    (tmp_path / "a").write_bytes(packed(put(float("nan"), "training", "val_loss")))
    assert np.isnan(adapter_file.read(tmp_path / "a").metadata["training"]["val_loss"])


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from([10**40, "x" * 5000, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(found: Any, *path: str) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(found, dict):
        for key, inside in found.items():
            yield from places(inside, *path, key)


@often
@given(place=st.sampled_from(list(places(about()))), value=values)
def test_any_value_anywhere_in_the_header_is_used_well_or_refused(place, value, tmp_path, make):
    """AdapterError from `read` or `load`; what is read makes a task, and its line, without any other error than its own."""
    (tmp_path / "a").write_bytes(packed(put(value, *place)))
    try:
        found = adapter_file.read(tmp_path / "a")
        backbone = BACKBONE.setdefault("", make("blip"))
        task = task_of(backbone, found)
        describe(task, found, 1, "fp32")
        adapter_file.load(Model(), found)
    except AdapterError as error:
        assert len(str(error)) < MESSAGE
    except ValueError as error:
        assert type(error).__name__ == "ConfigError"


BACKBONE: dict[str, Any] = {}


@often
@given(
    key=st.text(max_size=40) | st.sampled_from(list(entries())),
    shape=st.lists(st.integers(-1, 2**64), max_size=5),
    offsets=st.lists(st.integers(-1, 2**64), max_size=3) | st.sampled_from([[0, 32], [32, 56], [0, 56]]),
    dtype=st.sampled_from(["F32", "I64", "", "F8_E4M3"]),
)
def test_a_tensor_that_the_header_claims_exists_or_is_refused(key, shape, offsets, dtype, tmp_path):
    """Keys, shapes, offsets and dtypes at will: AdapterError."""
    tensors = entries() | {key: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    (tmp_path / "a").write_bytes(packed(about(), tensors))
    try:
        adapter_file.read(tmp_path / "a")
    except AdapterError as error:
        assert len(str(error)) < MESSAGE


@often
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_changed_are_read_or_refused(flips, tmp_path):
    """AdapterError or a finite adapter."""
    data = bytearray(packed(about()))
    for place, value in flips:
        data[place % len(data)] = value
    (tmp_path / "a").write_bytes(data)
    try:
        assert all(t.isfinite().all() for t in adapter_file.read(tmp_path / "a").tensors.values())
    except AdapterError as error:
        assert len(str(error)) < MESSAGE


def test_every_part_of_a_header_that_is_used_is_known_to_the_check():
    """The table names no part that a saved header lacks, but for retrieval's temperature and a backbone's image size."""
    known = {tuple(place.split(".")) for place in header.KNOWN if place}
    assert known - set(places(about())) == {("task", "temperature"), ("base", "image_size")}


# ---------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def png(width: int, height: int, *more: bytes, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with chunks of one's own."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    )  # type: ignore[misc]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


RED = Image.new("RGB", (16, 12), "red")
NOISE = Image.effect_noise((64, 48), 60).convert("RGB")
PROGRESSIVE = encoded(NOISE, "jpeg", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
BAD_PICTURES: dict[str, tuple[bytes, str]] = {  # what is wrong → the file, what is said
    "a bomb past Pillow's end": (png(60_000, 60_000), "more than 134,217,728.* make it smaller"),
    "a bomb before Pillow's end": (png(13_000, 13_000), "13000 × 13000 pixels, more than 134,217,728; make it smaller"),
    "no width": (png(0, 10), "is not a usable image|cannot be decoded"),
    "no data": (png(10, 10), "cannot be decoded"),
    "a text": (b"hello, I am no picture", "is not a usable image: it has no supported format"),
    "cut": (encoded(NOISE, "jpeg")[:500], "cannot be decoded"),
    "one byte": (b"\xff", "is not a usable image"),
    "a comment that unpacks to 200 MB": (
        png(2, 2, (b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))),
        "cannot be decoded",
    ),
    "a progressive JPEG of 1,000 scans": (PROGRESSIVE[:-2] + SCAN * 1000 + b"\xff\xd9", "1,0.. scans, more than 100"),
    "another program's: EPS": (encoded(RED, "eps"), "is not a usable image: it has no supported format"),
    "a PDF": (encoded(RED, "pdf"), "is not a usable image: it has no supported format"),
    "an icon": (encoded(RED, "ico"), "is not a usable image: it has no supported format"),
    "a TIFF that is all tags": (
        b"II*\0\x08\0\0\0\xff\xff" + random.Random(1).randbytes(5000),
        "is not a usable image|cannot be decoded",
    ),
    "a TIFF whose directory is itself": (
        b"II*\0\x08\0\0\0\0\0\x08\0\0\0" + bytes(40),
        "is not a usable image|cannot be decoded",
    ),
}


@pytest.mark.parametrize("what", BAD_PICTURES)
def test_a_hostile_picture_is_refused_with_its_name_and_little_memory(what, tmp_path):
    """ImageError, whatever the suffix says; a claim is not believed."""
    data, expected = BAD_PICTURES[what]
    (tmp_path / "a.jpg").write_bytes(data)

    def look() -> None:
        with pytest.raises(ImageError, match=expected) as told:
            open_image(tmp_path / "a.jpg")
        assert str(told.value).startswith(str(tmp_path / "a.jpg")) and len(str(told.value)) < MESSAGE

    assert megabytes(look) < 60


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow hands an EPS to Ghostscript; a planted one is not run."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(encoded(RED, "eps"))
    with pytest.raises(ImageError):
        open_image(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_no_regular_file_is_an_image_error(tmp_path):
    """A pipe, a folder, a device, /proc, a loop of links, names that cannot be: ImageError."""
    for path in no_file(tmp_path).values():
        with pytest.raises(ImageError, match=r"is not a usable image|does not exist|cannot be decoded"):
            open_image(path)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
    """100 GB of nothing, which a decoder would look through for a beginning."""
    with (tmp_path / "a.gif").open("wb") as file:
        file.write(encoded(RED, "gif")[:-1])
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match="more than 268,435,456"):
        open_image(tmp_path / "a.gif")


def test_odd_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    """The first frame; a broken tag, profile or orientation is passed over; extreme shapes are pictures."""
    blue = Image.new("RGB", (16, 12), "blue")
    exif = Image.Exif()
    exif[0x0112] = 99
    odd = {
        "first.gif": encoded(RED.convert("P"), "gif", save_all=True, append_images=[blue.convert("P")]),
        "first.webp": encoded(RED, "webp", save_all=True, append_images=[blue], lossless=True),
        "tag.png": encoded(RED, "png", exif=b"Exif\0\0MM\0*" + b"\xff" * 40),
        "no tag.png": encoded(RED, "png", exif=b"Exif\0\0no TIFF at all"),
        "turn.png": encoded(RED, "png", exif=exif),
        "profile.png": encoded(RED, "png", icc_profile=b"no profile"),
        "thin.png": encoded(Image.new("RGB", (1, 60_000), "red"), "png"),
        "wide.png": encoded(Image.new("RGB", (60_000, 1), "red"), "png"),
        "dot.png": encoded(Image.new("RGB", (1, 1), "red"), "png"),
    }
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
        picture = open_image(tmp_path / name)
        red, _, blueness = picture.getpixel((0, 0))
        assert picture.mode == "RGB" and red > 200 and blueness < 60, name  # a GIF's palette is not exact
        images.augment(picture, "", random.Random(1))


@pytest.mark.filterwarnings("error")
def test_nan_and_infinity_are_black_or_white(tmp_path):
    """A TIFF of floats with NaN and infinity becomes a picture, without a warning."""
    grey = np.array([[np.nan, np.inf, -np.inf, 100.0]], dtype=np.float32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist()[:3] == [0, 255, 0]


def test_a_broken_picture_says_nothing_but_its_error(tmp_path):
    """Pillow's warnings of bombs and tags, a line each, would bury what a run prints."""
    (tmp_path / "a").write_bytes(BAD_PICTURES["a bomb before Pillow's end"][0])
    (tmp_path / "b").write_bytes(BAD_PICTURES["a TIFF that is all tags"][0])
    code = "import sys; from lora_blip.data import images\nfor path in sys.argv[1:]:\n"
    code += " try: images.open_image(path)\n except images.ImageError: pass"
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True
    )
    assert (told.stdout, told.stderr) == ("", "")


FILES = [encoded(NOISE, kind) for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")]
FILES += [PROGRESSIVE, encoded(NOISE.convert("CMYK"), "tiff", compression="tiff_lzw")]


@often
@given(
    data=st.sampled_from(FILES),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10**5),
)
def test_any_damage_to_a_picture_is_a_picture_or_an_image_error(data, flips, cut, tmp_path, monkeypatch):
    """Bytes changed in the first hundreds, and the end cut off: no other error, none of a decoder's own."""
    monkeypatch.setattr(images, "LARGEST", 2**22)
    damaged = bytearray(data)
    for place, value in flips:
        damaged[place % len(data)] = value
    (tmp_path / "a").write_bytes(damaged[:cut])
    try:
        picture = open_image(tmp_path / "a")
        assert picture.mode == "RGB" and min(picture.size) > 0
    except ImageError as error:
        assert str(tmp_path / "a") in str(error) and len(str(error)) < MESSAGE


# ---------------------------------------------------------------- annotations

GOOD = '{"image": "a.png", "text": "good"}'
BAD_LINES: dict[str, tuple[str | bytes, str]] = {  # what is wrong → the line, what is said
    "a key twice": ('{"image": "a.png", "text": "a", "text": "b"}', "the key 'text' occurs twice; keep one"),
    "NaN": ('{"image": "a.png", "text": "t", "score": NaN}', "NaN is not JSON; write null"),
    "infinity": ('{"image": "a.png", "text": "t", "score": -Infinity}', "-Infinity is not JSON"),
    "a number of 100,000 digits": ('{"image": "a.png", "text": "t", "n": ' + "9" * 100_000 + "}", "not valid JSON"),
    "brackets, a hundred thousand deep": ('{"image": ' + "[" * 100_000, "nested too deeply"),
    "brackets, 500 deep": ('{"image": "a.png", "text": "t", "n": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
    "a NUL": ('{"image": "a.png", "text": "\0"}', "not valid JSON"),
    "a NUL in the path": ('{"image": "a\\u0000.png", "text": "t"}', "not a valid path"),
    "a path that clears the screen": ('{"image": "\\u001b[2J.png", "text": "t"}', "not a valid path"),
    "a name of 300 letters": (json.dumps({"image": "x" * 300, "text": "t"}), "not a valid path"),
    "a path of a megabyte": (json.dumps({"image": "x/" * 400_000, "text": "t"}), "not a valid path"),
    "a surrogate": ('{"image": "a.png", "text": "\\ud800"}', "not UTF-8"),
    "a byte that is no UTF-8": (b'{"image": "a.png", "text": "\xff"}', "not UTF-8"),
    "a megabyte of keys": (json.dumps({"image": "a.png"} | {f"{n:0200}": 1 for n in range(5000)}), "no text: .*this line has"),
    "two megabytes": (json.dumps({"image": "a.png", "text": "x" * 2_000_000}), "it has more than 1,048,576 characters"),
    "a pipe": ('{"image": "pipe", "text": "t"}', "pipe is not a usable image: it is a pipe"),
    "a folder": ('{"image": ".", "text": "t"}', "is not a usable image: it is a folder"),
    "a device": ('{"image": "/dev/zero", "text": "t"}', "/dev/zero is not a usable image: it is a device"),
    "memory": ('{"image": "/proc/self/mem", "text": "t"}', "/proc/self/mem is not a usable image: it is empty"),
    "a loop": ('{"image": "loop", "text": "t"}', "loop cannot be decoded"),
    "out of the folder, to nothing": ('{"image": "../../../gone.png", "text": "t"}', "does not exist"),
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    RED.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "a.png"


@pytest.mark.parametrize("what", BAD_LINES)
@pytest.mark.usefixtures("photo")
def test_a_hostile_line_is_a_listed_problem_and_its_neighbours_are_read(what, tmp_path):
    """File, line and reason, no longer than a line; the lines before and after it count as ever."""
    line, expected = BAD_LINES[what]
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    good, problems = annotations.read(tmp_path / "x.jsonl", on_bad_data="skip")
    assert [example.line for example in good] == [1, 3] and [problem.line for problem in problems] == [2]
    with pytest.raises(DataError, match=expected) as told:
        annotations.read(tmp_path / "x.jsonl")
    assert f"{tmp_path / 'x.jsonl'}:2: " in str(told.value) and len(str(told.value)) < MESSAGE
    assert "\x1b" not in str(told.value) and "\0" not in str(told.value)


def test_a_path_that_is_no_regular_file_is_a_data_error(tmp_path):
    """A pipe, a folder, a device, /proc, a loop of links, names that cannot be: DataError, from `read` and as a source."""
    for what, path in no_file(tmp_path).items():
        with pytest.raises(DataError, match=r"annotations|in this folder|does not exist|cannot be read"):
            annotations.read(path)
        if what not in ("a folder", "a/" * 10):
            with pytest.raises(DataError, match=r"cannot be read|does not exist"):
                find_sources(str(path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_line_end_and_mark_is_read(photo, tmp_path, end, mark):
    """Unix, Windows and old Mac; with and without a byte order mark."""
    (tmp_path / "x.jsonl").write_bytes((mark + end.join([GOOD, "", GOOD])).encode())
    assert [example.line for example in annotations.read(tmp_path / "x.jsonl")[0]] == [1, 3] and photo.exists()


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32"])
def test_other_encodings_are_named(photo, tmp_path, encoding):
    """Without a mark of UTF-16, no line is JSON."""
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode(encoding))
    with pytest.raises(DataError, match="not valid JSON"):
        annotations.read(tmp_path / "x.jsonl", on_bad_data="skip")
    assert photo.exists()


def test_utf_16_with_its_mark_is_read(photo, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert [example.file for example in annotations.read(tmp_path / "x.jsonl")[0]] == [str(photo)]
    assert "x.jsonl is read as UTF-16" in capsys.readouterr().out


@pytest.mark.usefixtures("photo")
@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "csv"])
def test_a_line_of_100_megabytes_is_a_problem_and_is_not_held(tmp_path, suffix):
    """It takes the memory of a line of one megabyte, and the lines after it are read."""
    head, line = {"jsonl": ("", GOOD), "tsv": ("", "a.png\tgood"), "csv": ("image,text", "a.png,good")}[suffix]
    path = tmp_path / f"x.{suffix}"
    with path.open("wb") as file:
        file.write(f"{head}\n{line}\n".encode())
        for _ in range(100):
            file.write(b"a,\t" * (2**20 // 3))
        file.write(f"\n{line}\n".encode())
    found: list[Any] = []
    reader = {"jsonl": jsonl_entries, "tsv": tsv_entries, "csv": csv_entries}[suffix]
    assert megabytes(lambda: found.extend(reader(path))) < 80
    assert [number for number, _ in found] == [2, 3, 4] and found[1][1] == formats.TOO_LONG
    assert isinstance(found[2][1], dict)


def test_a_hundred_thousand_bad_lines_are_listed_by_the_first_twenty(tmp_path):
    """What is printed is bounded, and so is what each line keeps."""
    (tmp_path / "x.jsonl").write_text("no line\n" * 100_000)
    told = []

    def read() -> None:
        with pytest.raises(DataError, match="and 99980 more") as error:
            annotations.read(tmp_path / "x.jsonl")
        told.append(str(error.value))

    assert megabytes(read) < 100 and len(told[0]) < 20 * 300


@often
@given(
    lines=st.lists(
        st.binary(max_size=60) | st.sampled_from([GOOD.encode(), b'{"image": "a.png"', b"\r", b'"', b"a.png\tt"]), max_size=6
    )
)
def test_any_bytes_are_examples_or_problems(lines, tmp_path):
    """DataError, or every line that is not blank once: as an example that is Unicode, or as a problem."""
    for suffix in ("jsonl", "tsv"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"\n".join(lines))
        try:
            good, problems = annotations.read(path, on_bad_data="skip", decode=False)
        except DataError:
            continue
        numbers = [one.line for one in (*good, *problems)]
        assert len(set(numbers)) == len(numbers) and all(example.words.encode() for example in good)


@often
@given(found=values)
def test_any_json_is_an_entry_or_a_reason(found):
    """`canonical` takes any object; what it makes has a path and texts."""
    for given_entry in (
        found,
        {"image": found, "text": "t"},
        {"image": "a", "text": found},
        {"image": "a", "question": "q", "answers": found},
    ):
        made = canonical(given_entry) if isinstance(given_entry, dict) else ""
        if isinstance(made, str):
            assert len(made) < MESSAGE
        else:
            assert untrusted.is_path(made["image"]) and (made.get("text") or all(made["answers"]))


COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "one"}]}
KARPATHY = {"images": [{"filename": "a.png", "filepath": "", "split": "train", "sentences": [{"raw": "one"}]}]}
LIST = [{"image": "a.png", "caption": ["one", "two"]}]


@often
@given(document=st.sampled_from([COCO, KARPATHY, LIST]), path=st.lists(st.integers(0, 3), min_size=1, max_size=6), value=values)
def test_any_value_anywhere_in_a_data_set_is_an_entry_or_a_reason(document, path, value, tmp_path):
    """DataError for the file, or a reason for the entry: as `prepare` reads it."""
    made = [deepcopy(document)]
    found: Any = made
    for step in path:
        keys = list(found.keys()) if isinstance(found, dict) else list(range(len(found)))
        key = keys[step % len(keys)] if keys else None
        if key is None or not isinstance(found[key], dict | list) or step is path[-1]:
            break
        found = found[key]
    if key is not None:
        found[key] = value
    (tmp_path / "captions_x.json").write_text(json.dumps(made[0]))
    try:
        read = [entry for source in find_sources(str(tmp_path / "captions_x.json")) for entry in source.entries()]
    except DataError as error:
        assert len(str(error)) < MESSAGE
        return
    for _, entry in read:
        told = canonical(entry) if isinstance(entry, dict) else entry
        assert isinstance(told, dict) or len(told) < MESSAGE
        if isinstance(told, dict):
            Folder(tmp_path).find(told["image"])


BAD_SOURCES: dict[str, tuple[str, str, str]] = {  # what is wrong → the file's name, what is in it, what is said
    "a folder by number": (
        "dataset_x.json", json.dumps({"images": [KARPATHY["images"][0] | {"filepath": 3}]}), '"filepath" is \'3\'',
    ),
    "a line that is all brackets": ("x.json", '{"image": ' + "[" * 5000, "not valid JSON"),
    "a document that is all brackets": ("x.json", "[" * 100_000, "nested too deeply"),
    "a document 500 deep": ("x.json", "[" * 500 + "]" * 500, "nested too deeply"),
    "a caption 90 deep": ("x.json", '[{"image": "a.png", "caption": ' + "[" * 90 + "]" * 90 + "}]", "expected a text"),
    "images twice": ("captions_x.json", '{"images": [], "images": [], "annotations": []}', "the key 'images' occurs twice"),
    "NaN": ("captions_x.json", '{"images": [], "annotations": [NaN]}', "NaN is not JSON"),
    "an id of 5,000 digits": ("captions_x.json", '{"images": [{"id": ' + "9" * 5000 + "}]}", "not valid JSON"),
    "an id of a megabyte": (
        "captions_x.json", json.dumps(COCO | {"annotations": [{"image_id": "x" * 10**6, "caption": ""}]}), "is not an id in",
    ),
    "a list of no captions": ("Flickr8k.token.txt", "hello", "the format of this file is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_SOURCES)
def test_a_hostile_data_set_is_refused_or_its_entries_are(what, tmp_path):
    """DataError for the file or a reason for the entry, as `prepare` reads them; a line long."""
    name, content, expected = BAD_SOURCES[what]
    (tmp_path / name).write_text(content)
    try:
        found = [entry for source in find_sources(str(tmp_path / name)) for _, entry in source.entries()]
        said = [canonical(entry) if isinstance(entry, dict) else entry for entry in found]
    except DataError as error:
        said = [str(error)]
    assert any(isinstance(one, str) and expected in one for one in said) and all(len(str(one)) < MESSAGE for one in said)


def test_an_empty_list_of_flickr8k_s_sides_is_a_data_error(tmp_path):
    """A download that was cut: the lists beside the captions are read as well."""
    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tA cube .\n")
    (tmp_path / "Flickr_8k.trainImages.txt").touch()
    (source,) = find_sources(str(tmp_path / "Flickr8k.token.txt"))
    with pytest.raises(DataError, match=r"trainImages\.txt.*it is empty"):
        list(source.entries())


@often
@given(value=values)
def test_any_value_is_quoted_in_a_line(value):
    """Neither long nor with a line end or a terminal's control characters, however deep and wide it is."""
    assert len(untrusted.quoted(value)) <= untrusted.LONGEST_QUOTE + 2
    assert untrusted.quoted(str(value)).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,image,text\na,b,c", "names a column twice"),
        ('image,text\na.png,"open', "not valid CSV"),
        ("image,text\na.png," + "x" * 200_000, "field larger than field limit"),
        ("image,text\na.png" + ',"b"' * 600_000, "columns but the header has 2|more than"),
        ("image,text\na.png,\0", None),
    ],
)
def test_a_csv_s_oddities_are_reasons(tmp_path, text, expected):
    """A column named twice, an open quote, a cell or a row beyond all measure."""
    (tmp_path / "x.csv").write_text(text)
    reasons = [found for _, found in csv_entries(tmp_path / "x.csv") if isinstance(found, str)]
    assert bool(reasons) == bool(expected) and all(len(reason) < MESSAGE for reason in reasons)
    if expected:
        assert re.search(expected, reasons[0])


def test_many_sources_with_commas_between_may_be_longer_than_a_name(tmp_path):
    """The list as a whole is no path; what is missing is named, and nothing else is raised."""
    with pytest.raises(DataError, match="does not exist"):
        find_sources(",".join([str(tmp_path / "x.jsonl")] * 200))
