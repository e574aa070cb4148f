"""Convert PyTorch `.bin` files to safetensors: the child process of `bin_weights`.

`python bin_reader.py TARGET_FOLDER FILE…` writes FILE's tensors to TARGET_FOLDER/<its name>.safetensors. It reads with
PyTorch's weights-only reader, which creates tensors and nothing else, and with limits of memory and file size, so that a
hostile file cannot harm more than this process. It imports nothing of lora_blip.
"""

import sys
import zipfile
from pathlib import Path

SPARE = 2**31  # bytes of memory in addition to the size of the files


def main(target: Path, files: list[Path]) -> None:
    import torch  # the limits start after the import, which needs much more than a small file
    from safetensors.torch import save_file

    size = sum(file.stat().st_size for file in files)
    limit(size)
    names: set[str] = set()
    for file in files:
        with file.open("rb") as opened:
            if opened.read(2) == b"PK":
                refuse_compressed(file)
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            else:  # the format before PyTorch 1.6
                opened.seek(0)
                content = torch.load(opened, map_location="cpu", weights_only=True)
        tensors = checked(content, size)
        if repeated := names & tensors.keys():
            raise ValueError(f"{min(repeated)!r} is in two files")
        names |= tensors.keys()
        save_file(tensors, target / f"{file.stem}.safetensors", metadata={"format": "pt"})


def refuse_compressed(file: Path) -> None:
    """Raise ValueError if a zip file is compressed: PyTorch does not compress, and a small file could fill the memory."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is a compressed archive, not a file that PyTorch wrote")


def checked(content: object, size: int) -> dict:
    """Return {name: copy of the tensor}. Raise ValueError if `content` is not the weights of a model."""
    import torch

    if not isinstance(content, dict) or not content:
        raise ValueError(f"it contains a {type(content).__name__}, not the weights of a model")
    total = 0
    for name, tensor in content.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 500:
            raise ValueError("a weight has no usable name")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name!r} is not a plain tensor")
        total += tensor.numel() * tensor.element_size()
        if total > 2 * size:  # tied weights share their memory; a tensor with stride 0 can claim any size
            raise ValueError(f"{name!r} is larger than the file")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}


def limit(size: int) -> None:
    """Limit the memory, the files and the processor time of this process, if the system supports limits."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    limits = {
        "RLIMIT_DATA": memory() + 3 * size + SPARE,
        "RLIMIT_FSIZE": 2 * size + SPARE // 8,
        "RLIMIT_CPU": 120 + size // 2**24,
    }
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def memory() -> int:
    """Return the bytes of data that this process uses now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))
    except (OSError, StopIteration):
        return 2**36  # not Linux, which does not enforce this limit either


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except MemoryError:
        sys.exit("it needs more than three times its size in memory")
    except Exception as error:
        message = (str(error).splitlines() or [type(error).__name__])[0][:300]
        sys.exit("it contains more than tensors" if message.startswith("Weights only load failed") else message)
