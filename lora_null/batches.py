"""Calibration batches: checked before anything is run, and cut into the pieces that a forward pass takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from lora_null.utils.distributed import get_logger, num_processes, process_index
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit, is_shifted_by_padding, position_limit
from lora_null.utils.model_state import base_model_of

SKETCH_COLUMNS = 64
INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch; the last may be absent
# What a forward pass takes that changes nothing in its layers.
NOT_READ = ("labels", "logits_to_keep", "num_logits_to_keep", "return_dict", "use_cache")
NOT_READ += ("output_attentions", "output_hidden_states", "output_router_logits")
CPU_TOKENS = 1024  # of one forward pass on a CPU: more, and the activations leave its caches (10% slower at 4,096)
logger = get_logger(__name__)


def checked_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], min_tokens: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Return the batches as int64 tensors on the CPU, one text per row, with positions that padding on the left does not move.

    A model that looks positions up counts them from the first column; where that is padding, the tokens are counted.

    Raises:
        UserError: fewer than `min_tokens` tokens; what is no batch for this model, by its number, counted from 1.
    """
    inner = base_model_of(model)
    config, table = getattr(inner, "config", None), inner.get_input_embeddings()
    vocabulary = getattr(table, "num_embeddings", None) or len(table.weight)
    limit = position_limit(config) if isinstance(config, PreTrainedConfig) else None
    takes = "position_ids" in inspect.signature(backbone(model).forward).parameters
    counts = takes and isinstance(config, PreTrainedConfig) and is_shifted_by_padding(config)
    others = other_inputs(model)
    checked = []
    for number, batch in enumerate(batches, start=1):
        try:
            found = _checked_batch(batch, vocabulary, limit, counts=counts)
            if other := next((key for key in batch if key in others and is_input(batch[key])), None):
                raise ValueError(f"has {other}, which changes what is read and is not measured; give text alone")
            if "position_ids" in found and not takes:
                raise ValueError(f"has position_ids, which {type(inner).__name__} does not take; leave them out")
            checked += _one_text_per_row(found)
        except ValueError as reason:
            raise UserError(f"calibration: batch {number} {reason}") from None
    if not checked:
        raise UserError("calibration: there is no batch to measure")
    longest = max(batch["input_ids"].shape[1] for batch in checked)
    if limit is not None and not limit.hard and longest > limit.tokens:
        logger.warning(f"calibration: a window has {longest} tokens, {limit}")
    tokens = count_tokens(checked)
    if tokens < min_tokens:
        raise UserError(f"calibration: only {tokens} tokens, at least {min_tokens} are needed")
    return checked


def _checked_batch(
    batch: Any, vocabulary: int, limit: PositionLimit | None, *, counts: bool
) -> dict[str, torch.Tensor]:
    """Return what is read of a batch; raise a ValueError that says what is wrong with it."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"is a {type(batch).__name__}, not a dict of input_ids and attention_mask")
    lacking = next((key for key in INPUTS[:2] if batch.get(key) is None), None)
    if lacking:
        raise ValueError(f"has no {lacking}; without padding the mask is all ones")
    found = {key: _whole_numbers(key, batch[key]) for key in INPUTS if batch.get(key) is not None}
    ids, mask = found["input_ids"], found["attention_mask"]
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"has input_ids of shape {tuple(ids.shape)}, not (batch, length)")
    for key, tensor in found.items():
        if tensor.shape != ids.shape:
            raise ValueError(f"has {key} of shape {tuple(tensor.shape)}, input_ids of {tuple(ids.shape)}")
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError("has an attention_mask that holds other numbers than 0 and 1")
    if wrong := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise ValueError(
            f"holds the token {wrong[0]}, the model's vocabulary has {vocabulary} (0 to {vocabulary - 1})"
        )
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    if counts and "position_ids" not in found and not torch.equal(counted * mask, columns * mask):
        found["position_ids"] = counted
    positions = found.get("position_ids", columns)
    if positions.min() < 0:
        raise ValueError("has negative position_ids")
    if limit is not None and limit.hard and positions.max() >= limit.tokens:
        raise ValueError(f"has {positions.max() + 1} positions, {limit}")
    return found


def _whole_numbers(key: str, value: Any) -> torch.Tensor:
    """Return a tensor as int64 on the CPU; raise a ValueError for what is no table of whole numbers."""
    try:
        tensor = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"has {key} that are no tensor, nor rows of one length") from None
    whole = tensor.to(torch.int64)
    other = tensor.is_floating_point() or tensor.dtype == torch.bool
    if other and (key != "attention_mask" or not torch.equal(whole.to(tensor.dtype), tensor)):
        raise ValueError(f"has {key} of {str(tensor.dtype).removeprefix('torch.')}, not whole numbers")
    return whole


def _one_text_per_row(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return a batch whose rows hold several texts as batches of one text per row, padded at the end and none larger than it.

    Not every model sees by the positions where a text begins: convolutions, states and tables do not.
    """
    texts = texts_in(batch)
    if len(texts) == int(batch["attention_mask"].any(1).sum()):
        return [batch]
    texts.sort(key=lambda text: len(text["input_ids"]))
    size, found = batch["input_ids"].numel(), []
    while texts:
        count = next(n for n in range(len(texts), 0, -1) if n * len(texts[n - 1]["input_ids"]) <= size)
        group, texts = texts[:count], texts[count:]
        rows = {key: pad_sequence([text[key] for text in group], batch_first=True) for key in group[0]}
        mask = pad_sequence([torch.ones_like(text["input_ids"]) for text in group], batch_first=True)
        found.append({"input_ids": rows.pop("input_ids"), "attention_mask": mask, **rows})
    return found


def texts_in(batch: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Return the texts of a batch without their padding, `input_ids` and maybe `position_ids`, (length,) each.

    A row holds several where positions begin again.
    """
    given = {key: torch.as_tensor(batch[key]).cpu() for key in INPUTS if batch.get(key) is not None}
    masks, texts = given.pop("attention_mask").bool(), []
    for mask, *values in zip(masks, *given.values()):
        kept = {key: value[mask] for key, value in zip(given, values)}
        begins = (kept.get("position_ids", torch.arange(len(kept["input_ids"]))).diff() <= 0).nonzero()[:, 0] + 1
        texts += [dict(zip(kept, text)) for text in zip(*(value.tensor_split(begins) for value in kept.values()))]
    return [text for text in texts if len(text["input_ids"])]


def count_tokens(batches: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of tokens in the batches, padding excluded."""
    return sum(int(torch.as_tensor(batch["attention_mask"]).sum()) for batch in batches)


@dataclass(frozen=True)
class TokenBatch:
    """One calibration batch, or some of its rows, as the meter needs it.

    Attributes:
        index: the batch's place among all batches.
        first: number of the batch's row, from 0, that is row 0 here.
        inputs: `input_ids`, `attention_mask` and maybe `position_ids`, (batch, length) each, on the device of the
            model's inputs.
        kept: (tokens,) int64, positions in (batch · length) that are not padding; None where none is padding.
        omega: (tokens, k) float32, the Gaussian of these tokens' sketch over √k.
        draw: call → omega of a module's second (1), third (2), … call in one forward pass, which adds columns to X.
        counted: False where nothing is added up: the batch only shows which modules share an input.
    """

    index: int
    first: int
    inputs: dict[str, torch.Tensor]
    kept: torch.Tensor | None
    omega: torch.Tensor
    draw: Callable[[int], torch.Tensor]
    counted: bool = True

    def run(self, decoder: nn.Module) -> None:
        """Run a forward pass."""
        takes = inspect.signature(decoder.forward).parameters
        has_cache = "use_cache" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        decoder(**self.inputs, **({"use_cache": False} if has_cache else {}))

    def flat(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return x, one row per token, as (batch · length, d) in the order of `kept`; None where that is not its shape.

        XLNet computes in (length, batch, d); a batch is never as long as it is wide, so the order shows (`pieces`).
        """
        batch, length = self.inputs["input_ids"].shape
        if x.shape[:-1].numel() != batch * length:
            return None
        if x.dim() == 3 and x.shape[:2] == (length, batch):
            x = x.transpose(0, 1)
        return x.reshape(-1, x.shape[-1]) if x.dim() == 2 or len(x) == batch else None

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """Return flat (batch · length, d) as (tokens, d) without its padding."""
        return flat if self.kept is None else flat[self.kept.to(flat.device)]


def token_batches(
    batches: Sequence[Mapping[str, Any]], device: torch.device, seed: int, *, runs_on: torch.device | None = None
) -> list[TokenBatch]:
    """Return this process's share of the batches; the Gaussian of a batch is the same whichever process draws it.

    A process without a share gets the first batch, not counted, so that it learns which modules share an input. On a
    CPU batches are cut into fewer rows.

    Args:
        device: where the inputs go.
        runs_on: where the layers run, if elsewhere.
    """
    runs_on = runs_on or device
    most = None if runs_on.type == "cuda" else CPU_TOKENS
    own = range(process_index(), len(batches), num_processes())
    if not own:
        return pieces(batches[0], 0, device, seed, most, runs_on=runs_on, counted=False)[:1]
    return [piece for i in own for piece in pieces(batches[i], i, device, seed, most, runs_on=runs_on)]


def pieces(
    batch: Mapping[str, Any],
    index: int,
    device: torch.device,
    seed: int,
    most: int | None = None,
    *,
    runs_on: torch.device | None = None,
    counted: bool = True,
) -> list[TokenBatch]:
    """Return one batch, the `index`-th of all, in pieces of whole rows of at most `most` tokens."""
    inputs = {key: torch.as_tensor(batch[key]).to(device) for key in INPUTS if key in batch}
    masks = torch.as_tensor(batch["attention_mask"]).cpu().bool()
    length = masks.shape[1]
    largest = min(len(masks), max(1, most // length)) if most else len(masks)
    fits = (n for n in range(largest, 0, -1) if length not in (n, len(masks) % n))
    rows = next(fits, 1)  # no piece is square, the last one neither: see `TokenBatch.flat`
    masks = [part.flatten() for part in masks.split(rows)]
    ends = list(itertools.accumulate(int(mask.sum()) for mask in masks))
    runs_on = runs_on or device

    def draw(call: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index + call * 2_654_435_761)  # of 32 bits
        return (torch.randn(ends[-1], SKETCH_COLUMNS, generator=generator) / SKETCH_COLUMNS**0.5).to(runs_on)

    omega = draw(0)
    parts = zip(*(value.split(rows) for value in inputs.values()), masks, [0, *ends], ends)
    return [
        TokenBatch(
            index,
            i * rows,
            dict(zip(inputs, values)),
            None if mask.all() else mask.nonzero()[:, 0].to(runs_on),
            omega[start:end],
            lambda call, start=start, end=end: draw(call)[start:end],
            counted,
        )
        for i, (*values, mask, start, end) in enumerate(parts)
    ]


def check_architecture(model: nn.Module) -> None:
    """Refuse, before any work, a model whose forward pass is not that of one sequence of tokens.

    Raises:
        UserError: naming the architecture.
    """
    inner = base_model_of(model)
    kind = getattr(getattr(inner, "config", None), "model_type", None) or type(inner).__name__
    try:
        inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise UserError(
            f"model: {kind} is not a transformers model with one embedding of tokens; calibration needs one that reads input_ids"
        ) from None
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"model: {kind} is an encoder and a decoder, and calibration texts are one sequence; take a decoder-only model"
        )
    reads = getattr(inner, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise UserError(f"model: {kind} reads {reads}, and calibration texts are input_ids; take a language model")


def other_inputs(model: nn.Module) -> set[str]:
    """Return what a model reads beside tokens, by the signatures of its forward passes: images, token types, …"""
    forwards = (inspect.signature(part.forward) for part in (base_model_of(model), backbone(model)))
    named = {
        p.name
        for taken in forwards
        for p in taken.parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return named - {*INPUTS, *NOT_READ}


def is_input(value: Any) -> bool:
    """Return whether a value beside the token ids changes a forward pass: numbers that are not all zero."""
    try:
        return not isinstance(value, bool) and bool(torch.as_tensor(value).any())
    except (TypeError, ValueError, RuntimeError):
        return value is not None


def backbone(model: nn.Module) -> nn.Module:
    """Return the decoder without its language-model head, whose logits calibration has no use for."""
    inner = base_model_of(model)
    return getattr(inner, getattr(inner, "base_model_prefix", "") or "-", inner)


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's embedding, on which token ids belong."""
    inner = base_model_of(model)
    return inner.get_input_embeddings().weight.device
