"""Spread the runs of a grid over the processes of one machine: each takes whole runs, alone, on a device of its own.

A run then is what one process makes of it, to the last bit, and processes wait for each other only through the locks on
the runs' folders. What shards a model over its processes (FSDP, DeepSpeed), and several machines, work on each run together.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from tqdm import tqdm

from lora_null.recipes.output import locked
from lora_null.utils.errors import WORKER, UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TOGETHER = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
COUNT = "LORA_NULL_WORKERS"


def go_alone() -> None:
    """Turn one of several launched processes into one that knows of no other; call it before any of them has met.

    The first one keeps the terminal: the others show no bars, and print only through `say`.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    together = any(os.environ.get(name, "").lower() in ("true", "1") for name in TOGETHER)
    if world == 1 or together or int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        return
    index = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index % len(visible.split(","))]
    for name in LAUNCHED:
        os.environ.pop(name, None)
    os.environ |= {WORKER: str(index), COUNT: str(world)}
    if index:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def workers() -> int:
    """Return among how many processes the runs are spread; 1 where all work on each run together."""
    return int(os.environ.get(COUNT, 1))


def is_first() -> bool:
    """Return whether this process takes the grid's folder and writes its report."""
    return int(os.environ.get(WORKER, 0)) == 0


def say(line: str) -> None:
    """Print a line from any of the processes, in one piece."""
    out = sys.stdout if is_first() else sys.__stdout__
    out.write(f"{line}\n")
    out.flush()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell a mistake that this process has met in its own runs; the first one's, and what all meet, `exit_status` tells."""
    try:
        yield
    except UserError as error:
        if not is_first():
            tqdm.write(f"error: {error}", file=sys.stderr)
        raise


@contextlib.contextmanager
def opened(folder: Path, taken: AbstractContextManager[None]) -> Iterator[None]:
    """Enter `taken`, which claims a grid's folder, in the first process; the others wait until it has."""
    ready = folder / f".open.{platform.node()}.{os.getppid()}"  # processes of one launch have one parent
    if is_first():
        with taken:
            if workers() > 1:
                ready.touch()
            try:
                yield
            finally:
                ready.unlink(missing_ok=True)
        return
    while not ready.is_file():  # if the first process fails, the launcher ends this one
        time.sleep(0.2)
    yield


@contextlib.contextmanager
def mine(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yield whether a run's folder is this process's to work in: False while another holds it, unless told to wait."""
    if workers() == 1:
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=wait) as ours:
        yield ours
