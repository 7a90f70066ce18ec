"""One look at the first batch, and at what will train, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.errors import UserError


def check_batch(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Check tokenized training rows: labels exist, the end of an answer is trained, padding is not the end token.

    A model that never learns its end token, or learns nothing, looks like one that forgot.

    Args:
        rows: each with `input_ids` and `labels`, not yet padded.
        tokenizer: the one that padded and ended them.
        max_length: rows this long may have lost their end to truncation.

    Raises:
        UserError: one line with what to change.
    """
    rows = list(rows)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer: pad_token and eos_token are both {tokenizer.eos_token!r}, "
            "so the end of an answer may never be learned; set tokenizer.pad_token to another token"
        )
    if not any(label != -100 for row in rows for label in row["labels"]):
        raise UserError("training data: every label is masked in the first batch, nothing would be learned")
    whole = [row for row in rows if max_length is None or len(row["input_ids"]) < max_length]
    if whole and not any(tokenizer.eos_token_id in row["labels"] for row in whole):
        raise UserError(
            f"training data: the end token {tokenizer.eos_token!r} is in no label of the first batch, "
            "so the model would never learn to stop; check the template and eos_token"
        )


def check_trainable(model: nn.Module, expected: set[str]) -> None:
    """Check that exactly the expected parameters train.

    Raises:
        RuntimeError: naming the first parameters that differ.
    """
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise RuntimeError("no parameter of the model trains")
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise RuntimeError(f"trainable parameters differ: not training {missing[:3]}, training as well {extra[:3]}")
