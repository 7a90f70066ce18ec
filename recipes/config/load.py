"""Find a recipe, apply overrides to it, validate it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora_null.recipes.config.run_folder import RECIPE_FILE, files_below, is_of_run
from lora_null.recipes.config.schema import (
    DATA_FILES,
    YAML_SUFFIXES,
    CalibrationSource,
    GridSection,
    Recipe,
    by_metric,
    calibration_entry,
    is_text,
    parse_recipe,
    shape_error,
    split_names,
)
from lora_null.recipes.config.yaml_text import Dumper, parse_value, parse_yaml, yaml_reason
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.startup import launched_index

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1]
SECTIONS = ("model", "method", "data", "training", "eval")  # which the recipe of every run has
PAIR = ("prompt", "response", "rejected")
# Key → the keys of the lower layer that it replaces, since both say the same thing.
REPLACES = {
    "total_batch_size": ("gradient_accumulation_steps",),
    "gradient_accumulation_steps": ("total_batch_size",),
    "num_train_epochs": ("max_steps",),
    "messages": ("text", *PAIR),
    "text": ("messages", "system", "thinking", "template", *PAIR),
    **dict.fromkeys(PAIR, ("messages", "text")),
}
# Keys that choose a source of calibration. They are applied first, since they reset the keys that describe one.
SOURCES = ("calibration", *(f"calibration.{key}" for key in ("path", "source", "self", "sources")))
CONFIGURATION_KEYS = ("deepspeed", "fsdp_config", "accelerator_config")  # keys of `training` that may hold a path
PATHS = {"path", "fewshot_path", "references", "prompts", "include_path", "name_or_path", "init", *CONFIGURATION_KEYS}
PRESETS = RECIPES / "presets"  # what recipes include: default.yaml, and one file per model


def shipped() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)}


def find(name: str) -> Path:
    """Return the YAML of a shipped recipe's name or of a path.

    Raises:
        UserError: naming the nearest recipe, or the missing file.
    """
    recipes = shipped()
    if name in recipes:
        return recipes[name]
    path = Path(name)
    if path.suffix in YAML_SUFFIXES or path.is_file():
        if not path.is_file():
            raise UserError(f"recipe: no file {name}")
        return path
    if is_of_run(path / RECIPE_FILE):
        raise UserError(f"recipe: {name} is the folder of a run; give {path / RECIPE_FILE}")
    raise UserError(f"recipe: none is called {name!r}{nearest(name, recipes)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, safely.

    Raises:
        UserError: for text that is no YAML or no mapping, or a run's recipe whose sections are no mappings any more.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({yaml_reason(error)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, found {type(raw).__name__}")
    if is_of_run(path):  # whose commands read it without the schema, so that older runs can be read
        sections = {name: raw.get(name, {}) for name in SECTIONS} | {"sequence": raw.get("sequence") or {}}
        wrong = next((name for name, section in sections.items() if not isinstance(section, dict)), None)
        if wrong is not None:
            raise UserError(f"{path}: {wrong} is a mapping of keys, found {sections[wrong]!r}")
        if (told := shape_error(raw)) is not None:
            raise UserError(f"{path}: {told}")
    return raw


def presets() -> dict[str, Path]:
    """Return the shipped model presets by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml")) if path.stem != "default"}


def resolve_includes(path: Path, trail: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's file, laid over those that its `include` names, each over the one before.

    Args:
        path: `include` in it is a name or a list of names: of a preset, "default", a shipped recipe, or a path of a YAML
            beside it.
        trail: the files that include this one.

    Raises:
        UserError: an include that is not there, or one that comes back to itself.
    """
    raw = read_yaml(path)
    if trail:
        raw = _paths_beside(raw, path.parent)
    if raw.get("calibration") is not None:
        raw["calibration"] = _calibration_beside(raw["calibration"], path.parent)
    merged: dict[str, Any] = {}
    names = raw.pop("include", None) or []
    known = {"default": PRESETS / "default.yaml", **presets(), **shipped()}
    for name in map(str, names if isinstance(names, list) else [names]):
        included = known.get(name, path.parent / name)
        if not included.is_file():
            raise UserError(f"{path}: include: no file {name!r}{nearest(name, known)}")
        if included.resolve() in (path.resolve(), *trail):
            raise UserError(f"{path}: include: {name!r} includes itself")
        merged = merge(merged, resolve_includes(included, (path.resolve(), *trail)))
    return merge(merged, raw)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` laid over it; mappings are merged key by key, anything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        if key == "calibration":
            merged[key] = merge_calibration(merged.get(key), value)
            continue
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return drop_replaced(merged, over)


def drop_replaced(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys that the given keys replace (`REPLACES`), unless both are given."""
    given = {key for key, value in over.items() if value is not None}
    for key in {other for name in given for other in REPLACES.get(name, ())} - given:
        under.pop(key, None)
    return under


def merge_calibration(under: Any, over: Any) -> Any:
    """Return a section `calibration` with another laid over it, whose source takes the place of the one below.

    A new path keeps the keys that say how rows are read (field, template, …), unless it holds plain texts. A new source
    drops them. None resets to the default.
    """
    if over is None:
        return None
    under, over = calibration_entry(under), calibration_entry(over)
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    named = {key.rpartition(".")[2] for key in SOURCES}
    if named & set(over):
        keeps = "path" in over and not _is_of_texts(Path(str(over["path"])))
        gone = named if keeps else named | set(CalibrationSource.model_fields)
        gone = gone - {"self"} if over.get("source") == "self" else gone  # what it writes
        under = {key: value for key, value in under.items() if key not in gone}
    return under | over


def _paths_beside(value: Any, folder: Path, key: str = "") -> Any:
    """Return a part of an included recipe in which paths mean what they do in its own folder, where that holds them."""
    if isinstance(value, dict):
        return {name: _paths_beside(inner, folder, str(name).rpartition(".")[2]) for name, inner in value.items()}
    if isinstance(value, list):
        return [_paths_beside(inner, folder, key) for inner in value]
    if not isinstance(value, str) or not (key in {*PATHS, "sources"} or Path(value).suffix in (*YAML_SUFFIXES, ".py")):
        return value
    return str(folder / value) if value and not Path(value).exists() and (folder / value).exists() else value


def _calibration_beside(value: Any, folder: Path) -> Any:
    """Return a section `calibration` whose path is what it means in a recipe of that folder, so that one sees what lies there."""
    value = calibration_entry(value)
    path = value.get("path") if isinstance(value, dict) else None
    return value | {"path": _resolve_path(path, folder)} if isinstance(path, str) else value


def _is_of_texts(path: Path) -> bool:
    kinds = {file.suffix.lower() for file in (files_below(path) if path.is_dir() else [path])} & set(DATA_FILES)
    return bool(kinds) and kinds <= {".txt", ".md"}


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Return key.subkey → value of a command line's `key.subkey=value`; values are read as YAML, an empty one is null.

    Raises:
        UserError: for an argument without "=", a value that is no YAML, or a key that is given alone and within its section.
    """
    given: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"argument {assignment!r}: expected key.subkey=value")
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            reason = yaml_reason(error)
            if not is_text(key):
                raise UserError(f"argument {assignment!r}: the value is not valid YAML ({reason})") from None
            value = text
        value = text if isinstance(value, dict | list) and is_text(key) else value  # "Q: {question}"
        if key in given:  # as a line that is put together of a script's words and one's own has it
            if launched_index() == 0:
                logger.warning(f"argument {key}: is given twice, the last counts")
        elif twice := next((own for own in overridden_keys({key: value}) if own in overridden_keys(given)), None):
            raise UserError(f"argument {twice}: is given twice, alone and within its section")
        given[key] = value
    return given


def overridden_keys(given: Mapping[str, Any]) -> list[str]:
    """Return the `key.subkey`s that are given, those inside of a whole section among them."""
    keys = []
    for key, value in given.items():
        inside = calibration_entry(value) if key == "calibration" else value
        below = {f"{key}.{inner}": own for inner, own in inside.items()} if isinstance(inside, dict) else {}
        keys += [key, *overridden_keys(below)]
    return keys


def apply_overrides(
    raw: dict[str, Any], given: Mapping[str, Any], where: str, folder: Path = Path()
) -> dict[str, Any]:
    """Apply `key.subkey`s to a recipe, in place, and to the tasks of a sequence that set these sections for themselves.

    The order decides nothing: what names a source of calibration takes the place of another's fields, and comes first.

    Raises:
        UserError: naming `where` and the key, for one below a key that holds no keys, or what no task would take.
    """
    for key in sorted(given, key=lambda key: key not in SOURCES):
        value = given[key]
        if key == "calibration":
            value = _calibration_beside(value, folder)
        elif key == "calibration.path" and isinstance(value, str):
            value = _resolve_path(value, folder)
        set_key(raw, key, value, f"{where}{key}")
    _drop_replaced_below(raw, given)
    sequence = raw.get("sequence")
    tasks = sequence.get("tasks") if isinstance(sequence, dict) else None
    for task in tasks if isinstance(tasks, list) else ():
        own = task.get("eval") if isinstance(task, dict) else None
        if isinstance(own, dict) and "task" in own and "eval.task" in overridden_keys(given):
            raise UserError(f"{where}eval.task: the tasks of a sequence set their own; give sequence.tasks")
        of_task = {"data", "training", "trainer"} & set(task) if isinstance(task, dict) else set()
        own = {key: value for key, value in given.items() if key.partition(".")[0] in of_task}
        for key, value in own.items():
            set_key(task, key, value, f"{where}{key}")
        _drop_replaced_below(task, own)
    return raw


def _drop_replaced_below(raw: Any, given: Mapping[str, Any]) -> None:
    """Do as `drop_replaced` in the sections of a recipe that the given `key.subkey`s belong to."""
    for name, section in raw.items():
        own = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
        if isinstance(section, dict) and own:
            drop_replaced(section, own)


def _allowed(text: str, raw: dict[str, Any]) -> Any:
    """Return what --max-forgetting says: of each metric, or one number, also for each that the recipe bounds by its name."""
    try:
        allowed = by_metric(text)
    except ValueError as error:
        raise UserError(f"--max-forgetting: {error}") from None
    own = raw["budget"].get("at_most") if isinstance(raw.get("budget"), dict) else None
    return dict.fromkeys(own, allowed) if isinstance(own, dict) and isinstance(allowed, str) else allowed


def set_key(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `key.subkey` of a recipe, in place.

    Raises:
        UserError: naming `where`, for a key below one that holds no keys.
    """
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            what = "is a list: give all of it" if isinstance(target, list) else "holds a value, not keys"
            raise UserError(f"{where}: {parent!r} {what}")
    if not parents:  # a section is laid over the recipe's, as those of a file are; an empty one empties it
        raw[key] = merge(raw, {key: value})[key] if value else value
    elif parents == ["calibration"]:
        raw["calibration"] = merge_calibration(target, {last: value})
    else:
        target[last] = value


def load_recipe(
    name: str,
    assignments: Sequence[str] = (),
    *,
    methods: str | None = None,
    output_dir: str | None = None,
    preset: str | None = None,
    seeds: str | None = None,
    sweeps: Sequence[str] = (),
    quick: bool = False,
    max_forgetting: str | None = None,
) -> Recipe:
    """Return the validated recipe with all overrides applied to it.

    Args:
        name, assignments: as in `find` and `parse_overrides`.
        methods, output_dir, preset, seeds, sweeps, quick, max_forgetting: as the options of `lora-null train` take them.

    Raises:
        UserError: for anything wrong with the name, the YAML or an override, or one that another takes the place of.
    """
    path, known = find(name), presets()
    given = parse_overrides(assignments)
    keys = overridden_keys(given)
    for option, key, value in (
        ("--method", "method.name", methods),
        ("--output-dir", "output_dir", output_dir),
        ("--seeds", "grid.seeds", seeds),
        ("--sweep", "grid.sweep", sweeps or None),
        ("--max-forgetting", "budget.at_most", max_forgetting),
    ):
        if value is not None and key in keys:
            raise UserError(f"{option}: {key} is given too; give one of the two")
    if sweeps and any(f"{key}.".startswith("grid.per_method.") for key in keys):
        raise UserError(
            "--sweep: holds for every method, and grid.per_method is given too; give grid.sweep={KEY: [V, V]} for it"
        )
    raw = resolve_includes(path)
    if is_of_run(path):
        raw["output_dir"] = str(path.parent)  # wherever that lies now
    if preset is not None:
        if preset not in known:
            raise UserError(f"--model-preset: no preset {preset!r}{nearest(preset, known)}")
        raw = merge(raw, resolve_includes(known[preset]))
    short = raw.pop("quick", None) if quick else {}
    if quick and not (isinstance(short, dict) and short):
        raise UserError(f"--quick: {path} has no quick form")
    raw = apply_overrides(raw, {str(key): value for key, value in short.items()}, f"{path}: quick.", path.parent)
    given |= {} if methods is None else parse_overrides([f"method.name={methods}"])
    raw = apply_overrides(raw, given, "argument ", path.parent)
    if max_forgetting is not None:
        allowed = _allowed(max_forgetting, raw)
        set_key(raw, "budget.at_most", allowed, "--max-forgetting")
        if isinstance(allowed, dict) and "budget.measure" not in keys:
            raw["budget"]["measure"] = None  # the recipe's: the option names its own
    _put_grid(raw, seeds, sweeps)
    _resolve_method_files(raw.get("method"), path.parent)
    recipe = parse_recipe(raw, path.stem)
    _check_swept(keys, recipe.grid)
    _tell_of_others(recipe)
    recipe.name = recipe.name or path.stem
    if output_dir == "":
        raise UserError("--output-dir: is empty, give a folder")
    recipe.output_dir = output_dir or recipe.output_dir or f"runs/{path.stem}{'-quick' if quick else ''}"
    recipe.output_dir = str(Path(_expanded(recipe.output_dir)))
    return _with_paths(recipe, lambda given: _resolve_path(given, path.parent))


def _resolve_method_files(method: Any, folder: Path) -> None:
    """Resolve the paths of methods of one's own, in place: their files are read before anything is checked."""
    for key in ("name", "files") if isinstance(method, dict) else ():
        if isinstance(entries := split_names(method.get(key)), list):
            method[key] = [_resolve_path(v, folder) if str(v).endswith(".py") else v for v in entries]


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe, every default written out, as YAML."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _put_grid(raw: dict[str, Any], seeds: str | None, sweeps: Sequence[str]) -> None:
    if seeds is not None:
        set_key(raw, "grid.seeds", _swept_values(seeds), "--seeds")
    if sweeps:  # what is asked for holds for every method
        set_key(raw, "grid.sweep", {}, "--sweep")
        if (dropped := raw["grid"].pop("per_method", None)) and launched_index() == 0:
            told = ", ".join(map(str, dropped)) if isinstance(dropped, dict) else dropped
            logger.warning(f"--sweep: holds for every method; the recipe's grid.per_method ({told}) is dropped")
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {sweep!r}: expected key.subkey=value,value")
        raw["grid"]["sweep"].setdefault(key, []).extend(_swept_values(values))


def _check_swept(keys: Sequence[str], grid: GridSection) -> None:
    """Raise a UserError for a key of the command line in whose place every run of the grid has a value of its own."""
    replaced = {"seed": ("seed", "--seeds …")} if grid.seeds else {}
    for swept in grid.sweep:
        section, _, name = swept.partition(".")
        for key in (name, *REPLACES.get(name, ())):
            replaced[f"{section}.{key}"] = swept, f"--sweep {swept}=…"
    if key := next((key for key in keys if key in replaced), None):
        swept, option = replaced[key]
        raise UserError(
            f"argument {key}: the grid has values of its own for {'it' if key == swept else swept}; {option} replaces them, "
            "grid={} runs it once"
        )


def _tell_of_others(recipe: Recipe) -> None:
    """Say which methods a recipe sets something for that it does not run, as where --method takes some of a file's alone."""
    for key, given in (("method.options", recipe.method.options), ("grid.per_method", recipe.grid.per_method)):
        others = [name for name, own in given.items() if own and name not in recipe.method.name]
        if others and launched_index() == 0:
            logger.warning(f"{key}: is not read for {', '.join(others)}, which method.name does not have")


def _swept_values(text: str) -> list[Any]:
    try:
        if set(text) & set("[\"'"):
            return parse_yaml(f"[{text}]")  # within quotes and lists a comma parts no values
        return [parse_value(value) for value in text.split(",")]
    except yaml.YAMLError as error:
        raise UserError(f"{text!r} is no list of values, such as 1,2 ({yaml_reason(error)})") from None


def _expanded(path: str) -> str:
    """Return a path with the home folder for ~, and with the environment's variables.

    Raises:
        UserError: a variable that is not set, or no such user.
    """
    path = os.path.expandvars(path)
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)", path):
        raise UserError(f"{path}: the environment has no variable {unset[1]}")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise UserError(f"{path}: there is no user {Path(path).parts[0]}") from None


def _resolve_path(path: str, folder: Path) -> str:
    """Return what a path means: what is there; else what lies beside the recipe's YAML; of samples/… the shipped one."""
    if Path(path).exists():
        return path
    folders = (folder, RECIPES) if path.startswith("samples/") else (folder,)
    found = next((beside / path for beside in folders if (beside / path).exists()), None)
    return str(found) if found else _expanded(path)


def whole_paths(recipe: Recipe) -> Recipe:
    """Return a copy whose local paths are whole, so that it means the same from any folder."""
    return _with_paths(recipe.model_copy(deep=True), whole_path)


def without_folders(recipe: Recipe) -> Recipe:
    """Return a copy that names files and folders without where they lie, which may differ between machines."""
    found = _with_paths(recipe.model_copy(deep=True), lambda path: Path(path).name)
    return found.model_copy(update={"output_dir": Path(recipe.output_dir).name})


def whole_path(path: str) -> str:
    """Return the whole path of what is there; anything else as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def paths_here(recipe: Recipe) -> list[Path]:
    """Return the files and folders that a recipe names and that are there."""
    found = []

    def note(path: str) -> str:
        found.append(Path(path))
        return path

    _with_paths(recipe.model_copy(deep=True), note)
    return [path for path in found if path.exists()]


def _with_paths(recipe: Recipe, resolve: Callable[[str], str]) -> Recipe:
    """Replace every path in a recipe by what it means, in place."""
    calibration = recipe.calibration
    sections = [recipe.model, recipe.method, calibration, *calibration.sources, recipe.data, recipe.eval]
    sections += [*recipe.eval.entries, *([recipe.eval.judge] if recipe.eval.judge else [])]
    for values in (*map(vars, sections), recipe.training):
        _put_paths(values, resolve)
    recipe.method.files = [resolve(path) for path in recipe.method.files]
    for sweep in (recipe.grid.sweep, *recipe.grid.per_method.values()):
        for key, values in sweep.items():
            if key.rpartition(".")[2] in PATHS:
                # Whole, since a run's folder and label are made of the value, which is the same then wherever it is resumed.
                sweep[key] = [whole_path(resolve(value)) if isinstance(value, str) else value for value in values]
    for task in recipe.sequence.tasks if recipe.sequence else ():  # which are checked later and may have any form
        evaluation = task.get("eval")
        entries = evaluation.get("task") if isinstance(evaluation, dict) else None
        entries = entries if isinstance(entries, list) else []
        entries[:] = [resolve(e) if isinstance(e, str) and Path(e).suffix else e for e in entries]
        for section in (task.get("data"), task.get("training"), *entries):
            _put_paths(section if isinstance(section, dict) else {}, resolve)
    return recipe


def _put_paths(values: dict[str, Any], resolve: Callable[[str], str]) -> None:
    """Replace the paths of a section by what they mean, or those of an entry of `eval`, whose task may be a YAML; in place."""
    for key, value in values.items():
        if (
            isinstance(value, str)
            and value
            and (key in PATHS or (key == "task" and Path(value).suffix in YAML_SUFFIXES))
        ):
            values[key] = resolve(value)
