"""The machine: what a result depends on besides its recipe, and how the process is set up for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from lora_null import __version__
from lora_null.recipes.config.schema import Recipe
from lora_null.utils.distributed import is_first_process, num_processes, processes_here
from lora_null.utils.limits import has_float64
from lora_null.utils.model_state import release_freed_memory

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm_eval")
OPTIONAL = ("bitsandbytes",)


def environment() -> dict[str, Any]:
    """Return versions, git state of the package's source, device and platform, ready for results.json."""
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads != 1)}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    packages = [*PACKAGES, *(name for name in OPTIONAL if importlib.util.find_spec(name))]
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {
        "python": platform.python_version(),
        **versions,
        "lora_null": __version__,  # also of a checkout that is not installed
        "git": _git_state(),
        "device": device,
        "processes": num_processes(),
        "platform": platform.platform(),
        "command": command_line(),
    }


def command_line() -> str:
    """Return how this process was started, ready for a shell, without the folders of Python and of installed scripts."""
    python, *words = sys.orig_argv
    if words and not words[0].startswith("-") and Path(words[0]).is_absolute():
        words[0] = Path(words[0]).name  # lora-null, which is installed
        return shlex.join(words)
    return shlex.join([Path(python).name, *words])


@functools.cache
def _git_state() -> str | None:
    """Return the commit of the package's source, asked once: it is what this process has loaded."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def accelerator() -> torch.device | None:
    """Return the accelerator that is here; None where there is none, whatever PyTorch was built for, or one without float64."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device if device is None or has_float64(device) else None


def choose_device() -> None:
    """Take the CPU where the accelerator has no float64, as a Mac's; call it before accelerate takes a device.

    Starts and forgetting are computed in float64.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or has_float64(device) or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"device      the CPU: {device.type} has no float64, in which forgetting is measured")


def computes_bf16() -> bool:
    """Return whether the device multiplies in bf16 by instructions of its own; every processor accepts bf16.

    Where it has none, bf16 products are emulated, several times slower than float32.
    """
    device = accelerator()
    if device is None:
        return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)
    module = getattr(torch, device.type)
    if device.type == "cuda":
        return module.is_bf16_supported(including_emulation=False)
    return bool(getattr(module, "is_bf16_supported", lambda: False)())


def choose_precision(recipe: Recipe) -> None:
    """Put what this machine does well where a recipe says `auto`, in place, and print what that is."""
    asked = {
        "model.dtype": recipe.model.dtype,
        "training.bf16": recipe.training.get("bf16"),
        "eval.bf16": recipe.eval.bf16,
    }
    keys = [key for key, value in asked.items() if value == "auto"]
    if not keys:
        return
    native = computes_bf16()
    if "model.dtype" in keys:
        recipe.model.dtype = "bfloat16" if native else "float32"
    if "eval.bf16" in keys:
        recipe.eval.bf16 = native
    if "training.bf16" in keys:
        deepspeed = is_under_deepspeed(recipe)
        recipe.training["bf16"] = native and not recipe.training.get("fp16") and not deepspeed
        if deepspeed and native:
            keys.remove("training.bf16")
            if is_first_process():
                print("precision   float32: DeepSpeed would turn the adapter itself into bf16 (training.bf16 auto)")
    if keys and is_first_process():
        print(precision_line(native, keys))


def is_under_deepspeed(recipe: Recipe) -> bool:
    """Return whether DeepSpeed trains, by the recipe's wish or the launcher's."""
    return bool(recipe.training.get("deepspeed")) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")


def precision_line(native: bool, keys: Sequence[str]) -> str:
    """Say which precision was chosen, and why."""
    device = accelerator()
    name = "this processor" if device is None else f"this {device.type} device"
    chosen = "bf16" if native else "float32"
    return f"precision   {chosen}: {name} has {'' if native else 'no '}bf16 instructions ({', '.join(keys)} auto)"


def prepare_cpu() -> None:
    """Set up a process that may compute on the CPU; call it before processes join."""
    use_all_cores()
    keep_freed_memory()


def use_all_cores() -> None:
    """Share this machine's cores among its processes where there is no accelerator.

    `accelerate launch` without a config file sets OMP_NUM_THREADS=1, which is meant for processes that feed a GPU; on a
    CPU it would leave all cores but one idle. Any other value of OMP_NUM_THREADS is a user's wish and is kept.
    """
    if accelerator() is not None or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes_here()))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them back to the kernel, on CPU runs.

    Without it each temporary tensor of a step is mapped, page by page, and unmapped again: two thirds of a CPU training
    step can go there. The largest, logits, are mapped all the same: of lengths that vary they would leave holes, and a run
    took 14.8 GiB that needed 9.
    """
    if accelerator() is not None or not sys.platform.startswith("linux"):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 1 << 26)


def free_memory() -> None:
    """Free what nothing refers to any more, and give it back to the system and to the GPU."""
    gc.collect()
    release_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start counting peak memory anew, where the system allows it (CUDA; on Linux the process's own peak)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return peak memory since `reset_peak_memory`: of the GPU, or of this process on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
