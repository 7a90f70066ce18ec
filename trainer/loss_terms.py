"""What a method adds to the loss of a step: over its passes and processes, and in the log."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_null.trainer.checkpoints import Base
from lora_null.trainer.methods import Method, MicroBatch
from lora_null.trainer.methods.base import check_terms
from lora_null.trainer.trl_internals import loss_of_labeled_positions
from lora_null.utils.errors import UserError


class LossTermsMixin(Base):
    """Put before a Trainer class: the terms of its method's `extra_loss` enter the loss, each once a step.

    Attributes:
        _micro_batch: the pass that was last; None before the first one of a training.
        _terms: name → step → its value, since the last log line that had them.
    """

    method: Method

    def forget_terms(self) -> None:
        """Forget which pass it was, and what the method added to the loss of the steps since the last log line."""
        self._micro_batch: MicroBatch | None = None
        self._terms: dict[str, dict[int, torch.Tensor]] = {}  # name → step → its value

    def check_passes(self) -> None:
        """Check that each pass of a step called our `compute_loss` once, without which a term enters in part or not at all.

        Raises:
            UserError: a trainer that computes its loss elsewhere, or in several calls.
        """
        passes, last = self.current_gradient_accumulation_steps, self._micro_batch
        calls = last.index + 1 if last is not None else 0
        if self.method.terms and calls != passes:
            raise UserError(
                f"method: {self.method.name} adds its term in LoraNullMixin.compute_loss, which {type(self).__name__} does not "
                f"call once per pass (passes of this step: {passes}, calls: {calls}); call super().compute_loss so, or take a "
                "method without a term, such as lora"
            )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the parent trainer's loss; in training with what the method adds, see `Method.extra_loss`."""
        with loss_of_labeled_positions():
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.method.terms or not self.model.training:
            return found
        step, before = self.state.global_step, self._micro_batch
        index = before.index + 1 if before is not None and before.step == step else 0
        self._micro_batch = MicroBatch(step, index, self.current_gradient_accumulation_steps)
        # `Trainer.training_step` divides an unscaled loss by the accumulation steps; a term is a share: undo that.
        scale = 1 if self._loss_is_scaled(num_items_in_batch) else self._micro_batch.count
        loss, *rest = found if return_outputs else (found,)
        added = self.method.extra_loss(self, model, self._micro_batch)
        check_terms(self.method, added)
        for name, term in added.items():
            loss = loss + (scale * term.weight) * term.value.to(loss.device)
            steps = self._terms.setdefault(name, {})
            steps[step] = steps.get(step, 0.0) + term.value.detach()
        return (loss, *rest) if return_outputs else loss

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Return whether the loss is one over all passes of a step already, as `Trainer.training_step` asks."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or self.compute_loss_func is not None

    def _logged_terms(self) -> dict[str, float]:
        """Return the means of the loss's terms over all processes, and the steps since a log line last had them."""
        means = {name: torch.stack([*steps.values()]).mean() for name, steps in self._terms.items()}
        self._terms = {}
        return {name: float(self.accelerator.reduce(mean, "mean")) for name, mean in means.items()}
