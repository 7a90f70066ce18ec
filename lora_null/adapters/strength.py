"""The strength of a live adapter: ΔW times a number, exactly, without touching A or B."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import MiCALinearVariant

from lora_null.layer import active_adapter, adapted_layers
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import start_that_rewrites

# Options of PEFT's by which an adapter changes more than W0 + s·BA, or less than all of it.
BEYOND_FACTORS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
BEYOND_FACTORS += ("layer_replication", "target_parameters", "use_bdlora")
BEYOND_FACTORS += ("arrow_config", "kasa_config", "monteclora_config")


class Strength:
    """Sets the strength of the active adapter of a PEFT model: its layers then add c·s·BA, at 1 what was trained.

    `save_plain_adapter` writes it as `lora_alpha`; PEFT's `save_pretrained` does not know of it. A layer whose
    base carries a residual adds c·s·(BA − B0A0).

    Args:
        model: with a LoRA adapter, loaded or as it was trained; not merged.

    Raises:
        UserError: an adapter whose change is not its scaling times one of its weights alone, or several at once.
    """

    def __init__(self, model: PeftModel) -> None:
        self.adapter = active_adapter(model)
        self.layers = adapted_layers(model, self.adapter) if isinstance(model, PeftModel) else {}
        if not self.layers:
            raise UserError("strength: the model has no LoRA adapter, whose change could be scaled")
        if len(model.active_adapters) > 1:
            raise UserError(f"strength: {', '.join(model.active_adapters)} are active together; leave one active")
        if option := beyond_scaling(model.peft_config[self.adapter]):
            raise UserError(f"strength: the adapter has {option}, which its scaling does not reach")
        for name, layer in self.layers.items():
            if reason := _not_scalable(layer, self.adapter):
                raise UserError(f"strength: {name} {reason}")
        self.trained = {name: layer.scaling[self.adapter] for name, layer in self.layers.items()}
        self.value = 1.0

    def set(self, value: float) -> None:
        """Set the strength, counted from what was trained."""
        self.value = value
        for name, layer in self.layers.items():
            layer.scaling[self.adapter] = self.trained[name] if value == 1 else value * self.trained[name]

    @contextlib.contextmanager
    def at(self, value: float) -> Iterator[None]:
        """Have another strength inside the block."""
        before = self.value
        self.set(value)
        try:
            yield
        finally:
            self.set(before)


def beyond_scaling(config: PeftConfig) -> str | None:
    """Return the option of a live adapter by which no scaling gives back its base, or all of its change; else None."""
    start = start_that_rewrites(config)
    return beyond_factors(vars(config)) or (start and f"init_lora_weights={start!r}")


def beyond_factors(config: Mapping[str, Any]) -> str | None:
    """Return the option in a saved config by which A and B are not all of the change, or more than it; else None."""
    option = next((name for name in BEYOND_FACTORS if config.get(name)), None)
    return option or ("bias" if config.get("bias", "none") != "none" else None)


def _not_scalable(layer: LoraLayer, adapter: str) -> str | None:
    if layer.merged:
        return "is merged into its base"
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not isinstance(variant, MiCALinearVariant):  # which only starts and trains otherwise
        return f"is a {type(variant).__name__}, which is not linear in its scaling"
    return None
