"""Walk the calibration batches through the decoder one layer at a time.

The accelerator holds one decoder layer, its Grams and one batch; hidden states wait on the accelerator, on the CPU or in
a memory-mapped file, weights wherever the model keeps them, also still in their safetensors files (`WeightFiles`).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import psutil
import torch
from accelerate.utils import recursively_apply
from torch import nn
from tqdm import tqdm

from lora_null.batches import (
    TokenBatch,
    backbone,
    check_architecture,
    checked_batches,
    count_tokens,
    input_device,
    pieces,
    token_batches,
)
from lora_null.calibration import (
    Calibration,
    InputMeter,
    InputStats,
    LoadBalance,
    measure_inputs,
    measuring,
    sum_over_processes,
)
from lora_null.checkpoint_reader import WeightFiles
from lora_null.utils.distributed import device_of, get_logger, is_first_process, processes_here, together
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import base_model_of, release_freed_memory, replaced

logger = get_logger(__name__)

CHECK_TOKENS = 16
Form = Literal["auto", "layers", "hooks"]
ALL = "all"  # the one part of a model that is not walked layer by layer
# What a decoder or a layer raises that was not made for being run in parts.
CANNOT_RUN = (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError)
MEMORY_SHARE = 0.25  # of the free memory, at most, for hidden states


class DoesNotFit(Exception):
    """The forward pass is not a chain of decoder layers that hand one tensor on; callers may fall back to hooks."""


class NotAChain(UserError):
    """What `DoesNotFit` becomes where hooks are no way out: the model has to be read layer by layer."""


@dataclass
class _Call:
    """How the decoder calls one layer on one batch, apart from the hidden states; on the device where the layer runs."""

    args: tuple
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        return _hidden(layer(hidden.to(device), *self.args, **self.kwargs))


def _hidden(out: Any) -> torch.Tensor:
    """Return the hidden states of what a decoder layer gives: GPT-1's gives a list, most a tuple or the tensor itself."""
    return out[0] if isinstance(out, tuple | list) else out


def decoder_layers(model: nn.Module, modules: Iterable[str]) -> dict[str, nn.Module]:
    """Return the decoder's layers by name: the outermost module list that holds all `modules`.

    Raises:
        DoesNotFit: no single list holds them.
    """
    inner = base_model_of(model)
    names = list(modules)
    for name, child in inner.named_modules():
        if isinstance(child, nn.ModuleList) and all(module.startswith(f"{name}.") for module in names):
            return {f"{name}.{i}": layer for i, layer in enumerate(child)}
    raise DoesNotFit("the target modules are not all inside one list of decoder layers")


def walk_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    gram: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    weights: WeightFiles | None = None,
    skip: Container[str] = (),
    progress: bool = True,
) -> Iterator[tuple[str, Calibration]]:
    """Measure the inputs of `modules` layer by layer; yields (layer name, what its modules read) in order.

    While a layer is yielded its weights are at hand, and the model is in the state of `measuring`: exhaust the generator
    or close it. A layer without target modules is not yielded. Under an initialized `torch.distributed` group every
    process walks its share of the batches; the sums are everywhere, a Gram on its owner alone.

    Args:
        model, modules, batches, gram, seed: as in `measure_inputs`.
        device: where the layers run; where they are, if None.
        weights: the files to read each layer from, if the model is still without weights (meta device).
        skip: names of layers that are only to be run, their modules having been measured before; they are not yielded.
        progress: show a progress bar (of the first process).

    Raises:
        DoesNotFit: before anything is measured, if the model is no such chain.
        UserError: as `measure_inputs`.
    """
    check_architecture(model)
    batches = checked_batches(model, batches)
    tokens = count_tokens(batches)
    layers = decoder_layers(model, modules)
    last = max(i for i, name in enumerate(layers) if _inside(name, modules))
    with measuring(model), contextlib.ExitStack() as stack:
        if weights is None:
            together(lambda: _check_chain(model, layers, batches), alike=(UserError, DoesNotFit))
        device = device or device_of(next(iter(layers.values())))
        device = torch.device("cpu") if device.type == "meta" else device
        with weights.outside(model, layers) if weights is not None else contextlib.nullcontext():
            own = token_batches(batches, input_device(model), seed, runs_on=device)
            record = partial(_record, model, layers, own, device)
            calls, hidden = together(record, alike=(UserError, DoesNotFit))
        states = _HiddenStates(hidden, device, stack)
        del hidden  # or the first ones would stay in memory beside all later ones
        balance = LoadBalance()
        names = list(layers)[: last + 1]
        bar = tqdm(names, desc="initializing", unit="layer", disable=not (progress and is_first_process()))
        for i, name in enumerate(bar):
            targets = {} if name in skip else _inside(name, modules)
            with _resident(layers[name], name, states.device, weights):
                start = time.perf_counter()
                meter = InputMeter(targets, gram=gram, tokens=tokens)
                run = partial(_run_layer, layers[name], own, [of_batch[i] for of_batch in calls], states, meter)
                with meter.attached():
                    part = together(run)
                if targets:
                    sum_over_processes(part, balance)
                    part.seconds = time.perf_counter() - start
                    yield name, part
            if weights is not None:
                release_freed_memory()


def _run_layer(
    layer: nn.Module, batches: Sequence[TokenBatch], calls: Sequence[_Call], states: _HiddenStates, meter: InputMeter
) -> Calibration:
    """Run one layer on this process's batches, whose hidden states become its outputs; return what was measured."""
    for at, (batch, call) in enumerate(zip(batches, calls)):
        meter.begin(batch)
        states[at] = call.run(layer, states[at], states.device)
    return meter.result()


def visit_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    weights: WeightFiles,
    *,
    device: torch.device | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Yield (layer name, its modules) in order, without a forward pass; while a layer is yielded its weights are at hand.

    Args:
        model, modules: as in `walk_layers`.
        weights: the files to read each layer from.
        device: where its weights go; None for the CPU.
        progress: show a progress bar (of the first process).

    Raises:
        NotAChain: the modules are not all inside one list of decoder layers.
    """
    try:
        layers = decoder_layers(model, modules)
    except DoesNotFit as reason:
        raise _not_a_chain(reason) from None
    found = {name: inside for name in layers if (inside := _inside(name, modules))}
    for name in tqdm(found, desc="initializing", unit="layer", disable=not (progress and is_first_process())):
        with _resident(layers[name], name, device or torch.device("cpu"), weights):
            yield name, found[name]
        release_freed_memory()


def measure_in_parts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    form: Form = "auto",
    device: torch.device | None = None,
    weights: WeightFiles | None = None,
    skip: Container[str] = (),
    gram: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[str, Calibration]]:
    """Yield what modules read, layer by layer, or at once as the part `ALL` where the model is no such chain.

    Args:
        form: "layers" insists on walking the layers, "hooks" on measuring all at once, "auto" takes what the model allows.
        model, modules, batches, device, weights, skip, gram, seed, progress: as in `walk_layers`.

    Raises:
        NotAChain: the model is no such chain, and `form` or weights in files ask for it.
        UserError: as `measure_inputs`.
    """
    measure: dict[str, Any] = {"gram": gram, "seed": seed, "progress": progress}
    if form != "hooks":
        try:
            yield from walk_layers(model, modules, batches, device=device, weights=weights, skip=skip, **measure)
            return
        except DoesNotFit as reason:
            if form == "layers" or weights is not None:
                raise _not_a_chain(reason) from None
            if gram:
                where = device_of(model)
                moved = f", on {where}, where the model is" if device is not None and device.type != where.type else ""
                logger.warning(
                    f"initialization: not layer by layer, {reason}; the Grams of all layers are held at once{moved}"
                )
    part = measure_inputs(model, modules, batches, **measure)
    LoadBalance().assign(part.inputs)
    yield ALL, part


def measure_on_each(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sets: Sequence[Iterable[Mapping[str, Any]]],
    *,
    progress: bool = True,
    **options: Any,
) -> Iterator[list[tuple[InputStats, ...]]]:
    """Yield what modules read on several sets of batches, set by set for each input: of one layer after the other, or of all.

    Args:
        model, modules, options: as in `measure_in_parts`.
        sets: the sets of batches.
        progress: show a progress bar, one for all of them.
    """
    with contextlib.ExitStack() as stack:
        walks = [
            stack.enter_context(
                contextlib.closing(measure_in_parts(model, modules, batches, **options, progress=shown))
            )
            for batches, shown in zip(sets, (progress, *[False] * len(sets)))
        ]
        for parts in zip(*walks, strict=True):
            first, *others = (part for _, part in parts)
            of_module = [{name: stats for stats in part.inputs for name in stats.modules} for part in others]
            yield [(stats, *(known[stats.modules[0]] for known in of_module)) for stats in first.inputs]


def _not_a_chain(reason: DoesNotFit) -> NotAChain:
    return NotAChain(f"initialization: this model cannot be walked layer by layer, {reason}")


def _inside(layer: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in modules.items() if name.startswith(f"{layer}.")}


def _record(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[TokenBatch], device: torch.device
) -> tuple[list[list[_Call]], list[torch.Tensor]]:
    """Run the decoder with layers that only note how they are called; return each batch's calls and first hidden states.

    Each layer gets its own mask and positions this way, whatever kinds of attention the model mixes; what layers share goes
    to the device once.
    """
    failures = []
    for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):  # some decoders expect a tuple of their layers
        try:
            calls, hidden = zip(*(_record_batch(model, layers, batch, device, wrap) for batch in batches))
            return list(calls), list(hidden)
        except DoesNotFit as reason:
            failures.append(reason)
    raise failures[0]


def _record_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: TokenBatch, device: torch.device, wrap: Callable
) -> tuple[list[_Call], torch.Tensor]:
    calls: list[_Call] = []
    first: list[torch.Tensor] = []

    def stub(position: int) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if position != len(calls) or (first and hidden is not first[0]):
                raise DoesNotFit("its decoder does more between its layers than hand the hidden states on")
            first[:] = [hidden]
            calls.append(_Call(args, kwargs))
            return wrap(hidden)

        return forward

    with contextlib.ExitStack() as stack:
        for position, layer in enumerate(layers.values()):
            stack.enter_context(replaced(layer, "forward", stub(position)))
        try:
            batch.run(backbone(model))
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            raise DoesNotFit(f"its decoder cannot be run without its layers ({error})") from error
    if len(calls) != len(layers):
        raise DoesNotFit(f"its decoder calls {len(calls)} of {len(layers)} layers")
    move = cache(lambda tensor: tensor.to(device))  # what layers share, once
    return [_Call(*recursively_apply(move, (call.args, call.kwargs))) for call in calls], first[0]


def _check_chain(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]) -> None:
    """Compare the walk, each layer over all batches, with plain forward passes, on a few tokens.

    The same operations on the same numbers give the same bits; where they do not, the difference has to be as small as
    that of a forward pass run twice. Batches of equal and of other shapes show what a model keeps from one layer's call
    for the next one's.
    """
    if len({device_of(layer) for layer in layers.values()}) > 1:
        raise DoesNotFit("its layers lie on several devices")
    *_, final = layers.values()
    seen: list[torch.Tensor] = []
    few = _few_tokens(model, batches)
    device = device_of(final)
    with _attention_for(device, model):
        with final.register_forward_hook(lambda _, args, out: seen.append(_hidden(out))):
            for batch in (*few, few[0]):
                batch.run(backbone(model))
        calls, states = _record(model, layers, few, device)
        try:
            for i, layer in enumerate(layers.values()):
                for at, call in enumerate(calls):
                    states[at] = call[i].run(layer, states[at], device_of(layer))
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            raise DoesNotFit(f"its decoder layers cannot be run alone ({error})") from error
    *plain, again = seen
    noise = _difference(few[0], plain[0], again)
    if any(_difference(*found) > 4 * noise for found in zip(few, plain, states)):
        raise DoesNotFit("its decoder layers alone do not give what the whole decoder gives")


@contextlib.contextmanager
def _attention_for(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Let a model that lies on a CPU attend without flash-attn, whose kernels are for GPUs alone."""
    config = getattr(base_model_of(model), "config", None)
    before = getattr(config, "_attn_implementation", None)
    replace = device.type == "cpu" and "flash" in str(before)
    if replace:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        if replace:
            config._attn_implementation = before


def _few_tokens(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[TokenBatch]:
    """Return small batches of tokens that the batches hold: two of one shape, one of another, padded where those are."""
    ids, masks = ([torch.as_tensor(batch[key]).cpu() for batch in batches] for key in ("input_ids", "attention_mask"))
    held = torch.cat([i[m.bool()] for i, m in zip(ids, masks)])[: 2 * CHECK_TOKENS]
    held = held.repeat(-(-2 * CHECK_TOKENS // len(held)))[: 2 * CHECK_TOKENS].view(2, CHECK_TOKENS)
    shorter = held[:, : CHECK_TOKENS * 3 // 4].clone()
    mask = torch.ones_like(shorter)
    padding = [i[m == 0] for i, m in zip(ids, masks) if not m.all()]
    if padding:
        at = slice(0, 4) if any(not m[:, 0].all() for m in masks) else slice(-4, None)
        shorter[0, at], mask[0, at] = padding[0][0], 0
    whole = torch.ones_like(held)
    few = [(held, whole), (held.flip(0, 1), whole), (shorter, mask)]
    found = checked_batches(model, [{"input_ids": tokens, "attention_mask": kept} for tokens, kept in few])
    return [piece for batch in found for piece in pieces(batch, 0, input_device(model), seed=0)]


def _difference(batch: TokenBatch, one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference of two hidden states, padding excluded; NaN counts as infinite."""
    flat, against = batch.flat(one), batch.flat(other.to(one.device))
    if flat is None or against is None:
        return float("inf")
    apart = batch.rows(flat).double() - batch.rows(against).double()
    found = torch.linalg.vector_norm(apart).item()
    return found if found == found else float("inf")


class _HiddenStates:
    """The hidden states of every batch between two layers, where they fit: device, CPU, or a memory-mapped file."""

    def __init__(self, first: Iterable[torch.Tensor], device: torch.device, stack: contextlib.ExitStack) -> None:
        self.device = device
        self.tensors, self.in_files = list(first), False
        size = sum(tensor.nbytes for tensor in self.tensors)
        if size <= MEMORY_SHARE * _free_bytes(device):
            self.tensors = [tensor.to(device) for tensor in self.tensors]
        elif size * processes_here() <= MEMORY_SHARE * _free_bytes(torch.device("cpu")):
            self.tensors = [tensor.cpu() for tensor in self.tensors]
        else:
            self.in_files = True
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_null_hidden_"))
            for i, tensor in enumerate(self.tensors):
                mapped = torch.from_file(f"{folder}/{i}", shared=True, size=tensor.numel(), dtype=tensor.dtype)
                self.tensors[i] = mapped.view(tensor.shape).copy_(tensor)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensors[index]

    def __setitem__(self, index: int, hidden: torch.Tensor) -> None:
        kept = self.tensors[index]
        if self.in_files or kept.device != hidden.device:
            kept.copy_(hidden)
        else:
            self.tensors[index] = hidden


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _resident(layer: nn.Module, name: str, device: torch.device, weights: WeightFiles | None) -> Iterator[None]:
    """Have the layer's weights on the device; afterwards back where they were."""
    with contextlib.ExitStack() as stack:
        if weights is not None:
            stack.enter_context(weights.loaded(layer, name))
        home = device_of(layer)
        if home != device:
            layer.to(device)
            stack.callback(layer.to, home)
        yield
