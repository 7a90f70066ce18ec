"""The bottom eigenspace of a Gram matrix: the null space of the activations, or what comes closest to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OVERSAMPLING = 16
MAX_ITERATIONS = 60
# Below this width a full `eigh` costs milliseconds; above it, inverse iteration wins while r is a small part of d.
INVERSE_MIN_WIDTH = 384
INVERSE_MAX_RANK_SHARE = 8


@dataclass(frozen=True)
class Eigenspace:
    """The r eigenvectors of C with the smallest eigenvalues.

    Attributes:
        vectors: (d, r) float64, orthonormal columns.
        rank: the numerical rank of C: eigenvalues above d·ε·λ_max.
        solver: "eigh" or "inverse", the one that gave the answer.
    """

    vectors: torch.Tensor
    rank: int
    solver: str


def bottom_eigenspace(gram: torch.Tensor, r: int, *, solver: str = "auto", seed: int = 0) -> Eigenspace:
    """Find the span of the r eigenvectors of `gram` with the smallest eigenvalues (method, step 1).

    When the exact null space has more than r dimensions every r of them are equally good; the choice is then the
    projection onto it of a fixed Gaussian r-frame, which does not depend on the basis that a solver happens to return.

    Args:
        gram: (d, d) float64, symmetric positive semi-definite.
        r: number of directions, 1 ≤ r ≤ d.
        solver: "eigh", "inverse" (shifted block inverse iteration, falls back to `eigh`), or "auto" by size.
        seed: of the frame.

    Raises:
        ValueError: for an r outside 1…d or a `gram` that is not finite or zero.
    """
    d = gram.shape[0]
    if not 1 <= r <= d:
        raise ValueError(f"r is {r}, the Gram matrix is {d} wide")
    top = torch.linalg.matrix_norm(gram).item()  # Frobenius: an upper bound of λ_max, exact for rank one
    if not 0 < top < float("inf"):
        raise ValueError("the Gram matrix is zero or not finite")
    gram = gram / top
    frame = torch.randn(d, r + OVERSAMPLING, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    frame = frame.to(gram.device)
    if solver == "auto":
        solver = "inverse" if d >= INVERSE_MIN_WIDTH and r * INVERSE_MAX_RANK_SHARE <= d else "eigh"
    if solver == "inverse":
        found = _inverse_iteration(gram, r, frame)
        if found is not None:
            return found
    return _full_eigh(gram, r, frame)


def _tolerance(gram: torch.Tensor) -> float:
    return gram.shape[0] * torch.finfo(gram.dtype).eps


def _full_eigh(gram: torch.Tensor, r: int, frame: torch.Tensor) -> Eigenspace:
    values, vectors = torch.linalg.eigh(gram)
    null = int((values <= _tolerance(gram) * values[-1]).sum())
    bottom = vectors[:, :r]
    if null > r:
        kernel = vectors[:, :null]
        bottom, _ = torch.linalg.qr(kernel @ (kernel.T @ frame[:, :r]))
    return Eigenspace(bottom, gram.shape[0] - null, "eigh")


def _inverse_iteration(gram: torch.Tensor, r: int, frame: torch.Tensor) -> Eigenspace | None:
    """Iterate (C + εI)⁻¹ on a block of r + 16 vectors until the energy it catches stops falling.

    The trace of UᵀCU bounds the true minimum from above and falls with every step, geometrically at the rate that its
    last two falls show; the loop ends when what is still to come is below one thousandth of it. Returns None, for a
    full `eigh`, when the factorization fails, the block is all null space (rank unknown), or it does not converge.
    """
    d = gram.shape[0]
    tolerance = _tolerance(gram)
    shifted = gram.clone()
    shifted.diagonal().add_(tolerance)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        return None
    block, _ = torch.linalg.qr(frame)
    energy, last_fall = float("inf"), float("inf")
    for _ in range(MAX_ITERATIONS):
        block, _ = torch.linalg.qr(torch.cholesky_solve(block, factor))
        values, rotation = torch.linalg.eigh(block.T @ (gram @ block))
        if values[-1] <= tolerance:
            return None
        now = values[:r].clamp(min=0).sum().item()
        fall, energy = energy - now, now
        rate = min(max(fall / last_fall, 0.0), 0.999) if last_fall < float("inf") else 0.999
        if fall <= 1e-3 * (1 - rate) * energy + r * tolerance * 1e-3:
            null = int((values <= tolerance).sum())
            return Eigenspace(block @ rotation[:, :r], d - null, "inverse")
        last_fall = fall
    return None
