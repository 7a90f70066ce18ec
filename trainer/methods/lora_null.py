"""LoRA-Null: A0 and B0 from the null space of the calibration activations (`lora_null.initialize`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from lora_null.config import MULTIPLE, LoraNullConfig
from lora_null.initialize import finish_initialization
from lora_null.layer import active_adapter, keep_in_null_basis
from lora_null.solver import NullSpace, directions
from lora_null.start import InitOptions, rule_of
from lora_null.targets import check_layers
from lora_null.trainer.methods.base import Method, distinct_inputs, method
from lora_null.utils.errors import UserError

WIDEST = 0.45  # of d_in: N at the NB-LoRA paper's 99%, at most; how much it is turns out while calibrating


@method
class LoRANullV1(Method):
    """A0 and B0 from the null space, base W0 − s·B0A0; A and B train."""

    name = "lora-null-v1"
    variant: ClassVar[Literal["v1", "v2", "nb"]] = "v1"
    starts_in_files = True
    needs_gram = True

    def config(self, **adapter: Any) -> PeftConfig:
        return LoraNullConfig(variant=self.variant, **adapter)

    def saved_rank(self, r: int) -> int:
        return 2 * r

    def check(self, model: nn.Module) -> None:
        check_layers(model, self.layers(model), active_adapter(model))

    def rule_for(self, options: InitOptions) -> NullSpace:
        return rule_of(self.config(), options)

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        finish_initialization(model, active_adapter(model))


@method
class LoRANullV2(LoRANullV1):
    """A0 from the null space, B = 0, base untouched; B trains."""

    name = "lora-null-v2"
    variant = "v2"
    freezes_A = True  # of a trained plain LoRA too
    only_freezes = True

    def saved_rank(self, r: int) -> int:
        return r


@method
class NBLoRA(LoRANullV1):
    """A kept in the span of N, the k least used directions of the inputs, all through training; A and B train.

    Attributes:
        null_multiple, null_energy, start: of `LoraNullConfig`.
    """

    name = "nb-lora"
    variant = "nb"

    null_multiple: float | None = None
    null_energy: float | None = None
    start: str = "zero"

    def __post_init__(self) -> None:
        try:
            self.config()  # before a model loads
        except UserError as mistake:
            raise UserError(f"method.options.{self.name}.{mistake}") from None

    def config(self, **adapter: Any) -> PeftConfig:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return LoraNullConfig(variant=self.variant, **options, **adapter)

    def held_bytes(self, model: nn.Module) -> int:
        """Return the bytes of the bases, float16, one per input."""
        adapter, held = active_adapter(model), 0
        for layer in distinct_inputs(self.layers(model)).values():
            d_in = int(layer.in_features)
            by_rank = directions(layer.r[adapter], self.null_multiple or MULTIPLE)
            held += 2 * d_in * (by_rank if self.null_energy is None else round(WIDEST * d_in))
        return held

    def saved_rank(self, r: int) -> int:
        return 2 * r if self.start == "residual" else r


class KeepInNullBasis(TrainerCallback):
    """Puts every A that has a basis back into its span after each step; adapters that go on from an earlier trainer too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            keep_in_null_basis(model)  # ZeRO-3 loads the optimizer's own copy, which is not projected

    on_train_end = on_train_begin  # by when the best checkpoint may have been loaded

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        keep_in_null_basis(model, after_step=True)
