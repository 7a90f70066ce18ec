"""What every kind of evaluation is: a task that is checked before a model loads, described, and run on a live model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.results import Role, TaskResult
from lora_null.utils.distributed import broadcast
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.limits import PositionLimit

if TYPE_CHECKING:
    from lm_eval.api.model import LM

LONGEST_NAME = 180  # characters of a file's name, which a temporary one is longer than: file systems take 255
TASK_FILES = Path(__file__).parent / "task_files"  # this package's own tasks, in lm-eval's format


@dataclass(frozen=True)
class RunOptions:
    """How a task is to be run.

    Attributes:
        limit: documents, at most.
        batch_size: sequences of a forward pass, in each process.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        seed: of whatever is drawn.
        reference_dir: the folder of the base model's predictions, if there is one.
        record_reference: this is the base model, and its predictions are to be written there.
        output_dir: where a task may leave what it made; None for nowhere.
        engine: of the same weights, for tasks that can run on another engine than the live model.
        progress: show a bar where there is one.
    """

    limit: int | None
    batch_size: int
    autocast_dtype: torch.dtype | None
    seed: int
    reference_dir: Path | None
    record_reference: bool
    output_dir: Path | None
    engine: LM | None = None
    progress: bool = True

    def scoring(self, name: str) -> dict[str, Any]:
        """Return what `score_answers` takes of these, for the task of that name."""
        options = {"batch_size": self.batch_size, "autocast_dtype": self.autocast_dtype, "progress": self.progress}
        return {"name": name, **options}

    def find_reference(self, file: str | None) -> Path | None:
        """Return the path of a reference file; None if there is no file, no folder, or nothing to read in it.

        Every process calls this together.
        """
        if self.reference_dir is None or file is None:
            return None
        path = reference_path(self.reference_dir, file)
        return path if self.record_reference or broadcast(path.is_file()) else None


def reference_path(folder: Path, file: str) -> Path:
    """Return where a task's reference file lies, whatever the task is called."""
    name = quote(file, safe=" ")
    if len(name) > LONGEST_NAME:
        name = f"{name[:60]}-{hashlib.sha256(file.encode()).hexdigest()[:12]}{Path(file).suffix}"
    return folder / name


class Task(ABC):
    """One thing to evaluate. A new kind is a dataclass with `name` and `role` and the methods below.

    Attributes:
        name: what to call the results.
        role: "retention" for what the model should keep knowing, "task" for what it is trained on.
        limit: documents, at most, whatever the whole evaluation allows; None for no limit of its own.
        noise_documents: the first documents on which a base model is measured again, in other batches, for its noise; None
            for all.
        max_batch_size: sequences of a forward pass, at most, whatever the whole evaluation takes; None for no limit of its own.
        hard_position_limit: whether it cannot go beyond the positions that a rotary model was trained on, as other tasks can.
        runs_on_engine: whether `RunOptions.engine` can stand in for the live model.
        in_training_template: whether its prompts are framed by the template of the training data.
        output_folder: the folder in `RunOptions.output_dir` that it writes into, which no other task of an evaluation may.
    """

    name: str | None
    role: Role
    limit: int | None = None
    noise_documents: ClassVar[int | None] = 0
    max_batch_size: ClassVar[int | None] = None
    hard_position_limit: ClassVar[bool] = False
    runs_on_engine: ClassVar[bool] = False
    in_training_template: ClassVar[bool] = False
    output_folder: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """The name of the results."""
        return self.name or ""

    @property
    def key(self) -> str:
        """What tells this task from the others of an evaluation."""
        return self.label

    @property
    def metric_names(self) -> list[str]:
        """Names of its metrics, the most informative first.

        A task whose metrics are known only after `check` gives its label alone; theirs begin with it.
        """
        return [self.label]

    @property
    def all_metric_names(self) -> list[str]:
        """The names of all its metrics, none left to the label; known after `check`."""
        return self.metric_names

    @property
    def reference_file(self) -> str | None:
        """The name of the file with what the base model gave, where it compares with that."""
        return None

    def effective_limit(self, limit: int | None) -> int | None:
        """Return how many documents are evaluated at most, where the whole evaluation allows `limit`."""
        return min(filter(None, (self.limit, limit)), default=None)

    def measures(self, metric: str) -> bool:
        """Return whether a metric of that name is one of this task's."""
        return metric in self.metric_names or (
            self.metric_names == [self.label] and metric.startswith((f"{self.label}/", f"{self.label}: "))
        )

    def has_noise(self, metric: str) -> bool:
        """Return whether measuring a base model again tells by how much rounding changes that metric."""
        return True

    def report_notes(self) -> dict[str, str]:
        """Return what a report should say of how this is measured, by a name: who grades, what holds the code."""
        return {}

    def check(self) -> None:
        """Check everything that needs no model: values, files, fields, consent.

        Raises:
            UserError: what is wrong, in one line that names the task.
        """
        if self.role not in ("retention", "task"):
            raise UserError(f"{self}: unknown role {self.role!r}{nearest(self.role, ('retention', 'task'))}")

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:  # noqa: B027
        """Raise a UserError where something is longer than the model's table of positions; by default nothing is."""

    @abstractmethod
    def describe(self, limit: int | None) -> dict[str, Any]:
        """Return, as JSON, what must not change between two evaluations; files and texts by the hash of their contents."""

    @abstractmethod
    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Measure a live model that is in eval mode; every process calls this together and gets a result, the first one's counts."""

    def __str__(self) -> str:
        return f"evaluation task {self.label!r}"
