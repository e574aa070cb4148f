"""`lora-blip doctor`: print versions and devices, and test the embedded bases. Add the output to a bug report."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.lora import injection, targets
from lora_blip.metrics.java import NOTICE
from lora_blip.models.loading import load_backbone
from lora_blip.models.precision import DTYPES, emulated
from lora_blip.runtime.counts import counted
from lora_blip.runtime.terminal import encodable_output
from lora_blip.runtime.untrusted import printable, printable_lines
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.version import __version__

CORE = ("torch", "transformers", "pillow", "numpy", "safetensors")
EXTRAS = {
    "plots": ("matplotlib",),
    "metrics": ("pycocoevalcap",),
    "tensorboard": ("tensorboard",),
    "excel": ("openpyxl",),
    "parquet": ("pyarrow",),
    "heic": ("pillow-heif",),
    "quantized": ("bitsandbytes", "accelerate"),
    "dev": ("pytest", "peft", "selenium", "ruff", "mypy"),
}
BASES = ("assets/tiny-blip", "assets/tiny-blip2", "assets/tiny-blip-vqa", "assets/tiny-blip-itm")


@encodable_output()
def examine() -> bool:
    """Print versions, devices and the results of the tests. Return False if torch is missing or a test fails."""
    print(f"lora_blip {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("core        ", ", ".join(f"{name} {version(name)}" for name in CORE))
    for extra, names in EXTRAS.items():
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        print(f"{extra:<13}{versions}" + f': pip install "lora_blip[{extra}]"' * ("missing" in versions))
    print(f"java         {java()}")
    for device in devices():
        print(f"{device!s:<13}{device_name(device)}: {', '.join(precisions(device))}")
    results = [run_test(name, check_hooks) for name in BASES]
    return version("torch") != "missing" and all(results)


def version(name: str) -> str:
    """Return the version of an installed package, or "missing"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def java() -> str:
    """Return the version of Java, "missing", or "PATH does not run"."""
    path = shutil.which("java")
    if path is None:
        return "missing"
    process = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20, check=False)
    lines = [line for line in (process.stderr or process.stdout).splitlines() if not line.startswith(NOTICE)]
    return printable(lines[0]) if lines and process.returncode == 0 else f"{path} does not run"


def devices() -> list[torch.device]:
    """Return the CPU and all GPUs."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus, *([torch.device("mps")] * torch.backends.mps.is_available())]


def device_name(device: torch.device) -> str:
    """Return the name of a GPU with its memory, or of the CPU with the number of threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def works(device: torch.device, precision: str) -> bool:
    """Return True if the forward and backward pass of a linear layer run under the autocast of this precision."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x, weight = (torch.ones(rows, 8, device=device, dtype=torch.float32) for rows in (2, 8))
            weight.requires_grad_()
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                torch.nn.functional.linear(x, weight).sum().backward()
        return weight.grad is not None
    except (RuntimeError, ValueError):
        return False


def precisions(device: torch.device) -> list[str]:
    """Return the precisions that work on a device."""
    return [name + " (emulated, slow)" * emulated(name, device) for name in DTYPES if works(device, name)]


def run_test(name: str, check: Callable[[str], str]) -> bool:
    """Call `check` with the name of a base, and print its result. Return False if it raises an error."""
    try:
        print(f"{name}: {check(name)}")
        return True
    except Exception as error:  # report any error and continue
        print(printable_lines(f"{name}: FAILED: {type(error).__name__}: {error}"))
        return False


def check_hooks(name: str) -> str:
    """Check that adapters on the ViT of an embedded base change the logits if and only if B is not zero. Return the result."""
    backbone = load_backbone(name, "cpu")
    task = TASKS[default_task(backbone.architecture)](backbone)
    side = backbone.model.config.vision_config.image_size
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    examples = [Example(Path(text), text, text, 1, "", "what is it?", (text,)) for text in ("a red cube", "a blue cube")]
    batch = task.batch(HostBatch(examples, pictures))
    with torch.no_grad():
        before = task.logits(batch)
        adapters = injection.inject(backbone.model, targets.find(backbone.model, "vit"))
        with_new_adapter = task.logits(batch)
        for lora in adapters.values():
            lora.B.fill_(0.01)
        with_changed_adapter = task.logits(batch)
    if not torch.equal(before, with_new_adapter):
        raise RuntimeError("new LoRA adapters on the ViT change the logits, although B = 0")
    if torch.equal(before, with_changed_adapter):
        raise RuntimeError("LoRA adapters on the ViT with B = 0.01 do not change the logits: their hooks do not run")
    return f"works: the hooks on {counted(len(adapters), 'ViT linear')} run"
