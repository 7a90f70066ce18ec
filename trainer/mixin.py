"""What LoRA-Null adds to a TRL trainer: an initialization before the first step, and the drift in every log line."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from lora_null.calibration import Calibration, measure_inputs
from lora_null.config import LoraNullConfig
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.errors import UserError
from lora_null.files import link, write_safetensors
from lora_null.initialize import (
    MIN_TOKENS,
    InitOptions,
    LayerReport,
    check_layers,
    check_whole,
    load_initialization,
    start_adapter,
)
from lora_null.layer import is_started, residual_of
from lora_null.quantized import keep_layout, quantized_layers
from lora_null.sharding import whole_parameters
from lora_null.store import PREFIX, copy_store, find_initialization
from lora_null.trainer.calibration import CalibrationArgs, as_batches
from lora_null.trainer.checkpoints import (
    check_processes,
    last_checkpoint_or_raise,
)
from lora_null.trainer.methods import Method, check_base
from lora_null.trainer.preflight import check_batch, check_trainable
from lora_null.trainer.saving import SavingMixin

DRIFT_FILE, FACTORS_FILE = "drift.safetensors", "factors.safetensors"


class LoraNullMixin(SavingMixin):
    """Put before a TRL trainer class: `class MyTrainer(LoraNullMixin, SomeTrainer): pass`.

    `train()` first initializes the adapter (`LoraNullConfig`) on all ranks together, once, and writes the factors and
    the layer report to `<output_dir>/init`; resuming restores them bit for bit, from the checkpoint's own copy, and
    calibrates nothing. An adapter that was trained already (by another trainer, or loaded) goes on from where it is.
    With any other LoRA config nothing is initialized, but the same drift is measured, so that methods can be compared.

    Args:
        calibration_dataset: texts, rows with `text` or `input_ids`, or ready batches; see `as_batches`. Needed by
            LoRA-Null; for other adapters optional, and then only the drift depends on it.
        calibration_args: how windows are cut from texts.
        init_options: how to initialize; by default an equal initialization is taken from the cache, or left there.
        init_folder: an initialization to start from instead, written by an earlier run or by `lora-null init`.
        method: what else is initialized, frozen, done after a step and saved; see `lora_null.trainer.methods`.
        reuse_init: take the initialization that lies in `init_dir`, written by a run that starts in the same way.

    Raises:
        UserError: LoRA-Null without calibration data, or a batch from which nothing or no end would be learned.
    """

    def __init__(
        self,
        *args: Any,
        calibration_dataset: Iterable[Any] | None = None,
        calibration_args: CalibrationArgs | None = None,
        init_options: InitOptions | None = None,
        init_folder: str | Path | None = None,
        method: Method | None = None,
        reuse_init: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = method or Method()
        self._measures = method is not None or isinstance(self.model, PeftModel)
        self._goes_on = isinstance(self.model, PeftModel) and is_started(self.model, self.adapter_name)
        if self._measures:
            self._keep_quantized_base()
            if not self._goes_on:
                self.method.check(self.model)
            self.method.prepare(self.model)
        for callback in self.method.callbacks():
            self.add_callback(callback)
        self._calibration_dataset = calibration_dataset
        self._calibration_args = calibration_args or CalibrationArgs(seed=self.args.seed)
        defaults = InitOptions(cache=True, seed=self.args.seed, progress=not self.args.disable_tqdm)
        self._init_options = init_options or defaults
        self._init_folder = init_folder and find_initialization(Path(init_folder))
        self._reuse_init = reuse_init
        self._prepared = self._at_start = False
        self.layer_report: LayerReport | None = None
        self.init_seconds = 0.0
        self.drift_meter: DriftMeter | WeightDriftMeter | None = None
        if self._starts_lora_null:
            check_layers(self.model, self._lora_layers(), self.adapter_name)
        if init_folder is not None and not self._starts_lora_null:
            reason = "the adapter is started already" if self._goes_on else "only LoRA-Null starts from one"
            raise UserError(f"init_folder: would not be read, {reason}")
        needs_texts = self._starts_lora_null or (self.method.needs_gram and not self._goes_on)
        if needs_texts and calibration_dataset is None and init_folder is None:
            name = "LoRA-Null" if self._starts_lora_null else self.method.name
            raise UserError(f"calibration_dataset: {name} needs texts that carry the knowledge to keep")

    def _keep_quantized_base(self) -> None:
        """On a quantized base, leave its weights as they are stored, and the adapter in float32 as on any other.

        TRL casts it to bfloat16 there, in which a step of the usual learning rates often changes nothing.
        """
        quantized = bool(quantized_layers(self.model))
        check_base(self.method, quantized=quantized)
        keep_layout(self.model)
        for parameter in self.model.parameters() if quantized else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @property
    def _starts_lora_null(self) -> bool:
        if not isinstance(self.model, PeftModel) or self._goes_on:
            return False
        return isinstance(self.model.peft_config[self.adapter_name], LoraNullConfig)

    @property
    def init_dir(self) -> Path:
        """Where the initial factors, the layer report and the drift probes are kept."""
        return Path(self.args.output_dir) / "init"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Initialize (or restore), check, train; the arguments and the result are the parent trainer's."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint_or_raise(Path(self.args.output_dir)))
        self._check_engine()
        if resume_from_checkpoint:
            fixed = "DeepSpeed" if self.is_deepspeed_enabled else None
            check_processes(Path(resume_from_checkpoint), *self._processes_and_batch(), fixed=fixed)
        if not self._prepared:
            start = time.perf_counter()
            self._prepare(resuming=resume_from_checkpoint or False)
            self._prepared = True
            self.init_seconds = time.perf_counter() - start
        if resume_from_checkpoint and self._has_reached_its_end(Path(resume_from_checkpoint)):
            return self._take_trained(Path(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if self.state.global_step and self._measures:
            self._check_something_moved()
        return output

    def _check_engine(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise UserError(
                "fsdp_version: 1 cuts across the layers of an adapter; set it to 2 (recipes/accelerate/fsdp2.yaml)"
            )
        if not self.method.sharded and (plugin is not None or self._zero_stage == 3):
            raise UserError(
                f"method: {self.method.name} needs whole weights while it trains; use DDP or ZeRO-2 for it"
            )

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _prepare(self, *, resuming: str | bool) -> None:
        """Check the data, and put the model at its start, before an engine cuts the weights into pieces.

        Args:
            resuming: the checkpoint to go on from; True for the last one in the output folder.
        """
        rows = self._first_rows()
        if rows and "labels" in rows[0]:
            check_batch(rows, self.processing_class, getattr(self.args, "max_length", None))
        if not self._measures:
            return
        check_whole(self.model)
        if resuming:
            self._restore_start(last_checkpoint_or_raise(self.init_dir.parent) if resuming is True else Path(resuming))
        elif self._reuse_init:
            self._start_from(self.init_dir)
        else:
            self._initialize()
        check_trainable(self.model, self.method.trainable(self.model))

    def _first_rows(self) -> list[dict[str, Any]]:
        """Return the first training rows; those with `labels` are checked before anything is spent."""
        return list(islice(self.train_dataset, self.args.per_device_train_batch_size))

    def _initialize(self) -> None:
        if self.args.should_save:
            self._forget_older_start()
        self.accelerator.wait_for_everyone()
        self._at_start = True
        if not self._starts_lora_null:
            calibration = Calibration() if self._calibration_dataset is None else self._measure()
        elif self._init_folder is not None:
            self.layer_report, calibration = load_initialization(
                self._init_folder, self.model, adapter_name=self.adapter_name
            )
            if self.args.should_save:
                copy_store(self._init_folder, self.init_dir)
        else:
            self.layer_report, calibration = start_adapter(
                self.model,
                self._batches(),
                self._options_here(),
                folder=self.init_dir,
                adapter_name=self.adapter_name,
            )
        factors = {} if self._goes_on else self.method.compute(self, calibration)
        if factors:
            self.method.apply(self.model, factors)
        if calibration.inputs:
            self.drift_meter = self.method.drift_meter(self.model, calibration)
        if self.args.should_save:
            if factors:
                write_safetensors(self.init_dir / FACTORS_FILE, factors, {"method": self.method.name})
            if self.drift_meter is not None:
                self.drift_meter.save(self.init_dir / DRIFT_FILE)
        self.accelerator.wait_for_everyone()

    def _forget_older_start(self) -> None:
        """Remove what an earlier run started from in this folder, but for parts that this one may continue."""
        kept = [] if self._init_options.cache else [*self.init_dir.glob(f"{PREFIX}*")]
        for path in self.init_dir.iterdir() if self.init_dir.is_dir() else ():
            if path not in kept:
                path.unlink()

    def _options_here(self) -> InitOptions:
        """Return the options, with the accelerator as the place to run: engines that shard leave the model on the CPU."""
        place = self.accelerator.device
        if self._init_options.device is None and place.type != "cpu" and self.model.device.type == "cpu":
            return replace(self._init_options, device=place)
        return self._init_options

    def _batches(self) -> list[dict[str, Any]]:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        return as_batches(self._calibration_dataset, tokenizer, self._calibration_args)

    def _measure(self) -> Calibration:
        return measure_inputs(
            self.model,
            self.method.layers(self.model),
            self._batches(),
            gram=self.method.needs_gram,
            min_tokens=MIN_TOKENS if self.method.needs_gram else 1,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
        )

    def _keep_start(self, checkpoint: Path) -> None:
        for path in self.init_dir.iterdir() if self.init_dir.is_dir() else ():
            link(path, checkpoint / self.init_dir.name / path.name)

    def _restore_start(self, checkpoint: Path) -> None:
        """Start again as the run of a checkpoint did, from the checkpoint's own copy: no other file is read."""
        if self._at_start or not self._measures:
            return
        kept = checkpoint / self.init_dir.name
        if self._starts_lora_null and not kept.is_dir():
            raise UserError(
                f"resume: {checkpoint} does not hold what it started from ({self.init_dir.name}/ is missing)"
            )
        self._start_from(kept)
        if self.args.should_save:
            self._forget_older_start()
            for path in kept.iterdir() if kept.is_dir() else ():
                link(path, self.init_dir / path.name)
        self.accelerator.wait_for_everyone()

    def _start_from(self, folder: Path) -> None:
        if self._starts_lora_null:
            self.layer_report, _ = load_initialization(folder, self.model, adapter_name=self.adapter_name)
        elif (folder / FACTORS_FILE).is_file() and not self._goes_on:
            self.method.apply(self.model, load_file(folder / FACTORS_FILE))
        if (folder / DRIFT_FILE).is_file():
            self.drift_meter = self.method.drift_meter(self.model, folder / DRIFT_FILE)
        self._at_start = True

    @torch.no_grad()
    def _check_something_moved(self) -> None:
        layers = self._lora_layers()
        for layer in layers.values():
            if self._moved(layer):
                return
        if layers or (self.drift_meter is not None and self.drift_meter.summary()["max"] == 0):
            raise RuntimeError(
                f"after {self.state.global_step} steps nothing differs from its start: nothing was trained"
            )

    def _moved(self, layer: LoraLayer) -> bool:
        name = self.adapter_name
        with whole_parameters(layer.lora_A, layer.lora_B):
            moves = "lora_A" if "lora_B" in layer.frozen_peft_weight_names.get(name, ()) else "lora_B"
            factor, residual = getattr(layer, moves)[name].weight, residual_of(layer, name)
            start = torch.zeros_like(factor) if residual is None else residual.B.to(factor)
            return not torch.equal(factor, start)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the knowledge drift (mean and max over the layers) to every training log line."""
        if self.drift_meter is not None and "loss" in logs:
            drift = self.drift_meter.summary()
            logs |= {"drift_mean": drift["mean"], "drift_max": drift["max"]}
        super().log(logs, *args, **kwargs)
