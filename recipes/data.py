"""Load the rows that a recipe names, from the hub or from local files, and check them before a model loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from lora_null.errors import UserError, nearest
from lora_null.eval_harness.documents import FILE_KINDS, Documents, read_documents
from lora_null.recipes.schema import CalibrationSection


def load_rows(path: str, *, subset: str | None, split: str, where: str) -> datasets.Dataset:
    """Load one split whole: `load_documents` where no row may be bad."""
    return load_documents(path, subset=subset, split=split, where=where).rows


def load_documents(path: str, *, subset: str | None, split: str, where: str, keep_bad: bool = False) -> Documents:
    """Load one split.

    Args:
        path: a local file (json, jsonl, csv, parquet: its own split), a folder of such files, or a hub id.
        subset: configuration of a hub data set.
        split: name of the split.
        where: the recipe key, for messages.
        keep_bad: list unreadable rows instead of refusing the file.

    Raises:
        UserError: nothing there, unknown split, unreadable, unreachable, or empty.
    """
    local = Path(path)
    if local.is_file() or local.is_dir():
        files = [local] if local.is_file() else _files_of(local, split, where)
        return read_documents(files, f"{where}.path", keep_bad=keep_bad)
    if local.suffix in FILE_KINDS or path.startswith((".", "/", "~")):
        raise UserError(f"{where}.path: no file or folder {path}")
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}.path: cannot load {path!r} ({reason}); {where}.path= also takes a local file"
        ) from None
    if not len(rows):
        raise UserError(f"{where}.path: {path} holds no rows")
    return Documents(rows, list(range(1, len(rows) + 1)))


def _files_of(folder: Path, split: str, where: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in FILE_KINDS)
    if not files:
        raise UserError(f"{where}.path: {folder} holds no data files ({', '.join(FILE_KINDS)})")
    chosen = [file for file in files if file.stem == split or file.name.startswith((f"{split}-", f"{split}."))]
    if not chosen:
        raise UserError(f"{where}.split: no {split!r} in {folder}{nearest(split, [file.stem for file in files])}")
    return chosen


def need_field(rows: datasets.Dataset, field: str, where: str) -> None:
    """Raise a UserError that names the fields there are, unless `field` is one of them."""
    if field not in rows.column_names:
        raise UserError(f"{where}: the data has no field {field!r}{nearest(field, rows.column_names)}")


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
    return [fill(section.template, row) for row in rows]


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Return a field of a row by its name, or a text with {field}s filled in."""
    if "{" not in template:
        return first_answer(row[template])
    return re.sub(r"{(\w+)}", lambda match: first_answer(row[match[1]]), template)


def first_answer(answer: Any) -> str:
    """Return an answer's text; of several accepted answers the first."""
    if isinstance(answer, (list, tuple)):
        return str(answer[0]) if answer else ""
    return "" if answer is None else str(answer)
