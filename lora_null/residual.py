"""PEFT models on a base W0 − s·B0A0: saving, merging and combining adapters give the change of W0."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft import LoraConfig, LoraModel, PeftModel
from torch import nn

from lora_null.config import ResidualLoraConfig
from lora_null.layer import LoraNullLinear, adapted_layers, check_beside_residual, factors_of, residual_of
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import replaced
from lora_null.utils.own_code import own_code_at
from lora_null.utils.quantized import is_quantized, why_unreadable


def subtract_residuals(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Turn every adapted weight W0 into W0 − s·BA, with the factors that the adapter has now; see `LoraNullLinear`.

    From then on whatever leaves the model (`save_pretrained`, `get_peft_model_state_dict`, a merge, a combination of
    adapters) is the change of the original weights.

    Raises:
        UserError: a weight that would not keep what is written to it, or a hook that would see the rest of it alone;
            nothing is changed then.
    """
    layers = adapted_layers(peft_model, adapter_name)
    check_no_head(peft_model, layers)
    for name, layer in layers.items():
        if reason := why_unreadable(layer.get_base_layer()) or why_hooked(layer.get_base_layer()):
            raise UserError(f"target_modules: {name} {reason}")
        for other in layer.r.keys() & peft_model.peft_config.keys() - {adapter_name}:
            if not is_quantized(layer.get_base_layer()):
                check_beside_residual(other, peft_model.peft_config[other], started=True)
    for layer in layers.values():
        layer.subtract_residual(adapter_name)
        layer.started |= {adapter_name}
    config = copy.copy(peft_model.peft_config[adapter_name])  # the caller's own may serve for a second model
    config.carries_residual = True
    peft_model.peft_config[adapter_name] = config
    peft_model.base_model.__class__ = ResidualLoraModel


def check_no_head(peft_model: PeftModel, layers: Mapping[str, nn.Module]) -> None:
    """Raise a UserError where the model's head, which PEFT saves beside an adapter of it, would be saved as W0 − s·B0A0."""
    head = getattr(peft_model.get_base_model(), "get_output_embeddings", lambda: None)()
    for name, layer in layers.items():
        if layer is head and not is_quantized(layer.get_base_layer()):
            raise UserError(
                f"target_modules: {name} is the model's head, whose weight is saved with its adapter and would lack the "
                "residual; leave it out (exclude_modules)"
            )


def why_hooked(base: nn.Module) -> str | None:
    """Return why a linear under an adapter may read or give something else than W0 x; None where it does not.

    PEFT puts A and B beside the linear: they read what no hook in front of it has changed, and a hook behind it sees
    what is left of W0.
    """
    code = own_code_at(base)
    where = "put it on the layer once the adapter is there, or leave the module out (exclude_modules)"
    return code and f"has {code} as a forward hook, which would see its base without the adapter; {where}"


class ResidualLoraModel(LoraModel):
    """PEFT's LoRA model, which combines adapters as what they do to the original weights."""

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As PEFT's; an adapter that counts from a residual enters with its plain factors, of rank 2r.

        PEFT puts the scalings into the new factors and makes the new config of the first adapter's: s is to be 1 there, not √r.
        """
        with contextlib.ExitStack() as stack:
            for name in adapters:
                if isinstance(config := self.peft_config.get(name), ResidualLoraConfig) and config.carries_residual:
                    stack.enter_context(self._plain(name))
            if first := self.peft_config.get(next(iter(adapters), "")):
                stack.enter_context(replaced(first, "use_rslora", False))
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    @contextlib.contextmanager
    def _plain(self, adapter_name: str) -> Iterator[None]:
        """Inside the block, give an adapter the plain factors [A; A0], [B, −B0] and a plain config of rank 2r."""
        config = self.peft_config[adapter_name]
        live = [
            (layer, residual, *factors_of(layer, adapter_name))
            for layer in self.model.modules()
            if isinstance(layer, LoraNullLinear) and (residual := residual_of(layer, adapter_name)) is not None
        ]
        self.peft_config[adapter_name] = LoraConfig(**config.to_dict())
        try:
            for layer, residual, A, B in live:
                plain = residual.joined(A.detach(), B.detach())
                _set_factors(layer, adapter_name, *(nn.Parameter(factor, requires_grad=False) for factor in plain))
                layer.residual_adapters -= {adapter_name}
            yield
        finally:
            for layer, _, A, B in live:
                _set_factors(layer, adapter_name, A, B)
                layer.residual_adapters |= {adapter_name}
            self.peft_config[adapter_name] = config


def _set_factors(layer: LoraNullLinear, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
    layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight = A, B
