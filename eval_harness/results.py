"""What an evaluation finds: metrics, and how they are written as JSON and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_null.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Role = Literal["retention", "task"]


@dataclass(frozen=True)
class Metric:
    """One number that was measured on n documents, questions or grades.

    Attributes:
        value: the estimate, in `unit`.
        stderr: its standard error; None where there is none.
        n: how many documents, questions or grades it is computed from.
        higher_is_better: the direction of improvement; None where lm-eval's task does not name one.
        role: "retention" for what the model should keep knowing, "task" for what it is trained on.
        unit: "fraction", "nats" (per answer token), "score" (1 to 10), or, for a metric of lm-eval that is none of
            these, the metric's own name.
    """

    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    role: Role
    unit: str = "fraction"

    def __getitem__(self, key: str) -> Any:
        """Return a field by its name in JSON: `metric["value"]`."""
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Metric:
        """Return the metric of an entry in results.json or eval.json; keys that later versions add are left aside.

        Raises:
            KeyError: a field is missing.
        """
        optional = {"unit": entry["unit"]} if "unit" in entry else {}
        return cls(*(entry[key] for key in ("value", "stderr", "n", "higher_is_better", "role")), **optional)


@dataclass(frozen=True)
class TaskResult:
    """What one task's `run` found.

    Attributes:
        metrics: by name.
        samples: {name: one number per document or question, in order}, for the metrics that have them.
        settings: what else must be the same in two evaluations for their metrics to be comparable.
        weights: {name: the weight of each sample}, for metrics whose value is not their plain mean.
        group_samples: see `Evaluation`.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    group_samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, metric: Metric, samples: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Take up a metric with its samples, and with their weights where they do not count alike."""
        self.metrics[name], self.samples[name] = metric, samples.tolist()
        if weights is not None:
            self.weights[name] = weights.tolist()


@dataclass
class Evaluation:
    """What the evaluation of one model found.

    Attributes:
        metrics: by name.
        settings: everything that must be the same in two evaluations for their metrics to be comparable.
        seconds: wall-clock time, of the first process.
        samples: {name: one number per document or question, in order}, for paired comparisons: lm-eval's metric, or the
            question's mean nats per answer token. Only for metrics that have them.
        weights: {name: the weight of each sample}, the answer's tokens for nats per token; none where all count alike.
        noise: of a base model, {name: by how much the value changed when it was measured again in other batches}.
        group_samples: `samples` of a group of lm-eval, its members' one after another. Apart from the others, since the
            first n documents of a group are the first n of each member.
    """

    metrics: dict[str, Metric]
    settings: dict[str, Any]
    seconds: float
    samples: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    group_samples: dict[str, list[float]] = field(default_factory=dict)

    def __or__(self, other: Evaluation) -> Evaluation:
        """Return two evaluations of one model, of different tasks, as one; the settings are this one's."""
        tasks = self.settings["tasks"] | other.settings["tasks"]
        settings = self.settings | {"backend": other.settings["backend"], "tasks": tasks}
        kinds = ("metrics", "samples", "weights", "noise", "group_samples")
        both = {name: getattr(self, name) | getattr(other, name) for name in kinds}
        return Evaluation(settings=settings, seconds=self.seconds + other.seconds, **both)

    def to_json(self) -> str:
        """Return this evaluation as JSON text, as eval.json holds it."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Return the evaluation that `to_json` wrote."""
        entries = json.loads(text)
        metrics = {name: Metric.from_dict(entry) for name, entry in entries.pop("metrics").items()}
        return cls(metrics, **entries)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Return the evaluation in a file that holds `to_json`'s text.

        Raises:
            UserError: it is damaged.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: damaged, not valid JSON of an evaluation; remove it and it is measured again"
            ) from None
