"""An adapter folder as it lies on disk: its config, its tensors, its pairs A and B."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE
from lora_null.factors import Pair
from lora_null.utils.errors import UserError
from lora_null.utils.files import read_json, read_safetensors
from lora_null.utils.model_state import rewriting
from lora_null.utils.quantized import PLAIN_DTYPES

FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<which>[AB])\.weight")

# Of an adapted output layer PEFT also saves the base's own weight, and vLLM leaves it aside.
BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")

REWRITTEN = (
    "so its A and B are no change of the original model; PEFT's save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…) writes one"
)


@dataclass
class SavedAdapter:
    """What `adapter_config.json` and `adapter_model.safetensors` hold.

    Attributes:
        folder: where they lie.
        config: the config's fields, as written.
        tensors: by the names in the file.
        metadata: of the safetensors file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def factors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return module name → {"A": (r, d_in), "B": (d_out, r)}, what there is of them."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in self.tensors.items():
            match = FACTOR.fullmatch(key)
            if match:
                found.setdefault(match["module"], {})[match["which"]] = tensor
        return found

    def pairs(self) -> dict[str, Pair]:
        """Return module name → A (r, d_in) and B (d_out, r).

        Raises:
            UserError: tensors other than A, B and base copies; half a pair; A and B that misfit or hold no
                finite numbers; or they are no change of the original weights.
        """
        if start := self.base_is_rewritten():
            raise UserError(f"{self.folder}: was started by {start!r}, {REWRITTEN}")
        factors = self.factors()
        other = next((key for key in self.tensors if not FACTOR.fullmatch(key) and not BASE_COPY.fullmatch(key)), None)
        if other is not None:
            raise UserError(f"{self.folder}: holds {other!r} besides A and B; `lora-null check` says more")
        half = next((name for name, pair in factors.items() if len(pair) < 2), None)
        if half is not None or not factors:
            raise UserError(f"{self.folder}: {half or 'no layer'} has both A and B; `lora-null check` says more")
        for name, pair in factors.items():
            if wrong := _misfit(pair["A"], pair["B"], self.rank(name)):
                raise UserError(f"{self.folder}: {name} {wrong}; `lora-null check` says more")
        return {name: (pair["A"], pair["B"]) for name, pair in factors.items()}

    def base_is_rewritten(self) -> str | None:
        """Return the `init_lora_weights` by which PEFT rewrites the base on loading the adapter; else None."""
        return rewriting(self.config.get("init_lora_weights"))

    def scaling(self, module: str) -> float:
        """Return PEFT's s of a module: alpha/r, or alpha/√r under rslora, each by its pattern."""
        r, alpha = self.rank(module), self._by_pattern(module, "lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def rank(self, module: str) -> int:
        """Return the rank that the config gives a module."""
        return self._by_pattern(module, "r", "rank_pattern")

    def _by_pattern(self, module: str, name: str, pattern: str) -> Any:
        own = self.config.get(pattern) or {}
        return own.get(get_pattern_key(own.keys(), module), self.config[name])


def _misfit(A: torch.Tensor, B: torch.Tensor, rank: int) -> str | None:
    """Return what keeps A and B from being the factors of a linear; None where nothing does."""
    if not (A.dim() == B.dim() == 2 and len(A) == B.shape[1] == rank):
        return f"has A {tuple(A.shape)} and B {tuple(B.shape)}, not ({rank}, d_in) and (d_out, {rank})"
    other = next((x.dtype for x in (A, B) if x.dtype not in PLAIN_DTYPES), None)
    if other is not None:
        return f"is stored as {str(other).removeprefix('torch.')}"
    return None if A.isfinite().all() and B.isfinite().all() else "holds NaN or infinite numbers"


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter folder; nothing in it is checked but that it can be read.

    Raises:
        UserError: it holds no adapter, or a damaged one.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: holds no adapter ({CONFIG_FILE} is missing)")
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: holds no adapter weights ({WEIGHTS_FILE} is missing)")
    config = read_json(folder / CONFIG_FILE, ours=False)
    if not isinstance(config, dict) or "r" not in config or "lora_alpha" not in config:
        kind = config.get("peft_type", "LORA") if isinstance(config, dict) else "LORA"
        if kind != "LORA":
            raise UserError(
                f"{folder}: holds an adapter of PEFT's {kind}, no LoRA; merge_and_unload() of PEFT makes a whole model of it"
            )
        raise UserError(f"{folder / CONFIG_FILE}: not a LoRA config (r and lora_alpha are missing)")
    for key, pattern, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", int | float)):
        own = config.get(pattern) or {}
        for value in (config[key], *(own.values() if isinstance(own, dict) else [own])):
            if (
                not isinstance(value, kind)
                or isinstance(value, bool)
                or not math.isfinite(value)
                or (kind is int and value < 1)
            ):
                raise UserError(f"{folder / CONFIG_FILE}: not a LoRA config ({key} or {pattern} holds {value!r})")
    tensors, metadata = read_safetensors(folder / WEIGHTS_FILE)
    return SavedAdapter(folder, config, tensors, metadata)
