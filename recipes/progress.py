"""What a training run shows and writes while it trains."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_null.recipes.environment import release_freed_memory

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step and self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if kept:  # TRL counts tokens from zero in every process; the log goes on
            self.seconds_before, self.tokens_before = kept[-1]["seconds"], kept[-1].get("tokens", 0)
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = {ours: logs[theirs] for theirs, ours in KEYS.items() if theirs in logs}
        line = {"step": state.global_step, **line}
        if "tokens" in line:
            line["tokens"] += self.tokens_before
        line["seconds"] = round(self.seconds_before + time.perf_counter() - self.start, 3)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
