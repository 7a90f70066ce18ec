"""Read a model's weights from its safetensors files a part at a time, so that the whole never has to be in memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lora_null.layer import LoraNullLinear, plain_name
from lora_null.utils.distributed import get_logger, together
from lora_null.utils.errors import UserError
from lora_null.utils.files import opened, read_json
from lora_null.utils.model_state import base_model_of, replaced
from lora_null.utils.sharding import own_piece

logger = get_logger(__name__)

# What PEFT puts into a module's name that a checkpoint of the base has not.
WRAPPERS = ("base_layer", "original_module", "token_adapter")


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


def base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a base model, or of a part of it called `name`, by path, without what PEFT put beside them.

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
    for path, module in model.named_modules():
        if not f"{path}.".startswith(tuple(added)):
            yield path, module


def base_tensors(model: nn.Module, name: str = "") -> Iterator[Owned]:
    """Yield the tensors of `base_modules`, each once."""
    seen: set[int] = set()
    for path, module in base_modules(model, name):
        for storage, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for leaf, tensor in storage.items():
                full = f"{path}.{leaf}" if path else leaf
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                saved = is_parameter or leaf not in module._non_persistent_buffers_set
                yield Owned(
                    checkpoint_name(f"{name}.{full}" if name else full), storage, leaf, tensor, is_parameter, saved
                )


def base_numbers(model: nn.Module) -> dict[str, int | float]:
    """Return the numbers that the modules of a base model hold themselves, such as multipliers, by name."""
    found = {}
    for path, module in base_modules(model):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper | _DropoutNd):
            held = vars(module).items()
            found |= {checkpoint_name(f"{path}.{leaf}"): x for leaf, x in held if type(x) in (int, float)}
    return found


def checkpoint_name(name: str) -> str:
    """Return the name that a parameter has in a checkpoint of the base."""
    return ".".join(part for part in plain_name(name).split(".") if part not in WRAPPERS)


def keys_by_name(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Return under what key a checkpoint holds each weight of a model, by the weight's name in the model.

    They differ where transformers renames weights as it loads them, as those of most models that read images too. Left out
    are weights that it makes of several, such as fused experts.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    made_of_several = [change for change in changes if not isinstance(change, WeightRenaming)]
    names = {checkpoint_name(name): tensor for name, tensor in model.state_dict().items()}
    prefix, found = model.base_model_prefix, {}
    for key in sorted(keys):
        name, made_by = rename_source_key(key, renamings, made_of_several, prefix, names)
        if name not in names and key in names:
            name, made_by = key, None
        if made_by is None:
            found[name] = key
    return found


class WeightFiles:
    """The safetensors files of a checkpoint folder.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        model: the model they are for, by whose names weights are asked for; None where only the files' own keys matter.

    Attributes:
        file_of: key in the files → name of the file.
        key_of: name in the model → key in the files.

    Raises:
        UserError: the folder holds no safetensors, or damaged ones.
    """

    def __init__(self, folder: Path, model: PreTrainedModel | None = None) -> None:
        self.folder = folder
        self.file_of: dict[str, str]
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.is_file():  # which transformers takes, if an index lies beside it
            with opened(single) as file:
                self.file_of = dict.fromkeys(file.keys(), single.name)
        elif index.is_file():
            found = read_json(index, ours=False)
            if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
                raise UserError(f"{index}: damaged, it has no weight_map")
            self.file_of = found["weight_map"]
        else:
            raise UserError(
                f"{folder}: no model.safetensors, needed to read weights layer by layer; transformers writes it: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), and the tokenizer likewise"
            )
        self.key_of = keys_by_name(model, self.file_of) if model is not None else {key: key for key in self.file_of}

    @classmethod
    def of_model(cls, model: PreTrainedModel, name: str, revision: str | None = None) -> WeightFiles:
        """Return the files of a model that was loaded from a local folder or from the hub."""
        if Path(name).is_dir():
            return cls(Path(name), model)
        return cls(Path(snapshot_download(name, revision=revision, allow_patterns="*.safetensors*")), model)

    def check(self, model: nn.Module) -> None:
        """Raise a UserError that names a weight of the model which the files do not have."""
        lacking = next((x.key for x in base_tensors(model) if x.saved and x.key not in self.key_of), None)
        if lacking is not None:
            raise UserError(f"{self.folder}: its files have no weight {lacking!r}, load the model whole instead")

    def read(self, owned: Owned) -> torch.Tensor:
        """Return what this process holds of a tensor, all of it or a piece, in the dtype that it has in the model.

        Raises:
            UserError: it has another shape in the files.
        """
        key = self.key_of[owned.key]
        with opened(self.folder / self.file_of[key]) as file:
            stored = file.get_slice(key)
            if stored.get_shape() != list(owned.tensor.shape):
                raise UserError(f"{self.folder}: {key} is {stored.get_shape()}, not {list(owned.tensor.shape)}")
            if not isinstance(owned.tensor, DTensor):
                return file.get_tensor(key).to(owned.tensor.dtype)
            return stored[own_piece(owned.tensor)[1]].to(owned.tensor.dtype)

    def read_stored(self, name: str) -> torch.Tensor:
        """Return a weight by its name in the model, whole and in the dtype of the files."""
        key = self.key_of[name]
        with opened(self.folder / self.file_of[key]) as file:
            return file.get_tensor(key)

    def of(self, owned: Owned) -> torch.Tensor | None:
        """Return what the files hold for a tensor; None where they hold nothing and the model's own value is right."""
        if not owned.saved or not (owned.tensor.is_meta or owned.key in self.key_of):
            return None
        return self.read(owned)

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Give every weight that is still on the meta device its numbers: of a sharded one this process's piece alone.

        What has been taken out of the base of an adapted layer, s·B0A0, is taken out of what is read, piece by piece.

        Args:
            model: a base, or a PEFT model around it, whole or already sharded (FSDP2).
            device: where the numbers go.
        """
        inner = base_model_of(model)
        missing = {id(x.tensor): x for x in base_tensors(inner) if x.saved and x.tensor.is_meta}
        filled: dict[int, torch.Tensor] = {}
        for module in inner.modules():
            for storage in (module._parameters, module._buffers):
                for leaf, tensor in storage.items():
                    if id(tensor) in missing:  # a tied weight has several owners
                        if id(tensor) not in filled:
                            numbers = self.read(missing[id(tensor)])  # a view of the file, which the copy lets go of
                            copied = numbers.to(device, copy=True, memory_format=torch.contiguous_format)
                            filled[id(tensor)] = _like(tensor, copied)
                        storage[leaf] = filled[id(tensor)]
        new = {id(tensor) for tensor in filled.values()}
        for layer in inner.modules():
            if isinstance(layer, LoraNullLinear) and layer.residual and id(layer.get_base_layer().weight) in new:
                layer.subtract_from_loaded_base()

    def loaded(self, module: nn.Module, name: str) -> AbstractContextManager[None]:
        """Give `module`, called `name` in the checkpoint, its weights; afterwards it is without again."""
        return self._assigned(base_tensors(module, name))

    def outside(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Give the model all weights but its decoder layers' and its head's: embeddings, positions, norms."""
        inner = base_model_of(model)
        head = inner.get_output_embeddings()
        others = (*layers.values(), *([head] if head else []))
        apart = {id(t) for module in others for t in (*module.parameters(), *module.buffers())}
        apart -= {id(p) for p in inner.get_input_embeddings().parameters()}  # a tied head
        return self._assigned(owned for owned in base_tensors(inner) if id(owned.tensor) not in apart)

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


def _like(tensor: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a weight without any, or of this process's piece, as what it is: a parameter, a shard."""
    if isinstance(tensor, DTensor):
        layout = {"shape": tensor.shape, "stride": tensor.stride()}
        numbers = DTensor.from_local(numbers, tensor.device_mesh, tensor.placements, run_check=False, **layout)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(numbers, requires_grad=tensor.requires_grad) if is_parameter else numbers


def open_in_files(
    load: Callable[..., PreTrainedModel], name: str, revision: str | None = None, **options: Any
) -> tuple[PreTrainedModel, WeightFiles]:
    """Return a model whose weights stay in their files (meta device), and the files.

    Args:
        load: transformers' `from_pretrained`, or a function around it.
        name, revision: a local folder, or a model of the hub.
        options: more arguments of `load`.

    Raises:
        UserError: there are no safetensors, or a weight is made of several of theirs (fused experts are).
    """
    model = load(name, device_map="meta", **options)
    vars(model).pop("hf_device_map", None)  # by which a trainer would take it for one that is spread over devices
    files = WeightFiles.of_model(model, name, revision)
    files.check(model)
    with init_empty_weights(include_buffers=False):
        computed = dict(type(model)._from_config(copy.deepcopy(model.config)).named_buffers())
    for owned in base_tensors(model):
        if not owned.is_parameter and not owned.saved:
            owned.storage[owned.leaf] = computed[owned.key]
    return model, files


def open_to_shard(
    load: Callable[..., PreTrainedModel], name: str, revision: str | None = None, **options: Any
) -> tuple[PreTrainedModel, WeightFiles] | None:
    """Return what `open_in_files` does, on every process; None, after a line that says why, where it cannot on one."""
    try:
        return together(lambda: open_in_files(load, name, revision, **options))
    except UserError as reason:
        logger.warning(f"every process loads the whole model: {reason}")
        return None


@contextlib.contextmanager
def adapters_in_memory() -> Iterator[None]:
    """Let PEFT leave the adapters, drawn as always, in memory, whose base layers are on the meta device."""
    to, move = nn.Module.to, BaseTunerLayer._move_adapter_to_device_of_base_layer

    def stay(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return module if str(args[:1] and args[0]) == "meta" else to(module, *args, **kwargs)

    def keep(layer: BaseTunerLayer, adapter_name: str, device: torch.device | None = None) -> None:
        empty = any(parameter.is_meta for parameter in layer.get_base_layer().parameters())
        move(layer, adapter_name, torch.device("cpu") if empty else device)

    with replaced(nn.Module, "to", stay), replaced(BaseTunerLayer, move.__name__, keep):
        yield
