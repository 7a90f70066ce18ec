"""Which base an adapter belongs to: a hash of the base's checkpoint, the dtype that it ran in and how it was quantized.

They are written into the metadata of `adapter_model.safetensors` when a run saves its adapter, and compared before the
adapter is exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from torch import nn

from lora_null.checkpoint_reader import WeightFiles, base_tensors
from lora_null.utils.errors import UserError
from lora_null.utils.files import opened
from lora_null.utils.sharding import is_sharded

FINGERPRINT, DTYPE, QUANTIZATION = "base_fingerprint", "base_dtype", "base_quantization"
ROWS = 16  # of each tensor, evenly spaced: another checkpoint differs everywhere, and 7B hash in a second


def checkpoint_on_disk(name: str | None, revision: str | None = None) -> Path | None:
    """Return the folder of a base's files, local or in the hub's cache; None where there is none. Never downloads."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        return None
    for file in ("model.safetensors", "model.safetensors.index.json"):  # a config alone may be there
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            shards = WeightFiles(folder).file_of.values()
            return folder if all((folder / shard).is_file() for shard in shards) else None
    return None


def base_fingerprint(folder: Path) -> str:
    """Return a hash of a checkpoint: name, dtype and shape of every tensor and 16 rows of each, however it is sharded.

    Raises:
        UserError: the folder holds no safetensors, or damaged ones.
    """
    digest = hashlib.sha256()
    files: dict[str, list[str]] = {}
    for key, file in WeightFiles(folder).file_of.items():
        files.setdefault(file, []).append(key)
    found = {}
    for file, keys in files.items():
        with opened(folder / file) as stored:
            found |= {key: _sample(stored.get_slice(key)) for key in keys}
    for key in sorted(found):
        digest.update(key.encode() + found[key])
    return digest.hexdigest()[:32]


def _sample(tensor) -> bytes:
    """Return dtype, shape and a few rows of a tensor in a file, as bytes."""
    shape = tensor.get_shape()
    if not shape:
        return f"{tensor.get_dtype()} []".encode() + tensor[...].view(1).view(torch.uint8).numpy().tobytes()
    parts = [tensor[i : i + 1].contiguous().view(torch.uint8).numpy().tobytes() for i in _rows(shape[0])]
    return f"{tensor.get_dtype()} {shape}".encode() + b"".join(parts)


def _rows(size: int) -> list[int]:
    """Return which rows of a tensor of so many are looked at."""
    return sorted({i * (size - 1) // (ROWS - 1) for i in range(ROWS)}) if size else []


def base_metadata(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, str]:
    """Return what an adapter's metadata says of the base that the model was loaded from; less where it is not known."""
    config, base = peft_model.peft_config[adapter_name], peft_model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype  # a linear may be stored quantized
    identity = {DTYPE: str(dtype).removeprefix("torch.")}
    if quantized := getattr(base.config, "quantization_config", None):
        identity[QUANTIZATION] = _quantization(quantized)
    folder = checkpoint_on_disk(config.base_model_name_or_path, config.revision)
    try:
        if folder and config.revision is None and folder != Path(config.base_model_name_or_path):
            folder = folder if _was_loaded_from(folder, base) else None  # main in the hub's cache, or another revision
        return identity | ({FINGERPRINT: base_fingerprint(folder)} if folder else {})
    except UserError:  # a base in another format, which has no hash
        return identity


def _was_loaded_from(folder: Path, base: nn.Module) -> bool:
    """Return whether a few rows of the input embedding are those of the files; True where it cannot be compared."""
    files, weights = WeightFiles(folder, base), {id(x) for x in base.get_input_embeddings().parameters()}
    owned = next((x for x in base_tensors(base) if id(x.tensor) in weights and x.key in files.key_of), None)
    if owned is None or is_sharded(owned.tensor) or owned.tensor.is_meta or not owned.tensor.numel():
        return True
    key = files.key_of[owned.key]
    with opened(folder / files.file_of[key]) as stored:
        part = stored.get_slice(key)
        rows = _rows(min(part.get_shape()[0], len(owned.tensor)))  # tokens may have been added
        found = torch.cat([part[i : i + 1] for i in rows])
    live = owned.tensor.detach()[rows].cpu()
    return torch.equal(found.to(live.dtype), live) or torch.equal(found.bfloat16(), live.bfloat16())  # or cast twice


def _quantization(config: Any) -> str:
    """Return nf4, fp4 or int8 of a configuration of bitsandbytes, and of another one its method."""
    said = config if isinstance(config, Mapping) else config.to_dict()
    if said.get("load_in_4bit"):
        return said.get("bnb_4bit_quant_type", "fp4")
    method = said.get("quant_method")
    return "int8" if said.get("load_in_8bit") else str(getattr(method, "value", method))


def same_base(metadata: Mapping[str, str], folder: Path) -> bool | None:
    """Return whether a base's files are those that the adapter was trained on; None where it does not say."""
    known = metadata.get(FINGERPRINT)
    return None if known is None else known == base_fingerprint(folder)
