"""Collectives over the processes of a torch.distributed group that somebody else has initialized, and who says what once."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lora_null.utils.errors import UserError
from lora_null.utils.startup import WORKERS

MEET_SECONDS = 10  # between two meetings of the processes while one of them works


@contextlib.contextmanager
def for_collective(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give a tensor for a collective of torch.distributed: itself, or a copy that comes back.

    A copy where NCCL takes no CPU's, and of one whose rows do not lie one after the other: memory is sent as it lies.
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
    """Give every process the numbers that process `src` has, in place; nothing where there is one process."""
    if num_processes() > 1:
        with for_collective(tensor) as here:
            dist.broadcast(here, src=src)


def broadcast_like(tensor: torch.Tensor | None, like: torch.Tensor, owner: int) -> torch.Tensor:
    """Return on every process the owner's tensor, in the shape, dtype and device of `like`; the others have None."""
    shared = torch.empty_like(like) if tensor is None else tensor.to(like)
    broadcast_tensor(shared, owner)
    return shared


def process_index() -> int:
    """Return which process of the group this is; 0 outside torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Return how many processes the group has; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_here() -> int:
    """Return how many processes of this launch run on this machine and share its memory and cores, also each on its own run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get(WORKERS, 1)))


def is_first_process() -> bool:
    """Return whether this is the one process of all that writes files and prints."""
    return process_index() == 0


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
    """Return the first process's `value` (any picklable object) on every process."""
    if num_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_process(act: Callable[[], Any]) -> Any:
    """Run `act` on the first process alone and return its result on all; what it raises ends all, as in `together`."""
    return broadcast(together(lambda: act() if is_first_process() else None))


def slowly_on_first_process(act: Callable[[], Any]) -> Any:
    """As `on_first_process`, for what may take longer than a collective may wait: all meet every few seconds."""
    if num_processes() == 1:
        return act()
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(act) if is_first_process() else None
        while not broadcast(doing is not None and bool(wait([doing], timeout=MEET_SECONDS).done)):
            pass
    return on_first_process(lambda: doing.result() if doing is not None else None)


def gather(value: Any) -> list[Any] | None:
    """Return the `value` of every process, in order, on the first one; None on the others."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes() if is_first_process() else None
    dist.gather_object(value, values, dst=0)
    return values


def all_gather(value: Any) -> list[Any]:
    """Return the `value` of every process, in order, on all of them."""
    values = [value] * num_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def together(compute: Callable[[], Any], *, alike: type[Exception] | tuple[type[Exception], ...] = UserError) -> Any:
    """Run `compute` on every process and return this one's result, once it has succeeded on all.

    Args:
        compute: has no collective of its own.
        alike: exceptions that all processes raise when one does, such as a user's mistake.

    Raises:
        Exception: what `compute` raised here, or `alike` on another process, or a RuntimeError naming the process that
            failed, so that none waits for ever for one that is gone.
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
    for index, message in enumerate(failures):
        if message is not None:
            raise RuntimeError(f"process {index} failed: {message}")
    return result


def merge_shares(compute: Callable[[], dict[Hashable, Any]]) -> dict[Hashable, Any]:
    """Run `compute` on every process and return the union of all results, the same on every process."""
    return {key: value for share in all_gather(together(compute)) for key, value in share.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device where a module computes: of its first parameter, or, where FSDP2 keeps the pieces on the CPU, of the mesh."""
    first = next(model.parameters())
    mesh = getattr(first, "device_mesh", None)
    return first.device if mesh is None else torch.empty(0, device=mesh.device_type).device
