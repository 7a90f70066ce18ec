"""Full fine-tuning: no adapter, every weight trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from lora_null.calibration import Calibration
from lora_null.drift import WeightDriftMeter
from lora_null.layer import targeted_linears
from lora_null.targets import check_named
from lora_null.trainer.methods.base import RANK, RANK_ASKED, Method, check_no_ranks, method
from lora_null.utils.errors import UserError


class WeightMethod(Method):
    """What changes whole weights: its drift is W S − W0 S, and it is saved as a model."""

    saves = "model"
    supports_quantized_base = False
    has_rank = False

    def drift_meter(self, model: nn.Module, calibration: Calibration) -> WeightDriftMeter:
        return WeightDriftMeter(self.layers(model), calibration)


@method
class Full(WeightMethod):
    """Every weight trains, embeddings and norms too, in float32 as the adapters of all other methods do.

    Drift is measured on the linears that `target_modules` names, the ones that an adapter would change.
    """

    name = "full"
    starts_in_files = True
    target_modules = "all-linear"

    def config(self, **adapter: Any) -> None:
        check_no_ranks(self.name, adapter)
        for key in adapter.keys() - {*RANK, *RANK_ASKED, "target_modules", "task_type"}:
            raise UserError(f"{key}: {self.name} trains every weight of the model itself, leave it out")
        self.target_modules = adapter.get("target_modules") or "all-linear"

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return targeted_linears(model, LoraConfig(target_modules=self.target_modules))

    def check(self, model: nn.Module) -> None:
        check_named(model, self.target_modules)
        if not self.layers(model):
            raise UserError(f"target_modules: no linear of the model matches {self.target_modules!r}")

    def prepare(self, model: nn.Module) -> None:
        model.float()  # in place
        model.requires_grad_(True)

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def save(self, model: nn.Module, directory: Path) -> int:
        model.save_pretrained(directory)
        return sum(parameter.numel() for parameter in model.parameters())
