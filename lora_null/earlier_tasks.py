"""Gram matrices of earlier tasks: kept on disk, and added to those of the knowledge when a later task starts.

A task that is learned after others has to leave both the knowledge and the others alone: its null space is that of
C = w₀ C₀/N₀ + Σ w_j C_j/N_j, of the inputs of the knowledge (0) and of every earlier task j over their N tokens each. The
texts of the tasks are not needed again. What is kept of C_j are its d(d+1)/2 distinct numbers, in float64 since its
eigenvalues are squares of X's singular values; or a sketch F (d, q) with C_j ≈ F Fᵀ, for which float32 is enough.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lora_null.calibration import InputStats
from lora_null.factors import LayerStart
from lora_null.layerwise import measure_in_parts
from lora_null.solver import Rule
from lora_null.utils.distributed import all_gather, is_first_process, process_index
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_json, read_metadata, read_safetensors, write_json, write_safetensors

COMPLETE = "grams.json"
SEED = 0  # of a sketch's Gaussian


def sketch_of(gram: torch.Tensor, width: int) -> torch.Tensor:
    """Return F (d, q) with F Fᵀ the Nyström approximation of C from q random directions.

    C Ω (Ωᵀ C Ω)⁻¹ Ωᵀ C, of which F Fᵀ never exceeds C. It costs two products with C, and no eigenvalues of d × d.

    Args:
        gram: C, (d, d) float64, positive semi-definite.
        width: q, at most d.
    """
    d = len(gram)
    generator = torch.Generator().manual_seed(SEED)
    omega = torch.linalg.qr(torch.randn(d, min(width, d), generator=generator, dtype=torch.float64))[0].to(gram.device)
    # A shift keeps what is factored positive definite, and is taken out again (Tropp et al. 2017, algorithm 3).
    shift = d**0.5 * torch.finfo(gram.dtype).eps * gram.norm()
    product = gram @ omega + shift * omega
    inner = omega.T @ product
    factor = torch.linalg.cholesky((inner + inner.T) / 2)
    half = torch.linalg.solve_triangular(factor, product.T, upper=False).T
    U, S, _ = torch.linalg.svd(half, full_matrices=False)
    return U * (S.square() - shift).clamp(min=0).sqrt()


def lower_triangle(gram: torch.Tensor) -> torch.Tensor:
    """Return the entries of C (d, d) on and below the diagonal, row after row, (d(d+1)/2,) on the CPU."""
    return torch.cat([row[: i + 1] for i, row in enumerate(gram.cpu())])


def from_lower_triangle(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return C (d, d), symmetric, of what `lower_triangle` returned."""
    d = math.isqrt(2 * len(values))
    lower = values.new_zeros(d, d)
    for row, part in zip(lower, values.split(list(range(1, d + 1)))):
        row[: len(part)] = part
    lower = lower.to(device)
    return lower + lower.tril(-1).T


@torch.no_grad()
def keep_grams(
    folder: Path,
    model: nn.Module,
    layers: Iterable[str],
    batches: Sequence[Mapping[str, Any]],
    *,
    sketch: int | None = None,
    progress: bool = True,
) -> None:
    """Measure what linears of a model read on the batches, and keep it in a folder, one file per input.

    Under torch.distributed all processes call it together; each Gram is written by the one that holds it.

    Args:
        folder: complete when `grams.json` is there; `lower` float64, or `sketch` float32.
        model: a plain model, the earlier tasks in its weights.
        layers: names of its linears.
        batches: dicts with `input_ids` and `attention_mask`.
        sketch: q of `sketch_of`; None keeps the Grams.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    if is_first_process():  # what lies there may be of another model
        for path in [folder / COMPLETE, *folder.glob("*.safetensors")]:
            path.unlink(missing_ok=True)
    all_gather(None)
    with closing(measure_in_parts(model, modules, batches, progress=progress)) as parts:
        for stats in (stats for _, part in parts for stats in part.inputs):
            if stats.gram is None or stats.owner != process_index():
                continue
            if sketch is None:
                kept = {"lower": lower_triangle(stats.gram)}
            else:
                kept = {"sketch": sketch_of(stats.gram, sketch).float()}
            write_safetensors(folder / f"{stats.modules[0]}.safetensors", kept, {"tokens": str(stats.tokens)})
            stats.gram = None
    all_gather(None)  # every process has written
    if is_first_process():
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(path.name.encode() + path.read_bytes())
        write_json(folder / COMPLETE, {"key": digest.hexdigest()[:24], "sketch": sketch})
    all_gather(None)


@dataclass(frozen=True)
class Earlier:
    """An earlier task's Grams, and their weight beside the knowledge's 1."""

    folder: Path
    weight: float = 1.0

    @property
    def key(self) -> str:
        """A hash of what lies in the folder.

        Raises:
            UserError: it is not complete.
        """
        if not (self.folder / COMPLETE).is_file():
            raise UserError(f"{self.folder}: holds no complete Grams ({COMPLETE} is missing)")
        return read_json(self.folder / COMPLETE)["key"]

    def mean(self, modules: Sequence[str], device: torch.device) -> torch.Tensor:
        """Return C_j/N_j of the input that the modules read, float64.

        Raises:
            UserError: it was not measured.
        """
        tensors, metadata = read_safetensors(self._file(modules))
        tokens = int(metadata["tokens"])
        if "lower" in tensors:
            return from_lower_triangle(tensors["lower"], device) / tokens
        factor = tensors["sketch"].to(device, torch.float64)
        return factor @ factor.T / tokens

    def tokens(self, modules: Sequence[str]) -> int:
        """Return N_j of the input that the modules read; raise as `mean` does."""
        return int(read_metadata(self._file(modules))["tokens"])

    def _file(self, modules: Sequence[str]) -> Path:
        paths = [self.folder / f"{name}.safetensors" for name in modules]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"{self.folder}: holds no Gram of {modules[0]}; the tasks adapt other modules")
        return path


class WithEarlier:
    """A rule whose Grams are those of the knowledge and of the earlier tasks.

    Args:
        inner: a rule that reads Grams.
        earlier: the tasks before this one.
        knowledge: w₀.
    """

    needs_gram: ClassVar[bool] = True

    def __init__(self, inner: Rule, earlier: Sequence[Earlier], knowledge: float = 1.0) -> None:
        self.inner, self.earlier, self.knowledge = inner, list(earlier), knowledge
        weights = [(task.key, task.weight) for task in self.earlier]
        self.label = f"{inner.label} after {hashlib.sha256(repr((weights, knowledge)).encode()).hexdigest()[:16]}"

    def of_input(self, inputs: InputStats) -> Callable[[torch.Tensor, int, float], LayerStart]:
        """Return what gives the start of a layer that reads this input; see `lora_null.solver.Rule`."""
        if inputs.gram is None:
            return self.inner.of_input(inputs)
        tokens = inputs.tokens + sum(task.tokens(inputs.modules) for task in self.earlier)  # the rank is at most this
        total = tokens * self.knowledge / inputs.tokens * inputs.gram
        for task in self.earlier:
            total += tokens * task.weight * task.mean(inputs.modules, total.device)
        return self.inner.of_input(replace(inputs, gram=total, tokens=tokens))


def after_earlier(rule: Rule | None, earlier: Sequence[Earlier], knowledge: float) -> Rule | None:
    """Return a rule that reads the Grams of earlier tasks too; any other rule, or none, as it is."""
    return WithEarlier(rule, earlier, knowledge) if earlier and rule is not None and rule.needs_gram else rule
