"""Random draws of generation that depend on the seed, the image and the prompt of a row, and on nothing else.

transformers draws the tokens of all rows from one generator, so a text depends on the other rows of its batch. Inside
`RowSampling`, each row has its own generator. transformers computes the probabilities as before, with temperature, top-k
and the other options.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationMixin

from lora_blip.errors import ModelError
from lora_blip.kernels.signatures import version_of

RESOLUTION = 2**32  # a draw is a multiple of 1/RESOLUTION, so that rounding cannot make it 1


def image_keys(pixel_values: Tensor) -> list[str]:
    """Return a digest of the pixels of each image (images, 3, H, W)."""
    pictures = pixel_values.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest() for picture in pictures]


class RowSampling(TorchFunctionMode):
    """Replace torch.multinomial in this thread, inside the block: row i of a batch draws from its own generator.

    keys: the image and the prompt of each row. copies: the number of texts for each row; each copy has its own draws.
    After the block, raise ModelError if nothing was drawn: then this version of transformers samples in another way.
    """

    def __init__(self, seed: int, keys: Sequence[tuple[str, str]], copies: int = 1) -> None:
        super().__init__()
        self.generators = [
            np.random.Generator(np.random.Philox(key=_number_of(seed, *key, copy))) for key in keys for copy in range(copies)
        ]
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.multinomial:
            return self.draw(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.draws and error[0] is None:
            raise ModelError(
                f"{version_of(GenerationMixin)} samples in a way that lora_blip does not know; set do_sample = false, or "
                "install a version that lora_blip is tested with: pip install 'transformers>=5.20,<5.25'"
            )

    def draw(self, probabilities: Tensor, num_samples: int) -> Tensor:
        """Return ids (rows, num_samples), drawn without replacement from probabilities (rows, ids), like torch.multinomial."""
        self.draws += 1
        integers = [generator.integers(RESOLUTION, size=num_samples) for generator in self.generators]
        uniform = torch.from_numpy(np.stack(integers) / RESOLUTION)
        drawn = inverse_cdf(probabilities.to("cpu" if probabilities.device.type == "mps" else None, torch.float64), uniform)
        return drawn.to(probabilities.device)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return ids (rows, samples) drawn without replacement.

    For each number in `uniform`, the id is the first whose cumulative weight exceeds number · total.

    weights: (rows, ids), float64. uniform: (rows, samples), from 0 to below 1. If only weights of 0 are left, the first of
    them is taken. Raise ModelError for a row without a finite sum.
    """
    left, drawn = weights.clone(), list[Tensor]()
    for number in uniform.to(weights.device).split(1, dim=1):  # (rows, 1)
        cumulative = left.cumsum(-1)
        total = cumulative[:, -1:]
        if not drawn and not (total.isfinite() & (total > 0)).all():
            raise ModelError("the probabilities of the next token are not finite; set PRECISION (--precision) to bf16 or fp32")
        ids = torch.searchsorted(cumulative, number * total, right=True)
        first_left = (left == 0).scatter(1, torch.cat(drawn, 1), value=False) if drawn else left == 0
        ids = torch.where(total > 0, ids, first_left.int().argmax(-1, keepdim=True))
        drawn.append(ids)
        left = left.scatter(1, ids, 0.0)
    return torch.cat(drawn, 1)


def _number_of(seed: int, image: str, prompt: str, copy: int) -> int:
    text = f"{seed}\0{image}\0{prompt}\0{copy}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
