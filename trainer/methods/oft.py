"""OFT (Qiu et al., NeurIPS 2023), as PEFT implements it: a rotation of the inputs instead of a sum of factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import OFTConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners.oft.layer import Linear as OFTLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_null.adapters.plain import WEIGHTS_FILE
from lora_null.calibration import Calibration
from lora_null.drift import WeightDriftMeter
from lora_null.layer import active_adapter, plain_name
from lora_null.trainer.methods.base import Method, check_option, method, taken_by
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_safetensors
from lora_null.utils.quantized import weight_of


@method
class OFT(Method):
    """W0 R x with R block diagonal and orthogonal, R = I at the start; PEFT's parametrization of R trains.

    Saved as PEFT's OFT adapter: it loads with `peft` alone, but is no LoRA, so no engine that serves LoRA takes it.

    Attributes:
        block_size: of the blocks of R; it has to divide the inputs of every layer.
        exact: R by Cayley's formula with an inverse, instead of PEFT's default, the first terms of its series.
    """

    name = "oft"
    supports_quantized_base = False
    has_rank = False
    supports_sharding = False
    saves_plain_lora = False

    block_size: int = 32
    exact: bool = False

    def __post_init__(self) -> None:
        size = self.block_size
        check_option(type(size) is int and size >= 2, f"{self.name}.block_size", "a whole number of at least 2", size)
        check_option(type(self.exact) is bool, f"{self.name}.exact", "true or false", self.exact)

    def config(self, **adapter: Any) -> PeftConfig:
        own = {"oft_block_size": self.block_size, "use_cayley_neumann": not self.exact}
        return OFTConfig(**taken_by(OFTConfig, self.name, adapter) | own)

    def layers(self, model: nn.Module) -> Mapping[str, Any]:
        return {plain_name(name): x for name, x in model.get_base_model().named_modules() if isinstance(x, OFTLinear)}

    def check_bare(self, model: nn.Module) -> None:
        if any(isinstance(module, Conv1D) for module in model.modules()):
            raise UserError(f"method: oft adapts torch.nn.Linear alone, and {type(model).__name__} has Conv1D")

    def check(self, model: nn.Module) -> None:
        layers = self.layers(model)
        if not layers:
            raise UserError("target_modules: oft adapts torch.nn.Linear alone, and none of the model's matches")
        for name, layer in layers.items():
            if layer.in_features % self.block_size:  # PEFT would take another size, in this layer alone
                common = math.gcd(*(layer.in_features for layer in layers.values()))
                fits = max(size for size in range(1, self.block_size) if not common % size)
                raise UserError(
                    f"method.options.oft.block_size: {self.block_size} does not divide the {layer.in_features} inputs of "
                    f"{name}; the largest below it that divides all is {fits}"
                )

    def prepare(self, model: nn.Module) -> None:
        for layer in self.layers(model).values():
            layer.oft_R.float()

    def drift_meter(self, model: nn.Module, calibration: Calibration) -> RotationDriftMeter:
        return RotationDriftMeter(self.layers(model), calibration)

    def save(self, model: nn.Module, directory: Path) -> int:
        name = active_adapter(model)
        state = get_peft_model_state_dict(model, adapter_name=name)
        write_safetensors(directory / WEIGHTS_FILE, state, {"format": "pt"})
        config = copy.copy(model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(directory))
        return sum(tensor.numel() for tensor in state.values())


class RotationDriftMeter(WeightDriftMeter):
    """‖W0 (R S − S)‖ / ‖W0 X‖, from the sketch S of 64 columns; the base is untouched, so nothing of the start is kept."""

    def begin(self) -> None:
        """Store nothing: at the start R S = S."""

    def _moved(self, name: str, layer: Any) -> torch.Tensor:
        weight = weight_of(layer).float()
        rows = self.sketches[name].T.to(weight.device)
        return weight @ (layer.oft_R[layer.active_adapters[0]](rows) - rows).T
