"""Generate text for a batch whose rows end at different times: a row that has ended costs nothing more.

`transformers.generate` goes on until every row of the batch has ended, and lm-eval's stop criterion until all rows have
met the *same* stop string, mostly to the last token that is allowed. Here a row leaves the batch, and the key-value
cache, as soon as it ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_null.utils.distributed import device_of, get_logger, is_first_process, merge_shares
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit, position_limit
from lora_null.utils.model_state import base_model_of
from lora_null.utils.sharding import my_share
from lora_null.utils.tokens import end_ids, padded

logger = get_logger(__name__)

NEUTRAL = {"repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "guidance_scale": (None, 1.0)}
NEUTRAL |= {"no_repeat_ngram_size": (None, 0), "min_length": (None, 0), "min_new_tokens": (None, 0)}
NEUTRAL |= {"bad_words_ids": (None,), "suppress_tokens": (None,), "begin_suppress_tokens": (None,)}
NEUTRAL |= {"forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "sequence_bias": (None,)}
NEUTRAL |= {"num_beams": (None, 1), "penalty_alpha": (None,), "exponential_decay_length_penalty": (None,)}
NEUTRAL |= {"min_p": (None,), "top_h": (None,), "typical_p": (None, 1.0)}
NEUTRAL |= {"epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0)}
TOP_K, TOP_P = 50, 1.0  # of `transformers.generate`, where a model names none


class StopWords:
    """Whether the end of some generated tokens holds a stop string.

    Args:
        tokenizer: to decode them.
        words: the stop strings.
    """

    def __init__(self, tokenizer, words: Sequence[str]) -> None:
        self.tokenizer, self.words = tokenizer, [word for word in words if word]
        lengths = [len(tokenizer.encode(word, add_special_tokens=False)) for word in self.words]
        self.lookback = max(lengths, default=0) + 2  # a stop string may come in other tokens than its own

    def __call__(self, tokens: Sequence[int]) -> bool:
        if not self.words:
            return False
        end = self.tokenizer.decode(tokens[-self.lookback :])
        return any(word in end for word in self.words)


def can_generate_rows(model: nn.Module) -> bool:
    """Return whether `generate_rows` does for this model what `transformers.generate` would: its forward takes positions
    and gives single logits, its cache can drop rows, and its generation config changes no logits."""
    base = base_model_of(model)
    settings = getattr(base, "generation_config", None)
    return (
        {"position_ids", "logits_to_keep"} <= set(inspect.signature(base.forward).parameters)
        and _cache_name(base) is not None
        and all(getattr(settings, key, None) in neutral for key, neutral in NEUTRAL.items())
        and all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=base.config).layers)
    )


def _cache_name(base: nn.Module) -> str | None:
    """Return what a model's forward calls its cache: `cache` since transformers 5.24; None where it takes none."""
    takes = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in takes), None)


def sampling(model: nn.Module, temperature: float) -> LogitsProcessorList:
    """Return what `transformers.generate` does with logits before it draws: temperature, top_k and top_p, the model's own."""
    settings = getattr(base_model_of(model), "generation_config", None)
    top_k, top_p = getattr(settings, "top_k", None), getattr(settings, "top_p", None)
    top_k, top_p = TOP_K if top_k is None else top_k, TOP_P if top_p is None else top_p
    rules = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    rules.extend([TopKLogitsWarper(top_k)] if top_k else [])
    rules.extend([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    return rules


@torch.no_grad()
def generate_rows(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    ends: Collection[int],
    stopped: Callable[[Sequence[int]], bool],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Generate a continuation of each row.

    Args:
        model: in eval mode, with the ids on its device; see `can_generate_rows`.
        ids: (rows, length), padded on the left.
        mask: (rows, length), 0 on padding.
        max_new_tokens: tokens of a continuation, at most.
        ends: ids that end a row; they are its last token.
        stopped: whether a row's tokens so far end it.
        temperature: 0 takes the likeliest token; else it is drawn by the rules of `sampling`.
        generator: of the draws, on the model's device.

    Returns:
        The new tokens of each row, its end token included.
    """
    base = base_model_of(model)
    cache, cache_name = DynamicCache(config=base.config), _cache_name(base)
    rows, found = list(range(len(ids))), [[] for _ in ids]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rules = sampling(model, temperature) if temperature else None
    for _ in range(max_new_tokens):
        options = {"attention_mask": mask, "position_ids": positions, cache_name: cache}
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options).logits[:, -1]
        if rules is None:
            tokens = logits.argmax(-1)
        else:
            scores = rules(ids, logits.float())
            scores = scores.where(~scores.isnan().any(-1, keepdim=True), 0.0)  # of a model that overflows: any token
            tokens = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        for row, token in zip(rows, tokens.tolist()):
            found[row].append(token)
        going = [i for i, row in enumerate(rows) if found[row][-1] not in ends and not stopped(found[row])]
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going)  # on the CPU, as layers of the cache may be on several devices
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions = [rows[i] for i in going], tokens[kept], mask[kept], positions[kept]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return found


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    stops: Sequence[str] = (),
    special_tokens: bool = True,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> list[str]:
    """Generate an answer to each prompt, shared over the processes, in batches of like length and equal temperature.

    Args:
        model: in eval mode, on its device; the same on every process.
        tokenizer: the model's.
        prompts: the texts that the model sees, templated.
        temperatures: one for each prompt; 0 takes the likeliest token.
        max_new_tokens: of an answer, at most; a prompt that leaves too little room loses its beginning.
        stops: strings that end an answer; it is cut before them.
        special_tokens: whether the tokenizer adds its own to a prompt.
        batch_size: sequences of a forward pass, on each process.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        seed: of the draws.
        progress: the label of a progress bar on the first process; None for no bar.

    Returns:
        The answers, in the order of the prompts, the same on every process.
    """
    limit = position_limit(model.config)
    encoded = tokenizer(list(prompts), add_special_tokens=special_tokens)["input_ids"]
    if limit is not None and check_room(max_new_tokens, limit):
        room = limit.tokens - max_new_tokens
        if cut := sum(len(ids) > room for ids in encoded):
            label = f"{progress}: " if progress else ""
            logger.warning(f"{label}{cut} of {len(encoded)} prompts lose their beginning, {limit}")
        encoded = [ids[-room:] for ids in encoded]
    share = my_share(range(len(prompts)), model)
    ends = end_ids(model, tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stopped, generator = StopWords(tokenizer, stops), torch.Generator(device_of(model)).manual_seed(seed)
    autocast = torch.autocast(device_of(model).type, autocast_dtype, enabled=autocast_dtype is not None)

    def compute() -> dict[int, str]:
        texts = {}
        bar = tqdm(total=len(share), desc=progress, disable=progress is None or not is_first_process())
        with bar, autocast:
            for indices in _batches(share, encoded, temperatures, batch_size):
                ids, mask = padded([encoded[i] for i in indices], pad, device_of(model), side="left")
                options = {"max_new_tokens": max_new_tokens, "temperature": temperatures[indices[0]]}
                if can_generate_rows(model):
                    rows = generate_rows(model, ids, mask, ends=ends, stopped=stopped, generator=generator, **options)
                else:
                    rows = _generate_by_transformers(model, ids, mask, ends=ends, stopped=stopped, pad=pad, **options)
                for i, row in zip(indices, rows):
                    text = tokenizer.decode(row, skip_special_tokens=True)
                    for stop in stops:
                        text = text.split(stop, 1)[0]
                    texts[i] = text
                bar.update(len(indices))
        return texts

    texts = merge_shares(compute)
    return [texts[i] for i in range(len(prompts))]


def check_room(max_new_tokens: int, limit: PositionLimit) -> bool:
    """Return whether answers leave a prompt any of the positions that a model takes, or was trained on.

    Raises:
        UserError: they do not, and there are no positions beyond.
    """
    if limit.hard and max_new_tokens >= limit.tokens:
        raise UserError(f"max_new_tokens: {max_new_tokens} leave no room for a prompt, {limit}")
    return max_new_tokens < limit.tokens


def _generate_by_transformers(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    ends: Collection[int],
    stopped: Callable[[Sequence[int]], bool],
    temperature: float,
    pad: int,
) -> list[list[int]]:
    """Generate by `transformers.generate`, for models with rules of their own; rows that have ended are padded."""

    def ended(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([stopped(row) for row in tokens[:, ids.shape[1] :].tolist()], device=tokens.device)

    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "eos_token_id": sorted(ends) or None}
    options |= {"stopping_criteria": StoppingCriteriaList([ended])}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def _batches(
    share: Sequence[int], encoded: Sequence[Sequence[int]], temperatures: Sequence[float], batch_size: int
) -> Iterator[list[int]]:
    order = sorted(share, key=lambda i: (temperatures[i], -len(encoded[i])))
    for _, group in groupby(order, key=lambda i: temperatures[i]):
        same = list(group)
        yield from (same[first : first + batch_size] for first in range(0, len(same), batch_size))
