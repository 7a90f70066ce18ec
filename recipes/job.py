"""What a run needs, checked before any weight is loaded: rows, windows, tasks, the methods' plans, TRL's arguments."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, SFTConfig

from lora_null.adapters.base_hash import base_fingerprint, checkpoint_on_disk
from lora_null.earlier_tasks import Earlier
from lora_null.eval_harness import PreferenceTask, Task, validate_tasks
from lora_null.recipes import caches
from lora_null.recipes.budget import BudgetPlan, check_strength, plan_budget
from lora_null.recipes.checks import (
    check_answers_end,
    check_engines,
    check_evaluation,
    check_last_batch,
    check_packages,
    check_start,
    check_task_names,
    check_weights,
    reference_bytes,
    rehearse,
    tell_of_shared_rows,
)
from lora_null.recipes.config.load import CONFIGURATION_KEYS, dump, without_folders
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.calibration import Source, Windows, calibration_sources, cut_windows, window_args
from lora_null.recipes.data.examples import TrainingData, tokenize
from lora_null.recipes.environment import choose_precision
from lora_null.recipes.eval_tasks import EvalContext, eval_tasks, probe_tasks
from lora_null.recipes.models.bases import Base, hub_commit, known_shape, load_tokenizer
from lora_null.recipes.models.plan import MethodPlan, adapter_config, plan_methods, recipe_method
from lora_null.recipes.output import METHOD_FILES
from lora_null.recipes.probes import ProbePlan, plan_probes
from lora_null.recipes.training import read_training_data, training_arguments
from lora_null.store import find_initialization, read_report
from lora_null.trainer import CalibrationArgs
from lora_null.trainer.methods import METHODS
from lora_null.trainer.preflight import check_predicts_next_token, raise_or_warn
from lora_null.utils.distributed import all_gather, get_logger, num_processes
from lora_null.utils.errors import Unreachable, UserError
from lora_null.utils.files import hash_of
from lora_null.utils.limits import PositionLimit, position_limit
from lora_null.utils.own_code import files_of

logger = get_logger(__name__)

# Of a model's folder: what decides its results beside the weights.
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")


@dataclass
class Job:
    """All that a run needs, checked, before any weight is loaded.

    Attributes:
        recipe: of the run.
        folder: of the run.
        model: the base.
        plans: of the methods.
        base: folder of the base's evaluation.
        tokenizer: the model's; it and all inputs that follow may be missing in a dry run without a hub.
        data: the training rows.
        sources: of the texts to calibrate on.
        calibration_args: how windows are cut from these texts.
        windows: None until the model has written its own texts, and where none are read.
        tasks: of `eval.retention` and `eval.task`.
        allow_code_execution: whether tasks may run what the model writes; "unsafe": without a jail.
        base_key: cache key of the base's evaluation; None where `eval.cache` is false.
        reference_bytes: what the base's predictions will take on the disk.
        probe: what is measured while it trains.
        probe_key: of the base's kept evaluation on the probed rows.
        budget: how much may be forgotten.
        shared_init: method → folder of a run that started the same way.
        keep_weights: whether what is trained is saved.
        swept_inputs: of a grid: `inputs_of` its runs, in swept sections.
        previous: of a task after others: method → METHOD of the task before.
        earlier: method → Grams of the tasks before.
        knowledge: weight of the knowledge's Grams beside them.
        earlier_rows: token ids of the tasks before, for methods that read texts again.
        unreached: of a dry run: what lies on a hub that did not answer; with any of it the job is incomplete.
    """

    recipe: Recipe
    folder: Path
    model: Base
    plans: list[MethodPlan]
    base: Path
    tokenizer: Any = None
    data: TrainingData | None = None
    sources: list[Source] = field(default_factory=list)
    calibration_args: CalibrationArgs = field(default_factory=CalibrationArgs)
    windows: Windows | None = None
    tasks: list[Task] = field(default_factory=list)
    allow_code_execution: bool | str = False
    base_key: str | None = None
    reference_bytes: int = 0
    probe: ProbePlan | None = None
    probe_key: str | None = None
    budget: BudgetPlan | None = None
    shared_init: dict[str, Path] = field(default_factory=dict)
    keep_weights: bool = True
    swept_inputs: dict[str, str] = field(default_factory=dict)
    previous: dict[str, Path] = field(default_factory=dict)
    earlier: dict[str, list[Earlier]] = field(default_factory=dict)
    knowledge: float = 1.0
    earlier_rows: list[list[int]] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def use_windows(self, windows: Windows) -> None:
        """Calibrate on these windows; raise a UserError for fewer tokens than a method's start can be computed from."""
        if any(plan.gram_bytes for plan in self.plans) or self.recipe.repairs:
            windows.check_tokens()
        self.windows = windows

    @property
    def calibrates(self) -> bool:
        """Whether texts are calibrated on, or read while it trains; start and drift of `method.init` are those of its folder."""
        methods = (recipe_method(self.recipe, plan.name) for plan in self.plans)
        return self.recipe.method.init is None or any(method.needs_texts for method in methods)

    @property
    def reads_texts(self) -> bool:
        """Whether the texts of `calibration` are read, to calibrate or to repair."""
        return self.calibrates or self.recipe.repairs

    @property
    def eval_context(self) -> EvalContext:
        """What its evaluations are made from."""
        return EvalContext(self.recipe, self.tokenizer, self.allow_code_execution)

    @property
    def eval_options(self) -> dict[str, Any]:
        """How every evaluation of the job computes, as `evaluate` takes it."""
        section = self.recipe.eval
        return {"batch_size": section.batch_size, "autocast_dtype": torch.bfloat16 if section.bf16 else None}


def check_run(recipe: Recipe, **options: Any) -> Job:
    """Check everything that a single run will touch, before a model loads; nothing is written. As `inspect_recipe`."""
    job = inspect_recipe(recipe, **options)
    tell_of_shared_rows(recipe, job.data.examples if job.data else [], job.tasks)
    check_evaluation(recipe, job.tasks)
    if not recipe.eval.before and any(task.reference_file for task in job.tasks):
        logger.warning("eval.before=false: no KL and no forgetting, which are counted from the base")
    if not job.unreached:
        rehearse(recipe, job.tokenizer, job.data)
    return job


def space_of_run(job: Job) -> int:
    """Return the bytes that a single run may write: adapters or models, checkpoints, the base's predictions."""
    repaired = sum(4 * plan.saved for plan in job.plans) if job.recipe.repairs else 0
    return sum(plan.written_bytes for plan in job.plans) + repaired + job.reference_bytes


def _beside_the_weights(folder: Path) -> dict[str, str]:
    """Return file → hash of a model's configuration, tokenizer, chat template and code."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SMALL_FILES and file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def inputs_of(job: Job) -> dict[str, str]:
    """Return recipe key → hash of the content that it names, of a checked job; data from the hub is hashed by its rows."""
    found = inputs_beside_the_base(job)
    files = checkpoint_on_disk(job.model.name, job.recipe.model.revision)  # None before a hub's model is downloaded
    if files is not None and any(files.glob("*.safetensors")):
        # Into the hub's cache files come when they are asked for: there the commit tells.
        beside = hub_commit(job.model) or _beside_the_weights(files)
        found["model.name_or_path"] = hash_of([base_fingerprint(files), beside])
    return found | job.swept_inputs


def check_same_everywhere(job: Job) -> None:
    """Raise a UserError where processes have other recipes or rows, as machines whose files differ. All call it together."""
    if num_processes() == 1:
        return
    own = {"the recipe": hash_of(dump(without_folders(job.recipe))), **inputs_beside_the_base(job)}
    here = Path(job.model.name)
    # Where the hub does not answer one of them, that one takes what it has.
    commit = hub_commit(job.model)
    own["model.name_or_path"] = hash_of(_beside_the_weights(here) if here.is_dir() else commit)
    first, *others = all_gather(own)
    differing = next((name for other in others for name in first if other.get(name) != first[name]), None)
    if differing is not None:
        raise UserError(
            f"{differing} differs between the processes; every machine needs the same recipe and the same files"
        )


def inputs_beside_the_base(job: Job) -> dict[str, str]:
    """Return what `inputs_of` does but for the base, which no grid varies and which takes longest to hash."""
    examples, limit = job.data.examples if job.data else [], job.recipe.eval.limit
    rows = [[(side.text, side.spans) for side in (row.written, row.rejected) if side] for row in examples]
    found = {"data.path": hash_of(rows)}
    found["calibration"] = hash_of([[source.texts, source.prompts] for source in job.sources])
    probed = [("eval.probe", task, None) for task in job.probe.tasks] if job.probe else []
    for where, task, most in [*((f"eval.{task.role}", task, limit) for task in job.tasks), *probed]:
        asked = task.describe(task.effective_limit(most)).items()
        found[f"{where} ({task.label})"] = hash_of([v for key, v in asked if key.endswith("_sha256")])
    judge = job.recipe.eval.judge
    for name in job.recipe.method.name:
        if own := files_of(METHODS[name]):
            found[METHOD_FILES.format(name)] = hash_of(sorted(hashlib.sha256(x.read_bytes()).hexdigest() for x in own))
    read = {"eval.judge.prompts": [judge and judge.prompts]}
    read |= {f"training.{key}": [job.recipe.training.get(key)] for key in CONFIGURATION_KEYS}
    for where, paths in read.items():
        files = [Path(path) for path in paths if isinstance(path, str) and os.path.isfile(path)]
        if files:
            found[where] = hash_of([file.read_text(encoding="utf-8") for file in files])
    if job.recipe.method.init is not None:
        found["method.init"] = read_report(find_initialization(Path(job.recipe.method.init)))["key"]
    return found


def inspect_recipe(
    recipe: Recipe,
    *,
    base: Path | None = None,
    allow_code_execution: bool | str = False,
    may_be_unreached: bool = False,
) -> Job:
    """Check everything that can be known before a model loads; nothing is written.

    Args:
        recipe: what to run.
        base: the folder of the base's evaluation, where runs share one; the run's own when not given.
        allow_code_execution: whether tasks may run what the model writes; "unsafe": without a jail.
        may_be_unreached: of a dry run: what lies on a hub that does not answer is noted in `unreached`, not refused.
    """
    set_seed(recipe.seed)
    training = training_arguments(recipe, Path(recipe.output_dir))
    check_packages(recipe, training)
    check_engines(recipe, training)
    model = Base(recipe.model)
    name = model.name
    unreached: list[str] = []
    reach = functools.partial(_reach, unreached if may_be_unreached else None)
    config = model.config = reach(lambda: model.config) or known_shape(name)
    if config is None:
        raise UserError(unreached[-1])
    check_predicts_next_token(config, recipe.preflight, "model.name_or_path")
    check_weights(name)
    plans = plan_methods(recipe, config)
    check_start(recipe, config, plans)
    folder = Path(recipe.output_dir)
    job = Job(recipe, folder, model, plans, base or folder / "base", unreached=unreached)
    job.allow_code_execution = allow_code_execution
    if not unreached:
        job.tokenizer = reach(lambda: load_tokenizer(model))
    if job.tokenizer is None:  # without which no row, window or answer is read
        check_task_names(recipe)
        return job
    _read_inputs(job, training, reach)
    if not unreached:
        _plan_measures(job)
    return job


def _read_inputs(job: Job, training: SFTConfig | DPOConfig, reach: Callable[[Callable[[], Any]], Any]) -> None:
    """Read training rows, evaluation tasks and calibration windows, and check them against the model.

    `reach` computes what may lie on a hub, and returns None where that does not answer.
    """
    recipe, tokenizer, config = job.recipe, job.tokenizer, job.model.config
    job.data = reach(lambda: read_training_data(recipe, tokenizer))
    examples = job.data.examples if job.data is not None else []
    sources = reach(lambda: calibration_sources(recipe.calibration, tokenizer, examples, recipe.data.template))
    tasks = reach(lambda: eval_tasks(job.eval_context)) or []
    job.tasks = [task for found in tasks for task in reach(lambda: validate_tasks([found])) or []]  # noqa: B023
    validate_tasks(job.tasks)  # against each other
    job.reference_bytes = reference_bytes(job.tasks, tokenizer, recipe.eval.limit, config)
    limit = position_limit(config)
    if job.data is not None:
        check_last_batch(training, job.data)
        check_answers_end(recipe, job.model, tokenizer, job.data)
        if limit is not None and limit.hard:
            _check_rows(recipe, tokenizer, training, job.data, limit)
    for task in job.tasks if limit is not None else ():
        if limit.hard or (task.hard_position_limit and recipe.eval.backend == "hf"):
            task.check_positions(tokenizer, limit)
    job.calibration_args = window_args(recipe.calibration, recipe.seed, config)
    job.sources = sources or []
    windows = cut_windows(job.sources, tokenizer, job.calibration_args)
    if job.reads_texts and sources and all(source.texts is not None for source in sources):
        job.use_windows(windows)


def evaluation_job(recipe: Recipe, base: Path, *, allow_code_execution: bool | str = False) -> Job:
    """Return what evaluates models by a recipe's `eval` and `budget` alone: nothing to train, no training data read.

    Args:
        recipe: the recipe; its output folder is that of the base's evaluation.
        base: the folder of the base's evaluation.
        allow_code_execution: whether tasks may run what the model writes.
    """
    model = Base(recipe.model)
    choose_precision(recipe)
    job = Job(recipe, base.parent, model, [], base, load_tokenizer(model))
    job.allow_code_execution = allow_code_execution
    job.tasks = validate_tasks(eval_tasks(job.eval_context))
    _plan_measures(job)
    return job


def check_asked_alike(own: Job, base: Job, where: str) -> None:
    """Check that a run's evaluations use the same prompts and cuts as those of the base that it is compared with.

    Raises:
        UserError: a task whose prompts or cuts depend on the run's template or max_length, and so differ from the base's.
    """

    def asked(task: Task) -> dict[str, Any]:
        described = task.describe(task.effective_limit(base.recipe.eval.limit))
        return {key: value for key, value in described.items() if key != "beta"}  # by which rewards are multiplied

    for task, other in zip(own.tasks, base.tasks):
        if asked(task) != asked(other):
            raise UserError(
                f"{where}: {task.label} would be asked otherwise than the base was; keep data.template, and "
                "training.max_length where there are preferences, or make runs of their own of it"
            )


def _plan_measures(job: Job) -> None:
    """Plan a job's probes and its budget, and name the evaluations of the base that are kept."""
    recipe, tasks = job.recipe, job.tasks
    own = probe_tasks(job.eval_context)
    job.probe = plan_probes(recipe, tasks, {role: validate_tasks(made) for role, made in own.items()})
    counted = "budget" if recipe.budget else "eval.strengths" if recipe.eval.strengths else None
    if counted and not recipe.eval.before:
        raise UserError(f"{counted}: is counted from the base, which eval.before=false does not evaluate")
    against = next((task for task in tasks if isinstance(task, PreferenceTask)), None)
    if against and not recipe.eval.before:
        raise UserError(f"eval.before: {against.label} is measured against the base; leave it at true")
    if counted and recipe.eval.backend == "vllm" and any(task.runs_on_engine for task in tasks):
        raise UserError(f"{counted}: measures the live model, and eval.backend is vllm; use hf")
    job.budget = plan_budget(recipe, tasks, job.probe)
    if job.recipe.repairs and num_processes() > 1:
        raise UserError(
            "budget.then: repair works in one process; use scale, or lora-null repair RUN/METHOD afterward"
        )
    for plan in job.plans if job.budget or recipe.eval.strengths else ():
        method = recipe_method(recipe, plan.name)
        check_strength(plan.name, adapter_config(recipe.method, method, plan.rank))
        if job.budget and job.budget.then in ("stop", "rewind") and not method.can_stop_early:
            raise UserError(f"budget.then: {plan.name} is as sparse as asked only at its end; use scale or repair")
    if recipe.eval.cache:
        job.base_key = caches.base_key(recipe, job.model, tasks, recipe.eval.limit)
        job.probe_key = job.probe and caches.base_key(recipe, job.model, job.probe.tasks, None)


def _reach(unreached: list[str] | None, compute: Callable[[], Any]) -> Any:
    """Return what `compute` does; None where the hub that it asks does not answer, which is then noted if it may be."""
    try:
        return compute()
    except Unreachable as error:
        if unreached is None:
            raise
        unreached.append(str(error))
        return None


def _check_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    training: SFTConfig | DPOConfig,
    data: TrainingData,
    limit: PositionLimit,
) -> None:
    """Refuse rows that, as they are cut, are longer than a model's position table."""
    rows = list(data.rows["input_ids"]) if recipe.trainer == "sft" else []
    for rejected in (False, True) if recipe.trainer == "dpo" else ():
        rows += [t.ids for t in tokenize(data.examples, recipe.data.template, tokenizer, rejected=rejected)]
    longest = min(max(map(len, rows), default=0), training.max_length or math.inf)
    if longest > limit.tokens:
        line = f"training.max_length: a row of {longest} tokens is too long, {limit}"
        raise_or_warn(recipe.preflight, f"{line}; training.max_length={limit.tokens} cuts it")
