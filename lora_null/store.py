"""Initializations on disk, one file a finished part: to resume a run, to continue a killed one, to reuse an equal one.

A0 and B0 serve v1 and v2 alike, so a folder written for one starts the other. Folders are complete when `layers.json`
is there. Every file carries the key of its initialization, a hash of all that decides the result: what lies in a folder is
taken for an equal initialization and for no other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_null.calibration import INPUTS, Calibration, InputStats
from lora_null.factors import LayerStats
from lora_null.layer import NullBasis
from lora_null.utils.errors import UserError
from lora_null.utils.files import (
    cache_root,
    link,
    read_json,
    read_metadata,
    read_safetensors,
    write_safetensors,
)

PREFIX, REPORT_FILE = "factors.", "layers.json"
WHOLE = "model/"  # before the names of tensors that are of the model as a whole
FORMAT = "3"  # a change of what the files mean makes old caches unused
KEPT = 8
WORDS = 1 << 16  # of 8 bytes, summed up to one number: their weights stay in a processor's cache

# Entries of a model's config, and numbers of its modules, that do not decide what its layers read in eval mode, or that
# loading, training and forward passes set.
NOT_COMPUTED = re.compile(
    r"^_|drop|_loss|^padding_idx$|_cached$|_token_ids?$|^output_|^initializer|^summary_|^(architectures|auto_map|dtype|torch_dtype"
    r"|transformers_version|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|tokenizer_class|return_dict|use_cache|tie_word_embeddings|chunk_size_feed_forward|gradient_checkpointing"
    r"|attn_implementation)$"
)


@dataclass
class LayerResult:
    """The result for the modules of one decoder layer (or of the whole model).

    Attributes:
        factors: module name → A0 (r, d_in) and B0 (d_out, r), as stored in the adapter.
        scaling: module name → the s with which s·B0A0 = W0 U Uᵀ.
        measured: their inputs without Grams, for the drift.
        stats: one line a module.
        bases: module name → the basis in whose span A stays; modules that share an input share it.
        tensors: what a method computes of the model as a whole, by its own names.
        key: `initialization_key` of what it is a part of.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: dict[str, float]
    measured: Calibration
    stats: list[LayerStats]
    bases: dict[str, NullBasis] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    key: str = ""


def write_part(folder: Path, name: str, part: LayerResult) -> None:
    """Write one part atomically as `factors.NAME.safetensors`."""
    tensors = {f"{m}.A": A for m, (A, _) in part.factors.items()} | {f"{m}.B": B for m, (_, B) in part.factors.items()}
    tensors |= {f"{m}.L": L for m, L in part.measured.projected.items()}
    tensors |= {f"{i}.sketch": stats.sketch for i, stats in enumerate(part.measured.inputs)}
    distinct = list({id(basis): basis for basis in part.bases.values()}.values())
    tensors |= {f"{i}.basis": basis.vectors for i, basis in enumerate(distinct)}
    tensors |= {f"{WHOLE}{name}": tensor for name, tensor in part.tensors.items()}
    facts = {
        "scaling": part.scaling,
        "inputs": [{"modules": stats.modules, "tokens": stats.tokens} for stats in part.measured.inputs],
        "output_energy": part.measured.output_energy,
        "stats": [line.to_json() for line in part.stats],
        "bases": {m: next(i for i, b in enumerate(distinct) if b is basis) for m, basis in part.bases.items()},
        "seconds": part.measured.seconds,
    }
    write_safetensors(folder / f"{PREFIX}{name}.safetensors", tensors, {"facts": json.dumps(facts), "key": part.key})


def read_parts(folder: Path) -> dict[str, LayerResult]:
    """Return all finished parts in the folder, by name; none where there is no folder."""
    return {path.stem.removeprefix(PREFIX): _read_part(path) for path in parts_in(folder)}


def _read_part(path: Path) -> LayerResult:
    tensors, metadata = read_safetensors(path)
    facts = json.loads(metadata["facts"])
    names = [line["name"] for line in facts["stats"]]
    inputs = [
        InputStats(line["modules"], None, tensors[f"{i}.sketch"], line["tokens"])
        for i, line in enumerate(facts["inputs"])
    ]
    projected = {name: tensors[f"{name}.L"] for name in names if f"{name}.L" in tensors}
    distinct = {i: NullBasis(tensors[f"{i}.basis"]) for i in set(facts.get("bases", {}).values())}
    return LayerResult(
        {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names},
        facts["scaling"],
        Calibration(inputs, facts["output_energy"], projected, facts["seconds"]),
        [LayerStats.from_json(line) for line in facts["stats"]],
        {name: distinct[i] for name, i in facts.get("bases", {}).items()},
        {name.removeprefix(WHOLE): tensor for name, tensor in tensors.items() if name.startswith(WHOLE)},
        metadata.get("key", ""),
    )


def clear_others(folder: Path, key: str) -> None:
    """Remove from a folder what was written for another initialization than that of `key`, the report first."""
    report = folder / REPORT_FILE
    if report.is_file() and read_json(report).get("key") != key:
        report.unlink()
    for path in parts_in(folder):
        if read_metadata(path).get("key") != key:
            path.unlink()


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a complete folder.

    Raises:
        UserError: it is not complete, or was written by a version whose files mean something else.
    """
    if not (folder / REPORT_FILE).is_file():
        raise UserError(f"{folder}: holds no complete initialization ({REPORT_FILE} is missing)")
    report = read_json(folder / REPORT_FILE)
    if "key" not in report:
        raise UserError(f"{folder}: was written by an older version of lora-null, initialize anew")
    return report


def find_initialization(folder: Path) -> Path:
    """Return the folder that holds the parts: the given one, or its `init` (what a run or `lora-null init` leaves).

    Raises:
        UserError: neither holds a complete initialization.
    """
    inner = folder / "init"
    if (inner / REPORT_FILE).is_file():
        return inner
    read_report(folder)
    return folder


def copy_store(source: Path, target: Path) -> None:
    """Copy a complete folder, by hard links where the file system allows, in place of what lies in the target."""
    if target.exists() and source.samefile(target):
        return
    clear(target)
    for path in [*parts_in(source), source / REPORT_FILE]:
        link(path, target / path.name)


def clear(folder: Path, *, parts: bool = True) -> None:
    """Remove an initialization from a folder, the report first, and leave what else lies there; `parts` goes with it."""
    (folder / REPORT_FILE).unlink(missing_ok=True)
    for path in parts_in(folder) if parts else ():
        path.unlink()


def parts_in(folder: Path) -> list[Path]:
    """Return the files of all parts in a folder; none where there is no folder."""
    return sorted(folder.glob(f"{PREFIX}*.safetensors"))


def initialization_key(
    model: str,
    layers: Mapping[str, nn.Module],
    adapter_name: str,
    batches: Iterable[Mapping[str, Any]],
    **settings: Any,
) -> str:
    """Return a hash of all that decides an initialization: base, calibration tokens, ranks, scalings, settings.

    Args:
        model: `fingerprint` of the base.
        layers, adapter_name: the adapter, for its ranks, scalings and dtype.
        batches: the calibration batches, and the training batches that a method looks at.
        settings: whatever else decides the result.
    """
    digest = hashlib.sha256(f"{FORMAT} {model} {sorted(settings.items())}".encode())
    for name, layer in layers.items():
        digest.update(name.encode())
        factors = getattr(layer, "lora_A", None)
        if isinstance(layer, LoraLayer) and isinstance(factors, nn.ModuleDict) and adapter_name in factors:
            dtype = factors[adapter_name].weight.dtype
            digest.update(f" {layer.r[adapter_name]} {layer.scaling[adapter_name]} {dtype}".encode())
    for batch in batches:
        for key in (*INPUTS, "labels"):
            if key in batch:
                value = torch.as_tensor(batch[key]).to("cpu", torch.int64).contiguous()
                digest.update(f"{key} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()[:24]


def cached_folder(key: str) -> Path:
    """Return the cache folder of the initialization with this key."""
    return cache_root() / "init" / key


def can_keep() -> bool:
    """Return whether the cache, made where it is not there, can be written."""
    with contextlib.suppress(OSError):
        (cache_root() / "init").mkdir(parents=True, exist_ok=True)
    return os.access(cache_root() / "init", os.W_OK | os.X_OK)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Make a folder of the cache and keep `prune_cache`, of this or another process, from removing it inside the block.

    The system lets go of the lock when a process is killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / f".{uuid.uuid4().hex}.used")
    with _cache_lock():
        folder.mkdir(exist_ok=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()
        Path(held.lock_file).unlink(missing_ok=True)


def prune_cache(keep: Path) -> None:
    """Remove all but the newest initializations from the cache, and none in use; `keep` is the newest now."""
    if keep.parent != cache_root() / "init":
        return
    with _cache_lock():
        if keep.is_dir():
            os.utime(keep)
        folders = sorted(keep.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in folders[KEPT:]:
            if not any(_is_held(lock) for lock in folder.glob(".*.used")):
                shutil.rmtree(folder, ignore_errors=True)


def _cache_lock() -> FileLock:
    """Return the lock under which folders are taken into use and removed."""
    return FileLock(cache_root() / "init.lock")


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def computation(config: Any, numbers: Mapping[str, int | float] = MappingProxyType({})) -> str:
    """Return what, besides weights, decides what a model's layers compute: rotary positions, norms, activations, windows.

    Args:
        config: the model's.
        numbers: that its modules hold, by name.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    held = {name: x for name, x in numbers.items() if not NOT_COMPUTED.search(name.rpartition(".")[2])}
    return json.dumps([_computed(values), held], sort_keys=True)


def _computed(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if not NOT_COMPUTED.search(str(key))}
        return {key: _computed(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_computed(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else f"{type(value).__name__}"


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], config: str = "") -> str:
    """Return a hash of the weights: every name, shape, dtype, and weighted sums over all bits of each tensor.

    Each sum is over 64 Ki words of 8 bytes, multiplied by an odd number of their place, modulo 2⁶⁴: exact, the same on
    every device, another one when numbers change places, and read once at memory speed. The two halves of a word are
    added first, since of its topmost bit alone a multiplication would keep no place.

    Args:
        tensors: by name, in a fixed order.
        config: `computation` of the model.
    """
    digest = hashlib.sha256(config.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw
        whole = len(raw) // 8 * 8
        digest.update(_sums(raw[:whole].view(torch.int64)) + raw[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sums(words: torch.Tensor) -> bytes:
    weights = _place_weights(words.device)
    sums = [words.new_empty(0)]
    for chunk in words.split(WORDS if words.device.type == "cpu" else 64 * WORDS):
        mixed = (chunk >> 32).add_(chunk)
        whole = len(mixed) // WORDS * WORDS
        sums.append(mixed[:whole].view(-1, WORDS).mul_(weights).sum(1))
        rest = mixed[whole:]
        sums.append(rest.mul_(weights[: len(rest)]).sum().view(1))
    return torch.cat(sums).cpu().numpy().tobytes()


@functools.cache
def _place_weights(device: torch.device) -> torch.Tensor:
    """Return the odd number of every place, (WORDS,) int64."""
    numbers = hashlib.shake_256(b"lora-null").digest(8 * WORDS)
    return torch.frombuffer(bytearray(numbers), dtype=torch.int64).bitwise_or_(1).to(device)
