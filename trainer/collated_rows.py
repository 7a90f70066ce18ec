"""What would be learned of the rows, as the trainer collates them: labels, ends of answers, lengths, whole batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import has_length
from trl.data_utils import is_conversational, is_conversational_from_value

from lora_null.trainer.calibration_data import check_no_labels
from lora_null.trainer.preflight import Mode, raise_or_warn
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit, position_limit
from lora_null.utils.model_state import preserve
from lora_null.utils.tokens import end_ids, tokenizer_of

logger = get_logger(__name__)

FIRST_LOOK, SECOND_LOOK = 64, 4096  # rows: enough where all is well; before anything is called missing


def check_rows_given(name: str, rows: Any, texts_read: Callable[[Collection[str]], Collection[str]]) -> None:
    """Raise a UserError, before a model loads, for rows that are no data set, for none, or for numbers in place of texts.

    Args:
        name: of the argument.
        rows: a data set, or several by name; None where none is given.
        texts_read: of the columns, those that the trainer reads as texts.
    """
    for key, one in rows.items() if isinstance(rows, dict) else [("", rows)]:
        where = f"{name}[{key!r}]" if key else name
        if isinstance(one, list | tuple):
            raise UserError(f"{where}: a {type(one).__name__}, not a data set; datasets.Dataset.from_list makes one")
        if isinstance(one, Sized) and not len(one):
            raise UserError(f"{where}: holds no row")
        features = getattr(one, "features", None) or {}
        for field in () if "input_ids" in features else texts_read(features):
            feature = features.get(field)
            check_no_labels(feature, f"{where}: {field!r}")
            if isinstance(feature, datasets.Value) and "string" not in feature.dtype:
                cure = f"cast_column({field!r}, datasets.Value('string')) makes it one"
                raise UserError(f"{where}: {field!r} is {feature.dtype}, not text; {cure}")


def check_can_write(given: Mapping[str, Any]) -> None:
    """Raise a UserError for rows that a tokenizer lacks something to write: a chat template, an end token, one to pad with.

    Args:
        given: the trainer's arguments, by name; the tokenizer may be unknown yet.
    """
    args, tokenizer = given.get("args"), tokenizer_of(given.get("processing_class"))
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    own_way = type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    template = own_way or tokenizer.chat_template or getattr(args, "chat_template_path", None)
    end = getattr(args, "eos_token", None) or tokenizer.eos_token
    for name in ("train_dataset", "eval_dataset"):
        rows = given.get(name)
        for one in rows.values() if isinstance(rows, dict) else [rows]:
            first = next(iter(one), None) if isinstance(one, Iterable) else None
            if not isinstance(first, Mapping) or "input_ids" in first:
                continue
            if not is_conversational(first) and ("chosen" in first or not is_conversational_from_value(first)):
                if end is None:
                    raise UserError("processing_class: has no end token to write behind a text; set its eos_token")
            elif not (template or (first.get("chat_template_kwargs") or {}).get("chat_template")):
                raise UserError(
                    f"{name}: holds conversations, and processing_class has no chat template; set its chat_template"
                )
    pad = getattr(args, "pad_token", None) or tokenizer.pad_token or end
    if pad is None and given.get("data_collator") is None:
        raise UserError("processing_class: has no token to pad with, and none that ends a text; set its pad_token")


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
    rows: Iterable[tuple[list[int], list[int]]],
    ends: set[int],
    eos_token: str | None,
    max_length: int | None,
    mode: Mode,
) -> None:
    """Check rows of (ids, labels) as `check_rows` does, before there is a model or a collator.

    Args:
        rows: as they are cut.
        ends: ids that end an answer.
        eos_token: what the tokenizer calls its end token, for the message; None where it has none.
        max_length: where rows are cut; None where they are not.
        mode: what to do with a finding.
    """
    look = _LabelStats(ends, max_length)
    for ids, labels in rows:
        look.add({"input_ids": torch.tensor([ids])}, torch.tensor([labels]))
        if look.is_fine:
            return
    _judge(look, eos_token, "every label is masked", mode)


def _judge(look: _LabelStats, eos_token: str | None, nothing_learned: str, mode: Mode) -> None:
    """Refuse or say what the rows that were looked at do not teach: anything, or to end an answer."""
    seen = f"in the {look.rows} rows looked at"
    lost = f"the end token {eos_token!r} is in no label {seen}" if eos_token else "the tokenizer names no end token"
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
            f"training data: {lost}, so the model would never "
            "learn to stop; check the template, the collator, and which token ends an answer (eos_token)",
        )
    elif look.whole:
        logger.warning(f"training data: {lost}; the model does not learn to stop")


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
