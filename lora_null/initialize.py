"""`initialize_lora_null_weights`: calibrate, solve, write, in place; the same in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_null.calibration import Calibration
from lora_null.earlier_tasks import after_earlier
from lora_null.layer import adapted_layers, freeze_factor
from lora_null.residual import ResidualLoraModel, subtract_residuals
from lora_null.start import DEFAULTS, InitOptions, LayerReport, compute_start, rule_of
from lora_null.targets import check_layers, warn_about_fused_experts
from lora_null.utils.distributed import together
from lora_null.utils.errors import UserError, nearest


@torch.inference_mode(False)  # tensors that are made in it cannot train
def initialize_lora_null_weights(
    peft_model: PeftModel, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default", **options: Any
) -> LayerReport:
    """Start the adapters of a PEFT model in the null space of what its linears read on `batches`. In place.

    s·B0A0 = W0 U Uᵀ, where U (d_in, r) spans the directions that the inputs use least (paper, section 3.3). A0 is (r, d_in),
    B0 (d_out, r); they are solved in float64 and stored in float32.

    v2: A = A0 frozen, B = 0, the base untouched. v1: A = A0, B = B0, the base becomes W0 − s·B0A0. nb: as one or the
    other, with A in the span of N, where the layers and the trainers of this package keep it; see `keep_in_null_basis`
    for a loop of your own. In every case the model computes what it did before. Under `torch.distributed` all processes
    call this together with the same batches.

    Where v1 or nb changes the base, weight decay in a trainer that is not of this package pulls away from the original
    model; `trainer.add_callback(lora_null.trainer.decay.DecayToStart())` turns it to the start.

    Args:
        peft_model: made by `get_peft_model(model, LoraNullConfig(…))`, not merged.
        batches: dicts with `input_ids` and `attention_mask`, (batch, length) and int64 each; padding is not measured. With
            `position_ids` the model gets them; without, padding on the left moves no position.
        adapter_name: the adapter to start.
        options: those of `InitOptions`.

    Returns:
        The layer report.

    Raises:
        UserError: a configuration that is not `LoraNullConfig`, a target that is no plain linear or shares its weight,
            r above min(d_in, d_out), an N with fewer directions than r or more than d_in, an adapter already started,
            or calibration data that cannot carry it.
    """
    return start_adapter(peft_model, batches, InitOptions(**options), adapter_name=adapter_name)[0]


@torch.no_grad()
def start_adapter(
    peft_model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    options: InitOptions = DEFAULTS,
    *,
    folder: Path | None = None,
    adapter_name: str = "default",
) -> tuple[LayerReport, Calibration]:
    """`initialize_lora_null_weights`, which also returns the calibration, without Grams, for a `DriftMeter`.

    Args:
        folder: where to leave the result for `load_start`; with `options.cache` also in the cache.
    """
    if not isinstance(peft_model, PeftModel):
        raise UserError(f"peft_model: a {type(peft_model).__name__}, not what peft.get_peft_model returns")
    if adapter_name not in peft_model.peft_config:
        raise UserError(f"adapter_name: no {adapter_name!r}{nearest(adapter_name, peft_model.peft_config)}")
    layers = adapted_layers(peft_model, adapter_name)
    together(lambda: check_layers(peft_model, layers, adapter_name))
    warn_about_fused_experts(peft_model.get_base_model())
    rule = rule_of(peft_model.peft_config[adapter_name], options)
    rule = after_earlier(rule, options.earlier, options.knowledge)
    start = compute_start(peft_model, layers, batches, options, rule=rule, adapter_name=adapter_name, folder=folder)
    finish_initialization(peft_model, adapter_name)
    return start.report, start.calibration


@torch.no_grad()
def finish_initialization(peft_model: PeftModel, adapter_name: str) -> None:
    """Make the step-0 output the base's: B becomes zero, or s·B0A0, of the factors as stored, leaves W0."""
    config = peft_model.peft_config[adapter_name]
    if config.starts_from_residual:
        subtract_residuals(peft_model, adapter_name)
        return
    peft_model.base_model.__class__ = ResidualLoraModel
    for layer in adapted_layers(peft_model, adapter_name).values():
        nn.init.zeros_(layer.lora_B[adapter_name].weight)
        if config.variant == "v2":
            freeze_factor(layer, "lora_A", adapter_name)
        layer.started |= {adapter_name}
