"""Initializations on disk, one file a finished part: to resume a run, to continue a killed one, to reuse an equal one.

A0 and B0 serve v1 and v2 alike, so a folder written for one starts the other. Folders are complete when `layers.json`
is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from lora_null.calibration import Calibration, InputStats
from lora_null.errors import UserError
from lora_null.factors import LayerStats
from lora_null.files import cache_root, link, read_json, read_safetensors, write_json, write_safetensors

PREFIX, REPORT_FILE = "factors.", "layers.json"
FORMAT = "1"  # a change of what the files mean makes old caches unused
KEPT = 8


@dataclass
class SolvedPart:
    """The result for the modules of one decoder layer (or of the whole model).

    Attributes:
        factors: module name → A0 (r, d_in) and B0 (d_out, r), as stored in the adapter.
        scaling: module name → the s with which s·B0A0 = W0 U Uᵀ.
        measured: their inputs without Grams, for the drift.
        stats: one line a module.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: dict[str, float]
    measured: Calibration
    stats: list[LayerStats]


def write_part(folder: Path, name: str, part: SolvedPart) -> None:
    """Write one part atomically as `factors.NAME.safetensors`."""
    tensors = {f"{m}.A": A for m, (A, _) in part.factors.items()} | {f"{m}.B": B for m, (_, B) in part.factors.items()}
    tensors |= {f"{m}.L": L for m, L in part.measured.projected.items()}
    tensors |= {f"{i}.sketch": stats.sketch for i, stats in enumerate(part.measured.inputs)}
    facts = {
        "scaling": part.scaling,
        "inputs": [{"modules": stats.modules, "tokens": stats.tokens} for stats in part.measured.inputs],
        "output_energy": part.measured.output_energy,
        "stats": [line.to_json() for line in part.stats],
        "seconds": part.measured.seconds,
    }
    write_safetensors(folder / f"{PREFIX}{name}.safetensors", tensors, {"facts": json.dumps(facts)})


def read_parts(folder: Path) -> dict[str, SolvedPart]:
    """Return all finished parts in the folder, by name; none where there is no folder."""
    return {path.stem.removeprefix(PREFIX): _read_part(path) for path in sorted(folder.glob(f"{PREFIX}*.safetensors"))}


def _read_part(path: Path) -> SolvedPart:
    tensors, metadata = read_safetensors(path)
    facts = json.loads(metadata["facts"])
    names = [line["name"] for line in facts["stats"]]
    inputs = [
        InputStats(line["modules"], None, tensors[f"{i}.sketch"], line["tokens"])
        for i, line in enumerate(facts["inputs"])
    ]
    projected = {name: tensors[f"{name}.L"] for name in names}
    return SolvedPart(
        {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names},
        facts["scaling"],
        Calibration(inputs, facts["output_energy"], projected, facts["seconds"]),
        [LayerStats.from_json(line) for line in facts["stats"]],
    )


def finish(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the report: the folder is complete."""
    write_json(folder / REPORT_FILE, report)


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a complete folder.

    Raises:
        UserError: it is not complete.
    """
    if not (folder / REPORT_FILE).is_file():
        raise UserError(f"{folder}: holds no complete initialization ({REPORT_FILE} is missing)")
    return read_json(folder / REPORT_FILE)


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
    """Copy a complete folder, by hard links where the file system allows."""
    for path in [*sorted(source.glob(f"{PREFIX}*")), source / REPORT_FILE]:
        link(path, target / path.name)


def cached_folder(
    model: str,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    batches: Iterable[Mapping[str, Any]],
    **settings: Any,
) -> Path:
    """Return the cache folder of an initialization: one for each base, calibration tokens, ranks and settings.

    Args:
        model: `fingerprint` of the base.
        layers, adapter_name: the adapter, for its ranks, scalings and dtype.
        batches: the calibration batches.
        settings: whatever else decides the result.
    """
    digest = hashlib.sha256(f"{FORMAT} {model} {sorted(settings.items())}".encode())
    for name, layer in layers.items():
        dtype = layer.lora_A[adapter_name].weight.dtype
        digest.update(f"{name} {layer.r[adapter_name]} {layer.scaling[adapter_name]} {dtype}".encode())
    for batch in batches:
        for key in ("input_ids", "attention_mask"):
            value = torch.as_tensor(batch[key]).to("cpu", torch.int64).contiguous()
            digest.update(f"{key} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return cache_root() / "init" / digest.hexdigest()[:24]


def prune_cache(keep: Path) -> None:
    """Remove all but the newest initializations from the cache; `keep` is the newest now, if it is there at all."""
    if keep.parent != cache_root() / "init":
        return
    os.utime(keep)
    folders = sorted(keep.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def fingerprint(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of the weights: every name, shape, dtype, and sums over all bits of each tensor.

    The sums are exact integers, the same on every device, and read a weight once at memory speed.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        bits = (
            parameter.detach()
            .reshape(-1)
            .view({2: torch.int16, 4: torch.int32}.get(parameter.element_size(), torch.uint8))
        )
        columns = bits[: len(bits) // 64 * 64].view(-1, 64).sum(0, dtype=torch.int64)
        digest.update(columns.cpu().numpy().tobytes() + bits[len(bits) // 64 * 64 :].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
