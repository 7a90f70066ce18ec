"""The bottom eigenspace of a Gram matrix: the null space of the activations, or what comes closest to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

# The Krylov solver wins while r is a small part of d. At d / 8 it takes as long at 2,048 wide, and finds no answer at 4,096.
KRYLOV_MAX_RANK_SHARE = 10
SOLVERS = ("auto", "eigh", "krylov")
# Stop when the eigenvalue-weighted squared residual is below this. Measured on SmolLM2's Grams, the energy caught in excess
# is then at most about four times this. Where eigenvalues lie close together a Krylov space can miss some of them without
# any residual, so the answer has to pass `_is_complete`: it catches at most EXCESS more energy than the full SVD's, which is
# 1.01 times its leakage.
RESIDUAL, EXCESS = 5e-4, 0.02
FIRST_TEST, TEST_EVERY = 2.5, 2  # test once the basis has 2.5 r columns, then at every second block
ANSWERS = 2  # of blocks of one width, before they are made wider
PROBE = 4  # columns tried first for an exact null space


@dataclass(frozen=True)
class Crossover:
    """What is fastest on one kind of device.

    Attributes:
        krylov_width: from this width on the Krylov solver is used; a full `eigh` of a narrower matrix is as fast.
        least_block: columns of a block, at least: fewer are solved no faster.
        blocks_per_rank: into how many blocks r columns are divided.
    """

    krylov_width: int
    least_block: int
    blocks_per_rank: int


# Measured (tests/benchmarks/scaling.py; tests/gpu on an H200, where 32 columns are solved as slowly as 128, and an `eigh` of
# 4,096 takes 0.11 s).
CPU, ACCELERATOR = Crossover(512, 16, 4), Crossover(5000, 64, 2)


@dataclass(frozen=True)
class Eigenspace:
    """The r eigenvectors of C with the smallest eigenvalues.

    Attributes:
        vectors: (d, r) float64, orthonormal columns.
        rank: the numerical rank of C: its eigenvalues above d·ε·‖C‖_F, ε of float64, whichever solver counts them.
            Along the others the leakage ‖A X‖ / (‖A‖ ‖X‖) is at most √(d·ε).
        solver: "eigh" or "krylov", the one that gave the answer.
        exact: whether C is zero on all of `vectors`, to its rounding.
    """

    vectors: torch.Tensor
    rank: int
    solver: str
    exact: bool


def bottom_eigenspace(gram: torch.Tensor, r: int, *, solver: str = "auto", seed: int = 0) -> Eigenspace:
    """Find the span of the r eigenvectors of `gram` with the smallest eigenvalues (method, step 1).

    When the exact null space has more than r dimensions every r of them are equally good; the choice is then the
    projection onto it of a fixed Gaussian r-frame, which does not depend on the basis that a solver happens to return.

    Args:
        gram: (d, d) float64, symmetric positive semi-definite.
        r: number of directions, 1 ≤ r ≤ d.
        solver: "eigh", "krylov" (block Lanczos on the inverse; falls back to `eigh`), or "auto" by size.
        seed: of the frame.

    Raises:
        ValueError: for an r outside 1…d, an unknown solver, or a `gram` that is not finite or zero.
    """
    d = gram.shape[0]
    if not 1 <= r <= d:
        raise ValueError(f"r is {r}, the Gram matrix is {d} wide")
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, not {', '.join(SOLVERS)}")
    gram = _scaled(gram)
    frame = torch.randn(d, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(gram.device)
    if solver == "auto":
        solver = "krylov" if d >= crossover(gram.device).krylov_width and r * KRYLOV_MAX_RANK_SHARE <= d else "eigh"
    found = _inverse_krylov(gram, r, frame) if solver == "krylov" else None
    return found or _full_eigh(gram, r, frame)


def crossover(device: torch.device) -> Crossover:
    """Return what is fastest there."""
    return CPU if device.type == "cpu" else ACCELERATOR


def outer_eigenspace(gram: torch.Tensor, energy: float) -> Eigenspace:
    """Find the eigenvectors of `gram` outside the top ones that together hold a share of its trace.

    Args:
        gram: (d, d) float64, symmetric positive semi-definite.
        energy: the share, between 0 and 1; the fewest eigenvectors that hold it are left out.

    Returns:
        `vectors` (d, k), where k follows from the spectrum; 0 columns where all are needed.

    Raises:
        ValueError: for a `gram` that is not finite or zero.
    """
    values, vectors = torch.linalg.eigh(_scaled(gram))
    null = int((values <= _tolerance(gram)).sum())
    held = values.clamp(min=0).flip(0).cumsum(0)  # by the 1, 2, … largest
    left_out = int((held < energy * held[-1]).sum()) + 1
    k = len(values) - left_out
    return Eigenspace(vectors[:, :k], len(values) - null, "eigh", null >= k)


def _scaled(gram: torch.Tensor) -> torch.Tensor:
    """Return C / ‖C‖_F: Frobenius is an upper bound of λ_max, exact for rank one, and needs no eigenvalues."""
    top = torch.linalg.matrix_norm(gram).item()
    if not 0 < top < float("inf"):
        raise ValueError("the Gram matrix is zero or not finite")
    return gram / top


def _tolerance(gram: torch.Tensor) -> float:
    """Return d·ε, up to which an eigenvalue of C / ‖C‖_F counts as zero."""
    return gram.shape[0] * torch.finfo(gram.dtype).eps


def _full_eigh(gram: torch.Tensor, r: int, frame: torch.Tensor) -> Eigenspace:
    values, vectors = torch.linalg.eigh(gram)
    null = int((values <= _tolerance(gram)).sum())
    bottom = vectors[:, :r]
    if null > r:
        kernel = vectors[:, :null]
        bottom, _ = torch.linalg.qr(kernel @ (kernel.T @ frame))
    return Eigenspace(bottom, gram.shape[0] - null, "eigh", null >= r)


def _inverse_krylov(gram: torch.Tensor, r: int, frame: torch.Tensor) -> Eigenspace | None:
    """Find the bottom of C through G = (C + εI)⁻¹, whose largest eigenvalues are the smallest of C.

    A Krylov space holds no more copies of an eigenvalue than its blocks are wide: narrow blocks first, then of width r.
    Returns None, for a full `eigh`, when neither gives the answer.
    """
    d, tolerance = gram.shape[0], _tolerance(gram)
    shifted = gram.clone()
    shifted.diagonal().add_(tolerance)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        return None
    null = _inside_null_space(gram, frame, factor)
    if null is not None:
        return Eigenspace(null, d - _count_below(gram, tolerance), "krylov", True)
    fastest = crossover(gram.device)
    for width in sorted({min(r, max(fastest.least_block, r // fastest.blocks_per_rank)), r}):
        for vectors in islice(_krylov(factor, frame[:, :width], r), ANSWERS):
            values, rotation = torch.linalg.eigh(vectors.T @ gram @ vectors)
            if _is_complete(gram, values, vectors @ rotation):
                return Eigenspace(vectors, d - int((values <= tolerance).sum()), "krylov", False)
    return None


def _krylov(factor: torch.Tensor, start: torch.Tensor, r: int) -> Iterator[torch.Tensor]:
    """Block Lanczos on G = (C + εI)⁻¹ = (L Lᵀ)⁻¹; yields better and better orthonormal bases (d, r) of the bottom of C.

    The basis V grows by one block per step. With Ritz pairs (θ, x) of VᵀG V, the residuals ‖G x − θ x‖ / θ, weighted by
    the eigenvalues λ = 1/θ − ε, tell how much energy the span catches in excess; the answer is the span of the G x, one
    step further still. Ends when V has grown to half of d.
    """
    d, tolerance = factor.shape[0], _tolerance(factor)
    block = torch.linalg.qr(start)[0]
    k, steps = block.shape[1], 0
    basis, projected = block, factor.new_zeros(0, 0)
    while basis.shape[1] <= d // 2:
        block, coefficients = _orthogonalized(_solve(factor, block), basis)
        projected = torch.nn.functional.pad(projected, (0, k, 0, k))
        projected[:, -k:], projected[-k:] = coefficients, coefficients.T
        block, remainder = torch.linalg.qr(block)
        steps += basis.shape[1] >= FIRST_TEST * r
        if steps > 0 and steps % TEST_EVERY == 1:
            theta, rotation = torch.linalg.eigh(projected)
            theta, rotation = theta[-r:], rotation[:, -r:]
            beyond = remainder @ rotation[-k:]  # G x − θ x = block · beyond
            residual = torch.linalg.vector_norm(beyond, dim=0) / theta
            values = (1 / theta - tolerance).clamp(min=0)
            if (values * residual.square()).sum() <= RESIDUAL * values.sum() + r * tolerance * RESIDUAL:
                yield torch.linalg.qr(basis @ (rotation * theta) + block @ beyond)[0]
                steps = -(r // k)  # what an answer misses takes another r columns to find
        basis = torch.cat([basis, block], dim=1)


def _is_complete(gram: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Return whether no eigenvalue is missing that would lower the energy caught, Σ v, by more than `EXCESS` of it.

    Of the Ritz values v of C, the level σ cuts off Σ max(v − σ, 0) = EXCESS Σ v. Each of the v is at least an eigenvalue
    of its own; so if no more eigenvalues than v lie below σ, then there is one for each, and all others are above. That
    holds if C is above σ on all that is orthogonal to the Ritz vectors V of the v below σ, which it is where
    C + V Vᵀ − σI is positive definite (‖C‖ ≤ 1): one Cholesky.

    Args:
        gram: C / ‖C‖_F, (d, d).
        values, vectors: the Ritz pairs, in ascending order.
    """
    above = values.flip(0).cumsum(0) - EXCESS * values.sum()  # of the j largest: Σ v − EXCESS, which is j σ
    levels = above / torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    level = levels.max().item()
    if level <= _tolerance(gram):
        return False
    below = vectors[:, values < level]
    rest = torch.addmm(gram, below, below.T)
    rest.diagonal().sub_(level)
    return not torch.linalg.cholesky_ex(rest).info


def _count_below(gram: torch.Tensor, level: float) -> int:
    """Return how many eigenvalues lie below a level: as many as pivots of C − level·I are negative (Sylvester)."""
    shifted = gram.clone()
    shifted.diagonal().sub_(level)
    factored, pivots = torch.linalg.ldl_factor(shifted)
    single = pivots > 0  # the others come in pairs, one negative and one positive
    return int((factored.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2


def _solve(factor: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Return (L Lᵀ)⁻¹ block; two triangular solves, since `cholesky_solve` copies the factor every time."""
    half = torch.linalg.solve_triangular(factor, block, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _orthogonalized(block: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of the block outside the basis, and its coefficients inside; twice, as once loses digits."""
    first = basis.T @ block
    block = block - basis @ first
    second = basis.T @ block
    return block - basis @ second, first + second


def _inside_null_space(gram: torch.Tensor, frame: torch.Tensor, factor: torch.Tensor) -> torch.Tensor | None:
    """Return the projection of the frame onto the exact null space, orthonormal; None where that has fewer than r dims.

    ε(C + εI)⁻¹ keeps the null space and shrinks an eigenvector of eigenvalue λ to ε/λ. Once tells, three times settle.
    """
    for width in (min(PROBE, frame.shape[1]), frame.shape[1]):  # a few directions tell cheaply that there is none
        block = torch.linalg.qr(_solve(factor, frame[:, :width]))[0]
        if torch.linalg.matrix_norm(block.T @ (gram @ block)) > _tolerance(gram):
            return None
    for _ in range(2):
        block = torch.linalg.qr(_solve(factor, block))[0]
    return block
