"""Measure what the target linears read on the calibration batches: Gram matrices and sketches of their inputs.

This is the hook form: one plain forward pass per batch, the Grams of all layers at once. Ranks share the batches out
and add their measurements up.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from lora_null.errors import UserError
from lora_null.preserve import preserve
from lora_null.ranks import rank_and_world

SKETCH_COLUMNS = 64


@dataclass
class InputStats:
    """Statistics of one distinct input X (d_in × N), shared by every module that reads it (q, k, v; gate, up).

    Attributes:
        modules: names of the modules that read this input, in the order of their first call.
        gram: C = X Xᵀ, (d_in, d_in) float64, or None where it was not asked for.
        sketch: X Ω / √k, (d_in, k) float64 with Ω standard normal, so that E[S Sᵀ] = C; k = 64.
        tokens: N, the columns of X: calibration tokens, padding excluded.
    """

    modules: list[str]
    gram: torch.Tensor | None
    sketch: torch.Tensor
    tokens: int = 0


@dataclass
class Calibration:
    """All that was measured in one pass over the calibration batches.

    Attributes:
        inputs: one entry per distinct input.
        output_energy: per module name ‖W0 X‖²_F, the bias excluded.
        seconds: wall time of the pass.
    """

    inputs: list[InputStats] = field(default_factory=list)
    output_energy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Number of calibration tokens N."""
        return self.inputs[0].tokens if self.inputs else 0

    def input_of(self, module: str) -> InputStats:
        """Return the statistics of the input that `module` reads."""
        return next(stats for stats in self.inputs if module in stats.modules)


def measure_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    gram: bool = True,
    min_tokens: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Run the model over the batches and measure the inputs of `modules`, padding excluded.

    Under an initialized `torch.distributed` group every rank passes the same batches, computes its share of them, and
    gets the same sums. Mode, gradients, cache flag and random state are as before afterwards.

    Args:
        model: called as `model(input_ids=…, attention_mask=…)`, in eval mode without gradients.
        modules: name → linear (or the layer that wraps it), all inside `model`.
        batches: dicts with `input_ids` and `attention_mask`, (batch, length) each.
        gram: measure C = X Xᵀ; without it only sketches and output energies are.
        min_tokens: fewest tokens to accept.
        seed: of the sketch's Gaussian.

    Raises:
        UserError: no batches, fewer than `min_tokens` tokens, a module that no batch reaches, an input that is all
            zero, NaN or infinite.
    """
    start = time.perf_counter()
    batches = list(batches)
    if not batches:
        raise UserError("calibration: there is no batch to measure")
    rank, world = rank_and_world()
    meter = _InputMeter(modules, gram=gram)
    device = next(model.parameters()).device
    base_only = getattr(model, "disable_adapter", contextlib.nullcontext)
    with preserve(model), base_only(), meter.attached(), torch.no_grad():
        model.eval()
        for index, batch in _share(batches, rank, world, progress):
            idle = index is None  # more ranks than batches: run one to learn the shared inputs, count none of it
            meter.begin(batch["attention_mask"].to(device), index if not idle else 0, seed, counted=not idle)
            _backbone(model)(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            )
    calibration = meter.result()
    if world > 1:
        _sum_over_ranks(calibration)
    _check(calibration, modules, min_tokens)
    calibration.seconds = time.perf_counter() - start
    return calibration


def _share(batches: Sequence, rank: int, world: int, progress: bool) -> Iterator[tuple[int | None, Mapping]]:
    mine = list(islice(enumerate(batches), rank, None, world)) or [(None, batches[0])]
    return tqdm(mine, desc="calibrating", unit="batch", disable=not progress or rank != 0)


def _backbone(model: nn.Module) -> nn.Module:
    """Return the decoder without its language-model head, whose logits calibration has no use for."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return getattr(inner, getattr(inner, "base_model_prefix", "") or "-", inner)


class _InputMeter:
    """Forward hooks that add up the statistics of each distinct input, found by the identity of the input tensor."""

    def __init__(self, modules: Mapping[str, nn.Module], *, gram: bool) -> None:
        self.modules = modules
        self.gram = gram
        self.stats: dict[str, InputStats] = {}  # by leader: the first module to read the input
        self.leader: dict[str, str] = {}
        self.bias: dict[str, torch.Tensor | None] = {}
        self.output_energy: dict[str, torch.Tensor] = {}
        self.recent: list[tuple[weakref.ref, str]] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
                self.bias[name] = getattr(base, "bias", None)
                handle = base.register_forward_hook(lambda _, args, out, name=name: self._see(name, args[0], out))
                stack.callback(handle.remove)
            yield

    def begin(self, mask: torch.Tensor, index: int, seed: int, *, counted: bool) -> None:
        """Start a batch: its mask, and the Gaussian for its tokens (the same whichever rank draws it)."""
        self.mask = mask.bool().flatten()
        self.index = index
        self.counted = counted
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        tokens = int(self.mask.sum())
        omega = torch.randn(tokens, SKETCH_COLUMNS, generator=generator, dtype=torch.float64)
        self.omega = (omega / SKETCH_COLUMNS**0.5).to(mask.device)
        self.recent = []

    def _see(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        leader = self._leader(name, x)
        if self.counted:
            clean = out if self.bias[name] is None else out - self.bias[name]
            energy = self._rows(clean).double().square().sum()
            self.output_energy[name] = self.output_energy.get(name, 0.0) + energy
        if leader == name:
            self._add(self.stats[name], x, name)

    def _leader(self, name: str, x: torch.Tensor) -> str:
        """Return the first module that read this very tensor in this forward pass; remember it at the first batch."""
        now = next((leader for ref, leader in self.recent if ref() is x), name)
        if now == name:
            self.recent = [(ref, leader) for ref, leader in self.recent if ref() is not None]
            self.recent.append((weakref.ref(x), name))
        if self.leader.setdefault(name, now) != now:
            # Shared at first, apart now (or the reverse): measured as its own input from here would miss batches.
            raise RuntimeError(f"{name}: its input is shared with {self.leader[name]} in some batches, not in others")
        if now == name and name not in self.stats:
            d = x.shape[-1]
            gram = torch.zeros(d, d, dtype=torch.float64, device=x.device) if self.gram else None
            sketch = torch.zeros(d, SKETCH_COLUMNS, dtype=torch.float64, device=x.device)
            self.stats[name] = InputStats([], gram, sketch)
        if name not in self.stats[now].modules:
            self.stats[now].modules.append(name)
        return now

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[-1])[self.mask]

    def _add(self, stats: InputStats, x: torch.Tensor, name: str) -> None:
        if not self.counted:
            return
        # Squared singular values: float32 sums cannot see directions below 3e-4 of the largest, so float64 throughout.
        rows = self._rows(x).double()
        if not torch.isfinite(rows).all():
            raise UserError(f"calibration: batch {self.index} gives NaN or infinite inputs at {name}")
        if stats.gram is not None:
            stats.gram.addmm_(rows.T, rows)
        stats.sketch.addmm_(rows.T, self.omega)
        stats.tokens += len(rows)

    def result(self) -> Calibration:
        energy = {name: float(value) for name, value in self.output_energy.items()}
        return Calibration(list(self.stats.values()), energy)


def _sum_over_ranks(calibration: Calibration) -> None:
    for stats in calibration.inputs:
        for tensor in (stats.gram, stats.sketch):
            if tensor is not None:
                dist.all_reduce(tensor)
    names = [name for stats in calibration.inputs for name in stats.modules]
    device = calibration.inputs[0].sketch.device if calibration.inputs else "cpu"
    counts = [stats.tokens for stats in calibration.inputs]
    energies = [calibration.output_energy.get(name, 0.0) for name in names]
    sums = torch.tensor([*counts, *energies], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    for stats, tokens in zip(calibration.inputs, sums[: len(counts)].tolist()):
        stats.tokens = int(tokens)
    calibration.output_energy = dict(zip(names, sums[len(counts) :].tolist()))


def _check(calibration: Calibration, modules: Mapping[str, nn.Module], min_tokens: int) -> None:
    reached = {name for stats in calibration.inputs for name in stats.modules}
    unreached = [name for name in modules if name not in reached]
    if unreached:
        raise UserError(f"calibration: no token reaches {unreached[0]} ({len(unreached)} modules), leave it out")
    if calibration.tokens < min_tokens:
        raise UserError(f"calibration: only {calibration.tokens} tokens, at least {min_tokens} are needed")
    for stats in calibration.inputs:
        if not stats.sketch.any():
            raise UserError(f"calibration: the input of {stats.modules[0]} is zero on every token")
