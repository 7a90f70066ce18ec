"""Start a recipe, or go on with it, on one of a cluster's machines: the same line on every machine, the first time and again.

    python -m lora_null.recipes.launch RECIPE [options] [key.subkey=value …]                  # every GPU of every machine
    python -m lora_null.recipes.launch --engine fsdp2 RECIPE [options] [key.subkey=value …]

It reads what Slurm, SkyPilot or Kubeflow (or NNODES, NODE_RANK and MASTER_ADDR) say of the machines, and runs
`accelerate launch … -m lora_null.recipes RECIPE … --resume`. The files in `clusters/` call it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_null.recipes.commands.arguments import Parser
from lora_null.utils.errors import UserError
from lora_null.utils.startup import SIGTERM_STATUS, exit_status

CONFIGURATIONS = Path(__file__).parent / "accelerate"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
# Number of machines, this one's number, and where the first one is: as each cluster calls them.
VARIABLES = (
    ("SLURM_NNODES", "SLURM_NODEID", "MASTER_ADDR"),  # slurm.sh sets the last
    ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"),
    ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR"),  # Kubeflow
    ("NNODES", "NODE_RANK", "MASTER_ADDR"),
)
PORT = "29500"
# torch kills its processes 30 s after a SIGTERM otherwise (2.11 always), in the midst of a large checkpoint
SECONDS_TO_SAVE = "600"


def machines(environment: Mapping[str, str]) -> tuple[int, int, str]:
    """Return (number of machines, this one's number, the first one's address).

    Raises:
        UserError: there are several, and where the first one is, or which this one is, is not said, or no such number.
    """
    for count, number, address in VARIABLES:
        if not environment.get(count):
            continue
        several = _whole_number(environment, count)
        if several <= 1:
            continue
        lacking = [name for name in (number, address) if not environment.get(name, "").strip()]
        if lacking:
            raise UserError(f"{count} is {several}, and {lacking[0]} is not set")
        own = _whole_number(environment, number)
        if own >= several:
            raise UserError(f"{number} is {own}, and of {several} machines ({count}) the last is {several - 1}")
        return several, own, environment[address].split()[0]
    return 1, 0, "localhost"


def _whole_number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise UserError(f"{name} is {environment[name]!r}, not a whole number")
    return int(environment[name])


def command(words: Sequence[str], environment: Mapping[str, str], gpus: int) -> list[str]:
    """Return what to run on this machine: with one GPU in all the recipe itself, else `accelerate launch`.

    Args:
        words: of this command.
        environment: the variables of `VARIABLES`.
        gpus: of this machine; all machines have as many.

    Raises:
        UserError: as `machines`; another engine; one of several machines without a GPU; --overwrite, which would begin anew after every interruption.
    """
    parser = Parser(
        prog="python -m lora_null.recipes.launch",
        usage="%(prog)s [--engine ENGINE] RECIPE [options of `lora-null train`] [key.subkey=value ...]",
        description="Run a recipe on all GPUs of this machine, or of a cluster's machines; again, it goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="how several GPUs share the work")
    given, rest = parser.parse_known_args(words)
    if "--overwrite" in rest:
        raise UserError("--overwrite would begin anew after every interruption; remove the run's folder instead")
    recipe = ["-m", "lora_null.recipes", *(word for word in rest if word != "--resume"), "--resume"]
    count, number, address = machines(environment)
    if count > 1 and not gpus:
        raise UserError(f"{count} machines, and PyTorch sees no GPU on this one, which would run the recipe alone")
    if count * gpus <= 1:  # accelerate would not hand SIGTERM on to a single process
        return [sys.executable, *recipe]
    options = {
        "config_file": str(CONFIGURATIONS / f"{given.engine}.yaml"),
        "num_machines": str(count),
        "num_processes": str(count * gpus),
        "machine_rank": str(number),
        "main_process_ip": address,
        "main_process_port": environment.get("MASTER_PORT", PORT) if count > 1 else "0",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *(word for name, value in options.items() for word in (f"--{name}", value)), *recipe]


def main(words: Sequence[str] | None = None) -> int:
    """Run it to its end; 143 where SIGTERM came, which is handed on: the step is finished and saved."""
    import torch

    line = command(sys.argv[1:] if words is None else words, os.environ, torch.cuda.device_count())
    print(*line, flush=True)
    asked: list[int] = []
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SECONDS_TO_SAVE, **os.environ}
    with subprocess.Popen(line, env=environment) as process:

        def hand_on(number: int, _: object) -> None:
            asked.append(number)
            process.send_signal(number)

        signal.signal(signal.SIGTERM, hand_on)
        status = process.wait()
    return SIGTERM_STATUS if asked and status else status


if __name__ == "__main__":
    sys.exit(exit_status(main))
