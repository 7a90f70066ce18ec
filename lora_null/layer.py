"""The PEFT layer of LoRA-Null: a LoRA linear whose base may carry a residual, and whose A may be frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.sharding import is_sharded


class Residual(NamedTuple):
    """What was taken out of a base weight: W0' = W0 − scaling · B0 A0. Kept on the CPU, it is rarely needed."""

    adapter: str
    A: torch.Tensor  # (r, d_in)
    B: torch.Tensor  # (d_out, r)
    scaling: float

    def delta(self) -> torch.Tensor:
        """Return scaling · B0 A0, (d_out, d_in), in float64."""
        return self.scaling * (self.B.double() @ self.A.double())


def adapted_layers(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the LoRA layers that carry the adapter, by the name of the module in the base model."""
    return {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def freeze_factor(layer: LoraLayer, part: str, adapter_name: str = "default") -> None:
    """Keep `lora_A` or `lora_B` out of training through PEFT's own record, which survives `set_adapter`."""
    frozen = {**layer.frozen_peft_weight_names}
    frozen[adapter_name] = tuple({*frozen.get(adapter_name, ()), part})
    layer.frozen_peft_weight_names = frozen
    layer._freeze_non_trainable_peft_weights(adapter_name)


class LoraNullLinear(Linear):
    """A `peft` LoRA linear that never shows a half-changed base.

    Under v1 the base weight is W0 − s·B0A0. Whenever the adapter that belongs to it does not take part (disabled,
    another adapter active, deleted, unloaded), the layer adds s·B0A0 back, so that what remains is the original model,
    to the rounding of the weight's dtype.
    """

    residual: Residual | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, Conv1D):  # as PEFT does for its own layers: GPT-2 stores its weights transposed
            config.fan_in_fan_out = kwargs["is_target_conv_1d_layer"] = True
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        if getattr(config, "variant", None) == "v2":
            self.freeze_A(adapter_name)

    def freeze_A(self, adapter_name: str) -> None:
        """Keep A out of training; see `freeze_factor`."""
        freeze_factor(self, "lora_A", adapter_name)

    def subtract_residual(self, adapter_name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        """Turn the base weight W0 into W0 − s·BA, in place, computed in float64 and rounded once.

        Args:
            adapter_name: the adapter that starts from these factors.
            A: (r, d_in).
            B: (d_out, r).

        Raises:
            RuntimeError: when the base already carries a residual.
        """
        if self.residual is not None:
            raise RuntimeError(f"the base already carries the residual of adapter {self.residual.adapter!r}")
        A0, B0 = (factor.detach().to("cpu", copy=True) for factor in (A, B))  # copies: A and B go on to be trained
        residual = Residual(adapter_name, A0, B0, self.scaling[adapter_name])
        self._add_to_base(-residual.delta())
        self.residual = residual

    def restore_base(self) -> None:
        """Put s·B0A0 back into the base weight: W0 to the rounding of its dtype. Without a residual, do nothing."""
        if self.residual is not None:
            self._add_to_base(self.residual.delta())
            self.residual = None

    @torch.no_grad()
    def _add_to_base(self, delta: torch.Tensor) -> None:
        weight = self.get_base_layer().weight
        delta = delta.T if self.fan_in_fan_out else delta
        weight.copy_((weight.double() + delta.to(weight.device)).to(weight.dtype))

    def _residual_is_compensated(self) -> bool:
        taking_part = self.merged_adapters or self.active_adapters
        return self.residual is None or (not self.disable_adapters and self.residual.adapter in taking_part)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._is_plain(args, kwargs):
            return self._plain_forward(x)
        result = super().forward(x, *args, **kwargs)
        if self._residual_is_compensated():
            return result
        A, B = (factor.to(x.device) for factor in (self.residual.A, self.residual.B))
        offset = nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B) * self.residual.scaling
        return result + offset.to(result.dtype)

    def _is_plain(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether one live adapter without dropout is all there is: the case while training."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        return (
            name in self.lora_A
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and not is_sharded(self.lora_A[name].weight)  # its own forward pass gathers it
            and self._residual_is_compensated()
        )

    def _plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W x + B (s · A x) as PEFT does, without its passes over wide tensors.

        The scaling multiplies the r-wide tensor; the sum is taken into the base's output while B multiplies; under
        autocast x is not cast up to the adapter's dtype first, only to be cast down again. Where A is frozen nothing but
        A x, r wide, is kept for the backward pass.
        """
        name = self.active_adapters[0]
        A, B, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, A.dtype)
        hidden = nn.functional.linear(x, A)
        if scaling != 1:
            hidden = hidden * scaling
        if hidden.dtype == B.dtype == result.dtype:
            flat = torch.addmm(result.view(-1, result.shape[-1]), hidden.view(-1, hidden.shape[-1]), B.T)
            return flat.view(result.shape)
        return (result + nn.functional.linear(hidden, B)).to(result.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.residual is not None and self.residual.adapter == adapter_name:
            self.restore_base()
        super().delete_adapter(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give back the base layer, as PEFT's `merge_and_unload` and `unload` ask: merged, or the original."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not (merge and self._residual_is_compensated()):
            self.restore_base()
        return self.get_base_layer()
