"""Sharing work over the ranks of a torch.distributed group that somebody else has initialized."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lora_null.utils.errors import WORKERS, UserError
from lora_null.utils.model_state import base_model_of

MEET_SECONDS = 10  # between two meetings of the ranks while one of them works


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this rank holds, or may hold at any time, only a piece of the tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def count(parameter: nn.Parameter) -> int:
    """Return the number of entries of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_launched_with_fsdp2() -> bool:
    """Return whether accelerate's launcher asks for FSDP2, which is known before there is an Accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Share a model out over all ranks, decoder layer by decoder layer (FSDP2); forward passes are then collective.

    Args:
        model: whole, or without weights (meta device).
        device: of the kind that it is to run on.
    """
    mesh = init_device_mesh(device.type, (rank_and_world()[1],))
    inner = base_model_of(model)
    lists = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [(name, x) for name, x in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    for module in (*(layer for _, layers in outermost for layer in layers), *(() if tied else (head, embedding))):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


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


def reshard(model: nn.Module) -> None:
    """Shard again every FSDP2 group that a forward pass gathered; all ranks call it before one of them saves.

    A forward pass without a backward pass leaves the last group whole. What reads the state dict of one rank would put that
    rank's back in pieces alone.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        model.state_dict()  # whose hooks do it, whatever pass came before; nothing is copied


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


@contextlib.contextmanager
def for_collective(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give a tensor for a collective of torch.distributed: itself, or a copy that comes back.

    A copy where NCCL takes no CPU's, and of one whose rows do not lie one after the other: ranks send memory as it lies.
    """
    here = tensor.device.type != "cpu" or "cpu:" in dist.get_backend_config()
    if here and tensor.is_contiguous():
        yield tensor
        return
    device = tensor.device if here else torch.accelerator.current_accelerator()
    moved = tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    yield moved
    with torch.no_grad():
        tensor.copy_(moved)


def broadcast_tensor(tensor: torch.Tensor, src: int) -> None:
    """Give every rank the numbers that rank `src` has, in place; nothing in a world of one."""
    if rank_and_world()[1] > 1:
        with for_collective(tensor) as here:
            dist.broadcast(here, src=src)


def broadcast_like(tensor: torch.Tensor | None, like: torch.Tensor, owner: int) -> torch.Tensor:
    """Return on every rank the owner's tensor, in the shape, dtype and device of `like`; the others have None."""
    shared = torch.empty_like(like) if tensor is None else tensor.to(like)
    broadcast_tensor(shared, owner)
    return shared


@contextlib.contextmanager
def whole_parameters(*modules: nn.Module, write: bool = False) -> Iterator[None]:
    """Have the parameters of the modules whole on every rank inside the block; all ranks enter and leave it together.

    Where nothing is sharded nothing happens. No forward pass may run inside.

    Args:
        modules: whose parameters, those of their submodules too.
        write: keep what is written into the parameters inside, which has to be the same on all ranks.
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


def rank_and_world() -> tuple[int, int]:
    """Return (rank, number of ranks); (0, 1) outside torch.distributed."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def processes_here() -> int:
    """Return how many processes of this launch run on this machine and share its memory and cores, also each on its own run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get(WORKERS, 1)))


def is_first_process() -> bool:
    """Return whether this is the one process of all that writes files and prints."""
    return rank_and_world()[0] == 0


@functools.cache
def print_once(line: str) -> None:
    """Print a line once, by the first process: what is found each time that a run reads its data, or makes its arguments."""
    if is_first_process():
        print(line)


class _FirstProcessLogger(logging.LoggerAdapter):
    """Drops every message but the first process's: all processes come to the same ones."""

    def isEnabledFor(self, level: int) -> bool:
        return is_first_process() and super().isEnabledFor(level)


def get_logger(name: str) -> logging.LoggerAdapter:
    """Return a module's logger, which is heard once whatever the number of processes."""
    return _FirstProcessLogger(logging.getLogger(name))


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` (any picklable object) on every rank."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_rank(act: Callable[[], Any]) -> Any:
    """Run `act` on rank 0 alone and return its result on every rank; what it raises ends all of them, as `together`."""
    return broadcast(together(lambda: act() if is_first_process() else None))


def slowly_on_first_rank(act: Callable[[], Any]) -> Any:
    """As `on_first_rank`, for what may take longer than a collective may wait: all ranks meet every few seconds."""
    if rank_and_world()[1] == 1:
        return act()
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(act) if is_first_process() else None
        while not broadcast(doing is not None and bool(wait([doing], timeout=MEET_SECONDS).done)):
            pass
    return on_first_rank(lambda: doing.result() if doing is not None else None)


def gather(value: Any) -> list[Any] | None:
    """Return every rank's `value` in rank order on rank 0, None on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def all_gather(value: Any) -> list[Any]:
    """Return every rank's `value` in rank order, on every rank."""
    world = rank_and_world()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def parameters_are_sharded(model: nn.Module) -> bool:
    """Return whether forward passes are collective: FSDP1, FSDP2 or tensor parallel (DTensor), or ZeRO-3."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(is_sharded(p) for p in model.parameters())


def my_share(keys: Iterable[int], model: nn.Module) -> list[int]:
    """Return the positions in `keys` that this rank computes: those whose key is `rank` modulo the number of ranks.

    Where the model's parameters are sharded, every forward pass needs every rank, and generation stops at a different
    length for each batch; then all ranks compute everything in step, which is slow and always right.
    """
    rank, world = (0, 1) if parameters_are_sharded(model) else rank_and_world()
    return [position for position, key in enumerate(keys) if key % world == rank]


def together(compute: Callable[[], Any], *, alike: type[Exception] | tuple[type[Exception], ...] = UserError) -> Any:
    """Run `compute` on every rank and return this rank's result, once it has succeeded on all.

    Args:
        compute: has no collective of its own.
        alike: exceptions that every rank raises when one rank does, such as a user's mistake.

    Raises:
        Exception: what `compute` raised here, or `alike` on another rank, or a RuntimeError naming the rank where it
            failed, so that no rank waits for ever for one that is gone.
    """
    result, failure = None, None
    try:
        result = compute()
    except Exception as error:
        failure = error
    told = failure if failure is None or isinstance(failure, alike) else f"{type(failure).__name__}: {failure}"
    failures = all_gather(told)
    if failure is not None:
        raise failure
    for mistake in (found for found in failures if isinstance(found, alike)):
        raise mistake
    for rank, message in enumerate(failures):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed: {message}")
    return result


def merge_shares(compute: Callable[[], dict[Hashable, Any]]) -> dict[Hashable, Any]:
    """Run `compute` on every rank and return the union of all ranks' results, the same on every rank."""
    return {key: value for share in all_gather(together(compute)) for key, value in share.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a module's first parameter."""
    return next(model.parameters()).device
