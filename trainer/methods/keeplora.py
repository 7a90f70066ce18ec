"""KeepLoRA (Luo et al., arXiv 2601.19659): A from the task's gradient, outside of what the weights and the knowledge use."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.calibration import InputStats
from lora_null.layer import active_adapter
from lora_null.layerwise import measure_in_parts
from lora_null.start import InitOptions
from lora_null.trainer.methods.base import check_no_dora, check_option, method
from lora_null.trainer.methods.gradients import FromGradient, take_gradients
from lora_null.utils.distributed import broadcast_like, process_index, together
from lora_null.utils.errors import UserError
from lora_null.utils.quantized import weight_of


@method
class KeepLoRA(FromGradient):
    """A0 = the r leading right singular vectors of G (I − M Mᵀ), frozen; B = 0 trains; the base is untouched.

    G (d_out, d_in) is the gradient of the loss with respect to W0 on training rows. M (d_in, m) is an orthonormal basis
    of what is kept: the leading right singular vectors of W0, and the leading directions of what these leave of the
    knowledge's inputs X, until both hold `input_energy` of them. A does not move, so ΔW M = 0 all through training. In
    the paper X are the inputs of earlier tasks; here they are those of the calibration texts.

    Attributes:
        weight_energy: the share of ‖W0‖²_F that the singular vectors of M hold at most; 0 keeps none of them. The paper's
            code has 0.99, which leaves fewer than 32 of 576 directions of most of SmolLM2's gate and up projections.
        input_energy: the share of ‖X‖²_F that M holds at least.
    """

    name = "keeplora"
    freezes_A = True
    needs_gram = True
    supports_quantized_base = False

    weight_energy: float = 0.8
    input_energy: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_energy", "input_energy"):
            share = getattr(self, name)
            fits = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share < 1
            check_option(fits, f"{self.name}.{name}", "a share from 0 to below 1, such as 0.99", share)

    def costs(self) -> str:
        return f"before it trains, a backward pass over the first {self.rows} training rows and two over the calibration texts"

    def check(self, model: nn.Module) -> None:
        check_no_dora(self, model)

    def compute(self, trainer: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return A0 of every layer, the same on every process; each input is solved where its Gram is."""
        model, tensors = trainer.model, {}
        layers, adapter = self.layers(model), active_adapter(model)
        options: InitOptions = trainer.init_options_here()
        take_gradients(trainer, layers, batches)
        parts = measure_in_parts(model, layers, trainer.calibration_batches, **options.measuring)
        with torch.no_grad(), contextlib.closing(parts):
            for _, part in parts:
                for inputs in part.inputs:
                    found = together(lambda inputs=inputs: self._solve(inputs, layers, adapter))
                    for name in inputs.modules:
                        like = layers[name].lora_A[adapter].weight
                        tensors[f"{name}.lora_A"] = broadcast_like(found.get(name), like, inputs.owner)
        return tensors

    def _solve(self, inputs: InputStats, layers: Mapping[str, Any], adapter: str) -> dict[str, torch.Tensor]:
        """Return A0 of the layers that read an input, where its Gram is, and free their gradients."""
        found = {}
        for name in inputs.modules:
            base = layers[name].get_base_layer()
            gradient = base._peft_loraga_grad.T if isinstance(base, Conv1D) else base._peft_loraga_grad
            del base._peft_loraga_grad
            if inputs.owner != process_index() or inputs.gram is None:
                continue
            layer, r = layers[name], layers[name].r[adapter]
            kept = kept_directions(weight_of(layer), inputs.gram, self.weight_energy, self.input_energy)
            free = layer.in_features - kept.shape[1]
            if free < r:
                raise UserError(
                    f"method.options.{self.name}: {name} has only {free} directions outside of what is kept, fewer than "
                    f"r = {r}; lower weight_energy ({self.weight_energy:g}) or input_energy ({self.input_energy:g})"
                )
            found[name] = free_directions(gradient.to(kept), kept, r)
        return found


def kept_directions(weight: torch.Tensor, gram: torch.Tensor, of_weight: float, of_inputs: float) -> torch.Tensor:
    """Return M, (d_in, m) float64 with orthonormal columns.

    Args:
        weight: W0, (d_out, d_in).
        gram: C = X Xᵀ, (d_in, d_in) float64.
        of_weight: the share of ‖W0‖²_F that its first columns, right singular vectors of W0, hold at most.
        of_inputs: the share of tr C that all columns hold at least.
    """
    _, S, Vh = torch.linalg.svd(weight.to(gram), full_matrices=False)
    held = S.square().cumsum(0)
    principal = Vh[: int((held < of_weight * held[-1]).sum())].T
    rest = gram - principal @ (principal.T @ gram)
    rest = rest - (rest @ principal) @ principal.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = gram.trace()
    before = total - values.sum() + values.cumsum(0) - values  # what is held without each of them
    more = vectors[:, : int((before < of_inputs * total).sum())]
    return torch.linalg.qr(torch.cat([principal, more], dim=1)).Q


def free_directions(gradient: torch.Tensor, kept: torch.Tensor, r: int) -> torch.Tensor:
    """Return the r leading right singular vectors of G (I − M Mᵀ), (r, d_in), orthogonal to M to rounding.

    Where G has fewer than r singular values there, the others are any directions outside of M.

    Args:
        gradient: G, (d_out, d_in) float64.
        kept: M, (d_in, m) float64 with orthonormal columns, m <= d_in - r.
        r: the rank.
    """
    outside = torch.linalg.qr(kept, mode="complete").Q[:, kept.shape[1] :]
    _, _, Vh = torch.linalg.svd(gradient @ outside, full_matrices=len(gradient) < r)
    return Vh[:r] @ outside.T
