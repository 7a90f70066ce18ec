"""Read a model's weights from its safetensors files a part at a time, so that the whole never has to be in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn

from lora_null.utils.errors import UserError


class Owned(NamedTuple):
    """A parameter or buffer of the base model, and where it is kept.

    Attributes:
        key: its name in a checkpoint of the base, whatever PEFT has wrapped around it.
        storage, leaf: the module's own dictionary that holds it, and its name there.
        saved: whether a checkpoint holds it; False for a buffer that is computed anew from the config.
    """

    key: str
    storage: dict[str, Any]
    leaf: str
    tensor: torch.Tensor
    is_parameter: bool
    saved: bool


def base_tensors(model: nn.Module, name: str = "") -> Iterator[Owned]:
    """Yield the tensors of a base model, or of a part of it called `name`, each once and without what PEFT added to it.

    Left out are adapters, trained copies of modules (`modules_to_save`), and of those outside the backbone, such as a head
    drawn at random, the original too: nothing that an adapted layer reads comes from there.
    """
    added: list[str] = []
    spine = getattr(model, "base_model_prefix", "") if not name else ""
    spine = f"{spine}." if spine and hasattr(model, spine) else ""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            added += [f"{path}.{leaf}." for leaf in (*module.adapter_layer_names, *module.other_param_names)]
        if isinstance(module, ModulesToSaveWrapper) and not path.startswith(spine):
            added.append(f"{path}.")
    seen: set[int] = set()
    for path, module in model.named_modules():
        for storage, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in storage.items():
                full = f"{path}.{leaf}" if path else leaf
                if tensor is None or id(tensor) in seen or full.startswith(tuple(added)):
                    continue
                seen.add(id(tensor))
                saved = is_parameter or leaf not in module._non_persistent_buffers_set
                yield Owned(
                    _in_checkpoint(f"{name}.{full}" if name else full), storage, leaf, tensor, is_parameter, saved
                )


def _in_checkpoint(name: str) -> str:
    """Return a name without the parts that PEFT's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module", "token_adapter"))


class WeightFiles:
    """The safetensors files of a checkpoint folder, for a model that was made on the meta device.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        dtype: what the weights are cast to.

    Raises:
        UserError: the folder holds no safetensors.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            self.file_of = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise UserError(f"{folder}: no model.safetensors, needed to read weights layer by layer")

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return one tensor, in the dtype given or that of the weights.

        Raises:
            UserError: the files do not have it.
        """
        if key not in self.file_of:
            raise UserError(f"{self.folder}: its files have no weight {key!r}, load the model whole instead")
        with safe_open(self.folder / self.file_of[key], "pt") as file:
            return file.get_tensor(key).to(dtype or self.dtype)

    def of(self, owned: Owned) -> torch.Tensor | None:
        """Return what the files hold for a tensor of the model; None where it is not theirs, and the model's own right.

        Raises:
            UserError: the model has only its shape (meta device), and the files do not have it.
        """
        if not owned.saved or not (owned.tensor.is_meta or owned.key in self.file_of):
            return None
        return self.read(owned.key, None if owned.is_parameter else owned.tensor.dtype)

    @contextlib.contextmanager
    def loaded(self, module: nn.Module, name: str) -> Iterator[None]:
        """Give `module`, called `name` in the checkpoint, its weights; afterwards it is without again."""
        with self._assigned(base_tensors(module, name)):
            yield

    @contextlib.contextmanager
    def outside(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Give the model all weights but its decoder layers' and its head's: embeddings, positions, norms."""
        inner = getattr(model, "get_base_model", lambda: model)()
        head = inner.get_output_embeddings()
        apart = {id(t) for module in (*layers.values(), *([head] if head else [])) for t in _tensors(module)}
        apart -= {id(p) for p in inner.get_input_embeddings().parameters()}  # a tied head
        with self._assigned(owned for owned in base_tensors(inner) if id(owned.tensor) not in apart):
            yield

    @contextlib.contextmanager
    def _assigned(self, found: Iterable[Owned]) -> Iterator[None]:
        before = []
        for owned in found:
            tensor = self.of(owned)
            if tensor is not None:
                before.append(owned)
                owned.storage[owned.leaf] = nn.Parameter(tensor, requires_grad=False) if owned.is_parameter else tensor
        try:
            yield
        finally:
            for owned in before:
                owned.storage[owned.leaf] = owned.tensor


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
