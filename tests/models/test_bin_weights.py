"""A checkpoint with only `.bin` weights loads as its safetensors do, and a hostile file is one error that runs nothing."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_blip.errors import ModelError
from lora_blip.models import bin_weights
from lora_blip.models.bin_weights import INDEX, WEIGHTS, with_safetensors
from lora_blip.models.loading import load_backbone


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_blip" / "converted"


@pytest.fixture
def folder(tmp_path, checkpoints) -> Path:
    """Return a copy of a checkpoint without weights."""
    shutil.copytree(checkpoints["itm"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model"


def equal(folder: Path, other: Path) -> bool:
    states = [load_backbone(str(path), "cpu").model.state_dict() for path in (folder, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.loads
def test_a_bin_loads_as_its_safetensors_and_is_converted_once(folder, checkpoints, cache, capsys, monkeypatch):
    torch.save(load_file(checkpoints["itm"] / "model.safetensors"), folder / WEIGHTS)
    files = sorted(folder.iterdir())
    assert equal(folder, checkpoints["itm"])
    assert "converting" in capsys.readouterr().out and sorted(folder.iterdir()) == files, "a user's folder is not changed"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("converted again"))
    assert equal(folder, checkpoints["itm"]) and capsys.readouterr().out == ""
    os.utime(folder / WEIGHTS, (1, 1))  # another file
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        load_backbone(str(folder), "cpu")
    assert len(list(cache.iterdir())) == 1, "a conversion that failed leaves nothing"


def test_a_conversion_that_another_process_ends_first_is_used(folder, cache, monkeypatch):
    """A conversion uses the file that another process of torchrun finished first."""
    (folder / WEIGHTS).write_bytes(b"weights")
    first = [True]

    def read(_files: list[Path], target: Path, _size: int, _name: str) -> None:
        (target / "pytorch_model.safetensors").write_bytes(b"last")
        if first.pop():
            first.append(False)
            (Path(with_safetensors(str(folder), "model")) / "by the other process").touch()

    monkeypatch.setattr(bin_weights, "_read", read)
    copy = Path(with_safetensors(str(folder), "model"))
    assert list(cache.iterdir()) == [copy] and (copy / "by the other process").exists()


@pytest.mark.loads
def test_a_bin_in_several_files_of_the_format_before_zip_with_tied_weights(folder, checkpoints):
    weights = load_file(checkpoints["itm"] / "model.safetensors")
    names = sorted(weights)
    weights["tied"] = weights[names[0]].t() if weights[names[0]].ndim == 2 else weights[names[0]]
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": [*names[1::2], "tied"]}
    for file, keys in parts.items():
        torch.save({key: weights[key] for key in keys}, folder / file, _use_new_zipfile_serialization=False)
    places = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert equal(folder, checkpoints["itm"])


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def saved(value: object, **options) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def tensor(size: tuple[int, ...] = (2,)) -> torch.Tensor:
    return torch.zeros(size)


HOSTILE = {
    "a system call": lambda mark: saved({"a": Call(os.system, f"touch {mark}")}),
    "a system call in the old format": lambda mark: saved(
        {"a": Call(os.system, f"touch {mark}")}, _use_new_zipfile_serialization=False
    ),
    "eval": lambda mark: zipped(pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')"))),
    "exec by getattr": lambda _: zipped(pickle.dumps(Call(getattr, Call(__import__, "os"), "system"))),
    "a whole module": lambda _: saved({"a": torch.nn.Linear(2, 2)}),
    "a list": lambda _: saved([tensor()]),
    "no tensors": lambda _: saved({"a": 1}),
    "no names": lambda _: saved({3: tensor()}),
    "a name that moves the cursor": lambda _: saved({"\x1b[2Ja": tensor()}),
    "a tensor with a stride of zero": lambda _: saved({"a": torch.zeros(1).expand(2**34)}),
    "a sparse tensor": lambda _: saved({"a": torch.sparse_coo_tensor([[0]], [1.0], (2**40,))}),
    "a tensor without memory": lambda _: saved({"a": torch.empty(2**40, device="meta")}),
    "half a file": lambda _: saved({"a": tensor((999,))})[:2000],
    "noise": lambda _: b"\x80\x02" + bytes(range(256)) * 9,
    "a zip bomb": lambda _: zipped(b"\x80\x02]" + b"]" * 2**26, zipfile.ZIP_DEFLATED),
    "brackets without end": lambda _: zipped(b"\x80\x02" + b"(" * 10**6 + b"t" * 10**6 + b"."),
    "a tuple that doubles": lambda _: zipped(b"\x80\x02)" + b"2\x86" * 10**5 + b"."),
    "a list that doubles": lambda _: zipped(b"\x80\x02]" + b"".join(b"q%c(h%ch%cl" % (n, n, n) for n in range(99)) + b"."),
    "a tensor of another size than its memory": lambda _: saved({"a": tensor()}).replace(b"K\x02\x85", b"K\xff\x85"),
    "another tar": lambda _: b"sys_info".ljust(2**12, b"\0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_bin_is_one_error_and_nothing_runs(kind, folder, tmp_path, cache):
    refused(kind, folder, tmp_path, cache)


def test_a_bin_that_calls_the_system_is_one_error_and_nothing_runs(folder, tmp_path, cache):
    refused("a system call", folder, tmp_path, cache)


def refused(kind: str, folder: Path, tmp_path: Path, cache: Path) -> None:
    mark = tmp_path / "mark"
    (folder / WEIGHTS).write_bytes(HOSTILE[kind](mark))
    with pytest.raises(
        ModelError, match=r"the weights of '.*' cannot be read: 'pytorch_model\.bin': .+\n.*download it again"
    ) as e:
        load_backbone(str(folder), "cpu")
    message = str(e.value)
    print(message)
    assert not mark.exists() and not list(cache.iterdir()) and len(message) < 1000
    assert message.count("\n") == 1 and message.replace("\n", "").isprintable()


@pytest.mark.parametrize("file", ["../x.bin", "/etc/passwd", "a\\b.bin", "x.safetensors", "gone.bin"])
def test_an_index_names_only_bin_files_of_its_folder(folder, file):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ModelError, match="download"):
        with_safetensors(str(folder), "m")


def test_a_pipe_is_no_weights(folder):
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(ModelError, match="it is a pipe"):
        with_safetensors(str(folder), "m")


def test_safetensors_have_priority(checkpoints, folder):
    shutil.copy(checkpoints["itm"] / "model.safetensors", folder)
    (folder / WEIGHTS).write_bytes(b"never read")
    assert with_safetensors(str(folder), "m") == str(folder)


def test_the_reader_imports_nothing_of_the_package():
    """The reader runs in a restricted process and imports only libraries, because a module of its folder could shadow one."""
    reader = Path(sys.modules[with_safetensors.__module__].__file__ or "").with_name("bin_reader.py")
    assert "lora_blip" not in reader.read_text().replace("It imports nothing of lora_blip.", "")
