"""Find lm-eval's tasks by name, and give them local documents where asked."""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import logging
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.tasks
import numpy as np
import pyarrow
import yaml
from lm_eval.tasks import TaskManager

from lora_null.eval_harness.code.jails import UNSAFE
from lora_null.eval_harness.documents import read_documents, with_lists
from lora_null.eval_harness.lm_eval.model import lm_eval_silenced
from lora_null.eval_harness.lm_eval.private_names import files_of, full_config, needs_consent
from lora_null.eval_harness.tasks import TASK_FILES
from lora_null.utils.errors import UserError, first_line, hub_error
from lora_null.utils.own_code import INSTALLED, own_files

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from lora_null.eval_harness.lm_eval.task import LmEvalTask

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
SUBSET_KEYS = {"task", "task_alias", "dataset_name", "tag", "group"}  # what may differ between one task's subsets
BESIDE = (".yaml", ".yml", ".py", ".json", ".jsonl", ".txt", ".csv", ".tsv")  # what a task's code may read
# A recipe, which a task's code does not read.
RECIPE = re.compile(rb"^(model|method|training|calibration|output_dir)\s*:", re.MULTILINE)
CODE_EVAL = "HF_ALLOW_CODE_EVAL"  # the environment variable that the hub's metric code_eval asks for
LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
NAME_IN_FILE = re.compile(
    rb"""^\s*(?:- )?['"]?(?:task|group|tag)['"]?:[ \t]*['"]?([^\s'"#\[]+)|^\s*- ['"]?([^\s'"#:]+)['"]?\s*$""",
    re.MULTILINE,
)


def load(task: LmEvalTask) -> TaskDict:
    """Return lm-eval's {"tasks", "groups", …} with this task's documents and its own few-shot number.

    Raises:
        UserError: see `LmEvalTask.check`.
    """
    manager = manager_of(task.task, task.include_path)
    entry = manager.task_index[task.task]
    _check_consent(task, (entry.cfg or {}).get("unsafe_code"), entry)
    try:
        with _seeded_as_lm_evals_command():
            loaded = _load_from_hub(task, manager) if task.path is None else _load_from_file(task, manager)
    except ImportError as error:
        folders = {Path(found.yaml_path).parent for found in manager.task_index.values() if found.yaml_path}
        if any((folder / f"{error.name}.py").is_file() for folder in folders):
            raise UserError(
                f"{task}: its code imports {error.name}, which lies beside it, where lm-eval does not look; put both into one "
                "file, or the folder into PYTHONPATH"
            ) from None
        raise UserError(f"{task} needs another package ({first_line(error)})") from error
    except UserError:
        raise
    except Exception as error:  # functions of the user's own are called
        if CODE_EVAL in str(error):
            raise UserError(f"{task}: its metric asks for {CODE_EVAL}=1 in the environment") from None
        if task.include_path is None:
            raise
        raise UserError(f"{task} cannot be made ({type(error).__name__}: {first_line(error)})") from error
    for name, member in loaded["tasks"].items():
        if member.get_config("process_docs") and hasattr(member, "task_docs"):
            # It may shuffle choices, and lm-eval calls it anew for the questions and for the right answers.
            docs = functools.partial(getattr, member, "task_docs")
            setattr(member, "test_docs" if member.has_test_docs() else "validation_docs", docs)
        own = member.get_config("num_fewshot")
        if own == 0 and task.num_fewshot:  # as lm-eval's command line, which never changes a task's own 0
            raise UserError(f"{task} allows no few-shot examples; leave num_fewshot out")
        member.set_config("num_fewshot", (own or 0) if task.num_fewshot is None else task.num_fewshot)
        _check_consent(task, needs_consent(member), manager.task_index.get(name, entry))
    seed_fewshot(loaded, 0)
    return loaded


@contextlib.contextmanager
def _seeded_as_lm_evals_command() -> Iterator[None]:
    """Seed what a task's rules may draw with, such as the order of choices, whatever the run's own seed is."""
    before, of_numpy = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)


def seed_fewshot(loaded: TaskDict, seed: int) -> None:
    """Seed the sampling of few-shot examples in all tasks that `load` returned."""
    for member in loaded["tasks"].values():
        member.set_fewshot_seed(seed)


def _check_consent(task: LmEvalTask, unsafe: bool | None, entry: Any) -> None:
    """Refuse to run code without consent, and to run it without a jail, as lm-eval's own tasks do, without that consent."""
    if unsafe and not task.confirm_run_unsafe_code:
        raise UserError(
            f"{task} runs code that the model writes; consent with --allow-code-execution "
            "(in Python: confirm_run_unsafe_code=True)"
        )
    of_lm_eval = entry.yaml_path is not None and LM_EVAL_TASKS in Path(entry.yaml_path).parents
    if unsafe and of_lm_eval and task.jail != UNSAFE:
        raise UserError(
            f"{task} runs code that the model writes without a jail; take sandbox_humaneval or sandbox_mbpp, or consent "
            f"to that with --allow-code-execution={UNSAFE}"
        )


# --- names ---------------------------------------------------------------------------------------------------------


def manager_of(name: str, include_path: str | None = None) -> TaskManager:
    """Return a task manager that knows `name`.

    lm-eval takes 10 to 20 s to index its 14,000 task files. So the folder that the name begins with is tried first (arc
    for arc_easy, after the user's and this package's own), then the one where the name stands in a file, and all of them
    only where these do not have the task and its name stands somewhere nevertheless.

    Args:
        name: of a task, group or tag.
        include_path: a folder of the user's own task files.

    Raises:
        UserError: nobody knows it, or a task file of the user's cannot be read.
    """
    own = ()
    if include_path is not None:
        own = (Path(include_path),)
        if not own[0].is_dir():
            raise UserError(f"eval.include_path: no folder {include_path}")
        if name in folder_manager(own[0]).task_index and not _knows(folder_manager(own[0]), name):
            return _full_manager(own)  # a group of theirs with members of lm-eval's
    words = name.split("_")
    folders = (LM_EVAL_TASKS / "_".join(words[:length]) for length in range(len(words), 0, -1))
    for folder in (*own, TASK_FILES, *filter(Path.is_dir, folders)):
        if _knows(manager := folder_manager(folder), name):
            return manager
    named, text = _names_in_files()
    theirs = folder_manager(own[0]).all_tasks if own else []
    if name in named and _knows(manager := folder_manager(named[name]), name):
        return manager
    manager = _full_manager() if name.encode() in text else None
    if manager is not None and name in manager.task_index:
        return manager
    for path in own[0].rglob("*.y*ml") if own else ():
        _check_yaml(path)
    close = difflib.get_close_matches(name, [*theirs, *(manager.all_tasks if manager else named)], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "list them with: lm-eval ls tasks"
    raise UserError(f"unknown lm-eval task {name!r} ({hint})")


@functools.cache
def _names_in_files() -> tuple[dict[str, Path], bytes]:
    """Return the folder of each name that stands in a task file by itself, and the text of all files: a second's work."""
    named, texts = {}, []
    for path in (*TASK_FILES.rglob("*.yaml"), *LM_EVAL_TASKS.rglob("*.y*ml")):
        texts.append(path.read_bytes())
        for found in NAME_IN_FILE.findall(texts[-1]):
            named.setdefault((found[0] or found[1]).decode(errors="replace"), path.parent)
    return named, b"\n".join(texts)


def _knows(manager: TaskManager, name: str) -> bool:
    """Return whether `manager` has the task, or the group with all its members; a tag may go on in other folders."""
    entry = manager.task_index.get(name)
    if entry is None or entry.cfg is None:
        return False
    members = entry.cfg.get("task")
    return not isinstance(members, list) or all(isinstance(m, str) and _knows(manager, m) for m in members)


def name_in(path: Path) -> str:
    """Return the name of the task or group in a file of lm-eval's format.

    Raises:
        UserError: there is no such file, or no task in it.
    """
    if not path.is_file():
        raise UserError(f"no task file {path}")
    if path.suffix != ".yaml":
        raise UserError(f"{path}: lm-eval reads task files that end in .yaml; rename it")
    index = folder_manager(path.parent).task_index
    found = [name for name, entry in index.items() if entry.yaml_path and Path(entry.yaml_path).samefile(path)]
    if not found:
        _check_yaml(path)
        raise UserError(f"{path} holds no task of lm-eval (a mapping with the key task or group)")
    return found[0]


def _check_yaml(path: Path) -> None:
    """Raise a UserError for a task file that cannot be read, which lm-eval leaves out without a word."""
    try:
        files_of(path)
    except (yaml.YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read as a task file ({' '.join(str(error).split())})") from None


@functools.cache
def folder_manager(folder: Path) -> TaskManager:
    """Return a task manager of the task files in one folder; those that are no YAML are left out."""
    with lm_eval_silenced(logging.ERROR):
        return TaskManager(include_path=folder, include_defaults=False)


@functools.cache
def _full_manager(own: tuple[Path, ...] = ()) -> TaskManager:
    with lm_eval_silenced(logging.ERROR):
        return TaskManager(include_path=[TASK_FILES, *own])


def hash_of_rules(task: LmEvalTask, loaded: TaskDict) -> str:
    """Return a hash of a task of the user's own: its file and those that it includes, its local documents, and where code
    lies beside them the modules loaded from there, what these import, and what they may read there."""
    manager, digest = manager_of(task.task, task.include_path), hashlib.sha256()
    entries = [manager.task_index[name] for name in (task.task, *loaded["tasks"]) if name in manager.task_index]
    rules = {file for entry in entries if entry.yaml_path for file in files_of(Path(entry.yaml_path))}
    folders = {file.parent for file in rules if LM_EVAL_TASKS not in file.parents}
    modules = {Path(found) for module in list(sys.modules.values()) if (found := getattr(module, "__file__", None))}
    places: set[str] = set()
    for member in loaded["tasks"].values():
        options = member.get_config("dataset_kwargs") or {}
        given = options.get("data_files") or []
        named = given.values() if isinstance(given, dict) else [given]
        places |= {name for n in named for name in ([n] if isinstance(n, str) else n)}
        places |= {place for place in (member.get_config("dataset_path"), options.get("data_dir")) if place}
    found = {Path(path) for place in places for path in glob.glob(place)}
    code = {file for file in modules if folders & set(file.parents) and not INSTALLED & set(file.parts)}
    code |= {file for folder in folders for file in folder.glob("*.py")}
    files = rules | own_files(code)
    if code:
        beside = [file for folder in folders for file in folder.iterdir() if file.suffix in BESIDE]
        files |= {
            file for file in beside if file.suffix not in (".yaml", ".yml") or not RECIPE.search(file.read_bytes())
        }
    files |= {file for path in found for file in ([path] if path.is_file() else path.rglob("*"))}
    for file in sorted(filter(Path.is_file, files)):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


# --- documents -----------------------------------------------------------------------------------------------------


def _load_from_hub(task: LmEvalTask, manager: TaskManager) -> TaskDict:
    try:
        return manager.load(task.task)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if type(error) is FileNotFoundError and task.include_path is not None:
            raise UserError(
                f"{task}: a file of its data is not there ({first_line(error)}); lm-eval looks for data_files in the current "
                "folder: write the whole path in its YAML, or give the documents with path: FILE"
            ) from None
        # No network, no such data set, or one that is a script, which datasets no longer runs.
        line = f"{task}: its hub data set cannot be read ({first_line(error)}); give a local copy with path: FILE"
        raise hub_error(line, error) from error


def _load_from_file(task: LmEvalTask, manager: TaskManager) -> TaskDict:
    config = _local_config(task, manager)
    try:
        loaded = manager.load(config)
        for leaf in loaded["tasks"].values():
            for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
                # lm-eval takes a bare field name that is not in the data for literal text, and scores that.
                if isinstance(rule := leaf.get_config(key), str) and rule.isidentifier() and rule not in leaf.features:
                    raise KeyError(rule)
            _try_all(task, leaf)
        return loaded
    except UserError:
        raise
    except Exception as error:
        raise explained(task, error) from error


def _try_all(task: LmEvalTask, leaf: Any) -> None:
    """Apply a task's rules to every document of a local file: what they cannot use would end the evaluation.

    lm-eval takes all answers for what the first is, texts or lists of accepted ones.
    """
    kinds = set()
    for number, document in enumerate(leaf.task_docs, start=1):
        try:
            leaf.doc_to_text(document)
            kinds.add(isinstance(leaf.doc_to_target(document), list))
        except Exception as error:
            raise explained(task, error, None if leaf.get_config("process_docs") else number) from error
    if len(kinds) > 1:
        raise UserError(
            f"{task}: {task.path} has answers that are texts and others that are lists; write all as lists"
        )


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
            f"{task} would take its {shots} few-shot examples from the evaluated file "
            f"{task.path}; set num_fewshot: 0, or fewshot_path: another file"
        )
    splits |= {fewshot["split"]} if "split" in fewshot else set()
    rules = " ".join(str(config.get(key)) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    documents = dict.fromkeys(splits, _read(task, task.path, rules))
    if task.fewshot_path is not None:
        documents["fewshot examples"] = _read(task, task.fewshot_path, rules)
    return config | {"task": task.task, "custom_dataset": lambda **_: documents, "dataset_kwargs": None}


def _single_config(task: LmEvalTask, manager: TaskManager) -> dict[str, Any]:
    """Return the full configuration of a task, or of the one task that a group's members are subsets of."""
    leaves = list(_leaves(task.task, manager))
    configs = [manager.task_index[leaf].cfg or {} for leaf in leaves]
    rules = [{key: value for key, value in config.items() if key not in SUBSET_KEYS} for config in configs]
    if any(rule != rules[0] for rule in rules):
        raise UserError(
            f"{task} is a group of different tasks, so path cannot stand in for their data; "
            f"list its members instead ({', '.join(leaves[:3])}, …)"
        )
    config = full_config(manager.task_index[leaves[0]].yaml_path)
    if "class" in config:
        raise UserError(f"{task} reads its data with its own code; it cannot use path")
    return {key: value for key, value in config.items() if key not in ("tag", "group", "task_alias")}


def _leaves(name: str, manager: TaskManager) -> Iterator[str]:
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


def _read(task: LmEvalTask, path: str, rules: str = "") -> datasets.Dataset:
    """Return the documents of a local file under the task's field names; none may lack a field that the rules name."""
    with lm_eval_silenced(logging.ERROR):
        found = read_documents([Path(path)], str(task), label_names=False)  # a task's rules count its choices
    rows = [with_lists(row) for row in found.rows]
    columns = {name: [row.get(name) for row in rows] for name in found.columns}
    try:
        documents = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{task}: cannot read {path} as one table ({first_line(error)})") from None
    names = documents.column_names
    for wanted, given in (task.fields or {}).items():
        if given not in names:
            raise UserError(f"{task}: {path} has no field {given!r}; its fields: {', '.join(names)}")
        column = list(documents[given])
        documents = documents.remove_columns([wanted] if wanted in names else []).add_column(wanted, column)
    for name in (name for name in documents.column_names if re.search(rf"\b{re.escape(name)}\b", rules)):
        lacking = [number for number, value in zip(found.numbers, documents[name]) if value is None]
        if 0 < len(lacking) < len(documents):
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise UserError(f"{task}: {path} has no {name!r} in rows {', '.join(map(str, lacking[:5]))}{more}")
    return documents


def explained(task: LmEvalTask, error: Exception, row: int | None = None) -> UserError:
    """Return the mistake behind an error in a task's rules over a local file, or a row of it: mostly a missing field."""
    names = _read(task, task.path).column_names
    undefined = re.match(r"'(\w+)' is undefined", str(error))
    missing = error.args[0] if isinstance(error, KeyError) and error.args else undefined and undefined.group(1)
    if missing and missing not in names:
        return UserError(
            f"{task}: {task.path} has no field {missing!r}; its fields: {', '.join(names)}; "
            f"map one with fields: {{{missing}: FIELD}}"
        )
    where, reason = f"row {row} of " if row else "", f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"{task} cannot use {where}{task.path} ({reason}); its fields: {', '.join(names)}")
