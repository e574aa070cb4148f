"""Read a checkpoint that has only `.bin` weights: convert them once to safetensors, in a child process.

A `.bin` file contains instructions that build Python objects, so a hostile file may try to run code. `bin_reader` reads it
with PyTorch's weights-only reader, in a child process with limits. This process then opens only the safetensors.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_blip.errors import ModelError
from lora_blip.models.base_config import LARGEST_INDEX, read_json
from lora_blip.models.weight_names import SAFE_INDEX, SAFE_WEIGHTS
from lora_blip.runtime.files import cache_folder, make_folder, make_whole, room_for, write_new
from lora_blip.runtime.untrusted import UnreadableError, open_regular, os_error_reason, quoted, shorten

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
COPIED = ("config.json", "generation_config.json")  # files that transformers reads together with the weights
BYTES_PER_SECOND = 2**27  # an estimate, only for the message
READER = Path(__file__).with_name("bin_reader.py")


def with_safetensors(folder: str, name: str) -> str:
    """Return a folder with the checkpoint's weights as safetensors: `folder`, or its converted copy in the cache.

    The copy contains the weights and the configuration files. It is made once, and again if a `.bin` changes. Return `folder`
    if it has no weights at all. Raise ModelError if the `.bin` files cannot be read.
    """
    files = bin_files(folder, name)
    if not files:
        return folder
    configs = [path for path in (Path(folder) / each for each in COPIED) if path.is_file()]
    copy = cache_folder() / "converted" / _key([*files, *configs])
    if not copy.is_dir():
        _convert(files, configs, copy, name)
    return str(copy)


def bin_files(folder: str, name: str) -> list[Path]:
    """Return the `.bin` files of a checkpoint without safetensors, in the order of their names."""
    root = Path(folder)
    if (root / SAFE_WEIGHTS).exists() or (root / SAFE_INDEX).exists():
        return []
    names = [WEIGHTS] if (root / WEIGHTS).exists() else []
    if not names and (root / INDEX).exists():
        index = read_json(folder, INDEX, largest=LARGEST_INDEX).get("weight_map")
        names = sorted({str(value) for value in index.values()}) if isinstance(index, dict) else []
        unsafe = [each for each in names if Path(each).name != each or "\\" in each or not each.endswith(".bin")]
        if unsafe or not names:
            raise ModelError(f"{INDEX} of {name!r} does not list its files; download the checkpoint again")
    for each in names:
        try:
            open_regular(root / each).close()
        except (OSError, UnreadableError) as error:
            raise ModelError(
                f"the weights of {name!r} cannot be read: {quoted(each)}: {os_error_reason(error)}; download it again"
            ) from None
    return [root / each for each in names]


def _key(files: list[Path]) -> str:
    described = []
    for file in files:
        real = file.resolve()
        status = real.stat()
        described.append([str(real), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _convert(files: list[Path], configs: list[Path], copy: Path, name: str) -> None:
    """Write the safetensors of `files` into the new folder `copy`, as a whole or not at all."""
    size = sum(file.stat().st_size for file in files)
    print(
        f"{name!r} has only {WEIGHTS}: converting {size / 1e6:,.0f} MB to safetensors once, in about "
        f"{10 + size // BYTES_PER_SECOND} s → {copy}",
        flush=True,
    )
    advice = "; free some space, or set XDG_CACHE_HOME to a folder on another disk"
    with room_for(copy.parent, ModelError, advice):
        make_folder(copy.parent)

        def fill(folder: Path) -> None:
            _read(files, folder, size, name)
            _index(files, folder, name)
            for config in configs:
                shutil.copyfile(config, folder / config.name)

        try:
            make_whole(copy, fill)
        except OSError:
            if not copy.is_dir():  # if it exists, another process of torchrun has created it in the meantime
                raise


def _read(files: list[Path], target: Path, size: int, name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_FORCE")}
    command = [sys.executable, "-P", str(READER), str(target), *map(str, files)]
    seconds = 180 + size // 2**23
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(_unreadable(name, files, f"it was not read within {seconds} s")) from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        if done.returncode < 0:
            reason = f"the process that read it ended with {signal.Signals(-done.returncode).name}"
        raise ModelError(_unreadable(name, files, shorten(reason)))


def _unreadable(name: str, files: list[Path], reason: str) -> str:
    return (
        f"the weights of {name!r} cannot be read: {quoted(files[0].name)}: {reason}\nonly tensors are read from a .bin, "
        "because other objects can run code; download it again, or give a checkpoint with model.safetensors"
    )


def _index(files: list[Path], folder: Path, name: str) -> None:
    """Name the safetensors as transformers expects them: one file, or several with an index."""
    if len(files) == 1:
        (folder / f"{files[0].stem}.safetensors").rename(folder / SAFE_WEIGHTS)
        return
    places: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        try:
            with safe_open(path, "pt") as opened:
                places |= dict.fromkeys(opened.keys(), path.name)
        except SafetensorError as error:
            raise ModelError(_unreadable(name, files, shorten(str(error)))) from None
    index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": places}
    write_new(folder / SAFE_INDEX, json.dumps(index).encode())
