"""How far training moved each weight, ‖ΔW‖_F beside ‖W0‖_F: the size of a change, whatever its directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_null.layer import LoraNullLinear, factors_of, residual_of
from lora_null.utils.quantized import weight_of
from lora_null.utils.sharding import whole_parameters


class Change(NamedTuple):
    """Frobenius norms of one weight."""

    moved: float  # ‖ΔW‖ of ΔW = W − W0
    start: float  # ‖W0‖


@torch.no_grad()
def weight_changes(
    layers: Mapping[str, nn.Module],
    adapter_name: str = "default",
    original: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, Change]:
    """Return how far each weight is from the original model's, in float64, by module name.

    A low-rank change is measured by r × r products of its factors, without forming ΔW. All processes of a
    sharded model call this together, and each gets the same but for a plain linear of which it has no `original`.

    Args:
        layers: what changed: PEFT's layers, LoRA's or any whose `get_delta_weight` is known, and plain linears.
        adapter_name: of PEFT's layers.
        original: returns W0 (d_out, d_in) of a plain linear, by name; only those need it.
    """
    found = {}
    for name, layer in layers.items():
        with whole_parameters(layer):
            found[name] = _change(layer, name, adapter_name, original)
    return found


def _change(layer: nn.Module, name: str, adapter_name: str, original: Callable[[str], torch.Tensor] | None) -> Change:
    if isinstance(layer, LoraLayer):
        weight = layer.get_base_weight() if isinstance(layer, LoraNullLinear) else weight_of(layer)
        if adapter_name in layer.lora_magnitude_vector:
            return Change(_norm(_dora_weight(layer, adapter_name, weight) - weight.double()), _norm(weight))
        return Change(abs(layer.scaling[adapter_name]) * _factors_moved(layer, adapter_name), _norm(weight))
    weight = weight_of(layer)
    if isinstance(layer, BaseTunerLayer):
        return Change(_norm(delta_of(layer, adapter_name)), _norm(weight))
    if original is None:
        return Change(float("nan"), float("nan"))
    start = original(name)
    return Change(_norm(weight.double() - start.to(weight.device).double()), _norm(start))


def _factors_moved(layer: LoraLayer, adapter_name: str) -> float:
    """Return ‖BA − B0A0‖ from two products of 2r × 2r, with B0A0 = 0 where nothing was taken out of the base.

    BA − B0A0 = [B − B0, B0] [A; A − A0], whose factors are small where the change is: nothing cancels.
    """
    A, B = (factor.detach().double() for factor in factors_of(layer, adapter_name))
    residual = residual_of(layer, adapter_name)
    if residual is not None:
        A0, B0 = residual.A.to(A), residual.B.to(B)
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    return norm_of_product(A, B)


def norm_of_product(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return ‖BA‖_F in float64, from products of r × r: A is (r, d_in), B is (d_out, r)."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def _dora_weight(layer: LoraLayer, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return m · (W0 + s·BA) / ‖W0 + s·BA‖, (d_out, d_in) float64, with the norm of every row."""
    A, B = (factor.detach().double() for factor in factors_of(layer, adapter_name))
    whole = weight.double() + layer.scaling[adapter_name] * (B @ A)
    magnitude = layer.lora_magnitude_vector[adapter_name].weight.double().view(-1, 1)
    return magnitude * whole / torch.linalg.vector_norm(whole, dim=1, keepdim=True)


def delta_of(layer: BaseTunerLayer, adapter_name: str) -> torch.Tensor:
    """Return ΔW (d_out, d_in) of a PEFT layer that keeps no LoRA factors; of OFT, W0 (Rᵀ − I) by its rotation R."""
    delta = layer.get_delta_weight(adapter_name)
    if isinstance(layer, OFTLayer):  # `get_delta_weight` gives the rotation itself, of the inputs
        rotation = delta.double()
        eye = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
        delta = weight_of(layer).to(rotation) @ (rotation.T - eye)
    return delta


def _norm(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
