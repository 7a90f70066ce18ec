"""What marks the folder of a run, and what it is a part of."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

RECIPE_FILE = "recipe.yaml"  # the resolved recipe in a run's folder; it begins with MARK
MARK = "# Written by a run of lora-null: every default is written out, and this folder is its output_dir.\n"
TASKS_FOLDER = "tasks"  # of a sequence
CELLS_FOLDER = "cells"  # of a grid


def is_of_run(path: Path) -> bool:
    """Return whether a file is the recipe that a run left in its folder, and not one that a user wrote."""
    if path.name != RECIPE_FILE or not path.is_file():
        return False
    return path.read_text(encoding="utf-8", errors="replace").startswith(MARK)


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, sorted; nothing hidden, and nothing of a run whose folder is among them.

    Folders that links lead to are among them, each once, unless they lie in this one, or it in them.

    Raises:
        PermissionError: no file, and a folder that this user may not read.
    """
    root, seen, found, closed = folder.resolve(), set(), [], []
    for name, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        place = Path(name)
        real = place.resolve()
        around = place.is_symlink() and (real.is_relative_to(root) or root.is_relative_to(real))
        if real in seen or (place != folder and (around or is_of_run(place / RECIPE_FILE))):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        found += [place / file for file in files if not file.startswith(".") and (place / file).is_file()]
    if not found and (refused := next((error for error in closed if isinstance(error, PermissionError)), None)):
        raise refused
    return sorted(found)


def whole_of(folder: Path) -> Path:
    """Return the folder of the sequence or the grid that a run's folder is a part of; a run's own by itself."""
    wholes = (parent.parent for parent in folder.absolute().parents if parent.name in (TASKS_FOLDER, CELLS_FOLDER))
    return next((whole for whole in wholes if is_of_run(whole / RECIPE_FILE)), folder)


def resume_command(folder: Path, launcher: str = "lora-null train") -> str:
    """Return the command that goes on with the run, sequence or grid to which a folder belongs."""
    return f"{launcher} {shlex.quote(str(whole_of(folder) / RECIPE_FILE))} --resume"
