"""Variants of LoRA. Each is a class, and differs from `layer.LoRA` in a few lines.

    lora      ΔW = (alpha / r) · B A      Hu et al. 2021, arXiv:2106.09685
    rslora    ΔW = (alpha / √r) · B A     Kalajdzievski 2023, arXiv:2312.03732

LoRA+ (arXiv:2402.12354) is no class: it is the setting LR_RATIO, a higher learning rate of B.
"""

from typing import Any

from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site


class RsLoRA(LoRA):
    """Rank-stabilized LoRA: ΔW = (alpha / √r) · B A, so that the size of ΔW does not shrink as r grows (theorem 3.2)."""

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None) -> None:
        super().__init__(site, in_features, out_features, dropout, device)
        self.scale = site.scale


CLASSES: dict[str, type[LoRA]] = {"lora": LoRA, "rslora": RsLoRA}  # the keys are those of `setting_checks.VARIANTS`
FUSED = (LoRA, RsLoRA)  # classes whose update `fused` can compute: s · B A x with a number s
