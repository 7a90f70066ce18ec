"""What a run would stumble over later, looked for before a model loads: a run and `--dry-run` ask the same questions."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, SFTConfig

from lora_null.adapters.saved import CONFIG_FILE
from lora_null.eval_harness import AnswerTask, MTBenchTask, Task
from lora_null.eval_harness.likelihood import REFERENCE_BYTES, tokenize_pairs
from lora_null.eval_harness.lm_eval.loading import manager_of, name_in
from lora_null.eval_harness.lm_eval.vllm import check_vllm
from lora_null.recipes.config.schema import YAML_SUFFIXES, LmEvalEntry, MTBenchEntry, Recipe
from lora_null.recipes.data.examples import Example, TrainingData, tokenize
from lora_null.recipes.data.templates import CHAT
from lora_null.recipes.models.bases import Base, attention
from lora_null.recipes.models.plan import MethodPlan, recipe_method, with_method
from lora_null.recipes.models.quantization import check_bitsandbytes
from lora_null.recipes.training import TRAINERS, rows_cut_at, training_arguments
from lora_null.start import InitOptions, LayerReport, check_made_for
from lora_null.store import find_initialization, read_report, read_scalings
from lora_null.trainer.collated_rows import check_labels
from lora_null.trainer.methods import METHODS, check_engine
from lora_null.trainer.optimizers import named_optimizer
from lora_null.trainer.preflight import raise_or_warn
from lora_null.utils.distributed import get_logger, num_processes
from lora_null.utils.errors import UserError, first_line

logger = get_logger(__name__)

CHECKED_ROWS, REHEARSED_ROWS, REHEARSED_TOKENS = 4096, 8, 64
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a rehearsal does not take from the recipe: it ends after a step, tells nobody, and compiles nothing.
REHEARSAL = {"max_steps": 1, "report_to": "none", "torch_compile": False, "disable_tqdm": True}
REHEARSAL |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "no"}


def check_packages(recipe: Recipe, training: SFTConfig | DPOConfig) -> None:
    """Check that the packages the recipe needs are installed, and that its trackers (`report_to`) can be set up.

    Raises:
        UserError: naming the key and what to install.
    """
    if recipe.eval.backend == "vllm" and recipe.model.quantization is None:  # else `check_methods` refuses it
        check_vllm(recipe.eval.vllm.tensor_parallel if recipe.eval.vllm else 1)
    check_bitsandbytes(recipe.model)
    optim = copy.copy(training)
    if optim.optim_target_modules:
        optim.optim_target_modules = "all-linear"  # of the stand-in; the trainer looks for the names
    try:
        named_optimizer(optim, torch.nn.Sequential(torch.nn.Linear(1, 1)))
    except UserError as mistake:
        raise UserError(f"training.{mistake}") from None
    if attention(recipe.model) == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError("model.attn_implementation: flash-attn is not installed; pip install flash-attn")
        if not torch.cuda.is_available() or recipe.model.dtype == "float32":
            raise UserError(
                "model.attn_implementation: flash_attention_2 needs a GPU and a 16-bit model.dtype; use sdpa"
            )
    _check_trackers(training)


def _check_trackers(training: SFTConfig | DPOConfig) -> None:
    for name in training.report_to or ():
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            if isinstance(kind, type):  # "flyte" and others come with settings, already made
                kind()
        except Exception as error:  # every tracker has exceptions of its own
            line = first_line(error)
            if "install" in line:
                line = f"{name} is not installed; pip install {name}, or report_to=none"
            raise UserError(f"training.report_to: {line}") from None
        if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            import wandb  # pyright: ignore[reportMissingImports]

            if not wandb.api.api_key:
                told = "nobody is logged in to wandb; `wandb login`, or WANDB_MODE=offline"
                raise UserError(f"training.report_to: {told}")


def check_engines(recipe: Recipe, training: SFTConfig | DPOConfig) -> None:
    """Check that each method trains under the engine that is asked for; accelerate takes FSDP for GPUs alone.

    Raises:
        UserError: as `check_engine`.
    """
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP") and not training.use_cpu
    version = int(os.environ.get("FSDP_VERSION", "1")) if fsdp else None
    if training.fsdp_plugin_args and not training.use_cpu and PartialState().distributed_type != DistributedType.NO:
        version = training.fsdp_plugin_args["fsdp_version"]  # which goes before the launcher's
    plugin = training.deepspeed_plugin
    for name in recipe.method.name:
        check_engine(METHODS[name], fsdp=version, zero=plugin and plugin.zero_stage, args=training)


def check_weights(name: str) -> None:
    """Check that a local folder holds the model's weights, each file complete; nothing of them is loaded.

    Raises:
        UserError: naming the file that is missing or cut short, or an adapter beside them.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"model.name_or_path: {folder} holds an adapter too ({CONFIG_FILE}), which transformers would load into the model; "
            "move it away, or train on the model of `lora-null export --form merged`"
        )
    files = [file for file in WEIGHTS if (folder / file).is_file()]
    indices = (folder / f"{file}.index.json" for file in WEIGHTS)
    index = next(filter(Path.is_file, indices), None)
    if index is not None and not files:
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, AttributeError, TypeError):
            raise UserError(f"model.name_or_path: {index} is damaged") from None
    if not files:
        raise UserError(f"model.name_or_path: {folder} holds a configuration but no weights ({WEIGHTS[0]} is missing)")
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"model.name_or_path: {folder} lacks {file}, which {index.name if index else 'it'} names")
        if file.endswith(".safetensors"):
            try:
                (folder / file).open("rb").close()  # safetensors says of a file closed to the user that there is none
                safe_open(folder / file, "pt")
            except OSError as error:
                raise UserError(f"model.name_or_path: cannot read {folder / file} ({error.strerror})") from None
            except SafetensorError as error:
                raise UserError(f"model.name_or_path: the weights of {folder} are damaged ({file}: {error})") from None


def check_last_batch(training: SFTConfig | DPOConfig, data: TrainingData) -> None:
    """Raise a UserError where the rows do not fill the one batch without which `dataloader_drop_last` leaves nothing."""
    batch = training.per_device_train_batch_size * num_processes()
    if training.dataloader_drop_last and len(data.rows) < batch:
        raise UserError(
            f"training.dataloader_drop_last: {len(data.rows)} rows fill no batch of {batch}, so that none is left to train on"
        )


def tell_of_shared_rows(recipe: Recipe, examples: Sequence[Example], tasks: Sequence[Task]) -> None:
    """Warn where rows that are trained or calibrated on are measured as well.

    Paths and ranges of rows tell, and of known answers the text of the question, wherever its row lies.
    """
    answers = {task.name: task for task in tasks if isinstance(task, AnswerTask)}
    written = [example.written for example in examples if example.written.spans] if answers else []
    asked = {each.text[: min(each.spans)[0]].strip() for each in written} - {""}
    trained = [("trained on", recipe.data)]
    calibrated = [("calibrated on", source) for source in recipe.calibration.each if source.path is not None]
    for role, read in (("task", trained), ("retention", trained + calibrated)):
        for entry in getattr(recipe.eval, role):
            shared = [used for used, section in read if _share_rows(entry, section, recipe.eval.limit)]
            for used in shared:
                logger.warning(
                    f"eval.{role}: rows of {entry.path} that are {used} are measured too; offset and limit set them apart"
                )
            task = answers.get(getattr(entry, "answers", ""))
            if task is not None and "trained on" not in shared:
                pairs = task.pairs[: task.effective_limit(recipe.eval.limit)]
                known = sum(prompt.strip() in asked for prompt, _ in pairs)
                if known:
                    logger.warning(f"eval.{role}: {known} of {len(pairs)} questions of {task.name} are trained on too")


def _share_rows(entry: Any, section: Any, most: int | None) -> bool:
    path = getattr(entry, "path", None)
    if path is None or os.path.realpath(path) != os.path.realpath(section.path):
        return False
    if not Path(path).is_file() and any(getattr(entry, k, None) != getattr(section, k) for k in ("subset", "split")):
        return False

    def rows(read: Any, most: int | None) -> tuple[int, float]:
        first, counts = getattr(read, "offset", 0), (getattr(read, "limit", None), most)
        return first, first + min(math.inf if count is None else count for count in counts)

    (first, last), (start, end) = rows(entry, most), rows(section, None)
    return max(first, start) < min(last, end)


def check_answers_end(recipe: Recipe, base: Base, tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> None:
    """Check that an end token is among what is learned, as the trainer does once the model is loaded."""
    if recipe.trainer == "dpo" and recipe.data.template != CHAT and tokenizer.eos_token is None:
        raise UserError("model.eos_token: the tokenizer has no end token, which ends every response; name one")
    if recipe.preflight == "off":
        return
    rows = tokenize(data.examples[:CHECKED_ROWS], recipe.data.template, tokenizer)
    cut = rows_cut_at(recipe)
    looked_at = [(row.ids[:cut], row.labels[:cut]) for row in rows]
    ends = _listed(tokenizer.eos_token_id)
    if not any(ends.intersection(labels) for _, labels in looked_at):  # else nothing is asked of a hub
        with contextlib.suppress(OSError):
            ends |= _listed(
                GenerationConfig.from_pretrained(base.name, revision=recipe.model.revision or "main").eos_token_id
            )
        with contextlib.suppress(UserError):
            ends |= _listed(base.config.get_text_config(decoder=True).eos_token_id)
    check_labels(looked_at, ends, tokenizer.eos_token, cut, recipe.preflight)


def _listed(ids: int | list[int] | None) -> set[int]:
    return {i for i in (ids if isinstance(ids, list) else [ids]) if i is not None}


def check_start(recipe: Recipe, config: Any, plans: Sequence[MethodPlan]) -> None:
    """Check that each method can begin from what `method.init` holds, as far as its report tells.

    Raises:
        UserError: it holds no start, one by another rule, or one for other modules or ranks.
    """
    if recipe.method.init is None:
        return
    folder = find_initialization(Path(recipe.method.init))
    report = LayerReport.from_json(read_report(folder))
    ranks = {line.name: line.r for line in report.layers}
    scalings = read_scalings(folder)
    for plan in plans:
        method = recipe_method(recipe, plan.name)
        rule = method.rule_for(InitOptions())
        if rule is None:
            raise UserError(
                f"method.init: would not be read, {plan.name} computes no initialization; run it by itself"
            )
        if rule.label != report.rule:
            raise UserError(
                f"method.init: {folder} holds an initialization by {report.rule or 'no rule'}, not for {plan.name}"
            )
        layers = method.layers(with_method(recipe, config, method, plan.rank))
        check_made_for(f"method.init: {folder}, {plan.name}", ranks, scalings, layers)


def check_task_names(recipe: Recipe) -> None:
    """Check the names of lm-eval's tasks alone, where nothing can be tokenized."""
    for entry in (*recipe.eval.retention, *recipe.eval.task):
        if isinstance(entry, LmEvalEntry):
            is_file = Path(entry.task).suffix in YAML_SUFFIXES
            name_in(Path(entry.task)) if is_file else manager_of(entry.task, recipe.eval.include_path)


def reference_bytes(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, limit: int | None, config: Any) -> int:
    """Return what the base's predictions of the answers will take on the disk, and tokenize every answer.

    Raises:
        UserError: an answer that cannot be scored.
    """
    size = 0
    vocabulary = config.get_text_config(decoder=True).vocab_size
    for task in tasks:
        if isinstance(task, AnswerTask):
            pairs = tokenize_pairs(tokenizer, task.pairs[:limit], task.name, None, special_tokens=task.special_tokens)
            positions = sum(len(pair.ids) - pair.start for pair in pairs)
            size += task.kl * min(4 * vocabulary * positions, REFERENCE_BYTES)
    return size


def check_evaluation(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """Ask the judge's endpoint once whether it is there and knows the key and the model; no grade is asked for.

    Keys of `eval` that none of its entries reads are named.
    """
    section = recipe.eval
    asked = {type(entry) for entry in section.entries}
    if section.judge is not None and MTBenchEntry not in asked:
        logger.warning("eval.judge: has nothing to grade, since no evaluation is MT-Bench")
    for key in ("backend", "include_path", "code"):
        if getattr(section, key) != type(section).model_fields[key].default and LmEvalEntry not in asked:
            logger.warning(f"eval.{key}: changes nothing, since no evaluation is a task of lm-eval")
    for judge in {task.judge for task in tasks if isinstance(task, MTBenchTask) and task.judge is not None}:
        judge.check_endpoint()


def is_rehearsed(recipe: Recipe) -> bool:
    """Return whether `rehearse` takes its step: `preflight` is on, and this process is the only one."""
    return recipe.preflight != "off" and PartialState().distributed_type == DistributedType.NO


def rehearse(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> None:
    """Take one training step on a few rows and a stand-in of a few thousand weights.

    So what TRL, Transformers and PyTorch refuse of `training` (a loss, an optimizer, a schedule, a package, arguments that
    contradict each other) is told in seconds, and not once the model is loaded, calibrated and initialized.

    Raises:
        UserError: whatever the step raises, in one line; `preflight` makes a warning of it.
    """
    if not is_rehearsed(recipe):
        return
    finding = None
    try:
        with _silenced(), tempfile.TemporaryDirectory() as folder:
            trainer = TRAINERS[recipe.trainer].plain(
                model=_stand_in(recipe, tokenizer),
                args=training_arguments(recipe, Path(folder), **REHEARSAL),
                train_dataset=_shortest_rows(data),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    except UserError:
        raise
    except Exception as error:  # whatever it is, it would come again with the real model
        finding = first_line(error)
    finally:
        set_seed(recipe.seed)
    if finding is not None:
        raise_or_warn(recipe.preflight, f"training: one step on a stand-in for the model fails: {finding}")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep log messages and the bars of data sets off the screen."""
    bars = datasets.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            datasets.enable_progress_bars()


def _shortest_rows(data: TrainingData) -> datasets.Dataset:
    """Return a few rows; of ids, which the trainer only cuts, their ends, where the labels are."""
    order = sorted(range(len(data.examples)), key=lambda i: len(data.examples[i].written.text))
    rows = data.rows.select(order[:REHEARSED_ROWS])
    if "input_ids" not in rows.column_names:
        return rows
    ends = {name: [row[-REHEARSED_TOKENS:] for row in rows[name]] for name in rows.features}
    return datasets.Dataset.from_dict(ends)


def _stand_in(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **size, **tokens)
    return LlamaForCausalLM(config).to(getattr(torch, recipe.model.dtype))
