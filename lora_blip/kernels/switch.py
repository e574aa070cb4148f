"""Switch a model to attention, MLPs and linears that are faster or use less memory than transformers' own."""

from torch import nn
from transformers.models.blip.modeling_blip import BlipAttention, BlipMLP
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2MLP

from lora_blip.kernels.linear import QuickLinear
from lora_blip.kernels.signatures import fits_library
from lora_blip.kernels.text_attention import TextAttention
from lora_blip.kernels.vit import Blip2VitAttention, Blip2VitMLP, BlipVitAttention, BlipVitMLP

KINDS: dict[type[nn.Module], type[nn.Module]] = {
    BlipAttention: BlipVitAttention, Blip2Attention: Blip2VitAttention, BlipTextSelfAttention: TextAttention,
    BlipMLP: BlipVitMLP, Blip2MLP: Blip2VitMLP, nn.Linear: QuickLinear,
}  # fmt: skip


def fast(model: nn.Module, on: bool = True) -> None:
    """Switch the attentions, MLPs and linears of a model to their fast classes, or back. Repeating a call changes nothing.

    Only the class of a module changes. Its weights, hooks and name stay the same, also in copies and pickles. If a fast
    class was not written for the installed library, its modules are not changed, and this is printed once.
    """
    change = KINDS if on else {quick: plain for plain, quick in KINDS.items()}
    by_kind: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        if type(module) in change:
            by_kind.setdefault(type(module), []).append(module)
    for kind, modules in by_kind.items():
        if not on or fits_library(change[kind], kind):
            for module in modules:
                module.__class__ = change[kind]
