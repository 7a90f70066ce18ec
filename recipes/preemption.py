"""SIGTERM is a cluster's word that the machine will be taken away: keep what there is, and exit with 143.

Transformers has `enable_jit_checkpoint` for this. It waits three seconds first, may save in the middle of a step, and
knows of one process alone; here the step is finished, so that the resumed run repeats an unbroken one bit for bit, and
all processes stop at the same step.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

EXIT_STATUS = 128 + signal.SIGTERM


def exit_on_sigterm() -> None:
    """Outside training end at once: every file is written whole or not at all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STATUS))


class SaveOnSigterm(TrainerCallback):
    """In training finish the step, save a checkpoint, and end the process with 143."""

    def __init__(self) -> None:
        self.asked = False
        self.group: Any = None
        self.before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.before = signal.signal(signal.SIGTERM, self._remember)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # on the CPU: the accelerator's queue is not waited for

    def _remember(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.group is not None:
            asked = torch.tensor(int(self.asked))
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self.before)
        if self.asked:
            if state.is_world_process_zero:
                print(
                    f"stopped by SIGTERM after step {state.global_step}; --resume goes on from there", file=sys.stderr
                )
            sys.exit(EXIT_STATUS)
