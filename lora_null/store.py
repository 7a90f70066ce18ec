"""Initializations on disk, one file a finished part: to resume a run, to continue a killed one, to reuse an equal one.

A0 and B0 serve v1 and v2 alike, so a folder written for one starts the other. Folders are complete when `layers.json`
is there. Every file carries the key of its initialization, a hash of all that decides the result: what lies in a folder is
taken for an equal initialization and for no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from lora_null.calibration import Calibration, InputStats
from lora_null.factors import LayerStats
from lora_null.layer import NullBasis
from lora_null.utils.errors import UserError
from lora_null.utils.files import cache_root, link, read_json, read_metadata, read_safetensors, write_safetensors

PREFIX, REPORT_FILE = "factors.", "layers.json"
WHOLE = "model/"  # before the names of tensors that are of the model as a whole
KEPT = 8  # initializations left in the cache


@dataclass
class LayerResult:
    """The result for the modules of one decoder layer (or of the whole model).

    Attributes:
        factors: module name → A0 (r, d_in) and B0 (d_out, r), as stored in the adapter.
        scaling: module name → the s with which s·B0A0 = W0 U Uᵀ.
        measured: their inputs without Grams, for the drift.
        stats: one line per module.
        bases: module name → the basis in whose span A stays; modules that share an input share it.
        tensors: what a method computes of the model as a whole, by its own names.
        key: `initialization_key` of what it is a part of.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: dict[str, float]
    measured: Calibration
    stats: list[LayerStats]
    bases: dict[str, NullBasis] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    key: str = ""


def write_part(folder: Path, name: str, part: LayerResult) -> None:
    """Write one part atomically as `factors.NAME.safetensors`."""
    tensors = {f"{m}.A": A for m, (A, _) in part.factors.items()} | {f"{m}.B": B for m, (_, B) in part.factors.items()}
    tensors |= {f"{m}.L": L for m, L in part.measured.projected.items()}
    tensors |= {f"{i}.sketch": stats.sketch for i, stats in enumerate(part.measured.inputs)}
    distinct = list({id(basis): basis for basis in part.bases.values()}.values())
    tensors |= {f"{i}.basis": basis.vectors for i, basis in enumerate(distinct)}
    tensors |= {f"{WHOLE}{name}": tensor for name, tensor in part.tensors.items()}
    facts = {
        "scaling": part.scaling,
        "inputs": [{"modules": stats.modules, "tokens": stats.tokens} for stats in part.measured.inputs],
        "output_energy": part.measured.output_energy,
        "stats": [line.to_json() for line in part.stats],
        "bases": {m: next(i for i, b in enumerate(distinct) if b is basis) for m, basis in part.bases.items()},
        "seconds": part.measured.seconds,
    }
    write_safetensors(folder / f"{PREFIX}{name}.safetensors", tensors, {"facts": json.dumps(facts), "key": part.key})


def read_parts(folder: Path) -> dict[str, LayerResult]:
    """Return all finished parts in the folder, by name; none where there is no folder."""
    return {path.stem.removeprefix(PREFIX): _read_part(path) for path in parts_in(folder)}


def read_scalings(folder: Path) -> dict[str, float]:
    """Return the scaling of every module in a folder, from the files' headers alone; a damaged file tells none."""
    facts = (json.loads(read_metadata(path).get("facts", "{}")) for path in parts_in(folder))
    return {name: scaling for part in facts for name, scaling in part.get("scaling", {}).items()}


def _read_part(path: Path) -> LayerResult:
    tensors, metadata = read_safetensors(path)
    facts = json.loads(metadata["facts"])
    names = [line["name"] for line in facts["stats"]]
    inputs = [
        InputStats(line["modules"], None, tensors[f"{i}.sketch"], line["tokens"])
        for i, line in enumerate(facts["inputs"])
    ]
    projected = {name: tensors[f"{name}.L"] for name in names if f"{name}.L" in tensors}
    distinct = {i: NullBasis(tensors[f"{i}.basis"]) for i in set(facts.get("bases", {}).values())}
    return LayerResult(
        {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names},
        facts["scaling"],
        Calibration(inputs, facts["output_energy"], projected, facts["seconds"]),
        [LayerStats.from_json(line) for line in facts["stats"]],
        {name: distinct[i] for name, i in facts.get("bases", {}).items()},
        {name.removeprefix(WHOLE): tensor for name, tensor in tensors.items() if name.startswith(WHOLE)},
        metadata.get("key", ""),
    )


def clear_others(folder: Path, key: str) -> None:
    """Remove from a folder what was written for another initialization than that of `key`, the report first."""
    report = folder / REPORT_FILE
    if report.is_file() and read_json(report).get("key") != key:
        report.unlink()
    for path in parts_in(folder):
        if read_metadata(path).get("key") != key:
            path.unlink()


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a complete folder.

    Raises:
        UserError: it is not complete, or was written by a version whose files mean something else.
    """
    if not (folder / REPORT_FILE).is_file():
        raise UserError(f"{folder}: holds no complete initialization ({REPORT_FILE} is missing)")
    report = read_json(folder / REPORT_FILE)
    if "key" not in report:
        raise UserError(f"{folder}: was written by an older version of lora-null, initialize anew")
    return report


def find_initialization(folder: Path) -> Path:
    """Return the folder that holds the parts: the given one, or its `init` (what a run or `lora-null init` leaves).

    Raises:
        UserError: neither holds a complete initialization.
    """
    inner = folder / "init"
    if (inner / REPORT_FILE).is_file():
        return inner
    read_report(folder)
    return folder


def copy_store(source: Path, target: Path) -> None:
    """Copy a complete folder, by hard links where the file system allows, in place of what lies in the target."""
    if target.exists() and source.samefile(target):
        return
    clear(target)
    for path in [*parts_in(source), source / REPORT_FILE]:
        link(path, target / path.name)


def clear(folder: Path, *, parts: bool = True) -> None:
    """Remove an initialization's report from a folder, and with `parts` then its part files; other files stay."""
    (folder / REPORT_FILE).unlink(missing_ok=True)
    for path in parts_in(folder) if parts else ():
        path.unlink()


def parts_in(folder: Path) -> list[Path]:
    """Return the files of all parts in a folder; none where there is no folder."""
    return sorted(folder.glob(f"{PREFIX}*.safetensors"))


def cached_folder(key: str) -> Path:
    """Return the cache folder of the initialization with this key."""
    return cache_root() / "init" / key


def can_keep() -> bool:
    """Return whether the cache, made where it is not there, can be written."""
    with contextlib.suppress(OSError):
        (cache_root() / "init").mkdir(parents=True, exist_ok=True)
    return os.access(cache_root() / "init", os.W_OK | os.X_OK)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Make a folder of the cache and keep `prune_cache`, of this or another process, from removing it inside the block.

    The system lets go of the lock when a process is killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f".{uuid.uuid4().hex}.used")
    with _cache_lock():
        folder.mkdir(exist_ok=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()
        Path(held.lock_file).unlink(missing_ok=True)


def prune_cache(keep: Path) -> None:
    """Remove all but the newest initializations from the cache, and none in use; `keep` is the newest now."""
    if keep.parent != cache_root() / "init":
        return
    with _cache_lock():
        if keep.is_dir():
            os.utime(keep)
        folders = sorted(keep.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
        for age, folder in enumerate(folders):
            held = [lock for lock in folder.glob(".*.used") if _is_held(lock)]
            if age >= KEPT and not held:
                shutil.rmtree(folder, ignore_errors=True)


def _cache_lock() -> BaseFileLock:
    """Return the lock under which folders are taken into use and removed."""
    return FileLock(cache_root() / "init.lock")


def _is_held(lock: Path) -> bool:
    """Return whether a process holds the lock on a folder in use; one that a killed process has left is removed."""
    try:
        with FileLock(lock, timeout=0):
            lock.unlink(missing_ok=True)
        return False
    except (Timeout, OSError):  # another user's, which only that user's runs can tell
        return True
