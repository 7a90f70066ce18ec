"""The names of lm-eval that it does not promise to keep: each is still there, and nothing else uses any."""

import ast
import importlib
import inspect
import multiprocessing
import os
import random
import statistics
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lora_null.eval_harness import LmEvalTask
from lora_null.eval_harness.lm_eval import private_names
from lora_null.eval_harness.tasks import TASK_FILES

FOLDER = Path(private_names.__file__).parents[1]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("_model_generate", ["self", "context", "max_length", "stop", "generation_kwargs"]),
        ("_loglikelihood_tokens", ["self", "requests", "disable_tqdm", "override_bs"]),
    ],
)
def test_inner_methods_that_are_overridden(name, expected):
    assert list(inspect.signature(getattr(HFLM, name)).parameters) == expected, f"HFLM.{name} takes other arguments"


@pytest.mark.parametrize(
    "owner, name",
    [
        ("lm_eval.api.task", "tqdm"),
        ("lm_eval.tasks._yaml_loader", "load_yaml"),
        ("lm_eval.tasks.hendrycks_math.utils", "is_equiv"),
        ("lm_eval.tasks.hendrycks_math.utils", "last_boxed_only_string"),
        ("lm_eval.tasks.hendrycks_math.utils", "remove_boxed"),
    ],
)
def test_names_in_modules(owner, name):
    assert hasattr(importlib.import_module(owner), name), f"lm-eval has no {owner}.{name} any more"


def test_mixed_precision_is_kept_under_the_same_name(model, tokenizer):
    assert HFLM(pretrained=model, tokenizer=tokenizer).mixed_precision_dtype is None, "HFLM.mixed_precision_dtype"


def test_tasks_that_run_code_are_marked_as_such(write):
    row = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass", "task_id": "t/0"}
    path, consent = write("h.jsonl", [row]), {"confirm_run_unsafe_code": True}
    (task,) = LmEvalTask("sandbox_humaneval", path=path, jail="unsafe", **consent).loaded["tasks"].values()
    assert private_names.needs_consent(task), "lm-eval's tasks have no UNSAFE_CODE"


def test_the_index_of_tasks_has_its_fields():
    entry = TaskManager(include_path=TASK_FILES, include_defaults=False).task_index["metamath_gsm8k_chat"]
    assert entry.yaml_path.name == "metamath_gsm8k_chat.yaml", "an entry of lm-eval's index has another yaml_path"
    assert entry.cfg["doc_to_text"] and entry.tags == set(), "an entry of lm-eval's index has no cfg and tags"
    full = private_names.full_config(entry.yaml_path)
    assert callable(full["process_results"]) and full["dataset_path"] == "openai/gsm8k", "load_yaml resolves less"


def test_the_bootstrap_does_not_fork_and_gives_what_the_forks_would(monkeypatch):
    from lm_eval.api.metrics import bootstrap_stderr, perplexity

    values, draw = [-0.1 * i for i in range(30)], random.Random(0)
    expected = statistics.stdev(perplexity(draw.choices(values, k=30)) for _ in range(1000))
    monkeypatch.setattr(multiprocessing, "Pool", None)
    with private_names.bootstrap_in_this_process():
        assert bootstrap_stderr(perplexity, values, 1000) == pytest.approx(expected)
    assert private_names.NO_FORK not in os.environ


def test_every_private_name_is_in_that_one_file():
    """What begins with an underscore and belongs to another package, or to a class of one."""
    for file in sorted(FOLDER.rglob("*.py")):
        if file == Path(private_names.__file__):
            continue
        tree, found = ast.parse(file.read_text()), []
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)} | {
            "_fields_",
            "_fields",
            "_exit",
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lora_null"):
                words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [word for word in words if word.startswith("_") and not word.startswith("__")]
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                found += [node.attr] if node.attr not in own else []
        assert not found, f"{file.relative_to(FOLDER)} uses {found}; gather them in lm_eval/private_names.py"
