"""Counting intruder dimensions without complete SVDs has the result of the complete SVDs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_blip.lora import intruders, spectrum
from lora_blip.lora.intruders import count_intruders, largest_share

SHAPES = {"tall": (400, 280), "wide": (280, 400), "square": (272, 272)}  # each side is above intruders.SMALL


def weight(shape: tuple[int, int], kind: str, seed: int = 0) -> Tensor:
    """Return random weights: with a flat spectrum, as at initialization, or with a decaying one, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(shape, generator=generator)
    if kind == "flat":
        return W
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U * (S.max() * torch.arange(1, len(S) + 1) ** -0.6) @ V


def update(shape: tuple[int, int], size: float, r: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.03 * torch.randn(r, shape[1], generator=generator), size * torch.randn(shape[0], r, generator=generator)


def by_numpy(W: Tensor, delta: Tensor, k: int = 10, epsilon: float = 0.5) -> int:
    before = np.linalg.svd(W.double().numpy(), full_matrices=False)[0]
    after = np.linalg.svd((W.double() + delta.double()).numpy(), full_matrices=False)[0]
    return int((np.abs(after[:, :k].T @ before).max(1) < epsilon).sum())


@pytest.mark.parametrize("kind", ["flat", "decaying"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_number_is_that_of_numpy(shape: tuple[int, int], kind: str) -> None:
    """From an update that changes nearly nothing to one that is stronger than W. All sizes together have 0 and 8 intruders."""
    W, counted = weight(shape, kind), []
    for size in (1e-5, 1e-3, 4e-3, 1e-2, 0.05, 0.3):
        A, B = update(shape, size)
        counted.append(count_intruders(W, A, B, 4.0))
        assert counted[-1] == by_numpy(W, 4.0 * B @ A), size
    assert counted[0] == 0 and counted[-1] == 8


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_clear_cases_need_no_complete_svd(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    def refuse(*_: object) -> int:
        raise AssertionError("a complete SVD")

    monkeypatch.setattr(intruders, "intruder_dimensions", refuse)
    W = weight(shape, "decaying")
    assert count_intruders(W, *update(shape, 1e-4)) == 0
    assert count_intruders(W, *update(shape, 0.1)) == 8
    assert count_intruders(W.bfloat16(), *update(shape, 0.1)) == 8
    assert count_intruders(W, *update(shape, 0.0)) == 0


def test_unclear_cases_are_decided_by_the_complete_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A W with equal singular values, a value near epsilon, more vectors than a block, and a W of zeros."""
    calls = []
    real = spectrum.intruder_dimensions
    monkeypatch.setattr(intruders, "intruder_dimensions", lambda *args: (calls.append(args), real(*args))[1])
    shape = SHAPES["square"]
    A, B = update(shape, 0.05)
    for W in (torch.eye(shape[0]), torch.zeros(shape)):  # their singular vectors are not unique, and numpy returns others
        assert count_intruders(W, A, B) == real(W, B.double() @ A.double())
    assert len(calls) == 2
    W = weight(shape, "decaying")
    cosine = float(spectrum.closest_cosines(W, B @ A)[0])
    for epsilon in (cosine - 1e-3, cosine + 1e-3):
        assert count_intruders(W, A, B, 1.0, 10, epsilon) == by_numpy(W, B @ A, epsilon=epsilon)
    assert len(calls) == 4
    assert count_intruders(W, A, B, 1.0, 40) == by_numpy(W, B @ A, 40)
    assert len(calls) == 5


def test_a_vector_close_to_a_weak_direction_is_no_intruder() -> None:
    """The update makes the weakest direction of W the strongest. The bound cannot exclude W's own weak vector."""
    U, S, V = torch.linalg.svd(weight(SHAPES["tall"], "decaying"), full_matrices=False)
    W, A, B = U * S @ V, V[-1:], 50 * S[0] * U[:, -1:]
    assert count_intruders(W, A, B) == by_numpy(W, B @ A) == 0


def test_the_bound_holds() -> None:
    """No eigenvector has a larger share of a vector than the bound, also for vectors that are not of length 1."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("flat", "decaying"):
        W = weight((300, 300), kind)
        vectors = torch.randn(300, 6, generator=generator)
        vectors[:, 3] += 40 * torch.linalg.svd(W)[0][:, 150]
        vectors[:, 4:] *= 0.1
        shares = (torch.linalg.svd(W.double())[0].float().T @ vectors).square().amax(0)
        bounds = largest_share(W @ W.T, vectors, 0.5 * float(vectors.norm(dim=0).max()))
        assert (shares <= bounds * 1.001).all()
        assert (bounds <= vectors.square().sum(0) * 1.001).all()
