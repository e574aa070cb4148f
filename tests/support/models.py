"""Tiny backbones with adapters, batches, and what they compute."""

from collections.abc import Callable
from pathlib import Path

import torch

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.lora import injection, targets
from lora_blip.lora.layer import LoRA
from lora_blip.lora.variants import DoRA
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import autocasting
from lora_blip.tasks.caption import CaptionTask
from tests.support import tiny

KINDS = ("blip", "opt", "t5")  # that caption


WHOLE = {  # every part that can be targeted
    "blip": "vit,text", "opt": "vit,qformer,lm", "t5": "vit,qformer,lm",
    "vqa": "vit,text", "itm": "vit,text", "itm2": "vit,qformer",
}  # fmt: skip


def kind_of(backbone: Backbone) -> str:
    return Path(backbone.name).name


def inject(
    backbone: Backbone, what: str = "", r: int = 4, alpha: float = 8.0, trained: bool = True, name: str = "default",
    variant: str = "lora",
):  # fmt: skip
    """Adapters on every part (or on `what`); `trained` gives each B values that matter."""
    torch.manual_seed(11)
    loras = injection.inject(
        backbone.model, targets.find(backbone.model, what or WHOLE[kind_of(backbone)], r, alpha, variant), name=name
    )
    if trained:
        generator = torch.Generator().manual_seed(7)
        for x in loras.values():
            x.B.data.copy_(0.05 * torch.randn(x.B.shape, generator=generator))
            if isinstance(x, DoRA):
                x.magnitude.data *= 1 + 0.1 * torch.randn(x.magnitude.shape, generator=generator)
    return loras


def every_target(model: torch.nn.Module, kind: str) -> list[str]:
    """WHOLE, which holds the linears of every preset, and all the row blocks of fused ones."""
    presets = {name: targets._sites(model, targets.parse(name, 2, 4.0)) for name in targets.PRESETS}
    whole = {site.module for site in targets.find(model, WHOLE[kind])}
    assert whole == {site.module for sites in presets.values() for site in sites}
    return [WHOLE[kind], "vit.q,vit.k,vit.v"]


TEXTS = ["a red cube", "a single blue cube on top of the table", "nothing"]


def batch_of(task: CaptionTask, texts: list[str] | None = None, seed: int = 3) -> DeviceBatch:
    """Random images with uneven captions."""
    texts = texts or TEXTS
    images = torch.randn(len(texts), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))
    return task.batch(HostBatch([Example(Path("x.png"), text, "x.png", 1) for text in texts], images))


def twenty_steps(
    loras: dict[str, LoRA], loss_of: Callable[[], torch.Tensor], precision: str = "fp32", rate: float = 1e-3
) -> list[float]:
    """The loss before each of twenty steps of AdamW on the adapters, on the CPU."""
    optimizer, losses = torch.optim.AdamW([half for x in loras.values() for half in (x.A, x.B)], lr=rate), []
    for _ in range(20):
        with autocasting(torch.device("cpu"), precision)():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(backbone: Backbone) -> torch.Tensor:
    task = CaptionTask(backbone)
    return task.logits(batch_of(task))


WHERE = {  # what each adapter reaches: some share linears, some share a row block, some sit on parts of their own
    "blip": {"caption": "vit.q,vit.v,text", "vqa": "vit", "third": "vit.q,text"},
    "opt": {"caption": "vit.q,qformer", "vqa": "vit,lm", "third": "qformer,lm"},
    "t5": {"caption": "vit.q,qformer", "vqa": "vit,lm", "third": "qformer,lm"},
}


EACH = ["vqa", None, "caption", "third", "vqa"]


PROMPTS = ["a picture of", "", "a picture of", "a photo of a red cube", ""]  # ragged: three lengths


def carry(backbone: Backbone, dropout: float = 0.0) -> Backbone:
    """Three adapters with updates of their own, large enough to change what is said."""
    for seed, (name, where) in enumerate(WHERE[kind_of(backbone)].items()):
        loras = injection.inject(backbone.model, targets.find(backbone.model, where, 4, 8.0), dropout, name)
        generator = torch.Generator().manual_seed(seed)
        for x in loras.values():
            x.A.data.copy_(torch.randn(x.A.shape, generator=generator) * 0.2)
            x.B.data.copy_(torch.randn(x.B.shape, generator=generator) * 0.1)
    return backbone
