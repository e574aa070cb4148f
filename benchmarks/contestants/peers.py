"""The other contestants: peft in a hand-written loop, full fine-tuning, LoRA by replaced modules, and a step without adapters.

Unless the name says otherwise, all read the same token ids in the same precision, and use the same clipping and fused AdamW.
"""

import warnings
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.suite.plan import ALPHA, RATE, R
from benchmarks.suite.work import Work
from lora_blip.kernels.linear import product
from lora_blip.lora import targets
from lora_blip.lora.sites import Site
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import DTYPES, autocasting

IGNORE = -100
Inputs = dict[str, Tensor]


class Training:
    """A model, its trained parameters, and the usual training step."""

    def __init__(self, model: Any, inputs: Inputs, precision: str, adam: bool = True) -> None:
        self.model, self.inputs = model, inputs
        device = inputs["pixel_values"].device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.autocast = autocasting(device, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.01, fused=True) if adam else None
        model.train()

    def compile(self, **options: Any) -> None:
        self.model.compile(**options)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.model(**self.inputs).loss

    def step(self) -> None:
        self.scaler.scale(self.forward()).backward()
        if self.optimizer is None:
            return
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- inputs, as the Hugging Face documentation makes them


def rows_of(backbone: Backbone, texts: list[str], longest: int = 0) -> Inputs:
    """Return ids, mask and labels (rows, tokens), padded to the longest row or to `longest`. Padding is not in the loss."""
    tokenizer, config = backbone.tokenizer, backbone.model.config
    if backbone.family != "blip" and not config.use_decoder_only_language_model:
        return encoder_rows(backbone, texts)
    if backbone.family == "blip":
        start, end = [config.text_config.bos_token_id], config.text_config.sep_token_id
    else:
        start = [config.image_token_index] * config.num_query_tokens + [config.text_config.bos_token_id]
        end = config.text_config.eos_token_id
    rows = [[*start, *tokenizer(text, add_special_tokens=False).input_ids, end] for text in texts]
    width = max(longest, *map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    ids = torch.tensor([row + [config.text_config.pad_token_id] * (width - len(row)) for row in rows])
    silent = (mask == 0) | (torch.arange(width) < len(start))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(silent, IGNORE)}


def encoder_rows(backbone: Backbone, texts: list[str]) -> Inputs:
    """Return the input of a T5's encoder, which is the image and the end token, and labels padded to the longest text."""
    config, tokenize = backbone.model.config, partial(backbone.tokenizer, add_special_tokens=False)
    end = config.text_config.eos_token_id
    rows = [[*tokenize(text).input_ids, end] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[config.image_token_index] * config.num_query_tokens + [end]] * len(texts))
    labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def inputs_of(backbone: Backbone, work: Work, longest: int = 0) -> Inputs:
    """Return a row for each caption, with its image repeated."""
    texts = [text for texts in work.texts for text in texts]
    rows = {key: value.to(backbone.device) for key, value in rows_of(backbone, texts, longest).items()}
    image = [number for number, texts in enumerate(work.texts) for _ in texts]
    return {"pixel_values": work.pixel_values[image], **rows}


# ---------------------------------------------------------------- what is trained


def sites(backbone: Backbone, where: str = "vit") -> list[Site]:
    return targets.find(backbone.model, where, R, ALPHA)


def with_peft(backbone: Backbone, where: str = "vit", r: int = R, alpha: float = ALPHA, dora: bool = False) -> Any:
    """Return peft's model with adapters on the same linears. peft always adapts a whole fused linear."""
    modules = sorted({site.module for site in sites(backbone, where)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised in transformers by calls of peft
        config = peft.LoraConfig(r=r, lora_alpha=int(alpha), target_modules=modules, use_dora=dora)
        return peft.get_peft_model(backbone.model, config)


def peft_loop(
    backbone: Backbone, work: Work, precision: str, where: str = "vit", r: int = R, compiled: bool = False, dora: bool = False
) -> Training:
    model = with_peft(backbone, where, r, dora=dora).base_model.model
    if compiled:
        model.compile()
    return Training(model, inputs_of(backbone, work), precision)


def full(backbone: Backbone, work: Work, precision: str) -> Training:
    backbone.model.requires_grad_(True)
    return Training(backbone.model, inputs_of(backbone, work), precision)


def floor(backbone: Backbone, work: Work, precision: str) -> Training:
    """Return a step without adapters: forward, and backward to the input of the ViT's first block, which any training needs."""
    backbone.model.vision_model.embeddings.register_forward_hook(as_leaf)
    return Training(backbone.model, inputs_of(backbone, work), precision, adam=False)


def as_leaf(_embeddings: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


class Products:
    """Only the frozen products that each LoRA needs: x Wᵀ, and dy W if a gradient continues to x. Uses the fastest kernels."""

    def __init__(self, backbone: Backbone, work: Work, precision: str) -> None:
        plain = floor(backbone, work, precision)
        dtype = DTYPES[precision]
        self.products: list[tuple[Tensor, Tensor, Tensor | None]] = []  # x, W, and dy if the gradient continues to x

        def note(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, dy = args[0].detach().flatten(0, -2).to(dtype), output.detach().flatten(0, -2).to(dtype)
            self.products.append((x, linear.weight.detach().to(dtype), dy if args[0].requires_grad else None))

        handles = [m.register_forward_hook(note) for m in backbone.model.modules() if isinstance(m, nn.Linear)]
        plain.forward()
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def step(self) -> None:
        for x, weight, dy in self.products:
            product(x, weight)
            if dy is not None:
                product(dy, weight.t())


class Replaced(nn.Module):
    """A module that replaces a linear by the linear and LoRA, as most tutorials write it."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.A = nn.Parameter(torch.randn(R, linear.in_features, device=device) / R)
        self.B = nn.Parameter(torch.zeros(linear.out_features, R, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.A.T @ self.B.T) * (ALPHA / R)


def handmade(backbone: Backbone, work: Work) -> Training:
    """Return a training with replaced modules, texts padded to 512 tokens, and fp32."""
    for site in sites(backbone):
        parent, _, name = site.module.rpartition(".")
        owner = backbone.model.get_submodule(parent)
        setattr(owner, name, Replaced(getattr(owner, name)))
    return Training(backbone.model, inputs_of(backbone, work, longest=512), "fp32")


# ---------------------------------------------------------------- inference


def has_static_cache(backbone: Backbone) -> bool:
    """Return whether transformers supports a static cache for a model. For BLIP, it raises an error during generation."""
    return bool(backbone.model._can_compile_fullgraph)


@torch.no_grad()
def generate(
    backbone: Backbone, pixel_values: Tensor, beams: int, tokens: int, precision: str = "fp32", static: bool = False
) -> Tensor:
    """Generate captions of a fixed length with transformers' own `generate`.

    static: with a cache of a fixed size. On a GPU, transformers then compiles the decoder in the first call.
    """
    settings: dict[str, Any] = {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    if backbone.family == "blip-2":
        start = rows_of(backbone, [""] * len(pixel_values))["input_ids"][:, :-1].to(backbone.device)
        settings |= {"input_ids": start, "attention_mask": torch.ones_like(start)}
    if static:
        settings["cache_implementation"] = "static"
    with autocasting(backbone.device, precision)():
        return backbone.model.generate(pixel_values=pixel_values, **settings)


def adapt(backbone: Backbone) -> Any:
    """Return peft's model with adapters whose B is not zero. The linears of the backbone are replaced in place."""
    model = with_peft(backbone)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def save_adapter(backbone: Backbone, folder: str) -> str:
    model = adapt(backbone)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load_and_merge(backbone: Backbone, folder: str) -> None:
    peft.PeftModel.from_pretrained(backbone.model, folder).merge_and_unload()
