"""Bases whose weights are stored quantized: told by class, dequantized to compute with, never written to.

A packed 4-bit weight is a tensor of bytes, and may claim a floating dtype: neither its dtype nor its shape tell. So what
is not known by its class, and is not a plain floating tensor either, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import cast

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.utils.errors import UserError

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_layer_of(module: nn.Module) -> nn.Module:
    """Return the linear that a PEFT layer wraps, or the module itself where it is no such layer."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def is_quantized(module: nn.Module) -> bool:
    """Return whether the module is a linear of bitsandbytes that stores 4-bit or 8-bit weights."""
    library = sys.modules.get("bitsandbytes")  # where it was never imported there is no such layer
    if library is None or not isinstance(module, library.nn.Linear4bit | library.nn.Linear8bitLt):
        return False
    return isinstance(module, library.nn.Linear4bit) or not module.state.has_fp16_weights


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's quantized linears by name."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def why_unreadable(module: nn.Module) -> str | None:
    """Return why `weight_of` cannot tell the weight of a module; None where it can."""
    if is_quantized(module):
        rewritten = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
        return "was rewritten by bitsandbytes to infer on this CPU, load the base anew" if rewritten else None
    if isinstance(module, nn.Linear | Conv1D):
        if "weight" not in module._parameters:
            return "computes its weight anew before each pass (pruning, weight norm); make that permanent first"
        forward = type(module).forward
        if forward not in (nn.Linear.forward, Conv1D.forward) and forward.__qualname__ != "FalconLinear.forward":
            return f"is a {type(module).__name__}, which gives more than W0 x + b; leave it out (exclude_modules)"
        weight = module.weight
        plain = isinstance(weight, torch.Tensor) and weight.dtype in PLAIN_DTYPES
        if plain and not type(weight.data).__module__.startswith("torchao"):
            return None
    return f"is a {type(module).__name__}, only plain linears and bitsandbytes' quantized ones can be read"


@torch.no_grad()
def weight_of(module: nn.Module) -> torch.Tensor:
    """Return W0, (d_out, d_in), as the forward pass multiplies with it.

    A plain weight is not copied; a quantized one is dequantized anew, for the caller to let go of.

    Args:
        module: a linear, or the PEFT layer that wraps it.

    Raises:
        UserError: its weight is stored in a form that is not known.
    """
    base = base_layer_of(module)
    if reason := why_unreadable(base):
        raise UserError(f"a layer {reason}")
    if is_quantized(base):
        return dequantize_bnb_weight(base.weight, getattr(base, "state", None))
    weight = cast(torch.Tensor, base.weight)
    return weight.T if isinstance(base, Conv1D) else weight


def stored_statistics(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what belongs to quantized weights besides the packed numbers: scales and code books, by name."""
    for name, module in quantized_layers(model).items():
        for key, tensor in module.state_dict().items():
            if key not in ("weight", "bias"):
                yield f"{name}.{key}", tensor


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from rewriting 4-bit weights while it computes on a CPU with AVX-512 BF16.

    In eval mode without gradients it would put them into another layout, round their scales to bfloat16 for good, and
    from then on run without a gradient.
    """
    for module in quantized_layers(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
