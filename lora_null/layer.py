"""The PEFT layer of LoRA-Null: a LoRA linear whose base may carry a residual, and whose A may be frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.errors import UserError
from lora_null.quantized import is_quantized
from lora_null.sharding import is_sharded


class Residual(NamedTuple):
    """What is taken out of a base: W0' = W0 − scaling · B0 A0."""

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
    to the rounding of the weight's dtype. The residual is kept on the CPU, it is rarely needed.
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
        """Turn the base W0 into W0 − s·BA: its weight, in place, computed in float64 and rounded once.

        Args:
            adapter_name: the adapter that starts from these factors.
            A: (r, d_in).
            B: (d_out, r).

        Raises:
            RuntimeError: when the base already carries a residual.
        """
        if self.residual is not None:
            raise RuntimeError(f"the base already carries the residual of adapter {self.residual.adapter!r}")
        A0, B0 = (factor.detach().clone() for factor in (A, B))  # copies: A and B go on to be trained
        self.residual = self._take_out(Residual(adapter_name, A0, B0, self.scaling[adapter_name]))

    def restore_base(self) -> None:
        """Put s·B0A0 back into the base: W0 to the rounding of its dtype. Without a residual, do nothing."""
        if self.residual is not None:
            self._put_back(self.residual)
            self.residual = None

    def _take_out(self, residual: Residual) -> Residual:
        residual = residual._replace(A=residual.A.cpu(), B=residual.B.cpu())
        self._add_to_base(-residual.delta())
        return residual

    def _put_back(self, residual: Residual) -> None:
        self._add_to_base(residual.delta())

    @torch.no_grad()
    def _add_to_base(self, delta: torch.Tensor) -> None:
        weight = self.get_base_layer().weight
        delta = delta.T if self.fan_in_fan_out else delta
        weight.copy_((weight.double() + delta.to(weight.device)).to(weight.dtype))

    def _residual_takes_part(self) -> bool:
        """Return whether the adapter that the residual belongs to is in what the layer computes now."""
        taking_part = self.merged_adapters or self.active_adapters
        return self.residual is not None and not self.disable_adapters and self.residual.adapter in taking_part

    def _missing(self) -> int:
        """Return how often s·B0A0 x is to be added to what base and adapters give: once where it is left out of W0."""
        return int(self.residual is not None and not self._residual_takes_part())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._has_one_adapter(args, kwargs) and not self._missing():
            return self._plain_forward(x)
        if self.residual is not None and kwargs.get("adapter_names"):
            raise UserError("adapter_names: rows cannot choose their adapter while the base carries a residual")
        result = super().forward(x, *args, **kwargs)
        missing = self._missing()
        if not missing:
            return result
        A, B = (factor.to(x.device) for factor in (self.residual.A, self.residual.B))
        offset = nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B) * (missing * self.residual.scaling)
        return result + offset.to(result.dtype)

    def _has_one_adapter(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Return whether one live adapter without dropout is all there is: the case while training."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        plain = name in self.lora_A and name not in self.lora_variant
        whole = plain and not is_sharded(self.lora_A[name].weight)  # its own forward pass gathers it
        return whole and isinstance(self.lora_dropout[name], nn.Identity)

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
        hidden = _scaled(nn.functional.linear(x, A), scaling)
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
        if not (merge and self._residual_takes_part()):
            self.restore_base()
        return self.get_base_layer()


class LoraNullQuantizedLinear(LoraNullLinear):
    """The same on a base whose weight is stored quantized and is never written to.

    Under v1 the residual is a second, frozen low-rank path, W0 x + s·(B A x − B0 A0 x), for as long as its adapter takes
    part; disabling the adapter leaves exactly the base.
    """

    def _take_out(self, residual: Residual) -> Residual:
        return residual

    def _put_back(self, residual: Residual) -> None:
        """Leave the stored weight alone: nothing was taken out of it."""

    def _missing(self) -> int:
        return -int(self._residual_takes_part())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._residual_takes_part() and self._has_one_adapter(args, kwargs):
            return self._offset_forward(x)
        return super().forward(x, *args, **kwargs)

    def _offset_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W0 x + (s·B A x − s·B0 A0 x), the difference first: at the start it is exactly zero."""
        name = self.active_adapters[0]
        A, B, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if (self.residual.A.device, self.residual.A.dtype) != (A.device, A.dtype):  # the model was moved or cast
            self.residual = self.residual._replace(A=self.residual.A.to(A), B=self.residual.B.to(B))
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, A.dtype)
        now = nn.functional.linear(_scaled(nn.functional.linear(x, A), scaling), B)
        start = nn.functional.linear(_scaled(nn.functional.linear(x, self.residual.A), scaling), self.residual.B)
        return (result + (now - start)).to(result.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UserError("merge: the base is quantized, and its stored weights are left alone; merge into the original")


def _scaled(hidden: torch.Tensor, scaling: float) -> torch.Tensor:
    return hidden if scaling == 1 else hidden * scaling


def lora_null_layer(base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> LoraNullLinear:
    """Return the layer that suits a linear, plain or quantized."""
    base = base_layer.get_base_layer() if isinstance(base_layer, LoraLayer) else base_layer
    kind = LoraNullQuantizedLinear if is_quantized(base) else LoraNullLinear
    return kind(base_layer, adapter_name, config, **kwargs)
