"""Adapters that were trained one upon the other, as one plain LoRA for the original base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE, plain_fields, state_of, uniform
from lora_null.adapters.saved import SavedAdapter, read_adapter
from lora_null.factors import Pair
from lora_null.utils.files import write_json, write_safetensors


def join(adapters: Mapping[str, SavedAdapter]) -> tuple[dict[str, Pair], float]:
    """Return the pairs of Σ s_i B_i A_i and their one scaling: [A_1; A_2; …] and [B_1, B_2, …], of the sum of the ranks.

    Where all scalings are the same these are copies, no arithmetic; else factors of 16 bits become float32, as in `uniform`.

    Args:
        adapters: by any names, in order.
    """
    parts = []
    for adapter in adapters.values():
        pairs = adapter.pairs()
        parts.append(uniform(pairs, {name: adapter.scaling(name) for name in pairs}))
    scaling = next((s for _, _, s in reversed(parts) if s), 1.0)
    shapes = {name: (A.shape[1], B.shape[0]) for pairs, _, _ in parts for name, (A, B) in pairs.items()}
    joined = {}
    for name, (d_in, d_out) in shapes.items():
        rows, columns = [], []
        for pairs, rank, own in parts:
            A, B = pairs.get(name, (torch.zeros(rank, d_in), torch.zeros(d_out, rank)))
            rows.append(A)
            columns.append(
                B if own == scaling else B.to(torch.promote_types(B.dtype, torch.float32)) * (own / scaling)
            )
        joined[name] = torch.cat(rows), torch.cat(columns, dim=1)
    return joined, scaling


def join_onto(before: Path, folder: Path) -> int:
    """Put an earlier adapter in front of the one in a folder, which was trained upon it; return the parameters written."""
    after = read_adapter(folder)
    pairs, scaling = join({"before": read_adapter(before), "after": after})
    rank = len(next(iter(pairs.values()))[0])
    fields = plain_fields(rank, scaling)
    if pairs.keys() != after.factors().keys():  # what chose the later one's modules leaves some of the earlier one out
        fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        fields["target_modules"] = sorted(pairs)
    write_safetensors(folder / WEIGHTS_FILE, state_of(pairs), after.metadata)
    write_json(folder / CONFIG_FILE, after.config | fields)
    return sum(A.numel() + B.numel() for A, B in pairs.values())
