"""What LoRA-Null adds to a TRL trainer: an initialization before the first step, and the drift in every log line."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from lora_null.calibration import Calibration, measure_inputs
from lora_null.config import LoraNullConfig
from lora_null.drift import DriftMeter
from lora_null.errors import UserError
from lora_null.files import write_safetensors
from lora_null.initialize import (
    MIN_TOKENS,
    LayerReport,
    check_layers,
    initialize_from,
    load_initialization,
    save_initialization,
)
from lora_null.layer import adapted_layers
from lora_null.trainer.calibration import CalibrationArgs, as_batches
from lora_null.trainer.preflight import check_batch, check_trainable

DRIFT_FILE, LIVE_FILE = "drift.safetensors", "live_factors.safetensors"


class LoraNullMixin:
    """Put before a TRL trainer class: `class MyTrainer(LoraNullMixin, SomeTrainer): pass`.

    `train()` first initializes the adapter (`LoraNullConfig`) on all ranks together, once, and writes the factors and
    the layer report to `<output_dir>/init`; resuming restores them bit for bit and calibrates nothing. With any other
    LoRA config nothing is initialized, but the same drift is measured, so that methods can be compared.

    Args:
        calibration_dataset: texts, rows with `text` or `input_ids`, or ready batches; see `as_batches`. Needed by
            LoRA-Null; for other adapters optional, and then only the drift depends on it.
        calibration_args: how windows are cut from texts.
        init_solver: see `lora_null.nullspace.bottom_eigenspace`.

    Raises:
        UserError: LoRA-Null without calibration data, or a batch from which nothing or no end would be learned.
    """

    def __init__(
        self,
        *args: Any,
        calibration_dataset: Iterable[Any] | None = None,
        calibration_args: CalibrationArgs | None = None,
        init_solver: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._calibration_dataset = calibration_dataset
        self._calibration_args = calibration_args or CalibrationArgs(seed=self.args.seed)
        self._init_solver = init_solver
        self._prepared = False
        self.layer_report: LayerReport | None = None
        self.init_seconds = 0.0
        self.drift_meter: DriftMeter | None = None
        if self._starts_lora_null:
            check_layers(self.model, adapted_layers(self.model))
            if calibration_dataset is None:
                raise UserError("calibration_dataset: LoRA-Null needs texts that carry the knowledge to keep")

    @property
    def _starts_lora_null(self) -> bool:
        return isinstance(self.model, PeftModel) and isinstance(self.model.peft_config["default"], LoraNullConfig)

    @property
    def init_dir(self) -> Path:
        """Where the initial factors, the layer report and the drift probes are kept."""
        return Path(self.args.output_dir) / "init"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Initialize (or restore), check, train; the arguments and the result are the parent trainer's."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"resume: no checkpoint in {self.args.output_dir}")
        if not self._prepared:
            start = time.perf_counter()
            self._prepare(resuming=bool(resume_from_checkpoint))
            self._prepared = True
            self.init_seconds = time.perf_counter() - start
        output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if self.state.global_step and isinstance(self.model, PeftModel):
            self._check_something_moved()
        return output

    def _prepare(self, *, resuming: bool) -> None:
        rows = self._first_rows()
        if rows and "labels" in rows[0]:
            check_batch(rows, self.processing_class, getattr(self.args, "max_length", None))
        if not isinstance(self.model, PeftModel):
            return
        if resuming:
            self._restore()
        elif self._calibration_dataset is not None:
            self._initialize()
        check_trainable(self.model, self._expected_trainable())

    def _first_rows(self) -> list[dict[str, Any]]:
        """Return the first training rows; those with `labels` are checked before anything is spent."""
        return list(islice(self.train_dataset, self.args.per_device_train_batch_size))

    def _initialize(self) -> None:
        calibration = self._measure()
        if self._starts_lora_null:
            self.layer_report = initialize_from(
                self.model,
                calibration,
                solver=self._init_solver,
                seed=self.args.seed,
                progress=not self.args.disable_tqdm,
            )
        self.drift_meter = DriftMeter(self.model, calibration)
        if self.args.should_save:
            self.drift_meter.save(self.init_dir / DRIFT_FILE)
            if self.layer_report is not None:
                save_initialization(self.init_dir, self.model, self.layer_report)
        self.accelerator.wait_for_everyone()

    def _measure(self) -> Calibration:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        batches = as_batches(self._calibration_dataset, tokenizer, self._calibration_args)
        return measure_inputs(
            self.model,
            adapted_layers(self.model),
            batches,
            gram=self._starts_lora_null,
            min_tokens=MIN_TOKENS if self._starts_lora_null else 1,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
        )

    def _restore(self) -> None:
        if self._starts_lora_null:
            self.layer_report = load_initialization(self.init_dir, self.model)
        if (self.init_dir / DRIFT_FILE).is_file():
            self.drift_meter = DriftMeter.load(self.init_dir / DRIFT_FILE, self.model)

    def _expected_trainable(self) -> set[str]:
        frozen = {
            f"base_model.model.{name}.lora_A.default.weight"
            for name, layer in adapted_layers(self.model).items()
            if "lora_A" in layer.frozen_peft_weight_names.get("default", ())
        }
        parts = (".lora_A.default.", ".lora_B.default.", ".modules_to_save.default.", ".token_adapter.")
        names = {name for name, _ in self.model.named_parameters() if any(part in name for part in parts)}
        return names - frozen

    @torch.no_grad()
    def _check_something_moved(self) -> None:
        for layer in adapted_layers(self.model).values():
            B, residual = layer.lora_B["default"].weight, getattr(layer, "residual", None)
            start = torch.zeros_like(B) if residual is None else residual.B.to(B)
            if not torch.equal(B, start):
                return
        raise RuntimeError(f"after {self.state.global_step} steps no B differs from its start: nothing was trained")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the knowledge drift (mean and max over the layers) to every training log line."""
        if self.drift_meter is not None and "loss" in logs:
            drift = self.drift_meter.summary()
            logs |= {"drift_mean": drift["mean"], "drift_max": drift["max"]}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        live = self._live_factors()
        if live:
            write_safetensors(Path(output_dir or self.args.output_dir) / LIVE_FILE, live, {})

    def _live_factors(self) -> dict[str, torch.Tensor]:
        """Return A and B as they train on a residual base: a checkpoint's adapter itself is saved in plain form."""
        if not isinstance(self.model, PeftModel):
            return {}
        layers = {n: x for n, x in adapted_layers(self.model).items() if getattr(x, "residual", None) is not None}
        factors = {f"{name}.lora_A": layer.lora_A["default"].weight for name, layer in layers.items()}
        return factors | {f"{name}.lora_B": layer.lora_B["default"].weight for name, layer in layers.items()}

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        live = self._live_factors()
        if not live:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / LIVE_FILE)
        for name, factor in live.items():
            factor.copy_(saved[name])
        if dist.is_initialized():
            dist.barrier()
