"""Hashes by which an initialization is known: of the base's weights and code, and of all else that decides the result."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AttentionInterface

from lora_null.batches import INPUTS
from lora_null.checkpoint_reader import Owned, WeightFiles, base_numbers, base_tensors
from lora_null.layer import plain_name
from lora_null.utils.distributed import all_gather, broadcast, together
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import base_model_of
from lora_null.utils.own_code import foreign_code_in, foreign_functions, home_of, is_of_library, own_code_at, own_files
from lora_null.utils.quantized import is_quantized, stored_statistics
from lora_null.utils.sharding import is_sharded

FORMAT = "3"  # a change of what the files mean makes old caches unused
WORDS = 1 << 16  # of 8 bytes, summed up to one number: their weights stay in a processor's cache

# Entries of a model's config, and numbers of its modules, that do not decide what its layers read in eval mode, or that
# loading, training and forward passes set.
NOT_COMPUTED = re.compile(
    r"^_|drop|_loss|^padding_idx$|_cached$|_token_ids?$|^output_|^initializer|^summary_|^(architectures|auto_map|dtype|torch_dtype"
    r"|transformers_version|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|tokenizer_class|return_dict|use_cache|tie_word_embeddings|chunk_size_feed_forward|gradient_checkpointing"
    r"|attn_implementation)$"
)


def fingerprint_of(
    model: nn.Module, weights: WeightFiles | None = None, nonzero: Mapping[str, LoraLayer] = MappingProxyType({})
) -> str:
    """Return the fingerprint of a base: its config and its weights, in memory or still in their files.

    Args:
        model: the base, or a PEFT model around it.
        weights: the files, for a model without weights (meta device).
        nonzero: layers whose weight must not be zero.

    Raises:
        UserError: as `check_whole`; such a weight is zero; the processes have different weights.
    """
    if weights is None:
        check_whole(model)
    model = base_model_of(model)
    adapted = {f"{name}.weight": name for name, x in nonzero.items() if not is_quantized(x.get_base_layer())}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for owned in base_tensors(model):
            stored = weights.of(owned) if weights is not None else None
            tensor = owned.tensor if stored is None else stored
            if owned.key in adapted and not (tensor[:1].any() or tensor.any()):
                name = adapted[owned.key]
                raise UserError(f"target_modules: the weight of {name} is zero, leave it out (exclude_modules)")
            if owned.saved:
                yield owned.key, tensor
            elif not _is_rewritten(model, owned):
                # Computed anew wherever a model is loaded: the last digits differ between devices.
                yield owned.key, tensor.bfloat16() if tensor.is_floating_point() else tensor
        yield from stored_statistics(model)

    config = computation(getattr(model, "config", None), base_numbers(model))
    found = all_gather(together(lambda: fingerprint(tensors(), config)))
    if len(set(found)) > 1:
        raise UserError(
            "initialization: the base weights differ between the processes; every process has to load them"
        )
    return found[0]


def _is_rewritten(model: nn.Module, owned: Owned) -> bool:
    """Return whether a buffer is one that rotary positions of changing length rewrite in a forward pass."""
    if not owned.leaf.endswith("inv_freq") or owned.leaf.startswith("original"):
        return False
    kinds = getattr(model.get_submodule(owned.key.rpartition(".")[0]), "rope_type", "")
    return any(
        "dynamic" in kind or kind == "longrope" for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
    )


def check_whole(model: nn.Module) -> None:
    """Refuse, on all processes together, a model of which one has only a piece, or nothing, of a weight.

    Raises:
        UserError: naming the parameter, and what makes engines load a model whole; or what no GPU had memory for.
    """
    if reason := next(filter(None, all_gather(_what_is_missing(model))), None):
        raise UserError(reason)


def _what_is_missing(model: nn.Module) -> str | None:
    """Return what this process lacks of a model, and how it gets it; None where the model is whole."""
    name = next((name for name, p in model.named_parameters() if is_sharded(p) or p.is_meta), None)
    if name is None:
        return None
    if ".lora_" in name and model.get_parameter(name).is_meta:
        return f"initialization: {name} has no numbers; make the adapter without low_cpu_mem_usage=True"
    places = getattr(base_model_of(model), "hf_device_map", None) or {}
    left = next((part for part, place in places.items() if part and str(place) in ("cpu", "disk")), None)
    if left is not None:
        return (
            f"model: device_map left {left} on the CPU or disk, the GPU has too little memory; load it in bfloat16 "
            "(model_init_kwargs={'dtype': 'bfloat16'}), quantized, or on the CPU (use_cpu=True)"
        )
    return (
        f"initialization: {name} is not whole on every process; initialize before the model is sharded, and load "
        "it whole (FSDP: fsdp_cpu_ram_efficient_loading: false; ZeRO-3: load it before the training arguments are made)"
    )


def initialization_key(
    model: str,
    layers: Mapping[str, nn.Module],
    adapter_name: str,
    batches: Iterable[Mapping[str, Any]],
    **settings: Any,
) -> str:
    """Return a hash of all that decides an initialization: base, batches, ranks, scalings, settings.

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
        for key in sorted(key for key in batch if key not in (*INPUTS, "labels") and torch.is_tensor(batch[key])):
            value = batch[key].detach().to("cpu").contiguous()  # such as the pixels of an image
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def hook_in(model: nn.Module) -> str | None:
    """Return the first forward hook of somebody's own on any process, and where: what it does has no fingerprint."""
    inner = base_model_of(model)
    found = (f"{code} at {plain_name(name)}" for name, x in inner.named_modules() if (code := own_code_at(x)))
    return next(filter(None, all_gather(next(found, None))), None)


def code_of(method: type, model: nn.Module) -> str:
    """Return a hash of the class of every module, and of the files that decide a start and may be edited.

    These are of a method or a model of one's own, with what it imports, and of functions that were put into classes of libraries. Of a function
    that was made without a module (torch.fx) its code counts.

    Args:
        method: the class whose code computes the start.
        model: the base, or a PEFT model around it.
    """
    fresh = broadcast(uuid.uuid4().bytes)  # for what has no file: in a notebook it is new each time
    return together(lambda: _digest_of(method, model, fresh))


def _digest_of(method: type, model: nn.Module, fresh: bytes) -> str:
    of_modules = dict(_kinds(base_model_of(model)))
    functions = [function for kind in {*of_modules.values()} for function in foreign_code_in(kind)]
    functions += [f for name in _attentions(model) for f in foreign_functions(AttentionInterface().get(name))]
    kinds = {base for kind in (*of_modules.values(), method) for base in kind.__mro__}
    names = {kind.__module__ for kind in kinds} | {home_of(function) for function in functions}
    own = {name for name in names if name and not is_of_library(name)}
    called = sorted(f"{home_of(f)}.{f.__qualname__}{'' if home_of(f) else _code_text(f.__code__)}" for f in functions)
    digest = hashlib.sha256(repr([sorted((name, str(kind)) for name, kind in of_modules.items()), called]).encode())
    paths = {Path(getattr(sys.modules.get(name), "__file__", None) or "") for name in own}
    if not all(map(Path.is_file, paths)):
        digest.update(fresh)
    for content in sorted(path.read_bytes() for path in own_files(paths)):
        digest.update(content)
    return digest.hexdigest()[:16]


def _code_text(code: CodeType) -> str:
    """Return what a function does as text, without where it was written."""
    constants = (sorted(map(repr, x)) if isinstance(x, frozenset) else x for x in code.co_consts)
    return repr([code.co_code, code.co_names, *(_code_text(x) if isinstance(x, CodeType) else x for x in constants)])


def _kinds(module: nn.Module, name: str = "") -> Iterator[tuple[str, type[nn.Module]]]:
    """Yield the name and the class of every module of a base, without what PEFT has put beside them."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield name, type(module)
    for child, inner in module.named_children():
        yield from _kinds(inner, f"{name}.{child}")


def _attentions(model: nn.Module) -> set[str]:
    """Return the names of the kinds of attention that a model computes."""
    configs = (getattr(module, "config", None) for module in base_model_of(model).modules())
    return {str(getattr(config, "_attn_implementation", None)) for config in configs}


def computation(config: Any, numbers: Mapping[str, int | float] = MappingProxyType({})) -> str:
    """Return, as JSON, the settings that decide what layers compute: rotary positions, norms, activations, windows.

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
