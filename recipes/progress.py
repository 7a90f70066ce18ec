"""What a training run shows and writes while it trains."""

from __future__ import annotations

import gc
import json
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_null.utils.distributed import whole_parameters
from lora_null.utils.files import write_text
from lora_null.utils.model_state import release_freed_memory

KEYS = {"step": "step", "loss": "loss", "learning_rate": "learning_rate", "drift_mean": "drift_mean"}
KEYS |= {"drift_max": "drift_max", "num_tokens": "tokens"}
KEYS |= {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"}  # DPO


class ProgressBar(TrainerCallback):
    """One bar with a rate and the time left, the last loss and drift beside it; on the main process only."""

    REPLACES = (ProgressCallback, PrinterCallback)

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.3f}"}
            if "drift_mean" in logs:
                shown["drift"] = f"{logs['drift_mean']:.2%}"
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class StopDiverged(TrainerCallback):
    """End a training whose loss is no longer finite: no later step can mend it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0.0))):
            control.should_training_stop = True


def diverged_at(trainer: Trainer) -> int | None:
    """Return the step at which a trained model was first seen to have diverged (loss or weights not finite), or None."""
    losses = ((line["step"], float(line["loss"])) for line in trainer.state.log_history if "loss" in line)
    bad = next((step for step, loss in losses if not math.isfinite(loss)), None)
    with whole_parameters(*trainer.saved_modules()):
        finite = all(p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)
    if bad is None and not finite:
        return trainer.state.global_step
    return bad


class ReleaseMemory(TrainerCallback):
    """Give what calibration and solving have freed back to the system before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gc.collect()
        release_freed_memory()


class TrainLog(TrainerCallback):
    """Write METHOD/train_log.jsonl, one line a logging step, each flushed; a resumed run drops the lines it repeats."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds_before = 0.0
        self.tokens_before = 0
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.is_file():
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if kept:  # TRL counts tokens from zero in every process; the log goes on
            self.seconds_before, self.tokens_before = kept[-1]["seconds"], kept[-1].get("tokens", 0)
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = {ours: _finite(logs[theirs]) for theirs, ours in KEYS.items() if theirs in logs}
        line = {"step": state.global_step, **line}
        if "tokens" in line:
            line["tokens"] += self.tokens_before
        line["seconds"] = round(self.seconds_before + time.perf_counter() - self.start, 3)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training log up to where a kill left half a one; none where there is no log."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a number that is not finite is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
