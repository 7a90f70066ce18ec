"""What a run would lose, told before anything is spent: one look at the model, at collated batches and at what will train.

Every finding here is a `UserError` with `preflight="error"`, a printed line with "warn", and nothing with "off".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import datasets
import pyarrow.compute as pc
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from lora_null.layer import LoraNullLinear, active_adapter, adapted_layers, factors_of
from lora_null.targets import check_no_experts, language_model_of, warn_about_fused_experts
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.limits import PositionLimit, position_limit, why_unsupported
from lora_null.utils.model_state import is_of_library, preserve, start_that_rewrites, trains_biases
from lora_null.utils.quantized import why_unreadable
from lora_null.utils.tokens import end_ids, tokenizer_of

logger = get_logger(__name__)

Mode = Literal["error", "warn", "off"]
FIRST_LOOK, SECOND_LOOK = 64, 4096  # rows: enough where all is well; before anything is called missing
EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")  # what every evaluation gives
SAMPLED = 4096  # numbers of a tensor that are compared before and after training


def check_mode(mode: str) -> None:
    """Raise a UserError for a `preflight` that is none."""
    if mode not in get_args(Mode):
        raise UserError(f"preflight: no {mode!r}{nearest(mode, get_args(Mode))}")


def raise_or_warn(mode: Mode, finding: str) -> None:
    """Refuse, say or leave out a finding."""
    if mode == "error":
        raise UserError(f"{finding} (preflight: 'warn' goes on all the same)")
    if mode == "warn":
        logger.warning(f"preflight: {finding}")


def config_of(model: Any, args: Any) -> PreTrainedConfig | None:
    """Return the configuration of a model, or of the name of one; None where only loading it will tell."""
    if not isinstance(model, str):
        return getattr(model, "config", None)
    options = getattr(args, "model_init_kwargs", None) or {}
    trusted = bool(options.get("trust_remote_code", getattr(args, "trust_remote_code", False)))
    known = {key: value for key, value in options.items() if key in ("revision", "token")}
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trusted, **known)
    except (OSError, ValueError):
        return None  # the trainer says what is wrong with it


def check_predicts_next_token(config: PreTrainedConfig, mode: Mode, where: str = "model") -> None:
    """Check that a model predicts the next token; `where` names it in the finding."""
    reason = why_unsupported(config)
    if reason:
        raise_or_warn(mode, f"{where}: {reason}")


def check_model(model: Any, args: Any, mode: Mode) -> None:
    """Check that a model predicts the next token, and has a head to do so.

    Args:
        model: the model, or its name; then nothing is loaded.
        args: the training arguments.
        mode: what to do with a finding.
    """
    config = config_of(model, args)
    if config is not None:
        check_predicts_next_token(config, mode)
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        raise_or_warn(
            mode, f"model: {type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )


def check_rows_given(name: str, rows: Any) -> None:
    """Raise a UserError, before a model loads, for rows that are no data set, or for none.

    Args:
        name: of the argument.
        rows: a data set, or several by name; None where none is given.
    """
    for key, one in rows.items() if isinstance(rows, dict) else [("", rows)]:
        where = f"{name}[{key!r}]" if key else name
        if isinstance(one, list | tuple):
            raise UserError(f"{where}: a {type(one).__name__}, not a data set; datasets.Dataset.from_list makes one")
        if isinstance(one, Sized) and not len(one):
            raise UserError(f"{where}: holds no row")


def has_reference(trainer: type, args: Any) -> bool:
    """Return whether a trainer of TRL compares with a reference, the model without its adapter or a copy of it."""
    names = {kind.__name__ for kind in trainer.__mro__}
    if names & {"GRPOTrainer", "RLOOTrainer"}:
        return bool(getattr(args, "beta", 0.0))
    return bool(names & {"DPOTrainer", "KTOTrainer"})


def check_reference(given: Mapping[str, Any], *, takes_it: bool) -> None:
    """Raise a UserError where TRL would load the reference by the name of a model that has none, or take another model for it.

    `given` holds the trainer's arguments by name; `takes_it` says whether it takes a `ref_model`.
    """
    model = given.get("model")
    trained = active_adapter(model) if isinstance(model, PeftModel) else "default"
    if trained != "default" and given.get("ref_model") is None:
        raise UserError(
            f"model: TRL takes the adapter 'default' for the reference, and {trained!r} trains; load it under the name 'default'"
        )
    if isinstance(model, PeftModel) and "ref" in model.peft_config and given.get("ref_model") is None:
        raise UserError(
            "model: holds the reference of an earlier trainer; after model.delete_adapter('ref') it is compared with what it is now"
        )
    config = model.peft_config[trained] if isinstance(model, PeftModel) else given.get("peft_config")
    start = None if config is None or given.get("ref_model") is not None else start_that_rewrites(config)
    if start is not None:
        raise UserError(
            f"init_lora_weights: {start!r} takes its factors out of the base, which would be the reference without them; "
            "give ref_model=, or a method of ours, such as make_method('pissa'), whose reference is the original model"
        )
    without_reference = given.get("peft_config") is None and given.get("ref_model") is None
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    bare = isinstance(model, PreTrainedModel)
    if bare and without_reference and not ahead and not model.config.name_or_path:
        raise UserError(
            f"{'ref_model' if takes_it else 'model'}: every weight trains, and the model was loaded from no path that would give "
            "the reference; "
            + (
                "give ref_model=copy.deepcopy(model), or precompute_ref_log_probs=True"
                if takes_it
                else "save it, and load it with from_pretrained"
            )
        )


def check_reference_stays(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise a UserError where the reference, the model without its adapter, would train too."""
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if given.get("ref_model") is None and not ahead and trains_biases(model):
        raise UserError(
            "bias: biases of the base would train, and with them the reference, which is the model without its adapter; "
            "set it to 'none', or give precompute_ref_log_probs=True"
        )


def check_linears(method: Any, model: PeftModel) -> None:
    """Raise a UserError where PEFT adapts what has no A and B that the method could start, train and save: an embedding."""
    for name, layer in method.layers(model).items():
        if isinstance(layer, LoraLayer) and active_adapter(model) not in layer.lora_A:
            raise UserError(f"target_modules: {name} is no linear, and {method.name} is for those; leave it out")


def check_targets(model: PeftModel, mode: Mode) -> None:
    """Check that texts reach what LoRA-Null adapts, and say which experts it leaves as they are.

    Raises:
        UserError: experts that are one fused parameter, to which PEFT put an adapter that LoRA-Null cannot start.
    """
    base, layers = model.get_base_model(), adapted_layers(model, active_adapter(model))
    linears = sorted({name.rpartition(".")[2] for name, layer in layers.items() if _is_linear(layer)})
    check_no_experts(base, layers)
    warn_about_fused_experts(base)
    language_model = language_model_of(base)
    decoder = next((name for name, module in base.named_modules() if module is language_model), "")
    outside = [name for name in layers if decoder and not name.startswith(f"{decoder}.")]
    if outside:
        inside = sorted({name.rpartition(".")[2] for name in layers.keys() - set(outside)})
        raise_or_warn(
            mode,
            f"target_modules: {outside[0]} and {len(outside) - 1} more lie outside the language model of "
            f"{type(base).__name__}, no text reaches them; "
            f"target_modules=r'{re.escape(decoder)}.*({'|'.join(inside or linears)})' names those inside",
        )


@dataclass
class _LabelStats:
    """What the collated batches that were looked at have to learn from.

    Attributes:
        ends: ids that end an answer.
        max_length: sequences this long may have lost their end to truncation; None: none has.
        rows: sequences.
        longest: tokens of the longest.
        learned: whether any token has a label.
        ended: whether an end token has one.
        prompted: whether any token is masked: there are prompts, so there are answers that have to end.
        whole: sequences that lost nothing.
    """

    ends: set[int]
    max_length: int | None
    rows: int = 0
    longest: int = 0
    learned: bool = False
    ended: bool = False
    prompted: bool = False
    whole: int = 0

    def add(self, batch: Mapping[str, Any], labels: torch.Tensor) -> None:
        """Take in one batch and its labels, (rows, length), −100 where nothing is learned."""
        if "cu_seq_lens_q" in batch:  # sequences without padding, one after another
            tokens, lengths = batch["position_ids"] > 0, batch["cu_seq_lens_q"].diff()  # the collator masks the first
        else:
            tokens = batch.get("attention_mask", torch.ones_like(labels)).bool()
            lengths = tokens.sum(1)
        self.rows += len(lengths)
        self.longest = max(self.longest, int(lengths.max()))
        self.learned |= bool((labels != -100).any())
        self.ended |= bool(torch.isin(labels, torch.tensor(sorted(self.ends), dtype=labels.dtype)).any())
        self.prompted |= bool(((labels == -100) & tokens).any())
        self.whole += len(lengths) if self.max_length is None else int((lengths < self.max_length).sum())

    @property
    def is_fine(self) -> bool:
        return self.learned and (self.ended or not self.ends)


def check_rows(trainer: Any, mode: Mode) -> None:
    """Check what the trainer's own collator makes of the training rows: something is learned, answers end.

    Labels are read where the loss reads them, on padded batches: a collator that masks padding masks an end token that
    is used to pad. A few rows spread over the data are looked at, more only where those are in doubt. Trainers whose
    batches have no labels are left alone.

    Args:
        trainer: a `LoraNullMixin`.
        mode: what to do with a finding.
    """
    args, tokenizer = trainer.args, tokenizer_of(trainer.processing_class)
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    with preserve(trainer.model):  # a collator may draw random numbers, which training has to draw
        for count in (FIRST_LOOK, SECOND_LOOK):
            look = _LabelStats(end_ids(trainer.model, tokenizer), getattr(args, "max_length", None))
            for rows in _batches_of(trainer.train_dataset, count, max(2, args.per_device_train_batch_size)):
                batch = collate(rows)
                labels = trainer.labels_of(batch) if isinstance(batch, Mapping) else None
                if labels is None:
                    return
                look.add(batch, labels)
                if look.is_fine and count == SECOND_LOOK:
                    break
            if look.is_fine:
                break
    _judge(look, getattr(tokenizer, "eos_token", None), trainer.nothing_learned, mode)
    limit = position_limit(trainer.model.config)
    if limit is not None:
        _check_lengths(trainer, limit, look.longest, mode)


def check_last_batches(trainer: Any, mode: Mode) -> None:
    """Check that rows fill a batch, where others are left out; say which are trained on twice in an epoch.

    They are because accelerate gives every process as many batches of as many rows. What counts is what the sampler takes:
    trainers that sample several answers to a prompt, as GRPO's, take it several times, and whole batches alone.
    """
    args, processes, rows = trainer.args, trainer.accelerator.num_processes, trainer.train_dataset
    if not isinstance(rows, Sized):
        return
    of_its_own = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    sampler = trainer._get_train_sampler(rows) if of_its_own else None
    taken = len(sampler) if has_length(sampler) else len(rows)  # a sampler that does not say takes each row once
    pass_over_all = processes * args.train_batch_size
    if not taken:
        raise_or_warn(mode, f"training data: its {len(rows)} rows do not fill a batch; give more, or smaller batches")
    if args.dataloader_drop_last:
        if 0 < taken < pass_over_all:
            raise_or_warn(
                mode,
                f"dataloader_drop_last: leaves no row, {taken} do not fill a batch of {pass_over_all}; leave it out",
            )
        return
    if processes == 1:
        return
    passes, repeated = -(-taken // pass_over_all), -taken % pass_over_all
    reaches_the_end = args.max_steps <= 0 or args.max_steps * args.gradient_accumulation_steps >= passes
    if repeated and reaches_the_end:
        logger.warning(
            f"training data: {taken} rows do not fill the last batches of {processes} processes, which take {repeated} of the "
            "first rows again in every epoch; dataloader_drop_last leaves the last rows out"
        )


def check_best_metric(trainer: Any) -> None:
    """Raise a UserError for a `metric_for_best_model` that the first evaluation would miss, where that is known before it.

    An evaluation gives its loss and speed, of several data sets under the name of each; what `compute_metrics`, TRL's log
    lines and code of one's own add is left to it.
    """
    asked, data = trainer.args.metric_for_best_model, trainer.eval_dataset
    parts = [*type(trainer).__mro__, *map(type, trainer.callback_handler.callbacks)]
    changed = {name for kind in parts if not is_of_library(kind.__module__) for name in vars(kind)}
    changed |= vars(trainer).keys()
    if asked is None or trainer.args.eval_strategy == "no" or changed & {"evaluate", "evaluation_loop", "on_evaluate"}:
        return
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    prefixes = [f"eval_{key}" for key in data] if isinstance(data, dict) else ["eval"]
    given = [f"{prefix}_{metric}" for prefix in prefixes for metric in EVALUATED]
    of_trl = any("log" in vars(kind) and kind.__module__.startswith("trl.") for kind in parts)
    adds = of_trl or "log" in changed or trainer.compute_metrics is not None
    if name not in given and (not adds or name.removeprefix("eval_") in EVALUATED):
        raise UserError(f"metric_for_best_model: no evaluation gives {name!r}{nearest(name, given)}")


def _batches_of(dataset: Any, count: int, size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield up to `count` rows in groups: spread evenly over a data set with a length, else the first ones."""
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        step = max(1, len(dataset) // count)
        rows = (dataset[i] for i in range(0, len(dataset), step))
    else:
        rows = iter(dataset)
    rows = islice(rows, count)
    while group := list(islice(rows, size)):
        yield group


def check_labels(
    rows: Iterable[tuple[list[int], list[int]]], ends: set[int], eos_token: str, max_length: int | None, mode: Mode
) -> None:
    """Check rows of (ids, labels) as `check_rows` does, before there is a model or a collator.

    Args:
        rows: as they are cut.
        ends: ids that end an answer.
        eos_token: what the tokenizer calls its end token, for the message.
        max_length: where rows are cut; None where they are not.
        mode: what to do with a finding.
    """
    look = _LabelStats(ends, max_length)
    for ids, labels in rows:
        look.add({"input_ids": torch.tensor([ids])}, torch.tensor([labels]))
        if look.is_fine:
            return
    _judge(look, eos_token, "every label is masked", mode)


def _judge(look: _LabelStats, eos_token: str, nothing_learned: str, mode: Mode) -> None:
    seen = f"in the {look.rows} rows looked at"
    if not look.rows:
        raise_or_warn(mode, "training data: no row is left to train on")
    elif not look.learned:
        raise_or_warn(mode, f"training data: {nothing_learned} {seen}, nothing would be learned")
    elif look.is_fine:
        return
    elif not look.whole and look.prompted:
        logger.warning(
            f"training data: every row is cut at max_length ({look.max_length}), so no end of an answer is learned"
        )
    elif look.prompted:
        raise_or_warn(
            mode,
            f"training data: the end token {eos_token!r} is in no label {seen}, so the model would never "
            "learn to stop; check the template, the collator, and which token ends an answer (eos_token)",
        )
    elif look.whole:
        logger.warning(
            f"training data: the end token {eos_token!r} is in no label {seen}; the model does not learn to stop"
        )


def _check_lengths(trainer: Any, limit: PositionLimit, seen: int, mode: Mode) -> None:
    """Compare rows, as they are cut, with the positions that the model takes; all rows where there are none beyond."""
    cut = getattr(trainer.args, "max_length", None)
    if cut is not None and cut <= limit.tokens:
        return
    longest = seen
    if limit.hard:
        evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        for data in (trainer.train_dataset, *evaluated.values()):
            found = _longest_row(data)
            longest = max(longest, found if cut is None else min(found, cut))
    if longest <= limit.tokens:
        return
    line = f"max_length: a row has {longest} tokens, {limit}"
    if limit.hard:
        raise_or_warn(mode, f"{line}; max_length={limit.tokens} cuts it")
    else:
        logger.warning(line)


def _longest_row(dataset: Any) -> int:
    """Return the tokens of the longest sequence of a prepared data set; 0 where that cannot be told without reading it."""
    if not isinstance(dataset, datasets.Dataset):
        return 0
    names = [name for name in ("seq_lengths", "prompt_ids", "input_ids") if name in dataset.column_names][:1]
    if names == ["prompt_ids"]:
        names += [name for name in ("chosen_ids", "rejected_ids") if name in dataset.column_names]
    longest = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000) if names else ():
        lengths = [pc.list_value_length(table[name]) for name in names]
        if names == ["seq_lengths"]:
            sizes = pc.list_flatten(table["seq_lengths"])
        else:
            sizes = pc.add(lengths[0], pc.max_element_wise(*lengths[1:])) if lengths[1:] else lengths[0]
        longest = max(longest, pc.max(sizes).as_py() or 0)
    return longest


def check_windows(batches: Iterable[Mapping[str, Any]], config: PreTrainedConfig, mode: Mode) -> None:
    """Compare calibration batches with the positions that the model has."""
    limit = position_limit(config)
    longest = max((torch.as_tensor(batch["input_ids"]).shape[-1] for batch in batches), default=0)
    if limit is not None and limit.hard and longest > limit.tokens:
        raise_or_warn(mode, f"calibration: a window has {longest} tokens, {limit}")


def check_trainable(model: nn.Module, expected: set[str], mode: Mode) -> None:
    """Check that nothing of the base trains that is no part of the adapter and would be lost with it.

    Args:
        model: as it will train.
        expected: names of the parameters that should; empty where nobody can tell.
        mode: what to do with a finding.

    Raises:
        UserError: nothing trains at all, whatever the mode.
    """
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, extra = sorted(expected - found), sorted(found - expected) if expected else []
    if not found:
        raise UserError(
            "model: no parameter trains; an adapter from disk trains with PeftModel.from_pretrained(…, is_trainable=True)"
        )
    if extra:
        raise_or_warn(
            mode, f"model: {extra[0]} ({len(extra)} parameters) trains and is no part of the adapter, freeze it"
        )
    elif missing:
        logger.warning(
            f"model: {missing[0]} ({len(missing)} of {len(expected)} parameters of the adapter) does not train"
        )


def why_not_measured(model: nn.Module, adapter_name: str = "default") -> str | None:
    """Return why the drift of an adapter is no ‖s·BA X‖ / ‖W0 X‖, so that it cannot be followed; None where it is."""
    config = model.peft_config[adapter_name]
    if (start := start_that_rewrites(config)) is not None:
        return f"init_lora_weights={start!r} changes the base"
    layers = adapted_layers(model, adapter_name)
    if not layers:
        return f"{type(config).__name__} has no factors A and B"
    for name, layer in layers.items():
        variant = layer.lora_variant.get(adapter_name, layer)
        if variant is not layer or not _is_linear(layer) or why_unreadable(layer.get_base_layer()):
            return f"{name} has a {type(variant).__name__} of PEFT instead of W0 x + s·BA x"
    return None


def _is_linear(layer: LoraLayer) -> bool:
    factors = layer.lora_A.values() if isinstance(layer.lora_A, nn.ModuleDict) else ()
    return any(isinstance(factor, nn.Linear) for factor in factors) and not isinstance(layer, ParamWrapper)


class TrainingWatch(TrainerCallback):
    """Watches whether training changes anything, and if not, why; it never stops a run that was paid for."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.steps, self.rate, self.reached, self.pushed = 0, 0.0, False, False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.start = _sample(model)
        self.steps, self.rate, self.reached, self.pushed = 0, 0.0, False, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Note the largest rate, and whether a gradient has ever been there and been anything but zero."""
        self.steps += 1
        self.rate = max([self.rate, *(float(group["lr"]) for group in kwargs["optimizer"].param_groups)])
        if not self.pushed:
            gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
            self.reached |= bool(gradients)
            self.pushed = any(bool(_local(gradient).any()) for gradient in gradients)

    def moved(self, model: nn.Module) -> bool:
        """Return whether anything that this process holds of what trains differs from its start, or no step was seen."""
        now = _sample(model)
        moved = (not torch.equal(now[name], then) for name, then in self.start.items() if name in now)
        return not self.steps or any(moved)

    def why_not(self) -> str:
        """Return why nothing moved, as far as the steps tell."""
        if self.rate == 0:
            return "the learning rate was 0 in every step"
        if not self.reached:
            return "no gradient reached what trains"
        return "steps were lost to rounding" if self.pushed else "every gradient was 0"


@torch.no_grad()
def _sample(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return some numbers of everything that trains, copied; of what is sharded this rank's own.

    Not of an A that is kept in a basis, whose last bits a projection moves: B trains beside it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraNullLinear)]
    pairs = [factors_of(layer, name) for layer in layers for name in layer.bases]
    projected = {id(A) for A, B in pairs if B.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in projected}
    tensors = {name: _local(p.detach()).flatten() for name, p in trained.items()}
    return {name: flat[:: max(1, len(flat) // SAMPLED)].clone() for name, flat in tensors.items() if len(flat)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
