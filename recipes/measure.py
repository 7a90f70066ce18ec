"""What a run measures of a live model: the base before, each method after, its strengths, and whether it keeps a budget."""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE, state_of
from lora_null.adapters.saved import read_adapter
from lora_null.adapters.strength import Strength
from lora_null.adapters.truncate import MOST_LOST, balanced_where_they_cancel
from lora_null.eval_harness import Evaluation, Task, evaluate
from lora_null.eval_harness.lm_eval.vllm import open_vllm
from lora_null.eval_harness.tasks import reference_path
from lora_null.recipes import caches
from lora_null.recipes.budget import Measurement, check_budget
from lora_null.recipes.comparisons import compare, with_samples_of_groups
from lora_null.recipes.environment import free_memory
from lora_null.recipes.job import Job
from lora_null.recipes.models.bases import base_to_run
from lora_null.recipes.probes import probe_folder
from lora_null.recipes.report.dial import Dial, DialPoint, write_dial
from lora_null.recipes.results import EVAL_FILE, Row, Seconds
from lora_null.utils.distributed import get_logger, is_first_process, on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_json, write_safetensors, write_text

logger = get_logger(__name__)

# Settings of an evaluation that change its numbers slightly. Not the dtype, which full fine-tuning raises to float32.
COMPARED_SETTINGS = ("device", "ranks", "batch_size")


def evaluate_base(job: Job) -> Row:
    """Evaluate the untouched base, or read back what a run that shares it found."""
    found = None
    if job.recipe.eval.before and job.tasks:
        load = functools.cache(lambda: base_to_run(job.model))
        found = _find_or_measure(
            job.base, job.tasks, job.base_key, lambda: evaluate_live(job, load(), job.base, base=True)
        )
        if job.probe is not None:
            folder = probe_folder(job.base)
            probed = _find_or_measure(folder, job.probe.tasks, job.probe_key, lambda: _record_probe(job, load()))
            if job.budget is not None:
                check_budget(job.budget, probed, found)
        del load
        free_memory()
    unknown = ("rank", "trainable_params", "adapter_params", "drift", "tokens_per_second", "peak_memory_bytes")
    seconds = Seconds(init=None, train=None, eval=found.seconds if found else None)
    metrics = found.metrics if found else {}
    return Row(method="base", metrics=metrics, seconds=seconds, **dict.fromkeys(unknown))


def _find_or_measure(
    folder: Path, tasks: Sequence[Task], key: str | None, measure: Callable[[], Evaluation]
) -> Evaluation:
    """Return an evaluation of the base on tasks: the run's own, an earlier run's with the same settings, or a new one."""
    saved = folder / EVAL_FILE

    def restore() -> bool:
        files = [reference_path(folder, task.reference_file).name for task in tasks if task.reference_file]
        lost = next((file for file in files if not (folder / file).is_file()), None)
        if saved.is_file() and lost is None:
            return True
        if saved.is_file():
            print(f"base: {lost} is no longer in {folder}, it is measured again")
            saved.unlink()
        if fetched := key is not None and caches.fetch_base(key, folder, files):
            print("base: results of an earlier run with the same settings (eval.cache=false measures again)")
        return fetched

    if on_first_process(restore):  # which writes the file that the others would look for
        return Evaluation.read(saved)
    found = measure()
    if is_first_process() and key:
        caches.keep_base(key, folder, found)
    return found


def _record_probe(job: Job, model: Any) -> Evaluation:
    """Measure the base on the probed rows, with its noise, and write it down."""
    folder = probe_folder(job.base)
    options = {"reference_dir": folder, "record_reference": True, "progress": False}
    found = evaluate(model, job.tokenizer, job.probe.tasks, **options, **job.eval_options)
    if is_first_process():
        write_text(folder / EVAL_FILE, found.to_json())
    PartialState().wait_for_everyone()
    return found


def evaluate_live(job: Job, model: Any, folder: Path, *, base: bool) -> Evaluation:
    """Evaluate the live model in all processes and write `eval.json`, with the same settings before and after."""
    section = job.recipe.eval
    options = job.eval_options | {"limit": section.limit, "output_dir": folder}
    options |= {"reference_dir": job.base, "record_reference": base}
    outside = [task for task in job.tasks if section.backend == "vllm" and task.runs_on_engine]
    inside = [task for task in job.tasks if task not in outside]
    found = evaluate(model, job.tokenizer, inside, **options)
    if outside:
        found |= _evaluate_by_vllm(job, model, None if base else folder, outside, options)
    if not base and is_first_process() and (job.base / EVAL_FILE).is_file():
        before = Evaluation.read(job.base / EVAL_FILE).settings
        if other := differing_settings(before, found.settings, COMPARED_SETTINGS):
            logger.warning(
                f"{folder.name}: the base was measured under other settings ({other}); --overwrite measures both alike"
            )
    bad = next((name for name, metric in found.metrics.items() if not math.isfinite(metric.value)), None)
    if base and bad:
        raise UserError(
            f"model.name_or_path: {job.model.name} gives {found.metrics[bad].value} for {bad}; its weights are "
            f"damaged, or {job.recipe.model.dtype} is too narrow for them"
        )
    if is_first_process():
        write_text(folder / EVAL_FILE, found.to_json())
    return found


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return in words what differs between the settings of two evaluations: versions, also of this package, and `keys`."""

    def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
        packages = {name: settings["versions"].get(name, "unknown") for name in (*caches.PACKAGES, "lora-null")}
        return packages | {key: settings.get(key) for key in keys}

    old, new, shown = compared(before), compared(now), {"ranks": "processes"}
    return "; ".join(f"{shown.get(k, k)} {old[k]}, now {value}" for k, value in new.items() if value != old[k])


def _evaluate_by_vllm(
    job: Job, model: Any, folder: Path | None, tasks: list[Task], options: dict[str, Any]
) -> Evaluation:
    """Evaluate what is saved in a method's folder (None: the base), the live model out of the accelerator's memory."""
    device = model.device
    model.to("cpu")
    free_memory()
    adapter = folder / "adapter" if folder and (folder / "adapter").is_dir() else None
    whole = job.model.name if adapter or folder is None else str(folder / "model")
    rank = read_json(adapter / CONFIG_FILE)["r"] if adapter else 0
    section = job.recipe.model
    engine = {} if job.recipe.eval.vllm is None else job.recipe.eval.vllm.model_dump()
    engine |= {"dtype": section.dtype, "revision": section.revision, "trust_remote_code": section.trust_remote_code}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"  # with the recipe's own end token
        job.tokenizer.save_pretrained(tokenizer)
        if adapter is not None:
            adapter = _as_it_is_served(adapter, Path(scratch))
        lm = open_vllm(whole, adapter, rank=rank, tokenizer=tokenizer, **engine)
        found = evaluate(model, job.tokenizer, tasks, lm=lm, **options)
        del lm
    free_memory()
    model.to(device)
    return found


def _as_it_is_served(adapter: Path, scratch: Path) -> Path:
    """Return an adapter that 16 bits hold, as an export writes it: vLLM rounds factors to the model's dtype."""
    saved = read_adapter(adapter)
    pairs, lost = balanced_where_they_cancel(saved.pairs())
    if lost <= MOST_LOST:
        return adapter
    copied = Path(shutil.copytree(adapter, scratch / "adapter"))
    write_safetensors(copied / WEIGHTS_FILE, state_of(pairs), saved.metadata)
    return copied


def measure_strengths(
    job: Job, method: str, model: Any, out: Path, strengths: Sequence[float], known: Mapping[float, Evaluation] = {}
) -> Dial:
    """Evaluate a live adapter at the strengths, in ascending order, and write the folder `out`.

    ΔW times s is exact for every adapter that is a plain LoRA, so nothing is trained again. A strength at which something is
    not finite is left out, with a warning.

    Args:
        job: with the base evaluated.
        method: for the title.
        model: a PEFT model.
        out: the folder.
        strengths: to measure; at 0 it is the base.
        known: strength → what was measured already.
    """
    options = job.eval_options | {"limit": job.recipe.eval.limit, "reference_dir": job.base}
    strength, known = Strength(model), {**known, 0.0: Evaluation.read(job.base / EVAL_FILE)}
    measured = {}
    for value in sorted({0.0, *strengths}):
        found = known.get(value)
        if found is None:
            with strength.at(value):  # answers to be graded are kept for each
                found = evaluate(model, job.tokenizer, job.tasks, output_dir=out / f"strength={value:g}", **options)
        bad = next((name for name, m in found.metrics.items() if not math.isfinite(m.value + (m.stderr or 0))), None)
        if bad is not None:
            logger.warning(f"strength {value:g} is left out: {bad} is not a finite number there")
            continue
        measured[value] = found
    points = [DialPoint(strength=value, metrics=found.metrics) for value, found in measured.items()]
    seconds = sum(found.seconds for value, found in measured.items() if value not in known)
    found = Dial(method=method, model=job.recipe.model.name_or_path, points=points, seconds=seconds)
    found.paired = compare(
        found.results(), {i: {0: with_samples_of_groups(e)} for i, e in enumerate(measured.values())}
    )
    if is_first_process():
        write_dial(out, found)
    PartialState().wait_for_everyone()
    return found


def budget_measurement(job: Job, model: Any) -> Measurement:
    """Return what measures how a live model keeps the budget."""
    whole, probed = job.base, probe_folder(job.base)

    def measure(tasks: Sequence[Task]) -> Evaluation:
        complete = tasks == job.budget.tasks
        limits = {"limit": job.recipe.eval.limit, "reference_dir": whole} if complete else {"reference_dir": probed}
        return evaluate(model, job.tokenizer, tasks, **limits, **job.eval_options, progress=False)

    learning = [task for task in job.probe.tasks if task.role == "task"]
    bases = [Evaluation.read(folder / EVAL_FILE) for folder in (probed, whole)]
    return Measurement(measure, job.budget, *bases, learning)
