"""What the section `training` comes to: TRL's arguments, the batch, the steps, and the rows that the trainer gets."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import patch_environment
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.examples import Example, TrainingData, tokenize, training_data
from lora_null.recipes.environment import accelerator, choose_precision
from lora_null.recipes.private_names import take_one_gpu
from lora_null.trainer import LoraNullDPOTrainer, LoraNullSFTTrainer
from lora_null.trainer.calibration_data import kept_part
from lora_null.utils.distributed import num_processes, print_once
from lora_null.utils.errors import UserError, first_line


class TrainerClasses(NamedTuple):
    """What a recipe's `trainer` stands for: our trainer, its configuration, and TRL's own trainer."""

    trainer: type[LoraNullSFTTrainer | LoraNullDPOTrainer]
    config: type[SFTConfig | DPOConfig]
    plain: type[SFTTrainer | DPOTrainer]


SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # the losses of TRL's DPO that read label_smoothing
TRAINERS = {
    "sft": TrainerClasses(LoraNullSFTTrainer, SFTConfig, SFTTrainer),
    "dpo": TrainerClasses(LoraNullDPOTrainer, DPOConfig, DPOTrainer),
}


def training_arguments(recipe: Recipe, folder: Path, **replaced: Any) -> SFTConfig | DPOConfig:
    """Return TRL's arguments for one method of the recipe; the batch is the same whatever the number of processes.

    Where a pass of all processes would be more than the total batch, each takes fewer sequences, which is printed. One
    process trains on one GPU, whatever number there is.

    Args:
        recipe: the recipe; what it leaves to the machine ("auto") is put into it, see `choose_precision`.
        folder: of the method.
        replaced: arguments that stand over the recipe's.

    Raises:
        UserError: a value that TRL refuses, or a total batch that the processes cannot share out evenly.
    """
    choose_precision(recipe)
    if recipe.training.get("fp16") and accelerator() is None:  # which accelerate would leave out without a word
        raise UserError(
            "training.fp16: there is no accelerator here, and a CPU trains in float32 or by training.bf16=true"
        )
    options = {"use_cpu": accelerator() is None, "report_to": "none", **recipe.training}
    options["report_to"] = options["report_to"] or "none"
    options.setdefault("logging_nan_inf_filter", False)  # a loss that is not finite must be seen
    if (total := options.pop("total_batch_size", None)) is not None:
        _share_out_batch(options, total, num_processes())
    if num_processes() > 1 and options.get("precompute_ref_log_probs"):
        raise UserError(
            "training.precompute_ref_log_probs: TRL leaves what it computes beside a file of rows, where a recipe has none "
            "that several processes share; leave it out, or start one process"
        )
    options |= {"output_dir": str(folder), "seed": recipe.seed, "data_seed": recipe.seed} | replaced
    _compile_as_asked(recipe)
    try:
        # the launcher's would stand where neither bf16 nor fp16 is true
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):
            found = TRAINERS[recipe.trainer].config(**options)
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"training: {first_line(error)}") from None
    _tell_other_precision(found.mixed_precision)
    _check_batch_sharing(found)
    if isinstance(found, DPOConfig):
        _check_smoothing(found)
    if found.n_gpu > 1:  # one process, whose model PyTorch would copy to each GPU in every step
        print_once(f"device      one of {found.n_gpu} GPUs; accelerate launch -m lora_null.recipes … trains on all")
        take_one_gpu(found)
    return found


def _compile_as_asked(recipe: Recipe) -> None:
    """Leave torch.compile to the recipe: a launcher's, or one that a shell still has, would slow a short run a hundredfold."""
    asked = any(recipe.training.get(f"torch_compile{part}") for part in ("", "_backend", "_mode"))
    found = {} if asked else {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_DYNAMO_")}
    for key in found:
        del os.environ[key]
    if (backend := found.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        print_once(
            "compile     no, as training.torch_compile says, not what the environment has "
            f"(ACCELERATE_DYNAMO_BACKEND={backend})"
        )


def _tell_other_precision(taken: str) -> None:
    """Say that the launcher's precision is not taken; its "no" is also what a launcher says that was not asked."""
    launchers = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launchers.lower() not in ("no", taken):
        own = "float32" if taken == "no" else taken
        print_once(
            f"precision   {own}, as training.bf16 and training.fp16 say, not the launcher's "
            f"(ACCELERATE_MIXED_PRECISION={launchers})"
        )


def _check_batch_sharing(training: SFTConfig | DPOConfig) -> None:
    """Raise a UserError for batches that would not be what the recipe says, or of which a process would lack the last one."""
    given = training.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(given, name):
            raise UserError(
                f"training.accelerator_config: {name} shares out batches another way than the recipe, whose total_batch_size "
                "is that of all processes; leave it out"
            )
    if not given.even_batches and num_processes() > 1 and not training.dataloader_drop_last:
        raise UserError(
            "training.accelerator_config: even_batches=false lets a process lack the last batch, and the others wait for it; "
            "dataloader_drop_last leaves such rows out"
        )


def _check_smoothing(training: DPOConfig) -> None:
    """Raise a UserError for a smoothing of the preferences that TRL's losses do not read, or that turns them round."""
    if training.label_smoothing_factor:
        raise UserError(
            "training.label_smoothing_factor: is not read by DPO; label_smoothing is, with loss_type robust"
        )
    if not 0 <= training.label_smoothing < 0.5:
        raise UserError(f"training.label_smoothing: must be at least 0 and below 0.5, not {training.label_smoothing}")
    if training.label_smoothing and not SMOOTHED.intersection(training.loss_type):
        raise UserError(
            f"training.label_smoothing: is not read by the loss {', '.join(training.loss_type)}; by {', '.join(sorted(SMOOTHED))}"
        )


def _share_out_batch(options: dict[str, Any], total: int, processes: int) -> None:
    """Put into TRL's `options` the sequences of a pass and the passes of a step that make `total` over the processes.

    Raises:
        UserError: they cannot be shared out evenly, or the options say otherwise.
    """
    given = options.get("per_device_train_batch_size")
    each = SFTConfig.per_device_train_batch_size if given is None else given
    if options.get("auto_find_batch_size"):
        raise UserError(
            "training.auto_find_batch_size: takes smaller batches where memory runs out, and total_batch_size holds them "
            "fixed; give one of the two"
        )
    whole = total % processes == 0 and (given is None or total % each == 0)
    if whole and "gradient_accumulation_steps" not in options:
        of_process = total // processes
        fitting = next(size for size in range(min(each, of_process), 0, -1) if of_process % size == 0)
        if fitting != given is not None:
            print_once(
                f"batch       {fitting} sequences a pass, not {each}: {total} a step, over {processes} processes"
            )
        each = options["per_device_train_batch_size"] = fitting
    one_pass = each * processes
    if total % one_pass:
        raise UserError(
            f"training.total_batch_size: {total} is not a multiple of per_device_train_batch_size × processes = {one_pass}"
        )
    steps = options.setdefault("gradient_accumulation_steps", total // one_pass)
    if steps != total // one_pass:
        raise UserError(
            f"training.gradient_accumulation_steps: {steps} × {one_pass} sequences are not total_batch_size "
            f"({total}); give one of the two"
        )


def total_batch(training: SFTConfig | DPOConfig) -> int:
    """Return the sequences of one optimizer step over all processes."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * num_processes()


def optimizer_steps(training: SFTConfig | DPOConfig, rows: int | None) -> int | None:
    """Return the number of optimizer steps for `rows` training rows, None where the trainer decides."""
    if training.max_steps > 0:
        return training.max_steps
    if rows is None or getattr(training, "packing", False):  # several rows become one sequence
        return None
    whole = math.floor if training.dataloader_drop_last else math.ceil
    passes = whole(rows * training.gradient_accumulation_steps / total_batch(training))
    return math.ceil(math.ceil(passes / training.gradient_accumulation_steps) * training.num_train_epochs)


def training_value(recipe: Recipe, key: str) -> Any:
    """Return what a recipe says of `training`, else TRL's default; None for what its trainer does not have."""
    return recipe.training.get(key, getattr(TRAINERS[recipe.trainer].config, key, None))


def trained_part(recipe: Recipe) -> slice:
    """Return which tokens of a row are trained on: all where packs take whole rows to pieces; else see `kept_part`."""
    packing = training_value(recipe, "packing")
    if packing and training_value(recipe, "packing_strategy") != "bfd":  # which cuts each row at max_length as it is
        return slice(None)
    at_end = not packing and training_value(recipe, "truncation_mode") == "keep_end"
    return kept_part(training_value(recipe, "max_length"), at_end=at_end)


def trained_ids(recipe: Recipe, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of rows, the part of each that is trained on; of one in several pieces the first.

    Rows of which nothing that is learned is left are no training rows.
    """
    part, longest = trained_part(recipe), training_value(recipe, "max_length")
    rows = tokenize(examples, recipe.data.template, tokenizer)
    return [row.ids[part][:longest].tolist() for row in rows if any(label != -100 for label in row.labels[part])]


def rows_cut_at(recipe: Recipe) -> int | None:
    """Return the tokens at which rows are cut before the trainer gets them; None where it shortens them itself, or none."""
    return trained_part(recipe).stop


def read_training_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Return the checked training rows; print which were left out."""
    preferences = recipe.trainer == "dpo"
    return training_data(recipe.data, tokenizer, preferences=preferences, max_length=rows_cut_at(recipe))
