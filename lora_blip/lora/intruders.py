"""Count intruder dimensions of large weights faster, with the result of `spectrum.intruder_dimensions`.

That function computes two complete SVDs in float64, which takes six seconds for a weight of 4096 × 1024. Here, the strongest
eigenvectors of W Wᵀ or Wᵀ W, whichever is smaller, are computed in float32. A singular vector of W + ΔW is

- no intruder if its cosine with one of W's strongest vectors is large enough,
- an intruder if the Lanczos method bounds its cosines with all vectors of W.

If neither holds for one of them, all eigenvectors of W are computed, in float32 and then in float64. Rounding mixes two
eigenvectors if their eigenvalues are close, so the squared cosines with all vectors of close eigenvalues are added. If that
does not decide either, the SVDs decide.
"""

import torch
from torch import Tensor

from lora_blip.lora.spectrum import EPSILON, TOP_K, intruder_dimensions

SMALL = 256  # the shorter side of weights for which the SVDs are fast enough
MOST_K = 12  # vectors of W + ΔW
BLOCK = 4  # vectors of a Krylov block
MOST = 560  # vectors of all blocks
LANCZOS = 40  # steps that bound the cosines of an intruder
GROWTH = 1.25  # the accuracy is tested again when the number of vectors has grown by this factor
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}  # error of a symmetric matrix, as a share of its largest eigenvalue
ACCURACY = {torch.float32: 0.005, torch.float64: 1e-5}  # largest error of a vector, as the sine of an angle
Vectors = tuple[Tensor, Tensor, Tensor]  # eigenvectors (n, count), eigenvalues (count,), bounds of the errors (count,)


def count_intruders(W: Tensor, A: Tensor, B: Tensor, g: Tensor | None = None, k: int = TOP_K, epsilon: float = EPSILON) -> int:
    """Return how many of the first k left singular vectors of W' have no |cosine| of `epsilon` or more with those of W.

    W' = W + B A, or g ⊙ (W + B A) with a factor for each row (DoRA). This equals `intruder_dimensions(W, W' − W, k, epsilon)`.
    """
    W, A, B = W.detach().cpu(), A.detach().cpu(), B.detach().cpu()
    if min(W.shape) > SMALL and k <= MOST_K and epsilon > 0.1:
        for dtype in (torch.float32, torch.float64):
            counted = _count(W.to(dtype), A.to(dtype), B.to(dtype), None if g is None else g.to(dtype), k, epsilon)
            if counted is not None:
                return counted
    changed = W.double() + B.double() @ A.double()
    changed = changed if g is None else g.double()[:, None] * changed
    return intruder_dimensions(W, changed - W.double(), k, epsilon)


def _count(W: Tensor, A: Tensor, B: Tensor, g: Tensor | None, k: int, epsilon: float) -> int | None:
    """Return the number of intruders, or None if the dtype is not accurate enough for one of the vectors."""
    accuracy, tall = ACCURACY[W.dtype], W.shape[0] > W.shape[1]
    G = W.T @ W if tall else W @ W.T
    top = krylov(G, G[:, :0], k + 2)
    guess = top[0][:, : BLOCK // 2] if top else G[:, :0]
    after, after_values, errors = strongest(_changed_gram(G, W, A, B, g), guess, k)
    left = after  # for a tall W: Wᵀ u, with u = W' v / σ'
    if tall:
        changed = (W @ after + B @ (A @ after)) / after_values.sqrt()
        left = W.T @ (changed if g is None else g[:, None] * changed)

    def squares(vectors: Tensor, values: Tensor) -> Tensor:
        """Return the squared cosines of W's vectors with those of W'. For a tall W, vᵢᵀ Wᵀ u = σᵢ uᵢᵀ u."""
        result = (vectors.T @ left).square().double()
        return result / values.double()[:, None] if tall else result

    margin = errors + 2 * accuracy  # errors of the vectors of W', and of those of W
    near = torch.zeros(len(margin), dtype=torch.bool)
    if top and top[1][-1] > 0:
        near = (squares(top[0], top[1]).sqrt() > epsilon + margin).any(0)
    if bool(near.all()) or bool((largest_cosines(G, left[:, ~near], tall) < epsilon - margin[~near]).all()):
        return int((~near).sum())
    values, vectors = torch.linalg.eigh(G)
    if not values[-1] > 0:
        return None
    if tall and values[0] < 100 * ROUNDING[W.dtype] * values[-1]:  # the division by σ is not accurate
        return None
    close = ROUNDING[W.dtype] / accuracy * values[-1]
    first, end = torch.searchsorted(values, values - close), torch.searchsorted(values, values + close, right=True)
    shares = squares(vectors, values)  # (n, k)
    sums = torch.cat([shares.new_zeros(1, shares.shape[1]), shares.cumsum(0)])
    largest = (sums[end] - sums[first]).amax(0).sqrt()
    separate = (shares * (end - first == 1)[:, None]).amax(0).sqrt()
    intruders, others = largest < epsilon - margin, separate > epsilon + margin
    return int(intruders.sum()) if bool((intruders | others).all()) else None


def _changed_gram(G: Tensor, W: Tensor, A: Tensor, B: Tensor, g: Tensor | None) -> Tensor:
    """Return W'ᵀ W' for a tall W, else W' W'ᵀ. G: the same for W."""
    tall = W.shape[0] > W.shape[1]
    if g is not None and tall:
        changed = g[:, None] * (W + B @ A)
        return changed.T @ changed
    P, F = (W.T @ B, A) if tall else (W @ A.T, B.T)  # (n, r), (r, n)
    H = B.T @ B if tall else A @ A.T  # (r, r)
    cross = (P + 0.5 * F.T @ H) @ F  # G' = G + P F + (P F)ᵀ + Fᵀ H F
    changed = G + cross + cross.T
    return changed if g is None else g[:, None] * changed * g


def strongest(G: Tensor, guess: Tensor, count: int) -> Vectors:
    """Return the `count` eigenvectors with the largest eigenvalues, their eigenvalues, and bounds of their errors.

    G: symmetric, (n, n). guess: see `krylov`, which is tried first in float32. Float64 would need too many vectors.
    """
    result = krylov(G, guess, count) if G.dtype == torch.float32 else None
    if result is None:
        values, vectors = torch.linalg.eigh(G)
        values = values.flip(0)
        result = vectors.flip(1)[:, :count], values[:count], ROUNDING[G.dtype] * values[0] / gaps(values)[:count]
    return result


def krylov(G: Tensor, guess: Tensor, count: int) -> Vectors | None:
    """Return the same by a block Krylov method (Musco and Musco 2015, arXiv:1504.05477), or None if it needs too many vectors.

    guess: vectors near some of the result, (n, fewer than BLOCK). The method also starts from random vectors, so that it finds
    those that are far from the guess. The error of an eigenvector, as the sine of an angle, is at most its residual
    ‖G v − λ v‖ divided by the distance of λ from the next eigenvalue (Davis and Kahan 1970).
    """
    n, rounding = len(G), ROUNDING[G.dtype]
    most = min(MOST, n)
    basis, projected = G.new_empty(most, n), G.new_zeros(most, most)
    random = torch.randn(n, BLOCK - guess.shape[1], generator=torch.Generator().manual_seed(0)).to(G.dtype)
    block, end, check = torch.linalg.qr(torch.cat([guess, random], 1))[0].T, BLOCK, 4 * count
    while end <= most:
        basis[end - BLOCK : end] = block
        image = block @ G
        projected[:end, end - BLOCK : end] = basis[:end] @ image.T
        projected[end - BLOCK : end, :end] = projected[:end, end - BLOCK : end].T
        for _ in range(2):  # a second time, because the first one leaves rounding errors
            image = image - (image @ basis[:end].T) @ basis[:end]
        q, r = torch.linalg.qr(image.T)
        if end >= check:
            check = int(end * GROWTH)
            values, ritz = torch.linalg.eigh(projected[:end, :end])
            values, ritz = values.flip(0), ritz.flip(1)[:, :count]
            errors = ((r @ ritz[-BLOCK:]).norm(dim=0) + rounding * values[0]) / gaps(values)[:count]
            if bool((errors < ACCURACY[G.dtype]).all()):
                return basis[:end].T @ ritz, values[:count], errors
        block, end = q.T, end + BLOCK
    return None


def largest_cosines(G: Tensor, left: Tensor, tall: bool) -> Tensor:
    """Return an upper bound of the largest |cosine| of each vector with any singular vector of W, shape (k,), float64.

    G: W Wᵀ, and left: unit vectors u, (n, k). For a tall W, G is Wᵀ W, and left contains Wᵀ u.

    Lanczos steps from a vector give eigenvalues θ₁ < θ₂ < … of a small matrix, and weights w. The squared cosines with all
    eigenvectors of G whose eigenvalues are between θᵢ₋₁ and θᵢ₊₁ have at most the sum wᵢ₋₁ + wᵢ + wᵢ₊₁ (the separation theorem
    of Chebyshev, Markov and Stieltjes; Szegő, Orthogonal Polynomials, section 3.41). So close eigenvalues need no care.
    """
    steps, tiny = min(LANCZOS, len(G)), torch.finfo(G.dtype).tiny
    norms = left.norm(dim=0)
    basis = G.new_zeros(len(norms), steps, len(G))
    T = torch.zeros(len(norms), steps, steps, dtype=torch.float64)
    vector, length = left.T, norms
    for step in range(steps):
        if step:
            T[:, step, step - 1] = length  # eigh reads the lower triangle
        basis[:, step] = vector / length.clamp_min(tiny)[:, None]
        vector = basis[:, step] @ G
        T[:, step, step] = (vector * basis[:, step]).sum(1)
        before = basis[:, : step + 1]
        for _ in range(2):  # a second time, because the first one leaves rounding errors
            vector = vector - ((before @ vector[:, :, None]).mT @ before)[:, 0]
        length = vector.norm(dim=1)
    nodes, vectors = torch.linalg.eigh(T)  # (k, steps), (k, steps, steps)
    sums = torch.nn.functional.pad((vectors[:, 0] ** 2).cumsum(1), (2, 1))  # sums[:, i + 1]: the sum of the first i weights
    sums[:, -1] = sums[:, -2]
    close = 2 * ROUNDING[G.dtype] / ACCURACY[G.dtype] * nodes[:, -1:]
    end = torch.searchsorted(nodes, nodes + close, right=True)  # the first node that is not close to each one
    shares = sums.gather(1, end + 2) - sums[:, :steps]
    if tall:  # vᵢᵀ Wᵀ u = σᵢ uᵢᵀ u, so a share is divided by a lower bound of its σᵢ²
        lowest = torch.cat(
            [least_eigenvalue(G, float(nodes.min()), float(nodes.max())).expand(len(nodes), 1), nodes[:, :-1]], 1
        )
        shares = shares * norms.double()[:, None].square() / lowest.clamp_min(0.0)
    return shares.amax(1).sqrt()


def least_eigenvalue(G: Tensor, least: float, largest: float) -> Tensor:
    """Return a lower bound of the eigenvalues of G: a quarter of the estimate `least`, or 0 if that is not certain.

    It is certain if G − bound · I has a Cholesky decomposition, and the bound exceeds the rounding errors of G. largest: the
    largest eigenvalue.
    """
    bound = least / 4
    shifted = G.clone()
    shifted.diagonal().sub_(bound)
    accurate = bound > 100 * ROUNDING[G.dtype] * largest
    return torch.tensor(bound if accurate and not torch.linalg.cholesky_ex(shifted)[1] else 0.0, dtype=torch.float64)


def gaps(values: Tensor) -> Tensor:
    """Return the distance of each value from the nearest other one. The values are sorted."""
    steps = (values[1:] - values[:-1]).abs()
    far = steps.new_full((1,), float("inf"))
    return torch.minimum(torch.cat([far, steps]), torch.cat([steps, far]))
