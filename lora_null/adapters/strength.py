"""The strength of a live adapter: ΔW times a number, exactly, without touching A or B."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer

from lora_null.layer import active_adapter, adapted_layers
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import start_that_rewrites


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
    """Return the option by which an adapter changes more than W0 + s·BA, or less than all of it; None where there is none."""
    options = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "alora_invocation_tokens")
    given = [name for name in options if getattr(config, name, None)]
    given += ["bias"] if getattr(config, "bias", "none") != "none" else []
    given += [f"init_lora_weights={start!r}"] if (start := start_that_rewrites(config)) else []
    return next(iter(given), None)


def _not_scalable(layer: LoraLayer, adapter: str) -> str | None:
    if layer.merged:
        return "is merged into its base"
    if adapter in getattr(layer, "lora_variant", {}):
        return f"is a {type(layer.lora_variant[adapter]).__name__}, which is not linear in its scaling"
    return None
