"""Evaluation before and after training: lm-eval tasks and answer likelihoods on a live model, over all processes.

from lora_null.eval_harness import AnswerTask, LmEvalTask, evaluate

before = evaluate(model, tokenizer, ["nq_open", LmEvalTask("webqs", path="test.jsonl", fields={"answers": "answer"})])
before.metrics["nq_open"]  # Metric(value=…, stderr=…, n=…, …)

The names below are imported when they are first asked for: lm-eval and PyTorch take seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_null.eval_harness.evaluation import evaluate, logits_differ, validate_tasks
    from lora_null.eval_harness.forgetting import ForgettingTask
    from lora_null.eval_harness.likelihood import AnswerTask, TokenizedPair
    from lora_null.eval_harness.lm_eval.task import LmEvalTask
    from lora_null.eval_harness.mt_bench.judge import Judge
    from lora_null.eval_harness.mt_bench.task import MTBenchTask, as_questions
    from lora_null.eval_harness.preferences import PreferenceTask
    from lora_null.eval_harness.probe import Probe, few_rows
    from lora_null.eval_harness.results import Evaluation, Metric, Role, TaskResult
    from lora_null.eval_harness.tasks import TASK_FILES, RunOptions, Task

_HOME = {
    "evaluation": ("evaluate", "logits_differ", "validate_tasks"),
    "forgetting": ("ForgettingTask",), "likelihood": ("AnswerTask", "TokenizedPair"), "lm_eval.task": ("LmEvalTask",),
    "mt_bench.judge": ("Judge",), "mt_bench.task": ("MTBenchTask", "as_questions"),
    "preferences": ("PreferenceTask",), "probe": ("Probe", "few_rows"),
    "results": ("Evaluation", "Metric", "Role", "TaskResult"), "tasks": ("TASK_FILES", "RunOptions", "Task"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOME.items() for name in names}

__all__ = [
    "TASK_FILES", "AnswerTask", "Evaluation", "ForgettingTask", "Judge", "LmEvalTask", "MTBenchTask", "Metric",
    "PreferenceTask", "Probe", "Role", "RunOptions", "Task", "TaskResult", "TokenizedPair", "as_questions", "evaluate", "few_rows",
    "logits_differ", "validate_tasks",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
