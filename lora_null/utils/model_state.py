"""Leave a live model as it was found: measuring and evaluating switch modes, adapters and seeds; training must not notice."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_null.utils.quantized import keep_layout

REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # PEFT's starts after which W0 is known no more


def base_model_of(model: nn.Module) -> nn.Module:
    """Return the model that PEFT has put adapters into, or the model itself where it is no PEFT model."""
    return getattr(model, "get_base_model", lambda: model)()


def start_that_rewrites(config: PeftConfig) -> str | None:
    """Return the start of PEFT's by which an adapter has changed its base, which disabling it does not undo; or None."""
    if getattr(config, "starts_from_residual", False):
        return None
    return rewriting(getattr(config, "init_lora_weights", None))


def rewriting(start: Any) -> str | None:
    """Return an `init_lora_weights` of PEFT's that takes A and B out of the base; None for any other."""
    return start if isinstance(start, str) and start.startswith(REWRITES_BASE) else None


def trains_biases(model: nn.Module) -> bool:
    """Return whether biases of the base train beside a PEFT model's adapter, which disabling it does not put back."""
    if not isinstance(model, PeftModel) or getattr(model.active_peft_config, "bias", "none") == "none":
        return False
    return any(name.endswith(".bias") and parameter.requires_grad for name, parameter in model.named_parameters())


@contextlib.contextmanager
def preserve(model: nn.Module, tokenizer=None) -> Iterator[None]:
    """Restore, on the way out, everything about `model` and the process that an evaluation may change.

    That is: train or eval mode of every module; requires_grad of every parameter; which adapters are active, enabled
    and merged; `config.use_cache`; torch's grad mode; the random states of Python, numpy, torch and every CUDA device;
    and the tokenizer's padding side, if one is given. Quantized weights stay as they are stored.
    """
    keep_layout(model)
    modes = [(module, module.training) for module in model.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    adapters = [(x, (x.disable_adapters, list(x.active_adapters), list(x.merged_adapters))) for x in layers]
    active = [(m, m.active_adapter) for m in model.modules() if isinstance(m, PeftModel)]
    config, padding_side = getattr(model, "config", None), getattr(tokenizer, "padding_side", None)
    use_cache, grad_enabled = getattr(config, "use_cache", None), torch.is_grad_enabled()
    random_states = _random_states()
    try:
        yield
    finally:
        for layer, state in adapters:
            _restore_adapter(layer, state)
        for peft_model, name in active:
            peft_model.active_adapter = name
        for parameter, flag in requires_grad:  # after the adapters: PEFT sets requires_grad when it switches them
            parameter.requires_grad_(flag)
        for module, flag in modes:
            module.training = flag
        if config is not None and use_cache is not None:
            config.use_cache = use_cache
        if tokenizer is not None and padding_side is not None:
            tokenizer.padding_side = padding_side
        torch.set_grad_enabled(grad_enabled)
        _restore_random_states(random_states)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner.name` be `value` for a while."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Compute in the dtypes that the weights have: without the caller's autocast, or accelerate's around a model it trains.

    What was measured before training knew neither, and the rounding alone would look like forgetting.
    """
    with contextlib.ExitStack() as stack:
        for device in filter(None, (torch.device("cpu"), torch.accelerator.current_accelerator())):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for module in model.modules():
            if "_original_forward" in vars(module):
                stack.enter_context(replaced(module, "forward", module._original_forward))
        yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Let float32 products be float32: neither autocast nor TF32 inside."""
    with contextlib.ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            # Not `torch.get_float32_matmul_precision`, which raises where TF32 was turned on by backend, as transformers does.
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _restore_adapter(layer: BaseTunerLayer, state: tuple[bool, list[str], list[str]]) -> None:
    """Put back (disabled, active, merged); a layer that nobody touched is not touched here either."""
    disabled, active, merged = state
    if list(layer.merged_adapters) != merged:
        if layer.merged:
            layer.unmerge()
        if merged:
            layer.merge(adapter_names=merged)
    if list(layer.active_adapters) != active:
        layer.set_adapter(active)
    if layer.disable_adapters != disabled:
        layer.enable_adapters(not disabled)


def _random_states() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_states(states: tuple) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def release_freed_memory() -> None:
    """Return freed blocks to the kernel: glibc keeps them, in pieces, and the next large block finds no room there."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
