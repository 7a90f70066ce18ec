"""Parameters that an engine keeps in pieces, one on each rank: FSDP2 and tensor parallel (DTensor), ZeRO-3 (`ds_id`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this rank holds, or may hold at any time, only a piece of the tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def count(parameter: nn.Parameter) -> int:
    """Return the number of entries of the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextlib.contextmanager
def whole_parameters(*modules: nn.Module, write: bool = False) -> Iterator[None]:
    """Have the parameters of the modules whole on every rank inside the block; all ranks enter and leave it together.

    Where nothing is sharded nothing happens. No forward pass may run inside.

    Args:
        modules: whose parameters, those of their submodules too.
        write: keep what is written into the parameters inside, which has to be the same on all ranks.
    """
    sharded = [(owner, name, p) for owner, name, p in _owned(modules) if is_sharded(p)]
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
                    p.copy_(distribute_tensor(whole[id(p)].detach(), p.device_mesh, p.placements))
        finally:
            for owner, name, p in pieces:
                owner._parameters[name] = p


def _owned(modules: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in modules:
        for owner in module.modules():
            yield from ((owner, name, p) for name, p in owner._parameters.items() if p is not None)


@contextlib.contextmanager
def _gathered_by_deepspeed(parameters: list[nn.Parameter], write: bool) -> Iterator[None]:
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield
