"""The output folder of a run: claimed by one run at a time, never overwritten unasked, continued when asked."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import RootModel

from lora_null.recipes.config.load import dump, paths_here, whole_paths
from lora_null.recipes.config.run_folder import (
    CELLS_FOLDER,
    MARK,
    RECIPE_FILE,
    TASKS_FOLDER,
    is_of_run,
    resume_command,
    whole_of,
)
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.results import EVAL_FILE, REPAIRED, RESULTS_FILE, ROW_FILE, load_results, validated
from lora_null.recipes.trained import lost_of, weights_in
from lora_null.trainer.checkpoints import last_checkpoint
from lora_null.utils.distributed import all_gather, on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import (
    LOCK_FILE,
    PART,
    beside,
    cache_root,
    locked,
    read_json,
    remove_parts,
    write_json,
    write_text,
)

PAGE_FILE, SKIPPED_FILE = "report.html", "rows_left_out.json"
INPUTS_FILE = "inputs.json"  # hashes of what the recipe's paths hold
METHOD_FILES = "method.files ({})"  # the name there of the files that a method of one's own is written in
OF_METHOD = re.compile(r"method\.files \((?P<method>[^)]*)\)")  # with the task of a sequence or the settings of a grid
SHARED_SECONDS = 10.0
MAX_LISTED = 3
OWN_FILES = ("base", CELLS_FOLDER, TASKS_FOLDER, "report.md", PAGE_FILE, "forgetting.png", "magnitude.png", "card.png")
OWN_FILES += ("unfinished.md", "unfinished.html", "unfinished.png")
OWN_FILES += (RESULTS_FILE, SKIPPED_FILE, INPUTS_FILE, RECIPE_FILE)  # the recipe last: it marks the folder as a run's


def is_reported(folder: Path) -> bool:
    """Return whether a run has come to its end: results and report are written last, of a grid after each of its runs."""
    if not all((folder / name).is_file() for name in (RESULTS_FILE, PAGE_FILE)):
        return False
    grid = load_results(folder).grid
    return grid is None or grid.is_finished


def is_finished(folder: Path) -> bool:
    """Return whether the folder holds a finished run and all that its methods have left: else --resume brings it back.

    Of a grid the reports alone tell: who removes the weights of some of many runs does not want them trained again.
    """
    if not is_reported(folder):
        return False
    results = load_results(folder)
    if results.grid is not None:
        return True
    if results.sequence is None:
        return not any(lost_of(folder / row.method, row) for row in results.rows[1:])
    whole = (row for row in results.rows[1:] if row.variant is None)  # the others ended in an earlier task
    tasks = (task for task in (folder / TASKS_FOLDER).glob("*") if is_of_run(task / RECIPE_FILE))
    return all(row.diverged or weights_in(folder / row.method) for row in whole) and all(map(is_finished, tasks))


@contextlib.contextmanager
def hold_output_folder(
    recipe: Recipe, size: int, inputs: Callable[[], Mapping[str, str]], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Hold the output folder for as long as a run of all processes lasts: claimed by the first, locked against others.

    Args:
        recipe: whose folder.
        size: bytes that the run may write.
        inputs: returns hashes of what the recipe's paths hold, by what names them.
        resume, overwrite: what may become of an earlier run in the folder.

    Raises:
        UserError: as `claim` and `locked`; another run is writing there; a resumed run's inputs have changed; there is less
            space; the processes do not share the folder.
    """
    folder = Path(recipe.output_dir)
    with contextlib.ExitStack() as stack:

        def claim_and_lock() -> Path:
            check_cache(recipe)
            _check_writable(folder)
            if not stack.enter_context(locked(folder)):
                raise UserError(f"output_dir: another run is writing to {folder}; wait for it, or choose --output-dir")
            claim(recipe, resume=resume, overwrite=overwrite)
            _check_inputs(folder, inputs())
            if resume and _differences(_read_recipe(folder), yaml.safe_load(dump(whole_paths(recipe)))):
                _write_recipe(recipe)  # what it names was moved: other commands look for it there
            check_space(folder, size)
            (mark := beside(folder / LOCK_FILE)).touch()
            return mark

        _check_shared(folder, on_first_process(claim_and_lock))
        yield


def check_place(folder: Path, named: str) -> Path:
    """Return where a folder is, or will be; raise a UserError where it cannot be made or written."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "read-only" if there.is_dir() else "a file" if there.exists() else "a link to what is not there"
        raise UserError(f"{named}: cannot write to {folder} ({there} is {why})")
    longest, most = max(len(os.fsencode(part)) for part in folder.absolute().parts), os.pathconf(there, "PC_NAME_MAX")
    if 0 < most < longest:
        raise UserError(f"{named}: a name of {longest} bytes in {folder}, and the disk takes {most}")
    return there


def check_space(folder: Path, size: int, named: str = "output_dir") -> int:
    """Return the bytes that are free where the folder is, or will be; nothing is written.

    Raises:
        UserError: fewer than `size`, or the folder cannot be made or written; it begins with `named`.
    """
    free = shutil.disk_usage(check_place(folder, named)).free
    if free < size:
        raise UserError(f"{named}: {folder} has {free / 1e9:.1f} GB free, this run needs about {size / 1e9:.1f} GB")
    return free


def check_cache(recipe: Recipe, *, dry: bool = False) -> None:
    """Raise a UserError where a recipe keeps something between runs and the cache cannot be written; `dry` writes nothing."""
    if not (recipe.calibration.cache or recipe.eval.cache):
        return
    try:
        (check_place if dry else _check_writable)(cache_root(), "LORA_NULL_CACHE")
    except UserError as error:
        raise UserError(f"{error}; calibration.cache=false eval.cache=false do without it") from None


def _check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Keep the hashes of a run's inputs; raise a UserError where it goes on with others than it began with.

    The files of a method of one's own may be mended as long as it has left neither a result nor a checkpoint.
    """
    path = folder / INPUTS_FILE
    before = validated(RootModel[dict[str, str]], read_json(path), str(path)).root if path.is_file() else {}
    begun = {path.parent.name for pattern in (ROW_FILE, "checkpoint-*") for path in _left(folder, pattern)}
    of_methods = {name: found["method"] for name in inputs if (found := OF_METHOD.search(name))}
    changed = [name for name, found in inputs.items() if before.get(name, found) != found]
    changed = [name for name in changed if name not in of_methods or of_methods[name] in begun]
    if changed:
        more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        anew = "begin anew with --overwrite" if set(changed) - of_methods.keys() else "train it in a folder of its own"
        raise UserError(
            f"--resume: since the run in {folder} began, the content has changed of {', '.join(changed[:MAX_LISTED])}{more}; "
            f"put it back, or {anew}"
        )
    write_json(path, {**before, **inputs})  # a model of the hub has files only once it was downloaded


def _left(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield what is called so in a run's folder, also in a method's folder that is a link."""
    for place, folders, files in os.walk(folder, followlinks=True):
        yield from (Path(place) / name for name in fnmatch.filter([*folders, *files], pattern))


def _check_shared(folder: Path, mark: Path) -> None:
    """Check that all processes see the file that the first one has just made; network file systems need a moment."""
    end = time.monotonic() + SHARED_SECONDS
    while not (seen := mark.is_file()) and time.monotonic() < end:
        time.sleep(0.1)
    shared = all(all_gather(seen))
    mark.unlink(missing_ok=True)
    if not shared:
        raise UserError(
            f"output_dir: {folder} is not one folder for all processes; choose one that all machines share"
        )


def claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the output folder this run's: check what it holds, remove what a killed run left half-written, write recipe.yaml.

    Raises:
        UserError: it is in use and neither --resume nor --overwrite fits, or it cannot be written.
    """
    folder = Path(recipe.output_dir)
    _check_held(recipe, resume=resume, overwrite=overwrite)
    _check_writable(folder)
    remove_parts(folder)
    if overwrite:
        _clear(folder)
    is_part = whole_of(folder) != folder  # whose paths may have moved with the whole's, and were checked with them
    if is_part or not (folder / RECIPE_FILE).is_file():
        _write_recipe(recipe)


def _write_recipe(recipe: Recipe) -> None:
    write_text(Path(recipe.output_dir) / RECIPE_FILE, MARK + dump(whole_paths(recipe)))


def check_output_folder(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Raise a UserError unless the folder is free, or what it holds may be continued or replaced, as a whole."""
    folder = Path(recipe.output_dir)
    if resume and overwrite:
        raise UserError("--resume: goes on with the run that --overwrite removes; give one of the two")
    if (whole := whole_of(folder)) != folder:
        raise UserError(
            f"output_dir: {folder} is a part of the run in {whole} and not trained by itself; "
            f"`{resume_command(whole)}` goes on with all of it"
        )
    _check_held(recipe, resume=resume, overwrite=overwrite)


def _check_held(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    left_over = {name for name in names if name == LOCK_FILE or (name.startswith(".") and name.endswith(PART))}
    held = [name for name in names if name not in left_over]
    if not held:
        return
    if overwrite and is_of_run(folder / RECIPE_FILE):
        removed = [path.resolve() for path in _own(folder)]
        for needed in paths_here(recipe):
            if any(needed.resolve().is_relative_to(path) for path in removed):
                raise UserError(
                    f"--overwrite: would remove {needed}, which this run reads; choose another --output-dir"
                )
        return
    if RECIPE_FILE not in held or overwrite:
        raise UserError(f"output_dir: {folder} holds other files ({held[0]}); choose an empty folder")
    if is_finished(folder):
        raise UserError(
            f"output_dir: {folder} holds a finished run; --overwrite replaces it, --output-dir goes elsewhere"
        )
    if not resume:
        raise UserError(
            f"output_dir: {folder} holds an unfinished run; --resume continues it, --overwrite replaces it"
        )
    changed = _differences(_read_recipe(folder), yaml.safe_load(dump(whole_paths(recipe))))
    if (whole_of(folder) / INPUTS_FILE).is_file():  # by which what lies there is checked then
        changed = {key: values for key, values in changed.items() if not _is_moved(key, *values)}
    if changed:
        more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        lines = [f"{key} was {json.dumps(old)} and is {json.dumps(new)}" for key, (old, new) in changed.items()]
        raise UserError(
            f"--resume: the run in {folder} has another recipe: {'; '.join(lines[:MAX_LISTED])}{more}; "
            f"`{resume_command(folder)}` goes on with its own"
        )


def _differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return by key, such as "training.learning_rate", what differs between two recipes: the value before, and now."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = {f"{key}.{name}".lstrip("."): (before.get(name), now.get(name)) for name in {**now, **before}}
        inner.pop("output_dir", None)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inner = {f"{key}[{i}]": both for i, both in enumerate(zip(before, now))}
    else:
        return {} if before == now else {key: (before, now)}
    return {found: values for name, both in inner.items() for found, values in _differences(*both, name).items()}


def _is_moved(key: str, before: Any, now: Any) -> bool:
    """Return whether a path of a recipe is gone and another one takes its place; a grid's swept ones name its runs' folders."""
    paths = isinstance(before, str) and isinstance(now, str) and not key.startswith("grid.")
    return paths and os.path.isabs(before) and not os.path.exists(before) and os.path.exists(now)


def _read_recipe(folder: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"output_dir: {folder / RECIPE_FILE} is damaged; choose another folder")
    return found


def what_is_kept(folder: Path) -> str:
    """Return as text what a stopped run resumes with: finished methods, last checkpoints, the base's evaluation."""
    finished = sorted(path.parent for path in _left(folder, ROW_FILE))
    names = [str(path.relative_to(folder)) for path in finished]
    named = f"{', '.join(names[:MAX_LISTED])}{', …' if len(names) > MAX_LISTED else ''}"
    kept = [f"{len(names)} finished ({named})"] if names else []
    for method in sorted({path.parent for path in _left(folder, "checkpoint-*")} - set(finished)):
        checkpoint = last_checkpoint(method)
        if checkpoint is not None:
            kept.append(f"{method.relative_to(folder)} to step {checkpoint.name.rpartition('-')[2]}")
    if (folder / "base" / EVAL_FILE).is_file():
        kept.append("the base's evaluation")
    return f"kept in {folder}: {', '.join(kept)}" if kept else f"nothing was finished in {folder} yet"


def remove_left(folder: Path) -> None:
    """Remove the files that killed commands have left half-written in a run's folder, unless the run is going on."""
    left = [path for path in folder.glob(f".*.*{PART}") if path.is_file()]
    with locked(folder) if left else contextlib.nullcontext() as held:
        for path in left if held else ():
            path.unlink(missing_ok=True)


def _check_writable(folder: Path, what: str = "output_dir") -> None:
    """Write and remove one mebibyte, so that a full or read-only disk is known before a model loads."""
    check_place(folder, what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = beside(folder / "probe")
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * 2**20)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{what}: cannot write to {folder} ({error.strerror})") from None


def _clear(folder: Path) -> None:
    """Remove what a run of this package left in its folder, and nothing else."""
    for path in _own(folder) if is_of_run(folder / RECIPE_FILE) else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _own(folder: Path) -> list[Path]:
    """Return what the run in a folder may have written there; the recipe, which marks the folder as its own, comes last."""
    method = _read_recipe(folder).get("method")
    names = method.get("name") if isinstance(method, dict) else None
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    methods = (name for name in names if name not in ("", "..") and Path(name).name == name)
    return [folder / name for method in methods for name in (method, REPAIRED.format(method))] + [
        folder / name for name in OWN_FILES
    ]
