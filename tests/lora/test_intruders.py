"""Counting intruder dimensions without complete SVDs has the result of the complete SVDs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_blip.lora import intruders, spectrum
from lora_blip.lora.intruders import count_intruders

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
        counted.append(count_intruders(W, A, 4.0 * B))
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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_flat_spectrum_needs_not_all_vectors(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    W, real = weight(shape, "flat"), torch.linalg.eigh

    def small(matrix: Tensor) -> Any:
        assert matrix.shape[-1] < min(shape), "all vectors of W"
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", small)
    assert count_intruders(W, *update(shape, 1e-5)) == 0
    A, B = update(shape, 10.0)
    assert count_intruders(W, A, B, k=8) == 8


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", ["flat", "decaying", "few"])
def test_the_bound_of_the_cosines_is_never_too_small(shape: tuple[int, int], kind: str) -> None:
    """For random vectors, for W's own vectors, and for mixtures of a few of them. For random vectors, it is below 0.5."""
    W = weight(shape, "flat" if kind == "few" else kind)
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    if kind == "few":  # many equal singular values
        S = S[0] * torch.tensor([1.0, 0.9, 0.8, 0.3])[torch.arange(len(S)) * 4 // len(S)]
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(shape[0], 4, generator=generator, dtype=torch.float64)
    mixed = U[:, :6] @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    weak = U[:, -6:] @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    u = torch.cat([random, mixed, weak, U[:, [0, 1, 40, -1]], mixed[:, :1] + 3 * weak[:, :1]], 1)
    u, W = u / u.norm(dim=0), (U * S @ V).float()
    tall = shape[0] > shape[1]
    G, left = (W.T @ W, W.T @ u.float()) if tall else (W @ W.T, u.float())
    bound, cosines = intruders.largest_cosines(G, left, tall), (U.T @ u).abs().amax(0)
    assert (bound > cosines - 1e-3).all()
    if kind == "flat":
        assert (bound[:4] < 0.48).all()


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
    for epsilon in (cosine - 1e-6, cosine + 1e-6):
        assert count_intruders(W, A, B, epsilon=epsilon) == by_numpy(W, B @ A, epsilon=epsilon)
    assert len(calls) == 4
    assert count_intruders(W, A, B, k=40) == by_numpy(W, B @ A, 40)
    assert len(calls) == 5


def test_a_vector_close_to_a_weak_direction_is_no_intruder() -> None:
    """The update makes the weakest direction of W the strongest. It is one of W's vectors."""
    U, S, V = torch.linalg.svd(weight(SHAPES["tall"], "decaying"), full_matrices=False)
    W, A, B = U * S @ V, V[-1:], 50 * S[0] * U[:, -1:]
    assert count_intruders(W, A, B) == by_numpy(W, B @ A) == 0


def test_a_value_near_epsilon_needs_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 leaves it open, float64 decides it, and no complete SVD is needed."""
    dtypes = []
    real = intruders._count

    def recorded(W: Tensor, *arguments: Any) -> int | None:
        dtypes.append(W.dtype)
        return real(W, *arguments)

    monkeypatch.setattr(intruders, "_count", recorded)
    monkeypatch.setattr(intruders, "intruder_dimensions", None)
    for shape in SHAPES.values():
        W, (A, B) = weight(shape, "decaying"), update(shape, 0.05)
        cosine = float(spectrum.closest_cosines(W, B @ A)[0])
        for epsilon in (cosine - 1e-3, cosine + 1e-3):
            assert count_intruders(W, A, B, epsilon=epsilon) == by_numpy(W, B @ A, epsilon=epsilon)
    assert dtypes == [torch.float32, torch.float64] * 6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_factor_for_each_row_is_that_of_numpy(shape: tuple[int, int]) -> None:
    """DoRA: W' = g ⊙ (W + ΔW). The factors alone have intruders, too."""
    counted = []
    for size, spread in ((1e-4, 0.01), (1e-4, 1.0), (0.1, 0.3)):
        W, (A, B) = weight(shape, "flat"), update(shape, size)
        g = torch.exp(spread * torch.randn(shape[0], generator=torch.Generator().manual_seed(2)))
        counted.append(count_intruders(W, A, B, g))
        assert counted[-1] == by_numpy(W, g[:, None] * (W + B @ A) - W), (size, spread)
    assert len(set(counted)) > 1


def test_a_weight_of_low_rank_has_the_result_of_numpy() -> None:
    """For a tall W, the cosines are divided by its singular values, some of which are near zero here."""
    U, S, V = torch.linalg.svd(weight(SHAPES["tall"], "flat"), full_matrices=False)
    for smallest in (1e-1, 1e-3, 1e-5):
        W = U * (S * torch.logspace(0, float(np.log10(smallest)), len(S))) @ V
        for size in (1e-4, 0.1):
            A, B = update(SHAPES["tall"], size)
            assert count_intruders(W, A, B) == by_numpy(W, B @ A), (smallest, size)


def test_a_strong_update_outside_of_the_strongest_vectors_is_found() -> None:
    """The search starts near W's strongest vectors, and the update is orthogonal to all of them."""
    for shape in SHAPES.values():
        U, S, V = torch.linalg.svd(weight(shape, "decaying"), full_matrices=False)
        mixed = torch.randn(200, 3, generator=torch.Generator().manual_seed(4))
        W, B, A = U * S @ V, 2 * S[0] * U[:, 50:250] @ mixed, mixed.T @ V[50:250] / 200
        assert count_intruders(W, A, B) == by_numpy(W, B @ A) == 3
