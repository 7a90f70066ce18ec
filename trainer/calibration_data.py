"""From texts to calibration batches: the windows that LoRA-Null measures."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from lora_null.batches import is_input, texts_in
from lora_null.utils.chat import adds_bos, conversation_text
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, first_line, nearest
from lora_null.utils.limits import PositionLimit
from lora_null.utils.tokens import padded, tokenizer_of
from lora_null.utils.values import HALF, as_text, is_conversation

TOKENS_PER_BATCH = 4096
STREAM = 16  # texts of a stream that are read for each window, before the draw
MODES = ("packed", "separate")
FIELDS = ("text", "messages", "conversations")  # of a row that is no window
# Beside the tokens of a window, whatever the model.
OTHER_INPUTS = ("pixel_values", "inputs_embeds", "input_features", "token_type_ids")
logger = get_logger(__name__)


@dataclass(frozen=True)
class CalibrationArgs:
    """How calibration windows are cut from texts (the paper: 256 samples of at most 1024 tokens).

    Attributes:
        samples: number of windows.
        max_length: tokens of a window, at most.
        mode: "packed" joins the texts by blank lines, in an order drawn with `seed`, and cuts windows of `max_length`
            tokens; "separate" draws `samples` texts and keeps each alone.
        seed: of the draw; where it is not given that of a trainer's `args`, else 0.

    Raises:
        UserError: another mode, or a number that cannot be.
    """

    samples: int = 256
    max_length: int = 1024
    mode: Literal["packed", "separate"] = "packed"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"calibration_args.mode: no {self.mode!r}{nearest(self.mode, MODES)}")
        for name, least in (("samples", 1), ("max_length", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise UserError(f"calibration_args.{name}: must be a whole number of at least {least}, not {value!r}")

    def fitting(self, limit: PositionLimit | None, key: str = "calibration_args.max_length") -> CalibrationArgs:
        """Return these arguments with windows that the model has positions for.

        The default length is no wish of the user's and is cut to a position table, which one line says.

        Args:
            limit: the model's.
            key: what the length is called where it was set.

        Raises:
            UserError: another length than the default, longer than the model's position table.
        """
        if limit is None or not limit.hard or self.max_length <= limit.tokens:
            return self
        if self.max_length != CalibrationArgs.max_length:
            raise UserError(f"{key}: {self.max_length} tokens are too long, {limit}; at most {limit.tokens}")
        logger.warning(f"{key}: {limit.tokens} tokens instead of {self.max_length}, {limit}")
        return replace(self, max_length=limit.tokens)


def calibration_windows(
    rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs
) -> list[list[int]]:
    """Tokenize texts into calibration windows.

    Args:
        rows: texts; or conversations, or dicts with either, as in `as_batches`. Those without text are left out.
        tokenizer: the model's, or a processor that holds it.
        args: how the windows are cut.

    Returns:
        At most `args.samples` lists of token ids, each at most `args.max_length` long.

    Raises:
        UserError: when there is no text, too little for a single packed window, or a row that is no text, by number.
    """
    tokenizer = tokenizer_of(tokenizer)
    if args.max_length == 1 and adds_bos(tokenizer):
        raise UserError(
            f"calibration_args.max_length: 1 is the start token {tokenizer.bos_token} alone; use 2 or more"
        )
    given = [_text(row, number, tokenizer) for number, row in enumerate(rows, start=1)]
    texts = [text for text in given if text.strip()]
    if not texts:
        raise UserError("calibration: the data set holds no text")
    if len(texts) < len(given):
        logger.warning(f"calibration: {len(given) - len(texts)} of {len(given)} rows have no text and are left out")
    shuffled = random.Random(args.seed or 0).sample(texts, len(texts))
    if args.mode == "separate":
        windows = [tokenizer(text)["input_ids"][: args.max_length] for text in shuffled[: args.samples]]
    else:
        windows = _packed(shuffled, tokenizer, args)
    if len(windows) < args.samples:
        tokens = sum(map(len, windows))
        logger.warning(
            f"calibration: {len(windows)} of {args.samples} windows, {tokens:,} tokens: there is no more text"
        )
    return windows


def _packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs) -> list[list[int]]:
    start: list[int] = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []  # type: ignore[list-item]
    body = args.max_length - len(start)
    wanted = args.samples * body
    ids: list[int] = []
    for first in range(0, len(texts), 1024):
        ids += tokenizer("\n\n".join(texts[first : first + 1024]) + "\n\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted:
            break
    windows = [start + ids[at : at + body] for at in range(0, min(len(ids), wanted), body)]
    if len(windows) > 1 and len(windows[-1]) < args.max_length:
        windows.pop()
    return windows


def kept_part(max_length: int | None, *, at_end: bool) -> slice:
    """Return what TRL's truncation leaves of a row: the first `max_length` tokens, or (`keep_end`) the last; None for all."""
    return slice(-max_length, None) if max_length and at_end else slice(max_length)


def padded_batches(windows: Iterable[Sequence[int]], pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Group windows of like length into right-padded batches of about 4096 tokens.

    Returns:
        Dicts of `input_ids` and `attention_mask`, (batch, length) int64.
    """
    names = ("input_ids", "attention_mask")
    return [dict(zip(names, padded(group, pad_token_id))) for group in _groups(sorted(windows, key=len))]


def _groups(windows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for window in windows:
        if group and (len(group) + 1) * len(window) > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def as_batches(
    dataset: Any, tokenizer: Any, args: CalibrationArgs, reads: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Turn what a user may pass as `calibration_dataset` into batches.

    Args:
        dataset: rows of one kind: texts; conversations (lists of messages), which the model's chat template writes; dicts
            with one of either in a field `text`, `messages` or `conversations`; windows, dicts with `input_ids`, where
            they are padded `attention_mask`, and maybe `position_ids`, or the `seq_lengths` of texts that TRL has packed;
            or batches of windows, (batch, length) each. In a list, a data set (of a `DatasetDict` the only split or
            "train"), a `DataFrame`, a dict of lists, or anything that can be iterated. A single string is one text. Of a
            stream, which has no length, no more is read than is needed: `args.samples` windows; or 16 texts for each, from
            which they are drawn, and more only until these fill them. Of a large `Dataset` of texts as many, at random.
        tokenizer: for texts, and for its padding token; or a processor that holds it. None goes with ready windows.
        args: how windows are cut from texts. Ready windows are used as they are, without their padding.
        reads: what the model takes beside tokens, see `other_inputs`. A window that holds it is refused.

    Raises:
        UserError: rows of any other kind, by number; or none.
    """
    tokenizer = tokenizer_of(tokenizer)
    source, is_stream = _rows(dataset)
    rows = iter(source)
    head = list(islice(rows, 1))
    if not head:
        raise UserError("calibration: the data set is empty")
    first = head[0]
    rows = chain(head, rows)
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    pad = 0 if pad_token_id is None else pad_token_id
    if not isinstance(first, Mapping) or "input_ids" not in first:
        features = getattr(source, "features", None)
        for name in FIELDS:  # a column of a data set has a feature of its own
            check_no_labels(features.get(name) if isinstance(features, Mapping) else features, "calibration: the text")
        if tokenizer is None:
            raise UserError("processing_class: calibration texts need a tokenizer, and the trainer has none")
        if is_stream:
            rows = _enough(enumerate(rows, start=1), tokenizer, args)
        elif isinstance(source, Dataset) and len(source) > STREAM * args.samples:  # read from the disk row by row
            order = np.random.default_rng(args.seed or 0).permutation(len(source))
            rows = _enough(((i + 1, source[i]) for i in map(int, order)), tokenizer, args)
        return padded_batches(calibration_windows(rows, tokenizer, args), pad)
    batches, windows, dimensions, others = [], 0, 0, {*OTHER_INPUTS, *reads}
    for number, row in enumerate(rows, start=1):
        batch = _batch(row, number, pad_token_id, dimensions, others)
        dimensions = batch["input_ids"].dim()
        if dimensions == 1 and row.get("seq_lengths") is not None:
            texts = [text["input_ids"] for text in texts_in({key: x[None] for key, x in batch.items()})]
            batches += [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in texts]
        else:
            batches.append(batch)
        windows = len(batches) if dimensions == 1 else windows + len(batch["input_ids"])
        if is_stream and windows >= args.samples:
            logger.warning(f"calibration: the first {windows} windows of the stream are taken")
            break
    if dimensions == 2:
        return batches
    unpadded = [{key: x[batch["attention_mask"].bool()] for key, x in batch.items()} for batch in batches]
    placed = [{key: x[None] for key, x in window.items()} for window in unpadded if "position_ids" in window]
    return placed + padded_batches([x["input_ids"].tolist() for x in unpadded if "position_ids" not in x], pad)


def _rows(dataset: Any) -> tuple[Iterable[Any], bool]:
    """Return the rows of what a user passed, and whether it is a stream."""
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = list(dataset)
        if len(splits) != 1 and "train" not in splits:
            raise UserError(f"calibration: a {type(dataset).__name__}; pass one of its splits ({', '.join(splits)})")
        dataset = dataset["train" if "train" in splits else splits[0]]
    if isinstance(dataset, pandas.DataFrame):
        dataset = dataset.astype(object).where(dataset.notna(), None).to_dict("records")  # None as it was written
    if isinstance(dataset, str) and not _is_path(dataset):
        dataset = [dataset]
    if isinstance(dataset, str | Path | bytes | set | frozenset) or not isinstance(dataset, Iterable):
        kind = "a path" if isinstance(dataset, str | Path) else f"a {type(dataset).__name__}"
        raise UserError(f"calibration: {kind}; pass the rows, such as datasets.load_dataset('json', data_files=PATH)")
    if isinstance(dataset, Mapping):
        return _columns(dataset), False
    try:
        return dataset, len(dataset) < 0
    except TypeError:
        return dataset, True


def check_no_labels(feature: Any, what: str) -> None:
    """Raise a UserError where a field of a data set holds the numbers of class labels, whose names may be meant."""
    if isinstance(feature, ClassLabel):
        raise UserError(f"{what} is a number of a class (ClassLabel); its feature's int2str gives the names")


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False


def _columns(columns: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a dict of lists; a dict of anything else is itself a row, or a batch of tensors."""
    values = list(columns.values())
    if not values or not all(_is_column(value) for value in values):
        return [columns]
    lengths = {name: len(value) for name, value in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"calibration: a dict of lists of different lengths ({lengths})")
    return [dict(zip(columns, row)) for row in zip(*values)]


def _is_column(value: Any) -> bool:
    return (
        hasattr(value, "__len__")
        and not isinstance(value, str | Mapping | torch.Tensor)
        and not is_conversation(value)
    )


def _enough(
    rows: Iterable[tuple[int, Any]], tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs
) -> Iterator[str]:
    """Yield the texts of numbered rows from which the windows are drawn; see `as_batches`."""
    wanted, texts, tokens = args.samples * args.max_length, 0, 0
    for count, (number, row) in enumerate(rows, start=1):
        text = _text(row, number, tokenizer)
        yield text
        texts += bool(text.strip())
        if args.mode == "packed":
            tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        enough = texts >= STREAM * args.samples and (args.mode == "separate" or tokens >= wanted)
        if enough or count >= STREAM * wanted:  # never more, should a stream hold empty texts alone
            return


def _text(row: Any, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a row; a conversation by the model's chat template. A mistake names the row, from 1."""
    value, name = row, ""
    if isinstance(row, Mapping) and not is_conversation([row]):  # no single message
        fields = [field for field in FIELDS if field in row]
        field = min(fields, key=lambda field: row[field] is None, default=None)  # None is what others of the rows have
        if field is None:
            found = ", ".join(sorted(map(str, row)))
            raise UserError(f"calibration: row {number} needs a field {', '.join(FIELDS)} or input_ids, found {found}")
        value, name = row[field], f"{field!r} "
    try:
        if is_conversation(value):
            options = row if value is not row and isinstance(row, Mapping) else {}
            text = conversation_text(value, options, tokenizer)
        else:
            text = as_text(value)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"calibration: row {number} cannot be used: {name}holds {HALF}") from None
    except ValueError as error:
        raise UserError(f"calibration: row {number} cannot be used: {name}{error}") from None
    return text


def _batch(
    row: Any, number: int, pad: int | None, dimensions: int, others: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return ids, mask and positions of a window or a batch; a mask of ones where there is none and no padding is seen."""
    where = f"calibration: row {number}"
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise UserError(f"{where} has no input_ids, as the first has")
    if other := next((key for key in row if key in others and is_input(row[key])), None):
        raise UserError(f"{where} has {other}, which changes what is read and is not measured; give text alone")
    given, positions = row.get("attention_mask"), row.get("position_ids")
    try:
        ids = torch.as_tensor(row["input_ids"])
        mask = torch.ones_like(ids) if given is None else torch.as_tensor(given)
        positions = None if positions is None else torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {first_line(error)}") from None
    expected = (dimensions,) if dimensions else (1, 2)  # as the first row's
    if ids.is_floating_point() or ids.dim() not in expected or mask.shape != ids.shape:
        raise UserError(f"{where}: input_ids {list(ids.shape)}, {ids.dtype}, with a mask {list(mask.shape)}")
    if ((mask != 0) & (mask != 1)).any():
        raise UserError(f"{where} has an attention_mask that holds other numbers than 0 and 1")
    if given is None and pad is not None and ids.shape[-1] > 1:
        edges = (ids[..., :2] == pad).all(-1) | (ids[..., -2:] == pad).all(-1)
        if edges.any():
            raise UserError(f"{where} is padded (token {pad}) and has no attention_mask, so padding would be measured")
    if not mask.any():
        raise UserError(f"{where} has no tokens")
    if (lengths := row.get("seq_lengths")) is not None:
        positions = _positions(lengths, mask, where)
    found = {"input_ids": ids, "attention_mask": mask}
    if positions is None:
        return found
    if positions.shape != ids.shape:
        raise UserError(f"{where}: input_ids {list(ids.shape)} with position_ids {list(positions.shape)}")
    return found | {"position_ids": positions}


def _positions(lengths: Any, mask: torch.Tensor, where: str) -> torch.Tensor:
    """Return the positions of a window, or of a batch of them, whose texts TRL has packed: they begin again with each."""
    try:
        sizes = [[int(n) for n in row] for row in ([lengths] if mask.dim() == 1 else lengths)]
    except (TypeError, ValueError):
        sizes = []
    tokens = mask.reshape(-1, mask.shape[-1]).sum(1).tolist()
    if [sum(row) for row in sizes] != tokens or any(n < 0 for row in sizes for n in row):
        raise UserError(f"{where} has seq_lengths that do not add up to its tokens")
    positions = torch.zeros(mask.shape, dtype=torch.int64)
    positions[mask.bool()] = torch.cat([torch.arange(n) for row in sizes for n in row])
    return positions
