"""OPLoRA (Xiong et al., arXiv 2510.13003): LoRA outside of the leading singular directions of each weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lora_null.layer import active_adapter, factors_of
from lora_null.trainer.methods.base import Method, check_columns, check_count, check_no_dora, column_bytes, method
from lora_null.utils.errors import UserError
from lora_null.utils.limits import check_float64
from lora_null.utils.quantized import weight_of, why_unreadable


@method
class OPLoRA(Method):
    """ΔW = s·(I − U Uᵀ) B A (I − V Vᵀ) with the top k singular vectors U (d_out, k) and V (d_in, k) of W0.

    W0's top k singular triples are then W's too. A and B are kept projected instead of multiplied with the projections
    in each forward pass: at the start and after each optimizer step A ← A (I − V Vᵀ), B ← (I − U Uᵀ) B, and so are their
    gradients. That is the same training, since what the projections would hide of A and B never comes to be. U and V are
    computed when a training begins; they are in no checkpoint.

    Attributes:
        k: singular directions that are left alone.
    """

    name = "oplora"
    supports_sharding = False  # whole factors are projected
    constrains_delta = True

    k: int = 16

    def __post_init__(self) -> None:
        check_count(self, "k")

    def check(self, model: nn.Module) -> None:
        check_columns(self, model, self.k)
        check_no_dora(self, model)
        for name, layer in self.layers(model).items():
            if reason := why_unreadable(layer.get_base_layer()):
                raise UserError(f"target_modules: {name} {reason}")

    def held_bytes(self, model: nn.Module) -> int:
        return column_bytes(self, model, self.k)

    def callbacks(self) -> list[TrainerCallback]:
        return [_Project(self)]


class _Project(TrainerCallback):
    """Projects A and B, and what is added to their gradients."""

    def __init__(self, method: OPLoRA) -> None:
        self.method = method
        self.kept: list[tuple[nn.Parameter, nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self.hooks: list[Any] = []

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.release_hooks()
        adapter = active_adapter(model)
        check_float64(model.device)
        for layer in self.method.layers(model).values():
            A, B = factors_of(layer, adapter)
            U, _S, Vh = torch.linalg.svd(weight_of(layer).double(), full_matrices=False)
            U, V = U[:, : self.method.k].to(B), Vh[: self.method.k].T.to(A)
            self.kept.append((A, B, U.contiguous(), V.contiguous()))
            self.hooks += [
                A.register_hook(lambda grad, V=self.kept[-1][3]: without_rows(grad, V)),
                B.register_hook(lambda grad, U=self.kept[-1][2]: without_rows(grad.T, U).T),
            ]
        if not state.global_step:  # what a checkpoint holds is projected, and stays as it is to the last bit
            self._project()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        for A, B, U, V in self.kept:
            A.copy_(without_rows(A, V))
            B.copy_(without_rows(B.T, U).T)

    def release_hooks(self) -> None:
        """Take the hooks off the factors; the trainer does when a training has ended, in whatever way."""
        for hook in self.hooks:
            hook.remove()
        self.kept, self.hooks = [], []


def without_rows(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return rows (n, d) without what they have along the orthonormal columns of a basis (d, k)."""
    return rows - (rows @ basis) @ basis.T
