"""LoRA-Null, which the trainer itself initializes (`lora_null.initialize`), on all ranks together."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from lora_null.config import LoraNullConfig
from lora_null.initialize import check_layers
from lora_null.layer import active_adapter
from lora_null.trainer.methods.base import Method, method


@method
class LoRANullV1(Method):
    """A0 and B0 from the null space, base W0 − s·B0A0; A and B train."""

    name = "lora-null-v1"
    needs_gram = layer_by_layer = True

    def config(self, **adapter: Any) -> PeftConfig:
        return LoraNullConfig(variant=self.name[-2:], **adapter)

    def saved_rank(self, r: int) -> int:
        return 2 * r

    def check(self, model: nn.Module) -> None:
        check_layers(model, self.layers(model), active_adapter(model))


@method
class LoRANullV2(LoRANullV1):
    """A0 from the null space, B = 0, base untouched; B trains."""

    name = "lora-null-v2"

    def saved_rank(self, r: int) -> int:
        return r
