"""Texts that a model writes itself, to calibrate on what it says when nobody has data of what it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_null.utils.chat import without_bos
from lora_null.utils.distributed import device_of, get_logger, is_first_process, merge_shares
from lora_null.utils.errors import UserError
from lora_null.utils.limits import position_limit
from lora_null.utils.model_state import base_model_of, preserve, replaced
from lora_null.utils.sharding import my_share
from lora_null.utils.tokens import end_ids, padded, tokenizer_of

logger = get_logger(__name__)
BATCH = 16  # texts written at once; the draws depend on it, so it is no option


def own_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    max_tokens: int,
    prompts: Sequence[str] = (),
    seed: int = 0,
    progress: str = "the model writes texts to calibrate on",
) -> list[str]:
    """Let a model write texts, by sampling from its own distribution (temperature 1, nothing cut off).

    The texts are shared out over the processes batch by batch, each batch with a seed of its own, so that they are the same
    on every process and for any number of processes. A bar with rate and time left shows on the first.

    Args:
        model: complete on every process, on its device.
        tokenizer: the model's, or a processor that holds it.
        count: number of texts.
        max_tokens: of a text, its prompt included, at most.
        prompts: texts, or one, to go on from, in turn, with all special tokens but the one the tokenizer puts first;
            without any the model begins with its first token (the end token, where it has none). Those longer than half of
            max_tokens are left out, and a line says so.
        seed: of the draws.
        progress: the bar's label.

    Returns:
        The texts with their prompts, special tokens written out; the tokenizer may cut some of them otherwise.

    Raises:
        UserError: no token to begin with, or prompts of which none leaves room to write.
    """
    tokenizer = tokenizer_of(tokenizer)
    limit = position_limit(model.config)
    longest = max_tokens if limit is None else min(max_tokens, limit.tokens)
    starts: Any = beginnings(tokenizer, [prompts] if isinstance(prompts, str) else prompts, longest)
    batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    share = my_share(range(len(batches)), model)

    def compute() -> dict[int, str]:
        texts = {}
        bar = tqdm(total=count, desc=progress, unit=" texts", disable=not is_first_process())
        with bar:
            for number in share:
                rows = [starts[i % len(starts)] for i in batches[number]]
                written = _write(model, tokenizer, rows, longest, seed * 1_000_003 + number)
                texts |= dict(zip(batches[number], written))
                bar.update(len(rows) * (len(batches) // max(len(share), 1)))
        return texts

    with preserve(model):
        model.eval()
        texts = merge_shares(compute)
    return [texts[i] for i in range(count)]


def beginnings(tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids after which a model writes; raise a UserError where there are none, as `own_texts`."""
    if not prompts:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise UserError("calibration.self: the tokenizer has no token that begins a text; use self: prompts")
        return [[first]]
    fitting = [ids for ids in tokenizer(list(prompts))["input_ids"] if len(ids) <= max_tokens // 2]
    if not fitting:
        raise UserError(f"calibration.self: every prompt is longer than half of max_length ({max_tokens} tokens)")
    if long := len(prompts) - len(fitting):
        logger.warning(
            f"calibration: {long} of {len(prompts)} prompts are longer than {max_tokens // 2} tokens, half of max_length, and are left out"
        )
    return fitting


@torch.no_grad()
def _write(model: Any, tokenizer: Any, rows: list[list[int]], longest: int, seed: int) -> list[str]:
    """Return the rows, each with what the model writes after it."""
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    ids, mask = padded(rows, pad, device_of(model), side="left")
    texts, ends = [], end_ids(model, tokenizer)
    # What a model's own generation settings say beside these, such as a penalty on repetition, would bend the distribution.
    plain = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad)
    plain.eos_token_id = sorted(ends) or None
    torch.manual_seed(seed)
    with replaced(base_model_of(model), "generation_config", plain):
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(longest - width, 1))
    for row, new in zip(rows, found[:, width:].tolist()):
        end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        text = tokenizer.decode(row + new[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts.append(without_bos(text, tokenizer))
    return texts
