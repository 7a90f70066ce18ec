"""Find lm-eval's tasks by name, give them local documents where asked, and try them before a model is loaded."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pyarrow
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # no public way to a task's full configuration

from lora_null.eval_harness.documents import read_documents
from lora_null.eval_harness.lm_eval.model import BlankLM, quiet
from lora_null.eval_harness.tasks import LmEvalTask, Task, list_tasks
from lora_null.utils.errors import UserError, nearest

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
TASK_FILES = Path(__file__).parents[1] / "task_files"  # this package's own, in lm-eval's format
_TASKS = Path(lm_eval.tasks.__file__).parent
SUBSET_KEYS = {"task", "task_alias", "dataset_name", "tag", "group"}  # what may differ between one task's subsets


def validate_tasks(tasks: Sequence[Task | str]) -> list[Task]:
    """Check everything about `tasks` that needs no model, and return them with plain names turned into `LmEvalTask`s.

    Each lm-eval task is built, its documents are read, and its rules are tried on the first document.

    Raises:
        UserError: for an unknown task, a missing file or field, an unreachable hub data set, few-shot examples out of
            the evaluated file, an unknown metric, empty pairs, or two tasks of the same name.
    """
    tasks = list_tasks(tasks)
    for task in tasks:
        if isinstance(task, LmEvalTask):
            prepare(task)
    return tasks


def prepare(task: LmEvalTask, seed: int = 0) -> dict[str, Any]:
    """Return lm-eval's {"tasks", "groups", …} for `task`, ready to run: documents read, few-shot sampling seeded.

    The task has been tried on its first document with a stand-in model, to find missing fields and unknown metrics.

    Raises:
        UserError: see `validate_tasks`.
    """
    with quiet(logging.ERROR):  # warnings here are about how a task's authors wrote it
        loaded = _load(task)
        try:
            results = evaluator.evaluate(
                lm=BlankLM(),
                task_dict=loaded,
                limit=1,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=task.confirm_run_unsafe_code,
            )
        except Exception as error:
            if task.path is None:
                raise
            raise _unreadable(task, error) from error
    result_names(task, loaded, results)
    _seed_fewshot(loaded, seed)
    return loaded


def result_names(task: LmEvalTask, loaded: dict[str, Any], results: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Return {name of a result: (lm-eval's task, metric, filter)} for what `task` asks for.

    The name is the task's label; "/metric" is added where there are several metrics, and "/filter" where there are
    several filters: "nq_open", "arc_easy/acc_norm", "gsm8k/strict-match".
    """
    groups = [name for name in loaded.get("groups") or {} if name == task.task and _scores(results, name)]
    owners = groups or list(loaded["tasks"])
    names = {}
    for owner in owners:
        label = task.label if len(owners) == 1 else f"{task.name}/{owner}" if task.name else owner
        scores = _scores(results, owner)
        metrics, filters = ({score[i] for score in scores} for i in (0, 1))
        for metric, filter_ in scores:
            parts = [label, *[metric] * (len(metrics) > 1), *[filter_] * (len(filters) > 1)]
            if task.metric in (None, metric, filter_, f"{metric}/{filter_}"):
                names["/".join(parts)] = (owner, metric, filter_)
    if not names or (task.metric is not None and len(names) > len(owners)):
        choices = {f"{metric}/{filter_}" for owner in owners for metric, filter_ in _scores(results, owner)}
        raise UserError(
            f"evaluation task {task.label!r}: metric {task.metric!r} names {len(names)} of its results"
            + nearest(task.metric, choices)
        )
    return names


def _scores(results: dict[str, Any], owner: str) -> list[tuple[str, str]]:
    """Return the (metric, filter) pairs of lm-eval's results for one task or group."""
    keys = (key.split(",", 1) for key in results["results"].get(owner, {}) if "," in key)
    return [(metric, filter_) for metric, filter_ in keys if not metric.endswith("_stderr")]


def _load(task: LmEvalTask) -> dict[str, Any]:
    """Return lm-eval's {"tasks", "groups", …} with this task's own few-shot number."""
    manager = _manager(task.task)
    _check_code(task, (manager.task_index[task.task].cfg or {}).get("unsafe_code"))
    try:
        loaded = _load_from_hub(task, manager) if task.path is None else _load_from_file(task, manager)
    except ImportError as error:
        raise UserError(f"evaluation task {task.label!r} needs another package ({_first_line(error)})") from error
    for leaf in loaded["tasks"].values():
        _set_fewshot(task, leaf)
        _check_code(task, getattr(leaf, "UNSAFE_CODE", False))
    _seed_fewshot(loaded, 0)
    return loaded


def _check_code(task: LmEvalTask, unsafe: bool) -> None:
    if unsafe and not task.confirm_run_unsafe_code:
        raise UserError(
            f"evaluation task {task.label!r} runs code that the model writes; consent with --allow-code-execution "
            "(in Python: confirm_run_unsafe_code=True)"
        )


def _seed_fewshot(loaded: dict[str, Any], seed: int) -> None:
    for leaf in loaded["tasks"].values():
        leaf.set_fewshot_seed(seed)


# --- names ---------------------------------------------------------------------------------------------------------


def _manager(name: str) -> TaskManager:
    """Return a task manager that knows `name`, after parsing as few of lm-eval's 14,000 task files as possible.

    Most tasks live in the folder that their name starts with; others are looked for in the files' text. Only tags, and
    groups over several folders, cost the parsing of all files (some 10 s), once in a process.
    """
    if _knows(_own_manager(), name):
        return _own_manager()
    words = name.split("_")
    folders = ["_".join(words[:length]) for length in range(len(words), 0, -1)]
    for folder in folders:
        if (_TASKS / folder).is_dir() and _knows(_folder_manager(folder), name):
            return _folder_manager(folder)
    if (folder := _homes().get(name)) and _knows(_folder_manager(folder), name):
        return _folder_manager(folder)
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    if any(word.search(text) for _, text in _all_yaml()) and name in _full_manager().task_index:
        return _full_manager()
    known = sorted({*_homes(), *_own_manager().task_index})
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "list them with: lm-eval ls tasks"
    raise UserError(f"unknown lm-eval task {name!r} ({hint})")


def _knows(manager: TaskManager, name: str) -> bool:
    """Return whether `manager` has the task, or the group with all its members; a tag may go on in other folders."""
    entry = manager.task_index.get(name)
    if entry is None or entry.cfg is None:
        return False
    members = entry.cfg.get("task")
    return not isinstance(members, list) or all(isinstance(m, str) and _knows(manager, m) for m in members)


@functools.cache
def _own_manager() -> TaskManager:
    with quiet(logging.ERROR):
        return TaskManager(include_path=TASK_FILES, include_defaults=False)


@functools.cache
def _folder_manager(folder: str) -> TaskManager:
    with quiet(logging.ERROR):
        return TaskManager(include_path=_TASKS / folder, include_defaults=False)


@functools.cache
def _full_manager() -> TaskManager:
    with quiet(logging.ERROR):
        return TaskManager()


@functools.cache
def _homes() -> dict[str, str]:
    """Return {name of a task or group: the folder of lm-eval's tasks that defines it}, as far as the text tells."""
    definition = re.compile(r"""^["']?(?:task|group)["']?:[ "']*([^\s"']+)""", re.MULTILINE)
    return {name: folder for folder, text in _all_yaml() for name in definition.findall(text)}


@functools.cache
def _all_yaml() -> list[tuple[str, str]]:
    """Return (folder, text) of all of lm-eval's task files; reading them takes a twentieth of parsing them."""
    paths = sorted(_TASKS.glob("*/**/*yaml"))
    return [(path.relative_to(_TASKS).parts[0], path.read_text(encoding="utf-8")) for path in paths]


# --- documents -----------------------------------------------------------------------------------------------------


def _load_from_hub(task: LmEvalTask, manager: TaskManager) -> dict[str, Any]:
    try:
        return manager.load(task.task)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # No network, no such data set, or one that is a script, which datasets no longer runs.
        raise UserError(
            f"evaluation task {task.label!r}: its hub data set cannot be read ({_first_line(error)}); "
            "give a local copy with path: FILE"
        ) from error


def _load_from_file(task: LmEvalTask, manager: TaskManager) -> dict[str, Any]:
    config = _local_config(task, manager)
    try:
        loaded = manager.load(config)
        for leaf in loaded["tasks"].values():
            for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
                # lm-eval takes a bare field name that is not in the data for literal text, and scores that.
                if isinstance(rule := leaf.get_config(key), str) and rule.isidentifier() and rule not in leaf.features:
                    raise KeyError(rule)
        return loaded
    except Exception as error:
        raise _unreadable(task, error) from error


def _local_config(task: LmEvalTask, manager: TaskManager) -> dict[str, Any]:
    """Return the task's full configuration with its documents replaced by the local file's."""
    config = _single_config(task, manager)
    fewshot = config.get("fewshot_config") or {}
    shots = config.get("num_fewshot") or 0 if task.num_fewshot is None else task.num_fewshot
    splits = {config[key] for key in SPLITS if config.get(key)}
    if task.fewshot_path is not None:
        config["fewshot_split"] = "fewshot examples"
        config["fewshot_config"] = {k: v for k, v in fewshot.items() if k not in ("split", "samples")}
    elif shots > 0 and (fewshot.get("samples") is None or config.get("fewshot_split") or fewshot.get("split")):
        raise UserError(
            f"evaluation task {task.label!r} would take its {shots} few-shot examples from the evaluated file "
            f"{task.path}; set num_fewshot: 0, or fewshot_path: another file"
        )
    splits |= {fewshot["split"]} if "split" in fewshot else set()
    documents = dict.fromkeys(splits, _read(task, task.path))
    if task.fewshot_path is not None:
        documents["fewshot examples"] = _read(task, task.fewshot_path)

    def read(**_: Any) -> dict[str, datasets.Dataset]:
        return documents

    return config | {"task": task.task, "custom_dataset": read, "dataset_kwargs": None}


def _single_config(task: LmEvalTask, manager: TaskManager) -> dict[str, Any]:
    """Return the full configuration of a task, or of the one task that a group's members are subsets of."""
    leaves = list(_leaves(task.task, manager))
    rules = [{k: v for k, v in manager.task_index[leaf].cfg.items() if k not in SUBSET_KEYS} for leaf in leaves]
    if any(rule != rules[0] for rule in rules):
        raise UserError(
            f"evaluation task {task.label!r} is a group of different tasks, so path cannot stand in for their data; "
            f"list its members instead ({', '.join(leaves[:3])}, …)"
        )
    config = load_yaml(manager.task_index[leaves[0]].yaml_path, resolve_func=True)
    if "class" in config:
        raise UserError(f"evaluation task {task.label!r} reads its data with its own code; it cannot use path")
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_alias")}


def _leaves(name: str, manager: TaskManager) -> Iterable[str]:
    """Yield the names of the tasks in a task (itself), group or tag."""
    entry = manager.task_index[name]
    members = sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task")
    if not isinstance(members, list):
        yield name
        return
    for member in members:
        if not isinstance(member, str) or member not in manager.task_index:
            raise UserError(f"group {name!r} changes its members' rules, so it cannot use path; list its members")
        yield from _leaves(member, manager)


def _read(task: LmEvalTask, path: str) -> datasets.Dataset:
    """Return the documents of a local file under the task's field names."""
    where = f"evaluation task {task.label!r}"
    with quiet(logging.ERROR):
        found = read_documents([Path(path)], where)
    columns = {name: [row.get(name) for row in found.rows] for name in found.columns}
    try:
        documents = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: cannot read {path} as one table ({_first_line(error)})") from None
    names = documents.column_names
    for wanted, given in (task.fields or {}).items():
        if given not in names:
            raise UserError(f"{where}: {path} has no field {given!r}; its fields: {', '.join(names)}")
        column = list(documents[given])
        documents = documents.remove_columns([wanted] if wanted in names else []).add_column(wanted, column)
    return documents


def _unreadable(task: LmEvalTask, error: Exception) -> UserError:
    """Return the mistake behind an error in a task's rules over a local file: mostly a missing field."""
    names = _read(task, task.path).column_names
    undefined = re.match(r"'(\w+)' is undefined", str(error))
    missing = error.args[0] if isinstance(error, KeyError) and error.args else undefined and undefined.group(1)
    if missing and missing not in names:
        return UserError(
            f"evaluation task {task.label!r}: {task.path} has no field {missing!r}; its fields: {', '.join(names)}; "
            f"map one with fields: {{{missing}: FIELD}}"
        )
    return UserError(
        f"evaluation task {task.label!r} cannot use {task.path} ({type(error).__name__}: {_first_line(error)}); "
        f"its fields: {', '.join(names)}"
    )


def _set_fewshot(task: LmEvalTask, leaf: Any) -> None:
    """Set the number of few-shot examples as lm-eval's command line does; it never changes a task's own 0."""
    own = leaf.get_config("num_fewshot")
    if own == 0 and task.num_fewshot:
        raise UserError(f"evaluation task {task.label!r} allows no few-shot examples; leave num_fewshot out")
    leaf.set_config("num_fewshot", (own or 0) if task.num_fewshot is None else task.num_fewshot)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
