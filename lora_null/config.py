"""`LoraNullConfig`: a `peft.LoraConfig` that says which form of LoRA-Null to start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.layer import lora_null_layer
from lora_null.utils.errors import UserError

VARIANTS = ("v1", "v2")

# PEFT features that change what an adapter computes; LoRA-Null's equations hold for W0 x + s·B(A x) alone.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "the saved rank-2r adapter has no place for a bias",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "alora_invocation_tokens": "aLoRA adapts only some tokens",
    "layer_replication": "replicated layers share one weight",
    "target_parameters": "only linear modules have a measured input",
    "eva_config": "EVA is another initialization",
    "corda_config": "CorDA is another initialization",
    "lora_ga_config": "LoRA-GA is another initialization",
    "arrow_config": "Arrow mixes several adapters",
    "kasa_config": "KaSA changes the base weight",
    "velora_config": "VeLoRA compresses the saved inputs",
    "monteclora_config": "MonteCLoRA samples the adapter",
    "use_bdlora": "BD-LoRA's factors are block diagonal",
}


@dataclass
class ResidualLoraConfig(LoraConfig):
    """A `peft.LoraConfig` that puts `LoraNullLinear` on the model, whose base may carry a residual.

    What it saves is the config of the plain adapter for the original model: of rank 2r where there is a residual.
    """

    carries_residual = False  # of the model that it is in; no field, so that a new config never has it

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: lora_null_layer, Conv1D: lora_null_layer})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the plain LoRA config that is saved."""
        fields = super().to_dict()
        if self.carries_residual:  # all ranks double, all scalings stay
            more = math.sqrt(2) if self.use_rslora else 2
            fields |= {"r": 2 * self.r, "lora_alpha": more * self.lora_alpha}
            fields["rank_pattern"] = {key: 2 * r for key, r in (self.rank_pattern or {}).items()}
            fields["alpha_pattern"] = {key: more * alpha for key, alpha in (self.alpha_pattern or {}).items()}
            fields |= {"init_lora_weights": True, "lora_ga_config": None}  # how it started is no part of what it is
        return fields


@dataclass
class LoraNullConfig(ResidualLoraConfig):
    """Configuration of a LoRA adapter that starts in the null space of the calibration activations.

    Every argument is `peft.LoraConfig`'s, and what it saves is a plain LoRA config. Two defaults differ: `lora_alpha`
    is `r` (the paper's scaling s = 1) and `target_modules` is "all-linear" (the paper's seven linears of a block).

    Args:
        variant: "v2" (default) freezes A and trains B: the base is left untouched, B starts at zero. "v1" trains A and
            B from the factors of W0 U Uᵀ, on the base W0 − s·B0A0 (paper, section 3.3).

    Raises:
        UserError: for a PEFT feature with which LoRA-Null's equations do not hold.
    """

    lora_alpha: int | None = field(default=None, metadata={"help": "Scaling numerator; r when not given (s = 1)."})
    variant: Literal["v1", "v2"] = field(default="v2", metadata={"help": "v1 trains A and B, v2 trains B alone."})

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if self.target_modules is None:
            self.target_modules = "all-linear"
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"variant: {self.variant!r} is not one of {', '.join(VARIANTS)}")
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if not isinstance(rank, int) or rank < 1:
                raise UserError(f"r: a rank is a whole number of at least 1, not {rank!r}")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise UserError(f"lora_alpha: the numerator of the scaling is a number above 0, not {alpha!r}")
        if self.variant == "v1" and self.lora_dropout > 0:
            raise UserError(
                "lora_dropout: v1 needs 0, since dropping inputs of B0A0 alone would change the base model"
            )
        if self.init_lora_weights is not True:
            raise UserError(f"init_lora_weights: LoRA-Null sets the weights itself, remove {self.init_lora_weights!r}")
        if self.bias != "none":
            raise UserError(f"bias: must be 'none' (found {self.bias!r}), a plain adapter carries no bias")
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise UserError(f"{name}: not supported with LoRA-Null, {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a plain LoRA config: nothing that PEFT alone would not understand is ever saved."""
        plain = super().to_dict()
        plain.pop("variant")
        return plain

    @classmethod
    def from_peft_type(cls, **fields: Any) -> Any:
        """Return the `LoraNullConfig` of a saved LoRA's fields, so that `from_pretrained` reads a saved adapter as one.

        With it a saved adapter goes on training with A frozen (variant "v2") or with both factors ("v1"):

            config = LoraNullConfig.from_pretrained("out/adapter", variant="v2")
            model = PeftModel.from_pretrained(base, "out/adapter", config=config, is_trainable=True)
        """
        fields.pop("peft_type", None)  # which would make it PEFT's own class
        return super().from_peft_type(**fields)
