"""From measured inputs to factors: each process solves the inputs it owns, and A0 and B0 go into the layers of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from peft.tuners.lora.layer import LoraLayer

from lora_null.calibration import Calibration, InputStats
from lora_null.factors import LayerStart, LayerStats, leakage, null_factors, projected_inputs
from lora_null.layer import NullBasis, factors_of
from lora_null.nullspace import Eigenspace, bottom_eigenspace, outer_eigenspace
from lora_null.store import LayerResult
from lora_null.utils.distributed import (
    all_gather,
    broadcast_tensor,
    get_logger,
    num_processes,
    process_index,
    together,
)
from lora_null.utils.errors import UserError
from lora_null.utils.quantized import weight_of

logger = get_logger(__name__)

NARROW = 2048  # up to this width an input is solved on one thread of a CPU: its steps are too small for several
MOST_TOGETHER = 8  # layers whose Grams wait for each other

Solved = tuple[LayerStats, torch.Tensor | None]  # of one layer: its line of the report, and its `projected_inputs`


class Rule(Protocol):
    """How a method's A0 and B0 follow from a layer's weight and from what the layer reads.

    Attributes:
        label: its name, a part of what an initialization is known by.
        needs_gram: whether it reads the Gram matrices of the inputs.
    """

    @property
    def label(self) -> str: ...

    needs_gram: ClassVar[bool]

    def of_input(self, inputs: InputStats) -> Callable[[torch.Tensor, int, float], LayerStart]:
        """Return a function (W0 (d_out, d_in), r, scaling) → start of a layer that reads this input.

        Raises:
            ValueError: raised by the returned function when called, for a weight that it cannot factor.
        """
        ...


@dataclass
class NullSpace:
    """LoRA-Null's rule (method, steps 1 to 3): A0 and B0 from the bottom eigenspace of C = X Xᵀ.

    With neither `multiple` nor `energy` its r directions are the rows of A0. With one of them it is wider, the N in whose
    span A is to stay, and A0, B0 are the best rank-r approximation of W0 N Nᵀ.

    Attributes:
        solver, seed: of `bottom_eigenspace`.
        multiple: N has multiple · r directions.
        energy: N is what lies outside the top directions that hold this share of the inputs' energy.
    """

    solver: str = "auto"
    seed: int = 0
    multiple: float | None = None
    energy: float | None = None
    needs_gram: ClassVar[bool] = True

    @property
    def label(self) -> str:
        if self.energy is not None:
            return f"null basis outside {self.energy!r} of the energy"
        return "null-space" if self.multiple is None else f"null basis of {self.multiple:g} r"

    def of_input(self, inputs: InputStats) -> Callable[[torch.Tensor, int, float], LayerStart]:
        spaces: dict[int | None, Eigenspace] = {}  # one for each distinct width among the layers that read this input
        has_basis = self.multiple is not None or self.energy is not None

        def start(weight: torch.Tensor, r: int, scaling: float) -> LayerStart:
            k = None if self.energy is not None else directions(r, self.multiple or 1)
            if k not in spaces:
                spaces[k] = (
                    outer_eigenspace(inputs.gram, self.energy)
                    if k is None
                    else bottom_eigenspace(inputs.gram, k, solver=self.solver, seed=self.seed)
                )
            space = spaces[k]
            if space.vectors.shape[1] < r:
                raise ValueError(
                    f"only {space.vectors.shape[1]} directions lie outside the top {self.energy} of its inputs' energy "
                    f"(null_energy), fewer than r = {r}"
                )
            return replace(
                null_factors(weight, space.vectors, scaling, r),
                solver=space.solver,
                gram_rank=min(space.rank, inputs.tokens),
                kernel=space.vectors if space.exact else None,
                basis=space.vectors if has_basis else None,
            )

        return start


def directions(r: int, multiple: float) -> int:
    """Return k, the directions of N for rank r."""
    return round(multiple * r)


@dataclass
class LayerSolver:
    """Solves measured parts of a model, a round of them together.

    Attributes:
        layers: name → adapted linear, of the whole model.
        adapter_name: the adapter to write.
        rule: what gives the factors.
        seconds: wall time spent so far.
    """

    layers: Mapping[str, LoraLayer]
    adapter_name: str
    rule: Rule
    seconds: float = 0.0

    def parts_per_round(self) -> int:
        """Return how many parts to solve together.

        That is the number of processes; on a CPU, where all layers are narrow, times its threads: each solves one.
        """
        narrow = all(
            _is_narrow(layer.in_features, layer.get_base_layer().weight.device) for layer in self.layers.values()
        )
        threads = min(all_gather(torch.get_num_threads())) if narrow else 1  # the same on every machine
        return num_processes() * min(threads, MOST_TOGETHER)

    def solve(self, parts: Mapping[str, Calibration]) -> dict[str, LayerResult]:
        """Write A0 and B0 of the parts on every process and drop their Grams; return them solved by name, in order."""
        start = time.perf_counter()
        inputs = [measured for part in parts.values() for measured in part.inputs]
        solved = together(partial(self._solve_owned, inputs))
        if num_processes() > 1:
            solved = self._share(inputs, solved)
        self.seconds += time.perf_counter() - start
        return {name: self._result(part, solved) for name, part in parts.items()}

    def _solve_owned(self, inputs: Sequence[InputStats]) -> dict[str, Solved]:
        """Solve what this process owns, the widest first; narrow inputs on a CPU side by side, one thread each."""
        owned = sorted((x for x in inputs if x.owner == process_index()), key=lambda measured: -len(measured.sketch))
        narrow = [measured for measured in owned if _is_narrow(len(measured.sketch), measured.sketch.device)]
        solved: dict[str, Solved] = {}
        for measured in owned[: len(owned) - len(narrow)]:  # the wide come first
            solved |= self._solve_input(measured)
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as threads:
            for found in threads.map(self._solve_input, narrow):
                solved |= found
        for measured in inputs:
            measured.gram = None
        return solved

    @torch.no_grad()  # which every thread has to say for itself
    def _solve_input(self, measured: InputStats) -> dict[str, Solved]:
        """Solve one input and let its Gram go; on the CPU where the accelerator's memory is not enough."""
        gram, measured.gram = measured.gram, None
        try:
            return self._solve_on(gram, measured)
        except torch.OutOfMemoryError:
            if gram is None:
                raise
            logger.warning(
                f"initialization: the input of {measured.modules[0]} is solved on the CPU, the accelerator has no "
                "memory left"
            )
            gram = gram.cpu()
            torch.cuda.empty_cache()
            return self._solve_on(gram, measured)

    def _solve_on(self, gram: torch.Tensor | None, measured: InputStats) -> dict[str, Solved]:
        """Write A0 and B0 into every layer that reads one input."""
        start_of = self.rule.of_input(replace(measured, gram=gram))
        solved: dict[str, Solved] = {}
        bases: dict[int, NullBasis] = {}  # by what the rule gave: one for all layers to which it gives the same
        for name in measured.modules:
            start = time.perf_counter()
            layer = self.layers[name]
            r, scaling = layer.r[self.adapter_name], layer.scaling[self.adapter_name]
            weight = weight_of(layer).to(measured.sketch.device if gram is None else gram.device)
            try:
                found = start_of(weight, r, scaling)
            except ValueError as reason:
                raise UserError(f"target_modules: {name}: {reason}; leave it out (exclude_modules)") from None
            A, B = self._factors(name)
            A.copy_(found.A)
            B.copy_(found.B)
            if found.basis is not None:
                basis = bases.setdefault(id(found.basis), NullBasis.for_factor(found.basis, A))
                layer.set_basis(self.adapter_name, basis)
                layer.project_A(self.adapter_name)  # in its rounding
            projected = None if gram is None else projected_inputs(A, gram, found.kernel)
            line = LayerStats(
                name=name,
                shape=(layer.out_features, layer.in_features),
                r=r,
                tokens=measured.tokens,
                gram_rank=found.gram_rank,
                leakage=None if gram is None else leakage(A, gram, projected),
                energy=found.energy,
                condition=found.condition,
                solver=found.solver,
                seconds=time.perf_counter() - start,
            )
            solved[name] = line, projected
        return solved

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return factors_of(self.layers[name], self.adapter_name)

    def _share(self, inputs: Sequence[InputStats], solved: dict[str, Solved]) -> dict[str, Solved]:
        """Give every process the factors, bases and lines of all, from whoever solved them."""
        for measured in inputs:
            for name in measured.modules:
                for factor in self._factors(name):
                    broadcast_tensor(factor, measured.owner)
        own = {name: (line, None if L is None else L.cpu()) for name, (line, L) in solved.items()}
        bases = self._bases(own)
        moved = {id(basis): NullBasis(basis.vectors.cpu()) for basis in bases.values()}  # one for layers that share it
        gathered = all_gather((own, {name: moved[id(basis)] for name, basis in bases.items()}))
        for _, bases in gathered:
            for name, basis in bases.items():
                self.layers[name].set_basis(self.adapter_name, basis)
        return {name: found for share, _ in gathered for name, found in share.items()}

    def _bases(self, names: Iterable[str]) -> dict[str, NullBasis]:
        bases = {name: getattr(self.layers[name], "bases", {}).get(self.adapter_name) for name in names}
        return {name: basis for name, basis in bases.items() if basis is not None}

    def _result(self, part: Calibration, solved: Mapping[str, Solved]) -> LayerResult:
        names = [module for measured in part.inputs for module in measured.modules]
        part.projected = {name: L for name in names if (L := solved[name][1]) is not None}
        copies = {name: tuple(factor.detach().cpu().clone() for factor in self._factors(name)) for name in names}
        scaling = {name: self.layers[name].scaling[self.adapter_name] for name in names}
        return LayerResult(copies, scaling, part, [solved[name][0] for name in names], self._bases(names))


def _is_narrow(width: int, device: torch.device) -> bool:
    return device.type == "cpu" and width <= NARROW
