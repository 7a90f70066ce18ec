"""How far a model has moved from its base: ‖ΔW X‖_F / ‖W0 X‖_F per layer without a forward pass, and its predictions' KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_null.calibration import Calibration, to_floats
from lora_null.factors import projected_inputs
from lora_null.layer import adapted_layers, factors_of, residual_of
from lora_null.utils.distributed import device_of
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import full_precision
from lora_null.utils.quantized import weight_of
from lora_null.utils.sharding import whole_parameters


def token_kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return KL(base ‖ model) in nats at each token, (tokens,), from log-probabilities, both (tokens, vocabulary).

    A token that the base rules out adds nothing, whatever the model gives it: 0 · log 0 is 0, also in the gradient.
    """
    terms = F.kl_div(model, base, reduction="none", log_target=True)
    return terms.masked_fill_(base == -torch.inf, 0).sum(-1, dtype=torch.float64)


@dataclass
class _Probe:
    """What one layer's drift needs of the calibration inputs X.

    Attributes:
        inputs: key in the meter of S (d_in, k) with E[S Sᵀ] = X Xᵀ, which layers that read one input share; or, where A
            is frozen, of L (r, r) with L Lᵀ = A X Xᵀ Aᵀ exactly.
        projected: whether they are L, already seen through A.
        scale: 1 / ‖W0 X‖_F.
        start: of a layer on a residual base, B0 A0 S (d_out, k), which never changes.
    """

    inputs: str
    projected: bool
    scale: float
    start: torch.Tensor | None = None


class _Meter:
    """What both meters share: a summary of `measure`."""

    def measure(self) -> dict[str, float]:
        raise NotImplementedError

    def summary(self) -> dict[str, float]:
        """Return {"mean", "max"} of the drift over the layers."""
        values = list(self.measure().values())
        return {"mean": sum(values) / len(values), "max": max(values)}


class DriftMeter(_Meter):
    """Measures how far the adapted weights move the outputs on the calibration inputs.

    With ΔW = W* − W0, drift = ‖ΔW X‖_F / ‖W0 X‖_F; the denominator is measured exactly during calibration. Where A is
    frozen and Grams were measured (v2) the numerator is exact too, from the r × r matrix A X Xᵀ Aᵀ; elsewhere (LoRA-FA
    too, which starts without them) it is the unbiased estimate ‖ΔW S‖²_F from a sketch of 64 columns, the same columns
    for every method of a run. A layer with W0 X = 0, such as one of zeros that was added to a model, has no drift in
    this sense and is left out.

    Args:
        peft_model: the model whose adapter is followed.
        calibration: of the inputs, from `measure_inputs`; with Grams where A is frozen, else sketches are used.
        adapter_name: the adapter.
    """

    def __init__(self, peft_model: PeftModel, calibration: Calibration, *, adapter_name: str = "default") -> None:
        self.layers = _with_outputs(adapted_layers(peft_model, adapter_name), calibration)
        self.adapter_name = adapter_name
        self.inputs: dict[str, torch.Tensor] = {}
        self.probes = {name: self._probe(layer, name, calibration) for name, layer in self.layers.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return each layer's drift by name, 0 before the first step. All processes of a sharded model call it."""
        found = {}
        for name, layer in self.layers.items():
            with whole_parameters(layer.lora_A, layer.lora_B), full_precision(device_of(layer.lora_A)):
                found[name] = self._layer_drift(layer, self.probes[name])
        return dict(zip(found, to_floats(found.values())))

    def _layer_drift(self, layer: LoraLayer, probe: _Probe) -> torch.Tensor:
        # In 16 bits the rounding of the inputs alone would leave the null space as far as A's own does.
        A, B = (
            factor.to(torch.promote_types(factor.dtype, torch.float32))
            for factor in factors_of(layer, self.adapter_name)
        )
        self.inputs[probe.inputs] = self.inputs[probe.inputs].to(A.device)
        inputs = self.inputs[probe.inputs].to(A.dtype)
        moved = B @ (inputs if probe.projected else A @ inputs)
        residual = residual_of(layer, self.adapter_name)
        if residual is not None:
            if probe.start is None:
                probe.start = residual.B.to(B) @ (residual.A.to(A) @ inputs)
            moved = moved - probe.start
        return layer.scaling[self.adapter_name] * probe.scale * torch.linalg.matrix_norm(moved.float())

    def _probe(self, layer: LoraLayer, name: str, calibration: Calibration) -> _Probe:
        stats = calibration.input_of(name)
        scale = calibration.output_energy[name] ** -0.5
        A = layer.lora_A[self.adapter_name].weight
        frozen = "lora_A" in layer.frozen_peft_weight_names.get(self.adapter_name, ())  # an inactive one trains later
        if frozen and (name in calibration.projected or stats.gram is not None):
            projected = calibration.projected.get(name)
            self.inputs[name] = projected_inputs(A, stats.gram) if projected is None else projected
            return _Probe(name, True, scale)
        shared = f"S of {stats.modules[0]}"
        if shared not in self.inputs:
            self.inputs[shared] = stats.sketch.float()
        return _Probe(shared, False, scale)


class WeightDriftMeter(_Meter):
    """The same drift where no low-rank factors hold the change: ‖W S − W0 S‖ / ‖W0 X‖, from the sketch of 64 columns.

    W0 S (d_out, 64) is stored at the start, so no second copy of the weights is kept.

    Args:
        layers: linears, or PEFT layers with `get_delta_weight`, by name; where their weights are still in their files,
            `begin` is called once they are there, unchanged.
        calibration: of their inputs; sketches are enough.
    """

    def __init__(self, layers: Mapping[str, nn.Module], calibration: Calibration) -> None:
        self.layers = _with_outputs(layers, calibration)
        self.sketches = calibration.sketches(self.layers)
        self.scales = {name: calibration.output_energy[name] ** -0.5 for name in self.layers}
        self.starts: dict[str, torch.Tensor] = {}
        if not any(parameter.is_meta for layer in self.layers.values() for parameter in layer.parameters()):
            self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Store W0 S. All processes of a sharded model call it."""
        for name, layer in self.layers.items():
            with whole_parameters(layer), full_precision(device_of(layer)):
                self.starts[name] = _outputs(layer, self.sketches[name])

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return each layer's drift by name, 0 before the first step. All processes of a sharded model call it."""
        found = {}
        for name, layer in self.layers.items():
            with whole_parameters(layer), full_precision(device_of(layer)):
                moved = self._moved(name, layer)
            found[name] = self.scales[name] * torch.linalg.matrix_norm(moved)
        return dict(zip(found, to_floats(found.values())))

    def _moved(self, name: str, layer: nn.Module) -> torch.Tensor:
        """Return W S − W0 S, (d_out, 64), of a layer whose weight is whole."""
        now = _outputs(layer, self.sketches[name])
        return now - self.starts[name].to(now)


def _with_outputs(layers: Mapping[str, nn.Module], calibration: Calibration) -> dict[str, nn.Module]:
    """Return the layers that the calibration inputs reach with a W0 X other than zero, by which a drift can be divided."""
    found = {name: layer for name, layer in layers.items() if calibration.output_energy[name] > 0}
    if layers and not found:
        raise UserError("drift: no adapted layer gives anything but zero on the calibration texts")
    return found


@torch.no_grad()
def _outputs(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return W S in float32, (d_out, k), of a linear or of a PEFT layer with its change."""
    if isinstance(layer, BaseTunerLayer):
        weight = layer.get_base_weight() + layer.get_delta_weight(layer.active_adapters[0])
    else:
        weight = weight_of(layer)
    return weight.float() @ inputs.to(weight.device)
