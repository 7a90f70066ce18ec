"""A few questions about what should be kept, answered by the base and by every method, for the report to show side by side.

The questions are chosen by rule, not by hand: of the first retention task with known answers, those on which the
predictions moved most, and those in the middle. Only when every method has been measured is it known which these are,
so the saved adapters are loaded once more, one after another, on one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from lora_null.eval_harness import AnswerTask
from lora_null.eval_harness.generate import generate_texts
from lora_null.recipes.comparisons import Evaluations
from lora_null.recipes.environment import free_memory
from lora_null.recipes.job import Job
from lora_null.recipes.models.bases import base_to_run
from lora_null.recipes.results import Answered, Answers, Results
from lora_null.recipes.trained import weights_in
from lora_null.utils.distributed import on_first_process
from lora_null.utils.model_state import own_precision, preserve

MAX_NEW_TOKENS = 32


def side_by_side(job: Job, results: Results, evaluations: Evaluations) -> Answers | None:
    """Return the answers to `eval.examples` questions; None where nothing can be asked, or no weights were kept.

    All processes call this together; the evaluations behind the results are those of the first.
    """
    task = next((t for t in job.tasks if isinstance(t, AnswerTask) and t.role == "retention"), None)
    weights = {
        i: folder for i, row in enumerate(results.rows) if i and (folder := weights_in(job.folder / row.method))
    }
    if task is None or not weights:
        return None
    chosen = on_first_process(lambda: choose(results, evaluations, task.name, job.recipe.eval.examples))
    if not chosen:
        return None
    metric, questions = chosen
    prompts = [task.pairs[i][0] for i, _, _ in questions]
    texts = _answer(job, list(weights.values()), prompts, task.special_tokens)
    labels = results.labels()
    asked = [
        Answered(question=prompt.strip(), right=task.pairs[i][1].strip(), change=change, why=why, answers=list(each))
        for prompt, (i, change, why), each in zip(prompts, questions, zip(*texts))
    ]
    return Answers(task=task.name, metric=metric, labels=[labels[i] for i in (0, *weights)], questions=asked)


def choose(
    results: Results, evaluations: Evaluations, task: str, number: int
) -> tuple[str, list[tuple[int, float, str]]] | None:
    """Choose questions by how far their predictions moved, in the mean over the methods.

    Returns:
        The metric that tells (the KL, else the change of the NLL), and (question, change, why it was chosen): three of
        five are the largest changes, two the median ones, and in these shares for other numbers. None without samples.
    """
    for metric in (f"{task} kl", f"{task} nll"):
        base, *methods = (
            [evaluation.samples.get(metric) for evaluation in evaluations.get(i, {}).values()]
            for i in range(len(results.rows))
        )
        known = [np.array(samples) for of_row in methods for samples in of_row if samples]
        if base and base[0] and known and number:
            change = np.mean([np.abs(samples - np.array(base[0])) for samples in known], axis=0)
            return metric, _largest_and_median(change, number)
    return None


def _largest_and_median(change: np.ndarray, number: int) -> list[tuple[int, float, str]]:
    order = [int(i) for i in np.argsort(-change, kind="stable")]
    number = min(number, len(order))
    largest = order[: -(-3 * number // 5)]
    rest = order[len(largest) :]
    middle = max(0, len(order) // 2 - len(largest) - (number - len(largest)) // 2)
    start = min(middle, len(rest) - (number - len(largest)))
    median = rest[start : start + number - len(largest)]
    chosen = [(i, "largest change") for i in largest] + [(i, "median change") for i in median]
    return [(i, float(change[i]), why) for i, why in chosen]


def _answer(job: Job, folders: Sequence[Path], prompts: Sequence[str], special_tokens: bool) -> list[list[str]]:
    """Return the answers of the base and of every method; one model is held at a time.

    Args:
        job: of the run.
        folders: of the methods' weights.
        prompts: as the task asks them.
        special_tokens: whether the tokenizer puts its own into the prompts; not where these hold them.
    """
    base: Any = base_to_run(job.model)
    texts = [_generate(job, base, prompts, special_tokens)]
    for folder in folders:
        if folder.name == "adapter":
            base = base or base_to_run(job.model)
            model = PeftModel.from_pretrained(base, str(folder))
            texts.append(_generate(job, model, prompts, special_tokens))
            base = model.unload()
        else:
            model = base = None
            free_memory()
            model = base_to_run(job.model.at(folder))
            texts.append(_generate(job, model, prompts, special_tokens))
    return texts


def _generate(job: Job, model: Any, prompts: Sequence[str], special_tokens: bool) -> list[str]:
    with preserve(model, job.tokenizer), own_precision(model):
        model.eval()
        greedy = {"temperatures": [0.0] * len(prompts), "max_new_tokens": MAX_NEW_TOKENS}
        texts = generate_texts(model, job.tokenizer, prompts, special_tokens=special_tokens, **greedy)
    return [next(filter(None, map(str.strip, text.splitlines())), "") for text in texts]
