"""LoRA-Null: A0 and B0 from the null space of the calibration activations (`lora_null.initialize`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from lora_null.config import LoraNullConfig
from lora_null.initialize import check_layers, finish_initialization
from lora_null.layer import active_adapter
from lora_null.solver import NullSpace
from lora_null.start import InitOptions
from lora_null.trainer.methods.base import Method, method


@method
class LoRANullV1(Method):
    """A0 and B0 from the null space, base W0 − s·B0A0; A and B train."""

    name = "lora-null-v1"
    needs_gram = True

    def config(self, **adapter: Any) -> PeftConfig:
        return LoraNullConfig(variant=self.name[-2:], **adapter)

    def saved_rank(self, r: int) -> int:
        return 2 * r

    def check(self, model: nn.Module) -> None:
        check_layers(model, self.layers(model), active_adapter(model))

    def rule_for(self, options: InitOptions) -> NullSpace:
        return NullSpace(options.solver, options.seed)

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        finish_initialization(model, active_adapter(model))


@method
class LoRANullV2(LoRANullV1):
    """A0 from the null space, B = 0, base untouched; B trains."""

    name = "lora-null-v2"

    def saved_rank(self, r: int) -> int:
        return r
