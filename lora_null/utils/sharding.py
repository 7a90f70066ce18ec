"""Weights that an engine shares out over the processes: recognized, sharded, and gathered for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lora_null.utils.distributed import num_processes, process_index
from lora_null.utils.model_state import base_model_of


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this process holds, or may hold at any time, only a piece of the tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def count(parameter: nn.Parameter) -> int:
    """Return the number of entries of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def parameters_are_sharded(model: nn.Module) -> bool:
    """Return whether forward passes are collective: FSDP1, FSDP2 or tensor parallel (DTensor), or ZeRO-3."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(is_sharded(p) for p in model.parameters())


def is_launched_with_fsdp2() -> bool:
    """Return whether accelerate's launcher asks for FSDP2, which is known before there is an Accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"


def own_piece(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Return what this process holds of a tensor, and where in the whole one that lies."""
    at = [slice(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tensor, tuple(at)
    mesh = tensor.device_mesh
    for i, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # as torch.chunk cuts it
            span = at[placement.dim]
            each = -(-(span.stop - span.start) // mesh.size(i))
            first = min(span.start + each * mesh.get_local_rank(i), span.stop)
            at[placement.dim] = slice(first, min(first + each, span.stop))
    return tensor.to_local(), tuple(at)


@contextlib.contextmanager
def whole_parameters(*modules: nn.Module, write: bool = False) -> Iterator[None]:
    """Have the parameters of the modules whole on every process inside the block; all enter and leave it together.

    Where nothing is sharded nothing happens. No forward pass may run inside.

    Args:
        modules: whose parameters, those of their submodules too.
        write: keep what is written into the parameters inside, which has to be the same on all processes.
    """
    owners = [owner for module in modules for owner in module.modules()]
    named = [(owner, name, p) for owner in owners for name, p in owner._parameters.items() if p is not None]
    sharded = [(owner, name, p) for owner, name, p in named if is_sharded(p)]
    pieces = [(owner, name, p) for owner, name, p in sharded if isinstance(p, DTensor)]
    with _gathered_by_deepspeed([p for _, _, p in sharded if not isinstance(p, DTensor)], write):
        whole = {}
        for owner, name, p in pieces:
            if id(p) not in whole:  # tied weights are one parameter
                whole[id(p)] = nn.Parameter(p.detach().full_tensor(), requires_grad=p.requires_grad)
            owner._parameters[name] = whole[id(p)]
        try:
            yield
            for p in {id(p): p for _, _, p in pieces}.values() if write else ():
                with torch.no_grad():
                    here = whole[id(p)].detach()
                    p.copy_(distribute_tensor(here, p.device_mesh, p.placements, src_data_rank=None))  # cut, not sent
        finally:
            for owner, name, p in pieces:
                owner._parameters[name] = p


@contextlib.contextmanager
def _gathered_by_deepspeed(parameters: list[nn.Parameter], write: bool) -> Iterator[None]:
    if not parameters:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Share a model out over processes, decoder layer by decoder layer (FSDP2); forward passes are then collective.

    Args:
        model: whole, or without weights (meta device).
        device: of the kind that it is to run on.
    """
    mesh = init_device_mesh(device.type, (num_processes(),))
    inner = base_model_of(model)
    lists = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [(name, x) for name, x in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    for module in (*(layer for _, layers in outermost for layer in layers), *(() if tied else (head, embedding))):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Shard again every FSDP2 group that a forward pass gathered; all processes call it before one of them saves.

    A forward pass without a backward pass leaves the last group whole. What reads the state dict of one process would
    put that one's back in pieces alone. And where TRL's fused loss reads the head without calling it, PyTorch before
    2.13 would still wait for the head, and gather nothing in the next forward pass.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if groups:
        model.state_dict()  # whose hooks do it, whatever pass came before; nothing is copied
    for group in groups:
        group._get_fsdp_state()._modules_to_run_forward.clear()


@contextlib.contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Have a model without what activation checkpointing has put around its layers: PEFT (0.21) saves and loads by names.

    No forward pass may run inside.
    """
    children = [(parent, name, x) for parent in model.modules() for name, x in parent._modules.items()]
    wrapped = [(parent, name, x) for parent, name, x in children if isinstance(x, CheckpointWrapper)]
    for parent, name, wrapper in wrapped:
        parent._modules[name] = wrapper._checkpoint_wrapped_module
    try:
        yield
    finally:
        for parent, name, wrapper in wrapped:
            parent._modules[name] = wrapper


def my_share(keys: Iterable[int], model: nn.Module) -> list[int]:
    """Return the positions in `keys` that this process computes: those whose key is its index modulo their number.

    Where the model's parameters are sharded, every forward pass needs every process, and generation stops at a
    different length for each batch; then all processes compute everything in step, which is slow and always right.
    """
    index, total = (0, 1) if parameters_are_sharded(model) else (process_index(), num_processes())
    return [position for position, key in enumerate(keys) if key % total == index]
