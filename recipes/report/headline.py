"""What was kept and what was learned, and the sentence that says so.

Every claim is computed. "Least" and "most" are said only of a method that differs from the one it is compared with, paired
on the same questions and adjusted for all comparisons of the table; methods that do not are named as not distinguishable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_null.recipes.comparisons import MEANS, averaged, compared_means
from lora_null.recipes.report.table import ARROWS, format_column, metric_title, reference_row
from lora_null.recipes.results import Estimate, Paired, Results, Row, change_error, display_name, kind_of, mean_in


@dataclass(frozen=True)
class Measure:
    """One quantity by which methods are compared.

    Attributes:
        title: as a reader writes it.
        estimates: one entry per row, the base's first.
        higher_is_better: the better direction.
        unit: of the estimates.
        results: which hold the comparisons, under `comparison_name`.
        comparison_name: the metric's name there.
        counts: what a change since the base is: learning, or forgetting.
        sign_flipped: whether the comparisons are of what is lost here, so that their signs are the other ones.
    """

    title: str
    estimates: list[Estimate | None]
    higher_is_better: bool
    unit: str | None
    results: Results = field(repr=False)
    comparison_name: str
    counts: Literal["learning", "forgetting"]
    sign_flipped: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics whose mean it is."""
        return compared_means(self.results).get(self.comparison_name, (self.comparison_name,))

    @property
    def measured(self) -> list[int]:
        """Rows of the methods that have a value, the best first."""
        rows = [i for i, estimate in enumerate(self.estimates) if i and estimate]
        return sorted(rows, key=lambda i: self.estimates[i].value * (-1 if self.higher_is_better else 1))

    @property
    def ranked(self) -> list[int]:
        """`measured` without those that a budget has made the base again, see `Row.is_ranked`."""
        rows, forgetting = self.results.rows, self.counts == "forgetting"
        return [i for i in self.measured if rows[i].is_ranked(forgetting=forgetting)]

    def text(self, i: int) -> str:
        """The value of row `i` with its error and unit."""
        cell = format_column(self.estimates, self.unit)[i]
        return f"{cell}{ {'fraction': '%', 'points': ' points'}.get(self.unit, '') }"

    def change(self, i: int) -> float | None:
        """By how much more row `i` has learned, or forgotten (`counts`), than the base; None where either is missing."""
        base, row = self.estimates[0], self.estimates[i]
        if base is None or row is None:
            return None
        return (
            row.value - base.value if self.higher_is_better == (self.counts == "learning") else base.value - row.value
        )

    def error(self, i: int) -> float | None:
        """The standard error of `change`."""
        base, row = self.estimates[0], self.estimates[i]
        return None if base is None or row is None else change_error(base, row, self.gap(i, 0))

    def gap(self, i: int, j: int) -> Paired | None:
        """Row i minus row j, paired, as `estimates` count; None where they were not compared."""
        found = self.results.difference(i, j, self.comparison_name)
        return found.model_copy(update={"mean": -found.mean}) if found and self.sign_flipped else found

    def differs(self, i: int, j: int) -> bool:
        """Whether rows i and j may be called different."""
        gap = self.gap(i, j)
        return gap is not None and gap.significant

    def beats(self, i: int, j: int) -> bool:
        """Whether row i may be called better than row j."""
        gap = self.gap(i, j)
        return gap is not None and gap.favors(self.higher_is_better)

    def moved(self, i: int) -> bool:
        """Whether row i may be called different from the base; by twice the error where nothing was compared."""
        if self.results.paired:
            return self.differs(i, 0)
        return abs(self.change(i) or 0.0) > 2 * (self.error(i) or 0.0)

    def untested(self, rows: Sequence[int]) -> bool:
        """Whether some two of the rows were not compared; those that answer alike have no p, and were."""
        gaps = [self.gap(i, j) for i, j in itertools.combinations(rows, 2)]
        return any(gap is None or (gap.p is None and gap.mean != 0) for gap in gaps)

    @property
    def noise_floor(self) -> float:
        """What the base differs from itself by, in other batches, at most; 0 where that was not measured."""
        known = [self.results.noise[name] for name in self.names if name in self.results.noise]
        return sum(known) / len(self.names)


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
    """KL to base where it was measured, else the mean loss of retention, else (no base) the mean retention."""
    kl = next((name for name in results.directed_names("retention") if kind_of(name) == "kl"), None)
    if kl is not None:
        return forgetting_of(results, [kl])
    names = averaged(results, "retention")
    if not names:
        return None
    losses = forgetting_of(results, names)
    if any(losses.estimates[1:]):
        return losses
    first, several = results.metric(names[0]), len(names) > 1
    compared = MEANS["retention"] if several else names[0]
    title = "mean retention" if several else metric_title(names[0])
    values = [mean_in(row, names) for row in results.rows]
    found = Measure(title, values, bool(first.higher_is_better), first.unit, results, compared, "forgetting")
    return found if any(values[1:]) else None


def forgetting_of(results: Results, names: Sequence[str]) -> Measure:
    """The KL of one metric, or the loss since the base of one, or the mean loss of several."""
    first, several = results.metric(names[0]), len(names) > 1
    if kind_of(names[0]) == "kl":
        on = metric_title(names[0].rpartition(" ")[0])
        estimates = [row.estimate(names[0]) for row in results.rows]
        estimates[0] = estimates[0] or Estimate(0.0, 0.0)  # by definition
        title = f"KL to base on {on}" if on else "KL to base"
        return Measure(title, estimates, False, first.unit, results, names[0], "forgetting")
    compared = MEANS["retention"] if several else names[0]
    losses = [Estimate(0.0, 0.0), *(_loss(results, i, names, compared) for i in range(1, len(results.rows)))]
    title = "mean loss of retention" if several else f"loss of {metric_title(names[0])}"
    unit, flipped = "points" if first.unit == "fraction" else first.unit, bool(first.higher_is_better)
    return Measure(title, losses, False, unit, results, compared, "forgetting", sign_flipped=flipped)


def learning(results: Results) -> Measure | None:
    """The metric of `task_metric`, if there is one."""
    name = task_metric(results)
    return _measure(results, name) if name else None


def task_metric(results: Results) -> str | None:
    """The name of the first task metric by which a method differs from the base; else of the first.

    Small models answer nothing right before and after, and only the likelihood of the answers tells what was learned.
    """
    measures = {name: _measure(results, name) for name in results.directed_names("task")}
    measures = {name: measure for name, measure in measures.items() if measure.measured}
    moved = [n for n, m in measures.items() if m.estimates[0] and any(m.moved(i) for i in m.measured)]
    return next(iter([*moved, *measures]), None)


def _measure(results: Results, name: str) -> Measure:
    metric, estimates = results.metric(name), [row.estimate(name) for row in results.rows]
    return Measure(
        metric_title(name), estimates, bool(metric.higher_is_better), metric.unit, results, name, "learning"
    )


def verdicts(results: Results) -> list[Verdict]:
    """One verdict on forgetting and one on learning; empty where fewer than two methods can be compared."""
    kept, learned = forgetting(results), learning(results)
    found = [
        _verdict(results, kept, "Forgot least", "forgetting", learned),
        _verdict(results, learned, "Learned most", "learning", None),
    ]
    return [verdict for verdict in found if verdict]


def headline(results: Results) -> str:
    """The finding in a sentence or three."""
    return " ".join(filter(None, [results.state, *_findings(results)]))


def _findings(results: Results) -> list[str]:
    """The sentences of the headline."""
    if len(results.rows) == 1:
        evaluated = "Only the untouched base" if results.base.metrics else "Nothing"
        return [f"{evaluated} was evaluated: there is no method to compare yet."]
    kept, learned = forgetting(results), learning(results)
    sentences = [_single(results, measure) for measure in (kept, learned) if measure and len(measure.ranked) == 1]
    sentences = [*beyond_budget(results), *_sentences(verdicts(results), results), *sentences]
    sentences += filter(None, map(left_nothing, results.rows, results.labels()))
    rows = zip(results.rows, results.labels())
    sentences += [f"{label} diverged at step {row.diverged}." for row, label in rows if row.diverged is not None]
    if kept is None or not kept.measured:
        sentences.append("Forgetting was not measured: no method has a value of a retention metric.")
    if learned and results.sequence:
        metrics, tasks = results.sequence.metrics, results.sequence.tasks
        of_metric = dict(zip(metrics, tasks)) if len(metrics) == len(tasks) else {}
        task = of_metric.get(learned.comparison_name, learned.title)
        sentences.append(f"Learning here is that of {task} alone.")
    if learned is None:
        sentences.append("Learning was not measured: no method has a value of a task metric.")
    return sentences


def beyond_budget(results: Results) -> list[str]:
    """The sentence that names the methods whose budget is not kept; empty where there are none."""
    named = zip(results.rows, results.labels())
    beyond = [(label, row.budget) for row, label in named if row.budget and row.is_beyond_budget]
    allowed = {budget.allowed for _, budget in beyond}
    alike = len(beyond) > 1 and len(allowed) == 1
    told = [f"{label} ({budget.forgotten if alike else budget.told()})" for label, budget in beyond]
    bound = f", where {allowed.pop()} is allowed" if alike else ""
    return [f"{not_kept_by(told)}{bound}."] if beyond else []


def not_kept_by(names: list[str]) -> str:
    """Begin the sentence that the budget of forgetting is not kept by these."""
    return f"The budget of forgetting is NOT kept by {listed(names)}"


def left_nothing(row: Row, label: str) -> str:
    """The sentence for a row that a budget has made the base again, or left nothing of a later task; else empty."""
    if row.base_again or row.is_base_again:
        some = f" with {row.base_again} of {row.runs} seeds" if row.base_again != row.runs else ""
        return f"{label} is the base again{some}: the budget left nothing of its training."
    if row.budget and row.budget.left_nothing:
        return f"{label} kept nothing of {row.budget.task}: the budget left nothing of that training."
    return ""


def _sentences(found: list[Verdict], results: Results) -> list[str]:
    """The sentences of the verdicts; the same comparison is not spelled out twice."""
    sentences = [verdict.sentence + verdict.qualification for verdict in found]
    if len(found) == 2 and found[0].against == found[1].against and found[0].winners[:1] == found[1].winners[:1] != []:
        sentences[1] = f"{results.labels()[found[0].winners[0]]} also learned most.{found[1].qualification}"
    return sentences


def _loss(results: Results, i: int, names: Sequence[str], compared: str) -> Estimate | None:
    """How much worse row `i` is than the base in the mean, with the error of that change."""
    before, after = (mean_in(row, names) for row in (results.base, results.rows[i]))
    if before is None or after is None:
        return None
    sign, gap = (1 if results.metric(names[0]).higher_is_better else -1), results.difference(i, 0, compared)
    return Estimate(sign * (before.value - after.value), change_error(before, after, gap))


def _verdict(
    results: Results, measure: Measure | None, title: str, noun: str, other: Measure | None
) -> Verdict | None:
    if measure is None or len(measure.ranked) < 2:
        return None
    labels, ranked = results.labels(), measure.ranked
    best, *rest = ranked
    without = set(range(1, len(labels))) - set(measure.measured)
    absent = [labels[i] for i in sorted(without) if results.rows[i].diverged is None]
    unmeasured = f" No value of {measure.title} for {listed(absent)}." if absent else ""
    ends = [f"{measure.text(i)} ({labels[i]})" for i in (best, ranked[-1])]
    extremes = f"{measure.title} from {ends[0]} to {ends[1]}"
    if measure.untested(ranked):
        seeds = " over the same seeds" * (len({results.rows[i].runs for i in ranked}) > 1)
        not_compared = f"The methods' {noun} was not compared question by question{seeds}"
        sentence = f"{not_compared}, so no method is called best: {extremes}."
        return Verdict(title, [], f"Not compared. {extremes}", sentence, unmeasured)
    ties = [i for i in rest if not measure.beats(best, i)]
    if len(ties) == len(rest):
        sentence = f"{noun.capitalize()} is not distinguishable between the methods: {extremes}."
        if any(measure.differs(i, j) for i, j in itertools.combinations(rest, 2)):
            alike = f"{labels[best]} is not distinguishable from any other"
            sentence = f"No method can be called best in {noun}: {alike}; {extremes}."
        return Verdict(title, [], extremes, sentence, unmeasured)
    if noun == "learning" and _not_above_base(measure, best):
        sentence = f"No method learned more than the base knew ({measure.text(0)}) beyond the error: {extremes}."
        return Verdict(title, [], f"None above the base's {measure.text(0)}. {extremes}", sentence, unmeasured)
    beaten = [i for i in rest if i not in ties]  # compared with plain LoRA where it was beaten
    against = next((i for i in beaten if results.rows[i].method == "lora"), beaten[0])
    detail = f"{measure.title} {measure.text(best)} against {labels[against]}'s {measure.text(against)}"
    detail += _times_less(measure, best, against)
    repaired = _before_repair(results, best)
    sentence = f"{labels[best]}{f' ({repaired})' if repaired else ''} {title.lower()}: {detail}{_meanwhile(other, best, against)}."
    detail += f"; paired difference {gap_text(measure.gap(best, against), measure.unit)}"
    of_budget = _of_budget(results, (best, *ties))
    detail = " ".join([f"{detail}.", *of_budget]) if of_budget else detail
    verb = "is" if len(ties) == 1 else "are"
    tied = f" {listed([labels[i] for i in ties])} {verb} not distinguishable from {labels[best]}." if ties else ""
    return Verdict(title, [best, *ties], detail, sentence, tied + unmeasured, against)


def _of_budget(results: Results, rows: Sequence[int]) -> list[str]:
    """What a card that names these rows says of the budget; empty where all keep it."""
    labels = results.labels()
    beyond = [labels[i] for i in rows if results.rows[i].is_beyond_budget]
    said = [f"{not_kept_by(beyond)}."] if beyond else []
    return said + [f"{labels[i]} is {told}." for i in rows if (told := _before_repair(results, i))]


def _before_repair(results: Results, i: int) -> str:
    """That row `i` is beyond the budget, and whether what was repaired of it keeps it; empty where nothing was."""
    repaired = results.repaired(results.rows[i])
    if repaired is None:
        return ""
    return f"beyond the budget; {results.labels()[results.rows.index(repaired)]} {repaired.keeps}"


def _not_above_base(measure: Measure, best: int) -> bool:
    """Whether even the best row is not better than the base; False where that was not compared."""
    gap = measure.gap(best, 0)
    return gap is not None and not gap.favors(measure.higher_is_better)


def _times_less(measure: Measure, best: int, against: int) -> str:
    """The ratio of two distances from the base, no further down than the measurement reaches."""
    a, b = measure.estimates[best].value, measure.estimates[against].value
    if measure.higher_is_better or a < 0 or b <= 0 or measure.title.endswith("NLL"):
        return ""  # a ratio means something only for what starts at zero, the base
    if a <= measure.noise_floor:
        return " (no more than the noise of the measurement)" if measure.noise_floor else " (100% less)"
    return f" ({times(b / a)} less)" if b / a >= 10 else f" ({100 * (b - a) / b:.0f}% less)"


def times(ratio: float) -> str:
    """A ratio to two digits, 250 ×, 12 ×, 3.4 ×, up to a million: no measurement reaches further."""
    if ratio > 1e6:
        return "over 1,000,000 ×"
    return f"{float(f'{ratio:.2g}'):,.{1 if ratio < 9.95 else 0}f} ×"


def gap_text(gap: Paired | None, unit: str | None) -> str:
    """A paired difference with its error and adjusted p."""
    if gap is None:
        return "not compared"
    points = "points" if unit == "fraction" else unit
    cell = format_column([Estimate(gap.mean, gap.stderr)], points)[0]
    return f"{cell}{' points' if points == 'points' else ''}, {p_text(gap.p_adjusted)}"


def p_text(p: float | None) -> str:
    """An adjusted p-value in words."""
    return "no p" if p is None else "adjusted p < 0.001" if p < 0.001 else f"adjusted p = {p:.2g}"


def _meanwhile(other: Measure | None, best: int, against: int) -> str:
    """What the method that forgot least did to learning: it may simply have learned less."""
    if other is None or not {best, against} <= set(other.ranked):
        return ""
    numbers = f"{other.title} {other.text(best)} against {other.text(against)}"
    first = min((best, against), key=other.ranked.index)
    if other.untested([best, against]) or _not_above_base(other, first):
        return f", at {numbers}"
    if not other.beats(first, best if first == against else against):
        return f", with learning not distinguishable ({numbers})"
    return f", {'and learned more' if first == best else 'but learned less'} ({numbers})"


def _single(results: Results, measure: Measure) -> str:
    """The sentence for a measure that only one method has: where it went from the base."""
    (i,) = measure.ranked
    label, base = results.labels()[i], measure.estimates[0]
    if base is None:
        return f"{label}: {measure.title} {measure.text(i)}; the base was not measured."
    if base.value == 0:  # measured from the base
        return f"{label}: {measure.title} {measure.text(i)}."
    change = f"{measure.title} {measure.text(0)} before and {measure.text(i)} after"
    if not measure.untested([0, i]) and not measure.differs(0, i):
        return f"{label}: {change}, not distinguishable."
    return f"{label}: {change}."


def listed(names: list[str]) -> str:
    """`names` as words: "a, b and c", or "a, repaired; b; and c" where some hold a comma."""
    if len(names) > 1 and any("," in name for name in names):
        return f"{'; '.join(names[:-1])}; and {names[-1]}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def against_reference(results: Results) -> list[tuple[str, str, str, str, str]]:
    """Return (method, settings, metric, difference, adjusted p) of every row against LoRA at equal settings, as text."""
    lines = []
    labels = results.labels()
    for i, row in enumerate(results.rows):
        reference = reference_row(results, row.variant)
        for compared, names in compared_means(results).items() if i and reference != i else ():
            gap = None if reference is None else results.difference(i, reference, compared)
            if gap is not None:
                name, settings, first = display_name(row.method), row.variant, results.metric(names[0])
                text, _, p = gap_text(gap, first.unit).rpartition(", ")
                titles = ", ".join(map(metric_title, names))
                title = f"{compared} ({titles})" if len(names) > 1 else titles
                metric = f"{title} {ARROWS[first.higher_is_better]}"
                lines.append((name if settings else labels[i], settings or "–", metric, text, p))
    return lines
