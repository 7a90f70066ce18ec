"""Run a recipe: check, evaluate the base, train and evaluate each method, report. Data flows one way."""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import set_seed

from lora_null.adapters.join import join_onto
from lora_null.adapters.saved import read_adapter
from lora_null.eval_harness import Evaluation, logits_differ
from lora_null.eval_harness.probe import STATE_FILE as PROBE_FILE
from lora_null.eval_harness.probe import Probe
from lora_null.layer import active_adapter
from lora_null.magnitude import norm_of_product, weight_changes
from lora_null.recipes import caches, output
from lora_null.recipes.budget import BudgetProbe, apply_budget
from lora_null.recipes.callbacks import (
    KeepCard,
    ProgressBar,
    ReleaseMemory,
    SaveOnSignal,
    StopDiverged,
    Trackers,
    WriteLog,
    diverged_at,
)
from lora_null.recipes.card import CARD_FILE, write_run_card
from lora_null.recipes.comparisons import compare, noise_of, read_evaluations
from lora_null.recipes.config.run_folder import CELLS_FOLDER
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.examples import describe_bad_rows
from lora_null.recipes.environment import environment, free_memory, peak_memory_bytes, reset_peak_memory
from lora_null.recipes.eval_tasks import templates_of
from lora_null.recipes.job import Job, check_run, check_same_everywhere, inputs_of, space_of_run
from lora_null.recipes.measure import budget_measurement, evaluate_base, evaluate_live, measure_strengths
from lora_null.recipes.models.bases import attention, base_to_run, base_to_shard, load_base_after, weight_reader
from lora_null.recipes.models.plan import MethodPlan, adapter_config, recipe_method
from lora_null.recipes.probes import probe_folder
from lora_null.recipes.repairs import repair_within, rows_of_task, what_is_left_alone, write_repaired
from lora_null.recipes.report import print_table, write_report
from lora_null.recipes.report.dial import DIAL_FOLDER
from lora_null.recipes.results import (
    EVAL_FILE,
    LOG_FILE,
    REPAIRED,
    ROW_FILE,
    Drift,
    Magnitude,
    Results,
    Row,
    Seconds,
    load_log,
    read_row,
    write_results,
    write_row,
)
from lora_null.recipes.side_by_side import side_by_side
from lora_null.recipes.trained import lost_of
from lora_null.recipes.training import TRAINERS, optimizer_steps, total_batch, training_arguments
from lora_null.start import InitOptions
from lora_null.store import REPORT_FILE, read_report
from lora_null.trainer import CalibrationArgs, LoraNullDPOTrainer, LoraNullSFTTrainer
from lora_null.trainer.calibration_data import padded_batches
from lora_null.trainer.checkpoints import checkpoints_in, last_checkpoint
from lora_null.trainer.methods.base import can_start_in_files
from lora_null.utils.distributed import get_logger, is_first_process, on_first_process, together
from lora_null.utils.errors import UserError, first_line
from lora_null.utils.files import link, replacing_folder, write_json
from lora_null.utils.sharding import count, is_launched_with_fsdp2

logger = get_logger(__name__)

AnyTrainer = LoraNullSFTTrainer | LoraNullDPOTrainer


def run(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, allow_code_execution: bool | str = False
) -> Path:
    """Run the recipe and return its output folder; `allow_code_execution` is the consent that code tasks need.

    Raises:
        UserError: a mistake in the recipe, its data or its output folder; all that can be known before a model loads
            is reported before.
    """
    output.check_output_folder(recipe, resume=resume, overwrite=overwrite)
    job = together(lambda: check_run(recipe, allow_code_execution=allow_code_execution))
    check_same_everywhere(job)
    inputs = functools.partial(inputs_of, job)
    with output.hold_output_folder(recipe, space_of_run(job), inputs, resume=resume, overwrite=overwrite):
        if not job.tasks and is_first_process():
            print("nothing to evaluate: eval.retention and eval.task are empty")
        results = run_job(job)
    if is_first_process():
        print_table(results)
        print(f"report: {job.folder / output.PAGE_FILE}")
    return job.folder


def run_job(job: Job, after_row: Callable[[Row], None] | None = None) -> Results:
    """Evaluate the base, train and evaluate each method, write results and report; return the results."""
    if job.data.bad and is_first_process():
        write_json(job.folder / output.SKIPPED_FILE, [asdict(row) for row in job.data.bad])
    rows = [evaluate_base(job)]
    if job.windows is None and job.reads_texts:
        # The base writes the texts that it calibrates on, or those that it wrote for an equal recipe are taken.
        cache = job.recipe.calibration.cache
        job.use_windows(caches.written_windows(job.model, job.tokenizer, job.sources, job.calibration_args, cache))
        free_memory()
    for plan in job.plans:
        if plan.name not in job.recipe.method.name:
            continue  # the job is shared by the runs of a grid, and this run trains other methods
        if is_first_process() and not (job.folder / plan.name / CARD_FILE).is_file():
            write_run_card(job.folder / plan.name, job.recipe, plan, None)
        trained = _train_method(job, plan, rows[0])
        free_memory()  # the trainer, which nothing refers to any more
        made = [trained]
        if job.recipe.repairs and trained.diverged is None:
            made = _repair_method(job, plan, trained)
            free_memory()
        rows += made
        if is_first_process():
            # Also of a method that was finished before: the removal may have been killed.
            for checkpoint in [] if job.keep_weights else checkpoints_in(job.folder / plan.name):
                shutil.rmtree(checkpoint)
            for row in made:
                write_run_card(job.folder / row.method, job.recipe, plan, _results(job, [rows[0], row]))
        if after_row is not None:
            after_row(rows[-1])
    results = _results(job, rows)
    evaluations = read_evaluations(job.folder, results, base=job.base) if is_first_process() else {}
    results.paired, results.noise = compare(results, evaluations), noise_of(evaluations)
    results.answers = side_by_side(job, results, evaluations)
    if is_first_process():
        write_results(job.folder, results)
        write_report(job.folder)
    PartialState().wait_for_everyone()
    return results


def _results(job: Job, rows: list[Row]) -> Results:
    about = {"recipe": job.recipe.name, "model": job.model.name, "seed": job.recipe.seed}
    return Results(**about, environment=environment(), settings=_settings(job), rows=rows)


def _train_method(job: Job, plan: MethodPlan, base: Row) -> Row:
    """Train and evaluate one method; a finished one is read back."""
    folder = job.folder / plan.name
    finished = on_first_process(lambda: _finished_row(job, folder))  # whose file system has it first
    if finished is not None:
        return finished
    if is_first_process():  # what was repaired is of the adapter that is trained anew
        (job.folder / REPAIRED.format(plan.name) / ROW_FILE).unlink(missing_ok=True)
    reset_peak_memory()
    trainer = _make_trainer(job, plan, folder)
    probe = _add_probe(job, trainer, folder)
    trackers = Trackers(trainer)
    checkpoint = on_first_process(lambda: last_checkpoint(folder))
    init_before = 0.0 if checkpoint is None else _init_before(job, plan, folder)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except (pickle.UnpicklingError, SafetensorError) as error:  # pickled code in a checkpoint is never run
        if checkpoint is None:
            raise
        raise UserError(
            f"{checkpoint}: cannot be read ({first_line(error)}); remove it and --resume takes the one before"
        ) from None
    train = next(c.seconds for c in trainer.callback_handler.callbacks if isinstance(c, WriteLog))
    seconds = Seconds(init=init_before + trainer.init_seconds, train=train, eval=None)
    row = _save_and_evaluate(job, plan, trainer, probe, seconds)
    trackers.finish(base, row)
    if is_first_process():
        write_row(folder, row)
        if row.budget is not None:
            print(f"{plan.name}: {row.budget.sentence()}")
    PartialState().wait_for_everyone()
    return row


def _repair_method(job: Job, plan: MethodPlan, trained: Row) -> list[Row]:
    """Put beside a trained adapter its repair that keeps the budget, evaluate that, and return the rows of both.

    An adapter that keeps the budget as it is stays alone. What is finished is read back.
    """
    if trained.budget is not None:
        return [trained]
    name = REPAIRED.format(plan.name)
    folder = job.folder / name
    finished = read_row(folder)
    if finished is not None and lost_of(folder, finished) is None:
        return [trained, finished]
    adapter = read_adapter(job.folder / plan.name / "adapter")
    rows = rows_of_task(job.recipe, job.data.examples, job.tokenizer)
    batches = [padded_batches(ids, job.tokenizer.pad_token_id) for ids in (job.windows.ids, rows)]
    made, held, model = repair_within(job, base_to_run(job.model), adapter, *batches)
    if not made.weight:
        trained = trained.model_copy(update={"budget": held})
        write_row(job.folder / plan.name, trained)
        print(f"{plan.name}: {held.sentence()}")
        return [trained]
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # of a run that was killed after it had saved
    with replacing_folder(folder / "adapter") as saved:
        purpose = f"{what_is_left_alone(job.recipe.calibration)} and do what it does on its training rows"
        write_repaired(saved, adapter, made, plan.name, purpose)
        job.tokenizer.save_pretrained(saved)
    found = evaluate_live(job, model, folder, base=False)
    row = Row(
        method=name,
        rank=trained.rank,
        trainable_params=trained.trainable_params,
        adapter_params=trained.adapter_params,
        metrics=found.metrics,
        magnitude=_magnitude_of_saved(job, folder / "adapter"),
        seconds=Seconds(eval=found.seconds),
        budget=held,
    )
    write_row(folder, row)
    print(f"{name}: {held.sentence()}")
    return [trained, row]


def _finished_row(job: Job, folder: Path) -> Row | None:
    """Return the row of a finished method; of one that is not finished, or no longer whole, there is none afterward."""
    row = read_row(folder)
    lost = row and lost_of(folder, row, keeps_weights=job.keep_weights)
    if not lost:
        return row
    begins = "goes on from its last checkpoint" if last_checkpoint(folder) else "is trained again"
    logger.warning(f"{folder}: was finished and its {lost} is gone; the method {begins}")
    (folder / ROW_FILE).unlink()
    return None


def _init_before(job: Job, plan: MethodPlan, folder: Path) -> float:
    """Return the seconds of the initialization that a method has computed before it was killed; zero of a shared one."""
    own = plan.name not in job.shared_init and (folder / "init" / REPORT_FILE).is_file()
    return read_report(folder / "init").get("seconds", {}).get("all", 0.0) if own else 0.0


def _save_and_evaluate(job: Job, plan: MethodPlan, trainer: AnyTrainer, probe: Probe | None, seconds: Seconds) -> Row:
    """Apply the budget, save, evaluate, and return the method's row; one that diverged is neither saved nor evaluated."""
    folder = job.folder / plan.name
    model = trainer.accelerator.unwrap_model(trainer.model)
    diverged = diverged_at(trainer)
    kept, saved, found, magnitude = None, None, None, None
    if diverged is None:
        if isinstance(probe, BudgetProbe):
            kept = apply_budget(budget_measurement(job, model), probe, model)
            before = read_row(job.previous[plan.name]) if plan.name in job.previous else None
            if before and not before.is_base_again:
                kept.task = job.recipe.name
            if kept.strength and not _has_moved(trainer, model):
                kept.step = 0  # a warmup's first step moves nothing: its state is that before
        saved = _save(job, plan, trainer, folder)
        magnitude = _magnitude(job, plan, trainer, model)  # of a later task read from what was saved
        back_at_start = kept is not None and kept.left_nothing
        if hasattr(model, "disable_adapter") and trainer.something_moved and not back_at_start:
            _warn_if_nothing_changed(job, plan, model)
        if job.recipe.eval.backend == "vllm":
            _drop_optimizer(trainer)
        found = evaluate_live(job, model, folder, base=False) if job.tasks else None
    if found and not all(math.isfinite(metric.value) for metric in found.metrics.values()):
        diverged, found = trainer.state.global_step, None  # finite weights that overflow on other texts
    if found and job.recipe.eval.strengths:
        measure_strengths(job, plan.name, model, folder / DIAL_FOLDER, job.recipe.eval.strengths, {1.0: found})
    if found:
        seconds.eval = found.seconds
    drift = trainer.drift_meter.summary() if trainer.drift_meter and diverged is None else None
    return Row(
        method=plan.name,
        rank=plan.rank,
        trainable_params=sum(count(p) for p in model.parameters() if p.requires_grad),
        adapter_params=saved if plan.saves == "adapter" else None,
        diverged=diverged,
        metrics=found.metrics if found else {},
        drift=drift and Drift(**drift),
        magnitude=magnitude if diverged is None else None,
        seconds=seconds,
        tokens_per_second=load_log(folder / LOG_FILE).tokens_per_second,
        peak_memory_bytes=peak_memory_bytes(),
        **({"budget": kept} if kept else {}),
    )


def _warn_if_nothing_changed(job: Job, plan: MethodPlan, model: Any) -> None:
    """Say where the adapter has moved, and the model predicts what the base does to the last bit."""
    if not logits_differ(model, job.tokenizer, job.data.examples[0].written.text):
        logger.warning(
            f"{plan.name}: on the first training row it predicts what the base does, bit for bit: its change is below "
            f"the rounding of {job.recipe.model.dtype}; more steps, or a higher training.learning_rate, change more"
        )


def _drop_optimizer(trainer: AnyTrainer) -> None:
    """Free what the optimizer holds on the accelerator, of which vLLM takes a share of the whole when it starts."""
    for owner in (trainer, trainer.callback_handler):
        owner.optimizer = owner.lr_scheduler = None
    trainer.accelerator.free_memory()


def _has_moved(trainer: AnyTrainer, model: PeftModel) -> bool:
    """Return whether any weight is not where this training found it; the same on every process."""
    changes = weight_changes(trainer.method.layers(model), active_adapter(model))
    return any(change.moved for change in changes.values())


def _magnitude(job: Job, plan: MethodPlan, trainer: AnyTrainer, model: Any) -> Magnitude | None:
    """Return how far the weights of the method's layers are from the base's, read anew where the live model has others.

    In a sequence these hold the tasks before, and the saved adapter is the change of them all.
    """
    adapted = isinstance(model, PeftModel)
    goes_on = adapted and plan.saves == "adapter" and plan.name in job.previous
    if goes_on:
        return _magnitude_of_saved(job, job.folder / plan.name / "adapter") if is_first_process() else None
    original = weight_reader(job.model) if is_first_process() and not adapted else None
    changes = weight_changes(trainer.method.layers(model), active_adapter(model), original)
    return Magnitude.of(changes) if is_first_process() else None


def _magnitude_of_saved(job: Job, folder: Path) -> Magnitude | None:
    """Return how far a saved adapter takes the weights of its layers from the original base's."""
    saved, original = read_adapter(folder), weight_reader(job.model)
    moved = {name: abs(saved.scaling(name)) * norm_of_product(*pair) for name, pair in saved.pairs().items()}
    return Magnitude.of({name: (size, float(original(name).double().norm())) for name, size in moved.items()})


def _save(job: Job, plan: MethodPlan, trainer: AnyTrainer, folder: Path) -> int | None:
    """Write METHOD/adapter or METHOD/model from the main process; return the number of parameters, None if not kept."""
    if not job.keep_weights:
        return None
    model, target = trainer.accelerator.unwrap_model(trainer.model), folder / plan.saves
    if is_first_process():
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed after it had saved
    with replacing_folder(target) if is_first_process() else contextlib.nullcontext(target) as made:
        with trainer.whole_to_save():  # on all processes together
            if not is_first_process():
                return plan.saved
            saved = trainer.method.save(model, made)
        if plan.name in job.previous and plan.saves == "adapter":
            saved = join_onto(job.previous[plan.name] / "adapter", made)  # all tasks so far, for the original base
        shutil.copyfile(folder / CARD_FILE, made / CARD_FILE)
        job.tokenizer.save_pretrained(made)
    return saved


def _make_trainer(job: Job, plan: MethodPlan, folder: Path) -> AnyTrainer:
    recipe = job.recipe
    windows = job.windows.ids if job.windows else []
    named = {"run_name": _run_name(job, plan)} if recipe.training.get("report_to", "none") != "none" else {}
    arguments = training_arguments(recipe, folder, **named)
    method = recipe_method(recipe, plan.name)
    windows = windows + (job.earlier_rows if method.rereads_texts else [])
    reuses = _copy_initialization(job, plan, folder)
    config = adapter_config(recipe.method, method, plan.rank)
    if config is not None:
        config.revision = recipe.model.revision  # by which PEFT and others load the base
    before, weights = job.previous.get(plan.name), None
    set_seed(recipe.seed)  # so that a start drawn at random depends on the seed alone, not on what ran before
    if (
        before is None
        and not recipe.model.quantization
        and is_launched_with_fsdp2()
        and can_start_in_files(config, method, arguments)
    ):
        model, weights = base_to_shard(job.model)
    else:
        model = load_base_after(job.model, before)
    start = InitOptions(
        cache=recipe.calibration.cache,
        seed=recipe.seed,
        weights=weights,
        earlier=tuple(job.earlier.get(plan.name, ())),
        knowledge=job.knowledge,
    )
    reference = {}
    if recipe.trainer == "dpo" and config is None and not arguments.precompute_ref_log_probs:
        # TRL would load it by the model's path alone: of another revision, without code of its own.
        reference = {"ref_model": load_base_after(job.model, before)}
    trainer = TRAINERS[recipe.trainer].trainer(
        model=model,
        args=arguments,
        **reference,
        train_dataset=job.data.rows,
        processing_class=job.tokenizer,
        peft_config=config,
        method=method,
        decay_to_start=recipe.method.decay_to_start,
        reuse_init=reuses,
        init_folder=recipe.method.init,
        preflight=recipe.preflight,
        init_options=start,
        calibration_dataset=[{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows] or None,
        calibration_args=CalibrationArgs(max_length=max(map(len, windows))) if windows else None,
    )
    for callback in ProgressBar.REPLACES:
        trainer.remove_callback(callback)
    log = WriteLog(folder / LOG_FILE, method.terms)
    card = KeepCard(folder / CARD_FILE)
    trainer.create_model_card = card.put_back  # in place of a stub that knows no data and no results
    for callback in (StopDiverged(), SaveOnSignal(), ReleaseMemory(), ProgressBar(plan.name), log, card):
        trainer.add_callback(callback)
    return trainer


def _add_probe(job: Job, trainer: AnyTrainer, folder: Path) -> Probe | None:
    """Let the trainer measure the recipe's probes while it trains, and keep the budget where there is one.

    After the log's callback: that one begins the log anew before the first step is measured.
    """
    if job.probe is None:
        return None
    section, folder_of_base = job.probe.section, probe_folder(job.base)
    options = job.eval_options | {"every": section.every, "share": section.share, "every_file": folder / PROBE_FILE}
    options |= {"tokenizer": job.tokenizer, "reference_dir": folder_of_base}
    if job.budget is None or job.recipe.repairs:
        probe = Probe(trainer, job.probe.tasks, **options)
    else:
        base = Evaluation.read(folder_of_base / EVAL_FILE)
        probe = BudgetProbe(trainer, job.probe.tasks, job.budget, base, **options)
    trainer.add_callback(probe)
    return probe


def _run_name(job: Job, plan: MethodPlan) -> str:
    """Return what a tracker calls the training of one method: the recipe, the method, and a grid's settings."""
    parts = job.folder.parts
    cell = parts[parts.index(CELLS_FOLDER) + 1 :] if CELLS_FOLDER in parts else ()
    return " ".join((job.recipe.training.get("run_name") or job.recipe.name, plan.name, *cell))


def _copy_initialization(job: Job, plan: MethodPlan, folder: Path) -> bool:
    """Copy the initialization of a finished run that started in the same way; return whether there was one."""
    source = job.shared_init.get(plan.name)
    if source is None or not on_first_process(lambda: (source / "init" / REPORT_FILE).is_file()):
        return False
    if is_first_process():
        shutil.copytree(source / "init", folder / "init", dirs_exist_ok=True, copy_function=link)
    PartialState().wait_for_everyone()
    return True


def _settings(job: Job) -> dict[str, Any]:
    recipe = job.recipe
    training = training_arguments(recipe, job.folder)
    batch, rows = total_batch(training), len(job.data.rows)
    own_rows = {name: recipe_method(recipe, name).rows_trained_on(rows) for name in recipe.method.name}
    steps = {name: optimizer_steps(training, count) for name, count in own_rows.items() if count != rows}
    rank = f"matched to {recipe.method.match}" if recipe.method.match else recipe.method.rank
    texts = job.windows if job.calibrates else None  # start and drift are else those of method.init
    allowed = [f"{bound.at_most:g} of {bound.measure}" for bound in job.budget.bounds] if job.budget else []
    return {
        "learning_rate": training.learning_rate,
        "schedule": training.lr_scheduler_type.value,
        "optimizer_steps": optimizer_steps(training, rows),
        **{f"optimizer_steps_of_{name}": count for name, count in steps.items() if training.max_steps <= 0},
        "weight_decay": training.weight_decay,
        "batch": batch,
        "budget": f"at most {' and '.join(allowed)}, {job.budget.then}" if job.budget else None,
        "max_length": training.max_length,
        "training_rows": rows,
        "rows_left_out": describe_bad_rows(job.data.bad) or None,
        "rows_cut": job.data.cut or None,
        "training_data": recipe.data.path,
        "trainer": recipe.trainer,
        "template": templates_of(job.tasks, recipe.data.template),
        "rank": rank,
        "alpha": recipe.method.alpha or rank,
        "calibration_data": "; ".join(texts.covered) if texts else f"that of {recipe.method.init}",
        "calibration_windows": len(texts.ids) if texts else None,
        "calibration_tokens": sum(map(len, texts.ids)) if texts else None,
        "calibration_mode": ", ".join(recipe.calibration.modes) if texts else None,
        "revision": recipe.model.revision,
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
        "mixed_precision": training.mixed_precision,
        "attention": attention(recipe.model, job.model.config),
        **{key: text for task in job.tasks for key, text in task.report_notes().items()},
    }
