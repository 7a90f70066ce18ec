"""An adapter as llama.cpp loads it: a GGUF file of type "adapter", with the names and row order of its models."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_null.factors import Pair
from lora_null.utils.errors import UserError
from lora_null.utils.files import replacing

# transformers' model class → gguf's architecture. Only models whose linears llama.cpp takes as they are, but for the row
# order of q and k in Llama's: a class that is not here may need a change of its weights that nobody has checked.
ARCHITECTURES = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Phi3ForCausalLM": "PHI3",
}
OUTPUT = "output.weight"


def load_gguf() -> Any:
    """Return the `gguf` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError("--form gguf: needs the package gguf; pip install gguf") from None


def gguf_architecture(config: Any) -> str:
    """Return gguf's name of a model's architecture.

    Raises:
        UserError: none that is known here.
    """
    name = (config.architectures or [type(config).__name__])[0]
    if name not in ARCHITECTURES:
        raise UserError(f"--form gguf: does not know {name}, only {', '.join(ARCHITECTURES)}; use --form merged")
    return ARCHITECTURES[name]


def names_of(config: Any) -> Any:
    """Return gguf's table of tensor names for a model."""
    gguf = load_gguf()
    architecture = getattr(gguf.MODEL_ARCH, gguf_architecture(config))
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def write_gguf(path: Path, pairs: Mapping[str, Pair], scaling: float, config: Any, *, base_name: str = "") -> None:
    """Write the adapter, float32 as it was trained.

    Args:
        path: of the file.
        pairs: module name → A (r, d_in) and B (d_out, r), one rank for all.
        scaling: s; llama.cpp computes alpha / r.
        config: the base's configuration.
        base_name: the base's name, for the file's metadata.

    Raises:
        UserError: gguf is not installed, or does not know the architecture or a module.
    """
    gguf, names = load_gguf(), gguf_names(pairs, config)
    architecture = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, gguf_architecture(config))]
    rank = len(next(iter(pairs.values()))[0])
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaling * rank)
        if base_name:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_name)
        for module, (A, B) in pairs.items():
            name = names[module]
            B = to_gguf_rows(B, heads_of(module, config))
            writer.add_tensor(f"{name}.lora_a", A.float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", B.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_names(modules: Iterable[str], config: Any) -> dict[str, str]:
    """Return gguf's name of each module, without its ending.

    Raises:
        UserError: for a module that llama.cpp has no tensor for, as an output layer that is the input embedding.
    """
    names, found = names_of(config), {}
    for module in modules:
        found[module] = name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None or (name == OUTPUT and config.get_text_config().tie_word_embeddings):
            shared = "" if name is None else ", which is the input embedding"
            raise UserError(f"--form gguf: llama.cpp has no tensor for {module}{shared}; use --form merged")
    return found


def heads_of(module: str, config: Any) -> int | None:
    """Return the number of heads whose rows llama.cpp orders in its own way; None for a module that keeps its rows."""
    if gguf_architecture(config) != "LLAMA":
        return None
    leaf = module.rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(leaf)


def to_gguf_rows(B: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Put the rows of a head from halves (x1 … xn, y1 … yn) into rotary pairs (x1, y1, x2, y2, …).

    Args:
        B: (heads · head_dim, r).
        heads: None leaves B as it is.
    """
    return B if heads is None else B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def from_gguf_rows(B: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo `to_gguf_rows`."""
    return B if heads is None else B.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_gguf(path: Path, modules: list[str], config: Any) -> tuple[dict[str, Pair], float]:
    """Return the pairs of a GGUF adapter under the names that the model's modules have, and s.

    Args:
        path: of the file.
        modules: names of the model's linears.
        config: the model's configuration.
    """
    reader, names = load_gguf().GGUFReader(path), names_of(config)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    pairs = {}
    for module in modules:
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if f"{name}.lora_a" in tensors:
            A, B = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
            pairs[module] = (A, from_gguf_rows(B, heads_of(module, config)))
    if tensors or not pairs:
        raise RuntimeError(f"{path}: {next(iter(tensors), 'no tensor')} belongs to no module of the model")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    return pairs, alpha / len(next(iter(pairs.values()))[0])
