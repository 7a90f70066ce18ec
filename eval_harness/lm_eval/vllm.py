"""vLLM as the engine for lm-eval's tasks: big models, the saved adapter, the same task files."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_null.adapters.inspection import VLLM_RANKS, vllm_rank
from lora_null.utils.distributed import num_processes
from lora_null.utils.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def max_lora_rank(rank: int, whose: str) -> int:
    """Return the smallest `max_lora_rank` of vLLM that an adapter fits.

    Args:
        rank: of the adapter, as it is saved.
        whose: the adapter or the method, for the message.

    Raises:
        UserError: it fits none.
    """
    fitting = vllm_rank(rank)
    if fitting is None:
        raise UserError(f"eval.backend: vllm takes adapters up to rank {VLLM_RANKS[-1]}, {whose} saves {rank}; use hf")
    return fitting


def check_vllm(tensor_parallel: int = 1) -> None:
    """Raise a UserError, before anything is spent, where vLLM cannot be used."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("eval.backend: vllm is not installed here; eval.backend=hf evaluates without it")
    if num_processes() > 1:
        raise UserError("eval.backend: vllm wants one process, which it spreads over the GPUs itself; use hf")
    if tensor_parallel > max(1, here := torch.cuda.device_count()):
        raise UserError(f"eval.vllm.tensor_parallel: asks for {tensor_parallel} GPUs, and {here} are here")


def open_vllm(
    model_name: str,
    adapter: Path | None,
    *,
    dtype: str,
    revision: str | None,
    rank: int,
    tokenizer: Path | None = None,
    trust_remote_code: bool = False,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    memory_share: float = 0.9,
) -> LM:
    """Return lm-eval's vLLM engine on a base model, with its saved adapter.

    Args:
        model_name: folder or hub id of the base model.
        adapter: a folder with a plain LoRA; None for the base itself.
        dtype: of the weights.
        revision: hub revision of the model.
        rank: the adapter's, as saved.
        tokenizer: a folder with the tokenizer to use, whose end token ends answers; None for the model's own.
        trust_remote_code: run code that the model's repository ships.
        tensor_parallel: GPUs that share each layer.
        max_model_len: tokens of prompt and answer together; None for the model's own.
        memory_share: of each GPU's memory that vLLM takes, in (0, 1].

    Raises:
        UserError: the rank is more than vLLM takes.
    """
    options = {"pretrained": model_name, "dtype": dtype, "revision": revision, "batch_size": "auto"}
    options |= {"tensor_parallel_size": tensor_parallel, "gpu_memory_utilization": memory_share}
    options |= {"trust_remote_code": trust_remote_code}
    options |= {} if max_model_len is None else {"max_model_len": max_model_len}
    options |= {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    if adapter is not None:
        options |= {"lora_local_path": str(adapter), "max_lora_rank": max_lora_rank(rank, "this adapter")}
    return importlib.import_module("lm_eval.models.vllm_causallms").VLLM(**options)
