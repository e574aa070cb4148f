"""Digests of a base: of its weights, and of its processing of images and texts.

Different digests mean different weights. Equal digests mean equal weights, unless values were exchanged on purpose: the digest
of a large tensor contains samples, and the XOR of all values.
"""

import hashlib
import json

import torch
from torch import nn

from lora_blip.lora.fingerprint import digest_of, settings_of
from lora_blip.models.loading import Backbone
from lora_blip.models.quantized import quantized_linears, scales_of

SAMPLES = 16  # sampled values of each weight, evenly spaced


def processors_digest(backbone: Backbone) -> str:
    """Return the SHA-256 of the image processor's settings, the vocabulary and the model's config."""
    pieces = [
        settings_of(backbone.model.config),
        settings_of(backbone.image_processor),
        backbone.tokenizer.get_vocab(),
    ]
    return digest_of(pieces)


def weights_digest(model: nn.Module) -> str:
    """Return a SHA-256 of the frozen parameters: names, shapes, dtypes, SAMPLES values, and the XOR of all values.

    The scales of quantized parameters are included.
    """
    digest = hashlib.sha256()
    frozen: list[tuple[str, torch.Tensor]] = [
        (name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]
    for path, linear in quantized_linears(model).items():
        frozen += [(f"{path}.{number}", scales) for number, scales in enumerate(scales_of(linear))]
    for name, parameter in frozen:
        flat = parameter.detach().flatten()
        positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[positions.to(flat.device)].double().tolist()
        whole = torch.hash_tensor(flat.cpu() if flat.device.type == "mps" else flat).tolist() if len(flat) else 0
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype), values, whole]).encode())
    return digest.hexdigest()
