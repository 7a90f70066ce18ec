"""vLLM as the engine for lm-eval's tasks: big models, the saved adapter, the same task files."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from lora_null.adapters.inspection import VLLM_RANKS, vllm_rank
from lora_null.utils.distributed import rank_and_world
from lora_null.utils.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def require_vllm() -> None:
    """Raise a UserError, before anything is spent, where vLLM cannot be used."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("eval.backend: vllm is not installed here; eval.backend=hf evaluates without it")
    if rank_and_world()[1] > 1:
        raise UserError("eval.backend: vllm wants one process, which it spreads over the GPUs itself; use hf")


def open_vllm(model_name: str, adapter: Path | None, *, dtype: str, revision: str | None, rank: int) -> LM:
    """Return lm-eval's vLLM engine on a base model, with its saved adapter.

    Args:
        model_name: folder or hub id of the base model.
        adapter: a folder with a plain LoRA; None for the base itself.
        dtype: of the weights.
        revision: hub revision of the model.
        rank: the adapter's, as saved.

    Raises:
        UserError: the rank is more than vLLM takes.
    """
    options = {"pretrained": model_name, "dtype": dtype, "revision": revision, "batch_size": "auto"}
    if adapter is not None:
        fitting = vllm_rank(rank)
        if fitting is None:
            raise UserError(
                f"eval.backend: vllm takes adapters up to rank {VLLM_RANKS[-1]}, this one has {rank}; use hf"
            )
        options |= {"lora_local_path": str(adapter), "max_lora_rank": fitting}
    return importlib.import_module("lm_eval.models.vllm_causallms").VLLM(**options)
