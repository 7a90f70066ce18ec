"""Read local files of documents: json, jsonl, csv, parquet. One reader for training, calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from lora_null.errors import UserError, nearest

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number, from 1 (in a jsonl file the line), and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Documents:
    """The rows of a file, the number of each in it (from 1), and those that could not be read."""

    rows: datasets.Dataset
    numbers: list[int]
    bad: list[BadRow] = field(default_factory=list)


def read_documents(paths: Sequence[Path], where: str, *, keep_bad: bool = False) -> Documents:
    """Read files of one kind as one data set.

    Args:
        paths: the files, in order.
        where: what asks for them, for messages.
        keep_bad: list lines that are no JSON or no UTF-8 in `Documents.bad` instead of refusing the file.

    Raises:
        UserError: a missing or empty file, an unknown kind, or what cannot be read, named by row.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"{where}: there is no file {path}")
        if path.suffix.lower() not in FILE_KINDS:
            raise UserError(f"{where}: cannot read {path}{nearest(path.suffix, FILE_KINDS)}")
        if path.stat().st_size == 0:
            raise UserError(f"{where}: {path} is empty")
    kind = FILE_KINDS[paths[0].suffix.lower()]
    try:
        found = _read_json(paths) if kind == "json" else _read_table(paths, kind)
    except (ValueError, OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: cannot read {paths[0]} as {kind} ({reason})") from error
    if found.bad and not keep_bad:
        first = found.bad[0]
        raise UserError(f"{where}: cannot read {paths[0]} as {kind} (row {first.row}: {first.reason})")
    if not len(found.rows) and not found.bad:
        raise UserError(f"{where}: {paths[0]} has no documents")
    return found


def _read_table(paths: Sequence[Path], kind: str) -> Documents:
    rows = datasets.load_dataset(kind, data_files=[str(path) for path in paths], split="train")
    return Documents(rows, list(range(1, len(rows) + 1)))


def _read_json(paths: Sequence[Path]) -> Documents:
    """Read arrays of objects, or an object a line; rows are counted on over several files."""
    rows, numbers, bad, last = [], [], [], 0
    for path in paths:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        array = _whole_array(data)
        entries = data.splitlines() if array is None else array
        for number, entry in enumerate(entries, start=last + 1):
            if isinstance(entry, bytes) and not entry.strip():
                continue
            row = _object(entry)
            if isinstance(row, str):
                bad.append(BadRow(number, row))
            else:
                rows.append(row)
                numbers.append(number)
        last += len(entries)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Documents(datasets.Dataset.from_dict(columns), numbers, bad)


def _whole_array(data: bytes) -> list[Any] | None:
    """Return the entries of a file that is one JSON array or one object over many lines; None for JSON lines."""
    if not data.lstrip().startswith((b"[", b"{")):
        return None
    try:
        whole = json.loads(data)
    except ValueError:
        return None
    return whole if isinstance(whole, list) else [whole]


def _object(entry: Any) -> dict[str, Any] | str:
    """Return the row of a line or an array's entry, or what is wrong with it."""
    if isinstance(entry, bytes):
        try:
            entry = json.loads(entry.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"not UTF-8 at byte {error.start}"
        except ValueError:
            return "no complete JSON"
    if not isinstance(entry, dict) or not entry:
        return "no JSON object"
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return entry
