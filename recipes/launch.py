"""Start the processes that `accelerate launch --cpu --num_processes N` was asked for and does not start itself.

On a CPU, without an MPI host file, accelerate (1.15) starts a single process whatever N is, and only sets MASTER_ADDR
and MASTER_PORT for the rest. Found so, that process starts N of its own over gloo and stands for them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from lora_null.utils.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_missing_processes(arguments: Sequence[str]) -> int | None:
    """Run the command in as many processes as were asked for; None when this process is one of a complete set.

    Args:
        arguments: the words after `-m lora_null.recipes`.

    Returns:
        The first exit status that is not 0, else 0.

    Raises:
        UserError: several processes were asked for, and it cannot be found out how many.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if not on_cpu or "MASTER_PORT" not in os.environ or any(name in os.environ for name in RANK_VARIABLES):
        return None
    count = _asked_for()
    if count is None:
        raise UserError("accelerate started one of several CPU processes; use torchrun --nproc_per_node N instead")
    command = [sys.executable, "-m", "lora_null.recipes", *arguments]
    port = _free_port()
    children = [subprocess.Popen(command, env=_environment(rank, count, port)) for rank in range(count)]
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    return _wait(children)


def join_processes() -> None:
    """Join the other processes of this run, if there are any.

    Raises:
        UserError: the port where they meet is taken, or nobody answers there.
    """
    from accelerate import PartialState  # here, so that --list and --help need not wait for torch
    from torch.distributed import DistNetworkError

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        PartialState()
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {os.environ.get('MASTER_PORT')} is in use on this machine; choose another one with "
                "--main_process_port (accelerate, 0 takes a free one) or --master-port (torchrun)"
            ) from None
        raise UserError(
            f"the first process does not answer at {place}; check --main_process_ip, the port and the firewall"
        ) from None


def _asked_for() -> int | None:
    """Return the number of processes on the launcher's own command line."""
    words = psutil.Process().parent().cmdline()
    for word, following in zip(words, [*words[1:], ""]):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            number = value or following
            return int(number) if number.isdigit() else None
    return None


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Wait for all; when one fails the others would wait for it for ever, so they are ended."""
    while True:
        states = [child.poll() for child in children]
        failed = next((state for state in states if state), None)
        if failed is not None:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
            return failed
        if all(state == 0 for state in states):
            return 0
        time.sleep(0.1)
