"""Generate text for a batch whose rows end at different times: a row that has ended costs nothing more.

`transformers.generate` goes on until every row of the batch has ended, and lm-eval's stop criterion until all rows have
met the *same* stop string, mostly to the last token that is allowed. Here a row leaves the batch, and the key-value
cache, as soon as it ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from transformers import DynamicCache

NEUTRAL = {"repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "guidance_scale": (None, 1.0)}
NEUTRAL |= {"no_repeat_ngram_size": (None, 0), "min_length": (None, 0), "min_new_tokens": (None, 0)}
NEUTRAL |= {"bad_words_ids": (None,), "suppress_tokens": (None,), "begin_suppress_tokens": (None,)}
NEUTRAL |= {"forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "sequence_bias": (None,)}


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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(base.forward).parameters
    settings = getattr(base, "generation_config", None)
    return (
        {"position_ids", "logits_to_keep", "past_key_values"} <= set(takes)
        and all(getattr(settings, key, None) in neutral for key, neutral in NEUTRAL.items())
        and all(hasattr(layer, "batch_select_indices") for layer in DynamicCache(config=base.config).layers)
    )


def end_tokens(model: nn.Module) -> set[int]:
    """Return the ids that end a generation by the model's own generation config."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


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
        temperature: 0 takes the likeliest token.
        generator: of the draws, on the model's device.

    Returns:
        The new tokens of each row, its end token included.
    """
    cache = DynamicCache(config=getattr(model, "get_base_model", lambda: model)().config)
    rows, found = list(range(len(ids))), [[] for _ in ids]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options).logits[:, -1]
        tokens = _pick(logits, temperature, generator)
        for row, token in zip(rows, tokens.tolist()):
            found[row].append(token)
        going = [i for i, row in enumerate(rows) if found[row][-1] not in ends and not stopped(found[row])]
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions = [rows[i] for i in going], tokens[kept], mask[kept], positions[kept]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return found


def _pick(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
