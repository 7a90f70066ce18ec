"""The nearest adapter of a smaller rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lora_null.factors import Pair
from lora_null.magnitude import norm_of_product
from lora_null.utils.errors import UserError

MOST_LOST = 0.02  # of BA, where A and B are rounded to bfloat16: of balanced factors that takes 0.2%


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
    U, S, Vh = torch.linalg.svd(RB @ RA.T, full_matrices=False)
    root = S[:k].sqrt()
    whole = float(S.norm())
    error = float(S[k:].norm()) / whole if whole else 0.0
    A_k, B_k = root[:, None] * (Vh[:k] @ QA.T), (QB @ U[:, :k]) * root
    return _rows(A_k, k).to(A.dtype), _rows(B_k.T, k).T.contiguous().to(B.dtype), error


def lost_in_16_bits(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return what share of BA is lost where A and B are rounded to bfloat16, about, in the Frobenius norm; 0 where BA is 0.

    Each entry errs by up to 2⁻⁸ of itself, in the root mean square by 0.74 · 2⁻⁸/√3, so that the products of rows a_k and
    columns b_k err by 0.74 √(2/3) 2⁻⁸ ‖a_k‖‖b_k‖. Of balanced factors these are BA itself; a residual start's nearly cancel.
    """
    products = torch.linalg.norm(A.double(), dim=1) * torch.linalg.norm(B.double(), dim=0)
    whole = norm_of_product(A, B)
    return 0.74 * math.sqrt(2 / 3) * 2**-8 * float(products.norm()) / whole if whole else 0.0


def balanced_where_they_cancel(pairs: Mapping[str, Pair]) -> tuple[dict[str, Pair], float]:
    """Return factors of the same products and ranks, and the largest share that 16 bits take of a product as given.

    Where that is more than `MOST_LOST`, a product's factors are those of an SVD, exact to float32's rounding.
    """
    lost = {name: lost_in_16_bits(A, B) for name, (A, B) in pairs.items()}
    balanced = {name: truncate(*pairs[name], len(pairs[name][0]))[:2] for name in pairs if lost[name] > MOST_LOST}
    return {**pairs, **balanced}, max(lost.values())


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
