"""RoseLoRA: LoRA whose rows of A and columns of B grow sparse by sensitivity while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from lora_null.layer import active_adapter, adapted_layers, factors_of
from lora_null.trainer.methods.base import Method, check_option, method
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_safetensors, write_safetensors

logger = get_logger(__name__)
STATE_FILE = "roselora.safetensors"


@method
class RoseLoRA(Method):
    """LoRA's start; after each step only the most sensitive entries of A's rows and B's columns stay.

    The official code covers knowledge editing only; its schedule is the default here, its clamp is an option.

    Attributes:
        final_fraction: τ, the fraction that is kept in the end.
        begin: t_i / T, where pruning begins, as a share of all steps.
        end: t_f / T, where it has reached τ.
        decay: weight of the past in the smoothed sensitivity.
        clamp: clamp A and B to ± this after each step, as the official code does with 3e-3; None (default) does not.
    """

    name = "roselora"
    supports_sharding = False  # entries compete along whole rows and columns
    constrains_delta = True
    # DeepSpeed's backward pass takes the step too: no gradient is left to be weighed, no moment to be cut.
    supports_deepspeed = False
    state_bytes = 4  # the smoothed sensitivity

    final_fraction: float = 0.05
    begin: float = 0.12
    end: float = 0.8
    decay: float = 0.8
    clamp: float | None = None

    def __post_init__(self) -> None:
        fraction, clamp = self.final_fraction, self.clamp
        check_option(0 < fraction <= 1, f"{self.name}.final_fraction", "above 0 and at most 1", fraction)
        check_option(
            0 <= self.begin <= self.end, f"{self.name}.begin", f"at least 0 and at most end ({self.end})", self.begin
        )
        check_option(self.end <= 1, f"{self.name}.end", "at most 1", self.end)
        check_option(0 <= self.decay < 1, f"{self.name}.decay", "at least 0 and below 1", self.decay)
        check_option(
            clamp is None or 0 < clamp < float("inf"), f"{self.name}.clamp", "a number above 0, or none", clamp
        )

    def kept_fraction(self, step: int, steps: int) -> float:
        """Return the fraction kept after optimizer step `step` (from 1) of `steps`: 1, a cubic fall, τ."""
        first, last = self.begin * steps, self.end * steps
        if step <= first and step < last:
            return 1.0
        if step >= last:
            return self.final_fraction
        rest = 1 - (step - first) / (last - first)
        return self.final_fraction + (1 - self.final_fraction) * rest**3

    @property
    def can_stop_early(self) -> bool:
        return self.final_fraction == 1

    def callbacks(self) -> list[TrainerCallback]:
        return [_Prune(self)]


def top_mask(scores: torch.Tensor, fraction: float, dim: int) -> torch.Tensor:
    """Return where `scores` is among the largest along `dim`: exactly max(1, round(fraction · n)) of each n.

    Ties go to the lower position: the least value kept, then the first of those equal to it.
    """
    n = scores.shape[dim]
    keep = max(1, round(fraction * n))
    least = scores.topk(keep, dim=dim).values.narrow(dim, keep - 1, 1)  # kthvalue is not deterministic on CUDA
    above, equal = scores > least, scores == least
    missing = keep - above.sum(dim=dim, keepdim=True)
    return above | (equal & (equal.cumsum(dim=dim) <= missing))


class _Prune(TrainerCallback):
    """Holds the smoothed sensitivities: one float32 tensor a trained factor, as large as one of Adam's moments."""

    def __init__(self, method: RoseLoRA) -> None:
        self.method = method
        self.sensitivity: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and not self.method.can_stop_early:
            raise UserError(
                f"load_best_model_at_end: roselora is as sparse as asked from {self.method.end:g} of the steps on, and an "
                "earlier checkpoint may be the best; leave it out"
            )
        if not state.global_step:
            self.sensitivity = {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Smooth I = |p · grad|, of the gradients as the optimizer will see them; the first enters whole.

        Gradients that are not all finite are left out: a float16 step that has overflowed is not taken.
        """
        reached = [(name, p, p.grad) for name, p, _dim in _factors(model) if p.grad is not None]
        if not get_total_norm([gradient for *_, gradient in reached], float("inf")).isfinite():
            return
        for name, parameter, gradient in reached:
            now = (parameter * gradient).abs().float()
            if name in self.sensitivity:
                past = self.sensitivity[name].to(now.device)
                self.sensitivity[name] = past.lerp_(now, 1 - self.method.decay)
            else:
                self.sensitivity[name] = now

    @torch.no_grad()
    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        """Keep the top entries; what is cut loses its moments too, so that the next step does not bring it back.

        Raises:
            RuntimeError: no gradient has been seen, so nothing tells what to keep.
        """
        if getattr(optimizer, "step_was_skipped", False):  # a float16 gradient that overflowed
            return
        fraction = self.method.kept_fraction(state.global_step + 1, state.max_steps)
        if fraction < 1 and not self.sensitivity:
            raise RuntimeError(
                "roselora: no gradient was there to be read before a step, so nothing tells what to keep"
            )
        for name, parameter, dim in _factors(model):
            if fraction < 1 and name in self.sensitivity:
                cut = ~top_mask(self.sensitivity[name].to(parameter.device), fraction, dim)
                parameter.masked_fill_(cut, 0)
                _cut_moments(optimizer.state.get(parameter, {}), cut)
            if self.method.clamp is not None:
                parameter.clamp_(-self.method.clamp, self.method.clamp)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = self.method.kept_fraction(max(state.global_step, 1), state.max_steps)
        if kept > self.method.final_fraction:
            logger.warning(
                f"roselora: training ended after {state.global_step} of {state.max_steps} steps, with {kept:.3g} of the entries "
                f"kept, not the final_fraction of {self.method.final_fraction:g}, which is reached at {self.method.end:g} of the "
                "steps"
            )

    def save_state(self, checkpoint: Path) -> None:
        """Write what is remembered into a checkpoint, before it is marked as complete."""
        write_safetensors(checkpoint / STATE_FILE, self.sensitivity, {})

    def load_state(self, checkpoint: Path) -> None:
        """Read it back from the checkpoint that training goes on from, before it does."""
        if not (checkpoint / STATE_FILE).is_file():
            raise UserError(f"resume: {checkpoint} is none of roselora, {STATE_FILE} is missing")
        self.sensitivity, _ = read_safetensors(checkpoint / STATE_FILE)


def _cut_moments(state: Mapping[str, Any], cut: torch.Tensor) -> None:
    """Set an optimizer's moments of what is cut to 0: each of the factor's shape, or several of them stacked.

    The 8-bit moments of bitsandbytes, `state1` and `state2`, are codes of numbers in `qmap1` and `qmap2`.
    """
    for name, moment in state.items():
        if torch.is_tensor(moment) and moment.shape[-cut.ndim :] == cut.shape:
            exact = moment.is_floating_point()
            moment.masked_fill_(cut, 0 if exact else int(state[name.replace("state", "qmap")].abs().argmin()))


def _factors(model: nn.Module) -> list[tuple[str, nn.Parameter, int]]:
    """Return (name, factor, the dimension along which entries compete): A's rows over d_in, B's columns over d_out."""
    adapter = active_adapter(model)
    layers = adapted_layers(model, adapter).items()
    factors = [(f"{name}.lora_A", factors_of(layer, adapter)[0], 1) for name, layer in layers]
    return factors + [(f"{name}.lora_B", factors_of(layer, adapter)[1], 0) for name, layer in layers]
