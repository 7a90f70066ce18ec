"""Runs of the real command in worlds of several processes, forked from one that has imported everything and done nothing.

accelerate (1.15) takes FSDP and DeepSpeed for GPUs alone and silently runs DDP on a CPU. `AcceleratorState` is told otherwise
here; everything behind it, accelerate's `fsdp2_prepare_model`, torch's `fully_shard`, DeepSpeed's engine, is the real one.
"""

import faulthandler
import gc
import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from launched import environment_of

from lora_null.recipes.__main__ import main
from lora_null.recipes.models import bases

ENGINES = ("fsdp2", "zero2", "zero3")
# Killed after half of the steps.
RESUMED = {"resumed-1": "ddp-4"} | {f"{engine}_resumed-2": f"{engine}-2" for engine in ENGINES}
KILLED = {"fsdp2_killed-2": "fsdp2-2"}  # after the last step, before the evaluation
FEWER_METHODS = ("ddp-4", "resumed-1")
REFUSED = "refused-2"  # by a finished run in the folder
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["lora_null.recipes.run", "launched"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_cpu(engine: str) -> None:
    """Let accelerate take the engine of the environment for one that works on a CPU."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, deepspeed_plugin=None, mixed_precision=None, **options):
        plugins = {"fsdp_plugin": fsdp_plugin, "deepspeed_plugin": deepspeed_plugin}
        original(self, *args, mixed_precision=mixed_precision, **plugins, **options)
        if fsdp_plugin is not None:
            kind, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        elif deepspeed_plugin is not None:
            from deepspeed import comm

            if not comm.is_initialized():
                comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            kind = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision(mixed_precision or "no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
        else:
            return
        self.distributed_type = PartialState._shared_state["distributed_type"] = kind

    AcceleratorState.__init__ = init
    bases.fits = lambda base: False  # the base is evaluated in pieces, too
    os.environ.update(environment_of(engine), ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")


def begin(
    count: int,
    words: list[str],
    said: Path,
    engine: str | None = None,
    run: Callable[[list[str]], int] = main,
    context: BaseContext = FORK,
) -> list[BaseProcess]:
    """Start the command, or another function of words, in `count` forked processes, which write into `said`."""
    port = free_port()
    children = [context.Process(target=_child, args=(i, count, port, words, said, engine, run)) for i in range(count)]
    for child in children:
        child.start()
    return children


def world(*args: Any, seconds: float = 300, **options: Any) -> list[int]:
    """Begin processes and return their exit statuses; one that takes longer than that is ended, with status -9."""
    children, until = begin(*args, **options), time.monotonic() + seconds
    for child in children:
        child.join(max(0, until - time.monotonic()))
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _child(
    i: int, count: int, port: int, words: list[str], said: Path, engine: str | None, run: Callable[[list[str]], int]
) -> None:
    gc.freeze()  # a run makes several collections, which take half a second each with all that is imported
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    place = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    if count > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()  # where each thread was, if a library aborts
    if engine:
        on_cpu(engine)
    status = run(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not waiting for the engines' threads


def unfinished(source: Path, folder: Path, *, half: bool = True) -> None:
    """Copy a run as it was after half of its steps, or after all of them and not evaluated."""
    shutil.copytree(source, folder)
    for path in [*folder.glob("report.*"), folder / "results.json", *folder.glob("*/row.json")]:
        path.unlink()
    for path in [*(folder.glob("*/checkpoint-4") if half else ()), *folder.glob("*/adapter")]:
        shutil.rmtree(path)


def worlds_of(recipe: Path, folder: Path, names: Sequence[str], context: BaseContext = FORK) -> dict[str, list[int]]:
    """Run the command in worlds one after another; leave FOLDER/NAME of each, and FOLDER/NAME.txt with what was said.

    Args:
        recipe: the YAML.
        folder: for all of them.
        names: such as "fsdp2-2", whose last number is that of the processes.
        context: how processes are made.

    Returns:
        The exit statuses of each.
    """
    found = {}
    for name in names:
        engine, *_, count = re.split("[_-]", name)
        words = [str(recipe), "--output-dir", str(folder / ("one-1" if name == REFUSED else name))]
        if name in RESUMED or name in KILLED:
            unfinished(folder / (RESUMED | KILLED)[name], folder / name, half=name in RESUMED)
            words.append("--resume")
        if name in FEWER_METHODS:
            words += ["--method", "lora-null-v1,nb-lora"]  # enough, and half as long
        engine = engine if engine in ENGINES else None
        found[name] = world(int(count), words, folder / f"{name}.txt", engine, context=context)
    return found
