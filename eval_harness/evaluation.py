"""Evaluate a live model on a list of tasks."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from lora_null import __version__
from lora_null.eval_harness.lm_eval.model import lm_eval_silenced
from lora_null.eval_harness.lm_eval.task import LmEvalTask
from lora_null.eval_harness.results import Evaluation, TaskResult
from lora_null.eval_harness.statistics import is_mean_of_samples, weighted_mean
from lora_null.eval_harness.tasks import RunOptions, Task
from lora_null.utils.distributed import broadcast, device_of, num_processes, together
from lora_null.utils.errors import UserError
from lora_null.utils.limits import check_float64
from lora_null.utils.model_state import own_precision, preserve
from lora_null.utils.tokens import tokenizer_of

if TYPE_CHECKING:
    from lm_eval.api.model import LM

FEW_TOKENS = 64
PACKAGES = ("torch", "transformers", "peft", "lm_eval", "datasets", "math-verify")


@functools.cache  # reading takes milliseconds, and probes ask again and again
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that an evaluation's numbers depend on, with a hash of this one's code."""
    own = f"{__version__} (evaluation code {code_hash()[:8]})"
    return {package: importlib.metadata.version(package) for package in PACKAGES} | {"lora-null": own}


@functools.cache
def code_hash() -> str:
    """Return a hash of all code and tasks of the evaluation."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".yaml", ".json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def validate_tasks(tasks: Sequence[Task | str] | Task | str) -> list[Task]:
    """Check everything about `tasks` that needs no model, and return them with plain names turned into `LmEvalTask`s.

    Raises:
        UserError: two tasks of the same name or with a metric of the same name, or what a task's own `check` finds.
    """
    tasks = [tasks] if isinstance(tasks, str | Task) else tasks
    tasks = [LmEvalTask(task) if isinstance(task, str) else task for task in tasks]
    keys = [task.key for task in tasks]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"evaluation task {twice!r} is listed twice; give one of them another name")
    writers = {task.output_folder: task for task in tasks if task.output_folder}
    if other := next((task for task in tasks if task.output_folder and writers[task.output_folder] is not task), None):
        raise UserError(
            f"{other}: {writers[other.output_folder].label!r} would write over its {other.output_folder}; "
            "evaluate one alone"
        )
    owners: dict[str, Task] = {}
    for task in tasks:
        task.check()
        for name in task.all_metric_names:
            if (other := owners.setdefault(name, task)) is not task:
                raise UserError(f"{task}: {name!r} is measured by {other.label!r} too; give one of them another name")
    return tasks


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task | str] | Task | str,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    reference_dir: Path | str | None = None,
    record_reference: bool = False,
    seed: int = 1234,
    autocast_dtype: torch.dtype | None = None,
    output_dir: Path | str | None = None,
    lm: LM | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a live model; leave it, the tokenizer and all random states as they were.

    Under torch.distributed, every process calls this with the same arguments; the work is shared (so a model whose
    parameters are whole in each process), and every process returns the same metrics.

    Args:
        model: a `PreTrainedModel` or `PeftModel` on its device.
        tokenizer: its tokenizer, or its processor.
        tasks: what to evaluate; a plain name is an `LmEvalTask`.
        limit, batch_size, autocast_dtype, seed, progress: see `RunOptions`. Scores move slightly with the batch size: keep
            it. The seed samples few-shot examples and generations; 1234 is lm-eval's own.
        reference_dir: the folder of the base model's predictions, for `AnswerTask(kl=True)` and `PreferenceTask`.
        record_reference: this is the base model: write its predictions into `reference_dir`. Its KL is 0, and it is
            measured again in other batches, for `Evaluation.noise`.
        output_dir: where tasks may leave what they made (MT-Bench its answers).
        lm: another engine with the same weights for the tasks of lm-eval, such as `open_vllm` gives; None uses `model`.

    Returns:
        The metrics. A KL is missing where no reference was recorded.

    Raises:
        UserError: for mistakes in the tasks (see `validate_tasks`), or a reference for other pairs or another vocabulary.
    """
    began, tokenizer = time.perf_counter(), tokenizer_of(tokenizer)
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{name}: must be a whole number of at least 1, not {value!r}")
    check_float64(model.device)
    if record_reference and reference_dir is None:
        raise UserError("record_reference needs reference_dir, the folder to record into")
    options = RunOptions(
        limit=limit,
        batch_size=batch_size,
        autocast_dtype=autocast_dtype,
        seed=seed,
        reference_dir=None if reference_dir is None else Path(reference_dir),
        record_reference=record_reference,
        output_dir=None if output_dir is None else Path(output_dir),
        engine=lm,
        progress=progress,
    )
    noise, described = {}, {}
    kinds = {name: {} for name in ("metrics", "samples", "weights", "group_samples")}
    with preserve(model, tokenizer), own_precision(model), lm_eval_silenced(), torch.no_grad():
        model.eval()
        for task in together(lambda: validate_tasks(tasks)):
            set_seed(seed)
            batch = min(filter(None, (task.max_batch_size, batch_size)))
            task_options = replace(options, limit=task.effective_limit(limit), batch_size=batch)
            found = broadcast(task.run(model, tokenizer, task_options))
            for name, of_all_tasks in kinds.items():
                of_all_tasks.update(getattr(found, name))
            if record_reference:
                noise |= _noise(task, found, model, tokenizer, task_options)
            described[task.key] = task.describe(task_options.limit) | found.settings
    settings = {
        "versions": package_versions(),
        "dtype": str(model.dtype),
        "autocast_dtype": None if autocast_dtype is None else str(autocast_dtype),
        "batch_size": batch_size,
        "ranks": num_processes(),  # so named wherever an eval.json has been kept
        "device": device_of(model).type,
        "seed": seed,
        "backend": "hf" if lm is None else "vllm",
        "tasks": described,
    }
    return Evaluation(settings=settings, seconds=broadcast(time.perf_counter() - began), noise=noise, **kinds)


def _noise(task: Task, first: TaskResult, model: nn.Module, tokenizer: Any, options: RunOptions) -> dict[str, float]:
    """Measure a base model again in batches of another size; return by how much each mean over the same documents changed.

    Other batches add in another order and pad otherwise, which changes rounding and nothing else: a change of a method
    that is no larger says nothing. It is not measured where each answer costs money, nor on another engine.
    """
    if task.noise_documents == 0 or (options.engine is not None and task.runs_on_engine):
        return {}
    limit = min(filter(None, (task.noise_documents, options.limit)), default=None)
    set_seed(options.seed)
    rows = min(len(max(first.samples.values(), key=len, default=())), limit or math.inf)
    batch = min(options.batch_size, math.ceil(rows / num_processes())) // 2 or 2  # of one that holds all, half too
    options = replace(options, limit=limit, batch_size=batch, record_reference=False)
    again = broadcast(task.run(model, tokenizer, options))
    names = [name for name in again.samples if is_mean_of_samples(first, name) and task.has_noise(name)]
    both = {name: len(again.samples[name]) for name in names}
    return {name: abs(float(_head_mean(first, name, n) - _head_mean(again, name, n))) for name, n in both.items()}


def _head_mean(found: TaskResult, name: str, n: int) -> np.ndarray:
    weights = found.weights.get(name)
    return weighted_mean(np.array(found.samples[name][:n]), weights and weights[:n])


def logits_differ(model: nn.Module, tokenizer: Any, text: str) -> bool:
    """Return whether the active adapter changes the model's predictions on `text`, so that a score is not the base's.

    A change below the rounding of a 16-bit base changes none.

    Args:
        model: a `PeftModel`; it is left as it was.
        tokenizer: its tokenizer, or its processor.
        text: words that the tokenizer turns into at least one token; the first 64 tokens are enough.

    Raises:
        TypeError: if the model has no adapter to disable.
    """
    if not hasattr(model, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} has no adapter to disable; pass a PeftModel")
    ids = tokenizer_of(tokenizer)(text, return_tensors="pt")["input_ids"][:, :FEW_TOKENS].to(device_of(model))
    with preserve(model), own_precision(model), torch.no_grad():
        model.eval()
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    return not torch.equal(adapted, base)
