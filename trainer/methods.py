"""The methods that can be compared, each one function: what adapter it puts on the model.

A method is added by writing one more function here (or anywhere that is imported) under `@method("name")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig

from lora_null.config import LoraNullConfig

METHODS: dict[str, Callable[..., PeftConfig]] = {}


def method(name: str) -> Callable[[Callable[..., PeftConfig]], Callable[..., PeftConfig]]:
    """Enter a function in `METHODS`. It takes `peft.LoraConfig`'s arguments and returns the adapter's config."""

    def enter(build: Callable[..., PeftConfig]) -> Callable[..., PeftConfig]:
        METHODS[name] = build
        return build

    return enter


@method("lora")
def lora(**adapter: Any) -> PeftConfig:
    """A Kaiming, B = 0; A and B train."""
    return LoraConfig(**adapter)


@method("lora-null-v1")
def lora_null_v1(**adapter: Any) -> PeftConfig:
    """A0 and B0 from the null space, base W0 − s·B0A0; A and B train."""
    return LoraNullConfig(variant="v1", **adapter)


@method("lora-null-v2")
def lora_null_v2(**adapter: Any) -> PeftConfig:
    """A0 from the null space, B = 0, base untouched; B trains."""
    return LoraNullConfig(variant="v2", **adapter)
