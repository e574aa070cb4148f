"""Test that evaluation images in the training data are found after usual changes of files, and other images are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_blip.data import leaks
from lora_blip.data.images import open_image
from lora_blip.data.leaks import NEARLY, SAME_BYTES, Leak, find_leaks
from lora_blip.errors import ImageError

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = sorted((ROOT / "image_train").glob("*.png")), sorted((ROOT / "image_test").glob("*.png"))


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)


def lit(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.point([min(255, round(level * factor)) for level in range(256)] * 3)


CHANGES = {
    "jpeg": (lambda image: image, ".jpg"),
    "half": (halved, ".png"),
    "brighter": (lit(1.1), ".png"),
    "darker": (lit(0.9), ".webp"),
    "all": (lambda image: halved(lit(1.1)(image)), ".jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_named(tmp_path, change):
    """After JPEG quality 70, half the size, 10 % more light, or all three, each of 62 images matches its original of 300."""
    alter, suffix = CHANGES[change]
    originals = [*TRAIN[::5], TRAIN[41], TRAIN[107]]
    copies = [tmp_path / f"{path.stem}{suffix}" for path in originals]
    for path, copy in zip(originals, copies, strict=True):
        alter(open_image(path)).save(copy, **({"quality": 70} if suffix == ".jpg" else {}))
    assert find_leaks(copies, TRAIN) == [Leak(copy, path, NEARLY) for path, copy in zip(originals, copies, strict=True)]


def test_the_shipped_test_images_are_not_in_training():
    """In 48,000 pairs of flat, synthetic pictures with few colours, no pair matches."""
    assert len(TRAIN) == 300 and len(TEST) == 160
    assert find_leaks(TEST, TRAIN) == []


def test_the_same_bytes_and_nearly_the_same_picture_are_distinguished(tmp_path):
    for name in ("copy.png", "another copy.png"):
        shutil.copy(TEST[0], tmp_path / name)
    open_image(TEST[1]).save(tmp_path / "again.png", compress_level=1)
    known = [*TRAIN, *(tmp_path / name for name in ("again.png", "copy.png", "another copy.png"))]
    matches = find_leaks([TEST[2], TEST[0], str(TEST[1]), TEST[0]], known)
    assert matches == [Leak(TEST[0], tmp_path / "copy.png", SAME_BYTES), Leak(TEST[1], tmp_path / "again.png", NEARLY)]
    assert str(matches[0]) == f"{TEST[0]}: same bytes as {tmp_path / 'copy.png'}"


def noise(seed: int, low: float = 0, high: float = 255, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (side, side, 3))


def written(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def test_other_colours_other_light_and_a_mirror_are_other_pictures(tmp_path):
    """A pattern in other channels, far darker, with a third of the contrast, or mirrored, does not match."""
    pixels = noise(0)
    original = written(tmp_path / "original.png", pixels)
    others = [pixels[..., ::-1], pixels * 0.4, 127 + (pixels - 127) / 3, pixels[:, ::-1], pixels.transpose(1, 0, 2), noise(1)]
    paths = [written(tmp_path / f"{place}.png", other) for place, other in enumerate(others)]
    assert find_leaks(paths, [original]) == []
    assert find_leaks([written(tmp_path / "grain.png", pixels + noise(2, -6, 6))], [original])


def test_flat_pictures_match_if_their_colours_are_similar(tmp_path):
    flat = written(tmp_path / "flat.png", np.full((20, 20, 3), (90, 120, 150)))
    near = written(tmp_path / "near.png", np.full((40, 30, 3), (92, 119, 150)) + noise(3, -1, 1, 20).mean())
    far = written(tmp_path / "far.png", np.full((20, 20, 3), (150, 120, 90)))
    assert find_leaks([near, far], [flat]) == [Leak(near, flat, NEARLY)]


def test_the_most_alike_of_several_is_named(tmp_path):
    pixels = noise(4)
    known = [written(tmp_path / f"{grain}.png", pixels + noise(5, -grain, grain)) for grain in (12, 2, 8)]
    asked = written(tmp_path / "asked.png", pixels)
    assert find_leaks([asked], known) == [Leak(asked, known[1], NEARLY)]


def test_the_block_size_does_not_change_the_result(monkeypatch):
    """In blocks of 7, the result equals the definition, computed pair by pair, on similar thumbnails."""
    rng = np.random.default_rng(6)
    centres = rng.uniform(40, 215, (12, leaks.SIDE, leaks.SIDE, 3))
    pictures = [
        (centres[k % 12] + rng.normal(0, rng.choice((1, 12, 40)), centres[0].shape)).astype(np.float32) for k in range(60)
    ]
    asked, known = pictures[:25], pictures[25:]
    monkeypatch.setattr(leaks, "BLOCK", 7)
    matches = leaks.nearest(leaks.thumbnails(asked), leaks.thumbnails(known))
    expected = [max(range(35), key=lambda k: likeness(one, known[k])) for one in asked]
    assert matches.tolist() == [k if likeness(one, known[k]) > 0 else -1 for one, k in zip(asked, expected, strict=True)]
    assert -1 in matches and (matches >= 0).any()


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Return p·q + GRAIN² / (s t) if it is at least 1 − FAR and contrast and light match, otherwise 0."""
    p, q = (part.astype(np.float64) - part.mean((0, 1), dtype=np.float64) for part in (one, other))
    s, t = p.std(), q.std()
    similarity = (p * q).mean() / (s * t) + leaks.GRAIN**2 / (s * t)
    light = np.abs(one.mean((0, 1)) - other.mean((0, 1))).max()
    low, high = sorted((s + leaks.GRAIN, t + leaks.GRAIN))
    return similarity if similarity >= 1 - leaks.FAR and light <= leaks.LIGHT and low / high >= leaks.CONTRAST else 0.0


def test_an_image_that_cannot_be_decoded_is_compared_by_its_bytes(tmp_path):
    broken = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path, content in zip(broken, (b"no image", b"no image", b"none either"), strict=True):
        path.write_bytes(content)
    assert find_leaks(broken[:1] + TEST[:1], broken[1:]) == [Leak(broken[0], broken[1], SAME_BYTES)]
    assert find_leaks(broken[:1], broken[2:]) == []
    with pytest.raises(ImageError, match=r"missing\.png cannot be read"):
        find_leaks([tmp_path / "missing.png"], TEST[:1])


def test_empty_lists_have_no_leaks():
    assert find_leaks([], TRAIN[:1]) == find_leaks(TEST[:1], []) == []


def test_many_images_are_compared_in_bounded_memory(monkeypatch):
    """At most BLOCK rows are compared at a time. Each of 3,000 thumbnails matches itself."""
    rng = np.random.default_rng(7)
    pictures = leaks.thumbnails(list(rng.uniform(0, 255, (3000, leaks.SIDE, leaks.SIDE, 3)).astype(np.float32)))
    rows = []
    monkeypatch.setattr(leaks, "_alike", lambda one, *rest, real=leaks._alike: rows.append(len(one.light)) or real(one, *rest))
    assert (leaks.nearest(pictures, pictures) == np.arange(3000)).all()
    assert max(rows) == leaks.BLOCK
