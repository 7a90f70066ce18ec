"""Repair: an adapter that forgot is changed, without training, so that it leaves the knowledge alone and does what it learned.

Of a trained ΔW = s·BA, with C = X Xᵀ/N of what a layer reads on the texts to keep (k) and on the learned task (t), and c
the mean of C's diagonal, A becomes

    A' = argmin_Z ‖B (Z − A) X_t‖²/N_t + λ (c_t/c_k) ‖B Z X_k‖²/N_k = A C_t (C_t + λ (c_t/c_k) C_k)⁻¹

whatever B is, so long as its columns are independent. λ has no unit. Rank, scaling and B stay. Without a task C_t is the
identity: all directions count alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_null.adapters.saved import SavedAdapter
from lora_null.calibration import Unmeasured
from lora_null.factors import Pair
from lora_null.layerwise import measure_on_each
from lora_null.utils.errors import UserError

REPAIR_NOTE = "repair"  # in an adapter's metadata: a sentence about how it was repaired
# Of c_t, added to C_t's diagonal: directions that neither the task nor the texts use stay as they are, and A' stays small.
RIDGE = 1e-2


def repaired(A: torch.Tensor, keep: torch.Tensor, task: torch.Tensor | None, weight: float) -> torch.Tensor:
    """Return A' (r, d_in), in A's dtype, computed in float64 by one Cholesky factorization.

    Args:
        A: (r, d_in).
        keep: C_k, (d_in, d_in) float64.
        task: C_t, of the same shape; None for the identity.
        weight: λ ≥ 0; at 0 A' is A, and as it grows the texts' directions leave A one after the other, the strongest first.
    """
    identity = torch.eye(len(keep), dtype=keep.dtype, device=keep.device)
    task = identity if task is None else task
    size = task.diagonal().mean()
    counted = task + RIDGE * size * identity
    both = counted + weight * size / keep.diagonal().mean() * keep
    return torch.cholesky_solve(counted @ A.to(keep).T, torch.linalg.cholesky(both)).T.to(A)


def change(pair: Pair, gram: torch.Tensor) -> float:
    """Return ‖BA X‖²/N = tr(B A C Aᵀ Bᵀ), which forms nothing wider than r.

    Args:
        pair: A (r, d_in) and B (d_out, r).
        gram: C, (d_in, d_in) float64.
    """
    A, B = (factor.to(gram) for factor in pair)
    return float((A @ gram @ A.T * (B.T @ B)).sum())


@dataclass
class Repair:
    """A repaired adapter, and what is left of its change of the layers' outputs.

    Attributes:
        weight: λ.
        pairs: module name → A' and B.
        kept: Σ ‖s BA' X_k‖² / Σ ‖s BA X_k‖², over all layers: what is left of the change on the texts to keep.
        learned: the same on the learned task; None where no task was given.
    """

    weight: float
    pairs: dict[str, Pair]
    kept: float
    learned: float | None


@torch.no_grad()
def repair(
    model: nn.Module,
    adapter: SavedAdapter,
    keep: Sequence[Mapping[str, Any]],
    task: Sequence[Mapping[str, Any]] = (),
    *,
    weights: Sequence[float] = (1.0,),
) -> list[Repair]:
    """Repair an adapter at each of several weights, one decoder layer after the other; the Grams of one layer are held at a time.

    Args:
        model: the original base, without an adapter.
        adapter: of the base.
        keep: batches of the texts to keep: dicts with `input_ids` and `attention_mask`, (batch, length) each.
        task: batches of what the adapter learned; empty: all inputs count alike.
        weights: λ of each.

    Raises:
        UserError: as `SavedAdapter.pairs` and `measure_inputs`; a module whose inputs cannot be measured.
    """
    trained = adapter.pairs()
    found: list[dict[str, Pair]] = [dict(trained) for _ in weights]  # in the order of the file
    sets = [keep, task] if task else [keep]
    before, after = [0.0 for _ in sets], [[0.0 for _ in sets] for _ in weights]
    for names, grams in _mean_grams(model, adapter, sets):
        stacked = torch.cat([trained[name][0].to(grams[0].device) for name in names])  # one factorization serves all
        ranks = [len(trained[name][0]) for name in names]
        for weight, pairs in zip(weights, found):
            made = repaired(stacked, grams[0], grams[1] if task else None, weight).split(ranks)
            pairs |= {name: (new.to(trained[name][0]), trained[name][1]) for name, new in zip(names, made)}
        for i, gram in enumerate(grams):
            for name in names:
                before[i] += adapter.scaling(name) ** 2 * change(trained[name], gram)
                for pairs, sums in zip(found, after):
                    sums[i] += adapter.scaling(name) ** 2 * change(pairs[name], gram)
    left = [[now / then if then else 1.0 for now, then in zip(sums, before)] for sums in after]
    return [Repair(*made, of[0], of[1] if task else None) for *made, of in zip(weights, found, left)]


def _mean_grams(
    model: nn.Module, adapter: SavedAdapter, sets: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[tuple[str, ...], list[torch.Tensor]]]:
    """Yield the modules that read one input, with its C on every set of batches."""
    modules = {name: model.get_submodule(name) for name in adapter.factors()}
    try:
        with contextlib.closing(measure_on_each(model, modules, sets)) as parts:
            for part in parts:
                for inputs in part:
                    yield inputs[0].modules, [s.gram / s.tokens for s in inputs if s.gram is not None]
    except Unmeasured as error:
        raise UserError(
            f"{adapter.folder}: cannot be repaired, {error.reason}; it can be scaled (export --strength)"
        ) from None
