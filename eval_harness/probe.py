"""Probes: a few rows of an evaluation, measured again and again while a model trains, in any Trainer.

from lora_null.eval_harness import AnswerTask, Probe

trainer.add_callback(Probe(trainer, [AnswerTask("NQ", pairs, kl=True, role="retention")], every="auto"))

Every measurement is a line of the trainer's log ("probe/NQ kl", …), so it is in `trainer.state.log_history` and in
whatever tracker `report_to` names. It leaves the training as it was: modes, random states, adapters.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainerCallback

from lora_null.eval_harness.evaluation import evaluate, validate_tasks
from lora_null.eval_harness.results import Metric
from lora_null.eval_harness.tasks import Task, reference_path
from lora_null.utils.distributed import broadcast, get_logger, is_first_process, on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import nan_as_null, read_json, write_json, write_text
from lora_null.utils.model_state import start_that_rewrites

logger = get_logger(__name__)

PREFIX = "probe/"  # before the names of the metrics in a log
SECONDS = PREFIX + "seconds"
STATE_FILE = "probe.json"
SHARE = 0.05  # of the training's time, at most, where `every` is chosen
WARM_STEPS = 3  # after which a step's time is known
ROWS = ("pairs", "texts", "chosen", "rejected")  # fields of a task that hold its rows


def rows_of(task: Task, limit: int | None = None) -> list[tuple[Any, ...]] | None:
    """Return the first `limit` rows that a task holds itself; None of a task that reads its documents."""
    held = [name for name in ROWS if hasattr(task, name)]
    return list(zip(*(getattr(task, name) for name in held)))[:limit] if held else None


def can_be_probed(task: Task) -> bool:
    """Return whether a task holds rows to choose from, or reads no more of its documents than a `limit` says."""
    return any(entry.name in (*ROWS, "limit") for entry in fields(task))  # pyright: ignore[reportArgumentType]


def few_rows(task: Task, n: int, limit: int | None = None) -> tuple[Task, list[int]]:
    """Return a task of n of another's rows, and their numbers there.

    Rows that the task itself holds are drawn at random, the same ones every time, since files are often sorted; of a task
    that reads its documents they are the first n. A task with fewer rows gives them all.

    Args:
        task: an `AnswerTask`, a `PreferenceTask`, or one with a `limit`.
        n: rows.
        limit: of the whole evaluation: rows beyond it are never taken.

    Raises:
        UserError: a kind of task that cannot be cut to rows.
    """
    if not can_be_probed(task):
        raise UserError(f"{task}: cannot be probed, it has no rows to choose from")
    held = rows_of(task, limit)
    if held is not None:
        rows = sorted(random.Random(0).sample(range(len(held)), min(n, len(held))))
        columns = {name: [getattr(task, name)[i] for i in rows] for name in ROWS if hasattr(task, name)}
        return replace(task, **columns), rows  # pyright: ignore[reportArgumentType]
    n = min(filter(None, (n, task.limit, limit)))
    return replace(task, limit=n), list(range(n))  # pyright: ignore[reportArgumentType]


@dataclass
class Point:
    """One measurement.

    Attributes:
        step: the optimizer steps taken before it.
        metrics: by name.
        samples: by name, one number per row.
        seconds: that it took, in the first process.
    """

    step: int
    metrics: dict[str, Metric]
    samples: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def nice_number(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50, … that is not below `least`: small differences of time leave it."""
    if not least > 1:
        return 1
    unit = 10 ** math.floor(math.log10(least))
    return next(int(m * unit) for m in (1, 2, 5, 10) if m * unit >= least * (1 - 1e-9))


class Probe(TrainerCallback):
    """Measures tasks before the first step, every so many steps, and after the last; `points` holds what was found.

    Under torch.distributed the rows are shared out over the processes.

    Args:
        trainer: whose callback this becomes.
        tasks: what to measure, a few dozen rows each; `few_rows` cuts a larger task.
        tokenizer: the trainer's own when not given.
        every: steps between two measurements; "auto" takes the smallest number that keeps them below `share` of the
            time, from what the first measurement and the first steps took.
        share: of the training's time; more than that is said in a line at the end.
        reference_dir: folder of the base model's predictions, for a KL. Where they are missing they are recorded before
            the first step: from the model with its adapter disabled, or from the model itself. Not given, it is `probe`
            in the trainer's output folder.
        batch_size, autocast_dtype: as in `evaluate`.
        every_file: file that remembers what "auto" chose, so that a run which is killed and started again probes
            where it did before. Checkpoints remember it too.

    Raises:
        UserError: an `every` or a `share` that is none, or a mistake in the tasks.
    """

    def __init__(
        self,
        trainer: Trainer,
        tasks: Sequence[Task],
        *,
        tokenizer: Any = None,
        every: int | Literal["auto"] = "auto",
        share: float = SHARE,
        reference_dir: Path | str | None = None,
        batch_size: int = 8,
        autocast_dtype: torch.dtype | None = None,
        every_file: Path | None = None,
    ) -> None:
        if every != "auto" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise UserError(f"every: must be a whole number of steps, or auto, not {every!r}")
        if not 0 < share <= 1:
            raise UserError(f"share: must be above 0 and at most 1, not {share}")
        self.trainer = trainer
        self.tasks = validate_tasks(tasks)
        self.tokenizer = tokenizer or trainer.processing_class
        self.every: int | None = None if every == "auto" else every
        self.auto = every == "auto"
        self.share = share
        self.options = {"batch_size": batch_size, "autocast_dtype": autocast_dtype, "progress": False}
        self.reference_dir = Path(reference_dir) if reference_dir else Path(trainer.args.output_dir) / "probe"
        self.owns_reference_dir = reference_dir is None  # and writes it anew: another model's may lie there
        self.every_file = every_file
        self.points: list[Point] = []
        self.begun = time.perf_counter()
        self.first_step = 0

    def on_probe(self, point: Point, control: Any) -> None:
        """Do what follows from a measurement; nothing here. All processes call it with the same point."""

    @property
    def model(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            self.points = []
        self._record_reference(anew=self.owns_reference_dir and not state.global_step)
        self._load_every()
        if not self.points:
            self._measure(state, control)
        self.begun, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every is None and state.global_step - self.first_step >= WARM_STEPS:
            self._choose(state.global_step - self.first_step)
        last = state.global_step >= state.max_steps
        if last or (self.every is not None and state.global_step % self.every == 0):
            self._measure(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_training_stop:  # early: no later step is the last
            self._measure(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        here = [point.seconds for point in self.points if point.step > self.first_step]
        spent = time.perf_counter() - self.begun
        if len(here) > 1 and sum(here) > self.share * spent:
            advice = "fewer rows" if self.auto else "every=auto, or fewer rows,"
            logger.warning(
                f"probe: took {sum(here) / spent:.0%} of the training's time, {len(here)} times {sum(here) / len(here):.2g} "
                f"s; {advice} would keep it below {self.share:.0%}"
            )

    def _record_reference(self, *, anew: bool) -> None:
        """Record the base's predictions for the tasks that need them and have none, as in a folder that a run is moved to."""
        files = {t.key: reference_path(self.reference_dir, t.reference_file) for t in self.tasks if t.reference_file}
        missing = on_first_process(lambda: [key for key, path in files.items() if anew or not path.is_file()])
        if not missing:
            return
        if not anew and not hasattr(self.model, "disable_adapter") and self.trainer.state.global_step:
            raise UserError(
                "probe: the base's predictions are not here, and every weight has moved; give reference_dir"
            )
        config = getattr(self.model, "peft_config", {}).get(getattr(self.model, "active_adapter", None))
        if start := start_that_rewrites(config):
            raise UserError(
                f"probe: init_lora_weights={start!r} has changed the base; give reference_dir, a folder of its predictions"
            )
        tasks = [task for task in self.tasks if task.key in missing]
        recording = {"reference_dir": self.reference_dir, "record_reference": True}
        with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
            evaluate(self.model, self.tokenizer, tasks, **recording, **self.options)

    def _measure(self, state: Any, control: Any) -> None:
        if self.points and self.points[-1].step == state.global_step:
            return
        found = evaluate(self.model, self.tokenizer, self.tasks, reference_dir=self.reference_dir, **self.options)
        point = Point(state.global_step, found.metrics, found.samples, found.seconds)
        self.points.append(point)
        logs = {PREFIX + name: metric.value for name, metric in found.metrics.items()}
        # Not the trainer's own `log`: TRL's would end the averages of its metrics between two of its own lines. A line of
        # the log also counts as the one that is due after this step; it is still due.
        due = control.should_log
        Trainer.log(self.trainer, logs | {SECONDS: round(found.seconds, 3)})
        control.should_log = self.trainer.control.should_log = due
        self.on_probe(point, control)

    def _choose(self, steps: int) -> None:
        """Choose the number of steps so that probes take no more than their share of the time."""
        probing = sum(point.seconds for point in self.points if point.step > self.first_step)
        step = broadcast(time.perf_counter() - self.begun - probing) / steps
        self.every = nice_number(self.points[-1].seconds * (1 - self.share) / (self.share * step))
        if self.every_file is not None and is_first_process():
            write_text(self.every_file, json.dumps({"every": self.every}) + "\n")

    def _load_every(self) -> None:
        """Take up what an earlier start of this run has chosen."""
        if self.every is None and (file := self.every_file) is not None:
            self.every = on_first_process(lambda: read_json(file)["every"] if file.is_file() else None)

    def save_state(self, checkpoint: Path) -> None:
        """Write what was found so far into a checkpoint; trainers of `lora_null.trainer` call it."""
        points = nan_as_null([asdict(point) for point in self.points])
        write_json(checkpoint / STATE_FILE, {"every": self.every, "points": points})

    def load_state(self, checkpoint: Path) -> None:
        """Read it back from the checkpoint that training goes on from."""
        if not (checkpoint / STATE_FILE).is_file():
            return
        found = read_json(checkpoint / STATE_FILE)
        self.every = self.every or found["every"]
        self.points = [_point(raw) for raw in found["points"]]


def _point(raw: dict[str, Any]) -> Point:
    """Return a point as a checkpoint holds it; JSON has no NaN, null stands for it."""
    known = lambda value: math.nan if value is None else value  # noqa: E731
    metrics = {name: Metric.from_dict({**m, "value": known(m["value"])}) for name, m in raw["metrics"].items()}
    samples = {name: list(map(known, values)) for name, values in raw["samples"].items()}
    return Point(raw["step"], metrics, samples, raw["seconds"])
