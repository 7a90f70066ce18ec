"""The nearest adapter of a smaller rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_null.factors import Pair
from lora_null.utils.errors import UserError


def truncate(A: torch.Tensor, B: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the best rank-k approximation of BA (Eckart–Young) as factors, and ‖BA − B_kA_k‖_F / ‖BA‖_F.

    The product is never formed: with B = Q R and Aᵀ = Q' R', the SVD is that of R R'ᵀ, r × r, in float64.

    Args:
        A: (r, d_in).
        B: (d_out, r).
        k: at most r.

    Returns:
        A_k (k, d_in) and B_k (d_out, k), balanced, in the dtype given; and the error, 0 where BA is 0.
    """
    QB, RB = torch.linalg.qr(B.double())
    QA, RA = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(RB @ RA.T)
    root = S[:k].sqrt()
    whole = float(S.norm())
    error = float(S[k:].norm()) / whole if whole else 0.0
    A_k, B_k = root[:, None] * (Vh[:k] @ QA.T), (QB @ U[:, :k]) * root
    return _rows(A_k, k).to(A.dtype), _rows(B_k.T, k).T.contiguous().to(B.dtype), error


def _rows(factor: torch.Tensor, k: int) -> torch.Tensor:
    """Return the factor with k rows: a layer narrower than k has fewer, the rest are zeros."""
    return torch.nn.functional.pad(factor, (0, 0, 0, k - len(factor)))


def check_rank(pairs: Mapping[str, Pair], k: int) -> None:
    """Raise a UserError for a k that is less than 1 or more than the adapter's rank."""
    rank = max(len(A) for A, _ in pairs.values())
    if not 1 <= k <= rank:
        raise UserError(f"--rank: {k} is not between 1 and the adapter's rank {rank}")


def truncate_all(pairs: Mapping[str, Pair], k: int) -> tuple[dict[str, Pair], dict[str, float]]:
    """Truncate every pair to rank k; return them, and each module's ‖ΔW − ΔW_k‖ / ‖ΔW‖.

    Raises:
        UserError: as `check_rank`.
    """
    check_rank(pairs, k)
    found = {name: truncate(A, B, k) for name, (A, B) in pairs.items()}
    return {name: (A, B) for name, (A, B, _) in found.items()}, {name: error for name, (_, _, error) in found.items()}
