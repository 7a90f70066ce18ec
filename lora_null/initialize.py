"""`initialize_lora_null_weights`: calibrate, solve, write, in place; the same on every rank."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from lora_null.calibration import Calibration, measure_inputs
from lora_null.config import LoraNullConfig
from lora_null.errors import UserError
from lora_null.export import save_plainly
from lora_null.factors import LayerStats, leakage, null_factors
from lora_null.files import write_json, write_safetensors
from lora_null.layer import LoraNullLinear, adapted_layers
from lora_null.nullspace import Eigenspace, bottom_eigenspace
from lora_null.ranks import all_gather, rank_and_world

MIN_TOKENS = 256
FACTORS_FILE, REPORT_FILE = "factors.safetensors", "layers.json"


@dataclass
class LayerReport:
    """How the initialization went, layer by layer.

    Attributes:
        layers: one `LayerStats` per adapted linear, in the model's order.
        seconds: wall time of the parts: calibrate, solve.
        tokens: calibration tokens.
    """

    layers: list[LayerStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        layers = [layer.to_json() for layer in self.layers]
        return {"tokens": self.tokens, "seconds": self.seconds, "layers": layers}

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.leakage)
        energy = sum(layer.energy for layer in self.layers) / len(self.layers)
        return (
            f"LoRA-Null: {len(self.layers)} layers from {self.tokens} tokens in {sum(self.seconds.values()):.1f} s; "
            f"leakage at most {worst.leakage:.1e} ({worst.name}), {energy:.2%} of the weights' energy"
        )


def initialize_lora_null_weights(
    peft_model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    solver: str = "auto",
    min_tokens: int = MIN_TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> LayerReport:
    """Start the adapters of a PEFT model in the null space of what its linears read on `batches`. In place.

    v2: A = A0 frozen, B = 0, the base untouched. v1: A = A0, B = B0, the base becomes W0 − s·B0A0. Either way the model
    computes what it did before. Under `torch.distributed` all ranks call this together with the same batches.

    Args:
        peft_model: made by `get_peft_model(model, LoraNullConfig(…))`, not merged.
        batches: dicts with `input_ids` and `attention_mask`, (batch, length) each; padding is not measured.
        adapter_name: the adapter to start.
        solver: see `bottom_eigenspace`.
        min_tokens: fewest calibration tokens to accept.
        seed: of the drift sketch and of the choice within a null space larger than r.
        progress: show progress bars (on rank 0).

    Returns:
        The layer report.

    Raises:
        UserError: a configuration that is not `LoraNullConfig`, a target that is no plain linear or shares its weight,
            r above min(d_in, d_out), an adapter already started, or calibration data that cannot carry it.
    """
    layers = adapted_layers(peft_model, adapter_name)
    check_layers(peft_model, layers, adapter_name)
    calibration = measure_inputs(peft_model, layers, batches, min_tokens=min_tokens, seed=seed, progress=progress)
    return initialize_from(
        peft_model, calibration, adapter_name=adapter_name, solver=solver, seed=seed, progress=progress
    )


def check_layers(peft_model: PeftModel, layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> None:
    """Refuse, before any work, what LoRA-Null cannot start correctly.

    Raises:
        UserError: one line that names the module and the reason.
    """
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, LoraNullConfig):
        raise UserError(f"adapter {adapter_name!r} has a {type(config).__name__}, not a LoraNullConfig")
    if not layers:
        raise UserError(f"target_modules: no linear of the model matches {config.target_modules!r}")
    owners: dict[int, str] = {}
    for name, parameter in peft_model.get_base_model().named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name, owners)


def _check_layer(name: str, layer: LoraLayer, adapter_name: str, owners: Mapping[int, str]) -> None:
    base = layer.get_base_layer()
    if not isinstance(layer, LoraNullLinear) or not base.weight.is_floating_point():
        raise UserError(f"target_modules: {name} is a {type(base).__name__}, only plain linears can be started")
    if owners.get(id(base.weight), "").rpartition(".")[0].removesuffix(".base_layer") != name:
        raise UserError(
            f"target_modules: {name} shares its weight with {owners[id(base.weight)].rpartition('.')[0]}, leave it out"
        )
    smallest = min(layer.in_features, layer.out_features)
    if layer.r[adapter_name] > smallest:
        raise UserError(f"r: {layer.r[adapter_name]} is larger than {name} allows (min(d_in, d_out) = {smallest})")
    if layer.merged or layer.residual is not None:
        raise UserError(f"{name}: its base weight already carries an adapter, start from the original model")


@torch.no_grad()
def initialize_from(
    peft_model: PeftModel,
    calibration: Calibration,
    *,
    adapter_name: str = "default",
    solver: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> LayerReport:
    """Solve and write the factors from statistics already measured: `initialize_lora_null_weights` without its pass.

    The ranks take turns at the inputs; whoever solved one sends its factors to the others.
    """
    start = time.perf_counter()
    layers = adapted_layers(peft_model, adapter_name)
    rank, world = rank_and_world()
    stats: dict[str, LayerStats] = {}
    bar = tqdm(calibration.inputs, desc="solving", unit="input", disable=not progress or rank != 0)
    for index, measured in enumerate(bar):
        if index % world == rank:
            stats.update(_solve_input(measured, layers, adapter_name, solver, seed))
    if world > 1:
        stats = _share_factors(calibration, layers, adapter_name, stats)
    _settle(peft_model, adapter_name)
    seconds = {"calibrate": calibration.seconds, "solve": time.perf_counter() - start}
    return LayerReport([stats[name] for name in layers], seconds, calibration.tokens)


def _solve_input(
    measured: Any, layers: Mapping[str, LoraNullLinear], adapter_name: str, solver: str, seed: int
) -> dict[str, LayerStats]:
    """Write A0 and B0 into every layer that reads one input; one eigenspace for each distinct rank among them."""
    spaces: dict[int, Eigenspace] = {}
    stats = {}
    for name in measured.modules:
        start = time.perf_counter()
        layer, r = layers[name], layers[name].r[adapter_name]
        if r not in spaces:
            spaces[r] = bottom_eigenspace(measured.gram, r, solver=solver, seed=seed)
        space = spaces[r]
        base = layer.get_base_layer().weight
        weight = base.T if layer.fan_in_fan_out else base
        factors = null_factors(weight, space.vectors, layer.scaling[adapter_name])
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        A.copy_(factors.A)
        B.copy_(factors.B)
        stats[name] = LayerStats(
            name=name,
            shape=tuple(weight.shape),
            r=r,
            tokens=measured.tokens,
            gram_rank=space.rank,
            leakage=leakage(A, measured.gram),
            energy=factors.energy,
            condition=factors.condition,
            solver=space.solver,
            seconds=time.perf_counter() - start,
        )
    return stats


def _share_factors(
    calibration: Calibration, layers: Mapping[str, LoraLayer], adapter_name: str, stats: dict[str, LayerStats]
) -> dict[str, LayerStats]:
    world = rank_and_world()[1]
    for index, measured in enumerate(calibration.inputs):
        for name in measured.modules:
            for factor in (layers[name].lora_A, layers[name].lora_B):
                dist.broadcast(factor[adapter_name].weight, src=index % world)
    gathered = all_gather((stats, factor_checksum(layers, adapter_name)))
    if len({checksum for _, checksum in gathered}) != 1:
        raise RuntimeError("the ranks hold different initial factors")
    return {name: line for part, _ in gathered for name, line in part.items()}


def factor_checksum(layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> str:
    """Return a SHA-256 over the bytes of every A and B, to compare ranks and runs by."""
    digest = hashlib.sha256()
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B):
            digest.update(factor[adapter_name].weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _settle(peft_model: PeftModel, adapter_name: str) -> None:
    """Make the step-0 output the base's: v2 sets B to zero, v1 takes s·B0A0, of the factors as stored, out of W0."""
    variant = peft_model.peft_config[adapter_name].variant
    for layer in adapted_layers(peft_model, adapter_name).values():
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if variant == "v2":
            nn.init.zeros_(B)
            layer.freeze_A(adapter_name)
        else:
            layer.subtract_residual(adapter_name, A, B)
    if variant == "v1":
        save_plainly(peft_model, adapter_name)


def save_initialization(
    directory: Path, peft_model: PeftModel, report: LayerReport, *, adapter_name: str = "default"
) -> None:
    """Write the initial factors (safetensors) and the layer report (JSON, last: it marks the folder complete)."""
    tensors = {}
    for name, layer in adapted_layers(peft_model, adapter_name).items():
        tensors[f"{name}.lora_A"] = layer.lora_A[adapter_name].weight
        tensors[f"{name}.lora_B"] = layer.lora_B[adapter_name].weight
    variant = peft_model.peft_config[adapter_name].variant
    write_safetensors(directory / FACTORS_FILE, tensors, {"variant": variant})
    write_json(directory / REPORT_FILE, report.to_json())


@torch.no_grad()
def load_initialization(directory: Path, peft_model: PeftModel, *, adapter_name: str = "default") -> LayerReport:
    """Start the adapters from a saved initialization: the same bits as the run that wrote it, no calibration.

    Raises:
        UserError: the folder is incomplete, or was written for another variant or other modules.
    """
    layers = adapted_layers(peft_model, adapter_name)
    check_layers(peft_model, layers, adapter_name)
    if not (directory / REPORT_FILE).is_file():
        raise UserError(f"{directory}: holds no complete initialization ({REPORT_FILE} is missing)")
    variant = peft_model.peft_config[adapter_name].variant
    with safe_open(directory / FACTORS_FILE, "pt") as file:
        saved = (file.metadata() or {}).get("variant")
    if saved != variant:
        raise UserError(f"{directory}: was written for LoRA-Null-{saved}, this run asks for {variant}")
    tensors = load_file(directory / FACTORS_FILE)
    if {key.rpartition(".")[0] for key in tensors} != set(layers):
        raise UserError(f"{directory}: was written for other modules than this model adapts")
    for name, layer in layers.items():
        layer.lora_A[adapter_name].weight.copy_(tensors[f"{name}.lora_A"])
        layer.lora_B[adapter_name].weight.copy_(tensors[f"{name}.lora_B"])
    _settle(peft_model, adapter_name)
    raw = json.loads((directory / REPORT_FILE).read_text())
    return LayerReport([LayerStats.from_json(line) for line in raw["layers"]], raw["seconds"], raw["tokens"])
