"""Read local files of documents: json, jsonl, csv, tsv, parquet, text. One reader for training, calibration and evaluation.

Rows come as they were written: no column is forced into one type, no empty or "NA" cell of a csv becomes a missing value.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lora_null.eval_harness.chat_exports import exported_turns, joined_messages
from lora_null.utils.distributed import print_once
from lora_null.utils.errors import UserError, first_line, nearest
from lora_null.utils.values import HALF, TextOfList, as_conversation, as_written, is_conversation, is_written

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
FILE_KINDS |= {".ndjson": "json", ".txt": "text", ".md": "text"}
PARQUET = "a parquet file; its name must end in .parquet"
SIGNS = {  # how a file begins whose name says another kind, and what it is
    codecs.BOM_UTF32_LE: "in UTF-32; save it as UTF-8",
    codecs.BOM_UTF32_BE: "in UTF-32; save it as UTF-8",
    codecs.BOM_UTF16_LE: "in UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "in UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1\x15": PARQUET,
}
DELIMITERS = ",;\t|"  # of a csv
KEYS_OF_ROWS = ("data", "rows", "examples", "records", "instances")  # beside which a json file may say more
CHUNK_CHARACTERS = 1500  # characters of a text file that make a row, about
END_WORDS = 24  # the last words of such a row, at most, that are asked for where the rest is a prompt
TEXT_FIELDS = ["text", "beginning", "ending", "file", "last"]  # of such a row
# Where a long paragraph is cut: at the end of a line, of a sentence, of a word.
CUTS = [re.compile(end) for end in (r"(?=\n)", r"[.!?…؟।][\"'”’»)\]]*(?=\s)|[。！？｡][”’」』）]*", r"(?=\s)")]


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


def read_documents(
    paths: Sequence[Path], where: str, *, keep_bad: bool = False, label_names: bool = True
) -> Documents:
    """Read files of one kind as one data set.

    Args:
        paths: the files, in order.
        where: what asks for them, for messages.
        keep_bad: list lines that are no JSON or no UTF-8 in `Documents.bad` instead of refusing the file.
        label_names: read the class labels of a parquet (`datasets.ClassLabel`) as their names, not as their numbers.

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
        with path.open("rb") as file:
            begins = file.read(8)
        told = next((what for sign, what in SIGNS.items() if begins.startswith(sign)), None)
        if told and (path.suffix.lower(), told) != (".parquet", PARQUET):
            raise UserError(f"{where}: {path} is {told}")
    kind, found, last = FILE_KINDS[paths[0].suffix.lower()], Documents([], []), 0
    other = next((path for path in paths if FILE_KINDS[path.suffix.lower()] != kind), None)
    if other is not None:
        raise UserError(f"{where}: files of two kinds, {paths[0]} and {other.name}; name one of them")
    try:
        for path in paths:
            entries = _parquet_rows(path, label_names) if kind == "parquet" else READERS[kind](path)
            for number, entry in enumerate(entries, start=last + 1):
                if isinstance(entry, str):
                    found.bad.append(BadRow(number, entry))
                elif entry is not None:
                    found.rows.append(entry)
                    found.numbers.append(number)
            last += len(entries)
    except (ValueError, OSError, csv.Error, pyarrow.ArrowException) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{where}: cannot read {path} as {kind} ({reason})") from error
    if found.bad and not keep_bad:
        first = found.bad[0]
        raise UserError(f"{where}: cannot read {paths[0]} as {kind} (row {first.row}: {first.reason})")
    if not found.rows and not found.bad:
        raise UserError(f"{where}: {paths[0]} has no documents")
    return found


def _parquet_rows(path: Path, label_names: bool) -> list[dict[str, Any]]:
    table = pyarrow.parquet.ParquetFile(path).read()
    _check_distinct(table.column_names)
    features = None
    with contextlib.suppress(ValueError, KeyError, TypeError):  # none, or by somebody else than `datasets`
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] if label_names else None
    return from_arrow(table.to_pylist(), features if isinstance(features, dict) else {})


def _check_distinct(names: Sequence[str], what: str = "columns") -> None:
    """Raise a ValueError where two columns have one name, of which the second would hide the first."""
    if len(set(names)) < len(names):
        raise ValueError(f"two {what} are called {next(name for name in names if names.count(name) > 1)!r}")


def with_lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose texts of lists, as a csv has them, are lists."""
    return {name: value.items if isinstance(value, TextOfList) else value for name, value in row.items()}


def from_arrow(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any] = {}) -> list[dict[str, Any]]:
    """Return rows of an Arrow table as they were meant.

    Without the keys that Arrow fills into dicts, of which all in a column have all keys there; and with the names of class
    labels in place of their numbers. A number without a name, such as the −1 of rows without a label, is None.

    Args:
        rows: the rows.
        features: `datasets.Features.to_dict()` of them.
    """
    return [{name: _as_meant(value, features.get(name)) for name, value in row.items()} for row in rows]


def _as_meant(value: Any, feature: Any) -> Any:
    """Return a value by its part of the features: those of a struct by name, or an object whose `_type` is a text."""
    if isinstance(feature, list) and feature:  # as earlier versions of `datasets` wrote a list
        feature = {"_type": "List", "feature": feature[0]}
    feature = feature if isinstance(feature, dict) else {}
    if isinstance(value, dict | list):
        held = feature.get("feature", feature) if isinstance(feature.get("_type"), str) else feature
        if isinstance(value, list):
            return [_as_meant(inner, held) for inner in value]
        of_key = held if isinstance(held, dict) else {}
        return {key: _as_meant(inner, of_key.get(key)) for key, inner in value.items() if inner is not None}
    if feature.get("_type") != "ClassLabel" or not isinstance(value, int):  # replaced since, by texts
        return value
    return feature["names"][value] if value in range(len(feature["names"])) else None


def _csv_column(cells: Sequence[str]) -> Sequence[Any]:
    """Return the values of a column: integers, lists and dicts where all its cells are, and conversations; else texts."""
    if all(map(_is_integer, cells)):
        return [int(cell) for cell in cells]
    found: list[Any] = []
    for cell in cells:
        found.append(as_written(cell) if is_written(cell) else cell)
        if cell.strip() and found[-1] is cell:  # a text among them
            break
    else:
        return found
    return [as_conversation(cell) if is_conversation(cell) else cell for cell in cells]


def _text_of(path: Path) -> str:
    """Return the text of a file; raise a ValueError where it is not in UTF-8, or holds a NUL."""
    data = path.read_bytes()
    if told := _nul_in(data):
        raise ValueError(told)
    return data.decode("utf-8-sig")


def _nul_in(data: bytes) -> str:
    """Return what is wrong where a text holds NUL bytes, which in UTF-16 are half of it; else nothing."""
    if 4 * data.count(b"\0") >= len(data) > 0:
        return "NUL bytes, as of UTF-16; save it as UTF-8"
    return "a NUL byte, which belongs in no text; remove it" if b"\0" in data else ""


def _csv_rows(path: Path) -> list[dict[str, Any] | str]:
    """Return the rows of a csv, every cell as its text, or what is wrong with one; whole columns of integers as those."""
    csv.field_size_limit(sys.maxsize)
    text = _text_of(path)
    header = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub(r'"(?:[^"]|"")*"', "", header)
    marks = ["\t"] if path.suffix.lower() == ".tsv" else [mark for mark in DELIMITERS if mark in bare] or [","]
    delimiter = max(marks, key=lambda mark: _rows_like_the_header(text, mark))
    spaced = re.fullmatch(rf"[^{delimiter}]*({re.escape(delimiter)} [^{delimiter}]*)+", bare) is not None
    table = io.StringIO(text, newline="")
    lines = list(csv.reader(table, strict=True, delimiter=delimiter, skipinitialspace=spaced))
    names, *cells = [line for line in lines if line]
    _check_distinct(names)
    if not cells:
        raise ValueError("a header and no rows")
    complete = [row for row in cells if len(row) == len(names)]
    columns = [_csv_column(column) for column in zip(*complete)]
    rows = (dict(zip(names, values)) for values in zip(*columns))
    return [next(rows) if len(row) == len(names) else f"{len(row)} cells under {len(names)} columns" for row in cells]


def _rows_like_the_header(text: str, delimiter: str) -> int:
    """Return how many of the first lines have as many cells as the header when a csv is cut at this delimiter."""
    try:
        lines = list(
            itertools.islice(csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter), 1000)
        )
    except csv.Error:
        return 0
    header = next(filter(None, lines), [])
    return sum(len(line) == len(header) for line in lines)


def _text_rows(path: Path) -> list[dict[str, Any]]:
    """Return the chunks of a text as rows: `text`; the same as `beginning` and `ending`, its last words; `file`; `last` in it."""
    rows, found = [], chunks(_text_of(path))
    for number, chunk in enumerate(found, start=1):
        words = list(re.finditer(r"\S+", chunk))
        # Where no space parts words, as in Chinese, Japanese and Thai, the ending is the last third.
        cut = words[-min(END_WORDS, max(len(words) // 3, 1))].start() or 2 * len(chunk) // 3
        values = chunk, chunk[:cut].rstrip(), chunk[cut:], path.name, number == len(found)
        rows.append(dict(zip(TEXT_FIELDS, values)))
    return rows


def chunks(text: str) -> list[str]:
    """Cut a text at blank lines, and a long paragraph within, see `CUTS`, into chunks of up to CHUNK_CHARACTERS."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        begins = True
        while paragraph := paragraph.strip("\n").rstrip():
            cut = _chunk_end(paragraph)
            part, paragraph = paragraph[:cut], paragraph[cut:].lstrip(" ")
            if not part.strip():  # the indentation of a line that has no other space
                continue
            if begins and found and len(found[-1]) + len(part) + 2 <= CHUNK_CHARACTERS:
                found[-1] += f"\n\n{part}"
            else:
                found.append(part)
            begins = False
    return found


def _chunk_end(paragraph: str) -> int:
    """Return where to cut what is longer than a chunk: at the last good place of its second half, else at any word's end."""
    if len(paragraph) <= CHUNK_CHARACTERS:
        return len(paragraph)
    half = CHUNK_CHARACTERS // 2
    places = ([end.end() for end in ends.finditer(paragraph, half, CHUNK_CHARACTERS)] for ends in CUTS)
    space = paragraph.rfind(" ", 1, CHUNK_CHARACTERS)
    return next((found[-1] for found in places if found), space if space > 0 else CHUNK_CHARACTERS)


def _is_integer(cell: str) -> bool:
    """Whether a cell is an integer that is written back as it stands: not 007, which is a name."""
    return cell.removeprefix("-").isdecimal() and len(cell) < 19 and str(int(cell)) == cell


def _json_rows(path: Path) -> list[dict[str, Any] | str | None]:
    """Return the rows of a file that is one JSON value, or one per line; or what is wrong with one, None for an empty line."""
    data, value, wrong = path.read_bytes().removeprefix(b"\xef\xbb\xbf"), None, None
    if data.lstrip().startswith((b"[", b"{")):
        try:
            value = _parsed(data)
        except RecursionError:
            pass
        except ValueError as error:  # then it is one value per line
            wrong = error
    if value is None:
        entries = data.splitlines()
        is_lines = path.suffix.lower() == ".jsonl"
        is_array = data.lstrip().startswith(b"[")
        if (
            wrong
            and not is_lines
            and (is_array or all(isinstance(_row(line, Counter()), str) for line in entries if line.strip()))
        ):
            raise wrong
    elif isinstance(value, list):
        entries = value
    else:
        entries = [value] if path.suffix.lower() == ".jsonl" else _rows_of_object(value, path.name)
    held: Counter[str] = Counter()
    rows = [None if isinstance(entry, bytes) and not entry.strip() else _row(entry, held) for entry in entries]
    if held:
        kinds = ", ".join(f"{count} {kind}" for kind, count in held.most_common())
        print_once(
            f"read in {path.name}: {held.total()} of {len(rows)} chats only up to a turn that is not text alone ({kinds})"
        )
    return rows


def _parsed(data: bytes | str) -> Any:
    """Return what JSON says; raise a ValueError where an object has a key twice, of which the second would hide the first."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            _check_distinct([name for name, _ in pairs], "keys of an object")
        return found

    return json.loads(data, object_pairs_hook=distinct)


def _rows_of_object(value: dict[str, Any], file: str) -> list[Any]:
    """Return the rows of a file that is one object: rows under one key, columns (lists, or pandas' dicts by index), or a row."""
    columns, key = list(value.values()), _key_of_rows(value)
    if key is not None:
        if others := ", ".join(name for name in value if name != key):
            print_once(f"read in {file}: the rows under {key!r}, and not what stands beside them: {others}")
        return value[key]
    if columns and all(isinstance(column, dict) for column in columns):
        if columns[0].keys() == set().union(*columns) and all(map(str.isdecimal, columns[0])):
            columns = [[column[row] for row in columns[0]] for column in columns]
        elif len(columns) > 1 and not any({"role", "from"} & column.keys() for column in columns):
            raise ValueError(f"{len(columns)} objects under keys such as {min(value)!r}; write the rows as a list")
    if not columns or not all(isinstance(c, list) for c in columns) or all(map(is_conversation, columns)):
        return [value]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in zip(value, columns))
        raise ValueError(f"one object of lists of different lengths: {lengths}")
    return [dict(zip(value, row)) for row in zip(*columns)]


def _key_of_rows(value: dict[str, Any]) -> str | None:
    """Return the key of an object that holds its rows; None where it is a table or a row itself.

    Raises:
        ValueError: lists of rows under several keys.
    """
    if len(value) > 1 and any(map(is_conversation, value.values())):
        return None
    lists = [name for name, held in value.items() if isinstance(held, list) and held and not is_conversation(held)]
    lists = [name for name in lists if all(isinstance(entry, dict) for entry in value[name])]
    if len(lists) == len(value) > 1:
        raise ValueError(
            f"lists of rows under {' and '.join(map(repr, lists))}; write one to a file of its own, or columns as rows"
        )
    lengths = {len(held) if isinstance(held, list) else None for held in value.values()}
    found = [name for name in lists if len(value) == 1 or (name.lower() in KEYS_OF_ROWS and len(lengths) > 1)]
    return found[0] if len(found) == 1 else None


def _row(entry: Any, held: Counter[str]) -> dict[str, Any] | str | None:
    """Return the row of a line or an array's entry, or what is wrong with it; count in `held` what ends exported chats early.

    None for such a chat of which nothing is left.
    """
    if isinstance(entry, bytes):
        try:
            entry = _parsed(entry.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"not UTF-8 at byte {error.start}"
        except (json.JSONDecodeError, RecursionError):
            return _nul_in(entry) or "no complete JSON"
        except ValueError as error:  # a key that is there twice, a number of thousands of digits
            return str(error)
    if not isinstance(entry, dict) or not entry:
        return "no JSON object"
    turns = exported_turns(entry)
    if turns is not None:
        messages, end = joined_messages(turns)
        held.update([end] if end else [])
        if end and not messages:
            return None
        entry = {"messages": messages}
    try:
        json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return HALF
    return entry


READERS: dict[str, Callable[[Path], Sequence[dict[str, Any] | str | None]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _text_rows,
}
