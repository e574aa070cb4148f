"""Untrusted files: each reader loads a file or raises its own error class, in bounded time and memory."""

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

from lora_blip.data import annotations, augmentation, formats, images
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

many_examples = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
LONGEST_MESSAGE = 1500  # characters
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest resets the filters that images.py sets


@pytest.fixture(autouse=True)
def _fail_after_20_seconds() -> Iterator[None]:
    """Fail a test that runs longer than 20 seconds, so that a hang is a failure."""

    def overdue(*_: object) -> None:
        raise TimeoutError("not done in 20 s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def megabytes(work: Callable[[], object]) -> float:
    """Return the peak growth of the resident memory of this process during `work`, in MiB (0 without /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        work()
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = in_status("VmRSS")
    work()
    return in_status("VmHWM") - before


def in_status(key: str) -> float:
    """Return a value of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def irregular_paths(folder: Path) -> dict[str, Path]:
    """Create paths that do not lead to a readable regular file; return {description: path}."""
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
    """A linear at MODULE, and two linears that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"linear": nn.Linear(4, 3, bias=False), "head": nn.Linear(4, 3, bias=False)})
        self.part["linear"].weight.data.copy_(WEIGHT)
        self.part["tied"] = nn.Linear(4, 3, bias=False)
        self.part["tied"].weight = self.part["head"].weight


def valid_header() -> dict[str, Any]:
    """Return the metadata of a valid header, as `save` writes it."""
    return {
        "format_version": 1,
        "lora": {"dropout": 0.0, "modules": {MODULE: {"module": MODULE, "r": 2, "alpha": 4.0}}},
        "base": {"name": "b", "architecture": "Model", "samples": {MODULE: sample(Model().part["linear"])}},
        "task": {"name": "caption", "prompt": "", "generation": {"max_new_tokens": 9, "num_beams": 1, "do_sample": False}},
        "training": {"steps": 3, "finished": True, "settings": {"annotations": "a.jsonl", "image_root": ""}},
        "merge_drift": {},
        "versions": {},
    }


def tensor_entries(dtype: str = "F32", a: Any = (2, 4), b: Any = (3, 2)) -> dict[str, Any]:
    """Return the safetensors entries of lora_A with shape `a` and lora_B with shape `b`."""
    sizes = [4 * int(np.prod(shape)) for shape in (a, b)]
    return {
        f"{MODULE}.lora_A": {"dtype": dtype, "shape": list(a), "data_offsets": [0, sizes[0]]},
        f"{MODULE}.lora_B": {"dtype": dtype, "shape": list(b), "data_offsets": [sizes[0], sum(sizes)]},
    }


BODY = struct.pack("<14f", *(0.5 + number for number in range(14)))  # A (2, 4), B (3, 2)


def adapter_bytes(metadata: Any, tensors: Any = None, body: bytes = BODY, claimed: int | None = None) -> bytes:
    """Return the bytes of a .safetensors file, valid or not.

    `metadata` is a text or an object to write as JSON. `claimed` replaces the length of the header in the first 8 bytes.
    """
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    head = json.dumps({"__metadata__": {"lora_blip": text}} | (tensor_entries() if tensors is None else tensors)).encode()
    return (len(head) if claimed is None else claimed).to_bytes(8, "little") + head + body


def with_value(value: Any, *keys: str) -> dict[str, Any]:
    """Return valid metadata with `value` at the path `keys`."""
    metadata = parent = valid_header()
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    return metadata


def with_entry(**other: Any) -> dict[str, Any]:
    """Return valid metadata with changed fields in the entry of MODULE."""
    return with_value({"module": MODULE, "r": 2, "alpha": 4.0} | other, "lora", "modules", MODULE)


def adapter_of_module(name: str) -> bytes:
    """Return a valid adapter file whose module has another name."""
    metadata = json.loads(json.dumps(valid_header()).replace(MODULE, "NAME").replace("NAME", json.dumps(name)[1:-1]))
    return adapter_bytes(metadata, {key.replace(MODULE, name): value for key, value in tensor_entries().items()})


def test_a_valid_file_is_read_and_loaded(tmp_path):
    (tmp_path / "a").write_bytes(adapter_bytes(valid_header()))
    model = Model()
    adapter_file.load(model, tmp_path / "a")
    assert list(attached.adapters(model)) == [MODULE] and torch.equal(model.part["linear"].weight, WEIGHT)


BOTH = tensor_entries().items()
HOSTILE: dict[str, tuple[bytes, str]] = {  # defect → (file, part of the error message)
    "a header of 100 GB is claimed": (adapter_bytes(valid_header(), claimed=10**11), "its first bytes are not those"),
    "a header of 2**64 - 1 bytes is claimed": (
        adapter_bytes(valid_header(), claimed=2**64 - 1),
        "its first bytes are not those",
    ),
    "a header longer than the file": (adapter_bytes(valid_header(), claimed=2**20), "not a complete"),
    "no header": (adapter_bytes(valid_header(), claimed=0), "not a complete"),
    "a metadata of 50 MB": (adapter_bytes("x" * 50_000_000), "its header has 50,"),
    "a tensor of 100 GB is claimed": (
        adapter_bytes(valid_header(), tensor_entries(a=(2, 12_500_000_000))),
        "not a complete",
    ),
    "a shape past 64 bits": (adapter_bytes(valid_header(), tensor_entries(a=(2**40, 2**40))), "not a complete"),
    "a billion rows of no elements": (
        adapter_bytes(valid_header(), tensor_entries(a=(2, 0), b=(10**9, 2)), b""),
        "not a complete",
    ),
    "an empty tensor": (adapter_bytes(valid_header(), tensor_entries(a=(2, 0)), BODY[-24:]), "but its header says"),
    "an empty tensor of 2**63 columns": (
        adapter_bytes(with_entry(r=2**31 - 1), tensor_entries(a=(0, 2**63), b=(3, 0)), b""),
        "but its header says",
    ),
    "offsets that overlap": (
        adapter_bytes(valid_header(), {key: value | {"data_offsets": [0, 32]} for key, value in BOTH}),
        "not a complete",
    ),
    "offsets below zero": (
        adapter_bytes(valid_header(), {key: value | {"data_offsets": [-32, 0]} for key, value in BOTH}),
        "not a complete",
    ),
    "offsets beyond the end": (adapter_bytes(valid_header(), tensor_entries(), BODY[:-1]), "not a complete"),
    "extra bytes at the end": (adapter_bytes(valid_header(), tensor_entries(), BODY + b"\0"), "not a complete"),
    "no dimension": (adapter_bytes(valid_header(), tensor_entries(a=(), b=(3, 2)), BODY[:28]), "but its header says"),
    "three dimensions": (adapter_bytes(valid_header(), tensor_entries(a=(2, 2, 2))), "but its header says"),
    "a hundred dimensions": (adapter_bytes(valid_header(), tensor_entries(a=[1] * 100), BODY[:28]), "but its header says"),
    "r of a billion": (adapter_bytes(with_entry(r=10**9)), r"its header says r=1000000000 in float32"),
    "r of 10**40": (adapter_bytes(with_entry(r=10**40)), "cannot be understood"),
    "r is a text": (adapter_bytes(with_entry(r="2")), "entry for 'part.linear' cannot be understood"),
    "r is true": (adapter_bytes(with_entry(r=True)), "cannot be understood"),
    "alpha infinite": (adapter_bytes(json.dumps(with_entry()).replace("4.0", "1e999")), "cannot be understood"),
    "alpha NaN": (adapter_bytes(with_entry(alpha=float("nan"))), "cannot be understood"),
    "alpha zero": (adapter_bytes(with_entry(alpha=0)), "cannot be understood"),
    "alpha below zero": (adapter_bytes(with_entry(alpha=-1)), "cannot be understood"),
    "alpha 1e308": (adapter_bytes(with_entry(alpha=1e299)), "update of 'part.linear' overflows float32"),
    "rows without a block": (adapter_bytes(with_entry(rows=[0, 3])), "cannot be understood"),
    "huge rows": (adapter_bytes(with_entry(rows=[0, 10**30], block="")), "cannot be understood"),
    "rows below zero": (adapter_bytes(with_entry(rows=[-3, 0], block="")), "cannot be understood"),
    "rows that differ from those of B": (
        adapter_bytes(with_entry(rows=[0, 2], block="")),
        r"its header says r=2 in float32 for 2 rows",
    ),
    "a block with a dot": (adapter_bytes(with_entry(rows=[0, 3], block="a.b")), "cannot be understood"),
    "an entry of another module": (adapter_bytes(with_entry(module="x")), "the entry for"),
    "an entry under another name": (adapter_bytes(with_entry(block="q", rows=[0, 3])), "describes 'part.linear.q'"),
    "brackets, a million deep": (adapter_bytes("[" * 1_000_000), "nested too deeply"),
    "brackets, 900 deep": (adapter_bytes('{"a": ' + "[" * 900 + "]" * 900 + "}"), "nested too deeply"),
    "no JSON": (adapter_bytes("hello"), "header cannot be understood"),
    "a list": (adapter_bytes("[1, 2]"), "header cannot be understood"),
    "a key twice": (adapter_bytes(json.dumps(valid_header())[:-1] + ', "task": {}}'), "the key 'task' occurs twice"),
    "a number of 100,000 digits": (
        adapter_bytes(json.dumps(valid_header()).replace("9", "9" * 100_000)),
        "header cannot be understood",
    ),
    "half a surrogate pair": (adapter_bytes(with_value("\ud800", "task", "prompt")), "task.prompt is"),
    "a prompt that clears the screen": (adapter_bytes(with_value("\x1b[2J", "task", "prompt")), "task.prompt is"),
    "a key of a megabyte": (
        adapter_bytes(valid_header(), tensor_entries() | {"k" * 10**6: tensor_entries()[f"{MODULE}.lora_A"]}),
        "not a complete",
    ),
    "a module of a megabyte": (adapter_of_module("m" * 10**6), "no linear 'mmmm"),
    "a module with '..'": (adapter_of_module("../../etc"), r"no linear '\.\./\.\./etc'"),
    "a module with NUL": (adapter_of_module("a\0b"), r"no linear 'a\\x00b'"),
    "a module named like a Python attribute": (adapter_of_module("__class__"), "no linear '__class__'"),
    "a module that is a container": (adapter_of_module("part"), "no linear 'part'"),
    "a module that is the model": (adapter_of_module(""), "no linear ''"),
    "a sample of a million": (
        adapter_bytes(with_value([1.0] * 10**6, "base", "samples", MODULE, "values")),
        "the entry for 'part.linear'",
    ),
    "a sample NaN": (adapter_bytes(with_value([float("nan")], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of lists": (adapter_bytes(with_value([[1.0]], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of 10**400": (adapter_bytes(with_value([10**400], "base", "samples", MODULE, "values")), "the entry for"),
    "a sample of integers": (
        adapter_bytes(with_value({"dtype": "", "values": [1] * 12}, "base", "samples", MODULE)),
        "are not those",
    ),
    "a dtype that is a number": (
        adapter_bytes(with_value({"dtype": 3, "values": [1.0]}, "base", "samples", MODULE)),
        "the entry for",
    ),
    "a base with NUL": (adapter_bytes(with_value("a\0b", "base", "name")), "base.name is"),
    "a base of 5,000 letters": (adapter_bytes(with_value("x" * 5000, "base", "name")), "base.name is"),
    "a task that is a list": (adapter_bytes(with_value([], "task")), "task is"),
    "a task name that is a list": (adapter_bytes(with_value(["caption"], "task", "name")), "task.name is"),
    "generation that is a text": (adapter_bytes(with_value("fast", "task", "generation")), "task.generation is 'fast'"),
    "a token limit that is a text": (
        adapter_bytes(with_value("9", "task", "generation", "max_new_tokens")),
        "max_new_tokens is '9'",
    ),
    "generation that is a number": (adapter_bytes(with_value(7, "task", "generation")), "task.generation is 7"),
    "an option with an escape": (adapter_bytes(with_value(1, "task", "generation", "\x1b[2J")), "task.generation is"),
    "too many options": (
        adapter_bytes(with_value({f"o{n}": 1 for n in range(65)}, "task", "generation")),
        "at most 64 options",
    ),
    "an option of a megabyte": (adapter_bytes(with_value("x" * 10**6, "task", "generation", "top_p")), "small values"),
    "a huge integer": (adapter_bytes(with_value(10**30, "task", "generation", "top_k")), "small values"),
    "an infinite option": (adapter_bytes(with_value(float("inf"), "task", "generation", "top_p")), "task.generation is"),
    "control characters in a list": (
        adapter_bytes(with_value([["\x1b"]], "task", "generation", "bad_words_ids")),
        "small values",
    ),
    "a billion beams": (adapter_bytes(with_value(10**9, "task", "generation", "num_beams")), "num_beams is"),
    "a temperature of zero": (adapter_bytes(with_value(0, "task", "temperature")), "temperature is 0"),
    "a temperature of 10**400": (adapter_bytes(with_value(10**400, "task", "temperature")), "temperature is"),
    "training that is a number": (adapter_bytes(with_value(3, "training")), "training is 3"),
    "settings that are a list": (adapter_bytes(with_value([1], "training", "settings")), "training.settings is"),
    "annotations that are a list": (adapter_bytes(with_value(["a"], "training", "settings", "annotations")), "annotations is"),
    "steps that are a text": (adapter_bytes(with_value("many", "training", "steps")), "training.steps is 'many'"),
    "a version that is true": (adapter_bytes(with_value(True, "format_version")), "format_version is True"),
    "a later version": (adapter_bytes(with_value(3, "format_version")), "reads formats up to 2; upgrade"),
    "a dropout of 1": (adapter_bytes(with_value(1.0, "lora", "dropout")), "lora.dropout is 1.0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_adapter_is_refused_in_a_short_message_and_leaves_the_model_alone(case, tmp_path):
    """A hostile file raises AdapterError with a short message. Memory grows with the size of the file; no hook is added."""
    data, expected = HOSTILE[case]
    (tmp_path / "a.safetensors").write_bytes(data)
    model = Model()

    def load() -> None:
        with pytest.raises(AdapterError, match=expected) as raised:
            adapter_file.load(model, tmp_path / "a.safetensors")
        assert len(str(raised.value)) < LONGEST_MESSAGE and "\x1b" not in str(raised.value) and "\0" not in str(raised.value)

    most = 20 + 10 * len(data) / 2**20
    assert megabytes(load) < most or megabytes(load) < most  # again, because the first call may also import modules
    assert not attached.names(model) and list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_a_tied_head_in_a_file_raises_adapter_error(tmp_path):
    """`load` raises AdapterError for a head that shares its weight, although `inject` raises LoRAError."""
    metadata = json.loads(json.dumps(valid_header()).replace(MODULE, "part.head"))
    metadata["base"]["samples"]["part.head"] = {}
    (tmp_path / "a").write_bytes(
        adapter_bytes(metadata, {key.replace(MODULE, "part.head"): value for key, value in tensor_entries().items()})
    )
    with pytest.raises(AdapterError, match=r"shares its weight.*leave it out of the targets, and train the adapter again$"):
        adapter_file.load(Model(), tmp_path / "a")


def test_a_truncated_adapter_is_refused_at_every_length(tmp_path):
    """Every proper prefix of a valid file raises AdapterError."""
    whole = adapter_bytes(valid_header())
    for end in range(len(whole)):
        (tmp_path / "a").write_bytes(whole[:end])
        with pytest.raises(AdapterError, match="not a complete"):
            adapter_file.read(tmp_path / "a")


@pytest.mark.parametrize(
    "dtype", "F64 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 X".split()
)
def test_only_float32_is_read(dtype, tmp_path):
    """A tensor of another dtype raises AdapterError, for element sizes of 1, 2, 4 and 8 bytes."""
    for width in (1, 2, 4, 8):
        tensors = {
            key: value | {"data_offsets": [width * n // 4 for n in value["data_offsets"]]}
            for key, value in tensor_entries(dtype).items()
        }
        (tmp_path / "a").write_bytes(adapter_bytes(valid_header(), tensors, bytes(14 * width)))
        with pytest.raises(AdapterError, match=r"not a complete|but its header says"):
            adapter_file.read(tmp_path / "a")


def test_a_path_that_is_not_a_regular_file_raises_adapter_error(tmp_path):
    """`read` and `locate` raise AdapterError for pipes, folders, devices, /proc, link loops and invalid names."""
    for description, path in irregular_paths(tmp_path).items():
        with pytest.raises(AdapterError):
            adapter_file.read(path)
        if description not in ("/proc/self/mem", "empty", "/proc/kcore"):
            with pytest.raises(AdapterError, match="no adapter at"):
                runs.locate(path)


def test_the_newest_run_is_found_among_links_folders_and_pipes(tmp_path):
    """`locate` skips dangling links, folders and pipes that have the name of an adapter file."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / ADAPTER_NAME).symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / ADAPTER_NAME).mkdir()
    os.mkfifo(tmp_path / "c" / ADAPTER_NAME)
    (tmp_path / "d" / ADAPTER_NAME).write_bytes(b"x")
    assert runs.locate(tmp_path) == tmp_path / "d" / ADAPTER_NAME


class Planted:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


def test_a_pickle_is_never_executed(tmp_path):
    """No pickle code runs from a .safetensors path: not from a pickle, a torch archive, or a pickle after a valid header."""
    pickle.loads(pickle.dumps(Planted(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()  # the probe itself works
    torch.save(Planted(tmp_path / "ran"), tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    (tmp_path / "c.safetensors").write_bytes(
        adapter_bytes(valid_header(), tensor_entries(), pickle.dumps(Planted(tmp_path / "ran")))
    )
    for name in "abc":
        with pytest.raises(AdapterError):
            adapter_file.read(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_header_of_60_megabytes_is_refused(tmp_path):
    """The size limit of the header also limits the number of tensors."""
    (tmp_path / "a").write_bytes((60_000_000).to_bytes(8, "little") + b" " * 60_000_000)
    with pytest.raises(AdapterError, match="its header has 60,000,000 bytes"):
        adapter_file.read(tmp_path / "a")


def test_a_run_that_ended_in_nan_can_be_read_again(tmp_path):
    """The training record in a header may contain NaN, for example as validation loss."""
    (tmp_path / "a").write_bytes(adapter_bytes(with_value(float("nan"), "training", "val_loss")))
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


def key_paths(value: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the path of keys to every value of a nested dict."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from key_paths(child, *path, key)


@many_examples
@given(keys=st.sampled_from(list(key_paths(valid_header()))), value=values)
def test_any_value_anywhere_in_the_header_is_used_or_refused(keys, value, tmp_path, make):
    """`read`, `task_of`, `describe` and `load` accept the header, or raise AdapterError or ConfigError."""
    (tmp_path / "a").write_bytes(adapter_bytes(with_value(value, *keys)))
    try:
        adapter = adapter_file.read(tmp_path / "a")
        backbone = BACKBONE.setdefault("", make("blip"))
        task = task_of(backbone, adapter)
        describe(task, adapter, 1, "fp32")
        adapter_file.load(Model(), adapter)
    except AdapterError as error:
        assert len(str(error)) < LONGEST_MESSAGE
    except ValueError as error:
        assert type(error).__name__ == "ConfigError"


BACKBONE: dict[str, Any] = {}


@many_examples
@given(
    key=st.text(max_size=40) | st.sampled_from(list(tensor_entries())),
    shape=st.lists(st.integers(-1, 2**64), max_size=5),
    offsets=st.lists(st.integers(-1, 2**64), max_size=3) | st.sampled_from([[0, 32], [32, 56], [0, 56]]),
    dtype=st.sampled_from(["F32", "I64", "", "F8_E4M3"]),
)
def test_any_tensor_entry_in_the_header_is_read_or_refused(key, shape, offsets, dtype, tmp_path):
    """Any key, shape, offsets and dtype can be read, or raise AdapterError."""
    tensors = tensor_entries() | {key: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    (tmp_path / "a").write_bytes(adapter_bytes(valid_header(), tensors))
    try:
        adapter_file.read(tmp_path / "a")
    except AdapterError as error:
        assert len(str(error)) < LONGEST_MESSAGE


@many_examples
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_file_with_changed_bytes_is_read_or_refused(flips, tmp_path):
    """A file with up to four changed bytes gives a finite adapter or raises AdapterError."""
    data = bytearray(adapter_bytes(valid_header()))
    for offset, value in flips:
        data[offset % len(data)] = value
    (tmp_path / "a").write_bytes(data)
    try:
        assert all(t.isfinite().all() for t in adapter_file.read(tmp_path / "a").tensors.values())
    except AdapterError as error:
        assert len(str(error)) < LONGEST_MESSAGE


def test_every_checked_part_of_a_header_is_in_a_saved_header():
    """`header.KNOWN` lists parts of a saved header, and optional ones: variant, temperature, image size, dtype and baked."""
    known = {tuple(place.split(".")) for place in header.KNOWN if place}
    assert known - set(key_paths(valid_header())) == {
        ("lora", "variant"), ("task", "temperature"), ("base", "image_size"), ("base", "dtype"), ("base", "baked"),
    }  # fmt: skip


# ---------------------------------------------------------------- images


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *more: bytes, data: bytes = b"") -> bytes:
    """Return a PNG that claims a size, with extra chunks `more`."""
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
BAD_PICTURES: dict[str, tuple[bytes, str]] = {  # defect → (file, part of the error message)
    "a bomb above Pillow's limit": (png(60_000, 60_000), "more than 134,217,728.* make it smaller"),
    "a bomb below Pillow's limit": (png(13_000, 13_000), "13000 × 13000 pixels, more than 134,217,728; make it smaller"),
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
    "an EPS": (encoded(RED, "eps"), "is not a usable image: it has no supported format"),
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


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_hostile_picture_is_refused_in_little_memory_and_the_error_names_it(case, tmp_path):
    """`open_image` raises ImageError, whatever the suffix. Memory does not grow with the size that the file claims."""
    data, expected = BAD_PICTURES[case]
    (tmp_path / "a.jpg").write_bytes(data)

    def open_it() -> None:
        with pytest.raises(ImageError, match=expected) as raised:
            open_image(tmp_path / "a.jpg")
        assert str(raised.value).startswith(str(tmp_path / "a.jpg")) and len(str(raised.value)) < LONGEST_MESSAGE

    assert megabytes(open_it) < 60


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """Pillow runs Ghostscript to open an EPS. `open_image` refuses an EPS and does not run it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(encoded(RED, "eps"))
    with pytest.raises(ImageError):
        open_image(tmp_path / "a.png")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_not_a_regular_file_raises_image_error(tmp_path):
    """`open_image` raises ImageError for pipes, folders, devices, /proc, link loops and invalid names."""
    for path in irregular_paths(tmp_path).values():
        with pytest.raises(ImageError, match=r"is not a usable image|does not exist|cannot be (decoded|read)"):
            open_image(path)


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
    """A sparse GIF of 100 GB is refused by its size, because a decoder would scan all of it."""
    with (tmp_path / "a.gif").open("wb") as file:
        file.write(encoded(RED, "gif")[:-1])
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match="more than 268,435,456"):
        open_image(tmp_path / "a.gif")


def test_odd_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    """The first frame is read. Broken tags, profiles and orientations are ignored. Extreme shapes are valid."""
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
        augmentation.augment(picture, "", random.Random(1))


@pytest.mark.filterwarnings("error")
def test_nan_and_infinity_are_black_or_white(tmp_path):
    """A float TIFF with NaN and infinity is read without a warning: NaN and -inf are 0, inf is 255."""
    grey = np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255, 0, 127]


def test_a_broken_picture_prints_no_warning(tmp_path):
    """Pillow's warnings about bombs and tags are not printed."""
    (tmp_path / "a").write_bytes(BAD_PICTURES["a bomb below Pillow's limit"][0])
    (tmp_path / "b").write_bytes(BAD_PICTURES["a TIFF that is all tags"][0])
    code = "import sys; from lora_blip.data import images\nfor path in sys.argv[1:]:\n"
    code += " try: images.open_image(path)\n except images.ImageError: pass"
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True
    )
    assert (process.stdout, process.stderr) == ("", "")


FILES = [encoded(NOISE, kind) for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff")]
FILES += [PROGRESSIVE, encoded(NOISE.convert("CMYK"), "tiff", compression="tiff_lzw")]


@many_examples
@given(
    data=st.sampled_from(FILES),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 10**5),
)
def test_a_damaged_picture_is_read_or_raises_image_error(data, flips, cut, tmp_path, monkeypatch):
    """With changed bytes and a truncated end, `open_image` returns an RGB image or raises ImageError, no other error."""
    monkeypatch.setattr(images, "LARGEST", 2**22)
    damaged = bytearray(data)
    for offset, value in flips:
        damaged[offset % len(data)] = value
    (tmp_path / "a").write_bytes(damaged[:cut])
    try:
        picture = open_image(tmp_path / "a")
        assert picture.mode == "RGB" and min(picture.size) > 0
    except ImageError as error:
        assert str(tmp_path / "a") in str(error) and len(str(error)) < LONGEST_MESSAGE


# ---------------------------------------------------------------- annotations

GOOD = '{"image": "a.png", "text": "good"}'
BAD_LINES: dict[str, tuple[str | bytes, str]] = {  # defect → (line, part of the error message)
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
    "a loop": ('{"image": "loop", "text": "t"}', "loop cannot be read"),
    "out of the folder, to nothing": ('{"image": "../../../gone.png", "text": "t"}', "does not exist"),
}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    RED.save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "a.png"


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.usefixtures("photo")
def test_a_hostile_line_is_a_listed_problem_and_other_lines_are_read(case, tmp_path):
    """The problem names file, line and reason in a short message. The lines before and after it are read."""
    line, expected = BAD_LINES[case]
    line = line.encode() if isinstance(line, str) else line
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    good, problems = annotations.read(tmp_path / "x.jsonl", on_bad_data="skip")
    assert [example.line for example in good] == [1, 3] and [problem.line for problem in problems] == [2]
    with pytest.raises(DataError, match=expected) as raised:
        annotations.read(tmp_path / "x.jsonl")
    assert f"{tmp_path / 'x.jsonl'}:2: " in str(raised.value) and len(str(raised.value)) < LONGEST_MESSAGE
    assert "\x1b" not in str(raised.value) and "\0" not in str(raised.value)


def test_a_path_that_is_not_a_regular_file_raises_data_error(tmp_path):
    """`read` and `find_sources` raise DataError for pipes, folders, devices, /proc, link loops and invalid names."""
    for description, path in irregular_paths(tmp_path).items():
        with pytest.raises(DataError, match=r"annotations|in this folder|does not exist|cannot be read"):
            annotations.read(path)
        if description not in ("a folder", "a/" * 10):
            with pytest.raises(DataError, match=r"cannot be read|does not exist"):
                find_sources(str(path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_line_end_is_read_with_and_without_a_byte_order_mark(photo, tmp_path, end, mark):
    """Line ends of Unix, Windows and old Mac are read, with and without a byte order mark."""
    (tmp_path / "x.jsonl").write_bytes((mark + end.join([GOOD, "", GOOD])).encode())
    assert [example.line for example in annotations.read(tmp_path / "x.jsonl")[0]] == [1, 3] and photo.exists()


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32"])
def test_other_encodings_raise_data_error(photo, tmp_path, encoding):
    """UTF-16 without a byte order mark and UTF-32 are not supported: no line is valid JSON."""
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode(encoding))
    with pytest.raises(DataError, match="not valid JSON"):
        annotations.read(tmp_path / "x.jsonl", on_bad_data="skip")
    assert photo.exists()


def test_utf_16_with_a_byte_order_mark_is_read(photo, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert [example.file for example in annotations.read(tmp_path / "x.jsonl")[0]] == [str(photo)]
    assert "x.jsonl is read as UTF-16" in capsys.readouterr().out


@pytest.mark.usefixtures("photo")
@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "csv"])
def test_a_line_of_100_megabytes_is_a_problem_and_is_not_kept_in_memory(tmp_path, suffix):
    """Memory grows by less than 80 MiB, and the lines after the long line are read."""
    head, line = {"jsonl": ("", GOOD), "tsv": ("", "a.png\tgood"), "csv": ("image,text", "a.png,good")}[suffix]
    path = tmp_path / f"x.{suffix}"
    with path.open("wb") as file:
        file.write(f"{head}\n{line}\n".encode())
        for _ in range(100):
            file.write(b"a,\t" * (2**20 // 3))
        file.write(f"\n{line}\n".encode())
    lines: list[Any] = []
    reader = {"jsonl": jsonl_entries, "tsv": tsv_entries, "csv": csv_entries}[suffix]
    assert megabytes(lambda: lines.extend(reader(path))) < 80
    assert [number for number, _ in lines] == [2, 3, 4] and lines[1][1] == formats.TOO_LONG
    assert isinstance(lines[2][1], dict)


def test_of_a_hundred_thousand_bad_lines_the_first_twenty_are_listed(tmp_path):
    """The length of the message is bounded, and so is the memory for each problem."""
    (tmp_path / "x.jsonl").write_text("another line\n" + "no line\n" * 99_999)
    messages = []

    def read() -> None:
        with pytest.raises(DataError, match="and 99980 more") as raised:
            annotations.read(tmp_path / "x.jsonl")
        messages.append(str(raised.value))

    assert megabytes(read) < 100 and len(messages[0]) < 20 * 300


@many_examples
@given(
    lines=st.lists(
        st.binary(max_size=60) | st.sampled_from([GOOD.encode(), b'{"image": "a.png"', b"\r", b'"', b"a.png\tt"]), max_size=6
    )
)
def test_any_bytes_are_examples_or_problems(lines, tmp_path):
    """`read` raises DataError, or returns each line at most once: as an example with valid Unicode, or as a problem."""
    for suffix in ("jsonl", "tsv"):
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"\n".join(lines))
        try:
            good, problems = annotations.read(path, on_bad_data="skip", decode=False)
        except DataError:
            continue
        numbers = [one.line for one in (*good, *problems)]
        assert len(set(numbers)) == len(numbers) and all(example.words.encode() for example in good)


@many_examples
@given(value=values)
def test_any_json_is_an_entry_or_a_reason(value):
    """`canonical` accepts any object. It returns a reason, or an entry with a valid path and texts."""
    for record in (
        value,
        {"image": value, "text": "t"},
        {"image": "a", "text": value},
        {"image": "a", "question": "q", "answers": value},
    ):
        result = canonical(record) if isinstance(record, dict) else ""
        if isinstance(result, str):
            assert len(result) < LONGEST_MESSAGE
        else:
            assert untrusted.is_path(result["image"]) and (result.get("text") or all(result["answers"]))


COCO = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "one"}]}
KARPATHY = {"images": [{"filename": "a.png", "filepath": "", "split": "train", "sentences": [{"raw": "one"}]}]}
LIST = [{"image": "a.png", "caption": ["one", "two"]}]


@many_examples
@given(document=st.sampled_from([COCO, KARPATHY, LIST]), path=st.lists(st.integers(0, 3), min_size=1, max_size=6), value=values)
def test_any_value_anywhere_in_a_data_set_is_an_entry_or_a_reason(document, path, value, tmp_path):
    """A source raises DataError, or gives an entry or a reason for each record, as `prepare` reads it."""
    root = [deepcopy(document)]
    parent: Any = root
    for step in path:
        keys = list(parent.keys()) if isinstance(parent, dict) else list(range(len(parent)))
        key = keys[step % len(keys)] if keys else None
        if key is None or not isinstance(parent[key], dict | list) or step is path[-1]:
            break
        parent = parent[key]
    if key is not None:
        parent[key] = value
    (tmp_path / "captions_x.json").write_text(json.dumps(root[0]))
    try:
        read = [entry for source in find_sources(str(tmp_path / "captions_x.json")) for entry in source.entries()]
    except DataError as error:
        assert len(str(error)) < LONGEST_MESSAGE
        return
    for _, entry in read:
        result = canonical(entry) if isinstance(entry, dict) else entry
        assert isinstance(result, dict) or len(result) < LONGEST_MESSAGE
        if isinstance(result, dict):
            Folder(tmp_path).find(result["image"])


BAD_SOURCES: dict[str, tuple[str, str, str]] = {  # defect → (name of the file, content, part of the error message)
    "a folder that is a number": (
        "dataset_x.json",
        json.dumps({"images": [KARPATHY["images"][0] | {"filepath": 3}]}),
        "\"filepath\" is '3'",
    ),
    "a line that is all brackets": ("x.json", '{"image": ' + "[" * 5000, "not valid JSON"),
    "a document that is all brackets": ("x.json", "[" * 100_000, "nested too deeply"),
    "a document 500 deep": ("x.json", "[" * 500 + "]" * 500, "nested too deeply"),
    "a caption 90 deep": ("x.json", '[{"image": "a.png", "caption": ' + "[" * 90 + "]" * 90 + "}]", "expected a text"),
    "the key images twice": (
        "captions_x.json",
        '{"images": [], "images": [], "annotations": []}',
        "the key 'images' occurs twice",
    ),
    "NaN": ("captions_x.json", '{"images": [], "annotations": [NaN]}', "NaN is not JSON"),
    "an id of 5,000 digits": ("captions_x.json", '{"images": [{"id": ' + "9" * 5000 + "}]}", "not valid JSON"),
    "an id of a megabyte": (
        "captions_x.json",
        json.dumps(COCO | {"annotations": [{"image_id": "x" * 10**6, "caption": ""}]}),
        "is not an id in",
    ),
    "a text file without captions": ("Flickr8k.token.txt", "hello", "the format of this file is unknown"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_hostile_data_set_or_its_entry_is_refused(case, tmp_path):
    """A source raises DataError for the file or gives a reason for the entry, in a short message."""
    name, content, expected = BAD_SOURCES[case]
    (tmp_path / name).write_text(content)
    try:
        entries = [entry for source in find_sources(str(tmp_path / name)) for _, entry in source.entries()]
        messages = [canonical(entry) if isinstance(entry, dict) else entry for entry in entries]
    except DataError as error:
        messages = [str(error)]
    assert any(isinstance(one, str) and expected in one for one in messages) and all(
        len(str(one)) < LONGEST_MESSAGE for one in messages
    )


def test_an_empty_split_list_of_flickr8k_raises_data_error(tmp_path):
    """The split lists next to the captions are read too; an empty one, as from an aborted download, raises DataError."""
    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tA cube .\n")
    (tmp_path / "Flickr_8k.trainImages.txt").touch()
    (source,) = find_sources(str(tmp_path / "Flickr8k.token.txt"))
    with pytest.raises(DataError, match=r"trainImages\.txt.*it is empty"):
        list(source.entries())


@many_examples
@given(value=values)
def test_any_value_is_quoted_in_one_short_line(value):
    """The quoted value is short and printable, without line ends and control characters."""
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
def test_a_malformed_csv_gives_reasons(tmp_path, text, expected):
    """A duplicate column, an open quote, a huge cell and a huge row are each reported. A NUL in a cell is not."""
    (tmp_path / "x.csv").write_text(text)
    reasons = [row for _, row in csv_entries(tmp_path / "x.csv") if isinstance(row, str)]
    assert bool(reasons) == bool(expected) and all(len(reason) < LONGEST_MESSAGE for reason in reasons)
    if expected:
        assert re.search(expected, reasons[0])


def test_a_list_of_sources_may_be_longer_than_a_file_name(tmp_path):
    """A long comma-separated list of missing files raises DataError, not OSError."""
    with pytest.raises(DataError, match="does not exist"):
        find_sources(",".join([str(tmp_path / "x.jsonl")] * 200))
