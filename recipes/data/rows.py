"""Load the rows that a recipe names, from the hub or from local files, and check them before a model loads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from lora_null.eval_harness.chat_exports import is_export
from lora_null.eval_harness.documents import FILE_KINDS, Documents, from_arrow, read_documents
from lora_null.recipes.config.run_folder import files_below
from lora_null.recipes.data.templates import fill, split_fields
from lora_null.utils.distributed import print_once
from lora_null.utils.errors import UserError, first_line, hub_error, nearest
from lora_null.utils.values import TextOfList, as_text

# Files that describe a data set, and pictures, which are skipped.
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
# Texts about the data beside them.
DOCUMENTATION_FILES = ("readme", "index", "license", "notice", "citation", "changelog")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
MAX_LISTED = 6  # kinds of files that are not read


def load_documents(
    path: str, *, subset: str | None, split: str, where: str, keep_bad: bool = False, limit: int | None = None
) -> Documents:
    """Load one split.

    Args:
        path: a local file (json, jsonl, csv, parquet: its own split), a folder of such files, or a hub id.
        subset: configuration of a hub data set, and of a folder the folder in it.
        split: name of the split.
        where: the recipe key, for messages.
        keep_bad: list unreadable rows instead of refusing the file.
        limit: rows of a hub data set that are needed, at most.

    Raises:
        UserError: nothing there, unknown split, unreadable, unreachable, or empty.
    """
    local = Path(path)
    if local.is_dir() and subset is not None:
        if not (local / subset).is_dir():
            folders = [folder.name for folder in local.iterdir() if folder.is_dir()]
            raise UserError(
                f"{where}.subset: no folder {subset!r} in {path}{nearest(subset, folders) if folders else ''}"
            )
        local /= subset
    if local.is_file() or local.is_dir():
        files = [local] if local.is_file() else _files_of(local, split, where)
        return read_documents(files, f"{where}.path", keep_bad=keep_bad)
    if local.suffix in FILE_KINDS or path.startswith((".", "/", "~")):
        raise UserError(f"{where}.path: no file or folder {path}")
    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:
        reason = first_line(error)
        line = f"{where}.path: cannot load {path!r} ({reason}); {where}.path= also takes a local file"
        raise hub_error(line, error) from None
    if not len(rows):
        raise UserError(f"{where}.path: {path} holds no rows")
    kept = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return Documents(from_arrow(kept, kept.features.to_dict()), list(range(1, len(kept) + 1)))


def documents_of(section: Any, where: str, **options: Any) -> Documents:
    """Load the split that a section or an entry of a recipe names; as `load_documents`."""
    return load_documents(section.path, subset=section.subset, split=section.split, where=where, **options)


def _files_of(folder: Path, split: str, where: str) -> list[Path]:
    """Return a split's data files, those of its folders where it holds none itself, as a downloaded hub data set does.

    Of exported chats it is their `conversations.json` where the split is not there. Without any, a folder is one of texts
    (.txt, .md), those in its folders too. What else lies there is told by its kinds.
    """

    def lies_here(file: Path) -> bool:
        return file.parent == folder

    def is_split(file: Path) -> bool:
        return file.stem == split or file.name.startswith((f"{split}-", f"{split}."))

    def lies_in_split(file: Path) -> bool:
        return file.parent.name == split

    files = [file for file in files_below(folder) if file.name not in DESCRIPTIONS]
    tables = [file for file in files if FILE_KINDS.get(file.suffix.lower(), "text") != "text"]
    texts = [file for file in files if FILE_KINDS.get(file.suffix.lower()) == "text" and file.stat().st_size]
    notes = [file for file in texts if file.stem.lower() not in DOCUMENTATION_FILES]
    unread = [file for file in files if file.suffix.lower() not in (*FILE_KINDS, *PICTURES)]
    unread = [file for file in unread if file.stem.lower() not in DOCUMENTATION_FILES]
    data = list(filter(lies_here, tables)) or list(filter(is_split, tables)) or list(filter(lies_in_split, tables))
    several = sorted({str(file.parent.relative_to(folder)) for file in data})
    if len(several) > 1:
        raise UserError(
            f"{where}.path: {folder} holds {split!r} in {' and '.join(several)}; name one of these folders"
        )
    shards = re.compile(rf"{re.escape(split)}-\d+-of-\d+")
    others, named = list(filter(is_split, data)), [file for file in data if file.stem == split]
    named = named or [file for file in others if shards.fullmatch(file.stem)] or others
    chosen = named or list(filter(lies_in_split, data))
    chosen = chosen or [file for file in data if file.stem.startswith("conversations") and is_export(file)]
    # Beside notes an application exports its databases; a data set is rather one of another split.
    databases = all(FILE_KINDS[file.suffix.lower()] == "csv" and file.stem not in SPLITS for file in data)
    if data and not chosen and not (notes and databases):
        raise UserError(f"{where}.split: no {split!r} in {folder}{nearest(split, [file.stem for file in data])}")
    if not chosen and not notes:
        _check_texts(folder, where, tables, texts, unread)
    if not chosen:
        _tell_unread(folder, [*unread, *tables])
        return texts
    if len(chosen) > 1 and lies_here(chosen[0]) and not all(shards.fullmatch(file.stem) for file in chosen):
        print_once(f"read in {folder}: {', '.join(file.name for file in chosen)}")
    if left := [file.name for file in others if file not in chosen]:
        print_once(f"not read in {folder}, beside {chosen[0].name}: {', '.join(left)}")
    _tell_unread(folder, [file for file in (*unread, *notes) if file.parent == chosen[0].parent])
    return chosen


def _check_texts(folder: Path, where: str, tables: list[Path], texts: list[Path], unread: list[Path]) -> None:
    """Raise a UserError where a folder without data of its own is not one of texts either, but for what documents it."""
    if tables and texts:
        raise UserError(f"{where}.path: {folder} holds data in {tables[0].parent}; name that folder, or the split")
    if unread:
        raise UserError(f"{where}.path: {unread[0]} is of no kind that is read ({', '.join(FILE_KINDS)})")
    if not texts:
        raise UserError(f"{where}.path: {folder} holds no data files ({', '.join(FILE_KINDS)})")


def _tell_unread(folder: Path, files: Iterable[Path]) -> None:
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    told = counts.most_common(MAX_LISTED)
    others = counts.total() - sum(count for _, count in told)
    if told:
        kinds = [f"{count} {kind}" for kind, count in [*told, *([("others", others)] if others else [])]]
        print_once(f"not read in {folder}: {', '.join(kinds)}")


class RowText:
    """What a recipe takes of a row: one field, or a text made of {field}s.

    Fields are found by the names that the data's columns have, whatever characters these hold.

    Args:
        spec: a column's name, or the text.
        columns: the names there are.
        where: the recipe key, for messages.
        answer: of several accepted answers the first is meant.

    Raises:
        UserError: an unknown field, with the nearest there is; or a text without any.
    """

    def __init__(self, spec: str, columns: Sequence[str], where: str, *, answer: bool = False) -> None:
        self.spec, self.where, self.answer = spec, where, answer
        self.is_field = spec in columns or not {"{", "}"} & set(spec)
        self.names = [spec] if self.is_field else [name for name, is_field in split_fields(spec, where) if is_field]
        if not self.names:
            raise UserError(f"{where}: {spec!r} names no field, such as {{{columns[0]}}}")
        for name in self.names:
            check_field(columns, name, where)

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row; the empty text where every field in it is empty.

        Raises:
            ValueError: a field that is no text, and why.
        """
        if self.is_field:
            return field_text(row, self.spec, answer=self.answer)
        found = {name: field_text(row, name, answer=self.answer) for name in self.names}
        return fill(self.spec, self.where, found.__getitem__) if any(map(str.strip, found.values())) else ""


def field_text(row: Mapping[str, Any], field: str, *, answer: bool = False) -> str:
    """Return the text of a field, see `as_text`; raise a ValueError that names it where it is no text."""
    value = row.get(field)
    if answer and isinstance(value, TextOfList):
        print_once(f"{field!r} holds lists written as text; the first text of each is taken for the answer")
    try:
        return as_text(value, answer=answer)
    except ValueError as error:
        raise ValueError(f"{field!r} {error}") from None


def check_field(columns: Sequence[str], field: str, where: str) -> None:
    """Raise a UserError that names the fields there are, unless `field` is one of them."""
    if field not in columns:
        raise UserError(f"{where}: the data has no field {field!r}{nearest(field, columns)}")
