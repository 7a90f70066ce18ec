"""Methods that move a part s·BA of each weight into the adapter: PiSSA, MiLoRA, CorDA.

They differ in the part alone. The base becomes W0 − s·B0A0 on `LoraNullLinear`, as for LoRA-Null-v1, so disabling the
adapter gives the original model back and what is saved is an exact rank-2r LoRA for it. PEFT has PiSSA and CorDA too,
but rewrites the base for good and saves factors that belong to W0 − s·B0A0 unless they are converted afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn

from lora_null.calibration import InputStats
from lora_null.config import ResidualLoraConfig
from lora_null.factors import LayerStart
from lora_null.layer import active_adapter
from lora_null.residual import check_no_head, subtract_residuals
from lora_null.solver import Rule
from lora_null.start import InitOptions
from lora_null.targets import check_fits, modules_sharing_weight
from lora_null.trainer.methods.base import Method, method
from lora_null.utils.errors import UserError


class ResidualMethod(Method):
    """What these methods have in common; a subclass computes `factors`."""

    supports_quantized_base = False
    room: ClassVar[int] = 1  # room · r may not exceed a layer's d_in or d_out

    @property
    def label(self) -> str:
        """The method with its options, where it has any: with others it starts elsewhere."""
        return repr(self) if fields(self) else self.name

    def config(self, **adapter: Any) -> PeftConfig:
        return ResidualLoraConfig(**adapter)

    def saved_rank(self, r: int) -> int:
        return 2 * r

    def check(self, model: nn.Module) -> None:
        """Raise a UserError for an r that a layer has no room for, the head, or a weight that another module holds too."""
        adapter, layers = active_adapter(model), self.layers(model)
        for name, others in modules_sharing_weight(model.get_base_model(), layers).items():
            raise UserError(
                f"target_modules: {name} shares its weight with {', '.join(others)}, {self.name} needs its own"
            )
        check_no_head(model, layers)
        for name, layer in layers.items():
            check_fits(name, layer, layer.r[adapter], times=self.room)

    def rule_for(self, options: InitOptions) -> Rule | None:
        return None if self.computes_whole else self

    def of_input(self, inputs: InputStats) -> Callable[[torch.Tensor, int, float], LayerStart]:
        """Return what gives the start of a layer that reads this input; see `lora_null.solver.Rule`.

        Raises:
            ValueError: by what is returned, for a weight with numbers that are NaN or infinite, and where both A and B
                are zero to float64's rounding of W0: neither would ever get a gradient.
        """
        prepared = self.prepare_input(inputs)

        def start(weight: torch.Tensor, r: int, scaling: float) -> LayerStart:
            weight = weight.double()
            whole = weight.square().sum()
            if not whole.isfinite():
                raise ValueError("its weight has numbers that are NaN or infinite")
            A, B = self.factors(weight, r, prepared)
            rounding = min(weight.shape) * torch.finfo(weight.dtype).eps * whole.sqrt()
            if not rounding < torch.maximum(A.norm(), B.norm()).square() < float("inf"):  # NaN too: CorDA's 0 / 0
                raise ValueError(
                    f"the part of its weight that {self.name} trains is zero, so nothing would ever train"
                )
            root = scaling**0.5
            energy = ((A @ A.T) * (B.T @ B)).sum() / whole  # ‖BA‖² from two r × r products
            return LayerStart(A / root, B / root, self.name, energy=float(energy))

        return start

    def prepare_input(self, inputs: InputStats) -> Any:
        """Return what all layers that read an input have in common, measured where `needs_gram`."""

    def factors(self, weight: torch.Tensor, r: int, prepared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (r, d_in) and B (d_out, r), float64, whose product leaves the base.

        Args:
            weight: W0, (d_out, d_in) float64.
            r: the rank.
            prepared: what `prepare_input` returned.
        """
        raise NotImplementedError

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write A0 and B0, where they were computed of the model as a whole; subtract s·B0A0."""
        super().apply(model, tensors)
        subtract_residuals(model, active_adapter(model))


@method
class PiSSA(ResidualMethod):
    """B = U√S, A = √S Vᵀ of the r largest singular values of W0 = U S Vᵀ (PEFT's `pissa`, exactly)."""

    name = "pissa"
    starts_in_files = True

    def factors(self, weight: torch.Tensor, r: int, prepared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return _balanced(U[:, :r], S[:r], Vh[:r])


@method
class MiLoRA(ResidualMethod):
    """PiSSA with the r smallest singular values; PEFT has none."""

    name = "milora"
    starts_in_files = True

    def factors(self, weight: torch.Tensor, r: int, prepared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return _balanced(U[:, -r:], S[-r:], Vh[-r:])


@method
class CorDA(ResidualMethod):
    """Knowledge-preserved mode: SVD(W0 C') = U S Vᵀ, its last r triples, B = U√S and A = √S Vᵀ C'⁻¹.

    C' = C + λ·mean(diag C)·I with λ = 0.01, 0.02, 0.04, … until ‖C'C'⁻¹ − I‖_F < 0.05, all in float64. C is X Xᵀ on the
    scale at which ‖A‖_F = ‖B‖_F. The scale of C leaves BA as it is, but with cC the factors are A/√c and √c·B, and Adam
    moves both by the learning rate: with the mean over tokens A came out 70 to 1,000 times larger than B on SmolLM2 and
    the loss doubled in three steps of 1e-3, with the sum over them the ratio depends on how many tokens there are.

    Ours, not PEFT's: PEFT's hook takes one sequence at a time and counts padding, divides each sample by its largest
    entry, sums in float32, and defaults to the other mode ("ipm"). On the same Gram matrix both move the same part.
    """

    name = "corda"
    starts_in_files = True
    needs_gram = True

    def prepare_input(self, inputs: InputStats) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.gram is None:
            raise ValueError("its input has no Gram matrix")
        return invertible(inputs.gram / inputs.tokens)

    def factors(self, weight: torch.Tensor, r: int, prepared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        covariance, inverse = prepared
        U, S, Vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
        A, B = _balanced(U[:, -r:], S[-r:], Vh[-r:] @ inverse)
        scale = (B.norm() / A.norm()).sqrt()
        return A * scale, B / scale


def invertible(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C' = C + λ·mean(diag C)·I and its inverse, with the first λ of CorDA's that inverts well.

    Raises:
        UserError: no λ up to 1e6 does: the matrix is not finite.
    """
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    damp = 0.01
    while damp < 1e6:
        shifted = covariance + damp * covariance.diagonal().mean() * eye
        inverse, failed = torch.linalg.inv_ex(shifted)
        if not failed and torch.dist(shifted @ inverse, eye) < 0.05:
            return shifted, inverse
        damp *= 2
    raise UserError("calibration: the covariance of a layer's inputs cannot be inverted (NaN or infinite)")


def _balanced(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = √S Vᵀ and B = U√S."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root
