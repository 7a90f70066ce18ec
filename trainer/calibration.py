"""From texts to calibration batches: the windows that LoRA-Null measures."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lora_null.errors import UserError

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class CalibrationArgs:
    """How calibration windows are cut from texts (the paper: 256 samples of at most 1024 tokens).

    Attributes:
        samples: number of windows.
        max_length: tokens of a window, at most.
        mode: "packed" joins the texts by blank lines, in an order drawn with `seed`, and cuts windows of `max_length`
            tokens; "separate" draws `samples` texts and keeps each alone.
        seed: of the draw.
    """

    samples: int = 256
    max_length: int = 1024
    mode: Literal["packed", "separate"] = "packed"
    seed: int = 0


def calibration_windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs
) -> list[list[int]]:
    """Tokenize texts into calibration windows.

    Returns:
        At most `args.samples` lists of token ids, each at most `args.max_length` long.

    Raises:
        UserError: when there is no text, or too little for a single packed window.
    """
    texts = [text for text in texts if text and text.strip()]
    if not texts:
        raise UserError("calibration: the data set holds no text")
    shuffled = random.Random(args.seed).sample(texts, len(texts))
    if args.mode == "separate":
        return [tokenizer(text)["input_ids"][: args.max_length] for text in shuffled[: args.samples]]
    return _packed(shuffled, tokenizer, args)


def _packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs) -> list[list[int]]:
    start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
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


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def padded_batches(windows: Iterable[Sequence[int]], pad_token_id: int) -> list[dict[str, torch.Tensor]]:
    """Group windows of like length into right-padded batches of about 4096 tokens.

    Returns:
        Dicts of `input_ids` and `attention_mask`, (batch, length) int64.
    """
    return [_pad(group, pad_token_id) for group in _groups(sorted(windows, key=len))]


def _groups(windows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    group: list[Sequence[int]] = []
    for window in windows:
        if group and (len(group) + 1) * len(window) > TOKENS_PER_BATCH:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _pad(windows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(window) for window in windows])
    rows = [torch.tensor(window) for window in windows]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long()}


def as_batches(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: CalibrationArgs) -> list[dict[str, Any]]:
    """Turn what a user may pass as `calibration_dataset` into batches.

    Args:
        dataset: texts; or rows with a `text` column; or rows with `input_ids` (windows, used as they are); or ready
            batches, dicts of tensors with `input_ids` and `attention_mask`.
        tokenizer: for texts, and for its padding token.
        args: how windows are cut from texts.

    Raises:
        UserError: for rows of any other shape, or none.
    """
    rows = list(dataset)
    if not rows:
        raise UserError("calibration: the data set is empty")
    first = rows[0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if isinstance(first, str):
        return padded_batches(calibration_windows(rows, tokenizer, args), pad)
    if "attention_mask" in first and getattr(first["input_ids"], "ndim", 1) == 2:
        return rows
    if "input_ids" in first:
        return padded_batches([list(row["input_ids"]) for row in rows], pad)
    if "text" in first:
        return padded_batches(calibration_windows([row["text"] for row in rows], tokenizer, args), pad)
    raise UserError(f"calibration: rows need a field 'text' or 'input_ids', found {', '.join(sorted(first))}")
