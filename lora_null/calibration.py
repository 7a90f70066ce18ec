"""What the target linears read on the calibration batches: Gram matrices and sketches of their inputs.

`InputMeter` adds up the statistics while forward passes run; `measure_inputs` is the hook form, one plain forward pass
per batch and the Grams of all layers at once. `layerwise.walk_layers` is the form that needs one layer at a time.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from lora_null.batches import (
    SKETCH_COLUMNS,
    TokenBatch,
    backbone,
    check_architecture,
    checked_batches,
    count_tokens,
    input_device,
    token_batches,
)
from lora_null.gram import Gram
from lora_null.utils.distributed import for_collective, is_first_process, num_processes, process_index, together
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import full_precision, preserve
from lora_null.utils.quantized import base_layer_of, weight_of

ENERGY_ROWS = 1024


class NotFinite(UserError):
    """An input is NaN or infinite."""


class Unmeasured(UserError):
    """The inputs of a module cannot be measured; a training may leave the module out."""

    @property
    def reason(self) -> str:
        """What keeps them from it, without that advice."""
        return str(self).removeprefix("calibration: ").partition(", leave ")[0]


@dataclass
class InputStats:
    """Statistics of one distinct input X (d_in × N), shared by every module that reads it (q, k, v; gate, up).

    Attributes:
        modules: names of the modules that read this input, in the order of their first call.
        gram: C = X Xᵀ, (d_in, d_in) float64; None where it was not asked for, is another process's, or was solved.
        sketch: X Ω / √k, (d_in, k) float64 with Ω standard normal, so that E[S Sᵀ] = C; k = 64.
        tokens: N, the columns of X: calibration tokens, padding excluded; counted once for each call of the module.
        owner: the process that holds the Gram and solves it.
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

    Under an initialized `torch.distributed` group every process passes the same batches, computes its share, and gets
    the same sums. Mode, gradients, cache flag and random state are as before afterwards.

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
    sum_over_processes(calibration)
    calibration.seconds = time.perf_counter() - start
    return calibration


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run the original model: eval mode, no gradients, adapters off, not compiled; everything restored afterwards."""
    base_only = getattr(model, "disable_adapter", contextlib.nullcontext)
    compiled = any(module._compiled_call_impl or "_orig_mod" in module._modules for module in model.modules())
    uncompiled = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with preserve(model), base_only(), torch.no_grad(), uncompiled:
        model.eval()
        yield


class InputMeter:
    """Forward hooks that add up the statistics of each distinct input, found by the identity of the input tensor.

    ‖W0 X‖ is taken from the outputs; where a bias is in them, whose size may drown W0 x in the rounding of 16 bits, from
    C as tr(W0 C W0ᵀ), or without C by multiplying once more.

    Args:
        modules: name → linear, or the layer that wraps it.
        gram: whether to add up C as well.
        tokens: N, how many tokens there are in all batches of all processes.
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
            raise Unmeasured(
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
            raise Unmeasured(
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
        """Return what was measured on this process.

        Raises:
            UserError: a module that no token reached, an input that is NaN or infinite.
        """
        unreached = [name for name in self.modules if name not in self.leader]
        if unreached:
            raise Unmeasured(f"calibration: no token reaches {unreached[0]} ({len(unreached)} modules), leave it out")
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
    """Gives each Gram to the process with the least to solve so far, in d³; all of them compute the same."""

    def __init__(self) -> None:
        self.load = [0] * num_processes()

    def assign(self, inputs: Sequence[InputStats]) -> None:
        """Set the owner of every input, the widest first."""
        for stats in sorted(inputs, key=lambda stats: -len(stats.sketch)):
            stats.owner = self.load.index(min(self.load))
            self.load[stats.owner] += len(stats.sketch) ** 3


def sum_over_processes(calibration: Calibration, balance: LoadBalance | None = None) -> None:
    """Add up what all processes measured, in place: on each, but a Gram on its owner alone if `balance` is given.

    Raises:
        UserError: an input that is zero on every token.
    """
    if num_processes() > 1:
        if balance is not None:
            balance.assign(calibration.inputs)
        for stats in calibration.inputs:
            _sum_gram(stats, to_owner=balance is not None)
            with for_collective(stats.sketch) as here:
                dist.all_reduce(here)
        _sum_numbers(calibration)
    for stats, any_left in zip(calibration.inputs, to_floats(stats.sketch.any() for stats in calibration.inputs)):
        if not any_left:
            raise Unmeasured(f"calibration: the input of {stats.modules[0]} is zero on every token")


def _sum_gram(stats: InputStats, *, to_owner: bool) -> None:
    if stats.gram is None:
        return
    with for_collective(stats.gram) as here:
        if not to_owner:
            dist.all_reduce(here)
            return
        dist.reduce(here, dst=stats.owner)
    if process_index() != stats.owner:
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
