"""`model.quantization`: what is refused before anything loads, how bitsandbytes loads, how many bytes the weights are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_null.recipes.config.schema import ModelSection
from lora_null.utils.errors import UserError

MINIMUM = Version("0.50")  # the first with kernels for both forms on the CPU
NF4_BLOCK, NF4_SECOND_BLOCK = 64, 256  # bitsandbytes' blocks of weights, and of their scales under double quantization


def check_stored(model: ModelSection, model_config: Any) -> None:
    """Raise a UserError for a checkpoint whose weights are stored quantized already."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return
    kind = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    raise UserError(
        f"model.name_or_path: {model.name_or_path} is stored quantized ({getattr(kind, 'value', kind)}); give the "
        "model's plain weights, and model.quantization: nf4 or int8"
    )


def check_bitsandbytes(model: ModelSection) -> None:
    """Raise a UserError where `model.quantization` asks for bitsandbytes and it is missing or too old."""
    if model.quantization is None:
        return
    found = importlib.util.find_spec("bitsandbytes") and Version(importlib.metadata.version("bitsandbytes"))
    if not found or found < MINIMUM:
        state = f"version {found} is installed" if found else "it is not installed"
        raise UserError(
            f"model.quantization: {model.quantization} needs bitsandbytes>={MINIMUM}, {state}; "
            f'pip install "bitsandbytes>={MINIMUM}"'
        )


def loading_options(model: ModelSection, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantize a model while it loads, straight onto the device.

    The output head stays as it is, tied or not. nf4 is QLoRA's form: double quantization, computed in `model.dtype`.
    """
    check_bitsandbytes(model)
    if model.quantization is None:
        return {}
    if model.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": getattr(torch, model.dtype)}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **compute)
    return {"quantization_config": config, "device_map": {"": device}}


def weight_bytes(empty: PreTrainedModel, model: ModelSection) -> int:
    """Return the bytes of a model's weights as they are stored, counted on its shape."""
    total = sum(parameter.nbytes for parameter in empty.parameters())
    if model.quantization is None:
        return total
    head = empty.get_output_embeddings()
    linears = [x for x in empty.modules() if isinstance(x, nn.Linear | Conv1D) and x is not head]
    return total + sum(_stored_bytes(x.weight, model.quantization) - x.weight.nbytes for x in linears)


def _stored_bytes(weight: torch.Tensor, quantization: str) -> int:
    """Return the bytes of one quantized weight with its scales."""
    count = weight.numel()
    if quantization == "int8":
        return count + 4 * max(weight.shape[0], 1)  # one float32 scale per row
    scales = -(-count // NF4_BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // NF4_SECOND_BLOCK)
