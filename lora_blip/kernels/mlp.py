"""The MLP of a ViT's block, which remembers what its activation was made of.

fc2 needs its input again for the gradient of its A. That is the activation of what fc1 returned, which autograd keeps
in any case: `fused` computes it again, and a quarter of what a block remembers need not be kept.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.blip.modeling_blip import BlipMLP
from transformers.models.blip_2.modeling_blip_2 import Blip2MLP

from lora_blip.kernels.linear import GELU_INPUT
from lora_blip.kernels.plain import is_plain


class VitMLP(nn.Module):
    WRITTEN_FOR = ("(self, hidden_states)",)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(images, states, width) → the same shape."""
        if is_plain():
            return super().forward(hidden_states)
        model: Any = self
        before = model.fc1(hidden_states)
        after = model.activation_fn(before)
        gelu = model.activation_fn
        hooked = gelu._forward_hooks or gelu._forward_pre_hooks
        if type(gelu) is GELUActivation and gelu.act is nn.functional.gelu and not hooked:
            setattr(after, GELU_INPUT, before)
        return model.fc2(after)


class BlipVitMLP(VitMLP, BlipMLP):
    pass


class Blip2VitMLP(VitMLP, Blip2MLP):
    pass
