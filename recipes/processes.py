"""The processes of one launch: that all are there, that they meet, and how the runs of a grid are spread over them.

A grid's runs are independent, so each process takes runs of its own, alone, on a device of its own. A run then is what one
process makes of it, to the last bit, and processes wait for each other only through the locks on the runs' folders. What
shards a model over its processes (FSDP, DeepSpeed), and several machines, work on each run together.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed import DistNetworkError
from tqdm import tqdm

from lora_null.recipes.environment import choose_device
from lora_null.utils.errors import UserError
from lora_null.utils.files import PART, locked, write_text
from lora_null.utils.model_state import replaced
from lora_null.utils.startup import WORKER, WORKERS

LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
JOINED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # without which processes cannot meet
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate reads them
SHARDING_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
MEETING_SECONDS = 1800.0  # that processes wait for each other, as Transformers has it; NCCL's own are 600
TELL_SECONDS = 10.0  # until a process says that it waits for the others
LOG_SECONDS = 10.0  # between two states of a bar in a log


def check_launcher() -> None:
    """Raise a UserError for variables of a launcher that another command has left, and that would make this one of several."""
    several = [name for name in WORLD_SIZES if os.environ.get(name, "1") != "1"]
    for name in ("LOCAL_RANK", *several):
        needed = ("MASTER_ADDR",) if name in WORLD_SIZES[1:] else JOINED_BY
        missing = next((other for other in needed if other not in os.environ), None)
        if name in os.environ and missing is not None:
            raise UserError(
                f"{name}={os.environ[name]} is set, as by a launcher, and {missing} is not; unset {name}, or start with "
                "torchrun or accelerate launch"
            )


def join_processes(seconds: float | None = None, *, cpu: bool = False) -> None:
    """Join the other processes of this run, if there are any, on the device that it computes on.

    Args:
        seconds: for which they may wait for each other (`training.ddp_timeout`); MEETING_SECONDS when not given.
        cpu: compute on the CPU, whatever is here.

    Raises:
        UserError: the port where they meet is taken, nobody answers there, or DeepSpeed is launched and not installed.
    """
    port = os.environ.get("MASTER_PORT")
    check_launcher()
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launcher's configuration asks for DeepSpeed, which is not installed; pip install deepspeed, or unset "
            "ACCELERATE_USE_DEEPSPEED if no launcher is meant"
        )
    choose_device()
    try:
        with _waiting():
            PartialState(cpu, timeout=timedelta(seconds=seconds or MEETING_SECONDS))
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} is in use on this machine; choose another one with "
                "--main_process_port (accelerate, 0 takes a free one) or --master-port (torchrun)"
            ) from None
        raise UserError(
            f"the first process does not answer at {os.environ.get('MASTER_ADDR')}:{port}; check --main_process_ip, "
            "the port and the firewall"
        ) from None


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Say after a while whom this process waits for, and let signals end it: while PyTorch waits, no handler of ours runs."""
    timer = threading.Timer(TELL_SECONDS, _tell_of_waiting)
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if in_main}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}  # none that is ignored
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    timer.daemon = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ["LOCAL_RANK"] == "0":  # one line a machine
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell_of_waiting() -> None:
    others = int(os.environ["WORLD_SIZE"]) - 1
    tqdm.write(
        f"waiting for {others} other process{'es' * (others > 1)} at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']}; unset {', '.join(JOINED_BY)} if no launcher is meant",
        file=sys.stderr,
    )


def is_launched_to_shard() -> bool:
    """Return whether the processes were started for an engine that shares out weights."""
    return any(map(parse_flag_from_env, SHARDING_VARIABLES))


def work_alone() -> None:
    """Turn one of several launched processes into one that knows of no other; call it before any of them has met.

    The first one keeps the terminal: the others show no bars, and print only through `print_line`. On GPUs the process
    starts its program anew, because CUDA reads which of them it may use when it is first asked for any, and never again.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if WORKER not in os.environ:
        if world == 1 or is_launched_to_shard() or int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
            return
        index = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        os.environ |= {WORKER: str(index), WORKERS: str(world)}
        if count := torch.cuda.device_count():
            visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if not is_first_worker():
        tqdm.__init__ = _with_options(tqdm.__init__, disable=True)
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115


@contextlib.contextmanager
def bars(*, hidden: bool) -> Iterator[None]:
    """Hide all progress bars (`training.disable_tqdm`), or draw them more rarely where stderr is no terminal, as in a log."""
    options = {"disable": True} if hidden else {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS}
    with replaced(tqdm, "__init__", _with_options(tqdm.__init__, **options)):
        yield


def _with_options(make: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Return `tqdm.__init__` with options that stand above those that a bar is made with."""
    return lambda bar, *args, **given: make(bar, *args, **given | options)


def workers() -> int:
    """Return over how many processes the runs are spread; 1 where all work on each run together."""
    return int(os.environ.get(WORKERS, 1))


def is_first_worker() -> bool:
    """Return whether this process locks the grid's folder and writes its report."""
    return int(os.environ.get(WORKER, 0)) == 0


def print_line(line: str) -> None:
    """Print a line from any of the workers, in one piece."""
    out = sys.stdout if is_first_worker() else sys.__stdout__
    out.write(f"{line}\n")
    out.flush()


@contextlib.contextmanager
def hold_grid_folder(folder: Path, lock: AbstractContextManager[None]) -> Iterator[None]:
    """Enter `lock`, which claims a grid's folder, in the first worker.

    The others wait until the first has claimed it, in this launch. A UserError of another worker than the first is
    printed here; `exit_status` prints the first one's.
    """
    launcher = psutil.Process(os.getppid())  # the parent of all; its number may have been another's before
    launch, ready = f"{platform.node()} {launcher.pid} {launcher.create_time():.2f}", folder / f".launch{PART}"
    if is_first_worker():
        with lock:
            if workers() > 1:
                write_text(ready, launch)  # and left, for a worker that comes when all is done
            yield
        return
    while not ready.is_file() or ready.read_text(encoding="utf-8") != launch:
        time.sleep(0.2)  # if the first worker fails, the launcher ends this one
    try:
        yield
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        raise


@contextlib.contextmanager
def hold_run_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yield whether this worker holds the lock on a run's folder: False while another does, unless told to wait."""
    if workers() == 1:
        yield True
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=wait) as held:
        yield held
