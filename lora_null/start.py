"""What a run starts from: computed from weights and measured inputs, layer by layer where a method allows it.

`compute_start` serves every method. It leaves the result in one folder, in one format (`lora_null.store`), and takes an
equal one from the cache, from a killed run or from an earlier one; `load_start` starts a model from such a folder.
"""

from __future__ import annotations

import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_null import store
from lora_null.batches import checked_batches, count_tokens
from lora_null.calibration import Calibration, InputStats, LoadBalance, NotFinite
from lora_null.checkpoint_reader import WeightFiles
from lora_null.config import MULTIPLE, LoraNullConfig
from lora_null.earlier_tasks import Earlier
from lora_null.factors import LayerStats
from lora_null.fingerprint import code_of, fingerprint_of, hook_in, initialization_key
from lora_null.layer import LoraNullLinear, factors_of
from lora_null.layerwise import ALL, Form, measure_in_parts, visit_layers
from lora_null.nullspace import SOLVERS
from lora_null.solver import LayerSolver, NullSpace, Rule
from lora_null.store import LayerResult
from lora_null.utils.distributed import all_gather, broadcast, device_of, get_logger, on_first_process, together
from lora_null.utils.errors import UserError, first_line, nearest
from lora_null.utils.files import cache_root, write_json
from lora_null.utils.limits import check_float64
from lora_null.utils.model_state import own_precision

logger = get_logger(__name__)

MIN_TOKENS = 256


@dataclass
class LayerReport:
    """How the initialization went, layer by layer.

    Attributes:
        tokens: calibration tokens.
        base: fingerprint of the base it was made for.
        key: of the initialization, a hash of all that decided it.
        rule: the name of what gave the factors; empty where nothing was computed layer by layer.
        seconds: wall time of the parts: calibrate (forward passes and Grams, of what was reused too), solve, all.
        layers: one `LayerStats` per adapted linear, in the model's order.
    """

    tokens: int = 0
    base: str = ""
    key: str = ""
    rule: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    layers: list[LayerStats] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"layers": [layer.to_json() for layer in self.layers]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> LayerReport:
        """Return the report of what `to_json` gave; raise a UserError for what another version gave."""
        try:
            return cls(**{**raw, "layers": [LayerStats.from_json(line) for line in raw["layers"]]})
        except (TypeError, KeyError):
            raise UserError(f"{store.REPORT_FILE}: written by another version of lora-null, initialize anew") from None

    def __str__(self) -> str:
        told = f"{len(self.layers)} layers from {self.tokens} tokens in {self.seconds['all']:.1f} s"
        leaks = [layer for layer in self.layers if layer.leakage is not None]
        if not leaks:
            return f"{self.rule}: {told}"
        worst = max(leaks, key=lambda layer: layer.leakage)
        told += f"; leakage at most {worst.leakage:.1e} ({worst.name})"
        energies = [layer.energy for layer in self.layers if layer.energy is not None]
        share = f", {sum(energies) / len(energies):.2%} of the weights' energy" if energies else ""
        return f"{'LoRA-Null' if self.rule == NullSpace().label else self.rule}: {told}{share}"


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
        cache: keep the result in the cache folder, and reuse an equal one; not of a model with forward hooks of your own.
        progress: show progress bars (of the first process).
        earlier: tasks before this one, whose Grams a rule that reads Grams adds to the knowledge's.
        knowledge: the weight of the knowledge's Grams beside them.

    Raises:
        UserError: a value that is none of its kind.
    """

    solver: str = "auto"
    form: Form = "auto"
    device: torch.device | str | int | None = None
    weights: WeightFiles | None = None
    min_tokens: int = MIN_TOKENS
    seed: int = 0
    cache: bool = False
    progress: bool = True
    earlier: tuple[Earlier, ...] = ()
    knowledge: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("form", get_args(Form))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name}: no {value!r}{nearest(value, known)}")
        if self.device is not None:
            try:
                object.__setattr__(self, "device", torch.empty(0, device=self.device).device)
            except (TypeError, ValueError, RuntimeError, AssertionError) as error:
                raise UserError(f"device: no {self.device!r} here, {first_line(error)}") from None
        whole, flag = (Integral, "a whole number"), (bool, "True or False")
        kinds = {"weights": (WeightFiles | None, "WeightFiles"), "min_tokens": whole, "seed": whole}
        kinds |= {"earlier": (tuple, "a tuple of Earlier"), "knowledge": (Real, "a number")}
        for name, (kind, told) in {**kinds, "cache": flag, "progress": flag}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"{name}: takes {told}, not {value!r}")

    @property
    def measuring(self) -> dict[str, Any]:
        """What every measurement of inputs takes, by the names of `measure_in_parts`."""
        return {"device": self.device, "seed": self.seed, "progress": self.progress}


DEFAULTS = InitOptions()


def rule_of(config: LoraNullConfig, options: InitOptions = DEFAULTS) -> NullSpace:
    """Return how A0 and B0, and the N of variant "nb", follow from what a layer reads."""
    if config.variant != "nb":
        return NullSpace(options.solver, options.seed)
    multiple = config.null_multiple or (MULTIPLE if config.null_energy is None else None)
    return NullSpace(options.solver, options.seed, multiple, config.null_energy)


@dataclass
class WholeModel:
    """What a method computes of the model as a whole, instead of layer by layer.

    Attributes:
        label: its name and settings, a part of what an initialization is known by.
        batches: what it looks at, which decides the result: training batches, and calibration batches where it reads them.
        compute: returns the tensors that start the model again in the same bits.
        method: the class whose code `compute` runs; its source is hashed into the initialization's key.
    """

    label: str
    batches: Sequence[Mapping[str, Any]]
    compute: Callable[[], dict[str, torch.Tensor]]
    method: type


@dataclass
class Start:
    """What `compute_start` found or read.

    Attributes:
        report: layer by layer; without lines where nothing was computed so.
        calibration: the measured inputs, without Grams, for a drift meter.
        tensors: what was computed of the model as a whole.
    """

    report: LayerReport
    calibration: Calibration
    tensors: dict[str, torch.Tensor]


@torch.no_grad()
def compute_start(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]] | None,
    options: InitOptions = DEFAULTS,
    *,
    rule: Rule | None = None,
    whole: WholeModel | None = None,
    adapter_name: str = "default",
    folder: Path | None = None,
) -> Start:
    """Measure what the layers read, and compute their start; factors that a rule gives are written into them.

    Under `torch.distributed` all processes call this together with the same arguments.

    Args:
        model: the model, or the PEFT model around it.
        layers: name → the layer that changes; LoRA layers where there is a `rule`.
        batches: dicts with `input_ids` and `attention_mask`, (batch, length) each; None where nothing is measured.
        options: how.
        rule: gives A0 and B0 of a layer from its weight and its input; None measures alone.
        whole: what is computed of the model as a whole instead.
        adapter_name: the adapter.
        folder: where to leave the result for `load_start`; with `options.cache` also in the cache.

    Raises:
        UserError: calibration data that cannot carry it, a weight that the rule cannot factor, processes that
            differ, a device without float64.
    """
    start = time.perf_counter()
    check_float64(options.device or device_of(model))
    needs_gram = rule is not None and rule.needs_gram

    def checked() -> list[dict[str, torch.Tensor]]:
        if batches is None and not needs_gram:
            return []
        return checked_batches(model, () if batches is None else batches, options.min_tokens if needs_gram else 1)

    measured = together(checked)
    name, adapted = (rule.label, layers) if rule is not None else ("", {})
    base = fingerprint_of(model, options.weights, adapted)
    inner = getattr(rule, "inner", rule)
    method = whole.method if whole is not None else type(inner)
    key = _key(base, layers, adapter_name, measured, options, whole, f"{name} {code_of(method, model)}")
    if hook := hook_in(model):
        key = broadcast(uuid.uuid4().hex[:24])  # which no other run asks for
        logger.warning(f"initialization: computed anew and not kept in a cache, which could not tell what {hook} does")
    cached = options.cache and hook is None
    with own_precision(model), contextlib.ExitStack() as locks:
        path, done = on_first_process(lambda: _find(key, folder, locks, cached=cached))
        _report_reuse(done, adapted, path)
        if rule is not None:
            solver = LayerSolver(layers, adapter_name, rule)
            parts = _solve_layers(model, measured, options, done, solver, path, key)
        else:
            parts = done or {ALL: _measured_alone(model, layers, measured, options, whole, key)}
            if path and not done:
                on_first_process(lambda: store.write_part(path, ALL, parts[ALL]))
        lines = {line.name: line for part in parts.values() for line in part.stats}
        seconds = {
            "calibrate": sum(part.measured.seconds for part in parts.values()),
            "solve": solver.seconds if rule is not None else 0.0,
            "all": time.perf_counter() - start,
        }
        report = LayerReport(count_tokens(measured), base, key, name, seconds, [lines[name] for name in adapted])
        on_first_process(lambda: _finish(report, path, folder))
    if isinstance(inner, NullSpace):
        _report_small(report, layers)
    return _start_of(report, parts)


def _solve_layers(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    options: InitOptions,
    done: Mapping[str, LayerResult],
    solver: LayerSolver,
    path: Path | None,
    key: str,
) -> dict[str, LayerResult]:
    """Solve all layers, each part written to the folder as soon as it is there; where that fails, no layer is changed."""
    layers, parts = solver.layers, dict(done)
    # Of weights in files only one layer's are at hand, and only while it is yielded.
    per_round = 1 if options.weights is not None else solver.parts_per_round()
    with contextlib.closing(_measured(model, layers, batches, options, done, solver.rule.needs_gram)) as measured:
        try:
            for part in done.values():
                _write_factors(part, layers, solver.adapter_name)
            while batch_of_parts := dict(islice(measured, per_round)):
                for name, part in solver.solve(batch_of_parts).items():
                    parts[name], part.key = part, key
                    if path:
                        on_first_process(functools.partial(store.write_part, path, name, part))
        except BaseException as error:
            _reset(layers, solver.adapter_name)
            if isinstance(error, NotFinite):
                raise _with_cause(error, layers) from None
            raise
    return parts


def _reset(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Let the adapters of a start that was not finished change nothing, as fresh ones do, so that it can be tried again."""
    for layer in layers.values():
        nn.init.zeros_(factors_of(layer, adapter_name)[1])
        if isinstance(layer, LoraNullLinear):
            layer.drop_basis(adapter_name)


def _measured_alone(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[Mapping[str, Any]],
    options: InitOptions,
    whole: WholeModel | None,
    key: str,
) -> LayerResult:
    calibration = Calibration()
    walks = options.weights is not None or (options.device is not None and options.form != "hooks")
    options = replace(options, form="auto" if walks else "hooks")
    for _, part in _measured(model, layers, batches, options, {}, gram=False) if batches else ():
        calibration.add(part)
    with torch.enable_grad():
        tensors = whole.compute() if whole is not None else {}
    return LayerResult({}, {}, calibration, [], {}, tensors, key)


def _start_of(report: LayerReport, parts: Mapping[str, LayerResult]) -> Start:
    calibration, tensors = Calibration(), {}
    for part in parts.values():
        calibration.add(part.measured)
        tensors |= part.tensors
    return Start(report, calibration, tensors)


@torch.no_grad()
def load_start(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    *,
    rule: str = "",
    adapter_name: str = "default",
    weights: WeightFiles | None = None,
) -> Start:
    """Start a model from what `compute_start` left in a folder: the same bits, nothing calibrated or computed.

    Args:
        folder, model, layers, adapter_name: as in `compute_start`.
        rule: the name of the rule that has to have given the factors.
        weights: the files of a model without weights (meta device).

    Raises:
        UserError: the folder is incomplete, or was written for another base, rule, other modules, ranks or scalings.
    """
    check_float64(device_of(model))
    report = together(lambda: LayerReport.from_json(store.read_report(folder)))
    if len(set(all_gather(report.key))) > 1:
        raise UserError(
            f"{folder}: holds another initialization on another machine; copy one to all, or compute it anew"
        )
    if report.rule != rule:
        raise UserError(
            f"{folder}: holds an initialization by {report.rule or 'no rule'}, this run needs {rule or 'none'}"
        )
    if report.base != fingerprint_of(model, weights):
        raise UserError(f"{folder}: was written for other base weights than these")
    parts = {name: part for name, part in store.read_parts(folder).items() if part.key == report.key}
    if rule:
        ranks = {name: len(A) for part in parts.values() for name, (A, _) in part.factors.items()}
        scalings = {name: scaling for part in parts.values() for name, scaling in part.scaling.items()}
        check_made_for(f"{folder}", ranks, scalings, layers, adapter_name)
    for part in parts.values():
        _write_factors(part, layers, adapter_name)
    return _start_of(report, parts)


def check_made_for(
    where: str,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    layers: Mapping[str, LoraLayer],
    adapter_name: str = "default",
) -> None:
    """Raise a UserError, with `where` first, for a start of other modules, ranks or scalings than those of an adapter."""
    if ranks.keys() != layers.keys():
        raise UserError(f"{where}: was written for other modules than this model adapts")
    for name, layer in layers.items():
        rank, scaling = layer.r[adapter_name], layer.scaling[adapter_name]
        if (ranks[name], scalings.get(name, scaling)) != (rank, scaling):
            raise UserError(
                f"{where}: {name} was written for rank {ranks[name]} and scaling {scalings.get(name, scaling):g}, this run "
                f"asks for rank {rank} and scaling {scaling:g} (alpha / rank)"
            )


def _find(
    key: str, folder: Path | None, locks: contextlib.ExitStack, *, cached: bool
) -> tuple[Path | None, dict[str, LayerResult]]:
    """Return where the parts of an initialization are to be written, and those that are there.

    That is the cache's folder, held by `locks`, where one is asked for and this user may write there. From a cache that can
    only be read a complete initialization is copied.
    """
    place = store.cached_folder(key) if cached else None
    if place is not None:
        try:
            locks.enter_context(store.in_use(place))
            return place, _finished_parts(place, key)
        except OSError as error:  # another user's folder, or a file in it
            told = f"{cache_root()} cannot be written" if not store.can_keep() else f"{place}: {error.strerror}"
            logger.warning(f"initialization: not kept, {told} ($LORA_NULL_CACHE names another place)")
        with contextlib.suppress(OSError, UserError):
            if store.read_report(place)["key"] == key:
                done = store.read_parts(place)
                if folder is not None:
                    store.copy_store(place, folder)
                return folder, done
    return folder, _finished_parts(folder, key)


def _finished_parts(path: Path | None, key: str) -> dict[str, LayerResult]:
    """Return the parts that lie in the folder for this very initialization; what is there for another is removed."""
    if path is None:
        return {}
    store.clear_others(path, key)
    return store.read_parts(path)


def _with_cause(error: NotFinite, layers: Mapping[str, LoraLayer]) -> UserError:
    """Return the mistake with the weight that it comes from, where that is one of the adapted ones."""
    weights = ((name, layer.get_base_layer().weight) for name, layer in layers.items())
    bad = next((name for name, w in weights if not w.is_meta and not w.isfinite().all()), None)
    return UserError(f"{error}" if bad is None else f"{error}; the weight of {bad} holds NaN or infinite numbers")


def _key(
    base: str,
    layers: Mapping[str, nn.Module],
    adapter_name: str,
    batches: list[Mapping[str, Any]],
    options: InitOptions,
    whole: WholeModel | None,
    rule: str,
) -> str:
    kind = None if options.device is None else torch.device(options.device).type  # each process has a card of its own
    settings = {"solver": options.solver, "form": options.form, "seed": options.seed, "on": str(kind)}
    settings |= {"rule": rule, "whole": whole.label if whole is not None else ""}
    looked_at = [*batches, *(whole.batches if whole is not None else ())]
    keys = all_gather(initialization_key(base, layers, adapter_name, looked_at, **settings))
    if len(set(keys)) > 1:
        raise UserError(
            "initialization: adapter, calibration batches or settings differ between the processes; give all the same"
        )
    return keys[0]


def _report_reuse(done: Mapping[str, LayerResult], adapted: Mapping[str, LoraLayer], path: Path | None) -> None:
    """Say in a line whether all is there already, or the factors of some of the layers that get any."""
    found = sum(len(part.factors) for part in done.values())
    if done and found == len(adapted):
        logger.info(f"initialization: reused, model, calibration and settings are the same ({path})")
    elif done:
        logger.info(f"initialization: continued, {found} of {len(adapted)} modules are there already ({path})")


def _report_small(report: LayerReport, layers: Mapping[str, LoraLayer]) -> None:
    """Say in a line which weights have no more along the null space than the rounding of their own dtype.

    Rounding, of half an ε of each entry at most, puts a share below ε² · r / d_in of ‖W0‖² into r of d_in directions.
    They are directions like others, so such a layer is started all the same.
    """

    def rounding(line: LayerStats) -> float:
        dtype = layers[line.name].get_base_layer().weight.dtype
        eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0  # of a quantized weight nothing is known
        return eps**2 * line.r / line.shape[1]

    small = [line.name for line in report.layers if line.energy is not None and line.energy <= rounding(line)]
    if small:
        more = f" and of {len(small) - 1} more" if small[1:] else ""
        logger.warning(
            f"initialization: the weight of {small[0]}{more} holds only rounding along the null space, so A starts near "
            "zero and the layer hardly learns; exclude_modules leaves modules out"
        )


def _measured(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    batches: list[Mapping[str, Any]],
    options: InitOptions,
    done: Mapping[str, LayerResult],
    gram: bool,
) -> Iterator[tuple[str, Calibration]]:
    """Yield what is measured, part by part, but for the parts that are done."""
    if sum(len(part.factors) for part in done.values()) == len(layers):
        return
    if not batches:
        yield from _unmeasured(model, layers, options, done)
        return
    where = device_of(model)
    if options.form == "hooks" and options.device is not None and torch.device(options.device).type != where.type:
        logger.warning(
            f"device: form='hooks' measures on {where}, where the model is; form='auto' may use {options.device}"
        )
    yield from measure_in_parts(
        model, layers, batches, form=options.form, weights=options.weights, skip=done, gram=gram, **options.measuring
    )


def _unmeasured(
    model: nn.Module, layers: Mapping[str, LoraLayer], options: InitOptions, done: Mapping[str, LayerResult]
) -> Iterator[tuple[str, Calibration]]:
    """Yield the layers without inputs, for a rule that reads the weights alone: at once, or as they come from the files."""

    def part(inside: Mapping[str, nn.Module]) -> Calibration:
        inputs = []
        for name, layer in inside.items():
            device = options.device or layer.get_base_layer().weight.device
            sketch = torch.zeros(layer.in_features, 0, dtype=torch.float64, device=device)
            inputs.append(InputStats([name], None, sketch))
        balance.assign(inputs)
        return Calibration(inputs)

    balance = LoadBalance()
    if options.weights is None:
        yield ALL, part(layers)
        return
    for name, inside in visit_layers(model, layers, options.weights, device=options.device, progress=options.progress):
        if name not in done:
            yield name, part(inside)


def _finish(report: LayerReport, path: Path | None, folder: Path | None) -> None:
    if path is None:
        return
    write_json(path / store.REPORT_FILE, report.to_json())  # with it the folder is complete
    store.prune_cache(path)
    if folder not in (None, path):
        store.copy_store(path, folder)


def _write_factors(part: LayerResult, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    for name, (A, B) in part.factors.items():
        layers[name].lora_A[adapter_name].weight.copy_(A)
        layers[name].lora_B[adapter_name].weight.copy_(B)
        if name in part.bases:
            layers[name].set_basis(adapter_name, part.bases[name])
