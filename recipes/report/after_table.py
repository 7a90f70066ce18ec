"""What a report says after its table: what to do next, how a budget was kept, what the dial and a sequence of tasks show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_null.eval_harness.probe import PREFIX, SECONDS
from lora_null.eval_harness.results import Metric
from lora_null.recipes.report.dial import Dial, dial_picture, dial_summary, read_dial, table_rows
from lora_null.recipes.report.figures import row_colors
from lora_null.recipes.report.headline import listed, not_kept_by, times
from lora_null.recipes.report.table import ARROWS, format_column, metric_title, scale_of
from lora_null.recipes.results import Estimate, Results, Row, Run, TrainLog, display_name, kind_of, settings_text

MIN_POINTS = 4  # that make a curve
RISEN = 1.05  # a loss that many times its smallest value has turned
MOST_LEFT = 0.9  # of the learning that a lower strength has to keep to be worth it
LESS = 0.6  # of the forgetting that it may have
STILL = 0.1  # of all the fall that lies in a curve's last quarter, and the curve still falls
ELSEWHERE = 3.0  # times the forgetting in the form that was calibrated on


def probe_curves(logs: Sequence[TrainLog]) -> list[tuple[str, str]]:
    """Return (key, title) of every metric that probes have logged, in order of appearance."""
    keys = dict.fromkeys(key for log in logs for entry in log.entries for key in entry if key.startswith(PREFIX))
    return [(key, f"Probe: {metric_title(key.removeprefix(PREFIX))}") for key in keys if key != SECONDS]


def after_table(results: Results, output_dir: Path, logs: Sequence[TrainLog]) -> dict[str, Any]:
    """Return what the templates `after_table.*` show; what a run does not have is empty."""
    dials = []
    for row, color in zip(results.rows[1:], row_colors(results)[1:]) if not results.grid else ():
        found = read_dial(output_dir / row.method)
        if found is not None:
            head, *rows = table_rows(found)
            shown = {"title": display_name(row.method), "summary": dial_summary(found), "head": head, "rows": rows}
            dials.append(shown | {"picture": dial_picture(found, color)})
    kept = results.grid.cells if results.grid else results.rows
    budgets = [(_named(row), row.budget.kept, row.budget.account()) for row in kept if row.budget]
    several = results.grid or results.sequence or results.of_several_runs  # which have reports of their own
    return {
        "next": "" if several or results.state else next_step(results, output_dir, logs),
        "budgets": budgets,
        "dials": dials,
        "sequence": sequence_tables(results),
    }


def _named(row: Row) -> str:
    """Return a method's name; of a grid's run with its settings and seed."""
    words = [settings_text(row.point), f"seed {row.seed}"] if isinstance(row, Run) else [row.variant or ""]
    return ", ".join(filter(None, [display_name(row.method), *words]))


@dataclass(frozen=True)
class Advice:
    """A thing to do next: how much is to be gained by it, as a share, and the sentence."""

    gain: float
    sentence: str


def next_step(results: Results, output_dir: Path, logs: Sequence[TrainLog]) -> str:
    """Say in one sentence what to do next, from measured curves alone; the one by which most is to be gained.

    Nothing where there is only the base.
    """
    if len(results.rows) == 1:
        return ""
    if any(row.is_beyond_budget for row in results.rows):
        return _to_keep_the_budget(results)
    found, free = [], []
    dials = [None if row.method == "base" else read_dial(output_dir / row.method) for row in results.rows]
    for row, log, dial, label in zip(results.rows, logs, dials, results.labels()):
        if row.method == "base":
            continue
        if row.diverged is not None:
            found.append(Advice(1.0, f"Lower the learning rate of {label}: it diverged at step {row.diverged}."))
            continue
        kept = row.budget
        held = row.needed_repair or results.repaired(row) is not None
        held = held or (kept is not None and (kept.reached is not None or kept.strength != 1))
        found += [*_by_dial(dial, row, label), *_by_form(results, row, label)]
        if not held:  # more steps would forget more than is allowed
            found += _by_curve(results, log, label)
            free.append(log)
    if found:
        return max(found, key=lambda advice: advice.gain).sentence
    judged = ["an earlier end"] if any(_learned(results, log) for log in free) else []
    judged += ["a lower strength"] if any(dial.shares() for dial in dials if dial) else []
    if not judged and not free:
        return (
            "The budget held every method back. More is learned where more may be forgotten (--max-forgetting), or, of a LoRA "
            "trained without a budget, where lora-null repair RUN/METHOD --max-forgetting keeps it."
        )
    if not judged:
        return _to_be_measured(results, free, [dial for dial in dials if dial])
    gained = f"By the measured curves nothing is to be gained by {' or '.join(judged)}"
    return f"{gained}; of another learning rate or a longer schedule they tell nothing."


def _to_be_measured(results: Results, logs: Sequence[TrainLog], dials: Sequence[Dial]) -> str:
    """What would tell what to do next, of what this run has not measured or done."""
    now = [] if dials else ["lora-null dial RUN/METHOD measures it at other strengths"]
    if not any(row.is_repaired for row in results.rows):
        now.append("lora-null repair RUN/METHOD takes its forgetting out")
    if points := max((len(values) for log in logs for *_, values in _losses(results, log)), default=0):
        later = [f"a smaller eval.probe.every (probes at {points} step{'s' * (points > 1)} are no curve)"]
    else:
        later = ["eval.probe of a task's NLL" if probe_curves(logs) else "eval.probe"]
    later += [] if dials else ["eval.strengths"]
    said = "No curve was measured that tells what to do next."
    said += f" For an adapter of this run: {', '.join(now)}." if now else ""
    return f"{said} For the next run: {' or '.join(later)}."


def _to_keep_the_budget(results: Results) -> str:
    """What keeps a budget that is not kept: it comes before all that curves tell."""
    beyond = [(label, row.budget) for label, row in zip(results.labels(), results.rows) if row.is_beyond_budget]
    texts = dict.fromkeys(metric_title(budget.measure.rpartition(" ")[0] or budget.measure) for _, budget in beyond)
    ways = ["lower training.learning_rate", f"calibrate on more texts like those of {listed([*texts])}"]
    ways.append("allow more (--max-forgetting)")
    if any(budget.then == "repair" for _, budget in beyond):
        ways.append("have the strength lowered until it is kept (budget.then=scale)")
    return f"{not_kept_by([label for label, _ in beyond])}: {', '.join(ways[:-1])}, or {ways[-1]}."


def _by_dial(dial: Dial | None, row: Row, label: str) -> list[Advice]:
    """A lower strength that keeps most of the learning and little of the forgetting."""
    options = []
    for i, left, share in dial.shares() if dial else ():
        kept, strength = dial.measures()[0].estimates, dial.points[i].strength
        if left >= MOST_LEFT and share <= LESS and _differ(kept[i], kept[dial.full]):
            options.append(
                Advice(left - share, f"Take strength {strength:g} of {label}: it keeps {left:.0%} of the learning at "
                f"{share:.0%} of the forgetting (lora-null export RUN/{row.method} --strength {strength:g}).")
            )  # fmt: skip
    return sorted(options, key=lambda advice: -advice.gain)[:1]


def _differ(one: Estimate, other: Estimate) -> bool:
    """Return whether two strengths differ by more than twice their errors: more than enough, as both answer the same."""
    return abs(one.value - other.value) > 2 * math.hypot(one.stderr or 0, other.stderr or 0)


def _by_curve(results: Results, log: TrainLog, label: str) -> list[Advice]:
    """Another rate where the task's loss never fell, an earlier end where it has turned, more steps where it still falls."""
    for title, steps, values in _learned(results, log):
        lowest = min(range(len(values)), key=values.__getitem__)
        fall, last = values[0] - values[lowest], values[-1]
        if fall <= 0:
            word = "Lower" if last > values[0] else "Raise"
            sentence = f"{word} the learning rate of {label}: {title} was never below its {values[0]:.3g} of step {steps[0]:g} and is {last:.3g} at step {steps[-1]:g}."
            return [Advice(1.0, sentence)]
        if lowest < len(values) - 1 and last > RISEN * values[lowest]:
            sentence = f"Stop {label} earlier: {title} was lowest at step {steps[lowest]:g} ({values[lowest]:.3g}) and has risen to {last:.3g} by step {steps[-1]:g}."
            return [Advice((last - values[lowest]) / fall, sentence)]
        quarter = float(np.interp(steps[0] + 0.75 * (steps[-1] - steps[0]), steps, values))
        if (quarter - last) / fall > STILL and lowest == len(values) - 1:
            sentence = f"Raise the learning rate of {label}, or train longer: {title} still falls, by {quarter - last:.3g} in the last quarter of {fall:.3g} in all."
            return [Advice((quarter - last) / fall, sentence)]
    return []


def _learned(results: Results, log: TrainLog) -> list[tuple[str, list[float], list[float]]]:
    """The probed losses of the task that are long enough to judge."""
    return [curve for curve in _losses(results, log) if len(curve[2]) >= MIN_POINTS]


def _losses(results: Results, log: TrainLog) -> list[tuple[str, list[float], list[float]]]:
    """The probed losses of the task: title, steps and values."""
    names = [f"{PREFIX}{name}" for name in results.directed_names("task") if kind_of(name) == "nll"]
    return [(title.removeprefix("Probe: "), *log.series(key)) for key, title in probe_curves([log]) if key in names]


def _by_form(results: Results, row: Row, label: str) -> list[Advice]:
    """Other calibration texts, where a method that calibrates, or a repair, forgets far more in another form than in the first."""
    kls = [name for name in results.directed_names("retention") if kind_of(name) == "kl"]
    estimates = {name: row.estimate(name) for name in kls}
    first = estimates.get(kls[0]) if kls else None
    by_texts = row.is_repaired or row.method.startswith(("lora-null", "nb-lora"))
    if len(kls) < 2 or first is None or not first.value > 0 or not by_texts:
        return []
    worst = max((e, n) for n, e in estimates.items() if e is not None)
    estimate, name = worst
    apart = estimate.value - (estimate.stderr or 0) > ELSEWHERE * first.upper
    if not apart:
        return []
    there, here = (metric_title(kl.rpartition(" ")[0]) for kl in (name, kls[0]))
    more = f"{times(estimate.value / first.value)} as much there ({estimate.value:.2g} nats per token) as on {here}"
    sentence = f"Calibrate on more texts like those of {there}: {label} forgets {more}."
    return [Advice(1 - first.value / estimate.value, sentence)]


def sequence_tables(results: Results) -> dict[str, Any] | None:
    """Return the matrix of every method, task × after which task, and the transfers; None without a sequence."""
    found = results.sequence
    if found is None:
        return None
    head = ["base", *(f"after {task}" for task in found.tasks), "forgotten by the end ↓"]
    head.append("gained before training on it ↑")
    units = [found.base[name].unit for name in found.metrics]
    tables = []
    for t in found.transfers:
        lost, ahead = [*map(_signed, t.lost, units), ""], ["", *map(_signed, t.ahead, units[1:])]
        rows = [
            [
                _titled(found.base[name], metric_title(name)),
                _cell(found.base[name]),
                *map(_cell, after),
                lost[j],
                ahead[j],
            ]
            for j, (name, after) in enumerate(zip(found.metrics, t.matrix))
        ]
        for name, values in found.knowledge.get(t.method, {}).items():
            title = _titled(results.metric(name), metric_title(name))
            rows.append([title, _cell(results.base.metrics.get(name)), *map(_cell, values), "", ""])
        tables.append({"title": display_name(t.method), "rows": rows})
    summary = []
    for t in found.transfers:
        average = "–" if t.average is None else _signed(Estimate(t.average), units[0]).lstrip("+")
        changes = (_signed(estimate, units[0]) for estimate in (t.backward, t.forward))  # which are of one unit
        summary.append([display_name(t.method), *changes, average])
    alike = len({(metric.unit, metric.higher_is_better) for metric in found.base.values()}) == 1
    points = {"fraction": ", points", "nats": ", nats"}.get(units[0] or "", "") if alike else ""
    transfers = [f"{which} transfer{points} ↑" for which in ("Backward", "Forward")]
    average = "Mean at the end"
    transfers.append(_titled(found.base[found.metrics[0]], average) if alike else average)
    apart = sorted(unit or "no unit" for unit in set(units)) if len(set(units)) > 1 else []
    return {"head": head, "tables": tables, "transfers": transfers, "summary": summary, "apart": apart}


def _titled(metric: Metric, title: str) -> str:
    """A title with the metric's unit and its better direction."""
    unit = {"fraction": " %", "nats": ", nats"}.get(metric.unit or "", "")
    return f"{title}{unit} {ARROWS[metric.higher_is_better]}".strip()


def _cell(metric: Metric | None) -> str:
    return str(format_column([metric and Estimate(metric.value, metric.stderr)], metric and metric.unit)[0])


def _signed(estimate: Estimate | None, unit: str | None) -> str:
    if estimate is None:
        return "–"
    scale, digits = scale_of(unit), 1 if unit == "fraction" else 3
    error = "" if estimate.stderr is None else f" ± {scale * estimate.stderr:.{digits}f}"
    return f"{scale * estimate.value:+.{digits}f}{error}"
