"""The MLP of a ViT's block, which stores the input of its GELU as an attribute of the output.

The gradient of A of fc2 needs the input of fc2, which is the output of the GELU. Autograd keeps the GELU's input anyway. So
`fused` computes the GELU again instead of keeping its output, a quarter of what a block keeps.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.blip.modeling_blip import BlipMLP
from transformers.models.blip_2.modeling_blip_2 import Blip2MLP

from lora_blip.kernels.linear import GELU_INPUT
from lora_blip.kernels.plain import is_plain


class VitMLP(nn.Module):
    """The part that the MLPs of both ViTs share."""

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
