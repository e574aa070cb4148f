"""Count intruder dimensions of large weights in a fraction of a second, with the result of `spectrum.intruder_dimensions`.

That function computes two complete SVDs, which takes seconds for a weight of 4096 × 1024. Here, the strongest singular vectors
of W and of W + ΔW come from a block Krylov method (Musco and Musco 2015, arXiv:1504.05477), in float32. Products with ΔW use
A and B. After the training, most vectors are still close to one of W's strongest vectors: they are not intruders. A vector u
that is close to none of them could be close to a weaker vector of W. `largest_share` excludes this with a bound. If the bound
is too weak, or if a value is too close to `epsilon`, the SVDs decide.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_blip.lora.spectrum import EPSILON, TOP_K, intruder_dimensions

SMALL = 256  # the shorter side of weights for which the SVDs are fast enough
BLOCK, MOST = 16, 560  # vectors of a Krylov block, and of all blocks; a multiple of BLOCK
MARGIN = 0.06  # |cosine|s that are closer to epsilon are not decided in float32
ACCURACY = 0.03  # largest error of a singular vector, as the sine of an angle
RESOLUTION = 1e-5  # smallest distance of two eigenvalues in float32, as a share of the largest one
GROWTH = 1.25  # the accuracy is tested again when the number of vectors has grown by this factor
STEPS = (12, 20, 32, 48)  # Lanczos steps after which the bound is computed
Operator = Callable[[Tensor], Tensor]  # (n, columns) → (n, columns)


def count_intruders(W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, k: int = TOP_K, epsilon: float = EPSILON) -> int:
    """Return `intruder_dimensions(W, scale * B @ A, k, epsilon)`: see there."""
    counted = None
    if min(W.shape) > SMALL and k <= BLOCK - 4 and epsilon > 2 * MARGIN:
        in_float32 = [tensor.detach().cpu().float() for tensor in (W, A, B * scale)]
        counted = _count(in_float32[0], in_float32[1], in_float32[2], k, epsilon)
    if counted is None:
        counted = intruder_dimensions(W, scale * B.detach().double() @ A.detach().double(), k, epsilon)
    return counted


def _count(W: Tensor, A: Tensor, B: Tensor, k: int, epsilon: float) -> int | None:
    """Return the number of intruders, or None if one of the vectors cannot be decided.

    All vectors have n entries, where n is the shorter side of W. For a wide W, they are the left singular vectors: the
    eigenvectors of G = W Wᵀ. For a tall W, they are the right ones, the eigenvectors of G = Wᵀ W, and u = W v / σ.
    """
    tall = W.shape[0] > W.shape[1]
    G = W.T @ W if tall else W @ W.T
    P, F = (W.T @ B, A) if tall else (W @ A.T, B.T)  # (n, r), (r, n)
    H = B.T @ B if tall else A @ A.T  # (r, r)

    def tuned(X: Tensor) -> Tensor:
        """Return G' X. G' = G + P F + (P F)ᵀ + Fᵀ H F is the G of W + ΔW."""
        FX = F @ X
        return G @ X + P @ FX + F.T @ (P.T @ X + H @ FX)

    start = torch.randn(len(G), BLOCK, generator=torch.Generator().manual_seed(0))
    after = strongest(tuned, start, k)
    before = strongest(lambda X: G @ X, torch.cat([after[0], start[:, after[0].shape[1] :]], 1), k + 2) if after else None
    if after is None or before is None:
        return None
    vectors, values = after
    left = vectors
    if tall:  # Wᵀ u for each vector after the training; W's own vectors have vᵢᵀ Wᵀ u = σᵢ uᵢᵀ u
        left = (G @ vectors + P @ (F @ vectors)) / values.sqrt()
    cosines = (before[0].T @ left).abs() / (before[1].sqrt()[:, None] if tall else 1.0)
    closest = cosines.amax(0)
    undecided = closest < epsilon + MARGIN
    if not undecided.any():
        return 0
    if tall:  # W = Q R: the left singular vectors of W are Q times those of R, and Qᵀ u are the coordinates of u
        R = torch.linalg.qr(W, mode="r")[1]
        G, left = R @ R.T, torch.linalg.solve_triangular(R.T, left, upper=False)
    shares = largest_share(G, left[:, undecided], epsilon)
    return int(undecided.sum()) if bool((shares.sqrt() < epsilon - MARGIN).all()) else None


def strongest(operator: Operator, start: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Return the eigenvectors (n, count) with the largest eigenvalues (count,) of a symmetric matrix, largest first.

    Return None if one of them is not as accurate as ACCURACY. The error of an eigenvector is its residual ‖M v − λ v‖ divided
    by the distance of λ from the next eigenvalue (Davis and Kahan 1970).
    """
    n, size = start.shape
    basis, projected = torch.empty(MOST, n), torch.zeros(MOST, MOST)
    block, end, check = torch.linalg.qr(start)[0].T, size, 3 * size
    while end <= min(MOST, n):
        basis[end - size : end] = block
        image = operator(block.T.contiguous()).T
        projected[:end, end - size : end] = basis[:end] @ image.T
        projected[end - size : end, :end] = projected[:end, end - size : end].T
        for _ in range(2):  # a second time, because the first one leaves rounding errors
            image = image - (image @ basis[:end].T) @ basis[:end]
        q, r = torch.linalg.qr(image.T)
        if end >= check:
            check = int(end * GROWTH)
            values, ritz = torch.linalg.eigh(projected[:end, :end])
            values, ritz = values.flip(0), ritz.flip(1)[:, :count]
            distances = gaps(values)[:count]
            errors = (r @ ritz[-size:]).norm(dim=0) / distances
            if bool((distances > RESOLUTION * values[0]).all() and (errors < ACCURACY).all()):
                return basis[:end].T @ ritz, values[:count]
        block, end = q.T, end + size
    return None


def gaps(values: Tensor) -> Tensor:
    """Return the distance of each value from the nearest other one. The values are sorted."""
    steps = (values[1:] - values[:-1]).abs()
    far = steps.new_full((1,), float("inf"))
    return torch.minimum(torch.cat([far, steps]), torch.cat([steps, far]))


def largest_share(G: Tensor, vectors: Tensor, epsilon: float) -> Tensor:
    """Return, for each column u, an upper bound of max (uᵀ y)² over the eigenvectors y of G ≥ 0, shape (columns,).

    m steps of Lanczos give the nodes θ and weights w of a Gauss quadrature of the squares (uᵀ yᵢ)² over the eigenvalues. By the
    inequality of Chebyshev, Markov and Stieltjes (Szegő 1939, theorem 3.41.1), the squares for all eigenvalues between
    two neighbouring nodes have at most the sum of the two weights. Stop when the bounds are below `epsilon`². The matrix is
    (G + δ I)⁻¹, which has the same eigenvectors, and whose eigenvalues are further apart if most of those of G are small.
    """
    n = len(G)
    factor = torch.linalg.cholesky_ex(G + torch.eye(n) * G.trace() / n)[0]
    norms = vectors.norm(dim=0)
    basis, bounds = (vectors / norms).T[:, None], norms.square()  # (columns, steps, n)
    diagonal, beside = list[Tensor](), list[Tensor]()
    for step in range(1, max(STEPS) + 1):
        image = torch.cholesky_solve(basis[:, -1].T, factor).T
        diagonal.append((image * basis[:, -1]).sum(1))
        for _ in range(2):
            image = image - ((basis @ image[:, :, None]).transpose(1, 2) @ basis)[:, 0]
        beside.append(image.norm(dim=1))
        if step in STEPS:
            T = torch.diag_embed(torch.stack(diagonal, 1))
            T = T + torch.diag_embed(torch.stack(beside[:-1], 1), 1) + torch.diag_embed(torch.stack(beside[:-1], 1), -1)
            weights = torch.linalg.eigh(T)[1][:, 0].square()
            bounds = norms.square() * (weights[:, 1:] + weights[:, :-1]).amax(1)
            if bool((bounds.sqrt() < epsilon - MARGIN).all()):
                break
        basis = torch.cat([basis, (image / beside[-1][:, None])[:, None]], 1)
    result: Tensor = bounds
    return result
