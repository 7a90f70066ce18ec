"""Read a model's weights from its safetensors files a part at a time, so that the whole never has to be in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lora_null.errors import UserError


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

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor.

        Raises:
            UserError: the files do not have it.
        """
        if key not in self.file_of:
            raise UserError(f"{self.folder}: its files have no weight {key!r}, load the model whole instead")
        with safe_open(self.folder / self.file_of[key], "pt") as file:
            return file.get_tensor(key).to(self.dtype)

    @contextlib.contextmanager
    def loaded(self, module: nn.Module, name: str) -> Iterator[None]:
        """Give `module`, called `name` in the checkpoint, its weights; afterwards it is without again."""
        prefix = f"{name}." if name else ""
        with self._assigned(
            module, ((p, prefix + p.replace("base_layer.", "")) for p, _ in module.named_parameters())
        ):
            yield

    @contextlib.contextmanager
    def outside(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Give the model all weights but its decoder layers' and its head's: embeddings, positions, norms."""
        inner = getattr(model, "get_base_model", lambda: model)()
        head = inner.get_output_embeddings()
        apart = {id(p) for module in (*layers.values(), *([head] if head else [])) for p in module.parameters()}
        apart -= {id(p) for p in inner.get_input_embeddings().parameters()}  # a tied head
        names = [name for name, parameter in inner.named_parameters() if id(parameter) not in apart]
        with self._assigned(inner, ((name, name) for name in names)):
            yield

    @contextlib.contextmanager
    def _assigned(self, module: nn.Module, keys: Iterable[tuple[str, str]]) -> Iterator[None]:
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        for name, key in keys:
            owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            parameter = owner._parameters[leaf]
            if parameter.is_meta:
                before.append((owner, leaf, parameter))
                owner._parameters[leaf] = nn.Parameter(self.read(key), requires_grad=False)
        try:
            yield
        finally:
            for owner, leaf, parameter in before:
                owner._parameters[leaf] = parameter
