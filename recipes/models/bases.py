"""Load the base model a recipe names, or only its shape."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState, init_empty_weights
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from lora_null.adapters.merge import add_to_weights
from lora_null.adapters.saved import read_adapter
from lora_null.checkpoint_reader import WeightFiles, open_in_files, open_to_shard
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.hub import watch_hub
from lora_null.recipes.models import smollm2
from lora_null.recipes.models.quantization import loading_options, weight_bytes
from lora_null.recipes.private_names import complete_at_load
from lora_null.targets import check_unadapted
from lora_null.utils.distributed import all_gather, processes_here, together
from lora_null.utils.errors import UserError, first_line, hub_error, nearest
from lora_null.utils.limits import architecture_of, why_unsupported
from lora_null.utils.quantized import keep_layout, weight_of
from lora_null.utils.sharding import is_launched_with_fsdp2, shard_layers

TOKENIZER = ["tokeniz*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "*.jinja"]
PROCESSOR = "*processor*.json"
TOKENIZER += ["chat_template*", PROCESSOR]
BASE_FILES = ["*.safetensors", "*.json", *TOKENIZER]
SHAPES = Path(__file__).parent / "shapes.json"


def resolve_name(model: ModelSection) -> str:
    """Return the whole path of the folder, or the hub id, to load; the quick start's model is fetched here, once per machine.

    Every command names its model before it asks the hub for anything: from here on the hub is watched.

    Raises:
        UserError: a local folder that holds no model, or weights that cannot be fetched.
    """
    watch_hub()
    if model.name_or_path == smollm2.NAME:
        with PartialState().local_main_process_first():  # which has to be left in good order, or the others hang
            try:
                return smollm2.smollm2()
            except UserError as error:
                mistake = error
        raise mistake
    path = Path(model.name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model.name_or_path: {path} holds no model (config.json is missing)")
    if not path.exists() and (model.name_or_path.startswith((".", "/", "~")) or model.name_or_path.count("/") > 1):
        raise UserError(f"model.name_or_path: no folder {model.name_or_path}")
    return str(path.absolute()) if path.is_dir() else model.name_or_path  # which adapters are saved with


def known_shape(name: str) -> Any | None:
    """Return the configuration of one of the paper's models from the package's own table; None for any other."""
    shapes = json.loads(SHAPES.read_text())
    return AutoConfig.for_model(**shapes[name]) if name in shapes else None


@dataclass
class Base:
    """A base model by its name: nothing is read before it is asked for, and nothing twice.

    Attributes:
        section: its name, and how it is loaded.
        named_in: where the name was found, for messages; empty where the user gave it.
    """

    section: ModelSection
    named_in: str = ""

    @cached_property
    def name(self) -> str:
        """Folder or hub id, see `resolve_name`; all processes ask for it together the first time."""
        try:
            return resolve_name(self.section)
        except UserError as error:
            if not self.named_in:
                raise
            reason = str(error).removeprefix("model.name_or_path: ")
            raise UserError(f"the base that {self.named_in} names: {reason}; --base names the right one") from None

    @cached_property
    def config(self) -> Any:
        """Its configuration, from its folder or the hub.

        Raises:
            UserError: the hub does not give it: gated, unknown or unreachable.
        """
        options = {"revision": self.section.revision or "main", "trust_remote_code": self.section.trust_remote_code}
        try:
            return AutoConfig.from_pretrained(self.name, **options)
        except Exception as error:
            raise _unreachable(self.name, error) from None

    @cached_property
    def folder(self) -> Path:
        """The folder of its files, downloaded where the hub has them."""
        if Path(self.name).is_dir():
            return Path(self.name)
        try:
            return Path(snapshot_download(self.name, revision=self.section.revision, allow_patterns=BASE_FILES))
        except Exception as error:
            reason = first_line(error)
            raise UserError(f"--base: cannot fetch {self.name!r} ({reason}); --base also takes a folder") from None

    @cached_property
    def empty(self) -> Any:
        """The model without weights."""
        return empty_model(self.config, self.section)

    def load(self, dtype: str | None = None) -> Any:
        """Return a fresh model with its weights on the device, in another dtype than the section's where one is given."""
        changes = {"name_or_path": self.name, "dtype": dtype}
        base = self if dtype is None else Base(self.section.model_copy(update=changes))
        return load_base(base).to(PartialState().device)

    def at(self, folder: Path, **changes: Any) -> Base:
        """Return a model of its shape that lies in a folder, with other changes of the section."""
        return Base(self.section.model_copy(update={"name_or_path": str(folder), "revision": None, **changes}))


def hub_commit(base: Base) -> str | None:
    """Return the hub's commit that a model's configuration was read from; None for a local folder."""
    if Path(base.name).exists():
        return None
    path = try_to_load_from_cache(base.name, "config.json", revision=base.section.revision)
    return Path(path).parent.name if isinstance(path, str) else None


def model_identity(base: Base) -> list[Any]:
    """Return what tells a model's files from all others: their sizes and times, or the hub's commit; and whose code reads them."""
    path, code = Path(base.name), ["own code"] if base.section.trust_remote_code else []
    if not path.is_dir():
        return [base.name, base.section.revision, hub_commit(base), *code]
    files = sorted(file for file in path.iterdir() if file.is_file())
    return [str(path.resolve()), *code, *[[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def _unreachable(name: str, error: Exception) -> UserError:
    text = str(error)
    if "trust_remote_code" in text:
        reason = "it brings code of its own; once you have read that, model.trust_remote_code=true runs it"
    elif Path(name).exists():
        reason = first_line(error)
    elif re.search("gated repo|40[13] Client Error", text.replace(name, "")):
        reason = "gated: ask for access on its hub page, then `hf auth login`"
    else:
        reason = "not a local folder, and the hub does not give it"
    line = f"model.name_or_path: cannot load {name!r} ({reason}); model.name_or_path also takes a local folder"
    return UserError(line) if Path(name).exists() else hub_error(line, error)


def empty_model(config: Any, model: ModelSection) -> PreTrainedModel:
    """Return the model without weights (meta device), to count and to check by."""
    kind = _class_of(config)
    own = kind.__name__ in (getattr(config, "auto_map", None) or {}) and model.revision
    options = {"code_revision": model.revision} if own else {}
    with complete_at_load(), init_empty_weights(), no_init_weights():
        empty = kind.from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code, **options
        )
    empty.tie_weights()
    return empty


def _class_of(config: Any) -> Any:
    """Return the class that loads a language model, also one that reads images as well."""
    for kind, known in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ):
        if type(config) in known or kind.__name__ in (getattr(config, "auto_map", None) or {}):
            return kind
    raise UserError(
        f"model.name_or_path: {why_unsupported(config) or architecture_of(config) + ' is no language model'}"
    )


def attention(model: ModelSection, config: Any = None) -> str:
    """Return the attention implementation: "auto" takes flash-attn where it is installed and supported, else sdpa.

    With the model's configuration it asks its class too: some have no flash-attn, and some nothing but eager.
    """
    if model.attn_implementation != "auto":
        return model.attn_implementation
    known = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    kind = next((mapping[type(config)] for mapping in known if type(config) in mapping), None)
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and model.dtype != "float32"
    if fits and importlib.util.find_spec("flash_attn") and getattr(kind, "_supports_flash_attn", True):
        return "flash_attention_2"
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the recipe's padding and end token; without one to pad with its end token pads, as in TRL.

    Raises:
        UserError: it cannot be loaded, has no such token, or none to pad with.
    """
    model, name = base.section, base.name
    try:
        options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise _unreachable(name, error) from None
    vocabulary = tokenizer.get_vocab()
    for key in ("eos_token", "pad_token"):
        token = getattr(model, key)
        if token is not None and token not in vocabulary:
            close = nearest(
                token, tokenizer.all_special_tokens + list(difflib.get_close_matches(token, vocabulary, 1))
            )
            raise UserError(f"model.{key}: the tokenizer of {name} has no token {token!r}{close}")
        setattr(tokenizer, key, token or getattr(tokenizer, key))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model.pad_token: the tokenizer of {name} has no token to pad with, and none that ends an answer"
        )
    return tokenizer


def open_base(base: Base) -> tuple[PreTrainedModel, WeightFiles]:
    """Return a fresh base model whose weights stay in their files, and the files; see `open_in_files`."""
    return open_in_files(lambda _, **how: load_base(base, **how), base.name, base.section.revision)


def base_to_shard(base: Base) -> tuple[PreTrainedModel, WeightFiles | None]:
    """Return a fresh base model for FSDP2 to shard: with its weights in their files where that can be, or else whole."""
    found = open_to_shard(lambda _, **how: load_base(base, **how), base.name, base.section.revision)
    return found or (load_base(base), None)


def base_to_run(base: Base) -> PreTrainedModel:
    """Return a fresh base model on the device, whole on every process; under FSDP2 in pieces if it is too large for that."""
    device = PartialState().device
    if not is_launched_with_fsdp2() or base.section.quantization or all(all_gather(fits(base))):
        return load_base(base).to(device)
    model, files = base_to_shard(base)
    shard_layers(model, device)
    if files is not None:
        together(lambda: files.fill(model, device))
    register_fsdp_forward_method(model, "generate")
    return model


def fits(base: Base) -> bool:
    """Return whether a copy of the model on every process takes no more than half of the memory that is free there.

    That is the CPU's, where each is loaded, and the GPU's.
    """
    size = weight_bytes(base.empty, base.section)
    if 2 * size * processes_here() >= psutil.virtual_memory().available:
        return False
    return PartialState().device.type != "cuda" or 2 * size < torch.cuda.mem_get_info()[0]


def load_base(base: Base, **placement: Any) -> PreTrainedModel:
    """Return a fresh base model with its weights, complete and on the CPU; the trainer moves it, or shards it.

    A quantized one is on the device. `placement` goes to transformers.

    Raises:
        UserError: the weights cannot be loaded.
    """
    model, name, config = base.section, base.name, base.config
    quantized, kind, how = loading_options(model, PartialState().device), _class_of(config), attention(model, config)
    if model.attn_implementation == "auto" and how != "flash_attention_2":
        how = None  # transformers takes sdpa, or eager where the model has no other, own code included
    transformers_logging.disable_progress_bar()
    try:
        with complete_at_load():
            loaded, found = kind.from_pretrained(
                name,
                revision=model.revision or "main",
                dtype=getattr(torch, model.dtype),
                attn_implementation=how,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **quantized,
                **placement,
            )
    except SafetensorError as error:
        raise UserError(f"model.name_or_path: the weights of {name} are damaged ({error})") from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _unreachable(name, error) from None
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"model.name_or_path: the weights of {name} are not this model's ({missing[0]} is missing)")
    check_unadapted(loaded)
    keep_layout(loaded)
    if model.eos_token is not None:  # as TRL's `eos_token` does
        end = load_tokenizer(base).eos_token_id
        loaded.generation_config.eos_token_id = add_eos_id(end, loaded.generation_config.eos_token_id)
        loaded.config.get_text_config(decoder=True).eos_token_id = end
    return loaded


def load_base_after(base: Base, before: Path | None) -> Any:
    """Return the base with what the tasks before have changed in its weights; its files stay as they are.

    Args:
        base: of the run.
        before: METHOD of the task before; None for the first task.
    """
    if before is not None and (before / "model").is_dir():
        return load_base(base.at(before / "model"))
    model = load_base(base)
    if before is not None:
        add_to_weights(model, read_adapter(before / "adapter"))
    return model


def weight_reader(base: Base) -> Callable[[str], torch.Tensor]:
    """Return what reads W0 (d_out, d_in) of a base's linear by its name, one weight at a time where its files allow it."""
    opened = None
    if not base.section.quantization:  # whose W0 is made as it loads
        with contextlib.suppress(UserError), complete_at_load():
            opened = open_base(base)
    if opened is None:
        whole = load_base(base)
        return lambda linear: weight_of(whole.get_submodule(linear))
    model, files = opened

    def read(linear: str) -> torch.Tensor:
        module = model.get_submodule(linear)
        with files.loaded(module, linear):
            return weight_of(module).clone()

    return read


def add_eos_id(end: int, ends: int | list[int] | None) -> list[int]:
    """Return the ids of end tokens with `end` in front."""
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [end, *(other for other in ends if other != end)]
