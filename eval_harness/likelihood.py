"""How likely right answers are, and how far a model's predictions on them moved from the base model's.

Small models answer few open questions correctly, so accuracy hardly moves when they forget; these measures do.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from lora_null.utils.distributed import broadcast, device_of, gather, merge_shares, my_share, rank_and_world
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_safetensors

TOKENS_HASH = "token_ids_sha256"


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt with its answer: `ids` of both, and the position `start` of the answer's first token (at least 1)."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class AnswerScores:
    """Sums over each question's answer tokens, one entry a question: `nll` and `kl` in nats, and the token counts."""

    nll: np.ndarray
    kl: np.ndarray | None
    tokens: np.ndarray


def tokenize_pairs(
    tokenizer, pairs: Sequence[tuple[str, str]], name: str, max_length: int | None
) -> list[TokenizedPair]:
    """Tokenize prompts with their answers as TRL's SFTTrainer does for training.

    Prompt + answer are tokenized as one text, with the tokenizer's own special tokens; the answer starts where that
    diverges from the tokenized prompt. No EOS is added.

    Args:
        pairs: (prompt text, answer text).
        name: of the task, for messages.
        max_length: the most tokens that the model takes; None for no limit.

    Raises:
        UserError: for an empty list, an answer or prompt without tokens, or a pair that is too long.
    """
    if not pairs:
        raise UserError(f"evaluation task {name!r} has no pairs of prompt and answer")
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    texts = tokenizer([prompt + answer for prompt, answer in pairs])["input_ids"]
    tokenized = []
    for i, (prompt, ids) in enumerate(zip(prompts, texts)):
        start = next((k for k, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids)))
        if start == 0 or start == len(ids):
            part = "prompt" if start == 0 else "answer"
            raise UserError(f"evaluation task {name!r}: the {part} of pair {i} has no tokens: {pairs[i]!r}")
        tokenized.append(TokenizedPair(tuple(ids), start))
    if max_length is not None:
        check_pairs_fit(name, tokenized, max_length)
    return tokenized


def check_pairs_fit(name: str, pairs: Sequence[TokenizedPair], max_length: int) -> None:
    """Raise a UserError that names the first pair longer than the model takes."""
    for i, pair in enumerate(pairs):
        if len(pair.ids) > max_length:
            raise UserError(
                f"evaluation task {name!r}: pair {i} has {len(pair.ids)} tokens, the model takes {max_length}"
            )


def answer_log_probs(model: nn.Module, batch: Sequence[TokenizedPair]) -> list[torch.Tensor]:
    """Return each pair's log-probabilities at its answer tokens: float32 [answer tokens, vocabulary], on the device.

    The pairs are padded on the right. The model computes logits only where the batch has an answer token, through its
    own `logits_to_keep`, so that an architecture's scaling and capping of logits stay its own business.
    """
    width, device = max(len(pair.ids) for pair in batch), device_of(model)
    ids = torch.tensor([pair.ids + (0,) * (width - len(pair.ids)) for pair in batch], device=device)
    mask = torch.tensor([[1] * len(pair.ids) + [0] * (width - len(pair.ids)) for pair in batch], device=device)
    first = min(pair.start for pair in batch) - 1  # the token at position t is predicted at t - 1
    options = {"logits_to_keep": width - first} if _keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    logits = logits[:, -(width - first) :]
    return [
        logits[row, pair.start - 1 - first : len(pair.ids) - 1 - first].float().log_softmax(-1)
        for row, pair in enumerate(batch)
    ]


def token_nll(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood in nats of each target: [tokens, vocabulary], [tokens] → float64 [tokens]."""
    return -log_probs.gather(-1, targets[:, None])[:, 0].double()


def token_kl(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return KL(base || model) in nats at each token, from two tensors of log-probabilities [tokens, vocabulary]."""
    return F.kl_div(model, base, reduction="none", log_target=True).sum(-1, dtype=torch.float64)


def ratio_estimate(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Return the mean over all tokens, and its standard error clustered by question.

    Tokens of one answer depend on each other, so the question is the unit of sampling. With s_i the sum over the t_i
    tokens of question i, the mean is the ratio estimator R = Σ s_i / Σ t_i and, linearized,
    SE² = n / (n − 1) · Σ (s_i − R t_i)² / (Σ t_i)².

    Args:
        sums: s, [questions].
        counts: t, [questions].

    Returns:
        (R, SE); the standard error of a single question is None.
    """
    n, total = len(sums), counts.sum()
    ratio = sums.sum() / total
    if n < 2:
        return float(ratio), None
    return float(ratio), float(np.sqrt(n / (n - 1) * np.square(sums - ratio * counts).sum()) / total)


def score_answers(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    batch_size: int = 8,
    reference: Path | None = None,
    record: bool = False,
    autocast_dtype: torch.dtype | None = None,
    progress: str | None = None,
) -> AnswerScores:
    """Score every answer once over all ranks, and return the same scores on every rank.

    Args:
        model: in eval mode, on its device; the same on every rank.
        batch_size: pairs in a forward pass, on each rank.
        reference: a file of the base model's log-probabilities; None measures no KL.
        record: write `reference` from this model, and report a KL of 0, instead of comparing with it.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        progress: the label of a progress bar on rank 0; None for no bar.

    Raises:
        UserError: if `reference` was recorded for other tokens or another vocabulary.
    """
    mine = my_share(range(len(pairs)), model)
    kept: dict[str, torch.Tensor] = {}

    def compute() -> dict[int, tuple[float, float | None]]:
        known = None if reference is None or record else open_reference(reference, pairs)
        scores = {}
        for indices, log_probs in _forward(model, pairs, mine, batch_size, autocast_dtype, progress):
            for i, model_log_probs in zip(indices, log_probs):
                targets = torch.tensor(pairs[i].ids[pairs[i].start :], device=model_log_probs.device)
                kl = None if known is None else _kl_sum(known.get_tensor(str(i)), model_log_probs, reference)
                scores[i] = token_nll(model_log_probs, targets).sum().item(), kl
                if record:
                    kept[str(i)] = model_log_probs.cpu()
        return scores

    scores = merge_shares(compute)
    nll, kl = zip(*(scores[i] for i in range(len(pairs))))
    if record:
        _record_reference(reference, kept, pairs)
        kl = np.zeros(len(pairs))
    has_kl = reference is not None
    tokens = np.array([len(pair.ids) - pair.start for pair in pairs])
    return AnswerScores(np.array(nll), np.array(kl, dtype=float) if has_kl else None, tokens)


def open_reference(path: Path, pairs: Sequence[TokenizedPair]) -> safe_open:
    """Open the base model's log-probabilities: one float32 [answer tokens, vocabulary] for each pair, keyed by index.

    Raises:
        UserError: if the file was recorded for other token ids.
    """
    reference = safe_open(path, framework="pt")
    if (reference.metadata() or {}).get(TOKENS_HASH) != _hash(pairs):
        raise UserError(
            f"the reference {path} was recorded for other prompts, answers or another tokenizer; record it again"
        )
    return reference


def save_reference(path: Path, log_probs: dict[str, torch.Tensor], pairs: Sequence[TokenizedPair]) -> None:
    """Write the file that `open_reference` reads: complete, or not at all."""
    write_safetensors(path, log_probs, {TOKENS_HASH: _hash(pairs)})


def _forward(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    mine: Sequence[int],
    batch_size: int,
    autocast_dtype: torch.dtype | None,
    progress: str | None,
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Yield (indices, their answers' log-probabilities) for this rank's pairs, in batches of like length."""
    order = sorted(mine, key=lambda i: -len(pairs[i].ids))
    bar = tqdm(total=len(order), desc=progress, disable=progress is None or rank_and_world()[0] != 0)
    autocast = nullcontext() if autocast_dtype is None else torch.autocast(device_of(model).type, autocast_dtype)
    with bar, torch.no_grad():
        for begin in range(0, len(order), batch_size):
            indices = order[begin : begin + batch_size]
            with autocast:
                log_probs = answer_log_probs(model, [pairs[i] for i in indices])
            yield indices, log_probs
            bar.update(len(indices))


def _kl_sum(base: torch.Tensor, model: torch.Tensor, reference: Path) -> float:
    if base.shape != model.shape:
        raise UserError(
            f"the reference {reference} has a vocabulary of {base.shape[-1]} tokens, the model {model.shape[-1]}; "
            "they cannot be compared"
        )
    return token_kl(base.to(model.device), model).sum().item()


def _record_reference(path: Path, kept: dict[str, torch.Tensor], pairs: Sequence[TokenizedPair]) -> None:
    """Write every rank's part into one file from rank 0; return on every rank when it is there."""
    parts, failure = gather(kept), None
    if parts is not None:
        try:
            save_reference(path, {key: value for part in parts for key, value in part.items()}, pairs)
        except OSError as error:
            failure = error
    if (failure := broadcast(failure)) is not None:
        raise failure


def _keeps_logits(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _hash(pairs: Sequence[TokenizedPair]) -> str:
    return hashlib.sha256(repr([(pair.ids, pair.start) for pair in pairs]).encode()).hexdigest()
