"""Checkpoints that are whole or not taken: `complete.json`, written last, lists every file of one with its size."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lora_null.utils.distributed import say
from lora_null.utils.errors import UserError
from lora_null.utils.files import flush, read_json, write_json

COMPLETE_FILE, PROCESSES_FILE = "complete.json", "processes.json"


def last_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint with the highest step in a trainer's output folder, or None."""
    return next((path for path in reversed(_checkpoints(folder)) if is_whole(path)), None)


def last_checkpoint_or_raise(folder: Path) -> Path:
    """Return `last_checkpoint(folder)`.

    Raises:
        UserError: there is none.
    """
    found = last_checkpoint(folder)
    if found is None:
        raise UserError(f"resume: no whole checkpoint in {folder}")
    return found


def is_whole(checkpoint: Path) -> bool:
    """Return whether the checkpoint was written to its end and nothing of it is missing or cut short."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def seal(checkpoint: Path) -> None:
    """Flush every file of a finished checkpoint to disk and list them in `complete.json`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    for path in files:
        flush(path)
    write_json(checkpoint / COMPLETE_FILE, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})


def record_processes(checkpoint: Path, processes: int, batch: int) -> None:
    """Write down how many processes trained, and the rows of one optimizer step over all of them."""
    write_json(checkpoint / PROCESSES_FILE, {"processes": processes, "batch": batch})


def check_processes(checkpoint: Path, processes: int, batch: int, *, fixed: str | None) -> None:
    """Refuse to go on from a checkpoint with other batches; with the same ones another number of processes is fine.

    The rows of each step are then the same in the same order, and only sums are rounded otherwise.

    Args:
        checkpoint: of any number of processes.
        processes, batch: of this run, as in `record_processes`.
        fixed: the engine, if its checkpoints bind the number of processes.

    Raises:
        UserError: other batches, or another number of processes under such an engine.
    """
    if not (checkpoint / PROCESSES_FILE).is_file():
        return
    before = read_json(checkpoint / PROCESSES_FILE)
    if before["batch"] != batch:
        raise UserError(
            f"resume: {checkpoint} was trained in batches of {before['batch']} ({before['processes']} processes), this "
            f"run takes {batch} ({processes} processes); keep the total batch, or the number of processes"
        )
    if before["processes"] == processes:
        return
    if fixed:
        raise UserError(
            f"resume: {checkpoint} was written by {before['processes']} processes of {fixed}, which cannot go on with "
            f"{processes}; start {before['processes']}"
        )
    say(
        f"resume: {checkpoint.name} was written by {before['processes']} processes, this run has {processes}; batches "
        "and their order stay, results agree to rounding"
    )


def tidy(folder: Path, keep: int | None, best: str | None) -> None:
    """Remove what killed runs left half-written, then the oldest by step until `keep` are left; never the best one."""
    for path in _checkpoints(folder):
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
    rotate_checkpoints(str(folder), save_total_limit=keep, best_model_checkpoint=best)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints by rising step: by their number, since clocks go backwards."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {path: pattern.fullmatch(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))
