"""`initialize_lora_null_weights`: calibrate, solve, write, in place; the same on every rank."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_null import store
from lora_null.calibration import (
    Calibration,
    LoadBalance,
    NotFinite,
    check_architecture,
    checked_batches,
    count_tokens,
    measure_inputs,
)
from lora_null.checkpoint_reader import Owned, WeightFiles, base_tensors
from lora_null.config import LoraNullConfig
from lora_null.factors import LayerStats
from lora_null.layer import LoraNullLinear, adapted_layers, is_started
from lora_null.layerwise import DoesNotFit, walk_layers
from lora_null.residual import subtract_residuals
from lora_null.solver import PartSolver
from lora_null.store import SolvedPart
from lora_null.utils.distributed import all_gather, is_sharded, on_first_rank, rank_and_world, say, together
from lora_null.utils.errors import UserError
from lora_null.utils.quantized import is_quantized, stored_statistics, unreadable

MIN_TOKENS = 256
WHAT = "initialization"
Form = Literal["auto", "layers", "hooks"]


@dataclass
class LayerReport:
    """How the initialization went, layer by layer.

    Attributes:
        layers: one `LayerStats` per adapted linear, in the model's order.
        seconds: wall time of the parts: calibrate (forward passes and Grams, of what was reused too), solve, all.
        tokens: calibration tokens.
        base: fingerprint of the base it was made for.
        key: of the initialization, a hash of all that decided it.
    """

    layers: list[LayerStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    base: str = ""
    key: str = ""

    def to_json(self) -> dict[str, Any]:
        layers = [layer.to_json() for layer in self.layers]
        return {
            "tokens": self.tokens,
            "base": self.base,
            "key": self.key,
            "seconds": self.seconds,
            "layers": layers,
        }

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.leakage)
        energy = sum(layer.energy for layer in self.layers) / len(self.layers)
        return (
            f"LoRA-Null: {len(self.layers)} layers from {self.tokens} tokens in {self.seconds['all']:.1f} s; "
            f"leakage at most {worst.leakage:.1e} ({worst.name}), {energy:.2%} of the weights' energy"
        )


@dataclass(frozen=True)
class InitOptions:
    """How to initialize; the defaults are right for a model that is whole on one device.

    Attributes:
        solver: see `bottom_eigenspace`.
        form: "layers" walks the decoder layer by layer, "hooks" runs the whole model with hooks, "auto" takes layers
            where the model is a chain of decoder layers.
        device: where layers run and are solved; None: where their weights are.
        weights: the files to read layers from, for a model without weights (meta device).
        min_tokens: fewest calibration tokens to accept.
        seed: of the drift sketch and of the choice within a null space larger than r.
        cache: keep the result in the cache folder, and reuse an equal one.
        progress: show progress bars (on rank 0).
    """

    solver: str = "auto"
    form: Form = "auto"
    device: torch.device | None = None
    weights: WeightFiles | None = None
    min_tokens: int = MIN_TOKENS
    seed: int = 0
    cache: bool = False
    progress: bool = True


def initialize_lora_null_weights(
    peft_model: PeftModel, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default", **options: Any
) -> LayerReport:
    """Start the adapters of a PEFT model in the null space of what its linears read on `batches`. In place.

    v2: A = A0 frozen, B = 0, the base untouched. v1: A = A0, B = B0, the base becomes W0 − s·B0A0. Either way the model
    computes what it did before. Under `torch.distributed` all ranks call this together with the same batches.

    Args:
        peft_model: made by `get_peft_model(model, LoraNullConfig(…))`, not merged.
        batches: dicts with `input_ids` and `attention_mask`, (batch, length) each; padding is not measured.
        adapter_name: the adapter to start.
        options: those of `InitOptions`.

    Returns:
        The layer report.

    Raises:
        UserError: a configuration that is not `LoraNullConfig`, a target that is no plain linear or shares its weight,
            r above min(d_in, d_out), an adapter already started, or calibration data that cannot carry it.
    """
    return start_adapter(peft_model, batches, InitOptions(**options), adapter_name=adapter_name)[0]


@torch.no_grad()
def start_adapter(
    peft_model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    options: InitOptions = InitOptions(),
    *,
    folder: Path | None = None,
    adapter_name: str = "default",
) -> tuple[LayerReport, Calibration]:
    """`initialize_lora_null_weights`, which also returns the calibration, without Grams, for a `DriftMeter`.

    Args:
        folder: where to leave the result for `load_initialization`; with `options.cache` also in the cache.
    """
    start = time.perf_counter()
    layers = adapted_layers(peft_model, adapter_name)

    def check() -> list[Mapping[str, Any]]:
        check_layers(peft_model, layers, adapter_name)
        return checked_batches(batches, options.min_tokens)

    batches = together(check, what=WHAT)
    base = _fingerprint(peft_model, options.weights)
    key = _key(base, layers, adapter_name, batches, options)
    place = store.cached_folder(key) if options.cache else folder
    parts: dict[str, SolvedPart] = {}
    solver = PartSolver(layers, adapter_name, options.solver, options.seed)
    a_round = 1 if options.weights is not None else solver.parts_a_round()  # a layer's weights stay while it is solved
    with contextlib.ExitStack() as stack:  # generators hold the model's mode: close them here, also on an error
        if options.cache and rank_and_world()[0] == 0:
            stack.enter_context(store.in_use(place))
        done = on_first_rank(lambda: _done(place, key))
        _say_what_is_reused(done, layers, place)
        measured = stack.enter_context(contextlib.closing(_parts(peft_model, layers, batches, options, done)))
        solved = _solved(measured, solver, a_round, done)
        try:
            for name, part in stack.enter_context(contextlib.closing(solved)):
                parts[name] = part
                part.key = key
                if place and name not in done and rank_and_world()[0] == 0:
                    store.write_part(place, name, part)
        except NotFinite as error:
            raise _with_cause(error, layers) from None
        seconds = {"solve": solver.seconds, "all": time.perf_counter() - start}
        report = _report(parts, layers, seconds)
        report.tokens, report.base, report.key = count_tokens(batches), base, key
        on_first_rank(lambda: _finish(report, place, folder))
    settle_adapter(peft_model, adapter_name)
    calibration = Calibration()
    for part in parts.values():
        calibration.add(part.measured)
    return report, calibration


def _done(place: Path | None, key: str) -> dict[str, SolvedPart]:
    """Return the parts that lie in the folder for this very initialization; what is there for another is removed."""
    if place is None:
        return {}
    store.clear_others(place, key)
    return store.read_parts(place)


def _fingerprint(peft_model: PeftModel, weights: WeightFiles | None) -> str:
    """Return the fingerprint of the base: its config and its weights, in memory or still in their files.

    Raises:
        UserError: as `check_whole`; an adapted weight is zero; the ranks have different weights.
    """
    if weights is None:
        check_whole(peft_model)
    model = peft_model.get_base_model()
    layers = adapted_layers(peft_model).items()
    adapted = {f"{name}.weight": name for name, layer in layers if not is_quantized(layer.get_base_layer())}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for owned in base_tensors(model):
            stored = weights.of(owned) if weights is not None else None
            tensor = owned.tensor if stored is None else stored
            if owned.key in adapted and not tensor.any():
                name = adapted[owned.key]
                raise UserError(f"target_modules: the weight of {name} is zero, leave it out (exclude_modules)")
            if owned.saved:
                yield owned.key, tensor
            elif not _changes(model, owned):
                # Computed anew wherever a model is loaded: the last digits differ between devices.
                yield owned.key, tensor.bfloat16() if tensor.is_floating_point() else tensor
        yield from stored_statistics(model)

    config = store.computation(getattr(model, "config", None))
    found = all_gather(together(lambda: store.fingerprint(tensors(), config), what=WHAT))
    if len(set(found)) > 1:
        raise UserError(
            "initialization: the base weights differ between the processes; every process has to load them"
        )
    return found[0]


def _changes(model: nn.Module, owned: Owned) -> bool:
    """Return whether a buffer is one that rotary positions of changing length rewrite in a forward pass."""
    if not owned.leaf.endswith("inv_freq") or owned.leaf.startswith("original"):
        return False
    kinds = getattr(model.get_submodule(owned.key.rpartition(".")[0]), "rope_type", "")
    return any(
        "dynamic" in kind or kind == "longrope" for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
    )


def _with_cause(error: NotFinite, layers: Mapping[str, LoraLayer]) -> UserError:
    """Return the mistake with the weight that it comes from, where that is one of the adapted ones."""
    weights = ((name, layer.get_base_layer().weight) for name, layer in layers.items())
    bad = next((name for name, w in weights if not w.is_meta and not w.isfinite().all()), None)
    return UserError(f"{error}" if bad is None else f"{error}; the weight of {bad} holds NaN or infinite numbers")


def check_whole(model: nn.Module) -> None:
    """Refuse, on all ranks together, a model of which some rank has only a piece, or nothing, of a weight.

    Raises:
        UserError: naming the parameter, and what makes engines load a model whole.
    """
    mine = next((name for name, p in model.named_parameters() if is_sharded(p) or p.is_meta), None)
    name = next(filter(None, all_gather(mine)), None)
    if name is not None:
        raise UserError(
            f"initialization: {name} is not whole on every process; initialize before the model is sharded, and load "
            "it whole (FSDP: fsdp_cpu_ram_efficient_loading: false; ZeRO-3: load it before the training arguments are made)"
        )


def _key(base: str, layers: Mapping[str, LoraLayer], adapter_name: str, batches: list, options: InitOptions) -> str:
    settings = {"solver": options.solver, "form": options.form, "seed": options.seed, "on": str(options.device)}
    keys = all_gather(store.initialization_key(base, layers, adapter_name, batches, **settings))
    if len(set(keys)) > 1:
        raise UserError(
            "initialization: adapter, calibration batches or settings differ between the processes; give all the same"
        )
    return keys[0]


def _say_what_is_reused(done: Mapping[str, SolvedPart], layers: Mapping[str, LoraLayer], place: Path | None) -> None:
    found = sum(len(part.factors) for part in done.values())
    if found == len(layers):
        say(f"initialization: reused, model, calibration and settings are the same ({place})")
    elif found:
        say(f"initialization: continued, {found} of {len(layers)} modules are there already ({place})")


def _parts(
    peft_model: PeftModel,
    layers: Mapping[str, LoraLayer],
    batches: list[Mapping[str, Any]],
    options: InitOptions,
    done: Mapping[str, SolvedPart],
) -> Iterator[tuple[str, Calibration | None]]:
    """Yield what is measured, part by part; None for a part that is done."""
    if sum(len(part.factors) for part in done.values()) == len(layers):
        yield from ((name, None) for name in done)
        return
    common: dict[str, Any] = {"min_tokens": options.min_tokens, "seed": options.seed, "progress": options.progress}
    if options.form != "hooks":
        try:
            walk = walk_layers(
                peft_model,
                layers,
                batches,
                device=options.device,
                weights=options.weights,
                skip=done.__contains__,
                **common,
            )
            yield from walk
            return
        except DoesNotFit as reason:
            if options.form == "layers" or options.weights is not None:
                raise UserError(f"initialization: this model cannot be walked layer by layer, {reason}") from None
            say(f"initialization: not layer by layer, {reason}; the Grams of all layers are held at once")
    part = measure_inputs(peft_model, layers, batches, **common)
    LoadBalance().assign(part.inputs)
    yield "all", part


def _solved(
    measured: Iterable[tuple[str, Calibration | None]],
    solver: PartSolver,
    a_round: int,
    done: Mapping[str, SolvedPart],
) -> Iterator[tuple[str, SolvedPart]]:
    """Solve the parts in rounds of as many as are worth it; write those that are done into their layers."""
    waiting: list[tuple[str, Calibration]] = []
    for name, part in measured:
        if part is None:
            _write_factors(done[name], solver.layers, solver.adapter_name)
            yield name, done[name]
            continue
        waiting.append((name, part))
        if len(waiting) == a_round:
            yield from solver.solve(waiting)
            waiting = []
    yield from solver.solve(waiting)


def _report(
    parts: Mapping[str, SolvedPart], layers: Mapping[str, LoraLayer], seconds: Mapping[str, float]
) -> LayerReport:
    lines = {line.name: line for part in parts.values() for line in part.stats}
    measured = [part.measured for part in parts.values()]
    times = {"calibrate": sum(part.seconds for part in measured), **seconds}
    return LayerReport([lines[name] for name in layers], times)


def _finish(report: LayerReport, place: Path | None, folder: Path | None) -> None:
    if place is not None:
        store.finish(place, report.to_json())
        store.prune_cache(place)
    if place is not None and folder is not None and place != folder:
        store.copy_store(place, folder)


def check_layers(peft_model: PeftModel, layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> None:
    """Refuse, before any work, what LoRA-Null cannot start correctly.

    Raises:
        UserError: one line that names the module and the reason.
    """
    check_architecture(peft_model)
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, LoraNullConfig):
        raise UserError(f"adapter {adapter_name!r} has a {type(config).__name__}, not a LoraNullConfig")
    if not layers:
        raise UserError(f"target_modules: no linear of the model matches {config.target_modules!r}")
    if is_started(peft_model, adapter_name):
        raise UserError(
            f"adapter {adapter_name!r} is started already (initialized, trained or loaded), and initializing it would "
            "throw that away; train on from it, or give the original model a new adapter"
        )
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
    for name, others in sharing(peft_model.get_base_model(), layers).items():
        out = "leave both out" if any(other in layers for other in others) else "leave it out"
        raise UserError(
            f"target_modules: {name} shares its weight with {', '.join(others)}, which would change with it; "
            f"{out} (exclude_modules)"
        )


def sharing(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, list[str]]:
    """Return, by adapted layer, the other modules that hold its weight or memory of it, under whatever name.

    One parameter of two modules, one module in two places, or tensors that are views of the same memory.
    """
    mine = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    found: dict[str, list[str]] = {}
    spans: list[tuple[int, int, str, bool]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        place = path.removesuffix(".base_layer")
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            name = mine.get(id(tensor))
            if name is not None and name != place:
                found.setdefault(name, []).append(place)
            if not (is_sharded(tensor) or tensor.is_meta) and tensor.numel():
                last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
                start = tensor.data_ptr()
                spans.append((start, start + (last + 1) * tensor.element_size(), place, name is not None))
    spans.sort()
    for i, (_, end, place, adapted) in enumerate(spans):
        for _, _, other, also in itertools.takewhile(lambda span, end=end: span[0] < end, spans[i + 1 :]):
            if place != other and (adapted or also):
                found.setdefault(place if adapted else other, []).append(other if adapted else place)
    return {name: sorted(set(others)) for name, others in found.items()}


def _check_layer(name: str, layer: LoraLayer, adapter_name: str) -> None:
    base = layer.get_base_layer()
    reason = unreadable(base) if isinstance(layer, LoraNullLinear) else f"carries a {type(layer).__name__} of PEFT"
    if reason:
        raise UserError(f"target_modules: {name} {reason}")
    scaling = layer.scaling[adapter_name]
    if not 0 < scaling < float("inf"):
        raise UserError(f"lora_alpha: {name} has a scaling of {scaling:g}, it has to be above 0")
    smallest = min(layer.in_features, layer.out_features)
    if layer.r[adapter_name] > smallest:
        raise UserError(f"r: {layer.r[adapter_name]} is larger than {name} allows (min(d_in, d_out) = {smallest})")
    if layer.merged or layer.residual is not None:
        raise UserError(f"{name}: its base weight already carries an adapter, start from the original model")


def factor_checksum(layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> str:
    """Return a SHA-256 over the bytes of every A and B, to compare ranks and runs by."""
    digest = hashlib.sha256()
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B):
            digest.update(factor[adapter_name].weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def settle_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Make the step-0 output the base's: v2 sets B to zero, v1 takes s·B0A0, of the factors as stored, out of W0."""
    if peft_model.peft_config[adapter_name].variant == "v1":
        subtract_residuals(peft_model, adapter_name)
        return
    for layer in adapted_layers(peft_model, adapter_name).values():
        nn.init.zeros_(layer.lora_B[adapter_name].weight)
        layer.freeze_A(adapter_name)
        layer.started |= {adapter_name}


@torch.no_grad()
def load_initialization(
    directory: Path, peft_model: PeftModel, *, adapter_name: str = "default"
) -> tuple[LayerReport, Calibration]:
    """Start the adapters from a saved initialization: the same bits as the run that wrote it, no calibration.

    A folder serves v1 and v2 alike.

    Raises:
        UserError: the folder is incomplete, or was written for another base, other modules, ranks or scalings.
    """
    layers = adapted_layers(peft_model, adapter_name)
    check_layers(peft_model, layers, adapter_name)
    raw = store.read_report(directory)
    report = LayerReport(
        [LayerStats.from_json(line) for line in raw["layers"]], raw["seconds"], raw["tokens"], raw["base"], raw["key"]
    )
    if report.base != _fingerprint(peft_model, None):
        raise UserError(f"{directory}: was written for other base weights than these")
    parts = {name: part for name, part in store.read_parts(directory).items() if part.key == report.key}
    found = {name: part for part in parts.values() for name in part.factors}
    if set(found) != set(layers):
        raise UserError(f"{directory}: was written for other modules than this model adapts")
    for name, layer in layers.items():
        rank, scaling = len(found[name].factors[name][0]), found[name].scaling[name]
        if (rank, scaling) != (layer.r[adapter_name], layer.scaling[adapter_name]):
            raise UserError(
                f"{directory}: {name} was written for rank {rank} and scaling {scaling:g}, this run asks for rank "
                f"{layer.r[adapter_name]} and scaling {layer.scaling[adapter_name]:g}"
            )
    calibration = Calibration()
    for part in parts.values():
        _write_factors(part, layers, adapter_name)
        calibration.add(part.measured)
    settle_adapter(peft_model, adapter_name)
    return report, calibration


def _write_factors(part: SolvedPart, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    for name, (A, B) in part.factors.items():
        layers[name].lora_A[adapter_name].weight.copy_(A)
        layers[name].lora_B[adapter_name].weight.copy_(B)
