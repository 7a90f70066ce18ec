"""What a run leaves of its figures, written and read here alone: `results.json`, METHOD/row.json, METHOD/train_log.jsonl."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError, field_validator

from lora_null import __version__
from lora_null.eval_harness.results import Metric
from lora_null.eval_harness.statistics import LEVEL
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_json, write_json

SCHEMA = 1
FROM_BASE = ("kl", "forgetting", "margin")  # end the names of metrics that are 0 for the base by definition
MAX_METRIC = 1e100  # of a metric: far beyond float32, and still room for what is computed and drawn of it
RESULTS_FILE, ROW_FILE, LOG_FILE = "results.json", "row.json", "train_log.jsonl"
MIN_ROWS = 8  # rows that a limit of forgetting needs: fewer give no standard error worth the name
EVAL_FILE = "eval.json"  # an `Evaluation`, of the base or of a method
TITLES = {
    "nq": "NQ", "nq_open": "NQ open", "triviaqa": "TriviaQA", "webqs": "WebQS", "wikitext": "WikiText",
    "gsm8k": "GSM8K", "minerva_math": "MATH", "hendrycks_math": "MATH", "math": "MATH", "humaneval": "HumanEval",
    "mbpp": "MBPP", "metamath_gsm8k": "MetaMath GSM8K", "metamath_math": "MetaMath MATH",
    "sandbox_humaneval": "HumanEval", "sandbox_mbpp": "MBPP", "math_verify": "math-verify", "metamath_rule": "MetaMath's rule", "exact_match": "exact match",
    "string_match": "string rule",
    "ifeval": "IFEval", "mmlu": "MMLU", "kl": "KL", "nll": "NLL",
}  # fmt: skip


class Estimate(NamedTuple):
    """A measured mean and its standard error; the error is None where none was measured."""

    value: float
    stderr: float | None = None

    @property
    def upper(self) -> float:
        """The value plus its standard error."""
        return self.value + (self.stderr or 0.0)


class Drift(BaseModel):
    """Relative change of the layers' outputs, ||dW X|| / ||W0 X||, over the adapted layers."""

    mean: float | None = None
    max: float | None = None


class Magnitude(BaseModel):
    """Size of the change of the adapted layers' weights, ‖ΔW‖_F / ‖W0‖_F, against the original model.

    Attributes:
        total: over all these weights as one, √Σ‖ΔW‖² / √Σ‖W0‖².
        max: of the layer that changed most.
        layers: of each, by module name; left out where rows stand for several runs, whose own results hold them.
    """

    total: float
    max: float
    layers: dict[str, float] = {}

    @classmethod
    def of(cls, changes: Mapping[str, tuple[float, float]]) -> Magnitude | None:
        """Return the sizes from each layer's (‖ΔW‖_F, ‖W0‖_F), without layers of zeros; None where none is left."""
        layers = {name: moved / start for name, (moved, start) in changes.items() if start > 0}
        if not layers:
            return None
        moved, start = (math.hypot(*norms) for norms in zip(*changes.values()))
        return cls(total=moved / start, max=max(layers.values()), layers=layers)


def kind_of(metric: str) -> str:
    """Return what a metric measures, the last word of its name: "kl" of "NQ kl", "margin" of "pairs reward margin"."""
    return metric.split()[-1].lower()


def metric_title(name: str) -> str:
    """`gsm8k/strict-match` as a reader would write it: `GSM8K strict-match`."""
    return " ".join(TITLES.get(word.lower(), word) for word in re.split(r"[ /]+", name))


def scale_of(unit: str | None) -> int:
    """100 for what is shown as percent, fractions and differences of fractions ("points"); else 1."""
    return 100 if unit in ("fraction", "points") else 1


def digits_to(value: float, step: float) -> int:
    """Return how many significant digits a value has down to the first one of `step`, at least 1."""
    if not value or not step or not math.isfinite(value * step):
        return 1
    return max(1, math.floor(math.log10(abs(value))) - math.floor(math.log10(abs(step))) + 1)


class Seconds(BaseModel):
    """Wall-clock seconds of the initialization, of the training's steps, and of the evaluation.

    Left out are probes, saves, and what else a method computes before the first step (OPLoRA's SVDs).
    """

    init: float | None = None
    train: float | None = None
    eval: float | None = None

    @property
    def total(self) -> float:
        """The sum of what was measured."""
        return sum(value for _, value in self if value)


class GivenUp(BaseModel):
    """What a budget cost of one task metric of a `unit`, on the probed rows: of the base, at full strength, and as saved."""

    base: float | None = None
    full: float
    kept: float
    lost: float
    stderr: float | None = None
    unit: str | None = None


class Bound(BaseModel):
    """What is forgotten of one metric, beside what a budget allows of it.

    Attributes:
        measure, unit, at_most: the metric, its unit, and what is allowed.
        value, stderr, n: what is forgotten by what is saved, on n rows that no probe used.
        kept: whether value + stderr is within what is allowed.
        first_check: the first value on these rows, where it was beyond that and more of the training was given up.
    """

    measure: str
    unit: str | None = None
    at_most: float
    value: float
    stderr: float | None = None
    n: int
    kept: bool
    first_check: float | None = None

    @property
    def used(self) -> float:
        """The share of what is allowed that is forgotten, the standard error counted as forgotten."""
        return Estimate(self.value, self.stderr).upper / self.at_most

    def told(self, rows: str = "") -> str:
        """Say what is forgotten, on which `rows`, and how much was allowed."""
        return f"{self.forgotten}{f' on {self.n} {rows}' if rows else ''}, {self.allowed} allowed"

    @property
    def forgotten(self) -> str:
        """What is forgotten, as text."""
        change = {"nll": "rise of ", "loss": "rise of ", "kl": "", "forgetting": ""}
        told = f"{change.get(kind_of(self.measure), 'fall of ')}{metric_title(self.measure)} "
        return told + _amount(self.value, self.stderr, self.measure, self.unit)

    @property
    def allowed(self) -> str:
        """What is allowed, as text."""
        return f"at most {scale_of(self.unit) * self.at_most:g}"


class Budget(Bound):
    """How a method kept its budget of forgetting: of several metrics the one that is nearest to its bound, or furthest beyond.

    Attributes:
        others: the other metrics, from the nearest to its bound on.
        then: what the recipe does to keep the budget.
        strength: of the adapter that is saved, 1 being as it was trained.
        weight: at which the adapter was repaired, where that was done to keep the budget.
        step: the state that is saved, of `steps` planned.
        reached: the step at which a probe was beyond the budget and ended the training.
        learned: by metric what was given up for it.
        task: of a sequence: the task that was trained, where something was kept of an earlier one.
    """

    others: list[Bound] = []
    then: str
    strength: float
    weight: float | None = None
    step: int
    steps: int
    reached: int | None = None
    learned: dict[str, GivenUp] = {}
    task: str | None = None

    @property
    def left_nothing(self) -> bool:
        """Whether what is saved is where the training began: the base, or what earlier tasks have made of it."""
        return self.weight is None and (self.strength == 0 or self.step == 0)

    def sentence(self) -> str:
        """Say how it was kept, or that it was not, and what was given up."""
        return self.account() if self.kept else f"the budget is NOT kept, {self.account()}"

    def account(self) -> str:
        """Say what is forgotten, how that was reached, and what was given up."""
        how = [f"state of step {self.step} of {self.steps}"] if self.step < self.steps else []
        how += [f"strength {self.strength:.3g}"] if self.strength != 1 else []
        how += [f"repaired at weight {self.weight:.3g}"] if self.weight else []
        bounds = (self, *self.others)
        told = "; ".join([self.told("rows that no probe used"), *(bound.told("rows") for bound in self.others)])
        told += f" ({', '.join(how)})" if how else " (nothing had to be given up)"
        first = " and ".join(
            f"{scale_of(bound.unit) * bound.first_check:.3g}"
            + f" of {metric_title(bound.measure)}" * bool(self.others)
            for bound in bounds
            if bound.first_check is not None
        )
        if first:
            more = "strength was lowered" if self.weight is None else "weight was raised"
            told += f"; these rows first gave {first}, too much with the error, so the {more} once more"
        # `export` and `repair` change what a run has saved, and know of no training.
        now, before = ("as saved", "where training ended") if self.steps else ("at this strength", "at strength 1")
        now, before = (now, before) if self.weight is None else ("repaired", "before")
        for name, change in self.learned.items() if how else ():
            scale, lost = scale_of(change.unit), _amount(change.lost, change.stderr, name, change.unit)
            told += f"; given up: {lost} of {metric_title(name)} "
            full, kept = (
                f"{scale * x:.{min(9, max(3, digits_to(x, change.lost) + 1))}g}" for x in (change.full, change.kept)
            )
            told += f"({kept} {now}, {full} {before})"
        return told


def _amount(value: float, stderr: float | None, metric: str, unit: str | None) -> str:
    """A difference with its error and its unit: nats per token, or points, hundredths of a fraction."""
    error = "" if stderr is None else f" ± {scale_of(unit) * stderr:.2g}"
    per_token = kind_of(metric) in ("kl", "nll", "loss", "forgetting")
    named = " nats per token" if per_token else " points" if unit == "fraction" else ""
    return f"{scale_of(unit) * value:.3g}{error}{named}"


class Row(BaseModel):
    """One method of a run, or the untouched base. What is None was not measured; what was never set is not written.

    Attributes:
        method: its name; "base" for the untouched base.
        variant: of a grid: the swept values.
        rank: r; None for a method without one.
        trainable_params: the parameters that train.
        adapter_params: those of the saved adapter.
        runs: of a grid: the seeds that the row is the mean of.
        base_again: of a grid: how many of them ended as the base, since a budget left nothing of their training.
        diverged: the step at which loss or weights were no longer finite.
        metrics: by name.
        drift: None where nothing is adapted.
        magnitude: size of the change of the weights; None where nothing is adapted.
        seconds: of the three phases.
        tokens_per_second: of the training.
        peak_memory_bytes: of the accelerator, or of the process where there is none.
        budget: how a budget of forgetting was kept; None where there was none.
    """

    method: str
    variant: str | None = None
    rank: int | None = None
    trainable_params: int | None = None
    adapter_params: int | None = None
    runs: int | None = None
    base_again: int | None = None
    diverged: int | None = None
    metrics: dict[str, Metric] = {}
    drift: Drift | None = None
    magnitude: Magnitude | None = None
    seconds: Seconds = Seconds()
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    budget: Budget | None = None

    @property
    def is_base_again(self) -> bool:
        """Whether the budget left nothing of all training; of a grid, with every seed."""
        if self.base_again is not None:
            return self.base_again == self.runs
        return self.budget is not None and self.budget.left_nothing and self.budget.task is None

    @property
    def is_repaired(self) -> bool:
        """Whether it is a method's repaired adapter, beside the one that was trained."""
        return self.method.endswith(REPAIRED.format(""))

    @property
    def needed_repair(self) -> bool:
        """Whether it was repaired because what was trained is beyond its budget."""
        return self.is_repaired and self.budget is not None and bool(self.budget.weight)

    @property
    def keeps(self) -> str:
        """Whether a repaired adapter keeps the budget that the trained one is beyond, in words."""
        return "does not keep it either" if self.is_beyond_budget else "keeps it"

    @property
    def is_beyond_budget(self) -> bool:
        """Whether it forgets more than its budget allows, and nothing that was done kept it."""
        return self.budget is not None and not self.budget.kept

    def is_ranked(self, *, forgetting: bool) -> bool:
        """Whether to rank it: not if it is the base again; by forgetting, not if any seed of a grid is."""
        return not (self.is_base_again or (forgetting and self.base_again))

    def estimate(self, name: str) -> Estimate | None:
        """The metric `name`, or None where it is missing or no number of a usable size (a run that diverged).

        None or all of n answers right leaves no spread to take an error from, and yet is not known exactly: there the
        error is that of one right and one wrong answer more.
        """
        metric = self.metrics.get(name)
        if metric is None or not abs(metric.value) < MAX_METRIC:
            return None
        if metric.unit == "fraction" and metric.value in (0, 1) and metric.stderr == 0 and metric.n:
            return Estimate(metric.value, math.sqrt((metric.n + 1) / metric.n) / (metric.n + 2))
        known = metric.stderr is not None and metric.stderr < MAX_METRIC
        return Estimate(metric.value, metric.stderr if known else None)


class Run(Row):
    """One training of a grid: the row of an ordinary run, with the seed and the swept values it was run with."""

    folder: str
    seed: int
    point: dict[str, Any] = {}


class Paired(BaseModel):
    """One row of the table minus another on one metric, paired by question and by seed.

    Attributes:
        row, against: numbers of rows; 0 is the base.
        metric: its name, or "mean retention" and "mean task".
        mean: the difference, in the metric's unit.
        stderr: its standard error over questions, and over seeds where there are several.
        p: two-sided, of this test alone.
        p_adjusted: among all tests of the table, by Holm.
        questions, seeds: how many of each.
    """

    row: int
    against: int
    metric: str
    mean: float
    stderr: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    questions: int
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether it may be claimed, among all comparisons of the table."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL

    def favors(self, higher_is_better: bool) -> bool:
        """Whether `row` may be called better than `against`."""
        return self.significant and (self.mean > 0) == higher_is_better


class Answered(BaseModel):
    """A question, its right answer, how far the methods' predictions on it moved in the mean, and every row's answer."""

    question: str
    right: str
    change: float
    why: str
    answers: list[str]


class Answers(BaseModel):
    """What the base and each method answer, greedily, to some questions of `task` that were chosen by `metric`.

    `labels` name who answered, in the order of each question's answers; `run` is the folder of the run of a grid.
    """

    task: str
    metric: str
    labels: list[str]
    questions: list[Answered]
    run: str | None = None


class Grid(BaseModel):
    """What `results.json` of a grid adds: every single training, and what the rows average over."""

    seeds: list[int]
    sweep: dict[str, list[Any]] = {}
    planned: int
    differing: dict[str, list[Any]] = {}
    cells: list[Run] = []

    @property
    def is_finished(self) -> bool:
        """Whether every planned training is there."""
        return len(self.cells) == self.planned


class Transfer(BaseModel):
    """What a sequence of tasks did to each of them, for one method; see `recipes.sequence.transfer`.

    Attributes:
        matrix: for each task its metric after every task.
        lost: of each task but the last: by how much it is worse after the last than after its own.
        ahead: of each task but the first: by how much it was better than the base before it was learned.
        backward, forward, average: over the tasks, where all are of one unit.
    """

    method: str
    matrix: list[list[Metric]]
    lost: list[Estimate]
    ahead: list[Estimate]
    backward: Estimate | None = None
    forward: Estimate | None = None
    average: float | None = None


class SequenceResults(BaseModel):
    """What `results.json` of a sequence adds.

    Attributes:
        tasks: names, in order.
        metrics: of each task, the one by which it is followed.
        base: the base's value of each.
        transfers: one per method.
        knowledge: method → metric of retention → its value after every task.
    """

    tasks: list[str]
    metrics: list[str]
    base: dict[str, Metric]
    transfers: list[Transfer] = []
    knowledge: dict[str, dict[str, list[Metric | None]]] = {}


class Results(BaseModel):
    """A `results.json`; the first row is the base.

    Attributes:
        noise: by how much each metric of the base changes when it is measured again in other batches.
        paired: every two rows compared; None in a file of a version that did not compare.
        answers: some questions, answered by the base and every method.
        state: how far a run is that is not finished, as a sentence.
    """

    recipe: str
    model: str
    seed: int | None = None
    environment: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    rows: list[Row] = Field(min_length=1)
    noise: dict[str, float] = {}
    paired: list[Paired] | None = None
    answers: Answers | None = None
    state: str = ""
    grid: Grid | None = None
    sequence: SequenceResults | None = None

    @field_validator("rows")
    @classmethod
    def _base_first(cls, rows: list[Row]) -> list[Row]:
        if [row.method == "base" for row in rows] != [True] + [False] * (len(rows) - 1):
            raise ValueError("the first row, and no other, must be the untouched base (method 'base')")
        return rows

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def model_title(self) -> str:
        """The model's id, or the name of its folder, without the folders of this machine."""
        return shareable(self.model)

    @property
    def of_several_runs(self) -> bool:
        """Whether runs are compared, each of which has its adapters in its own folder."""
        return "runs" in self.environment

    def labels(self) -> list[str]:
        """One distinct name per row, as papers write it: `LoRA-FA (r = 128)` where a method occurs more than once."""
        names = [display_name(row.method) for row in self.rows]
        names = [f"{name} ({settings})" if settings else name for name, settings in zip(names, self._settings())]
        for describe in (lambda i: f"r = {self.rows[i].rank}", lambda i: f"row {i}"):
            times = Counter(names)
            names = [f"{name} ({describe(i)})" if times[name] > 1 else name for i, name in enumerate(names)]
        return names

    def _settings(self) -> list[str]:
        """Return each row's settings for its label.

        In a grid, a setting that a method has in all its rows is left out if every method has it in some row: it tells
        no rows apart.
        """
        if not self.grid or len(self.rows) == 1:
            return [row.variant or "" for row in self.rows]
        settings = [(row.variant or "").split(", ") for row in self.rows]
        of_method: dict[str, list[set[str]]] = {}
        for row, own in zip(self.rows[1:], settings[1:]):
            of_method.setdefault(row.method, []).append(set(own))
        everywhere = set.intersection(*(set.union(*each) for each in of_method.values()))
        common = {method: everywhere.intersection(*each) for method, each in of_method.items()}
        return [
            ", ".join(part for part in own if part not in common.get(row.method, ()))
            for row, own in zip(self.rows, settings)
        ]

    def repaired(self, row: Row) -> Row | None:
        """Return the row of what was repaired of a trained adapter that is beyond its budget; None for any other row."""
        name = REPAIRED.format(row.method)
        return next((r for r in self.rows if r.needed_repair and (r.method, r.variant) == (name, row.variant)), None)

    def difference(self, row: int, against: int, metric: str) -> Paired | None:
        """Return the comparison of two rows, as row minus against; None where they were not compared."""
        for pair in self.paired or ():
            if pair.metric == metric and {pair.row, pair.against} == {row, against}:
                turned = {"row": row, "against": against, "mean": -pair.mean}
                return pair if pair.row == row else pair.model_copy(update=turned)
        return None

    def metric_names(self, role: str) -> list[str]:
        """Names of the metrics with `role`, in order of first appearance."""
        return list(dict.fromkeys(n for row in self.rows for n, m in row.metrics.items() if m.role == role))

    def directed_names(self, role: str) -> list[str]:
        """Those of `metric_names` by which methods can be compared: it is known whether higher or lower is better."""
        return [name for name in self.metric_names(role) if self.metric(name).higher_is_better is not None]

    def metric(self, name: str) -> Metric:
        """The first row's entry for `name`: what is true of the metric in every row (unit, direction, role)."""
        return next(row.metrics[name] for row in self.rows if name in row.metrics)


def mean_in(row: Row, names: Sequence[str]) -> Estimate | None:
    """Return the mean of a row's metrics; of a row over seeds the same trained models stand behind all of them."""
    return mean([row.estimate(name) for name in names], same_seeds=(row.runs or 1) > 1)


def mean(estimates: Sequence[Estimate | None], *, same_seeds: bool = False) -> Estimate | None:
    """Mean of independent estimates; None if any is missing, since a mean over fewer would not be comparable.

    Of `same_seeds` they are not independent: their errors are added, which is the most that the mean's can be.
    """
    if not estimates or None in estimates:
        return None
    errors = [estimate.stderr for estimate in estimates]
    error = None if None in errors else (sum(errors) if same_seeds else math.hypot(*errors)) / len(errors)
    return Estimate(sum(estimate.value for estimate in estimates) / len(estimates), error)


def change_error(before: Estimate, after: Estimate, gap: Paired | None) -> float | None:
    """The standard error of a change: of the paired difference; where there is none, of two estimates apart."""
    if gap is not None:
        return gap.stderr
    errors = [before.stderr, after.stderr]
    return None if None in errors else math.hypot(*errors)


def settings_text(point: Mapping[str, Any], join: str = " ") -> str:
    """Return the swept values of a grid's run as text, such as "learning_rate 0.0003, rank 4"."""
    pairs = ((key.rpartition(".")[2], f"{v:g}" if isinstance(v, float) else v) for key, v in point.items())
    return ", ".join(f"{key}{join}{value}" for key, value in pairs)


def variant_of(point: Mapping[str, Any]) -> str | None:
    """Return the `variant` of the row that averages over a grid's runs at `point`."""
    return settings_text(point).replace("learning_rate", "lr") or None


def shared_and_differing(found: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the settings that all of several runs share, and of the others the distinct values."""
    found = list(found)
    values = {key: distinct(settings.get(key) for settings in found) for settings in found for key in settings}
    same = {key: each[0] for key, each in values.items() if len(each) == 1}
    return same, {key: each for key, each in values.items() if len(each) > 1}


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return values, as JSON has them, each once."""
    return list({json.dumps(value, sort_keys=True, default=str): value for value in values}.values())


DISPLAY = {
    "base": "base", "full": "Full fine-tuning", "lora": "LoRA", "lora-fa": "LoRA-FA", "pissa": "PiSSA", "milora": "MiLoRA",
    "corda": "CorDA", "roselora": "RoseLoRA", "lora-null-v1": "LoRA-Null-v1", "lora-null-v2": "LoRA-Null-v2",
    "nb-lora": "NB-LoRA", "osf": "OSF", "mica": "MiCA", "eva": "EVA", "lora-ga": "LoRA-GA", "sc-lora": "SC-LoRA",
    "kl-anchor": "KL anchor", "replay": "Replay", "clora": "CLoRA", "oft": "OFT", "oplora": "OPLoRA",
    "keeplora": "KeepLoRA",
}  # fmt: skip


REPAIRED = "{}-repaired"  # the folder of a method's repaired adapter


def display_name(method: str) -> str:
    """Return a method's name as papers write it; one that is not ours is left as it is."""
    trained = method.removesuffix(REPAIRED.format(""))
    return DISPLAY.get(trained, trained) + (", repaired" if trained != method else "")


def parse_results(raw: Any, where: str = RESULTS_FILE) -> Results:
    """Validate a decoded `results.json`.

    Raises:
        UserError: naming `where`: a schema that this version does not read, and the version that does; or the first wrong
            entry and how many more there are.
    """
    if isinstance(raw, dict) and raw.get("schema") != SCHEMA:
        writer = (raw.get("environment") or {}).get("lora_null") if isinstance(raw.get("environment"), dict) else None
        needed = f"lora-null {writer}, which wrote it" if writer else "the version of lora-null that wrote it"
        raise UserError(
            f"{where}: schema {raw.get('schema')!r} needs {needed}; this is {__version__}, which reads schema {SCHEMA}"
        )
    return validated(Results, raw, where)


def load_results(path: str | Path) -> Results:
    """Read and validate `results.json`; `path` is the file or the output directory that holds it.

    Raises:
        UserError: in one line, when the file is missing, is not JSON, or does not follow the schema.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a finished run leaves it there") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from None
    return parse_results(raw, str(path))


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json` into a run's folder."""
    write_json(folder / RESULTS_FILE, {"schema": SCHEMA} | results.model_dump(exclude_unset=True))


def read_row(folder: Path) -> Row | None:
    """Return the row of a finished method by its folder, METHOD; None where it is not finished."""
    path = folder / ROW_FILE
    return validated(Row, read_json(path), str(path)) if path.is_file() else None


def told_of_repair(folder: Path) -> str:
    """Say of the adapter in METHOD that it is beyond its run's budget, where the run has repaired it; empty elsewhere."""
    row = read_row(folder.with_name(REPAIRED.format(folder.name)))
    if row is None or not row.needed_repair:
        return ""
    return f"This adapter is beyond the run's budget of forgetting; {row.method} {row.keeps}."


def write_row(folder: Path, row: Row) -> None:
    """Write METHOD/row.json, which stands for a finished method."""
    write_json(folder / ROW_FILE, row.model_dump(exclude_unset=True))


def shareable(value: Any) -> Any:
    """Return a recipe, or a part of one, in which files of this machine are called by their names alone."""
    if isinstance(value, dict):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def validated(kind: type[BaseModel], raw: Any, where: str) -> Any:
    """Return what a decoded file holds; raise a UserError of one line that names `where` for anything else."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first, *rest = error.errors()
        entry = ".".join(str(key) for key in first["loc"]) or "the whole file"
        more = f" (and {len(rest)} more)" if rest else ""
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise UserError(f"{where}: {entry}: {message}{more}") from None


class TrainLog(NamedTuple):
    """A training log: entries by rising step, and how many lines could not be read."""

    entries: list[dict[str, float]]
    unreadable: int = 0

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of `key`, over the entries that have it."""
        known = [entry for entry in self.entries if isinstance(entry.get(key), int | float)]
        return [entry["step"] for entry in known], [entry[key] for entry in known]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of the training's steps, without probes and saves; both counts continue in a resumed run."""
        last = next((entry for entry in reversed(self.entries) if "tokens" in entry), {})
        before = (entry for entry in self.entries if entry["step"] <= last.get("step", 0))
        seconds = last.get("seconds", 0) - sum(entry.get("probe/seconds", 0) for entry in before)
        return last["tokens"] / seconds if last.get("tokens") is not None and seconds > 0 else None


def load_log(path: Path) -> TrainLog:
    """Read a `train_log.jsonl`; a missing file is an empty log.

    A run that was killed may leave half a line, and a resumed one repeats steps: the half line is counted, not fatal
    (a report after hours of training must not fail on it), and the last value of a step wins.
    """
    by_step, unreadable = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            by_step.setdefault(float(entry["step"]), {}).update(entry)  # a probe's line and the loss of one step
        except (ValueError, KeyError, TypeError):
            unreadable += bool(line.strip())
    return TrainLog([by_step[step] for step in sorted(by_step)], unreadable)
