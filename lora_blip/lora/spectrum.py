"""Measure an update ΔW = (alpha / r) · B A: its singular values, effective rank, norm, directions, and what it does to W.

All functions compute in float64 on the CPU, accept tensors of any float dtype, and return float64 tensors, floats or ints. The
symbols are those of the LoRA paper (Hu et al. 2021, arXiv:2106.09685): A (r, in_features), B (out_features, r), W and ΔW
(out_features, in_features). If an adapter updates a block of output features, such as q of a fused qkv, then W is that block.
"""

import torch
from torch import Tensor

TOP_K, EPSILON = 10, 0.5  # defaults of peft's `reduce_intruder_dimension`, which implements the paper on intruder dimensions


def delta_svd(A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out_features, n), S (n,), Vh (n, in_features) of ΔW = scale · B A = U diag(S) Vh, without computing ΔW.

    n is the smallest of r, out_features and in_features. B = Q_B R_B and Aᵀ = Q_A R_A, so ΔW = Q_B (scale · R_B R_Aᵀ) Q_Aᵀ, and
    the matrix in parentheses has at most r rows and columns: its SVD is that of ΔW. S is sorted, largest first.
    """
    q_b, r_b = torch.linalg.qr(_float64(B))
    q_a, r_a = torch.linalg.qr(_float64(A).T)
    U, S, Vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    return q_b @ U, S, Vh @ q_a.T


def delta_spectrum(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return the singular values of ΔW = scale · B A, largest first, shape (n,): see `delta_svd`. All others are zero.

    >>> lora = lora_blip.inject(backbone, "vit")["vision_model.encoder.layers.0.self_attn.qkv"]
    >>> delta_spectrum(lora.A, lora.B, lora.scale)  # eight zeros: B is zero before the training
    """
    return delta_svd(A, B, scale)[1]


def frobenius_norm(singular_values: Tensor) -> float:
    """Return ‖M‖_F = (Σ σᵢ²)^½ of a matrix with these singular values."""
    return float(_float64(singular_values).norm())


def relative_norm(singular_values: Tensor, W: Tensor) -> float:
    """Return ‖ΔW‖_F / ‖W‖_F of an update with these singular values. 0 for ΔW = 0, and infinity for a nonzero ΔW if W = 0."""
    update, weight = frobenius_norm(singular_values), float(torch.linalg.vector_norm(W.detach().cpu(), dtype=torch.float64))
    return update / weight if weight else (float("inf") if update else 0.0)


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σ σⱼ: from 1 to the rank. Return 0 if all singular values are zero.

    It is n if n singular values are equal and the others are zero, and near 1 if one is much larger than the others
    (Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO).
    """
    values = _float64(singular_values)
    if not values.any():
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return φ of shape (n₁, n₂): φ[i − 1, j − 1] = ‖U₁ᵢᵀ U₂ⱼ‖_F² / min(i, j), from 0 to 1 (Hu et al. 2021, section 7.2).

    first, second: the A of two adapters of one linear, shapes (r₁, in_features) and (r₂, in_features). U₁ᵢ has the first i
    right singular vectors of `first` as columns, and n₁ is the rank of `first`. 1: one of the two subspaces contains the other.
    0: they are orthogonal. Two random subspaces have φ ≈ max(i, j) / in_features. Raise ValueError if the numbers of columns
    differ.
    """
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"the two matrices have {first.shape[-1]} and {second.shape[-1]} columns; give A of the same linear")
    u1, u2 = _row_space(first), _row_space(second)
    squares = (u1 @ u2.T).square()
    i, j = torch.arange(1, len(u1) + 1)[:, None], torch.arange(1, len(u2) + 1)[None, :]
    return squares.cumsum(0).cumsum(1) / torch.minimum(i, j)


def amplification_factor(W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> float:
    """Return ‖ΔW‖_F / ‖Uᵀ W V‖_F, where U and V have the singular vectors of ΔW as columns (Hu et al. 2021, section 7.3).

    It compares ΔW with the part of W in the directions of ΔW. A large value: ΔW amplifies directions that W nearly ignores.
    Return 0 for ΔW = 0, and infinity for another ΔW if W has no part in its directions.
    """
    U, S, Vh = delta_svd(A, B, scale)
    rank = _rank(S, max(len(U), Vh.shape[1]))
    return relative_norm(S, U[:, :rank].T @ _float64(W) @ Vh[:rank].T)


def closest_cosines(W: Tensor, delta: Tensor, k: int = TOP_K) -> Tensor:
    """Return, for each of the first k left singular vectors of W + ΔW, its largest |cosine| with any of those of W.

    Shape (n,), where n is the smallest of k, out_features and in_features. 1: W has the same vector, perhaps with a
    smaller or larger singular value.
    """
    before = torch.linalg.svd(_float64(W), full_matrices=False)[0]
    after = torch.linalg.svd(_float64(W) + _float64(delta), full_matrices=False)[0][:, :k]
    cosines: Tensor = (after.T @ before).abs().amax(1)
    return cosines


def intruder_dimensions(W: Tensor, delta: Tensor, k: int = TOP_K, epsilon: float = EPSILON) -> int:
    """Return how many of the first k left singular vectors of W + ΔW have no |cosine| of `epsilon` or more with those of W.

    Such a vector is a direction of the output that is strong after the training and was none of W's directions before
    (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1).
    """
    return int((closest_cosines(W, delta, k) < epsilon).sum())


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _rank(singular_values: Tensor, side: int) -> int:
    """Return the number of singular values above the rounding error of a matrix whose longer side is `side`."""
    largest = singular_values[0] if len(singular_values) else 0.0
    return int((singular_values > largest * side * torch.finfo(torch.float64).eps).sum())


def _row_space(matrix: Tensor) -> Tensor:
    """Return the right singular vectors of a matrix with singular values above zero, as rows, shape (rank, columns)."""
    S, Vh = torch.linalg.svd(_float64(matrix), full_matrices=False)[1:]
    rows: Tensor = Vh[: _rank(S, max(matrix.shape))]
    return rows
