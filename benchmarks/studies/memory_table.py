"""Write the table of docs/quantized.md: the memory of a training step of real models, in 32, 16, 8 and 4 bits.

No weight is created: the models consist of fake tensors, which have shapes only. The formula is that of the estimate that
training prints: frozen weights, adapters with gradients and AdamW's state, and the bytes that autograd keeps.

`python -m benchmarks.studies.memory_table --measure nf4` compares the estimate with the memory of a process (BLIP base, CPU).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig, T5Config
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks.rows.memory import resident
from benchmarks.suite import sizes
from lora_blip.cli import report_errors
from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.kernels import linear as kernels
from lora_blip.kernels import switch, text_attention
from lora_blip.kernels.linear import as_autocast
from lora_blip.lora import attached, injection, targets
from lora_blip.models import weights
from lora_blip.models.loading import Backbone, load_backbone, recompute_contexts
from lora_blip.models.precision import autocasting
from lora_blip.models.quantized import kept_linears
from lora_blip.models.sharding import blocks_of
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import preflight

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quantized.md"
BATCH, RANK, TEXT = 8, 8, "a red cube on top of a blue cube on a table"  # the default batch size and rank
CARDS, OVERHEAD = (8, 16, 24), 1.0  # GB of GPUs; GB for the CUDA context and for tensors that exist for a moment
DTYPES = ("fp32", "bf16", "int8", "nf4")
GB = 1e9
VIT = {
    "hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16, "intermediate_size": 6144, "image_size": 224,
    "patch_size": 14,
}  # fmt: skip
OPT = {
    "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 50304,
}  # fmt: skip
T5 = {
    "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "vocab_size": 32128, "pad_token_id": 1,
    "eos_token_id": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0,
}  # fmt: skip
MODELS = {"BLIP large": "vit", "BLIP-2 OPT-2.7b": "vit,qformer", "BLIP-2 Flan-T5-XL": "vit,qformer"}  # with the targets


# ---------------------------------------------------------------- models without weights


def skeleton(name: str, dtype: torch.dtype) -> Any:
    """Return a model on the meta device."""
    with torch.device("meta"):
        if name.startswith("BLIP "):
            vision, _, text = sizes.SIZES[name.removeprefix("BLIP ")]
            return sizes._blip(vision, text).to(dtype)
        text_config = OPTConfig(**OPT, dropout=0.0) if "OPT" in name else T5Config(**T5)
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = Blip2Config(
            vision_config=VIT, qformer_config={"encoder_hidden_size": 1408, **quiet}, text_config=text_config,
            num_query_tokens=sizes.QUERIES, image_token_index=sizes.tokenizer_of("blip-2").convert_tokens_to_ids("<image>"),
        )  # fmt: skip
        return Blip2ForConditionalGeneration(config).to(dtype)


def fake(model: nn.Module) -> None:
    """Replace the tensors of a model by fake ones on the CPU. A shared parameter stays shared."""
    memo: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and type(parameter) is not PackedWeight:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                module._parameters[key] = memo.setdefault(id(parameter), empty)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


class PackedWeight(nn.Parameter):
    """Stands for a quantized weight. It is no plain tensor, so the fast kernels do not use it."""


class UnsavedLinear(nn.Linear):
    """Stands for a quantized linear: autograd keeps nothing for x Wᵀ."""

    def forward(self, x: Tensor) -> Tensor:
        return UnsavedProduct.apply(as_autocast(x), self.out_features)


class UnsavedProduct(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, out_features: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(_ctx: Any, _dy: Tensor) -> None:
        raise AssertionError("only the forward pass is counted")


def pack(linear: nn.Linear) -> None:
    """Turn a linear into the stand-in of a quantized one."""
    linear.__class__ = UnsavedLinear
    linear.weight = PackedWeight(torch.empty(0), requires_grad=False)


def quantized_paths(model: Any) -> list[str]:
    """Return the linears that `BASE_DTYPE` int8 or nf4 quantizes."""
    kept = kept_linears(model) + list(model._keep_in_fp32_modules or ())
    return [path for path, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(path, kept)]


def bytes_of(linear: nn.Linear, dtype: str) -> int:
    """Return the bytes of a quantized weight with its scales."""
    count = linear.out_features * linear.in_features
    if dtype == "int8":
        return count + 4 * linear.out_features
    return -(-count // 2) + 4 * -(-count // 64) + 4 * 16


@contextmanager
def fakes_allowed() -> Iterator[None]:
    """Let the fast kernels treat a fake tensor as a plain one."""
    allowed = (*kernels.PLAIN_TENSORS, FakeTensor)
    with ExitStack() as patches:
        for module in (kernels, text_attention, weights):
            patches.enter_context(mock.patch.object(module, "PLAIN_TENSORS", allowed))
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


# ---------------------------------------------------------------- the estimate


def estimate(name: str, dtype: str, batch_size: int = BATCH, precision: str = "") -> dict[str, float]:
    """Return the bytes of a training step: weights, adapters, and activations without and with CHECKPOINTING.

    precision: "" for bf16, and for fp32 if the dtype is fp32.
    """
    family = "blip" if name.startswith("BLIP ") else "blip-2"
    precision = precision or ("fp32" if dtype == "fp32" else "bf16")
    rest = {"blip": "fp32", "blip-2": precision}[family]
    model = skeleton(name, {"fp32": torch.float32, "bf16": torch.bfloat16}[rest]).eval()
    backbone = Backbone(model, sizes.tokenizer_of(family), None, name, torch.device("cpu"), samples={})
    side = model.config.vision_config.image_size
    images = torch.empty(batch_size, 3, side, side)
    batch = CaptionTask(backbone).batch(HostBatch([Example(Path("x.png"), TEXT, "x.png", 1)] * batch_size, images))
    small = quantized_paths(model) if dtype in ("int8", "nf4") else []
    packed = sum(bytes_of(model.get_submodule(path), dtype) for path in small)
    for path in small:
        pack(model.get_submodule(path))
    with fakes_allowed():
        fake(model)
        weights.cast_once(backbone, precision)
        switch.fast(model)
        for site in targets.find(model, MODELS.get(name, "vit"), RANK, 32.0):
            attached.attach(model.get_submodule(site.module), site, 0.0, "default")
        attached.share_routing(model)
        attached.add_fused_hooks(model)
        frozen = preflight.frozen_bytes(model) + packed
        trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
        kept, block = activations(backbone, batch, precision)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: recompute_contexts(model)})
        model.train()
        few, _ = activations(backbone, batch, precision)
    return {
        "weights": frozen, "adapters": 4 * trained, "activations": kept, "checkpointed": few + block,
    }  # fmt: skip


def activations(backbone: Backbone, batch: DeviceBatch, precision: str) -> tuple[int, int]:
    """Return the bytes that autograd keeps for the backward pass, and how many of them one block keeps at most.

    With CHECKPOINTING, a block is computed again in the backward pass, so its bytes exist then.
    """
    kept, largest, handles = preflight.KeptBytes(backbone.model), 0, []
    before: list[int] = []

    def enter(_module: Any, _args: Any) -> None:
        before.append(kept.bytes)

    def leave(_module: Any, _args: Any, _output: Any) -> None:
        nonlocal largest
        largest = max(largest, kept.bytes - before.pop())

    for part in backbone.model.children():
        for block in blocks_of(part):
            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with autocasting(torch.device("cpu"), precision)(), torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        CaptionTask(backbone).loss(batch)
    for handle in handles:
        handle.remove()
    return kept.bytes, largest


# ---------------------------------------------------------------- the page


def row(name: str, dtype: str) -> str:
    """Return a row of the table, in GB."""
    parts = {key: value / GB for key, value in estimate(name, dtype).items()}
    fixed = parts["weights"] + parts["adapters"]
    plain, few = fixed + parts["activations"], fixed + parts["checkpointed"]
    fits = [min((card for card in CARDS if total + OVERHEAD <= card), default=0) for total in (plain, few)]
    cells = [parts["weights"], parts["adapters"], parts["activations"], parts["checkpointed"], plain, few]
    cards = [f"{card} GB" if card else "–" for card in fits]
    return f"| {name} | {dtype} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {' / '.join(cards)} |"


HEAD = """| model | `BASE_DTYPE` | weights | adapters | activations | … checkpointed | total | … checkpointed | smallest GPU |
|---|---|---|---|---|---|---|---|---|"""
START, END = "<!-- table -->\n", "\n<!-- end of the table -->"


def write() -> None:
    """Replace the table of the page."""
    table = "\n".join([HEAD, *(row(name, dtype) for name in MODELS for dtype in DTYPES)])
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(START) + len(START)], page[page.index(END) :]
    PAGE.write_text(before + table + after, encoding="utf-8")
    print(table)


# ---------------------------------------------------------------- measured


def measure(dtype: str, batch_size: int) -> None:
    """Print the estimate for BLIP base, and the memory of a process that takes three steps."""
    with tempfile.TemporaryDirectory() as folder:
        sizes.save(sizes.backbone("base"), Path(folder) / "base")
        command = [sys.executable, "-m", "benchmarks.studies.memory_table", "--step", f"{folder}/base"]
        command += ["--measure", dtype, "--batch-size", str(batch_size)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    meta = estimate("BLIP base", dtype, batch_size, "fp32")
    figures["without a model"] = sum(meta[key] for key in ("weights", "adapters", "activations"))
    for what, value in figures.items():
        print(f"{what:<18}{value / 1e6:>9.1f} MB {value / figures['measured'] - 1:>+7.1%}")


def step(folder: str, dtype: str, batch_size: int) -> None:
    """Print the estimate of the training and the measured memory, as JSON."""
    before = resident("VmRSS")
    backbone = load_backbone(folder, "cpu", dtype)
    injection.inject(backbone.model, "vit", r=RANK)
    task = CaptionTask(backbone)
    side = backbone.image_size
    examples = [Example(Path("x.png"), TEXT, "x.png", 1)] * batch_size
    batch = task.batch(HostBatch(examples, torch.randn(batch_size, 3, side, side)))
    kept = preflight.check_gradients(task, batch)
    trained = sum(p.numel() * 4 for p in backbone.model.parameters() if p.requires_grad)
    expected = preflight.frozen_bytes(backbone.model) + 4 * trained + kept
    optimizer = torch.optim.AdamW([p for p in backbone.model.parameters() if p.requires_grad])
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # set the peak to the memory that is resident now
        (task.loss(batch) / batch.count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"estimate": expected, "measured": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=("fp32", "int8", "nf4"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step, arguments.measure, arguments.batch_size)
    elif arguments.measure:
        measure(arguments.measure, arguments.batch_size)
    else:
        write()


if __name__ == "__main__":
    report_errors(main)
