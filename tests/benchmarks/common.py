"""What the benchmarks share: the machine in words, a JSON writer, a table, a picture, medians and exponents."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import torch
from matplotlib import pyplot as plt

from lora_null.recipes.environment import environment

matplotlib.use("Agg")
warnings.filterwarnings("ignore", category=FutureWarning)  # transformers renames its gradient checkpointing

DEFAULT_OUT = Path("runs/benchmarks")
COLORS = ("#3465a4", "#d9773f", "#4e9a52", "#9a5aa8", "#8a6d3b", "#6b7280")


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes: --out and --quick."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="for JSON and picture")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    return parser


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a time depends on: processor, cores, threads, accelerator, load, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **environment(),
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "measured_on": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load_average": load(),
    }


def _cpu_model() -> str:
    """Return the processor's model name where the system tells it, with family and model, since names may be vague."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}  # reversed: the first processor's stay
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def load() -> list[float] | None:
    """Return the load averages over 1, 5 and 15 minutes: above the number of cores others were at work too."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def headline(facts: dict[str, Any]) -> str:
    """Return the machine in one line."""
    place = facts["cpu"] if facts["measured_on"] == "cpu" else f"{facts['measured_on']}, {facts['cpu']}"
    busy = "" if not facts["load_average"] else f", load {facts['load_average'][0]:g}"
    return f"{place}, {facts['threads']} threads of {facts['cores']} cores, torch {facts['torch']}{busy}"


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write the payload, readable, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1, ensure_ascii=False) + "\n")


class Peak:
    """Polls `now()`, tuples of bytes, inside a `with` block; `above` is the most of each above what there was before."""

    seconds = 0.002  # between two looks

    def now(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __enter__(self) -> Peak:
        self.before = self.most = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self._look()

    def _poll(self) -> None:
        while not self.done.wait(self.seconds):
            self._look()

    def _look(self) -> None:
        self.most = tuple(map(max, self.most, self.now()))

    @property
    def above(self) -> tuple[int, ...]:
        return tuple(most - before for most, before in zip(self.most, self.before))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75]).tolist()
    return {"q1": low, "median": middle, "q3": high}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the least-squares slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def note(text: str) -> None:
    """Say what is being done, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their heads, the first column to the left, numbers to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths))]
        print("  " + "  ".join(cells).rstrip())


def panels(rows: int, columns: int, size: tuple[float, float], title: str, **options: Any) -> tuple[Any, np.ndarray]:
    """Return a figure (size in inches, 100 pixels each) and its axes, plain and light."""
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    figure.suptitle(title, fontsize=11)
    for axis in axes.flat:
        axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def save_picture(figure: Any, path: Path) -> None:
    """Write the figure as PNG, sharp at 1000 pixels and beyond."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
