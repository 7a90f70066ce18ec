"""What was kept and what was learned, and the sentence that says so.

Every claim is computed. "Least" and "most" are said only of a method that differs from the one it is compared with by
more than their combined standard error; methods that do not are named as not distinguishable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_null.recipes.report.table import mean, metric_title, separated, show_all
from lora_null.recipes.results import Estimate, Results


@dataclass(frozen=True)
class Measure:
    """One quantity by which methods are compared; `estimates` has one entry per row, the base's first."""

    title: str
    estimates: list[Estimate | None]
    higher_is_better: bool
    unit: str | None

    @property
    def measured(self) -> list[int]:
        """Rows of the methods that have a value, the best first."""
        rows = [i for i, estimate in enumerate(self.estimates) if i and estimate]
        return sorted(rows, key=lambda i: self.estimates[i].value * (-1 if self.higher_is_better else 1))

    def text(self, i: int) -> str:
        """The value of row `i` with its error and unit."""
        cell = show_all(self.estimates, self.unit)[i]
        return f"{cell}{ {'fraction': '%', 'points': ' points'}.get(self.unit, '') }"

    def change(self, i: int) -> float | None:
        """By how much row `i` exceeds the base, or None where either is missing."""
        both = self.estimates[0] and self.estimates[i]
        return self.estimates[i].value - self.estimates[0].value if both else None

    def separated(self, i: int, j: int) -> bool:
        return separated(self.estimates[i], self.estimates[j])

    def unknown_error(self, rows: Sequence[int]) -> bool:
        return any(self.estimates[i].stderr is None for i in rows)


@dataclass(frozen=True)
class Verdict:
    """Who did best by one measure, in words.

    Attributes:
        title: "Forgot least" or "Learned most".
        winners: the best row, then those not distinguishable from it; empty where nobody stands out.
        detail: the numbers.
        sentence: the claim with the numbers.
        qualification: what must be said with it: who is not distinguishable, who has no value. May be empty.
        against: the row that the best is compared with.
    """

    title: str
    winners: list[int]
    detail: str
    sentence: str
    qualification: str
    against: int | None = None


def forgetting(results: Results) -> Measure | None:
    """KL to the base where it was measured, else the mean loss of retention, else (no base) the mean retention."""
    metrics = {name: results.metric(name) for name in results.directed_names("retention")}
    for name, metric in metrics.items():
        words = name.lower().split()
        if words[-1] == "kl":
            on = metric_title(" ".join(words[:-1]))
            estimates = [row.estimate(name) for row in results.rows]
            estimates[0] = estimates[0] or Estimate(0.0, 0.0)  # by definition
            return Measure(f"KL to base on {on}" if on else "KL to base", estimates, False, metric.unit)
    unit = next((m.unit for m in metrics.values() if m.unit == "fraction"), None)
    unit = unit or next((m.unit for m in metrics.values()), None)
    names = [
        name for name, metric in metrics.items() if metric.unit == unit
    ]  # other scales cannot be averaged with it
    losses = [[_loss(results, i, name) for name in names] for i in range(len(results.rows))]
    if names and any(mean(row) for row in losses[1:]):
        title = "mean loss of retention" if len(names) > 1 else f"loss of {metric_title(names[0])}"
        return Measure(title, [mean(row) for row in losses], False, "points" if unit == "fraction" else unit)
    if not names or len({metrics[name].higher_is_better for name in names}) > 1:
        return None
    title = "mean retention" if len(names) > 1 else metric_title(names[0])
    values = [mean([row.estimate(name) for name in names]) for row in results.rows]
    return Measure(title, values, metrics[names[0]].higher_is_better, unit) if any(values[1:]) else None


def learning(results: Results) -> Measure | None:
    """The metric of `task_metric`, if there is one."""
    name = task_metric(results)
    return _measure(results, name) if name else None


def task_metric(results: Results) -> str | None:
    """The name of the first task metric by which a method differs from the base beyond the error; else of the first.

    Small models answer nothing right before and after, and only the likelihood of the answers tells what was learned.
    """
    measures = {name: _measure(results, name) for name in results.directed_names("task")}
    measures = {name: measure for name, measure in measures.items() if measure.measured}
    moved = [n for n, m in measures.items() if m.estimates[0] and any(m.separated(i, 0) for i in m.measured)]
    return next(iter([*moved, *measures]), None)


def _measure(results: Results, name: str) -> Measure:
    metric, estimates = results.metric(name), [row.estimate(name) for row in results.rows]
    return Measure(metric_title(name), estimates, metric.higher_is_better, metric.unit)


def verdicts(results: Results) -> list[Verdict]:
    """One verdict on forgetting and one on learning; empty where fewer than two methods can be compared."""
    kept, learned = forgetting(results), learning(results)
    found = [
        _verdict(results, kept, ("Forgot least", "forgot least", "forgetting"), learned),
        _verdict(results, learned, ("Learned most", "learned most", "learning"), None),
    ]
    return [verdict for verdict in found if verdict]


def headline(results: Results) -> str:
    """The finding in a sentence or three."""
    if len(results.rows) == 1:
        return "Only the untouched base was evaluated: there is no method to compare yet."
    kept, learned = forgetting(results), learning(results)
    sentences = [_single(results, measure) for measure in (kept, learned) if measure and len(measure.measured) == 1]
    sentences = _sentences(verdicts(results), results) + sentences
    if kept is None:
        sentences.append("Forgetting was not measured: there is no retention metric with a value.")
    if learned is None:
        sentences.append("Learning was not measured: there is no task metric with a value.")
    return " ".join(sentences)


def _sentences(found: list[Verdict], results: Results) -> list[str]:
    """The sentences of the verdicts; the same comparison is not spelled out twice."""
    sentences = [verdict.sentence + verdict.qualification for verdict in found]
    if len(found) == 2 and found[0].against == found[1].against and found[0].winners[:1] == found[1].winners[:1] != []:
        sentences[1] = f"{results.labels()[found[0].winners[0]]} also learned most.{found[1].qualification}"
    return sentences


def _loss(results: Results, i: int, name: str) -> Estimate | None:
    """How much worse row `i` is than the base; the base's own error is shared by all rows and left out."""
    before, after = results.base.estimate(name), results.rows[i].estimate(name)
    sign = 1 if results.metric(name).higher_is_better else -1
    return Estimate(sign * (before.value - after.value), after.stderr) if before and after else None


def _verdict(
    results: Results, measure: Measure | None, words: tuple[str, str, str], other: Measure | None
) -> Verdict | None:
    title, claim, noun = words
    if measure is None or len(measure.measured) < 2:
        return None
    labels, ranked = results.labels(), measure.measured
    best, *rest = ranked
    absent = [labels[i] for i in range(1, len(labels)) if i not in ranked]
    unmeasured = f" No value of {measure.title} for {listed(absent)}." if absent else ""
    ends = [f"{measure.text(i)} ({labels[i]})" for i in (best, ranked[-1])]
    extremes = f"{measure.title} from {ends[0]} to {ends[1]}"
    if measure.unknown_error(ranked):
        sentence = f"Without standard errors no method can be called best in {noun}: {extremes}."
        return Verdict(title, [], f"No standard errors. {extremes}", sentence, unmeasured)
    ties = [i for i in rest if not measure.separated(best, i)]
    if len(ties) == len(rest):
        sentence = f"{noun.capitalize()} is not distinguishable between the methods: {extremes}."
        return Verdict(title, [], extremes, sentence, unmeasured)
    if noun == "learning" and _not_above_base(measure, best):
        sentence = f"No method learned more than the base knew ({measure.text(0)}) beyond the error: {extremes}."
        return Verdict(title, [], f"None above the base's {measure.text(0)}. {extremes}", sentence, unmeasured)
    against = _reference(results, [i for i in rest if i not in ties])
    detail = f"{measure.title} {measure.text(best)} against {labels[against]}'s {measure.text(against)}"
    detail += _percent_less(measure, best, against)
    sentence = f"{labels[best]} {claim}: {detail}{_meanwhile(other, best, against)}."
    verb = "is" if len(ties) == 1 else "are"
    tied = f" {listed([labels[i] for i in ties])} {verb} not distinguishable from {labels[best]}." if ties else ""
    return Verdict(title, [best, *ties], detail, sentence, tied + unmeasured, against)


def _not_above_base(measure: Measure, best: int) -> bool:
    """Whether even the best row is not better than the base beyond the error; False where that is unknown."""
    change = measure.change(best)
    if change is None or measure.unknown_error([0]):
        return False
    return not measure.separated(best, 0) or (change > 0) != measure.higher_is_better


def _reference(results: Results, beaten: list[int]) -> int:
    """Whom the best is compared with: plain LoRA where it was beaten, else the best of those that were."""
    return next((i for i in beaten if results.rows[i].method == "lora"), beaten[0])


def _percent_less(measure: Measure, best: int, against: int) -> str:
    a, b = measure.estimates[best].value, measure.estimates[against].value
    if measure.higher_is_better or a < 0 or b <= 0 or measure.title.endswith("NLL"):
        return ""  # a ratio means something only for what starts at zero, the base
    percent = f"{100 * (b - a) / b:.0f}"
    return f" ({'over 99' if percent == '100' and a else percent}% less)"


def _meanwhile(other: Measure | None, best: int, against: int) -> str:
    """What the method that forgot least did to learning: it may simply have learned less."""
    if other is None or not {best, against} <= set(other.measured):
        return ""
    numbers = f"{other.title} {other.text(best)} against {other.text(against)}"
    better = min((best, against), key=other.measured.index)
    if other.unknown_error([best, against]) or _not_above_base(other, better):
        return f", at {numbers}"
    if not other.separated(best, against):
        return f", with learning not distinguishable ({numbers})"
    return f", {'and learned more' if better == best else 'but learned less'} ({numbers})"


def _single(results: Results, measure: Measure) -> str:
    """The sentence for a measure that only one method has: where it went from the base."""
    (i,) = measure.measured
    label, base = results.labels()[i], measure.estimates[0]
    if base is None:
        return f"{label}: {measure.title} {measure.text(i)}; the base was not measured."
    if base.value == 0:  # measured from the base
        return f"{label}: {measure.title} {measure.text(i)}."
    change = f"{measure.title} {measure.text(0)} before and {measure.text(i)} after"
    if not measure.unknown_error([0, i]) and not measure.separated(0, i):
        return f"{label}: {change}, not distinguishable."
    return f"{label}: {change}."


def listed(names: list[str]) -> str:
    """`names` as words: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
