"""Which base an adapter belongs to: a hash of the base's checkpoint and the dtype that it ran in.

Both are written into the metadata of `adapter_model.safetensors` when a run saves its adapter, and compared before the
adapter is exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel

from lora_null.checkpoint_reader import WeightFiles
from lora_null.utils.errors import UserError
from lora_null.utils.files import opened

FINGERPRINT, DTYPE = "base_fingerprint", "base_dtype"
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
    rows = sorted({i * (shape[0] - 1) // (ROWS - 1) for i in range(ROWS)}) if shape[0] else []
    parts = [tensor[i : i + 1].contiguous().view(torch.uint8).numpy().tobytes() for i in rows]
    return f"{tensor.get_dtype()} {shape}".encode() + b"".join(parts)


def base_metadata(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, str]:
    """Return what an adapter's metadata says of the base that the model was loaded from; less where it is not known."""
    config = peft_model.peft_config[adapter_name]
    dtype = peft_model.get_base_model().get_input_embeddings().weight.dtype  # a linear may be stored quantized
    identity = {DTYPE: str(dtype).removeprefix("torch.")}
    commit = getattr(peft_model.get_base_model().config, "_commit_hash", None)  # of the hub, what was really loaded
    folder = checkpoint_on_disk(config.base_model_name_or_path, commit or config.revision)
    try:
        return identity | ({FINGERPRINT: base_fingerprint(folder)} if folder else {})
    except UserError:  # a base in another format, which has no hash
        return identity


def same_base(metadata: Mapping[str, str], folder: Path) -> bool | None:
    """Return whether a base's files are those that the adapter was trained on; None where it does not say."""
    known = metadata.get(FINGERPRINT)
    return None if known is None else known == base_fingerprint(folder)
