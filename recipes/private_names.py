"""The private names of other packages that recipes use; `tests/test_private_names.py` names one that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub.utils import _http
from transformers import TrainingArguments
from transformers.integrations import deepspeed


@contextlib.contextmanager
def complete_at_load() -> Iterator[None]:
    """Keep transformers from sharding weights as it makes a model under ZeRO-3, which it does whatever zero3_init_flag says.

    The initialization needs complete weights; DeepSpeed shards them when the trainer hands the model over. There are public
    functions to set and unset the configuration by which transformers decides, and none to read it.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference and reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def take_one_gpu(arguments: TrainingArguments) -> None:
    """Let a trainer of one process use the first GPU alone, as transformers itself does where `device_map` splits a model."""
    arguments._n_gpu = 1


def hub_client() -> Any:
    """Return a new client of huggingface_hub as that makes its own, of httpx or httpx2 by its version."""
    return _http.default_client_factory()
