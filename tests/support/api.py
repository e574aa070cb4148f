"""A folder in which the examples of the API run: the bases, four photos, annotations, and one finished run."""

import json
import shutil
from pathlib import Path

import torch

import lora_blip

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("lora_blip_output", "caption_tiny-blip_vit")


def make_workplace(folder: Path) -> Path:
    """Fill an empty folder and return the path of the run's adapter in it."""
    (folder / "assets").symlink_to(ROOT / "assets")
    for name in ("image_test", "image_train"):
        (folder / name).mkdir()
        for number in range(4):
            shutil.copy(ROOT / name / f"{number:03}.png", folder / name)
    lines = (ROOT / "annotations.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert all((folder / json.loads(line)["image"]).is_file() for line in lines)
    return save_adapter(folder / RUN / "adapter.safetensors")


def save_adapter(path: Path, seed: int = 0, base: str = "assets/tiny-blip", size: float = 0.02, **task: object) -> Path:
    """Save an adapter of a base with updates of its own, as a training would, and return its path."""
    path.parent.mkdir(parents=True)
    backbone = lora_blip.load_backbone(base, "cpu")
    generator = torch.Generator().manual_seed(seed)
    for lora in lora_blip.inject(backbone, "vit").values():
        lora.A.data.copy_(torch.randn(lora.A.shape, generator=generator) * 0.1)
        lora.B.data.copy_(torch.randn(lora.B.shape, generator=generator) * size)
    return lora_blip.save_adapter(path, backbone, task={"name": "caption", "prompt": "", "generation": {}} | task)
