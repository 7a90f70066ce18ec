"""What a recipe's `eval.probe` measures while a method trains: a few rows of its evaluation, or entries of its own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lora_null.eval_harness import LmEvalTask, Task, few_rows
from lora_null.eval_harness.probe import can_be_probed, rows_of
from lora_null.recipes.config.schema import ProbeSection, Recipe
from lora_null.utils.errors import UserError

ROWS = {"retention": 32, "task": 8}  # of an entry, unless asked otherwise


@dataclass(frozen=True)
class ProbePlan:
    """What is measured, and how often.

    Attributes:
        section: the recipe's, or its defaults where a budget asks for probes.
        tasks: cut to the probed rows, of both roles.
        rows: the whole evaluation's task, by its key → the numbers of its probed rows.
    """

    section: ProbeSection
    tasks: list[Task]
    rows: dict[str, list[int]]


def plan_probes(recipe: Recipe, tasks: Sequence[Task], own: Mapping[str, Sequence[Task]]) -> ProbePlan | None:
    """Return what the probes of a recipe measure; None where it asks for none.

    Args:
        recipe: the recipe; a budget needs probes, also where it names none.
        tasks: of the whole evaluation.
        own: role → the tasks of the entries that `eval.probe` names itself.

    Raises:
        UserError: nothing to measure, or a task that cannot be cut to a few rows.
    """
    section = recipe.eval.probe or (ProbeSection() if recipe.budget else None)
    if section is None:
        return None
    probed, rows = [], {}
    for role in ("retention", "task"):
        wanted = getattr(section, role)
        if isinstance(wanted, list):
            probed += own[role]
            kept = (task for task in tasks if task.role == role)
            rows |= {task.key: _same_rows(task, own[role], recipe.eval.limit) for task in kept}
            continue
        for task in tasks if wanted != 0 else ():
            unasked = wanted is None
            if task.role != role or (unasked and role == "task" and not can_be_probed(task)):
                continue
            few, rows[task.key] = few_rows(task, _rows_unasked(task, recipe) if unasked else wanted, recipe.eval.limit)
            probed.append(few)
    if not probed:
        raise UserError("eval.probe: measures nothing; eval.retention and eval.task are empty, or no row is wanted")
    return ProbePlan(section, probed, rows)


def _rows_unasked(task: Task, recipe: Recipe) -> int:
    """Return as many rows as are probed unasked: of what is to be kept at most half, the others are there to check a budget on."""
    rows = rows_of(task, recipe.eval.limit)
    most = task.effective_limit(recipe.eval.limit) if rows is None else len(rows)
    if task.role == "task" or most is None:
        return ROWS[task.role]
    return max(1, min(ROWS["retention"], most // 2))


def _same_rows(task: Task, probed: Sequence[Task], limit: int | None) -> list[int]:
    """Return the numbers of a task's rows that tasks of files of their own ask as well."""
    asked = {row for few in probed for _, row in _asked(few, None)}
    return sorted({i for i, row in _asked(task, limit) if row in asked})


def _asked(task: Task, limit: int | None) -> list[tuple[int, Hashable]]:
    """Return (number, row) of what a task asks: the rows that it holds, or the documents of lm-eval's tasks."""
    if isinstance(task, LmEvalTask):
        members = (islice(member.eval_docs, task.effective_limit(limit)) for member in task.loaded["tasks"].values())
        return [(i, repr(document)) for documents in members for i, document in enumerate(documents)]
    return list(enumerate(rows_of(task, limit) or ()))


def probe_folder(base: Path) -> Path:
    """Return where the base's predictions on the probed rows are."""
    return base / "probe"
