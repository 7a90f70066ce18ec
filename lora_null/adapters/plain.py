"""The trained adapter as a plain LoRA for the original base model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from lora_null.adapters.base_hash import base_metadata
from lora_null.factors import Pair
from lora_null.layer import adapted_layers, factors_of, residual_of
from lora_null.utils.errors import UserError
from lora_null.utils.files import replacing, write_safetensors

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def plain_factors(layer: LoraLayer, adapter_name: str = "default") -> Pair:
    """Return A and B with s·BA = W* − W0, the change of the *original* weight.

    Where the adapter counts from a residual that is the exact rank-2r form A = [A; A0], B = [B, −B0]: only copies, no
    arithmetic, so the factors lose nothing.

    Returns:
        A (r or 2r, d_in) and B (d_out, r or 2r), in the adapter's dtype.
    """
    A, B = (factor.detach() for factor in factors_of(layer, adapter_name))
    residual = residual_of(layer, adapter_name)
    return (A, B) if residual is None else residual.joined(A, B)


def plain_adapter(peft_model: PeftModel, adapter_name: str = "default") -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Return the state dict and the config of a plain LoRA that PEFT loads onto the original base.

    One rank and one scaling hold for all layers, as servers such as vLLM expect: where layers differ, smaller ranks are
    padded with zeros and differing scalings are folded into B. Where none differ the factors are exact copies.
    """
    layers = adapted_layers(peft_model, adapter_name)
    factors = {name: plain_factors(layer, adapter_name) for name, layer in layers.items()}
    scalings = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
    factors, rank, scaling = uniform(factors, scalings)
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name) | state_of(factors)
    trained = getattr(peft_model.peft_config[adapter_name], "bias", "none") != "none"
    unchanged = tuple(f"base_model.model.{name}.base_layer." for name in layers)  # of the head, which PEFT saves whole
    state = {k: x for k, x in state.items() if not k.startswith(unchanged) or (trained and k.endswith(".bias"))}
    for name in layers:
        bias = f"base_model.model.{name}.lora_B.bias"  # of `lora_bias`; PEFT scales it as it does B
        if bias in state and scalings[name] != scaling:
            state[bias] = state[bias] * (scalings[name] / scaling)
    fields = copy.deepcopy(peft_model.peft_config[adapter_name]).to_dict() | plain_fields(rank, scaling)
    fields |= dict.fromkeys(("eva_config", "lora_ga_config"))  # how it started is no part of what it is
    return state, LoraConfig(**fields)


def uniform(factors: Mapping[str, Pair], scalings: Mapping[str, float]) -> tuple[dict[str, Pair], int, float]:
    """Pad all layers to one rank and fold differing scalings into B; return (factors, rank, scaling).

    Where scalings differ, factors of 16 bits become float32: what is multiplied into B would be rounded away otherwise.
    """
    rank = max(len(A) for A, _ in factors.values())
    scaling = next((s for s in scalings.values() if s), 0.0)
    exact = len(set(scalings.values())) > 1
    made = {}
    for name, (A, B) in factors.items():
        pad = rank - len(A)
        if exact:
            A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (A, B))
        B = B if scalings[name] == scaling else B * (scalings[name] / scaling)
        made[name] = (torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad)))
    return made, rank, scaling


def state_of(factors: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """Return the state dict, under PEFT's names, of pairs by module name."""
    state = {f"base_model.model.{name}.lora_A.weight": A for name, (A, _) in factors.items()}
    return state | {f"base_model.model.{name}.lora_B.weight": B for name, (_, B) in factors.items()}


def plain_fields(rank: int, scaling: float) -> dict[str, Any]:
    """Return the fields of a config that say one rank and one scaling for all layers."""
    alpha = scaling * rank
    fields = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": False}
    return fields | {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "inference_mode": True}


def save_plain_adapter(peft_model: PeftModel, directory: Path, *, adapter_name: str = "default") -> int:
    """Write the adapter for the original base: `adapter_model.safetensors` and `adapter_config.json`.

    It loads with `peft.PeftModel.from_pretrained(base, directory)`, lora_null not needed. Of a sharded model it is called
    inside `whole_parameters`.

    Returns:
        The number of parameters written.

    Raises:
        RuntimeError: a factor is missing or not whole.
    """
    state, config = plain_adapter(peft_model, adapter_name)
    _check_whole({key: tuple(tensor.shape) for key, tensor in state.items()}, peft_model, adapter_name, "the adapter")
    write_safetensors(directory / WEIGHTS_FILE, state, base_metadata(peft_model, adapter_name))
    for key, value in vars(config).items():
        if isinstance(value, set):  # which PEFT writes in another order every time
            setattr(config, key, sorted(value))
    with replacing(directory / CONFIG_FILE) as temporary:
        scratch = temporary.with_suffix(".dir")
        config.save_pretrained(scratch)
        (scratch / CONFIG_FILE).replace(temporary)
        scratch.rmdir()
    return sum(tensor.numel() for tensor in state.values())


@torch.no_grad()
def copy_into(peft_model: PeftModel, state: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Write a saved adapter into the live one, tensor by tensor: where an engine that shards forbids `load_state_dict`.

    Args:
        peft_model: with all of its adapter whole, inside `whole_parameters(…, write=True)`.
        state: what `get_peft_model_state_dict` gave of this adapter.

    Raises:
        UserError: it holds other tensors, or counts from another residual.
    """
    # The parameters themselves, but for those that are joined.
    live = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    differing = sorted(live.keys() ^ state.keys())
    if differing:
        raise UserError(f"adapter {adapter_name!r}: {differing[0]} is on one side only, of the model and of the file")
    for name, layer in adapted_layers(peft_model, adapter_name).items():
        if (residual := residual_of(layer, adapter_name)) is None:
            continue
        keys = [f"base_model.model.{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        found = residual.split(*(state[key] for key in keys))
        if found is None:
            raise UserError(f"{name}: the factors to load do not start where adapter {adapter_name!r} does")
        live |= dict(zip(keys, factors_of(layer, adapter_name)))
        state = {**state, **dict(zip(keys, found))}
    for key, tensor in live.items():
        tensor.copy_(state[key])


def check_saved_adapter(directory: Path, peft_model: PeftModel, *, adapter_name: str = "default") -> None:
    """Check that a saved adapter holds every factor of the model's layers, whole: engines that shard have left less.

    Raises:
        RuntimeError: naming the file and the first tensor that is missing, cut short or of another shape.
    """
    path = directory / WEIGHTS_FILE
    try:
        with safe_open(path, "pt") as file:  # reads the header, and compares the file's size with it
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"{path} was not saved whole: {error}") from None
    _check_whole(shapes, peft_model, adapter_name, str(path))


def _check_whole(shapes: dict[str, tuple[int, ...]], peft_model: PeftModel, adapter_name: str, what: str) -> None:
    if getattr(peft_model.peft_config[adapter_name], "use_bdlora", None):
        return  # its factors are blocks, of other shapes
    for name, layer in adapted_layers(peft_model, adapter_name).items():
        if not isinstance(layer.lora_A, nn.ModuleDict) or adapter_name not in layer.lora_A:
            continue  # AdaLoRA and embeddings keep theirs under other names
        A, B = (shapes.get(f"base_model.model.{name}.{part}.weight", ()) for part in ("lora_A", "lora_B"))
        rank = A[0] if A else 0
        whole = (rank, layer.in_features) == A and (layer.out_features, rank) == B
        if rank < layer.r[adapter_name] or not whole:
            raise RuntimeError(
                f"{what} is not whole: {name} has A {A} and B {B}, not ({layer.r[adapter_name]} or more, "
                f"{layer.in_features}) and ({layer.out_features}, the same); a sharded model has to be gathered first"
            )
