"""What a trainer saves and resumes from: whole or not at all, whatever the engine, and no pickle of ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, load_peft_weights
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from lora_null.adapters.plain import check_saved_adapter, copy_into
from lora_null.layer import active_adapter, adapted_layers
from lora_null.trainer.checkpoints import COMPLETE_FILE, record_processes, seal, tidy
from lora_null.utils.distributed import parameters_are_sharded, whole_parameters


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
        if self.args.should_save:
            self._keep_start(checkpoint)
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
            with whole_parameters(*self.saved_modules()):
                self._save(output_dir)
        if self.args.should_save and self._lora_layers():
            folder = _adapter_folder(Path(output_dir or self.args.output_dir), self.adapter_name)
            check_saved_adapter(folder, self.model, adapter_name=self.adapter_name)

    def saved_modules(self) -> list[nn.Module]:
        """Return what has to be whole to be saved: of a PEFT model what PEFT put on it, not the base.

        That is what PEFT itself saves: the parts that a tuner layer names (A, B, magnitudes, …), and its wrappers of
        modules that train beside them (`modules_to_save`, trainable tokens, a classifier's head).
        """
        if not isinstance(self.model, PeftModel):
            return [self.model]
        found: list[nn.Module] = []
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                parts = (getattr(module, part, None) for part in module.adapter_layer_names)
                found += [part for part in parts if isinstance(part, nn.Module)]
            elif isinstance(module, AuxiliaryTrainingWrapper):
                found.append(module)
        return found

    @property
    def adapter_name(self) -> str:
        """The adapter that trains; "default" where TRL made it."""
        return active_adapter(self.model)

    def _lora_layers(self) -> dict[str, LoraLayer]:
        return adapted_layers(self.model, self.adapter_name) if isinstance(self.model, PeftModel) else {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, never read

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what trains, as PEFT saved it; from an engine that shards too, whose own file of it is not used."""
        checkpoint = Path(resume_from_checkpoint)
        self._restore_start(checkpoint)
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded = parameters_are_sharded(self.model)
        for name in self.model.peft_config:  # the one that trains, and such as DPO's reference
            inside = _adapter_folder(checkpoint, name)
            if name != self.adapter_name and not inside.is_dir():
                continue
            if not sharded:
                self.model.load_adapter(str(inside), name, is_trainable=name == self.adapter_name)
                continue
            with whole_parameters(*self.saved_modules(), write=True):
                copy_into(self.model, load_peft_weights(str(inside), device="cpu"), name)
        if dist.is_initialized():
            dist.barrier()

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _keep_start(self, checkpoint: Path) -> None:
        """Leave in a checkpoint what `_restore_start` needs, so that it resumes in any folder and on any machine."""

    def _restore_start(self, checkpoint: Path) -> None:
        """Put the model where the run of a checkpoint started, before what was trained is loaded."""

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


def _adapter_folder(folder: Path, adapter_name: str) -> Path:
    """Return where PEFT's `save_pretrained` puts an adapter."""
    return folder if adapter_name == "default" else folder / adapter_name
