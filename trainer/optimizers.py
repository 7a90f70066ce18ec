"""The optimizer that the trainer makes or is given: whether it fits what trains, and what corrects its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from lora_null.layer import active_config
from lora_null.trainer.checkpoints import SavingMixin, bare
from lora_null.trainer.decay import DecayToStart, averages, check_decay_is_read, decays_to_start, optimizer_name
from lora_null.trainer.methods import Method
from lora_null.trainer.methods.lora_null import KeepInNullBasis
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, first_line

logger = get_logger(__name__)


def named_optimizer(
    args: TrainingArguments, model: nn.Module, make: Callable[..., Any] = Trainer.get_optimizer_cls_and_kwargs
) -> tuple[Any, dict[str, Any]]:
    """Return the class and options of the optimizer that `args.optim` names, for a layerwise one those of its plain kind.

    Making a layerwise one would put hooks on the model, which step in each backward pass.

    Raises:
        UserError: Transformers cannot make it here, as where its package is missing.
    """
    plain, name = copy.copy(args), optimizer_name(args, None, None)
    try:
        if name.endswith("_layerwise"):
            plain.optim = OptimizerNames(name.removesuffix("_layerwise"))
        return make(plain, model)
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(f"optim: {first_line(error)}") from error


class OptimizerMixin(SavingMixin):
    """Put before a Trainer class: an optimizer that cannot train here is refused early, and its steps are corrected.

    Attributes:
        _given_optimizer, _made_optimizer: the user's, and the one that the trainer has made; None for none.
        _made_with: the training arguments that the latter keeps, by name, as they were then; none where it was given.
        _asked_to_start: the trainer's `decay_to_start`.
    """

    method: Method
    _already_trained: bool
    _given_optimizer: torch.optim.Optimizer | None
    _made_optimizer: torch.optim.Optimizer | None
    _made_with: dict[str, float]

    def _check_own_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer of the user's of another decay, or that holds nothing of what trains; say if it holds a part."""
        if self.method.new_parameters and not self._already_trained:
            raise UserError(
                f"optimizers: {self.method.name} gives the layers new factors when training begins, which an optimizer "
                "made before does not hold; leave it out, or give its class by optimizer_cls_and_kwargs"
            )
        decays = [group["weight_decay"] for group in optimizer.param_groups if "weight_decay" in group]
        if decays and self.args.weight_decay and self.args.weight_decay not in decays:
            raise UserError(
                f"weight_decay: {decays[0]} of the optimizer given and {self.args.weight_decay} of the training arguments "
                f"differ; set the latter to {decays[0]}"
            )
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = {name: id(parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = [name for name, parameter in trained.items() if parameter not in held]
        if missing and len(missing) == len(trained):
            adapted = isinstance(self.model, PeftModel)
            why, instead = (", it was made before the adapter", "the PEFT model") if adapted else ("", "its own model")
            raise UserError(
                f"optimizers: holds nothing that trains{why}; give its class by optimizer_cls_and_kwargs, or {instead}"
            )
        if missing:
            logger.warning(
                f"optimizers: {missing[0]} ({len(missing)} of {len(trained)} parameters that train) is not in it and "
                "stays as it is"
            )

    def _check_optimizer(self) -> None:
        """Make the schedule once, and look for the optimizer: what Transformers refuses, it refuses before the initialization."""
        args, probe = self.args, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.args.learning_rate)
        if self.lr_scheduler is None and not self.is_deepspeed_enabled:
            options = dict(args.lr_scheduler_kwargs or {})
            try:
                get_scheduler(args.lr_scheduler_type, probe, 0, 1, scheduler_specific_kwargs=options)
            except (TypeError, ValueError) as error:
                raise UserError(f"lr_scheduler_type: {first_line(error)}") from error
        if args.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel: needs the package liger-kernel; pip install liger-kernel")
        if self.optimizer is not None and self.optimizer is not self._given_optimizer:  # made or set since
            self._check_own_optimizer(self.optimizer)
        if self.optimizer is not None:
            return
        kind, options = self.optimizer_cls_and_kwargs or (None, {})
        name = optimizer_name(args, None, kind)
        if kind is None:
            if "layerwise" in name and (args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1):
                raise UserError(
                    f"optim: {name} steps in each backward pass, so it takes one process and gradient_accumulation_steps=1"
                )
            kind, options = named_optimizer(args, self.model, self.get_optimizer_cls_and_kwargs)
        if self.is_deepspeed_enabled:  # whose own configuration may decide
            return
        check_decay_is_read(args, kind, options)
        if "lr" not in options:
            logger.warning(
                f"learning_rate: {args.learning_rate} is not read by {name}, which takes its own; give lr among the "
                "options of optimizer_cls_and_kwargs"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent trainer; it is remembered as the trainer's own."""
        makes_it = self.optimizer is None  # transformers asks again for a second training
        self._made_optimizer = super().create_optimizer(*args, **kwargs)
        if makes_it:
            read = ("learning_rate", "weight_decay") if self.optimizer_cls_and_kwargs is None else ()
            self._made_with = {key: getattr(self.args, key) for key in read}
        return self._made_optimizer

    def _tell_of_changed_settings(self) -> None:
        """Say what was changed in the arguments since the optimizer was made of them, which goes on with what it had."""
        of_trainer = self.optimizer is not None and bare(self.optimizer) is bare(self._made_optimizer)
        for key, held in self._made_with.items() if of_trainer else ():
            if getattr(self.args, key) != held:
                logger.warning(
                    f"{key}: the optimizer of the first training goes on with {held}, not with {getattr(self.args, key)}; "
                    "trainer.optimizer = None before train() makes a new one"
                )

    def check_stepped_by(self, optimizer: torch.optim.Optimizer) -> None:
        """Check an optimizer that the trainer did not make itself, such as that of an overridden `create_optimizer`."""
        is_own = any(optimizer is one for one in (self._given_optimizer, self._made_optimizer))
        if not is_own and not self.is_deepspeed_enabled and self._decays_to_start(optimizer):
            self.add_callback(DecayToStart())

    def add_callback(self, callback: Any) -> None:
        """As the parent trainer; a second `DecayToStart`, which would act twice, is left out."""
        kind = callback if isinstance(callback, type) else type(callback)
        there = (isinstance(other, DecayToStart) for other in self.callback_handler.callbacks)
        if not (issubclass(kind, DecayToStart) and any(there)):
            super().add_callback(callback)

    def _add_step_callbacks(self, asked: bool | None) -> bool:
        """Add the callbacks that correct a step; return whether weight decay pulls to the start.

        Raises:
            UserError: an optimizer whose steps cannot be corrected.
        """
        self._asked_to_start = asked
        to_start = self._decays_to_start(self.optimizer)
        decay = [DecayToStart()] if to_start else []
        for callback in (*decay, *self.method.callbacks(), KeepInNullBasis()):
            self.add_callback(callback)
        return to_start

    def _decays_to_start(self, optimizer: torch.optim.Optimizer | None) -> bool:
        """Return whether the weight decay of an optimizer, or of the one to be made, pulls to the start.

        Raises:
            UserError: one whose steps cannot be corrected.
        """
        kind, deepspeed = (self.optimizer_cls_and_kwargs or [None])[0], self.is_deepspeed_enabled
        name = optimizer_name(self.args, optimizer, kind)
        if averages(name) and getattr(active_config(self.model), "variant", None) == "nb":
            raise UserError(f"optim: {name} averages weights, and nb-lora's A would leave its basis; use adamw_torch")
        return decays_to_start(self._asked_to_start, self.model, self.args, optimizer, deepspeed=deepspeed, kind=kind)
