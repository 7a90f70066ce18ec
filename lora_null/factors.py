"""From a weight and a null space to the initial factors: pure tensor mathematics, nothing of models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # A (r, d_in) and B (d_out, r)


@dataclass(frozen=True)
class LayerStart:
    """What a rule finds for one layer.

    Attributes:
        A: (r, d_in), B: (d_out, r), with √s divided out of each, s PEFT's scaling.
        solver: what found them.
        energy, condition: see `LayerStats`; None where the rule does not tell.
        gram_rank: numerical rank of C = X Xᵀ; None where the rule does not tell.
        kernel: U, orthonormal, if Uᵀ X = 0 to the rounding of C; else None. See `projected_inputs`.
        basis: N (d_in, k), orthonormal, in whose span A is to stay; None where it is free. Layers that read the same
            input have the same tensor.
    """

    A: torch.Tensor
    B: torch.Tensor
    solver: str = ""
    energy: float | None = None
    condition: float | None = None
    gram_rank: int | None = None
    kernel: torch.Tensor | None = None
    basis: torch.Tensor | None = None


def null_factors(weight: torch.Tensor, null_space: torch.Tensor, scaling: float, r: int | None = None) -> LayerStart:
    """Factor the part of a weight that reads the null space.

    T = W0 U Uᵀ has rank k, and M = W0 U = P S Qᵀ gives T = P S (U Q)ᵀ: one thin SVD, no d_out × d_in product. The r
    leading triples are taken, all of them for r = k.
    Each row of A has its entry of largest magnitude positive, so equal inputs give equal factors whatever signs the SVD
    returns.

    Args:
        weight: W0, (d_out, d_in), any floating dtype.
        null_space: U, (d_in, k) with orthonormal columns.
        scaling: PEFT's s > 0; A and B are divided by √s each.
        r: rank of the factors, at most k and d_out; k when not given.

    Raises:
        ValueError: W0 has a number that is NaN or infinite, or T is zero to float64's rounding: factors to start from
            there are none, and with A = 0 nothing would ever train.
    """
    weight = weight.to(null_space)
    energy = weight.square().sum()
    if not energy.isfinite():
        raise ValueError("its weight has numbers that are NaN or infinite")
    Q, R = torch.linalg.qr(weight @ null_space)  # so that the SVD is of k × k only
    P, S, Qh = torch.linalg.svd(R, full_matrices=False)
    P, S, Qh = P[:, :r], S[:r], Qh[:r]
    eps = torch.finfo(S.dtype).eps
    if S[0] <= eps * energy.sqrt():
        raise ValueError("its weight is zero, or zero along the null space of its inputs")
    rows = Qh @ null_space.T  # (r, d_in)
    signs = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()  # (r, 1)
    root = (S / scaling).sqrt()
    lost = S[-1] <= len(S) * eps * S[0]
    return LayerStart(
        A=root[:, None] * rows * signs,
        B=Q @ P * signs.T * root,
        energy=(S.square().sum() / energy).item(),
        condition=float("inf") if lost else (S[0] / S[-1]).item(),
    )


def projected_inputs(A: torch.Tensor, gram: torch.Tensor, kernel: torch.Tensor | None = None) -> torch.Tensor:
    """Return L (r, r) with L Lᵀ = A X Xᵀ Aᵀ: the inputs as A sees them, from C = X Xᵀ.

    Args:
        A: (r, d_in).
        gram: C, (d_in, d_in) float64.
        kernel: U (d_in, r), orthonormal, where X has nothing along it at all. Then X sees of A only what rounding has
            moved out of U, and its square is below what a float64 C can tell from 0: the part in U is taken out first.
    """
    A = A.detach().to(gram)
    if kernel is not None:
        A = A - (A @ kernel) @ kernel.T
    values, vectors = torch.linalg.eigh(A @ gram @ A.T)
    F = vectors * values.clamp(min=0).sqrt()
    return F.contiguous()  # as one that was read from a file: the same bits in B L


def leakage(A: torch.Tensor, gram: torch.Tensor, projected: torch.Tensor | None = None) -> float:
    """Return ‖A X‖_F / (‖A‖_F ‖X‖_F) from C = X Xᵀ: how far A is from the null space, 0 inside it, at most 1.

    Args:
        A: (r, d_in).
        gram: C, (d_in, d_in) float64.
        projected: `projected_inputs(A, gram)`, if it is at hand.
    """
    seen = projected_inputs(A, gram) if projected is None else projected
    norm = torch.linalg.matrix_norm(A.detach().to(gram))
    return (torch.linalg.matrix_norm(seen) / (norm * gram.trace().sqrt())).item()


@dataclass(frozen=True)
class LayerStats:
    """One line of the layer report: how the initialization of one linear went. What was not measured is None.

    Attributes:
        name: the module's name in the base model.
        shape: (d_out, d_in) of the weight.
        r: rank of the adapter.
        tokens: calibration tokens that the input was measured on.
        gram_rank: numerical rank of C = X Xᵀ.
        leakage: ‖A0 X‖ / (‖A0‖ ‖X‖), of the factor as stored.
        energy: share of ‖W0‖² in s·B0A0 (LoRA-Null: in W0 U Uᵀ).
        condition: largest over smallest singular value of W0 U Uᵀ.
        solver: what found the factors.
        seconds: solving, factoring and writing this layer (its eigenspace counted where it was solved).
    """

    name: str
    shape: tuple[int, int]
    r: int
    tokens: int
    gram_rank: int | None
    leakage: float | None
    energy: float | None
    condition: float | None
    solver: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite condition is null, one that the rule does not tell is left out."""
        line = asdict(self)
        if self.condition is None:
            del line["condition"]
        elif not isfinite(self.condition):
            line["condition"] = None
        return line

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> LayerStats:
        condition = line.get("condition")
        if "condition" in line and condition is None:
            condition = float("inf")
        return cls(**{**line, "shape": tuple(line["shape"]), "condition": condition})
