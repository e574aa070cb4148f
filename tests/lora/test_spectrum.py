"""The measures of an update equal those of the full ΔW by numpy's SVD in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_blip.lora import injection, spectrum
from lora_blip.lora.sites import Site

SHAPES = [(12, 20, 4), (20, 12, 4), (9, 9, 9), (3, 30, 8), (30, 3, 8), (1, 7, 2), (64, 48, 1)]  # out_features, in_features, r


def random(out_features: int, in_features: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, in_features, generator=generator), torch.randn(out_features, r, generator=generator)


def full(A: Tensor, B: Tensor, scale: float) -> np.ndarray:
    """ΔW in float64, by numpy."""
    return scale * (B.detach().numpy().astype(np.float64) @ A.detach().numpy().astype(np.float64))


@pytest.mark.parametrize(("out_features", "in_features", "r"), SHAPES)
def test_spectrum_is_that_of_the_full_matrix(out_features, in_features, r):
    """U, S and Vh are an SVD of ΔW, and S equals numpy's singular values; those that are left out are zero."""
    A, B = random(out_features, in_features, r)
    delta = full(A, B, 2.5)
    values = np.linalg.svd(delta, compute_uv=False)
    U, S, Vh = (part.numpy() for part in spectrum.delta_svd(A, B, 2.5))
    n = min(out_features, in_features, r)
    assert S.shape == (n,)
    assert S.dtype == np.float64
    np.testing.assert_allclose(S, values[:n], rtol=0, atol=1e-13 * values[0])
    np.testing.assert_allclose(values[n:], 0, atol=1e-13 * values[0])
    np.testing.assert_allclose(U * S @ Vh, delta, rtol=0, atol=1e-13 * values[0])
    for vectors in (U.T @ U, Vh @ Vh.T):
        np.testing.assert_allclose(vectors, np.eye(n), atol=1e-13)
    np.testing.assert_array_equal(spectrum.delta_spectrum(A, B, 2.5).numpy(), S)
    assert spectrum.frobenius_norm(torch.tensor(S)) == pytest.approx(np.linalg.norm(delta), rel=1e-13)


def test_small_singular_values_are_as_accurate_as_those_of_the_full_matrix():
    """No Gram matrix is formed, which would lose every singular value below 1e-8 of the largest."""
    A, B = random(40, 30, 3)
    U, V = torch.linalg.qr(B.double())[0], torch.linalg.qr(A.double().T)[0]
    expected = torch.tensor([1.0, 1e-6, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(spectrum.delta_spectrum(V.T * expected[:, None], U), expected, rtol=0, atol=1e-15)


def test_rank_deficient_update():
    """Two equal rows of A, and columns of B that are zero, are singular values of zero."""
    A, B = random(16, 24, 5)
    A[1], B[:, 3] = A[0], 0.0
    values = spectrum.delta_spectrum(A, B)
    expected = np.linalg.svd(full(A, B, 1.0), compute_uv=False)[:5]
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-13 * expected[0])
    assert (values > 1e-12).sum() == 3
    assert spectrum.effective_rank(values) <= 3


def test_an_update_of_zero():
    A, B = random(16, 24, 4)
    values = spectrum.delta_spectrum(A, torch.zeros_like(B))
    assert values.tolist() == [0.0] * 4
    assert spectrum.effective_rank(values) == 0.0
    assert spectrum.relative_norm(values, torch.ones(16, 24)) == spectrum.relative_norm(values, torch.zeros(16, 24)) == 0.0
    assert spectrum.amplification_factor(torch.randn(16, 24), A, torch.zeros_like(B)) == 0.0
    assert spectrum.intruder_dimensions(torch.randn(16, 24), torch.zeros(16, 24)) == 0
    assert spectrum.subspace_similarity(torch.zeros(4, 24), A).shape == (0, 4)


def test_effective_rank_is_the_exponential_of_the_entropy():
    assert spectrum.effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert spectrum.effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    p = np.array([0.5, 0.25, 0.25])
    assert spectrum.effective_rank(torch.tensor(8 * p)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-14)
    assert spectrum.effective_rank(torch.tensor([1e300, 1e300], dtype=torch.float64)) == pytest.approx(2)


def test_half_precision_and_gradients_are_accepted():
    A, B = random(12, 20, 4)
    values = spectrum.delta_spectrum(nn.Parameter(A.bfloat16()), nn.Parameter(B.bfloat16()))
    assert not values.requires_grad
    torch.testing.assert_close(values, spectrum.delta_spectrum(A.bfloat16().float(), B.bfloat16().float()), rtol=0, atol=0)


def test_a_block_of_a_fused_linear_is_measured_by_its_rows():
    """ΔW of the block q of a qkv is zero outside of its rows, so both have the same singular values."""
    linear = nn.Sequential(nn.Linear(10, 18))
    (lora,) = injection.inject(linear, [Site("0", 3, 6.0, "k", (6, 12))]).values()
    nn.init.normal_(lora.B)
    whole = np.linalg.svd(lora.delta_weight().detach().numpy().astype(np.float64), compute_uv=False)
    values = spectrum.delta_spectrum(lora.A, lora.B, lora.scale)
    np.testing.assert_allclose(values.numpy(), whole[:3], rtol=1e-6)
    W = linear[0].weight.detach()[6:12]
    expected = np.linalg.norm(full(lora.A, lora.B, 2.0)) / np.linalg.norm(W.numpy().astype(np.float64))
    assert spectrum.relative_norm(values, W) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("out_features", "in_features"), [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.5, 5.0])
def test_cosines_are_those_of_numpy(out_features, in_features, strength):
    """The largest |cosine| of each of the top left singular vectors of W + ΔW, by numpy's SVD of both matrices."""
    A, B = random(out_features, in_features, 3)
    W, delta = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)), strength * B @ A
    before = np.linalg.svd(W.numpy().astype(np.float64), full_matrices=False)[0]
    after = np.linalg.svd(W.numpy().astype(np.float64) + delta.numpy().astype(np.float64), full_matrices=False)[0]
    expected = np.abs(after[:, :6].T @ before).max(1)
    np.testing.assert_allclose(spectrum.closest_cosines(W, delta, 6).numpy(), expected, atol=1e-9)
    assert spectrum.intruder_dimensions(W, delta, 6, 0.7) == (expected < 0.7).sum()
    assert spectrum.intruder_dimensions(W, delta, 6, 0.0) == 0


def test_a_new_direction_is_an_intruder():
    """A strong direction that mixes all singular vectors of W is one intruder; a stronger old direction is none."""
    U, _, V = torch.linalg.svd(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    W = U @ torch.diag(torch.linspace(2, 1, 32, dtype=torch.float64)) @ V
    mixed = U.sum(1, keepdim=True) / 32**0.5
    assert spectrum.intruder_dimensions(W, 50 * mixed @ V[:1]) == 1
    assert spectrum.intruder_dimensions(W, 50 * U[:, :1] @ V[:1]) == 0


def test_similarity_is_the_formula_of_the_paper():
    """φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖_F² / min(i, j) for each pair, by numpy; two random A are at max(i, j) / in_features on average."""
    first, second = random(1, 500, 6)[0], random(1, 500, 3, seed=1)[0]
    u1, u2 = (np.linalg.svd(A.numpy().astype(np.float64), full_matrices=False)[2] for A in (first, second))
    phi = spectrum.subspace_similarity(first, second)
    assert phi.shape == (6, 3)
    for i in range(1, 7):
        for j in range(1, 4):
            expected = np.linalg.norm(u1[:i] @ u2[:j].T) ** 2 / min(i, j)
            assert float(phi[i - 1, j - 1]) == pytest.approx(expected, abs=1e-12)
    pairs = [(random(1, 500, 4, n)[0], random(1, 500, 4, n + 100)[0]) for n in range(40)]
    mean = np.mean([float(spectrum.subspace_similarity(*pair)[3, 3]) for pair in pairs])
    assert mean == pytest.approx(4 / 500, rel=0.3)


def test_similarity_of_equal_and_of_orthogonal_subspaces():
    """1 for the same rows in any basis, 0 for orthogonal rows; rows that depend on others are not counted."""
    A, mix = random(1, 20, 4)[0], torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    assert float(spectrum.subspace_similarity(A, mix @ A)[3, 3]) == pytest.approx(1)
    assert spectrum.subspace_similarity(A, A).diagonal().tolist() == pytest.approx([1] * 4)
    identity = torch.eye(20)
    assert not spectrum.subspace_similarity(identity[:3], identity[5:8]).any()
    assert spectrum.subspace_similarity(torch.cat([A, A.double().sum(0, keepdim=True)]).double(), A).shape == (4, 4)
    with pytest.raises(ValueError, match="20 and 19 columns; give A of the same linear"):
        spectrum.subspace_similarity(A, A[:, :19])


def test_amplification_is_the_formula_of_the_paper():
    """‖ΔW‖ / ‖Uᵀ W V‖: 1 for ΔW = W of low rank, and infinity if W has nothing in the directions of ΔW."""
    A, B = random(12, 20, 3)
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    delta = full(A, B, 0.5)
    U, _, Vh = np.linalg.svd(delta)
    expected = np.linalg.norm(delta) / np.linalg.norm(U[:, :3].T @ W.numpy().astype(np.float64) @ Vh[:3].T)
    assert spectrum.amplification_factor(W, A, B, 0.5) == pytest.approx(expected, rel=1e-12)
    assert spectrum.amplification_factor(B.double() @ A.double(), A, B) == pytest.approx(1)
    e = torch.eye(4)
    assert spectrum.amplification_factor(torch.outer(e[0], e[1]), e[2:3], e[:, 3:]) == float("inf")
    assert spectrum.amplification_factor(W, torch.cat([A, A]), torch.cat([B, B], 1)) == pytest.approx(4 * expected, rel=1e-12)
