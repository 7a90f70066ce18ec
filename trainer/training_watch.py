"""Whether a training has changed anything of what trains, and if not, why."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lora_null.layer import LoraNullLinear, factors_of
from lora_null.utils.sharding import own_piece

SAMPLED = 4096  # numbers of a tensor that are compared before and after training


class TrainingWatch(TrainerCallback):
    """Watches whether training changes anything, and if not, why; it never stops a run that was paid for."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.steps, self.rate, self.reached, self.pushed = 0, 0.0, False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.start = _sample(model)
        self.steps, self.rate, self.reached, self.pushed = 0, 0.0, False, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Note the largest rate, and whether a gradient has ever been there and been anything but zero."""
        self.steps += 1
        self.rate = max([self.rate, *(float(group["lr"]) for group in kwargs["optimizer"].param_groups)])
        if not self.pushed:
            gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
            self.reached |= bool(gradients)
            self.pushed = any(bool(own_piece(gradient)[0].any()) for gradient in gradients)

    def moved(self, model: nn.Module) -> bool:
        """Return whether anything that this process holds of what trains differs from its start, or no step was seen."""
        now = _sample(model)
        moved = (not torch.equal(now[name], then) for name, then in self.start.items() if name in now)
        return not self.steps or any(moved)

    def why_not(self) -> str:
        """Return why nothing moved, as far as the steps tell."""
        if self.rate == 0:
            return "the learning rate was 0 in every step"
        if not self.reached:
            return "no gradient reached what trains"
        return "steps were lost to rounding" if self.pushed else "every gradient was 0"


@torch.no_grad()
def _sample(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return some numbers of everything that trains, copied; of what is sharded this process's own.

    Not of an A that is kept in a basis, whose last bits a projection moves: B trains beside it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraNullLinear)]
    pairs = [factors_of(layer, name) for layer in layers for name in layer.bases]
    projected = {id(A) for A, B in pairs if B.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in projected}
    tensors = {name: own_piece(p.detach())[0].flatten() for name, p in trained.items()}
    return {name: flat[:: max(1, len(flat) // SAMPLED)].clone() for name, flat in tensors.items() if len(flat)}
