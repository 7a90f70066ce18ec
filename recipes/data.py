"""Load the rows that a recipe names, from the hub or from local files, and check them before a model loads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from lora_null.errors import UserError, nearest
from lora_null.eval_harness import AnswerTask, LmEvalTask
from lora_null.recipes.schema import AnswersEntry, CalibrationSection, DataSection, EvalSection
from lora_null.recipes.templates import render

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(path: str, *, subset: str | None, split: str, where: str) -> datasets.Dataset:
    """Load one split.

    Args:
        path: a local file (json, jsonl, csv, parquet: its own split), a folder of such files, or a hub id.
        subset: configuration of a hub data set.
        split: name of the split.
        where: the recipe key, for messages.

    Raises:
        UserError: nothing there, unknown split, unreadable, unreachable, or empty.
    """
    local = Path(path)
    try:
        if local.is_file():
            rows = _read_files([local], where)
        elif local.is_dir():
            rows = _read_files(_files_of(local, split, where), where)
        elif local.suffix in LOADERS or path.startswith((".", "/", "~")):
            raise UserError(f"{where}.path: no file or folder {path}")
        else:
            rows = datasets.load_dataset(path, subset, split=split)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}.path: cannot load {path!r} ({reason}); {where}.path= also takes a local file"
        ) from None
    if not len(rows):
        raise UserError(f"{where}.path: {path} holds no rows")
    return rows


def _files_of(folder: Path, split: str, where: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in LOADERS)
    chosen = [file for file in files if file.stem == split or file.name.startswith((f"{split}-", f"{split}."))]
    if not chosen:
        names = [file.stem for file in files]
        raise UserError(
            f"{where}.split: no {split!r} in {folder}{nearest(split, names) if names else ' (no data files)'}"
        )
    return chosen


def _read_files(files: list[Path], where: str) -> datasets.Dataset:
    kind = LOADERS.get(files[0].suffix)
    if kind is None:
        raise UserError(f"{where}.path: {files[0]} is none of {', '.join(LOADERS)}")
    if any(file.stat().st_size == 0 for file in files):
        raise UserError(f"{where}.path: {files[0]} is empty")
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")


def need_field(rows: datasets.Dataset, field: str, where: str) -> None:
    """Raise a UserError that names the fields there are, unless `field` is one of them."""
    if field not in rows.column_names:
        raise UserError(f"{where}: the data has no field {field!r}{nearest(field, rows.column_names)}")


def training_rows(data: DataSection) -> datasets.Dataset:
    """Return rows of `prompt` and `completion` texts, templated.

    Raises:
        UserError: as `load_rows`, and for a missing field or only empty rows.
    """
    rows = load_rows(data.path, subset=data.subset, split=data.split, where="data")
    need_field(rows, data.prompt, "data.prompt")
    need_field(rows, data.response, "data.response")
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    pairs = [(row[data.prompt], _first(row[data.response])) for row in rows]
    pairs = [render(data.template, prompt, response) for prompt, response in pairs if prompt and response]
    if not pairs:
        raise UserError(f"data: every row of {data.path} has an empty {data.prompt!r} or {data.response!r}")
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def calibration_texts(section: CalibrationSection) -> list[str]:
    """Return the calibration texts: one field of each row, or a template filled with several.

    Raises:
        UserError: as `load_rows`, and for a missing field.
    """
    rows = load_rows(section.path, subset=section.subset, split=section.split, where="calibration")
    if section.template is None:
        need_field(rows, section.field, "calibration.field")
        return [str(text) for text in rows[section.field] if text]
    names = re.findall(r"{(\w+)}", section.template)
    if not names:
        raise UserError(
            f"calibration.template: {section.template!r} names no field, such as {{{rows.column_names[0]}}}"
        )
    for name in names:
        need_field(rows, name, "calibration.template")
    return [re.sub(r"{(\w+)}", lambda match, row=row: _first(row[match[1]]), section.template) for row in rows]


def _first(answer: Any) -> str:
    """Return an answer's text; of several accepted answers the first."""
    if isinstance(answer, (list, tuple)):
        return str(answer[0]) if answer else ""
    return "" if answer is None else str(answer)


def eval_tasks(section: EvalSection) -> list[AnswerTask | LmEvalTask]:
    """Return the harness's tasks, answers loaded and templated.

    Raises:
        UserError: as `load_rows`, a missing field, or a name used twice.
    """
    tasks = [
        _task(entry, role, f"eval.{role}")
        for role, entries in (("retention", section.retention), ("task", section.task))
        for entry in entries
    ]
    _refuse_twins(tasks)
    return tasks


def _refuse_twins(tasks: Iterable[AnswerTask | LmEvalTask]) -> None:
    names = [task.name if isinstance(task, AnswerTask) else task.task for task in tasks]
    twin = next((name for name in names if names.count(name) > 1), None)
    if twin:
        raise UserError(f"eval: {twin!r} is measured twice")


def _task(entry: Any, role: str, where: str) -> AnswerTask | LmEvalTask:
    if not isinstance(entry, AnswersEntry):
        return LmEvalTask(**entry.model_dump(), role=role)
    rows = load_rows(entry.path, subset=entry.subset, split=entry.split, where=where)
    need_field(rows, entry.prompt, f"{where}.prompt")
    need_field(rows, entry.response, f"{where}.response")
    last = len(rows) if entry.limit is None else min(len(rows), entry.offset + entry.limit)
    if last <= entry.offset:
        raise UserError(f"{where}.offset: {entry.path} has only {len(rows)} rows")
    rows = rows.select(range(entry.offset, last))
    pairs = [render(entry.template, row[entry.prompt], _first(row[entry.response])) for row in rows]
    return AnswerTask(name=entry.answers, pairs=pairs, kl=role == "retention", role=role)
