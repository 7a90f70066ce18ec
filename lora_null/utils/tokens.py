"""Token ids of a model and its tokenizer: where a text ends, rows padded on the left, the tokenizer of a processor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lora_null.utils.errors import UserError


def end_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Return the ids that end a text: the tokenizer's end token, if there is one, and those that generation stops at."""
    ends = [
        getattr(tokenizer, "eos_token_id", None),
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
    ]
    return {i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, (rows, longest row) int64, whose rows end together, as generating needs them."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


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
