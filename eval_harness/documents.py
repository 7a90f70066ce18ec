"""Read local files of documents: json, jsonl, csv, parquet. One reader for training, calibration and evaluation.

Rows come as they were written: no column is forced into one type, no empty or "NA" cell of a csv becomes a missing value.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lora_null.utils.errors import UserError, nearest
from lora_null.utils.values import is_conversation

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its number, from 1 (in a jsonl file the line), and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Documents:
    """The rows of a file, the number of each in it (from 1), and those that could not be read."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    bad: list[BadRow] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The fields that any row has."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


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
    except (ValueError, OSError, csv.Error, pyarrow.ArrowException) as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: cannot read {paths[0]} as {kind} ({reason})") from error
    if found.bad and not keep_bad:
        first = found.bad[0]
        raise UserError(f"{where}: cannot read {paths[0]} as {kind} (row {first.row}: {first.reason})")
    if not found.rows and not found.bad:
        raise UserError(f"{where}: {paths[0]} has no documents")
    return found


def _read_table(paths: Sequence[Path], kind: str) -> Documents:
    rows, numbers, bad = [], [], []
    for path in paths:
        if kind == "parquet":
            found = from_arrow(pyarrow.parquet.ParquetFile(path).read().to_pylist())
        else:
            found = _csv_rows(path)
        for number, row in enumerate(found, start=len(rows) + len(bad) + 1):
            if isinstance(row, str):
                bad.append(BadRow(number, row))
            else:
                rows.append(row)
                numbers.append(number)
    return Documents(rows, numbers, bad)


def from_arrow(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of an Arrow table without the keys that it fills into dicts: there all dicts of a column have all keys."""
    return [{name: _without_filler(value) for name, value in row.items()} for row in rows]


def _without_filler(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_filler(inner) for key, inner in value.items() if inner is not None}
    return [_without_filler(inner) for inner in value] if isinstance(value, list) else value


def _csv_rows(path: Path) -> list[dict[str, Any] | str]:
    """Return the rows of a csv, every cell as its text; columns that hold nothing but whole numbers as those."""
    csv.field_size_limit(sys.maxsize)
    lines = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    names, *cells = [line for line in lines if line]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns are called {next(name for name in names if names.count(name) > 1)!r}")
    if not cells:
        raise ValueError("a header and no rows")
    whole = [row for row in cells if len(row) == len(names)]
    numbers = [all(_is_number(row[i]) for row in whole) for i in range(len(names))]
    return [
        {name: int(cell) if number else cell for name, number, cell in zip(names, numbers, row)}
        if len(row) == len(names)
        else f"{len(row)} cells under {len(names)} columns"
        for row in cells
    ]


def _is_number(cell: str) -> bool:
    """Whether a cell is a whole number that is written back as it stands: not 007, which is a name."""
    return cell.removeprefix("-").isdecimal() and len(cell) < 19 and str(int(cell)) == cell


def _read_json(paths: Sequence[Path]) -> Documents:
    """Read arrays of objects, or an object a line; rows are counted on over several files."""
    rows, numbers, bad, last = [], [], [], 0
    for path in paths:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        entries = _whole_file(data, lines=path.suffix.lower() == ".jsonl")
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
    return Documents(rows, numbers, bad)


def _whole_file(data: bytes, *, lines: bool) -> list[Any]:
    """Return the entries of a file that is one JSON array or one object over many lines; else its lines."""
    if data.lstrip().startswith((b"[", b"{")):
        try:
            whole = json.loads(data)
        except (ValueError, RecursionError):
            return data.splitlines()
        if isinstance(whole, list):
            return whole
        return [whole] if lines else _entries(whole)
    return data.splitlines()


def _entries(whole: dict[str, Any]) -> list[Any]:
    """Return the rows of a file that is one object: rows under one key, columns (lists, or pandas' dicts by index), or a row.

    Raises:
        ValueError: lists of different lengths, which are neither columns nor a row.
    """
    values = list(whole.values())
    if len(values) == 1 and isinstance(values[0], list) and values[0]:
        inner = values[0]
        if all(isinstance(entry, dict) for entry in inner) and not is_conversation(inner):
            return inner
    if values and all(
        isinstance(value, dict) and "0" in value and value.keys() == values[0].keys() for value in values
    ):
        values = [list(value.values()) for value in values]
    if not values or not all(isinstance(value, list) for value in values) or all(map(is_conversation, values)):
        return [whole]
    lengths = {name: len(value) for name, value in zip(whole, values)}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"one object of lists of different lengths: {told}")
    return [dict(zip(whole, row)) for row in zip(*values)]


def _object(entry: Any) -> dict[str, Any] | str:
    """Return the row of a line or an array's entry, or what is wrong with it."""
    if isinstance(entry, bytes):
        try:
            entry = json.loads(entry.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"not UTF-8 at byte {error.start}"
        except (ValueError, RecursionError):
            return "no complete JSON"
    if not isinstance(entry, dict) or not entry:
        return "no JSON object"
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "half a character (a lone surrogate)"
    return entry
