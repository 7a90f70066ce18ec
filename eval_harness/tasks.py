"""The kinds of tasks: lm-eval's, pairs of prompts and answers, and ones that measure by their own code."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import quote

import torch
from torch import nn

from lora_null.utils.distributed import broadcast
from lora_null.utils.errors import UserError, nearest

Role = Literal["retention", "task"]


@dataclass(frozen=True)
class LmEvalTask:
    """A task, group or tag of lm-evaluation-harness.

    Args:
        task: its name there, e.g. "nq_open".
        path: a local json, jsonl, parquet or csv file with the documents to evaluate, instead of the hub data set. A
            group whose members differ only in their subset (hendrycks_math) is then run as one task over the file.
        fields: the task's field names → the file's, where they differ, e.g. {"answers": "answer"}.
        num_fewshot: examples in the prompt; None keeps the task's own number (0 where it has none).
        limit: evaluate only the first `limit` documents (of each member of a group).
        metric: report only this one of several results: a metric, a filter, or "metric/filter".
        fewshot_path: a local file for the few-shot examples; `path` never serves for that, as it would leak answers.
        role: "retention" for what the model should keep knowing, "task" for what it is trained on.
        name: what to call the results, if not `task`; needed to run one task on two files.
        confirm_run_unsafe_code: consent to run the code that the model writes (code tasks).
        chat: put the prompts into the model's own chat template, as lm-eval's `--apply_chat_template` does.
    """

    task: str
    path: str | None = None
    fields: dict[str, str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    metric: str | None = None
    fewshot_path: str | None = None
    role: Role = "task"
    name: str | None = None
    confirm_run_unsafe_code: bool = False
    chat: bool = False

    @property
    def label(self) -> str:
        """The name of the results."""
        return self.name or self.task

    @property
    def key(self) -> str:
        """What tells this task from the others of an evaluation: one task may be listed once for each metric."""
        return self.label if self.metric is None else f"{self.label}/{self.metric}"


class _Named:
    """A task whose results and identity are its `name`."""

    name: str

    @property
    def label(self) -> str:
        """The name of the results."""
        return self.name

    @property
    def key(self) -> str:
        """What tells this task from the others of an evaluation."""
        return self.name


@dataclass(frozen=True)
class AnswerTask(_Named):
    """Prompts with their right answers; measures how likely, and how changed, the answers are.

    Args:
        name: what to call the results ("NAME nll", "NAME kl").
        pairs: (prompt text, answer text), e.g. ("Q: who wrote Emma?\\nA:", " Jane Austen").
        kl: also measure KL(base || model) on the answers, against the base model's recorded predictions. Those take
            (answer tokens) × (vocabulary) × 4 bytes on disk: short answers only.
        role: as in `LmEvalTask`.
    """

    name: str
    pairs: list[tuple[str, str]] = field(repr=False)
    kl: bool = False
    role: Role = "task"


@dataclass(frozen=True)
class RunOptions:
    """How an `OwnTask` is to be run.

    Attributes:
        limit: documents, at most.
        batch_size: sequences of a forward pass, on each rank.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        seed: of whatever is drawn.
        reference_dir: the folder of the base model's predictions, if there is one.
        record_reference: this is the base model, and its predictions are to be written there.
        output_dir: where a task may leave what it made; None for nowhere.
    """

    limit: int | None
    batch_size: int
    autocast_dtype: torch.dtype | None
    seed: int
    reference_dir: Path | None
    record_reference: bool
    output_dir: Path | None

    def reference(self, file: str) -> Path | None:
        """Return the path of a reference file; None if there is no folder, or nothing to read in it."""
        if self.reference_dir is None:
            return None
        path = self.reference_dir / quote(file, safe=" .")
        return path if self.record_reference or broadcast(path.is_file()) else None


class OwnTask(_Named, ABC):
    """A task that measures a live model by its own code; a dataclass with `name` and `role`."""

    role: Role
    generates: ClassVar[bool] = False  # whether it generates text

    @abstractmethod
    def check(self) -> None:
        """Raise a UserError for what is wrong in itself, before a model is loaded."""

    @abstractmethod
    def describe(self, limit: int | None) -> dict[str, Any]:
        """Return what must not change between two evaluations."""

    @abstractmethod
    def run(self, model: nn.Module, tokenizer: Any, options: RunOptions) -> tuple[dict, dict, dict]:
        """Return (metrics, samples, more for the settings), on every rank; see `Evaluation`."""


Task = LmEvalTask | AnswerTask | OwnTask


def list_tasks(tasks: Sequence[Task | str]) -> list[Task]:
    """Return `tasks` with plain names turned into `LmEvalTask`s, each checked for what is wrong in itself.

    Raises:
        UserError: for a value that no task can have, or two tasks of the same name.
    """
    tasks = [LmEvalTask(task) if isinstance(task, str) else task for task in tasks]
    keys = [task.key for task in tasks]
    for task in tasks:
        _check_values(task)
        if keys.count(task.key) > 1:
            raise UserError(f"evaluation task {task.key!r} is listed twice; give one of them another name")
    return tasks


def describe(task: Task, limit: int | None) -> dict[str, Any]:
    """Return what must not change between two evaluations of `task`, files by the hash of their contents."""
    if isinstance(task, OwnTask):
        return task.describe(limit)
    if isinstance(task, AnswerTask):
        pairs = repr(task.pairs[:limit]).encode()
        return {"kl": task.kl, "limit": limit, "pairs_sha256": hashlib.sha256(pairs).hexdigest()}
    settings = {key: getattr(task, key) for key in ("task", "fields", "metric", "chat")} | {"limit": limit}
    for key in ("path", "fewshot_path"):
        if (path := getattr(task, key)) is not None:
            settings[f"{key}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return settings


def _check_values(task: Task) -> None:
    """Refuse what is wrong in itself, before anything is read."""
    where = f"evaluation task {task.label!r}"
    if task.role not in ("retention", "task"):
        raise UserError(f"{where}: unknown role {task.role!r}{nearest(task.role, ('retention', 'task'))}")
    if isinstance(task, OwnTask):
        task.check()
        return
    if isinstance(task, AnswerTask):
        if not task.pairs:
            raise UserError(f"{where} has no pairs of prompt and answer")
        for i, pair in enumerate(task.pairs):
            if len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
                raise UserError(f"{where}: pair {i} must be a prompt and an answer, both with text, not {pair!r}")
        return
    for key in ("limit", "num_fewshot"):
        value, least = getattr(task, key), int(key == "limit")
        if value is not None and (not isinstance(value, int) or value < least):
            raise UserError(f"{where}: {key} must be a whole number of at least {least}, not {value!r}")
    for key in ("fields", "fewshot_path"):
        if getattr(task, key) and task.path is None:
            raise UserError(f"{where}: {key} needs path, the local file with the documents")
    if (
        task.path is not None
        and task.fewshot_path is not None
        and Path(task.path).resolve() == Path(task.fewshot_path).resolve()
    ):
        raise UserError(f"{where}: fewshot_path is the evaluated file itself; name another file")
