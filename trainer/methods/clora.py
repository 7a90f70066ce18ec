"""CLoRA (Lu et al., ACL 2025): LoRA that is held out of fixed random subspaces by a penalty."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lora_null.layer import active_adapter, factors_of
from lora_null.trainer.methods.base import (
    Method,
    MicroBatch,
    Term,
    check_columns,
    check_count,
    check_option,
    column_bytes,
    method,
)


@method
class CLoRA(Method):
    """LoRA with λ/2·Σ(‖A P‖² + ‖Qᵀ B‖²) over the layers added to the loss of each step.

    P (d_in, k) and Q (d_out, k) are a layer's own, with random orthonormal columns that never change. They are drawn from
    the run's seed and the layer's name, so they are in no checkpoint, and a resumed run has them again.

    Attributes:
        weight: λ.
        k: columns of P and Q.
    """

    name = "clora"
    supports_sharding = False  # the penalty multiplies whole factors
    constrains_delta = True
    terms = ("subspace_penalty",)

    weight: float = 1.0
    k: int = 128

    def __post_init__(self) -> None:
        check_option(0 < self.weight < float("inf"), f"{self.name}.weight", "a number above 0", self.weight)
        check_count(self, "k")
        self.bases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def check(self, model: nn.Module) -> None:
        check_columns(self, model, self.k)

    def held_bytes(self, model: nn.Module) -> int:
        return column_bytes(self, model, self.k)

    def callbacks(self) -> list[TrainerCallback]:
        return [_DrawAnew(self)]

    def extra_loss(self, trainer: Any, model: nn.Module, micro_batch: MicroBatch) -> dict[str, Term]:
        if micro_batch.index:
            return {}
        adapter, total = active_adapter(trainer.model), 0.0
        for name, layer in self.layers(trainer.model).items():
            A, B = factors_of(layer, adapter)
            P, Q = self._bases_of(name, A, B, trainer.args.seed)
            with torch.autocast(A.device.type, enabled=False):
                penalty = ((A @ P).square().sum() + (Q.T @ B).square().sum()) / 2
            total = total + penalty.to(trainer.args.device)
        return {"subspace_penalty": Term(total, self.weight)}

    def _bases_of(self, name: str, A: torch.Tensor, B: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.bases:
            drawn = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(drawn[:4]))  # of a seed the CPU's reads 32 bits
            sizes = (A.shape[1], B.shape[0])
            P, Q = (torch.linalg.qr(torch.randn(d, self.k, generator=generator, dtype=torch.float64)).Q for d in sizes)
            self.bases[name] = (P.to(A), Q.to(B))
        return self.bases[name]


class _DrawAnew(TrainerCallback):
    """Forgets P and Q when a training begins: another may have had another seed or other layers."""

    def __init__(self, method: CLoRA) -> None:
        self.method = method

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.method.bases.clear()
