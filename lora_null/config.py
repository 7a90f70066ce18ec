"""`LoraNullConfig`: a `peft.LoraConfig` that says which form of LoRA-Null to start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.layer import NO_BASIS, lora_null_layer
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError

VARIANTS = ("v1", "v2", "nb")
STARTS = ("zero", "residual")
logger = get_logger(__name__)
MULTIPLE = 4  # directions of N for each rank, where nothing else is asked for

# PEFT features that change what an adapter computes; LoRA-Null's equations hold for W0 x + s·B(A x) alone.
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the whole weight",
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
# Of these, what would run the base W0 − s·B0A0 without its adapter, or replace W0.
ALTER_THE_BASE = ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")


@dataclass
class ResidualLoraConfig(LoraConfig):
    """A `peft.LoraConfig` that puts `LoraNullLinear` on the model, whose base may carry a residual.

    What it saves is the config of the plain adapter for the original model: of rank 2r where there is a residual.

    Raises:
        UserError: for dropout on a residual base, or for a bias of B.
    """

    carries_residual = False  # of the model that it is in; no field, so that a new config never has it
    starts_from_residual = True

    def __post_init__(self) -> None:
        if not 0 <= _number(self.lora_dropout) < 1:
            raise UserError(f"lora_dropout: a share from 0 to below 1, not {self.lora_dropout!r}")
        if self.starts_from_residual and self.lora_dropout > 0:
            raise UserError(
                "lora_dropout: a residual base needs 0, since dropping inputs of B0A0 alone would change the base model"
            )
        for name in ALTER_THE_BASE if self.starts_from_residual else ():
            if getattr(self, name, None):
                raise UserError(f"{name}: not on a residual base, {_UNSUPPORTED[name]}")
        if self.lora_bias:
            raise UserError("lora_bias: not supported, the saved rank-2r adapter has no place for a bias")
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
    is `r` (the paper's scaling s = 1; s = √r with `use_rslora`) and `target_modules` is "all-linear" (the paper's seven
    linears of a block).

    Args:
        variant: "v2" (default) freezes A and trains B: the base is left untouched, B starts at zero. "v1" trains A and
            B from the factors of W0 U Uᵀ, on the base W0 − s·B0A0 (paper, section 3.3). "nb" (null basis) trains A and
            B, and keeps A in the span of N (d_in, k), the k least used directions of the inputs, all through training.
        null_multiple: of "nb": k = null_multiple · r; 4 when neither this nor `null_energy` is given.
        null_energy: of "nb", instead: N is what lies outside the top directions that hold this share of the inputs'
            energy, so that k differs from layer to layer. NB-LoRA's is 0.99.
        start: of "nb": "zero" (default) starts with B = 0 on the untouched base; "residual" starts A and B from the
            best rank-r approximation of W0 N Nᵀ, on the base W0 − s·B0A0, as v1 does.

    Raises:
        UserError: for a PEFT feature with which LoRA-Null's equations do not hold, or for a value that cannot be.
    """

    lora_alpha: int | None = field(default=None, metadata={"help": "Scaling numerator; r when not given (s = 1)."})
    variant: Literal["v1", "v2", "nb"] = field(
        default="v2", metadata={"help": "v1 trains A and B, v2 trains B alone, nb trains A and B with A kept in N."}
    )
    null_multiple: float | None = field(default=None, metadata={"help": "nb: N has this many times r directions."})
    null_energy: float | None = field(default=None, metadata={"help": "nb: share of the inputs' energy outside N."})
    start: Literal["zero", "residual"] = field(default="zero", metadata={"help": "nb: B = 0, or v1's residual base."})

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = self.r
        if self.target_modules is None:
            if self.layers_to_transform is not None:
                raise UserError(
                    "layers_to_transform: goes with a list of target_modules, such as ['q_proj', 'v_proj']"
                )
            self.target_modules = "all-linear"
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"variant: {self.variant!r} is not one of {', '.join(VARIANTS)}")
        self._check_null_basis()
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name) or {}, dict):
                raise UserError(f"{name}: a dict of module names, not {getattr(self, name)!r}")
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"r: a rank is a whole number of at least 1, not {rank!r}")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if not 0 < _number(alpha) < math.inf:
                raise UserError(f"lora_alpha: the numerator of the scaling is a number above 0, not {alpha!r}")
        if self.init_lora_weights is not True:
            raise UserError(f"init_lora_weights: LoRA-Null sets the weights itself, remove {self.init_lora_weights!r}")
        if self.bias != "none":
            raise UserError(f"bias: must be 'none' (found {self.bias!r}), a plain adapter carries no bias")
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise UserError(f"{name}: not supported with LoRA-Null, {reason}")

    def _check_null_basis(self) -> None:
        if self.start not in STARTS:
            raise UserError(f"start: {self.start!r} is not one of {', '.join(STARTS)}")
        if self.variant != "nb":
            given = {"null_multiple": self.null_multiple, "null_energy": self.null_energy}
            given["start"] = None if self.start == "zero" else self.start
            for name in (name for name, value in given.items() if value is not None):
                raise UserError(f"{name}: is of variant 'nb', this one is {self.variant!r}")
        if self.null_multiple is not None and self.null_energy is not None:
            raise UserError("null_multiple: gives the directions of N, as null_energy does; give one of the two")
        if self.null_multiple is not None and not 1 <= _number(self.null_multiple) < math.inf:
            raise UserError(
                f"null_multiple: N needs r directions, so a number of at least 1, not {self.null_multiple!r}"
            )
        if self.null_energy is not None and not 0 < _number(self.null_energy) < 1:
            raise UserError(f"null_energy: a share between 0 and 1, such as 0.99, not {self.null_energy!r}")

    @property
    def starts_from_residual(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the base becomes W0 − s·B0A0."""
        return self.variant == "v1" or (self.variant == "nb" and self.start == "residual")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a plain LoRA config: nothing that PEFT alone would not understand is ever saved."""
        plain = super().to_dict()
        for name in ("variant", "null_multiple", "null_energy", "start"):
            plain.pop(name)
        return plain

    @classmethod
    def from_peft_type(cls, **fields: Any) -> Any:
        """Return the `LoraNullConfig` of a saved LoRA's fields, so that `from_pretrained` reads a saved adapter as one.

        With it a saved adapter goes on training with A frozen (variant "v2") or with both factors ("v1"):

            config = LoraNullConfig.from_pretrained("out/adapter", variant="v2")
            model = PeftModel.from_pretrained(base, "out/adapter", config=config, is_trainable=True)

        What is saved holds no variant: without one it is "v2", and a line says so of a config that was saved without an
        adapter. `dataclasses.replace` keeps the variant, `to_dict` does not.

        Raises:
            UserError: for variant "nb": what is saved is a plain LoRA without the basis that A was kept in.
        """
        if fields.get("variant") == "nb":
            raise UserError(NO_BASIS)
        if "variant" not in fields and not fields.get("inference_mode"):  # which is set beside an adapter's weights
            logger.warning("variant: a saved config holds none, v2 is taken; give variant=")
        fields.pop("peft_type", None)  # which would make it PEFT's own class
        return super().from_peft_type(**fields)


def starts_from_residual(config: Any) -> bool:
    """Return whether an adapter of this config starts by taking s·B0A0 out of the base."""
    return bool(getattr(config, "starts_from_residual", False))


def _number(value: Any) -> float:
    """Return a number, NaN for what is none."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
