"""Checkpoints: whole or not taken, whatever the engine; what a trainer saves, restores and resumes from."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, speed_metrics

from lora_null.adapters.plain import CONFIG_FILE, check_saved_adapter, copy_into
from lora_null.layer import active_adapter, adapted_layers, residual_of
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, first_line
from lora_null.utils.files import flush, read_json, write_json
from lora_null.utils.model_state import replaced
from lora_null.utils.sharding import parameters_are_sharded, reshard, whole_parameters, without_checkpointing

logger = get_logger(__name__)

COMPLETE_FILE, PROCESSES_FILE, METHOD_FILE = "complete.json", "processes.json", "method.json"
SCALED_BY = ("r", "lora_alpha", "use_rslora", "alpha_pattern")  # of an adapter's config, which its weights go with
BEGUN_FILE = "begun.json"  # in a checkpoint of ours that is being written
JIT_FILE = "checkpoint-is-incomplete.txt"  # of transformers' enable_jit_checkpoint, which removes it after the save
# Of an output folder: large; the base's predictions on held-out rows; a pickle, with any token in it.
NOT_PUSHED = ("init/*", "probe/*", TRAINING_ARGS_NAME)
# A group of an optimizer's state that stands for no parameter.
OF_RANK_R = {"params": [], "moments": "of factors of rank r, saved as rank 2r"}
# Entry of an optimizer's param group → the training argument that a checkpoint's value overrides on resuming.
KEPT_BY_OPTIMIZER = {
    "initial_lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "momentum": "momentum",
}


def last_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint with the highest step in a trainer's output folder, or None."""
    return next((path for path in reversed(checkpoints_in(folder)) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Return whether the checkpoint was written to its end and nothing of it is missing or cut short."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def mark_complete(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint to disk and list them in `complete.json`."""
    passing = (COMPLETE_FILE, BEGUN_FILE, JIT_FILE)
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in passing)
    for path in files:
        flush(path)
    write_json(checkpoint / COMPLETE_FILE, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})
    (checkpoint / BEGUN_FILE).unlink(missing_ok=True)


def check_whole_checkpoint(checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint that is not there, or is one of ours and not whole.

    Raises:
        UserError: naming the last whole one beside it.
    """
    ours = any((checkpoint / name).is_file() for name in (COMPLETE_FILE, BEGUN_FILE))
    foreign = not ours and (checkpoint / TRAINER_STATE_NAME).is_file()
    if checkpoint.is_dir() and (is_whole(checkpoint) or foreign):
        return
    lacking = f"is no checkpoint ({TRAINER_STATE_NAME} is missing)" if checkpoint.is_dir() else "is no folder"
    what = "was not written to its end, or lacks a file" if ours else lacking
    beside = last_checkpoint(checkpoint) or last_checkpoint(checkpoint.parent)
    raise UserError(f"resume: {checkpoint} {what}; " + (f"take {beside}" if beside else "no whole one is beside it"))


def warn_without_optimizer(checkpoint: Path) -> None:
    """Say in a line that the optimizer begins anew, from a checkpoint of a run with `save_only_model`."""
    if not _holds_optimizer(checkpoint):
        logger.warning(
            f"resume: {checkpoint} holds no optimizer (save_only_model), so its moments and the schedule of the learning rate "
            "begin anew"
        )


def _holds_optimizer(checkpoint: Path) -> bool:
    return any(path for name in ("optimizer*", "global_step*") for path in checkpoint.glob(name))


def check_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that started or trained in another way than this run.

    Args:
        checkpoint: what it does not say, such as one of another trainer, is not compared.
        settings: by name, as `as_json` gives it: "started": the variant of a LoRA-Null adapter that was started before its
            trainer got it; the method, its options, the adapter's config, "modules": what it adapts. A checkpoint has them
            in `method.json`.

    Raises:
        UserError: naming the first difference.
    """
    saved = read_json(checkpoint / METHOD_FILE) if (checkpoint / METHOD_FILE).is_file() else {}
    for key in (key for key in settings if key in saved and (saved[key] or None) != (settings[key] or None)):
        before, now = saved[key], settings[key]
        if key == "started":
            one, other = (f"a started {x} adapter" if x else "no started LoRA-Null adapter" for x in (before, now))
            same = f"its {before} adapter, started as it was then, without peft_config" if before else "no adapter"
            raise UserError(
                f"resume: {checkpoint} began with {one}, this run with {other}; give the model with {same}"
            )
        if key == "method":
            raise UserError(
                f"resume: {checkpoint} was trained by {before}, this run trains by {now}; give method {before}"
            )
        if key == "modules":
            name = min({*before} ^ {*now})
            one, other = ("adapts", "does not") if name in before else ("does not adapt", "does")
            raise UserError(f"resume: {checkpoint} {one} {name}, this run {other}")
        raise UserError(f"resume: {checkpoint} has {key} {before}, this run asks for {now}")


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back; sets as lists, and what it cannot hold by its type alone."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else type(value).__name__

    return json.loads(json.dumps(settings, default=plain))


def _check_scaling(folder: Path, config: Any) -> None:
    """Refuse a saved LoRA whose factors go with another rank or scaling than this config's (UserError)."""
    if not isinstance(config, LoraConfig) or not (folder / CONFIG_FILE).is_file():
        return
    saved, live = read_json(folder / CONFIG_FILE), config.to_dict()
    for key in SCALED_BY:
        if (saved.get(key) or None) != (live.get(key) or None):
            raise UserError(f"resume: {folder} has {key} {saved.get(key)}, this run asks for {live.get(key)}")


def record_processes(checkpoint: Path, processes: int, batch: int, engine: str | None) -> None:
    """Write down how many processes trained, the rows of one optimizer step over all of them, and what shards weights."""
    write_json(checkpoint / PROCESSES_FILE, {"processes": processes, "batch": batch, "engine": engine})


def check_processes(checkpoint: Path, processes: int, batch: int, engine: str | None) -> None:
    """Refuse to go on from a checkpoint with other batches; with the same ones another number of processes is fine.

    The rows of each step are then the same in the same order, and only sums are rounded otherwise.

    Args:
        checkpoint: of any number of processes.
        processes, batch, engine: of this run, as in `record_processes`; the engine is "DeepSpeed", "FSDP" or None.

    Raises:
        UserError: other batches, an optimizer that another engine has written, or another number of processes under DeepSpeed,
            whose checkpoints bind it.
    """
    if not (checkpoint / PROCESSES_FILE).is_file():
        return
    before = read_json(checkpoint / PROCESSES_FILE)
    if before["batch"] != batch:
        raise UserError(
            f"resume: {checkpoint} was trained in batches of {before['batch']} ({before['processes']} processes), this "
            f"run takes {batch} ({processes} processes); keep the total batch, or the number of processes"
        )
    if "engine" in before and before["engine"] != engine and _holds_optimizer(checkpoint):
        one, other = (f"under {name}" if name else "without FSDP or DeepSpeed" for name in (before["engine"], engine))
        raise UserError(
            f"resume: {checkpoint} was trained {one}, and its optimizer cannot be read {other}; start with the same "
            "configuration of accelerate"
        )
    if before["processes"] == processes:
        return
    if engine == "DeepSpeed":
        raise UserError(
            f"resume: {checkpoint} was written by {before['processes']} processes of DeepSpeed, which cannot go on with "
            f"{processes}; start {before['processes']}"
        )
    logger.warning(
        f"resume: {checkpoint.name} was written by {before['processes']} processes, this run has {processes}; batches "
        "and their order stay, but for one that rows do not fill; results agree to rounding"
    )


def remove_old(newest: Path, keep: int | None, best: str | None) -> None:
    """Remove what killed runs left half-written, then the oldest checkpoints until `keep` are left.

    Those of later steps than the newest are an earlier run's in the same folder, so they are the oldest; the others are
    as old as their step says. A checkpoint that another trainer wrote, and which does not say whether it is whole, is no
    half-written one.

    Args:
        newest: the checkpoint that was just written, which stays.
        keep: `save_total_limit`; None or 0 for all.
        best: the best checkpoint, which stays.
    """
    for path in checkpoints_in(newest.parent):
        if not any(path.iterdir()) or ((path / BEGUN_FILE).is_file() and not is_whole(path)):
            shutil.rmtree(path, ignore_errors=True)
    if not keep or keep < 0:
        return
    left = checkpoints_in(newest.parent)
    later = left.index(newest) + 1
    by_age = left[later:] + left[:later]
    stay = [path for path in left if path == newest or (best is not None and path.resolve() == Path(best).resolve())]
    removable = [path for path in by_age if path not in stay]
    for path in removable[: max(0, len(left) - max(keep, len(stay)))]:
        shutil.rmtree(path, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints by rising step: by their number, since clocks go backwards."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def _pushing_what_was_trained() -> contextlib.AbstractContextManager[None]:
    """Have uploads leave out `NOT_PUSHED`, but for those of a checkpoint, a folder in the repository, which resumes with it."""
    upload = HfApi.upload_folder

    def upload_folder(*args: Any, **options: Any) -> Any:
        if options.get("path_in_repo") is None:
            options["ignore_patterns"] = [*(options.get("ignore_patterns") or ()), *NOT_PUSHED]
        return upload(*args, **options)

    return replaced(HfApi, "upload_folder", upload_folder)


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # the Trainer class that the mixin is put before


class SavingMixin(Base):
    """Put before a Trainer class: complete checkpoints and adapters, and a resume that takes no step too many."""

    model: Any  # a PeftModel, or a PreTrainedModel where every weight trains
    resumed_from: Path | None = None  # the checkpoint that the current training resumed from

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint that is either whole or not there for `last_checkpoint`; only then let older ones go."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)
        if self.args.should_save:
            write_json(checkpoint / BEGUN_FILE, {"step": self.state.global_step})
        keep, push = self.args.save_total_limit, self.args.push_to_hub
        # What is not whole yet is neither counted nor uploaded.
        self.args.save_total_limit, self.args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = keep, push
        if self.args.should_save:
            self._keep_start(checkpoint)
            self._call_back("save_state", checkpoint)  # `on_save` would come after it is marked as complete
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            record_processes(checkpoint, *self._trained_by())
            mark_complete(checkpoint)
        if push:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            remove_old(checkpoint, keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # nobody goes on, or ends, before it is whole

    def _call_back(self, name: str, *given: Any) -> list[Any]:
        """Call a method of every callback that has it; return what each gave."""
        return [getattr(one, name)(*given) for one in self.callback_handler.callbacks if hasattr(one, name)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter or the model, whole whatever the engine; all processes call it, the first one writes."""
        if not parameters_are_sharded(self.model):
            super().save_model(output_dir, _internal_call)
        else:
            with self.whole_to_save():
                self._save(output_dir)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        adapted = isinstance(self.model, PeftModel) and adapted_layers(self.model, self.adapter_name)
        if self.args.should_save and adapted:
            folder = _adapter_folder(Path(output_dir or self.args.output_dir), self.adapter_name)
            check_saved_adapter(folder, self.model, adapter_name=self.adapter_name)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent trainer, without what the output folder holds beside what was trained."""
        with _pushing_what_was_trained():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with _pushing_what_was_trained():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def whole_to_save(self, *, write: bool = False) -> Iterator[None]:
        """Have what is saved whole on every process, under the names by which PEFT saves and loads it.

        All processes enter and leave it together; no forward pass may run inside. `write` as in `whole_parameters`.
        """
        reshard(self.model)
        with without_checkpointing(self.model), whole_parameters(*self.saved_modules(), write=write):
            yield

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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, never read

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what trains, as PEFT saved it; from an engine that shards too, whose own file of it is not used."""
        checkpoint = Path(resume_from_checkpoint)
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        sharded = parameters_are_sharded(self.model)
        for name in self.model.peft_config:  # the one that trains, and such as DPO's reference
            inside = _adapter_folder(checkpoint, name)
            if name != self.adapter_name and not inside.is_dir():
                continue
            _check_scaling(inside, self.model.peft_config[name])
            if not sharded:
                self.model.load_adapter(str(inside), name, is_trainable=name == self.adapter_name)
                continue
            with self.whole_to_save(write=True):
                copy_into(self.model, load_peft_weights(str(inside), device="cpu"), name)
        if dist.is_initialized():
            dist.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the parent trainer, with a group more beside factors that are saved as rank 2r.

        Their moments have rank r, past whose ends another trainer's fused Adam would read and write; so it refuses them.
        """
        adapted = adapted_layers(self.model, self.adapter_name) if isinstance(self.model, PeftModel) else {}
        residual = any(residual_of(layer, self.adapter_name) for layer in adapted.values())
        with contextlib.ExitStack() as stack:
            by_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled  # which loads it without asking us
            if residual and not by_engine and isinstance(adam := bare(self.optimizer), torch.optim.Adam):
                hook = adam.register_state_dict_post_hook(lambda _, state: state["param_groups"].append(OF_RANK_R))
                stack.callback(hook.remove)
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the parent trainer; a rate or decay of the checkpoint's that is not what is asked for now is told in a line."""
        groups = getattr(self.optimizer, "param_groups", ())
        asked = [_kept_settings(group) for group in groups]
        with contextlib.ExitStack() as stack:
            if isinstance(adam := bare(self.optimizer), torch.optim.Adam):
                stack.callback(adam.register_load_state_dict_pre_hook(_without_mark).remove)
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except ValueError as error:
                reason = f"the optimizer in {checkpoint} is another than this run's ({first_line(error)})"
                raise UserError(f"resume: {reason}; give the same optim") from error
        _check_moments(adam, checkpoint)
        told = set()
        for group, wanted in zip(getattr(self.optimizer, "param_groups", ()), asked):
            kept = _kept_settings(group)
            told |= {(key, kept[key], value) for key, value in wanted.items() if kept[key] != value}
        for key, held, value in sorted(told, key=str):
            logger.warning(
                f"resume: the optimizer goes on with {KEPT_BY_OPTIMIZER[key]} {held}, which {checkpoint} holds, not with "
                f"{value}; to change it, give its adapter or model to a new trainer"
            )

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _keep_start(self, checkpoint: Path) -> None:
        """Leave in a checkpoint what resuming needs of the start, so that it resumes in any folder and on any machine."""

    def _has_reached_its_end(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is that of the last step; the trainer itself would take one step more.

        A callback that ended the training there says so by `has_ended(checkpoint)`, its state having been loaded.
        """
        if any(self._call_back("has_ended", checkpoint)):
            return True
        saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        steps = self.args.max_steps
        if steps <= 0:
            *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return saved.global_step >= steps

    def find_best(self) -> None:
        """Take the best checkpoint so far from beside the one gone on from, where both may have been moved to.

        Where it is in neither place a line says so, and the best of what follows is the best.
        """
        if self.resumed_from is None or not (self.resumed_from / TRAINER_STATE_NAME).is_file():
            return
        named = TrainerState.load_from_json(str(self.resumed_from / TRAINER_STATE_NAME)).best_model_checkpoint
        places = [self.resumed_from.parent / Path(named).name, Path(named)] if named else []
        found = next((str(path) for path in places if path.is_dir()), None)
        if named and found is None:
            self.state.best_metric = self.state.best_global_step = None
            logger.warning(
                f"resume: the best checkpoint so far, {named}, is gone and not beside {self.resumed_from} either; the best "
                "is that of the steps from here"
            )
        self.state.best_model_checkpoint = found

    def _take_trained(self, checkpoint: Path) -> TrainOutput:
        """Restore the result of a run killed after its last step, the best model where `load_best_model_at_end`."""
        start = time.time()
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.find_best()
        self.resumed_from = None  # found, for what begins below
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or str(checkpoint))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        loss = sum(losses) / max(len(losses), 1)
        metrics = speed_metrics("train", start, num_samples=0, num_steps=0)
        metrics |= {"total_flos": self.state.total_flos, "train_loss": loss, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, loss, metrics)

    def _take_batch_size(self, checkpoint: Path) -> None:
        """Go on with the batch size that `auto_find_batch_size` had found, by which the steps are counted."""
        if self.args.auto_find_batch_size:
            found = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).train_batch_size
            self._train_batch_size = found or self._train_batch_size

    def _trained_by(self) -> tuple[int, int, str | None]:
        """Return the number of processes, the rows of a step, and the engine."""
        processes = self.accelerator.num_processes
        batch = self._train_batch_size * self.args.gradient_accumulation_steps * processes
        return processes, batch, "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None


def _kept_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint decides of an optimizer's group; betas as a tuple, which FSDP2's checkpoints hold as a list."""
    found = {key: group.get(key) for key in KEPT_BY_OPTIMIZER}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def bare(optimizer: Any) -> Any:
    """Return an optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _without_mark(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return state | {"param_groups": [group for group in state["param_groups"] if group != OF_RANK_R]}


def _check_moments(optimizer: Any, checkpoint: str | None) -> None:
    """Refuse moments of other shapes than the weights', past whose ends a fused Adam would read and write (UserError)."""
    for parameter, held in optimizer.state.items() if isinstance(optimizer, torch.optim.Adam) else ():
        if "exp_avg" in held and held["exp_avg"].shape != parameter.shape:
            raise UserError(
                f"resume: the optimizer in {checkpoint} has moments of shape {tuple(held['exp_avg'].shape)} for a weight of "
                f"shape {tuple(parameter.shape)}; give its adapter or model to a new trainer"
            )


def _adapter_folder(folder: Path, adapter_name: str) -> Path:
    """Return where PEFT's `save_pretrained` puts an adapter."""
    return folder if adapter_name == "default" else folder / adapter_name
