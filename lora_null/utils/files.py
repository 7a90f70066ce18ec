"""Whole files or none: everything is written beside its place, flushed to disk, and moved there."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_null.utils.errors import UserError, first_line

PART, LOCK_FILE = ".part", ".lock"
_held: dict[Path, tuple[int, int] | None] = {}  # folder locked by this process → device and inode of its lock


def cache_root() -> Path:
    """Return the package's cache: $LORA_NULL_CACHE, or lora_null in the user's cache folder.

    Raises:
        UserError: no variable says where that is, and the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("LORA_NULL_CACHE") or Path(base, "lora_null")).expanduser()
    except RuntimeError:  # as of a user id without a name, in a container
        raise UserError("LORA_NULL_CACHE: is not set, and there is no home folder; set it, or HOME") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it takes the place of `path`, on failure nothing changes.

    Raises:
        UserError: as `check_held`.
    """
    check_held(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with _naming(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path into errors of writing, which name none by themselves."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or (error.errno is not None and error.filename is None):
            error.filename = str(path.absolute())  # pyright: ignore[reportAttributeAccessIssue]
        raise


def check_free(path: Path) -> None:
    """Raise a UserError for a path that is there already and no empty folder."""
    if os.path.ismount(path):
        raise UserError(f"{path}: is a mount point, which cannot be replaced; give a folder inside it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already; choose another folder")


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, on failure nothing is left.

    Raises:
        UserError: `path` is there already and not an empty folder; as `check_held`.
    """
    check_held(path)
    check_free(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    temporary.mkdir()
    try:
        with _naming(path):
            yield temporary
            for entry in temporary.rglob("*"):
                flush(entry)
            flush(temporary)
            try:
                os.replace(temporary, path)  # over an empty folder too
            except OSError:
                check_free(path)  # which another process may have filled meanwhile
                raise
            flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which the system releases when a process is killed; yield whether it is held.

    Args:
        folder: is there already.
        wait: for whoever holds it, instead of yielding False.

    Raises:
        UserError: as `check_held`, in place of whatever failed because of it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        held = lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    with held:
        folder = folder.absolute()
        _held[folder] = _file_of_lock(folder)
        try:
            yield True
        except Exception:
            check_held(folder)
            raise
        finally:
            del _held[folder]


def check_held(path: Path) -> None:
    """Raise a UserError for a path in a folder that was locked here, and that somebody has removed since then.

    The lock goes with the folder: in a new one of its name, another process may hold another lock and write.
    """
    for folder, lock in list(_held.items()):
        if path.absolute().is_relative_to(folder) and _file_of_lock(folder) != lock:
            raise UserError(f"{folder} was removed or replaced while this command was writing to it")


def _file_of_lock(folder: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder / LOCK_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def beside(path: Path) -> Path:
    """Return a temporary name that no other thread, process or host takes: they may share one network file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")


def left_beside(path: Path) -> list[Path]:
    """Return what is at such names of a path: writes to it that were killed, or that still run."""
    return list(path.parent.glob(f".{escape(path.name)}.*{PART}"))


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk and not only in the system's memory."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left half-written below a folder that nobody else writes."""
    for path in list(folder.rglob(f".*{PART}")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the disk cannot; ours are replaced whole, never written into."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def hash_of(facts: Any) -> str:
    """Return 32 hexadecimal digits that tell facts, as JSON has them, from all others: the name of what they decide."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def keep_newest(paths: Iterable[Path], number: int) -> None:
    """Remove all files and folders but those that were used last."""
    for path in sorted(paths, key=lambda path: path.stat().st_mtime)[:-number]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN is refused, missing values are null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def nan_as_null(value: Any) -> Any:
    """Return a value with None for every NaN and infinity in its lists and dicts: JSON has none."""
    if isinstance(value, dict):
        return {key: nan_as_null(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(map(nan_as_null, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, ours: bool = True) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        ours: whether a step of this package wrote it, and writes it again.

    Raises:
        UserError: it is damaged.
    """
    data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8"))
    except ValueError as error:
        if ours:
            line = "damaged, not valid JSON; remove it and the step that wrote it is done again"
        elif data.startswith(codecs.BOM_UTF8):
            line = (
                "begins with a byte order mark, which PEFT and transformers do not read; save it as UTF-8 without one"
            )
        else:
            line = f"damaged, not valid JSON ({first_line(error)})"
        raise UserError(f"{path}: {line}") from None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read from it.

    Raises:
        UserError: it is damaged, or not there.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError):
        raise UserError(f"{path}: damaged or missing, not a whole safetensors file") from None


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; as `opened`."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; none where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors atomically, from the CPU and contiguous, with string metadata; a shared tensor once for each name."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():  # the file format has no aliases
        address = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(plain, temporary, metadata={**metadata, "format": "pt"})
        _sort_metadata(temporary)
        temporary.chmod(mode)  # safetensors leaves its files to their owner alone; a server may be another user


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: it is written in another one each time, and equal runs are to
    leave equal bytes.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
