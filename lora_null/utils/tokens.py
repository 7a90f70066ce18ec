"""Token ids of a model and its tokenizer: where a text ends, rows padded to one length, the tokenizer of a processor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lora_null.utils.errors import UserError


def end_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the ids that end a text: the tokenizer's end token, if there is one, and those that generation stops at."""
    ends = [
        getattr(tokenizer, "eos_token_id", None),
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    ]
    return {i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu", *, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, (rows, longest row) int64; with `side="left"` all rows end together, for generating."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side).to(device), mask.to(device)


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of what trainers call `processing_class`: itself, or the one of a processor.

    Told by type as TRL does, since some tokenizers hold another `tokenizer` of their own. A chat template that the
    processor alone has comes along, in a copy.

    Raises:
        UserError: a processor without a tokenizer.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        raise UserError(
            f"processing_class: {type(processing_class).__name__} holds no tokenizer; give the model's own"
        )
    template = getattr(processing_class, "chat_template", None)
    if template and not tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer
