"""W0 + s·BA, added in float32 and cast once: as a checkpoint, read and written a shard at a time, or in a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_null.adapters.saved import SavedAdapter
from lora_null.checkpoint_reader import WeightFiles
from lora_null.factors import Pair
from lora_null.utils.errors import UserError
from lora_null.utils.files import opened, write_json, write_safetensors
from lora_null.utils.quantized import PLAIN_DTYPES

SHARD_SIZE = "5GB"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass
class Delta:
    """The change of one weight: s·BA, transposed where the weight is stored as (d_in, d_out)."""

    A: torch.Tensor  # (r, d_in)
    B: torch.Tensor  # (d_out, r)
    scaling: float
    transposed: bool = False

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weight + s·BA before it is rounded: in float32, in float64 where the weight is."""
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        change = (self.B.to(exact) @ self.A.to(exact)) * self.scaling
        return weight.to(exact) + (change.T if self.transposed else change).to(weight.device)


@dataclass
class Source:
    """One tensor of the checkpoint to write: where it is read, its dtype and shape, what is added."""

    key: str
    dtype: torch.dtype
    shape: list[int]
    delta: Delta | None = None


def write_checkpoint(
    base: Path,
    folder: Path,
    deltas: Mapping[str, Delta],
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    shard_size: str = SHARD_SIZE,
) -> bool:
    """Write a base's checkpoint with changed weights.

    Args:
        base: folder of the base's safetensors.
        folder: gets `model.safetensors`, or shards and their index.
        deltas: module name → its change.
        model: the base on the meta device, for the names of its weights and which of them are tied.
        dtype: of the floating-point tensors that are written; None keeps each as the base has it.
        shard_size: of a file, at most.

    Returns:
        Whether a tied output embedding is written apart from the input embedding, since only it changed.

    Raises:
        UserError: the base's files have no weight that an adapted module names, or a quantized one.
    """
    files = WeightFiles(base, model)
    sources, untied = plan(files, deltas, model)
    skeleton = {}
    for name, source in sources.items():
        written = dtype if dtype is not None and source.dtype.is_floating_point else source.dtype
        skeleton[name] = torch.empty(source.shape, dtype=written, device="meta")
    split = split_torch_state_dict_into_shards(skeleton, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: merged(files, sources[name], skeleton[name].dtype) for name in names}
        write_safetensors(folder / file, shard, {})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return untied


def plan(files: WeightFiles, deltas: Mapping[str, Delta], model: PreTrainedModel) -> tuple[dict[str, Source], bool]:
    """Return the tensors to write by name, and whether a tied output embedding comes apart."""
    sources = {}
    for file in dict.fromkeys(files.file_of.values()):
        with opened(files.folder / file) as stored:
            for key in stored.keys():  # noqa: SIM118
                part = stored.get_slice(key)
                dtype = DTYPES.get(part.get_dtype()) or stored.get_tensor(key).dtype
                sources[key] = Source(key, dtype, part.get_shape())
    untied = False
    for module, delta in deltas.items():
        key = files.key_of.get(f"{module}.weight")
        tied = _is_tied_head(module, model)
        untied = untied or tied
        if key is None and tied:
            twin = files.key_of[f"{_name_of(model, model.get_input_embeddings())}.weight"]
            key = f"{module}.weight"
            sources[key] = Source(twin, sources[twin].dtype, sources[twin].shape)
        if key is None:
            raise UserError(f"{files.folder}: its files have no weight {module + '.weight'!r} to merge into")
        if sources[key].dtype not in PLAIN_DTYPES:
            dtype = str(sources[key].dtype).removeprefix("torch.")
            raise UserError(f"{files.folder}: {key} is stored as {dtype}, quantized; --base names the plain weights")
        sources[key].delta = delta
    return sources, untied


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _is_tied_head(module: str, model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and _name_of(model, head) == module and bool(model.config.tie_word_embeddings)


def merged(files: WeightFiles, source: Source, dtype: torch.dtype) -> torch.Tensor:
    """Return one tensor as it is written."""
    with opened(files.folder / files.file_of[source.key]) as stored:
        tensor = stored.get_tensor(source.key)
    if source.delta is not None:
        tensor = source.delta.added_to(tensor)
    return tensor.to(dtype)


def deltas_of(
    pairs: Mapping[str, Pair], scaling: Callable[[str], float], transposed: Callable[[str], bool]
) -> dict[str, Delta]:
    """Return module name → its change."""
    return {name: Delta(A, B, scaling(name), transposed(name)) for name, (A, B) in pairs.items()}


@torch.no_grad()
def add_to_weights(model: nn.Module, adapter: SavedAdapter) -> None:
    """Add s·BA to the weights of a plain model, in place, rounded once to each weight's dtype.

    Raises:
        UserError: it has no such linear.
    """
    modules = dict(model.named_modules())
    deltas = deltas_of(adapter.pairs(), adapter.scaling, lambda name: isinstance(modules.get(name), Conv1D))
    for name, delta in deltas.items():
        if name not in modules:
            raise UserError(f"{adapter.folder}: made for another base, which has no {name}")
        weight = modules[name].weight
        weight.copy_(delta.added_to(weight))
