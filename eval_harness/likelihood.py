"""Answer likelihoods: how likely right answers are, and how far a model's predictions on them moved from the base's.

Small models answer few open questions correctly, so accuracy hardly moves when they forget; these measures do.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_null.drift import token_kl
from lora_null.eval_harness.results import Metric, Role, TaskResult
from lora_null.eval_harness.statistics import mean_and_error
from lora_null.eval_harness.tasks import RunOptions, Task
from lora_null.utils.chat import common_prefix
from lora_null.utils.distributed import device_of, gather, get_logger, is_first_process, merge_shares, on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_json, write_json, write_safetensors
from lora_null.utils.limits import PositionLimit, position_limit
from lora_null.utils.model_state import base_model_of
from lora_null.utils.sharding import my_share, parameters_are_sharded
from lora_null.utils.tokens import padded

logger = get_logger(__name__)

TOKENS_HASH, VOCABULARY = "token_ids_sha256", "vocabulary"
REFERENCE_BYTES = 2**30  # of one task's reference, at most


@dataclass(frozen=True)
class AnswerTask(Task):
    """Prompts with their right answers; measures how likely, and how changed, the answers are, in nats per token.

    Args:
        name: what to call the results ("NAME nll", "NAME kl").
        pairs: (prompt text, answer text), e.g. ("Q: who wrote Emma?\\nA:", " Jane Austen").
        kl: also measure KL(base || model) on the answers, against the base model's recorded predictions. For retention
            it is forgetting itself; for the new task it is what RL's Razor (arXiv 2509.04259) predicts forgetting by,
            over the right answers instead of samples, which would differ with the seed. A large one is neither good
            nor bad there. See `Reference` for what long answers cost.
        role: as in `LmEvalTask`.
        special_tokens: whether the tokenizer adds its own, such as a BOS; not to texts of a chat template, which has them.
    """

    name: str
    pairs: list[tuple[str, str]] = field(repr=False)
    kl: bool = False
    role: Role = "task"
    special_tokens: bool = True

    noise_documents: ClassVar[int | None] = None

    @property
    def metric_names(self) -> list[str]:
        return [f"{self.name} {measure}" for measure in ("kl", "nll") if self.kl or measure == "nll"]

    @property
    def reference_file(self) -> str | None:
        return f"{self.name}.safetensors" if self.kl else None

    def check(self) -> None:
        super().check()
        if not self.pairs:
            raise UserError(f"{self} has no pairs of prompt and answer")
        for i, pair in enumerate(self.pairs):
            if len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
                raise UserError(f"{self}: pair {i} must be a prompt and an answer, both with text, not {pair!r}")

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:
        tokenize_pairs(tokenizer, self.pairs, self.name, limit.tokens, special_tokens=self.special_tokens)

    def describe(self, limit: int | None) -> dict[str, Any]:
        pairs = repr(self.pairs[:limit]).encode()
        found = {"kl": self.kl, "limit": limit, "pairs_sha256": hashlib.sha256(pairs).hexdigest()}
        return found if self.special_tokens else found | {"special_tokens": False}

    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Score the answers; the KL is missing where there is no reference.

        Raises:
            UserError: a pair that cannot be scored, or a reference of other pairs or another vocabulary.
        """
        limit = position_limit(model.config)
        beyond = limit.tokens if limit is not None and limit.hard else None
        texts, special = self.pairs[: options.limit], self.special_tokens
        pairs = tokenize_pairs(tokenizer, texts, self.name, beyond, special_tokens=special)
        reference = options.find_reference(self.reference_file)
        record = options.record_reference and reference is not None
        scores = score_answers(model, pairs, reference=reference, record=record, **options.scoring(self.name))
        found = TaskResult(settings={} if scores.kept is None else {"kl_kept_tokens": scores.kept})
        for measure, sums in (("nll", scores.nll), ("kl", scores.kl)):
            if sums is not None:
                values, weights = sums / scores.tokens, scores.tokens
                higher_is_better = None if measure == "kl" and self.role == "task" else False
                metric = Metric(*mean_and_error(values, weights), len(pairs), higher_is_better, self.role, "nats")
                found.add(f"{self.name} {measure}", metric, values, weights)
        return found


@dataclass(frozen=True)
class TokenizedPair:
    """A prompt with its answer: `ids` of both, and the position `start` of the answer's first token (at least 1)."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class AnswerScores:
    """Sums over each question's answer tokens, one entry per question: `nll` and `kl` in nats, and the token counts.

    `kept` is `Reference.kept`.
    """

    nll: np.ndarray
    kl: np.ndarray | None
    tokens: np.ndarray
    kept: int | None = None


def tokenize_pairs(
    tokenizer, pairs: Sequence[tuple[str, str]], name: str, max_length: int | None, *, special_tokens: bool = True
) -> list[TokenizedPair]:
    """Tokenize prompts with their answers as TRL's SFTTrainer does for training.

    Prompt + answer are tokenized as one text, with the tokenizer's own special tokens; the answer starts where that
    diverges from the tokenized prompt. No EOS is added.

    Args:
        pairs: (prompt text, answer text).
        name: of the task, for messages.
        max_length: the most tokens that the model takes; None for no limit.
        special_tokens: see `AnswerTask`.

    Raises:
        UserError: for an empty list, an answer or prompt without tokens, or a pair that is too long.
    """
    if not pairs:
        raise UserError(f"evaluation task {name!r} has no pairs of prompt and answer")
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=special_tokens)["input_ids"]
    texts = tokenizer([prompt + answer for prompt, answer in pairs], add_special_tokens=special_tokens)["input_ids"]
    tokenized = []
    for i, (prompt, ids) in enumerate(zip(prompts, texts)):
        start = common_prefix(prompt, ids)
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
    ids, mask = padded([pair.ids for pair in batch], 0, device_of(model))
    first = min(pair.start for pair in batch) - 1  # the token at position t is predicted at t - 1
    kept = ids.shape[1] - first
    options = {"logits_to_keep": kept} if _keeps_logits(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[:, -kept:]
    spans = [slice(pair.start - 1 - first, len(pair.ids) - 1 - first) for pair in batch]
    return [logits[row, span].float().log_softmax(-1) for row, span in enumerate(spans)]


def score_answers(
    model: nn.Module,
    pairs: Sequence[TokenizedPair],
    *,
    name: str = "",
    batch_size: int = 8,
    reference: Path | None = None,
    record: bool = False,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> AnswerScores:
    """Score every answer once over all processes, and return the same scores on each.

    Args:
        model: in eval mode, on its device; the same on every process.
        name: of the task, for messages and before the bar.
        batch_size: pairs in a forward pass, on each process.
        reference: a file of the base model's log-probabilities; None measures no KL.
        record: write `reference` from this model, and report a KL of 0, instead of comparing with it.
        autocast_dtype: for `torch.autocast`; None computes in the model's own dtype.
        progress: show a progress bar on the first process.

    Raises:
        UserError: if `reference` was recorded for other tokens or another vocabulary.
    """
    limit, longest = position_limit(model.config), max(len(pair.ids) for pair in pairs)
    if limit is not None and longest > limit.tokens:
        logger.warning(f"evaluation task {name!r}: a pair has {longest} tokens, {limit}")
    share = sorted(my_share(range(len(pairs)), model), key=lambda i: -len(pairs[i].ids))
    recorded: dict[str, torch.Tensor] = {}

    def forward() -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, its answer's log-probabilities) of this process's pairs, in batches of like length."""
        bar = tqdm(total=len(share), desc=name, disable=not progress or not is_first_process())
        autocast = torch.autocast(device_of(model).type, autocast_dtype, enabled=autocast_dtype is not None)
        with bar, torch.no_grad():
            for begin in range(0, len(share), batch_size):
                indices = share[begin : begin + batch_size]
                with autocast:
                    log_probs = answer_log_probs(model, [pairs[i] for i in indices])
                yield from zip(indices, log_probs)
                bar.update(len(indices))

    def compute() -> dict[int, tuple[float, float, int]]:
        known = None if reference is None or record else Reference(reference, pairs)
        scores = {}
        kept = record and (is_first_process() or not parameters_are_sharded(model))  # in shards all compute all
        for i, log_probs in forward():
            targets = torch.tensor(pairs[i].ids[pairs[i].start :], device=log_probs.device)
            kl = 0.0 if known is None else known.kl(i, log_probs)
            losses = -log_probs.gather(-1, targets[:, None]).double()
            scores[i] = losses.sum().item(), kl, log_probs.shape[-1]
            if kept:
                recorded.update(reference_tensors(i, log_probs, kept_tokens(pairs, log_probs.shape[-1])))
        return scores

    scores = merge_shares(compute)
    nll, kl, vocabularies = zip(*(scores[i] for i in range(len(pairs))))
    if record:
        shares = gather(recorded)
        merged = {name: tensor for share in shares or () for name, tensor in share.items()}
        on_first_process(lambda: save_reference(reference, merged, pairs, vocabularies[0]))
    tokens = np.array([len(pair.ids) - pair.start for pair in pairs])
    if reference is None:
        return AnswerScores(np.array(nll), None, tokens)
    return AnswerScores(np.array(nll), np.array(kl), tokens, kept_tokens(pairs, vocabularies[0]))


def kept_tokens(pairs: Sequence[TokenizedPair], vocabulary: int) -> int | None:
    """Return how many tokens' log-probabilities a reference holds at each answer token; None for the whole vocabulary."""
    positions = sum(len(pair.ids) - pair.start for pair in pairs)
    if positions * vocabulary * 4 <= REFERENCE_BYTES:
        return None
    return min(max(1, REFERENCE_BYTES // (positions * 8)), vocabulary - 1)


def reference_tensors(i: int, log_probs: torch.Tensor, kept: int | None) -> dict[str, torch.Tensor]:
    """Return what a reference holds of pair i, by name; see `Reference`."""
    if kept is None:
        return {str(i): log_probs.cpu()}
    ids = log_probs.topk(kept).indices
    return {str(i): merge_others(log_probs, ids).cpu(), f"{i} ids": ids.int().cpu()}


def merge_others(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of `ids`, [tokens, k], and last of all other tokens as one outcome, [tokens, k + 1]."""
    others = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), others], dim=-1)


class Reference:
    """The base model's predictions at every answer token, in a file of at most `REFERENCE_BYTES`.

    While (answer tokens) × (vocabulary) × 4 bytes fit, it holds float32 [answer tokens, vocabulary] for each pair, keyed
    by index. Else the k likeliest tokens of each, as many as fit at 8 bytes, with all others as one outcome: the KL of
    these k + 1 outcomes, never more than that of the whole vocabulary (the data processing inequality).

    Attributes:
        kept: k; None where the whole vocabulary is there.

    Raises:
        UserError: the file was recorded for other token ids.
    """

    def __init__(self, path: Path, pairs: Sequence[TokenizedPair]) -> None:
        self.path, self.file = path, safe_open(path, framework="pt")
        if (self.file.metadata() or {}).get(TOKENS_HASH) != hash_pairs(pairs):
            raise UserError(
                f"the reference {path} was recorded for other prompts, answers or another tokenizer; record it again"
            )
        self.vocabulary = int(self.file.metadata()[VOCABULARY])
        self.kept = kept_tokens(pairs, self.vocabulary)

    def kl(self, i: int, log_probs: torch.Tensor) -> float:
        """Return KL(base || model) summed over pair i's answer tokens, from the model's [answer tokens, vocabulary].

        Raises:
            UserError: the model has another vocabulary.
        """
        if log_probs.shape[-1] != self.vocabulary:
            raise UserError(
                f"the reference {self.path} has a vocabulary of {self.vocabulary} tokens, the model "
                f"{log_probs.shape[-1]}; they cannot be compared"
            )
        if self.kept is not None:
            log_probs = merge_others(log_probs, self.file.get_tensor(f"{i} ids").to(log_probs.device).long())
        return token_kl(self.file.get_tensor(str(i)).to(log_probs.device), log_probs).sum().item()


def save_reference(
    path: Path, tensors: dict[str, torch.Tensor], pairs: Sequence[TokenizedPair], vocabulary: int
) -> None:
    """Write the file that `Reference` reads: complete, or not at all."""
    write_safetensors(path, tensors, {TOKENS_HASH: hash_pairs(pairs), VOCABULARY: str(vocabulary)})


def record_or_read_base(path: Path, pairs: Sequence[TokenizedPair], values: np.ndarray, *, record: bool) -> np.ndarray:
    """Return the base model's values, one per pair, on every process: `values` themselves where this is it.

    Args:
        path: the file that they are written to where `record` is set, and read from.

    Raises:
        UserError: they were recorded for other pairs, or the base gives no numbers.
    """

    def read() -> np.ndarray:
        if record:
            if not np.isfinite(values).all():
                first = int(np.argmin(np.isfinite(values)))
                raise UserError(f"{path.name}: the base gives no finite loss on row {first}, but {values[first]}")
            write_json(path, {TOKENS_HASH: hash_pairs(pairs), "values": values.tolist()})
        saved = read_json(path)
        if saved[TOKENS_HASH] != hash_pairs(pairs):
            raise UserError(f"the reference {path} was recorded for other texts or another tokenizer; record it again")
        return np.array(saved["values"])

    return on_first_process(read)


def hash_pairs(pairs: Sequence[TokenizedPair]) -> str:
    """Return a hash of token ids and of where the answers start."""
    return hashlib.sha256(repr([(pair.ids, pair.start) for pair in pairs]).encode()).hexdigest()


def _keeps_logits(model: nn.Module) -> bool:
    base = base_model_of(model)
    return "logits_to_keep" in inspect.signature(base.forward).parameters
