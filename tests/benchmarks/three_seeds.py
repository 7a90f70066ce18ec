"""The study's methods over three seeds, tested over the seeds alone: at equal learning on the first task, at equal rates on the second.

    python tests/benchmarks/three_seeds.py        # in seconds: reads study/rivals.json, study/rivals_seed_2.json, study/code*.json

On the first task two seeds are of an H200 and one of a CPU. Each seed is read off its own path over the rates, where it has
learned what LoRA of the same seed has at 1e-3. Settings of which the third seed was not run are left out. p is that of the
difference from this LoRA, over the seeds, adjusted for all methods and levels of a set (Holm).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from scipy import stats

from lora_null.eval_harness.statistics import crossed_variance, holm, stack, t_tests
from lora_null.recipes.grid import mean_row
from lora_null.recipes.report.equal_learning import equal_learning
from lora_null.recipes.results import Results, Run, load_results, variant_of

STUDY = Path(__file__).parent / "study"
DECAY, RATE = "training.weight_decay", "training.learning_rate"
TASK, SETS = "GSM8K nll", ("NQ", "WebQS", "WikiText", "Instructions", "Code")


def merged(reference: int) -> Results:
    """Return the runs of both files whose setting has all three seeds, LoRA's with the decay of the reference first."""
    results, third = load_results(STUDY / "rivals.json"), load_results(STUDY / "rivals_seed_2.json")
    runs = [*results.grid.cells, *third.grid.cells]
    groups: dict[tuple[str, str | None], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.method, run.point[DECAY]) != ("lora", reference)):
        groups.setdefault((run.method, variant_of(run.point)), []).append(run)
    whole = {key: group for key, group in groups.items() if len(group) == len({run.seed for run in runs})}
    rows = [results.base, *(mean_row(group, variant) for (_, variant), group in whole.items())]
    grid = results.grid.model_copy(update={"cells": [run for group in whole.values() for run in group]})
    return results.model_copy(update={"rows": rows, "grid": grid, "paired": [], "noise": {}})


def at_equal_learning() -> None:
    """Print what every method has forgotten where it has learned as much as LoRA without and with weight decay."""
    for decay in (0, 3):
        results = merged(decay)
        for kept in SETS:
            found = equal_learning(results, f"{kept} kl", TASK)
            target = next(t for t in found if f"weight_decay {decay}" in t.where and "learning_rate 0.001" in t.where)
            print(f"\n{kept} KL, where {target.learned:.3f} nats of GSM8K are learned, as by LoRA with decay {decay}")
            for row in target.rows:
                p = "" if row.p is None else f", p {row.p:.4f}" if row.p >= 1e-4 else ", p < 0.0001"
                read = (
                    f"{row.value.value:.4f} ± {row.value.stderr or 0:.4f}, {row.reached} seeds{p}"
                    if row.value
                    else "–"
                )
                print(f"  {row.label:30} {read}")


def second_task(rate: float, method: str, decay: int) -> None:
    """Print the means of the seeds of every setting at a rate, and the p of their differences from one method's, by Holm.

    Args:
        rate: of the settings.
        method, decay: what they are compared with, at its best rate, 1e-3.
    """
    settings: dict[str, dict[int, Run]] = {}
    cells = [run for file in sorted(STUDY.glob("code*.json")) for run in load_results(file).grid.cells]
    points = {id(run): (run.method, run.point[DECAY], run.point[RATE]) for run in cells}
    reference = (method, decay, 1e-3)
    cells = [run for run in cells if points[id(run)] == reference or run.point[RATE] == rate]
    for run in sorted(cells, key=lambda run: (points[id(run)] != reference, run.method)):
        label = "{}, decay {:g}, rate {:g}".format(*points[id(run)])
        settings.setdefault(label, {})[run.seed] = run
    first, *_ = settings.values()
    for name in (f"{kept} nll" if kept == "Code" else f"{kept} kl" for kept in (*reversed(SETS), "GSM8K")):
        values = {key: {seed: run.metrics[name].value for seed, run in runs.items()} for key, runs in settings.items()}
        theirs = next(iter(values.values()))
        several = {key: found for key, found in values.items() if len(found) == len(first) > 1}
        gaps = [crossed_variance(np.array([found[s] - theirs[s] for s in theirs]), []) for found in several.values()]
        p = dict(zip(several, holm(t_tests(stack(gaps), len(gaps)).p))) if gaps else {}
        print(f"\n{name} on the second task, p against {method}, decay {decay}, rate {reference[-1]:g}")
        for key, found in values.items():
            tested = f", p {p[key]:.4f}" if math.isfinite(p.get(key, math.nan)) else ""
            print(f"  {key:36} {mean_of(list(found.values()))}, {len(found)} seeds{tested}")


def mean_of(values: list[float]) -> str:
    """Return mean ± s/√n as text."""
    error = f" ± {stats.sem(values):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}"


if __name__ == "__main__":
    at_equal_learning()
    for rate in (1e-3, 3e-4, 3e-3, 1e-4):
        for method, decay in (("lora", 0), ("lora", 3), ("kl-anchor", 0)):
            second_task(rate, method, decay)
