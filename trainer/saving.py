"""What a trainer saves and resumes from: whole or not at all, whatever the engine, and no pickle of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from lora_null.export import check_saved_adapter
from lora_null.files import write_safetensors
from lora_null.layer import adapted_layers
from lora_null.ranks import parameters_are_sharded
from lora_null.sharding import whole_parameters
from lora_null.trainer.checkpoints import COMPLETE_FILE, record_processes, seal, tidy

LIVE_FILE = "live_factors.safetensors"


class SavingMixin:
    """Put before a Trainer class: sealed checkpoints, whole adapters, and a resume that takes no step too many."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint that is either whole or not there for `last_checkpoint`; only then let older ones go."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self._save_live_factors(checkpoint)
        for callback in self.callback_handler.callbacks if self.args.should_save else ():
            if hasattr(callback, "save_state"):  # `on_save` would come after the seal
                callback.save_state(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            record_processes(checkpoint, *self._processes_and_batch())
            seal(checkpoint)
            tidy(folder, keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # nobody goes on, or ends, before it is whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter or the model, whole whatever the engine; all ranks call it, the first one writes."""
        if not parameters_are_sharded(self.model):
            super().save_model(output_dir, _internal_call)
        else:
            with whole_parameters(*self.modules_to_save()):
                self._save(output_dir)
        if self.args.should_save and self._lora_layers():
            check_saved_adapter(Path(output_dir or self.args.output_dir), self.model)

    def modules_to_save(self) -> list[nn.Module]:
        """Return what has to be whole to be saved: of an adapter its own small modules, not the base."""
        if not self._lora_layers():
            return [self.model]
        return [part for layer in self._lora_layers().values() for part in (layer.lora_A, layer.lora_B)]

    def _lora_layers(self) -> dict[str, LoraLayer]:
        return adapted_layers(self.model) if isinstance(self.model, PeftModel) else {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, never read

    def _live_layers(self) -> dict[str, LoraLayer]:
        """Return the layers whose A and B a checkpoint keeps as they train, beside the adapter in its plain form.

        On a residual base the plain form differs; of a sharded model it is the engine's own file that is not used.
        """
        layers = self._lora_layers()
        if parameters_are_sharded(self.model):
            return layers
        return {name: layer for name, layer in layers.items() if getattr(layer, "residual", None) is not None}

    def _save_live_factors(self, checkpoint: Path) -> None:
        layers = self._live_layers()
        with whole_parameters(*self.modules_to_save() if layers else ()):
            if layers and self.args.should_save:
                write_safetensors(checkpoint / LIVE_FILE, _factors(layers), {})

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        layers = self._live_layers()
        if not layers:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_file(Path(resume_from_checkpoint) / LIVE_FILE)
        with whole_parameters(*self.modules_to_save(), write=True):
            for name, factor in _factors(layers).items():
                factor.copy_(saved[name])
        if dist.is_initialized():
            dist.barrier()

    def _has_reached_its_end(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is that of the last step; the trainer itself would take one step more."""
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.max_steps > 0:
            return saved.global_step >= self.args.max_steps
        return saved.global_step >= saved.max_steps and saved.num_train_epochs == math.ceil(self.args.num_train_epochs)

    def _take_trained(self, checkpoint: Path) -> TrainOutput:
        """Restore what a run that was killed after its last step had trained."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        return TrainOutput(self.state.global_step, sum(losses) / max(len(losses), 1), {})

    def _processes_and_batch(self) -> tuple[int, int]:
        processes = self.accelerator.num_processes
        return processes, self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * processes


def _factors(layers: Mapping[str, LoraLayer]) -> dict[str, torch.Tensor]:
    factors = {f"{name}.lora_A": layer.lora_A["default"].weight for name, layer in layers.items()}
    return factors | {f"{name}.lora_B": layer.lora_B["default"].weight for name, layer in layers.items()}
