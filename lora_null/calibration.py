"""Measure what the target linears read on the calibration batches: Gram matrices and sketches of their inputs.

`InputMeter` adds up the statistics while forward passes run; `measure_inputs` is the hook form, one plain forward pass
per batch and the Grams of all layers at once. `layerwise.walk_layers` is the form that needs one layer at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedConfig

from lora_null.gram import Gram
from lora_null.utils.distributed import for_collective, get_logger, is_first_process, rank_and_world, together
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit, is_shifted_by_padding, position_limit
from lora_null.utils.model_state import base_model_of, full_precision, preserve
from lora_null.utils.quantized import base_layer_of, weight_of

SKETCH_COLUMNS = 64
ENERGY_ROWS = 1024
INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch; the last may be absent
# What a forward pass takes that changes nothing in its layers.
NOT_READ = ("labels", "logits_to_keep", "num_logits_to_keep", "return_dict", "use_cache")
NOT_READ += ("output_attentions", "output_hidden_states", "output_router_logits")
CPU_TOKENS = 1024  # of one forward pass on a CPU: more, and the activations leave its caches (10% slower at 4,096)
logger = get_logger(__name__)


class NotFinite(UserError):
    """An input is NaN or infinite."""


@dataclass
class InputStats:
    """Statistics of one distinct input X (d_in × N), shared by every module that reads it (q, k, v; gate, up).

    Attributes:
        modules: names of the modules that read this input, in the order of their first call.
        gram: C = X Xᵀ, (d_in, d_in) float64; None where it was not asked for, is another rank's, or has been solved.
        sketch: X Ω / √k, (d_in, k) float64 with Ω standard normal, so that E[S Sᵀ] = C; k = 64.
        tokens: N, the columns of X: calibration tokens, padding excluded; counted once for each call of the module.
        owner: the rank that holds the Gram and solves it.
    """

    modules: list[str]
    gram: torch.Tensor | None
    sketch: torch.Tensor
    tokens: int = 0
    owner: int = 0


@dataclass
class Calibration:
    """What was measured in one pass over the calibration batches: of the whole model, or of one decoder layer.

    Attributes:
        inputs: one entry per distinct input.
        output_energy: per module name ‖W0 X‖²_F, the bias excluded.
        projected: per module name L, (r, r) float64 with L Lᵀ = A0 X Xᵀ A0ᵀ, once its factors are solved.
        seconds: wall time of the pass.
    """

    inputs: list[InputStats] = field(default_factory=list)
    output_energy: dict[str, float] = field(default_factory=dict)
    projected: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    def input_of(self, module: str) -> InputStats:
        """Return the statistics of the input that `module` reads."""
        return next(stats for stats in self.inputs if module in stats.modules)

    def sketches(self, modules: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the sketches (d_in, k) of what modules read, in float32; modules that share an input share its sketch."""
        single = {id(stats): stats.sketch.float() for stats in self.inputs}
        return {name: single[id(self.input_of(name))] for name in modules}

    def add(self, part: Calibration) -> None:
        """Take in what was measured of other modules."""
        self.inputs += part.inputs
        self.output_energy |= part.output_energy
        self.projected |= part.projected
        self.seconds += part.seconds


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
    """Return this rank's share of the batches; the Gaussian of a batch is the same whichever rank draws it.

    A rank without a share gets the first batch, not counted, so that it learns which modules share an input. On a CPU
    batches are cut into fewer rows.

    Args:
        device: where the inputs go.
        runs_on: where the layers run, if elsewhere.
    """
    runs_on = runs_on or device
    most = None if runs_on.type == "cuda" else CPU_TOKENS
    rank, world = rank_and_world()
    own = range(rank, len(batches), world)
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


def measure_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    gram: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Run the model over the batches and measure the inputs of `modules`, padding excluded.

    Under an initialized `torch.distributed` group every rank passes the same batches, computes its share of them, and
    gets the same sums. Mode, gradients, cache flag and random state are as before afterwards.

    Args:
        model: called as `model(input_ids=…, attention_mask=…)`, in eval mode without gradients.
        modules: name → linear (or the layer that wraps it), all inside `model`.
        batches: dicts with `input_ids`, `attention_mask` and maybe `position_ids`, (batch, length) each.
        gram: measure C = X Xᵀ; without it only sketches and output energies are.
        seed: of the sketch's Gaussian.

    Raises:
        UserError: as `checked_batches`; a module that no batch reaches, an input that is all zero, NaN or infinite.
    """
    start = time.perf_counter()
    check_architecture(model)
    batches = checked_batches(model, batches)
    own = token_batches(batches, input_device(model), seed)
    meter = InputMeter(modules, gram=gram, tokens=count_tokens(batches))

    def measure() -> Calibration:
        for batch in tqdm(own, desc="calibrating", unit="batch", disable=not (progress and is_first_process())):
            meter.begin(batch)
            batch.run(backbone(model))
        return meter.result()

    with measuring(model), meter.attached():
        calibration = together(measure)
    sum_over_ranks(calibration)
    calibration.seconds = time.perf_counter() - start
    return calibration


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


def count_tokens(batches: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of tokens in the batches, padding excluded."""
    return sum(int(torch.as_tensor(batch["attention_mask"]).sum()) for batch in batches)


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run the original model: eval mode, no gradients, adapters off, not compiled; everything restored afterwards."""
    base_only = getattr(model, "disable_adapter", contextlib.nullcontext)
    compiled = any(module._compiled_call_impl or "_orig_mod" in module._modules for module in model.modules())
    uncompiled = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with preserve(model), base_only(), torch.no_grad(), uncompiled:
        model.eval()
        yield


def backbone(model: nn.Module) -> nn.Module:
    """Return the decoder without its language-model head, whose logits calibration has no use for."""
    inner = base_model_of(model)
    return getattr(inner, getattr(inner, "base_model_prefix", "") or "-", inner)


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the model's embedding, on which token ids belong."""
    inner = base_model_of(model)
    return inner.get_input_embeddings().weight.device


class InputMeter:
    """Forward hooks that add up the statistics of each distinct input, found by the identity of the input tensor.

    ‖W0 X‖ is taken from the outputs; where a bias is in them, whose size may drown W0 x in the rounding of 16 bits, from
    C as tr(W0 C W0ᵀ), or without C by multiplying once more.

    Args:
        modules: name → linear, or the layer that wraps it.
        gram: whether to add up C as well.
        tokens: N, how many tokens there are in all batches of all ranks.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, gram: bool, tokens: int) -> None:
        self.modules = modules
        self.tokens = tokens
        self.with_gram = gram
        self.stats: dict[str, InputStats] = {}  # by leader: the first module to read the input
        self.grams: dict[str, Gram] = {}
        self.leader: dict[str, str] = {}
        self.calls: dict[str, int] = {}  # by leader, in this forward pass
        self.output_energy: dict[str, torch.Tensor] = {}
        self.finite: dict[str, list[tuple[TokenBatch, torch.Tensor]]] = {}  # by leader: batch, (tokens,) bool
        self.recent: list[tuple[weakref.ref, str]] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Measure every forward pass inside this context."""
        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                handle = base_layer_of(module).register_forward_hook(
                    lambda _, args, out, name=name: self._on_forward(name, args[0], out)
                )
                stack.callback(handle.remove)
            yield

    def begin(self, batch: TokenBatch) -> None:
        """Say which batch the next forward pass is of."""
        self.batch = batch
        self.recent, self.calls = [], {}

    def _on_forward(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        flat = self.batch.flat(x)
        if flat is None:
            raise UserError(
                f"calibration: {name} reads {x.shape[:-1].numel()} rows of a batch, not its tokens, leave it out"
            )
        leader = self._leader(name, x)
        if not self.batch.counted:
            return
        has_bias = self._has_bias(name)
        if not (has_bias and self.with_gram):
            clean = (
                nn.functional.linear(flat, weight_of(self.modules[name]).to(flat))
                if has_bias
                else self.batch.flat(out)
            )
            energy = self.batch.rows(_norms(clean)[:, None]).double().square().sum()
            self.output_energy[name] = self.output_energy.get(name, 0.0) + energy
        if leader == name:
            self._add(name, flat)

    def _has_bias(self, name: str) -> bool:
        return getattr(base_layer_of(self.modules[name]), "bias", None) is not None

    def _leader(self, name: str, x: torch.Tensor) -> str:
        """Return the first module that read this very tensor in this forward pass; remember it at the first batch."""
        now = next((leader for ref, leader in self.recent if ref() is x), name)
        if now == name:
            self.recent = [(ref, leader) for ref, leader in self.recent if ref() is not None]
            self.recent.append((weakref.ref(x), name))
        if self.leader.setdefault(name, now) != now:
            # Shared at first, apart now (or the reverse): measured as its own input from here would miss batches.
            other = next(leader for leader in (self.leader[name], now) if leader != name)
            raise UserError(
                f"calibration: {name} reads what {other} reads in some calls, not in others, leave one of them out"
            )
        if now == name and name not in self.stats:
            sketch = torch.zeros(x.shape[-1], SKETCH_COLUMNS, dtype=torch.float64, device=x.device)
            self.stats[name] = InputStats([], None, sketch)
            if self.with_gram:
                self.grams[name] = Gram(x.shape[-1], x.device, self.tokens)
        if name not in self.stats[now].modules:
            self.stats[now].modules.append(name)
        return now

    def _add(self, name: str, x: torch.Tensor) -> None:
        stats = self.stats[name]
        rows = self.batch.rows(x)
        self.finite.setdefault(name, []).append((self.batch, torch.isfinite(_norms(rows))))
        if name in self.grams:
            self.grams[name].add(rows)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        call = self.calls[name] = self.calls.get(name, -1) + 1
        omega = self.batch.draw(call) if call else self.batch.omega
        with full_precision(rows.device):
            stats.sketch += rows.to(dtype).T @ omega.to(rows.device, dtype)
        stats.tokens += len(rows)

    def result(self) -> Calibration:
        """Return what was measured on this rank.

        Raises:
            UserError: a module that no token reached, an input that is NaN or infinite.
        """
        unreached = [name for name in self.modules if name not in self.leader]
        if unreached:
            raise UserError(f"calibration: no token reaches {unreached[0]} ({len(unreached)} modules), leave it out")
        self._check_finite()
        while self.grams:  # handed over, not held
            name, gram = self.grams.popitem()
            self.stats[name].gram = gram.result()
            for module in filter(self._has_bias, self.stats[name].modules):
                self.output_energy[module] = _energy(weight_of(self.modules[module]), self.stats[name].gram)
        energies = dict(zip(self.output_energy, to_floats(self.output_energy.values())))
        return Calibration(list(self.stats.values()), energies)

    def _check_finite(self) -> None:
        """Refuse NaN and infinity, asked once for all batches: on an accelerator every question waits for it."""
        if all(to_floats(torch.cat([whole for _, whole in flags]).all() for flags in self.finite.values())):
            return
        for name, flags in self.finite.items():
            for batch, whole in flags:
                if not whole.all():
                    row = int((~whole).nonzero()[0])
                    position = row if batch.kept is None else int(batch.kept[row])
                    line = position // batch.inputs["input_ids"].shape[1]
                    tokens = batch.inputs["input_ids"][line][batch.inputs["attention_mask"][line].bool()]
                    raise NotFinite(
                        f"calibration: sample {batch.first + line + 1} of batch {batch.index + 1} gives NaN or infinite inputs "
                        f"at {name}; its tokens begin {tokens[:8].tolist()}"
                    )


def to_floats(scalars: Iterable[torch.Tensor]) -> list[float]:
    """Return the values of one-element tensors, stacked first so that their device is waited for once."""
    found = list(scalars)
    return torch.stack([scalar.to(found[0].device) for scalar in found]).tolist() if found else []


def _energy(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return ‖W0 X‖² = tr(W0 C W0ᵀ) in float64, some rows of W0 at a time."""
    rows = (rows.to(gram) for rows in weight.split(ENERGY_ROWS))
    return torch.stack([(some @ gram * some).sum() for some in rows]).sum()


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of every row; NaN or infinite where the row is."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


class LoadBalance:
    """Gives each Gram to the rank with the least to solve so far, in d³; every rank computes the same."""

    def __init__(self) -> None:
        self.load = [0] * rank_and_world()[1]

    def assign(self, inputs: Sequence[InputStats]) -> None:
        """Set the owner of every input, the widest first."""
        for stats in sorted(inputs, key=lambda stats: -len(stats.sketch)):
            stats.owner = self.load.index(min(self.load))
            self.load[stats.owner] += len(stats.sketch) ** 3


def sum_over_ranks(calibration: Calibration, balance: LoadBalance | None = None) -> None:
    """Add the ranks' measurements up, in place: on every rank, but each Gram on its owner alone if `balance` is given.

    Raises:
        UserError: an input that is zero on every token.
    """
    if rank_and_world()[1] > 1:
        if balance is not None:
            balance.assign(calibration.inputs)
        for stats in calibration.inputs:
            _sum_gram(stats, to_owner=balance is not None)
            with for_collective(stats.sketch) as here:
                dist.all_reduce(here)
        _sum_numbers(calibration)
    for stats, any_left in zip(calibration.inputs, to_floats(stats.sketch.any() for stats in calibration.inputs)):
        if not any_left:
            raise UserError(f"calibration: the input of {stats.modules[0]} is zero on every token")


def _sum_gram(stats: InputStats, *, to_owner: bool) -> None:
    if stats.gram is None:
        return
    with for_collective(stats.gram) as here:
        if not to_owner:
            dist.all_reduce(here)
            return
        dist.reduce(here, dst=stats.owner)
    if rank_and_world()[0] != stats.owner:
        stats.gram = None


def _sum_numbers(calibration: Calibration) -> None:
    names = [name for stats in calibration.inputs for name in stats.modules]
    counts = [stats.tokens for stats in calibration.inputs]
    energies = [calibration.output_energy.get(name, 0.0) for name in names]
    sums = torch.tensor([*counts, *energies], dtype=torch.float64, device=calibration.inputs[0].sketch.device)
    with for_collective(sums) as here:
        dist.all_reduce(here)
    for stats, tokens in zip(calibration.inputs, sums[: len(counts)].tolist()):
        stats.tokens = int(tokens)
    calibration.output_energy = dict(zip(names, sums[len(counts) :].tolist()))
