"""The attention and the MLP of a ViT's block, with less memory in training.

Attention: 577 × 577 scores for each head are most of the memory of a step, and transformers' BLIP stores every score three
times for the backward pass. `attend` stores none. Large attentions of 16-bit tensors on a CPU use `by_heads`: it stores the
probabilities once, and computes few heads at a time, so that their scores stay in the processor's cache.

MLP: if fc2 has an adapter, the gradient of its A needs the input of fc2, which is the output of the GELU. Autograd keeps the
input of the GELU in any case. So `fused` does not keep the output: the backward pass computes the GELU again. This saves a
quarter of the memory of a block.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.blip.modeling_blip import BlipAttention, BlipMLP
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2MLP

from lora_blip.kernels.linear import GELU_INPUT
from lora_blip.kernels.paths import row
from lora_blip.kernels.plain import is_plain, needs_library
from lora_blip.kernels.sdpa import attend, is_16bit_on_cpu


class VitAttention(nn.Module):
    """The part that the attentions of both ViTs share. The second output, the probabilities, is None.

    A call that needs the probabilities, or has an unknown argument, runs transformers' own method.
    """

    WRITTEN_FOR = ("(self, hidden_states, **kwargs)",)
    UNUSED = ("output_attentions", "output_hidden_states", "return_dict")  # arguments that a model passes down; no effect here

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Return (output, None), the output with the shape of hidden_states (images, states, width)."""
        model: Any = self
        uses_dropout = self.training and self.has_dropout  # load_backbone sets the dropout to 0
        if uses_dropout or needs_library(kwargs, *self.UNUSED):
            return super().forward(hidden_states, **kwargs)
        qkv = model.qkv(hidden_states)  # (images, states, 3 · width)
        large = len(qkv) * model.num_heads * qkv.shape[1] ** 2 >= row().by_heads and is_16bit_on_cpu(qkv)
        return model.projection((by_heads if large else attend_at_once)(qkv, model.num_heads)), None

    @property
    def has_dropout(self) -> bool:
        """Return True if the attention has dropout."""
        raise NotImplementedError


class BlipVitAttention(VitAttention, BlipAttention):
    @property
    def has_dropout(self) -> bool:
        return self.dropout.p > 0


class Blip2VitAttention(VitAttention, Blip2Attention):
    @property
    def has_dropout(self) -> bool:
        return self.attention_dropout > 0


class VitMLP(nn.Module):
    """The part that the MLPs of both ViTs share. It stores the input of the GELU as an attribute of the GELU's output."""

    WRITTEN_FOR = ("(self, hidden_states)",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the output of the MLP, with the shape of hidden_states (images, states, width)."""
        if is_plain():
            return super().forward(hidden_states)
        model: Any = self
        gelu = model.activation_fn
        before = model.fc1(hidden_states)
        after = gelu(before)
        hooked = gelu._forward_hooks or gelu._forward_pre_hooks
        if type(gelu) is GELUActivation and gelu.act is nn.functional.gelu and not hooked:
            setattr(after, GELU_INPUT, before)
        return model.fc2(after)


class BlipVitMLP(VitMLP, BlipMLP):
    pass


class Blip2VitMLP(VitMLP, Blip2MLP):
    pass


def attend_at_once(qkv: Tensor, heads: int) -> Tensor:
    """Return softmax(q kᵀ / √d) v of each head, (images, states, width), for qkv (images, states, 3 · width)."""
    return attend(*split_qkv(qkv, heads).unbind(0)).transpose(1, 2).flatten(2)


def split_qkv(qkv: Tensor, heads: int) -> Tensor:
    """Return qkv (images, states, 3 · width) as a view (3, images, heads, states, width / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def by_heads(qkv: Tensor, heads: int) -> Tensor:
    """Return the same as `attend_at_once`. Compute as many heads at a time as there are threads: their scores fit the cache.

    The probabilities are kept once, in 16 bits. This is a custom operator: torch.compile calls it without tracing it.
    """
    return by_heads_forward(qkv, heads, torch.is_grad_enabled() and qkv.requires_grad)[0]


@torch.library.custom_op("lora_blip::by_heads", mutates_args=())
def by_heads_forward(qkv: Tensor, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the attention (images, states, width), and if `keep` the probabilities (images, heads, states, states)."""
    (q, k, v), context = scaled(qkv, heads), qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    out = context.unflatten(-1, (heads, -1)).transpose(1, 2)  # (images, heads, states, d)
    kept = q.new_empty(*q.shape[:3], q.shape[2]) if keep else q.new_empty(0)
    with torch.autocast("cpu", enabled=False):
        for part in parts(q):
            p = torch.softmax(q[part] @ k[part].transpose(1, 2), -1, out=kept[part] if keep else None)
            out[part] = p @ v[part]
    return context, kept


@torch.library.custom_op("lora_blip::by_heads_backward", mutates_args=())
def by_heads_backward(d_context: Tensor, qkv: Tensor, kept: Tensor, heads: int) -> Tensor:
    """Return the gradient of qkv. kept: the probabilities (images, heads, states, states) of the forward pass."""
    q, k, v = scaled(qkv, heads)
    d_out = d_context.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
    d_qkv = torch.empty_like(qkv)
    dq, dk, dv = split_qkv(d_qkv, heads).unbind(0)
    for part in parts(q):
        p = kept[part]
        dv[part] = (d_out[part].transpose(1, 2) @ p).transpose(1, 2)  # transposes the small factor
        ds = torch._softmax_backward_data(d_out[part] @ v[part].transpose(1, 2), p, -1, p.dtype)
        dk[part] = (q[part].transpose(1, 2) @ ds).transpose(1, 2)
        dq[part] = ds @ k[part]
    dq *= q.shape[-1] ** -0.5
    return d_qkv


@by_heads_forward.register_fake
def _(qkv: Tensor, heads: int, keep: bool) -> tuple[Tensor, Tensor]:
    images, states, width = qkv.shape
    return qkv.new_empty(images, states, width // 3), qkv.new_empty((images, heads, states, states) if keep else 0)


@by_heads_backward.register_fake
def _(d_context: Tensor, qkv: Tensor, kept: Tensor, heads: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(qkv)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # otherwise autograd creates zeros as the gradient of the probabilities
    ctx.save_for_backward(inputs[0], output[1])
    ctx.heads = inputs[1]


def _gradient(ctx: Any, d_context: Tensor | None, _d_kept: None) -> tuple[Tensor | None, None, None]:
    return None if d_context is None else by_heads_backward(d_context, *ctx.saved_tensors, ctx.heads), None, None


by_heads_forward.register_autograd(_gradient, setup_context=_save_for_backward)


def scaled(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q / √d, k and v, each (images, heads, states, d) and contiguous."""
    q, k, v = split_qkv(qkv, heads).unbind(0)
    return (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous()


def parts(q: Tensor) -> list[tuple[int, slice]]:
    """Return the parts that are computed one after another, as (image, slice of heads)."""
    images, heads = q.shape[:2]
    size = min(heads, torch.get_num_threads())
    return [(image, slice(first, first + size)) for image in range(images) for first in range(0, heads, size)]
