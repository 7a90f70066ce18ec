"""Generate with the adapter merged into the weights where that is measured to be faster, and put every bit back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_null.eval_harness.lm_eval.generate import can_generate_rows, generate_rows
from lora_null.utils.distributed import broadcast, device_of, parameters_are_sharded
from lora_null.utils.quantized import is_quantized

WORTH = 0.95  # merged must take less than this share of the time


@contextmanager
def merged_if_faster(model: nn.Module, known: bool | None = None) -> Iterator[bool]:
    """Merge a model's LoRA adapter for a while, if a few tokens of generation are faster so; yield whether it is.

    Args:
        model: in eval mode.
        known: what an earlier call has found for this model; None measures.

    Only float32 weights are merged: in 16 bits, and the more so quantized again, the sum would be rounded, and other
    answers measured than those of the adapter that is saved. On the way out the weights are restored from copies, bit for bit.
    """
    layers = _mergeable(model)
    if known is False or not layers or not can_generate_rows(model):
        yield False
        return
    apart = 0.0 if known else _seconds(model)
    saved = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        faster = known or broadcast(_seconds(model) < WORTH * apart)
        if not faster:
            _restore(layers, saved)
        yield faster
    finally:
        _restore(layers, saved)


def _mergeable(model: nn.Module) -> list[LoraLayer]:
    """Return the LoRA layers of a model that can be merged; none unless all can."""
    if not isinstance(model, PeftModel) or parameters_are_sharded(model):
        return []
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = all(
        isinstance(layer.get_base_layer(), nn.Linear)
        and not is_quantized(layer.get_base_layer())
        and layer.get_base_layer().weight.dtype == torch.float32
        and not layer.merged
        and not layer.disable_adapters
        for layer in layers
    )
    return layers if plain else []


def _restore(layers: list[LoraLayer], saved: list[torch.Tensor]) -> None:
    for layer, weight in zip(layers, saved):
        if layer.merged_adapters:
            layer.get_base_layer().weight.data.copy_(weight)
            layer.merged_adapters.clear()


def _seconds(model: nn.Module, rows: int = 4, length: int = 8, repeats: int = 3) -> float:
    """Return how long a short generation takes, the median of a few; the first, which warms up, is not counted."""
    ids = torch.ones(rows, length, dtype=torch.long, device=device_of(model))
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        generate_rows(model, ids, torch.ones_like(ids), max_new_tokens=length, ends=(), stopped=lambda _: False)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])
