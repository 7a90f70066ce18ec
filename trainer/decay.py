"""Weight decay that pulls a residual method back to the original model instead of away from it.

AdamW's decay takes a factor to zero: A ← (1 − ηλ) A − η u, for its update u, the rate η and the decay λ. On the base
W0 − s·B0A0 a model with A = B = 0 is not the original one. There decay has to go to the start:

    A ← A − ηλ (A − A0) − η u = [(1 − ηλ) A − η u] + ηλ A0

What is in brackets is the optimizer's own step, so ηλ A0 (and ηλ B0) is added after it. Where B starts at zero on the
untouched base, decay to zero is decay of the change already.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from lora_null.config import starts_from_residual
from lora_null.layer import active_adapter, active_config, adapted_layers, factors_of, is_started, residual_of
from lora_null.utils.errors import UserError
from lora_null.utils.sharding import whole_parameters

OWN_GROUPS = {"params", "model", "optimizer_dict"}  # options by which transformers lets an optimizer make its groups
OFF = "decay_to_start=False lets weight decay pull to zero"


def decays_to_start(
    asked: bool | None, model: nn.Module, args: Any, optimizer: Any, *, deepspeed: bool, kind: type | None = None
) -> bool:
    """Return whether decay goes to the start: as asked, else where the base is residual and the optimizer allows it.

    Args:
        asked: the trainer's `decay_to_start`.
        model: with its adapter.
        args: the training arguments.
        optimizer: the user's own; None where `args` says which.
        deepspeed: whether DeepSpeed trains.
        kind: the class of the optimizer that is made, where `args` does not say which.

    Raises:
        UserError: it is asked for where it means nothing, or is due where it cannot be done.
    """
    config = active_config(model)
    groups = optimizer.param_groups if optimizer is not None else [{"weight_decay": args.weight_decay}]
    decay = max(group.get("weight_decay", 0.0) for group in groups)
    residual = starts_from_residual(config) and not _started_without_residual(model)
    check_decay_to_start(asked, config, decay, residual=residual)
    if asked is False or not residual:
        return False
    try:
        check_optimizer(optimizer_name(args, optimizer, kind), deepspeed=deepspeed)
    except UserError:
        if decay:
            raise
        return False
    return True  # without decay too: the optimizer of a checkpoint may bring one


def _started_without_residual(model: nn.Module) -> bool:
    """Return whether an adapter was loaded, as a plain LoRA on the untouched base, with a config that would start from one."""
    name = active_adapter(model)
    return is_started(model, name) and not any(residual_of(x, name) for x in adapted_layers(model, name).values())


def optimizer_name(args: Any, optimizer: Any, kind: type | None) -> str:
    """Return the name of the optimizer that was given, of the class that was, or of `args`."""
    kind = type(optimizer) if optimizer is not None else kind
    named = str(getattr(args.optim, "value", args.optim))
    return named if kind is None else getattr(kind, "__name__", repr(kind))


def averages(name: str) -> bool:
    """Return whether an optimizer's weights are an average that it makes of others, which no callback reaches."""
    return "schedule" in name.lower()  # a schedule-free one


def steps_in_backward(name: str) -> bool:
    """Return whether an optimizer steps inside the backward pass: callbacks see neither its gradients nor its groups."""
    return "layerwise" in name.lower() or "lomo" in name.lower()


def check_optimizer(name: str, *, deepspeed: bool) -> None:
    """Raise a UserError for an optimizer, by its name, or DeepSpeed, whose decay cannot be turned to the start."""
    if deepspeed:
        raise UserError(f"decay_to_start: DeepSpeed keeps weights of its own that it cannot reach; {OFF}")
    if steps_in_backward(name):
        raise UserError(f"decay_to_start: {name} steps inside the backward pass, where it cannot be added; {OFF}")
    if "adamw" not in name.lower() or averages(name):
        raise UserError(f"decay_to_start: is defined for AdamW, not for {name}; {OFF}")


def check_decay_to_start(asked: bool | None, config: Any, decay: float, *, residual: bool) -> None:
    """Raise a UserError where decay to the start is asked for and means nothing.

    Args:
        asked: True, False, or None for the default.
        config: the adapter's; None for none.
        decay: the weight decay.
        residual: whether the base is, or is going to be, a residual one.
    """
    if not asked:
        return
    if not residual:
        lora = isinstance(config, LoraConfig)
        why = "decay to zero is decay of the change here" if lora else "it is defined for methods that start from one"
        raise UserError(f"decay_to_start: there is no residual base to go back to; {why}, leave it out")
    if not decay:
        raise UserError("decay_to_start: there is no decay, weight_decay is 0")


def check_decay_is_read(args: Any, kind: Any, options: Mapping[str, Any]) -> None:
    """Raise a UserError where an optimizer would not read the weight decay that is asked for.

    Transformers puts the arguments' decay into the optimizer's groups, over any among its options. An optimizer that makes
    groups of its own takes that of each, else its option, else its default.

    Args:
        args: the training arguments.
        kind: the optimizer's class, or a function that makes it.
        options: what it is made with.
    """
    is_class = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    params = options.get("params")
    params = params if isinstance(params, list | tuple) else []  # a generator can be read only once
    groups = [group for group in params if isinstance(group, dict)] or [{}]
    default = args.weight_decay  # what a function of the user's takes is not known
    if is_class and OWN_GROUPS & options.keys() and (own := inspect.signature(kind).parameters.get("weight_decay")):
        default = own.default
    found = [group.get("weight_decay", options.get("weight_decay", default)) for group in groups]
    if args.weight_decay not in found:
        raise UserError(
            f"weight_decay: {found[0]} of {optimizer_name(args, None, kind)} and {args.weight_decay} of the training "
            f"arguments differ; set the latter to {found[0]}"
        )


class DecayToStart(TrainerCallback):
    """Adds ηλ A0 and ηλ B0 to the factors that a step has decayed, with the η and λ of that step."""

    @torch.no_grad()
    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # a float16 gradient that overflowed
            return
        adapter, shares = active_adapter(model), {}
        for group in optimizer.param_groups:
            share = float(group["lr"] * group.get("weight_decay", 0.0))  # one of a user's own may have no decay
            # Without a gradient, as an unused expert's, AdamW has not decayed it.
            shares |= {id(p): share for p in group["params"] if p.grad is not None}
        for layer in adapted_layers(model, adapter).values():
            residual = residual_of(layer, adapter)
            own = [shares.get(id(factor), 0.0) for factor in factors_of(layer, adapter)]
            if residual is None or not any(own):
                continue
            device = factors_of(layer, adapter)[0].device
            layer.residual = residual = residual.to(device)  # and it stays: every step asks for it
            with whole_parameters(layer.lora_A, layer.lora_B, write=True):
                for factor, start, share in zip(factors_of(layer, adapter), (residual.A, residual.B), own):
                    factor.add_(start.to(factor), alpha=share)
