"""Evaluation before and after training: lm-eval tasks and answer likelihoods on a live model, over all ranks.

from lora_null.eval_harness import AnswerTask, LmEvalTask, evaluate

before = evaluate(model, tokenizer, ["nq_open", LmEvalTask("webqs", path="test.jsonl", fields={"answers": "answer"})])
before.metrics["nq_open"]  # {"value": …, "stderr": …, "n": …, …}
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from torch import nn

from lora_null.eval_harness.likelihood import ratio_estimate, score_answers, tokenize_pairs
from lora_null.eval_harness.lm_eval.lm_tasks import TASK_FILES, prepare, result_names, validate_tasks
from lora_null.eval_harness.lm_eval.merged import merged_if_faster
from lora_null.eval_harness.lm_eval.model import ShardedLM, quiet
from lora_null.eval_harness.mt_bench.questions import MTBenchTask
from lora_null.eval_harness.preferences import PreferenceTask
from lora_null.eval_harness.tasks import AnswerTask, LmEvalTask, OwnTask, RunOptions, Task, describe, list_tasks
from lora_null.utils.distributed import broadcast, device_of, get_logger, rank_and_world, together
from lora_null.utils.errors import UserError
from lora_null.utils.limits import position_limit, tokenizer_of
from lora_null.utils.model_state import own_precision, preserve, seed_everything

logger = get_logger(__name__)

__all__ = [
    "TASK_FILES",
    "AnswerTask",
    "Evaluation",
    "LmEvalTask",
    "MTBenchTask",
    "OwnTask",
    "PreferenceTask",
    "assert_logits_differ",
    "evaluate",
    "validate_tasks",
]

PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets")
BOOTSTRAP_ITERATIONS = 1000  # for metrics without a formula for their standard error


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: {name: {"value", "stderr", "n", "higher_is_better", "role", "unit"}}. "unit" is "fraction", "nats" per
            answer token, or, for a metric of lm-eval that is neither, the metric's own name. "stderr" is None where
            there is none.
        settings: everything that must be the same in two evaluations for their metrics to be comparable.
        seconds: wall-clock time, on rank 0.
        samples: {name: one number per document or question, in order}, for paired comparisons: lm-eval's metric, or the
            question's mean nats per answer token. Only for metrics that have them.
    """

    metrics: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    samples: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return this evaluation as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __or__(self, other: Evaluation) -> Evaluation:
        """Return two evaluations of one model, of different tasks, as one; the settings are this one's."""
        tasks = self.settings["tasks"] | other.settings["tasks"]
        settings = self.settings | {"backend": other.settings["backend"], "tasks": tasks}
        metrics, samples = self.metrics | other.metrics, self.samples | other.samples
        return Evaluation(metrics, settings, self.seconds + other.seconds, samples)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Return the evaluation that `to_json` wrote."""
        return cls(**json.loads(text))


def evaluate(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[LmEvalTask | AnswerTask | str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    reference_dir: Path | str | None = None,
    record_reference: bool = False,
    seed: int = 1234,
    autocast_dtype: torch.dtype | None = None,
    output_dir: Path | str | None = None,
    lm: LM | None = None,
) -> Evaluation:
    """Evaluate a live model; leave it, the tokenizer and all random states as they were.

    Under torch.distributed, every rank calls this with the same arguments; the work is shared (so a model whose
    parameters are whole on each rank), and every rank returns the same metrics.

    Args:
        model: a `PreTrainedModel` or `PeftModel` on its device.
        tokenizer: its tokenizer, or its processor.
        tasks: what to evaluate; a plain name is an `LmEvalTask`.
        limit: the most documents or pairs of each task, also of one that allows itself more.
        batch_size: sequences in a forward pass, on each rank. Scores move slightly with it: keep it.
        reference_dir: the folder of the base model's predictions, for `AnswerTask(kl=True)`.
        record_reference: this is the base model: write its predictions into `reference_dir`. Its KL is 0.
        seed: for sampling few-shot examples and for tasks that sample their generations; lm-eval's own default.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        output_dir: where tasks may leave what they made (MT-Bench its answers).
        lm: another engine with the same weights for the tasks of lm-eval, such as `open_vllm` gives; None uses `model`.

    Returns:
        The metrics. A KL is missing where no reference was recorded.

    Raises:
        UserError: for mistakes in the tasks (see `validate_tasks`), or a reference for other pairs or another vocabulary.
    """
    began, tasks, tokenizer = time.perf_counter(), list_tasks(tasks), tokenizer_of(tokenizer)
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if record_reference and reference_dir is None:
        raise UserError("record_reference needs reference_dir, the folder to record into")
    metrics, samples, described, merge = {}, {}, {}, None
    base_options = RunOptions(
        limit=limit,
        batch_size=batch_size,
        autocast_dtype=autocast_dtype,
        seed=seed,
        reference_dir=None if reference_dir is None else Path(reference_dir),
        record_reference=record_reference,
        output_dir=None if output_dir is None else Path(output_dir),
    )
    with preserve(model, tokenizer), own_precision(model), quiet(), torch.no_grad():
        model.eval()
        prepared = together(lambda: {t.key: prepare(t, seed) for t in tasks if isinstance(t, LmEvalTask)})
        for task in tasks:
            seed_everything(seed)
            own = getattr(task, "limit", None)
            options = replace(base_options, limit=min(filter(None, (own, limit)), default=None))
            loaded = prepared.get(task.key)
            with (
                merged_if_faster(model, merge)
                if lm is None and _generates(task, loaded)
                else nullcontext(merge) as merge
            ):
                found = _run(model, tokenizer, task, loaded, options, lm)
            task_metrics, task_samples, task_settings = broadcast(found)
            metrics |= task_metrics
            samples |= task_samples
            described[task.key] = describe(task, options.limit) | task_settings
    settings = _settings(model, batch_size, seed, autocast_dtype) | {"backend": "hf" if lm is None else "vllm"}
    settings |= {"merged_to_generate": bool(merge), "tasks": described}
    return Evaluation(metrics, settings, broadcast(time.perf_counter() - began), samples)


def _generates(task: Task, loaded: dict[str, Any] | None) -> bool:
    if loaded is None:
        return isinstance(task, OwnTask) and task.generates
    return any(leaf.OUTPUT_TYPE == "generate_until" for leaf in loaded["tasks"].values())


def _run(
    model: nn.Module, tokenizer: Any, task: Task, loaded: dict[str, Any] | None, options: RunOptions, lm: LM | None
) -> tuple[dict, dict, dict]:
    """Return (metrics, samples, more for the settings) of one task."""
    if isinstance(task, OwnTask):
        return task.run(model, tokenizer, options)
    if isinstance(task, AnswerTask):
        reference = _reference_path(task, options.reference_dir, options.record_reference)
        return _run_answers(model, tokenizer, task, reference, options)
    lm = lm or ShardedLM(model, tokenizer, options.batch_size, options.autocast_dtype)
    return _run_lm_eval(lm, task, loaded, options.limit)


def assert_logits_differ(model: nn.Module, tokenizer, text: str) -> None:
    """Check that the active adapter changes the model's predictions on `text`, so that a score is not the base's.

    Args:
        model: a `PeftModel`; it is left as it was.
        text: a few words that the tokenizer turns into at least one token.

    Raises:
        RuntimeError: if the logits with and without the adapter are equal.
        TypeError: if the model has no adapter to disable.
    """
    if not hasattr(model, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} has no adapter to disable; pass a PeftModel")
    inputs = tokenizer_of(tokenizer)(text, return_tensors="pt").to(device_of(model))
    with preserve(model), own_precision(model), torch.no_grad():
        model.eval()
        adapted = model(input_ids=inputs["input_ids"]).logits
        with model.disable_adapter():
            base = model(input_ids=inputs["input_ids"]).logits
    if torch.equal(adapted, base):
        raise RuntimeError(
            "the adapter changes nothing: logits with and without it are equal; was it loaded and enabled?"
        )


def _reference_path(task: AnswerTask, folder: Path | str | None, record: bool) -> Path | None:
    """Return the file of the base model's predictions for `task`; None if it has none, or there is none to read."""
    if not task.kl or folder is None:
        return None
    path = Path(folder, f"{quote(task.name, safe=' ')}.safetensors")
    return path if record or broadcast(path.is_file()) else None


def _run_answers(
    model: nn.Module,
    tokenizer,
    task: AnswerTask,
    reference: Path | None,
    options: RunOptions,
) -> tuple[dict, dict, dict]:
    """Return (metrics, samples, nothing more for the settings)."""
    limit = position_limit(model.config)
    beyond = limit.tokens if limit is not None and limit.hard else None
    pairs = tokenize_pairs(tokenizer, task.pairs[: options.limit], task.name, beyond)
    longest = max(len(pair.ids) for pair in pairs)
    if limit is not None and longest > limit.tokens:
        logger.warning(f"evaluation task {task.name!r}: a pair has {longest} tokens, {limit}")
    scores = score_answers(
        model,
        pairs,
        batch_size=options.batch_size,
        reference=reference,
        record=options.record_reference and reference is not None,
        autocast_dtype=options.autocast_dtype,
        progress=task.name,
    )
    metrics, samples = {}, {}
    for measure in ("nll", "kl"):
        if (sums := getattr(scores, measure)) is not None:
            value, stderr = ratio_estimate(sums, scores.tokens)
            metrics[f"{task.name} {measure}"] = _metric(value, stderr, len(pairs), False, task.role, "nats")
            samples[f"{task.name} {measure}"] = (sums / scores.tokens).tolist()
    return metrics, samples, {}


def _run_lm_eval(lm: LM, task: LmEvalTask, loaded: dict[str, Any], limit: int | None) -> tuple[dict, dict, dict]:
    """Return (metrics, samples, the versions and few-shot numbers of the tasks for the settings)."""
    results = evaluator.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS if rank_and_world()[0] == 0 else 0,  # rank 0's results are broadcast
        confirm_run_unsafe_code=task.confirm_run_unsafe_code,
        apply_chat_template=task.chat,
    )
    metrics, samples = {}, {}
    for name, (owner, metric, filter_) in result_names(task, loaded, results).items():
        scores, members = results["results"][owner], _members(owner, loaded)
        stderr = scores.get(f"{metric}_stderr,{filter_}")
        metrics[name] = _metric(
            float(scores[f"{metric},{filter_}"]),
            float(stderr) if isinstance(stderr, float | int | np.number) else None,  # lm-eval says "N/A"
            sum(results["n-samples"][leaf]["effective"] for leaf in members),
            results["higher_is_better"].get(owner, {}).get(metric),
            task.role,
            "fraction" if loaded["tasks"][members[0]].aggregation().get(metric) is mean else metric,
        )
        samples |= dict(_samples(name, metric, filter_, results["samples"].get(owner, [])))
    extra = {"versions": results["versions"], "num_fewshot": results["n-shot"]}
    return metrics, samples, json.loads(json.dumps(extra, default=str))


def _samples(name: str, metric: str, filter_: str, documents: list[dict]) -> Iterator[tuple[str, list[float]]]:
    """Yield the metric's value for each document, if it is one plain number for each."""
    values = [document.get(metric) for document in documents if document["filter"] == filter_]
    if values and all(isinstance(value, int | float | np.number) for value in values):
        yield name, [float(value) for value in values]


def _members(owner: str, loaded: dict[str, Any]) -> list[str]:
    """Return the names of the tasks in a group, or of the task itself."""
    group = (loaded.get("groups") or {}).get(owner)
    return [owner] if group is None else [task.task_name for task in group.get_all_tasks()]


def _metric(
    value: float, stderr: float | None, n: int, higher_is_better: bool, role: str, unit: str
) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "n": n,
        "higher_is_better": higher_is_better,
        "role": role,
        "unit": unit,
    }


def _settings(model: nn.Module, batch_size: int, seed: int, autocast_dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "dtype": str(model.dtype),
        "autocast_dtype": None if autocast_dtype is None else str(autocast_dtype),
        "batch_size": batch_size,
        "ranks": rank_and_world()[1],
        "device": device_of(model).type,
        "seed": seed,
    }
