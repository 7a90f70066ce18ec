"""What happens around a training's steps: progress, log, memory, divergence, and the end by a signal."""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_null.eval_harness.probe import PREFIX, SECONDS
from lora_null.recipes.environment import free_memory
from lora_null.recipes.results import Row, load_log
from lora_null.utils.distributed import is_first_process
from lora_null.utils.files import check_held, nan_as_null, write_text
from lora_null.utils.sharding import whole_parameters
from lora_null.utils.startup import SIGTERM_STATUS, end_with_launcher

LOGGED = {name: name for name in ("step", "loss", "learning_rate", "drift_mean", "drift_max")}  # Trainer's name → ours
LOGGED |= {"num_tokens": "tokens", "rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}


class ProgressBar(ProgressCallback):
    """One bar with a rate and the time left, the last loss and drift beside it; on the main process only."""

    REPLACES = (ProgressCallback, PrinterCallback)

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=self.current_step, desc=self.title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.3f}"}
            if "drift_mean" in logs:
                shown["drift"] = f"{logs['drift_mean']:.2%}"
            self.training_bar.set_postfix(shown, refresh=False)  # drawn with the step


class StopDiverged(TrainerCallback):
    """End a training whose loss is no longer finite: no later step can mend it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0.0))):
            control.should_training_stop = True


def diverged_at(trainer: Trainer) -> int | None:
    """Return the step at which a trained model was first seen to have diverged (loss or weights not finite), or None."""
    losses = ((int(line["step"]), float(line["loss"])) for line in trainer.state.log_history if "loss" in line)
    bad = next((step for step, loss in losses if not math.isfinite(loss)), None)
    with whole_parameters(*trainer.saved_modules()):
        finite = all(p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)
    if bad is None and not finite:
        return trainer.state.global_step
    return bad


class ReleaseMemory(TrainerCallback):
    """Give what calibration and solving have freed back to the system before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        free_memory()


class WriteLog(TrainerCallback):
    """Write METHOD/train_log.jsonl, one line a logging step, each flushed; a resumed run drops the lines it repeats.

    Attributes:
        seconds: that the training's steps took, in all starts of the run, without probes and saves; known at the end.
    """

    def __init__(self, path: Path, terms: tuple[str, ...]) -> None:
        self.path = path
        self.logged = LOGGED | {name: name for name in terms}  # of the loss, see `Method.terms`
        self.seconds = self.seconds_before = self.probing = 0.0
        self.tokens_before = 0
        self.start = self.saving = time.perf_counter()

    def _until_now(self) -> float:
        """Return the seconds of the training's steps and probes, without saves."""
        return self.seconds_before + time.perf_counter() - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        self.seconds_before, self.probing, self.tokens_before = 0.0, 0.0, 0  # a smaller batch begins anew
        if state.global_step:
            kept = [line for line in load_log(self.path).entries if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if kept:  # TRL counts tokens from zero in every process; the log goes on
            self.seconds_before = kept[-1]["seconds"]
            self.probing = sum(line.get(SECONDS, 0.0) for line in kept)
            self.tokens_before = max(line.get("tokens", 0) for line in kept)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:  # what a resumed run counts its tokens and seconds from
            control.should_log = True

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        probes = {name: value for name, value in (logs or {}).items() if name.startswith(PREFIX)}
        if not state.is_world_process_zero or not logs or ("loss" not in logs and not probes):
            return
        line = {ours: logs[theirs] for theirs, ours in self.logged.items() if theirs in logs} | probes
        line = {"step": state.global_step, **nan_as_null(line)}
        if "tokens" in line:
            line["tokens"] += self.tokens_before
        line["seconds"] = round(self._until_now(), 3)
        self.probing += line.get(SECONDS, 0.0)
        check_held(self.path)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.saving = time.perf_counter()  # a save is logged right before

    def on_save(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.start, self.saving = self.start + now - self.saving, now

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = self._until_now() - self.probing


class Trackers:
    """The trackers of `training.report_to`, kept open past the last step until a method's results are in.

    Args:
        trainer: has them among its callbacks already.
    """

    def __init__(self, trainer: Trainer) -> None:
        known = get_reporting_integration_callbacks(trainer.args.report_to)
        kinds = [kind for kind in known if isinstance(kind, type)]
        self.trainer = trainer
        self.held = [c for c in trainer.callback_handler.callbacks if isinstance(c, tuple(kinds))]
        for tracker in self.held:
            tracker.on_train_end = lambda *_, **__: None
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir:  # of TENSORBOARD_LOGGING_DIR
                tracker.logging_dir = str(Path(tracker.logging_dir, trainer.args.run_name))
        wandb = any(isinstance(c, WandbCallback) for c in self.held)
        self.wandb = importlib.import_module("wandb") if wandb else None
        self.joined = self.wandb is not None and self.wandb.run is not None  # a run of whoever called us

    def finish(self, before: Row, after: Row) -> None:
        """Log what the report's table says of the base and of this method, and end the tracker's run."""
        if not self.held:
            return
        trainer = self.trainer
        logs = {f"eval_{name}": metric.value for name, metric in after.metrics.items()}
        logs |= {f"eval_base {name}": metric.value for name, metric in before.metrics.items()}
        drift = after.drift.model_dump() if after.drift else {}
        logs |= {f"eval_drift_{key}": value for key, value in drift.items()}
        logs |= {f"eval_{key}_seconds": value for key, value in after.seconds if value is not None}
        for tracker in self.held:
            now = (trainer.args, trainer.state, trainer.control)
            tracker.on_log(*now, logs=dict(logs), model=trainer.model)
            del tracker.on_train_end
            tracker.on_train_end(*now, model=trainer.model, processing_class=trainer.processing_class)
        if self.wandb is not None and not self.joined and trainer.is_world_process_zero():
            self.wandb.finish()  # or the next method would be logged into this one's run


class KeepCard(TrainerCallback):
    """Put a method's card where PEFT and TRL leave stubs of theirs, into checkpoints too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8") if path.is_file() else ""

    def put_back(self, *_: Any, **__: Any) -> None:
        """Write the card into the method's folder; in place of `Trainer.create_model_card`."""
        if is_first_process():
            write_text(self.path, self.text)

    def save_state(self, checkpoint: Path) -> None:
        """Write the card into a checkpoint before that is marked as complete."""
        write_text(checkpoint / self.path.name, self.text)


class SaveOnSignal(TrainerCallback):
    """In training finish the step, save a checkpoint, and end: on SIGTERM with 143 (a cluster takes the machine away), on
    Ctrl-C as an interrupt, which a second one makes at once.

    Transformers has `enable_jit_checkpoint` for this. It waits three seconds first, may save in the middle of a step, and
    knows of one process alone; here the step is finished, so that the resumed run repeats an unbroken one bit for bit, and
    all processes stop at the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked, self.saved = 0, False  # the signal, and whether this step is saved for it
        self.group: Any = None
        self.before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for number in self.SIGNALS:  # `auto_find_batch_size` begins anew without an end
            self.before.setdefault(number, signal.signal(number, self._remember))
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # on the CPU: the accelerator's queue is not waited for

    def _remember(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            end_with_launcher(0)  # it gets Ctrl-C too, and does not wait for the step
            if not self.asked and is_first_process():
                tqdm.write("finishing this step and saving it; Ctrl-C again stops at once", file=sys.stderr)
        self.asked = self.asked or number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = self.asked
        if self.group is not None:
            of_all = torch.tensor(asked)
            dist.all_reduce(of_all, dist.ReduceOp.MAX, group=self.group)
            asked = int(of_all)
        if asked:  # else what came meanwhile waits for the next step, upon which all agree
            self.asked = asked
            control.should_log = control.should_save = control.should_training_stop = self.saved = True

    def on_epoch_end(self, *now: Any, **_: Any) -> None:
        if self.saved:  # before others take this for the end of the training
            self.on_train_end(*now)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        while self.before:
            signal.signal(*self.before.popitem())
        if self.asked and not self.saved:  # it came after the last step: as if it came now
            signal.raise_signal(self.asked)
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked:
            if state.is_world_process_zero:
                print(
                    f"stopped by SIGTERM after step {state.global_step}; --resume goes on from there", file=sys.stderr
                )
            sys.exit(SIGTERM_STATUS)
