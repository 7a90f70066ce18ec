"""Is a folder a sound adapter for a base: everything that PEFT or vLLM would refuse, or accept and get wrong in silence."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_null.adapters.base_hash import DTYPE, same_base
from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE
from lora_null.adapters.saved import BASE_COPY, FACTOR, REWRITTEN, SavedAdapter
from lora_null.adapters.strength import BEYOND_FACTORS
from lora_null.checkpoint_reader import WeightFiles, base_tensors
from lora_null.layer import targeted_linears
from lora_null.utils.errors import first_line

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
VLLM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PICKLES = ("adapter_model.bin", "adapter_model.pt", "training_args.bin")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with an adapter: where it stands, and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def vllm_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank of vLLM that an adapter fits; None where it fits none."""
    return next((most for most in VLLM_RANKS if most >= rank), None)


def check_adapter(adapter: SavedAdapter, model: PreTrainedModel, base: Path | None) -> list[Finding]:
    """Return what is wrong with an adapter; nothing where it is sound.

    Args:
        adapter: as it lies on disk.
        model: its base on the meta device.
        base: folder of the base's files, to compare its hash; None where they are not at hand.
    """
    found = [*check_config(adapter), *check_files(adapter.folder), *check_keys(adapter)]
    found += [*check_modules(adapter, model), *check_ranks(adapter), *check_values(adapter)]
    if base is not None:
        found += check_copies(adapter, model, base)
    if base is not None and same_base(adapter.metadata, base) is False:
        found.append(Finding(WEIGHTS_FILE, f"trained on another base than {base}: its weights differ"))
    return found


def check_config(adapter: SavedAdapter) -> Iterator[Finding]:
    """Yield what PEFT's config must not say, or what vLLM does not serve."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        yield Finding(CONFIG_FILE, f"peft_type is {config.get('peft_type')!r}, must be 'LORA'")
        return
    try:
        loaded = PeftConfig.from_pretrained(str(adapter.folder))
        if loaded.target_modules:  # pyright: ignore[reportAttributeAccessIssue]  # as every LORA has
            check_target_module_exists(loaded, "")  # a pattern may be none
    except Exception as error:
        yield Finding(CONFIG_FILE, f"PEFT does not accept it ({first_line(error)})")
    if start := adapter.base_is_rewritten():
        yield Finding(CONFIG_FILE, f"init_lora_weights is {start!r}, {REWRITTEN}")
    if not config.get("target_modules"):
        yield Finding(CONFIG_FILE, "target_modules is missing, which vLLM asks for")
    if config.get("bias", "none") != "none":
        yield Finding(CONFIG_FILE, f"bias is {config.get('bias')!r}: vLLM serves no bias")
    for key in BEYOND_FACTORS:
        if config.get(key):
            yield Finding(CONFIG_FILE, f"{key} is set, which vLLM does not serve")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            yield Finding(CONFIG_FILE, f"{key} is set: vLLM drops it without a word and scales those layers wrongly")


def check_files(folder: Path) -> Iterator[Finding]:
    """Yield files that a loader might unpickle."""
    for name in PICKLES:
        if (folder / name).exists():
            yield Finding(name, "a pickle, which can run code when it is loaded; remove it")


def check_keys(adapter: SavedAdapter) -> Iterator[Finding]:
    """Yield tensors that are no A or B under PEFT's names, and halves of pairs."""
    for key in adapter.tensors:
        if not FACTOR.fullmatch(key) and not BASE_COPY.fullmatch(key):
            yield Finding(key, f"is not named base_model.model.MODULE.lora_A.weight or lora_B{_naming_hint(key)}")
    for module, pair in adapter.factors().items():
        for which in {"A", "B"} - pair.keys():
            yield Finding(module, f"has no lora_{which}")
    if not adapter.factors():
        yield Finding(WEIGHTS_FILE, "holds no A and no B")


def _naming_hint(key: str) -> str:
    if re.search(r"lora_[AB]\.\w+\.weight$", key):
        return "; the adapter's name does not belong in the file"
    if "lora_" in key and not key.startswith("base_model.model."):
        return "; without the prefix servers give the bare base"
    return ""


def check_copies(adapter: SavedAdapter, model: PreTrainedModel, base: Path) -> Iterator[Finding]:
    """Yield weights that PEFT saved as the base's own, beside A and B of an output layer, and that are not."""
    modules, owners = dict(model.named_modules()), [*base_tensors(model)]
    for key, copied in adapter.tensors.items():
        match = BASE_COPY.fullmatch(key)
        module = modules.get(match["module"]) if match else None
        if module is None:
            continue  # which `check_modules` reports
        files = WeightFiles(base, model)
        found = next((x.key for x in owners if x.tensor is module.weight and x.key in files.key_of), None)
        own = files.read_stored(found) if found else None
        if own is None or not torch.equal(own.to(copied.dtype), copied):
            yield Finding(key, f"is another weight than {base} has: what was changed in it is no part of A and B")


def check_modules(adapter: SavedAdapter, model: nn.Module) -> Iterator[Finding]:
    """Yield modules that the base has not or that are no linear, shapes that do not fit, and targets left out."""
    modules = dict(model.named_modules())
    for name, pair in adapter.factors().items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear | Conv1D):
            yield Finding(name, "the base has no such module" if linear is None else "is no linear layer of the base")
            continue
        d_out, d_in = linear.weight.T.shape if isinstance(linear, Conv1D) else linear.weight.shape
        for which, size, axis in (("A", d_in, 1), ("B", d_out, 0)):
            if which in pair and (pair[which].dim() != 2 or pair[which].shape[axis] != size):
                expected = f"(r, {d_in})" if which == "A" else f"({d_out}, r)"
                yield Finding(name, f"lora_{which} is {tuple(pair[which].shape)}, the base needs {expected}")
    named = targeted(adapter.config, model)
    for name in sorted(named - adapter.factors().keys()):
        yield Finding(name, "is named by target_modules, but the file has no A and B for it")
    for name in sorted(adapter.factors().keys() & modules.keys() - named) if named else ():
        yield Finding(name, "has A and B, but target_modules does not name it: PEFT leaves them out")


def targeted(config: dict[str, Any], model: nn.Module) -> set[str]:
    """Return the names of the base's linears that `target_modules` of a config names."""
    fields = {key: config.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform")}
    try:
        wanted = LoraConfig(**fields, layers_pattern=config.get("layers_pattern"))
        check_target_module_exists(wanted, "")
    except (TypeError, ValueError, re.error):  # which `check_config` reports
        return set()
    return {*targeted_linears(model, wanted)} if wanted.target_modules else set()


def check_ranks(adapter: SavedAdapter) -> Iterator[Finding]:
    """Yield ranks other than the config's, and a rank that vLLM has no room for."""
    rank = adapter.config["r"]
    for name, pair in adapter.factors().items():
        ranks = [pair[which].shape[axis] for which, axis in (("A", 0), ("B", -1)) if which in pair]
        if any(own != rank for own in ranks):
            yield Finding(name, f"has rank {' and '.join(map(str, dict.fromkeys(ranks)))}, the config says r = {rank}")
    if vllm_rank(rank) is None:
        yield Finding(CONFIG_FILE, f"r is {rank}, vLLM serves at most {VLLM_RANKS[-1]}; export with --rank")


def check_values(adapter: SavedAdapter) -> Iterator[Finding]:
    """Yield dtypes that are not served, more than one of them, numbers that are not finite, an adapter without effect."""
    dtypes = {tensor.dtype for pair in adapter.factors().values() for tensor in pair.values()}
    for dtype in dtypes - set(VLLM_DTYPES):
        yield Finding(WEIGHTS_FILE, f"holds {_dtype_name(dtype)}, not float32, bfloat16 or float16")
    if len(dtypes) > 1:
        yield Finding(WEIGHTS_FILE, f"mixes dtypes: {', '.join(sorted(map(_dtype_name, dtypes)))}")
    for key, tensor in adapter.tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            yield Finding(key, "holds NaN or infinite numbers")
    pairs = _nonzero_factors(adapter)
    if pairs and not any(A and B for A, B in pairs) and not is_untrained(adapter):
        yield Finding(WEIGHTS_FILE, "changes nothing: every A or B is zero")


def is_untrained(adapter: SavedAdapter) -> bool:
    """Say whether every B is zero and no A: the adapter is an initialization and changes nothing yet."""
    pairs = _nonzero_factors(adapter)
    return bool(pairs) and all(A and not B for A, B in pairs)


def _nonzero_factors(adapter: SavedAdapter) -> list[tuple[bool, bool]]:
    """Return of every pair whether its A, and whether its B, is other than zero."""
    pairs = [pair for pair in adapter.factors().values() if len(pair) == 2]
    return [(bool(pair["A"].any()), bool(pair["B"].any())) for pair in pairs]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(adapter: SavedAdapter) -> str:
    """Return one line that says what an adapter is."""
    tensors = [tensor for pair in adapter.factors().values() for tensor in pair.values()]
    rank = adapter.config["r"]
    scaling = adapter.config["lora_alpha"] / (rank**0.5 if adapter.config.get("use_rslora") else rank)
    return (
        f"{len(adapter.factors())} modules, rank {rank}, scaling {scaling:g}, "
        f"{', '.join(sorted({_dtype_name(tensor.dtype) for tensor in tensors}))}, "
        f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f}M parameters"
    )


def serve_command(adapter: SavedAdapter, base: str, revision: str | None = None, *, trust: bool = False) -> str:
    """Return the command with which vLLM serves the adapter on a base, at a revision of the hub where it has one.

    With `trust` it runs the base's own code.
    """
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(vllm_rank(adapter.config["r"]))]
    words += ["--revision", revision] if revision else []
    words += ["--trust-remote-code"] if trust else []
    if adapter.metadata.get(DTYPE):
        words += ["--dtype", adapter.metadata[DTYPE]]
    folder = adapter.folder.resolve()
    name = folder.name if folder.name != "adapter" else folder.parent.name
    return shlex.join([*words, "--lora-modules", f"{name}={adapter.folder}"])
