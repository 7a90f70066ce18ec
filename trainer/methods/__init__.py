"""The methods that can be compared, one small file each, and the table of them.

A method is added by writing one more class under `@method`, in a file of this folder or in any file of your own that
`--method ./mine.py` names; nothing else changes:

    from lora_null.trainer.methods import Method, method

    @method
    class Mine(Method):
        name = "mine"
        def config(self, **adapter): ...        # what is put on the model
        def prepare(self, model): ...           # what of it does not train
        def callbacks(self): ...                # what happens after a step
        def training_data(self, trainer, windows): ...  # the rows to train on, with calibration texts among them
        def rule_for(self, options): ...        # its initial factors, layer by layer, from weights and measured inputs
        def training_batches(self, trainer): ...  # or what `compute(trainer, batches)` looks at, the model as a whole
        def apply(self, model, tensors): ...    # the model as it is before the first step
        def extra_loss(self, trainer, model, micro_batch): ...  # what is added to the loss; `terms` names it in the log
        def save(self, model, directory): ...   # a plain adapter for the original model

They are called in this order. Each has a default, plain LoRA's. Options of a method are its dataclass fields:
`method.options.mine.alpha0=3`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import TrainingArguments

from lora_null.config import LoraNullConfig, ResidualLoraConfig
from lora_null.layer import active_adapter, active_config, is_started
from lora_null.trainer.decay import optimizer_name, steps_in_backward
from lora_null.trainer.methods.base import (
    METHODS,
    Method,
    MicroBatch,
    Term,
    adapter_parameters,
    check_types,
    is_plain_lora,
    method,
)
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.model_state import start_that_rewrites

__all__ = [
    "METHODS",
    "Method",
    "MicroBatch",
    "Term",
    "adapter_parameters",
    "adapts_plainly",
    "check_adapter",
    "check_base",
    "check_engine",
    "check_has_method",
    "check_trainer",
    "load_method_file",
    "make_method",
    "method",
    "method_of",
]

# What `Method.config` is asked for in a recipe, with any numbers; and the fields that say how an adapter starts and trains.
ANY_ADAPTER = {"r": 1, "lora_alpha": 1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ANY_ADAPTER |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
KIND = ("variant", "null_multiple", "null_energy", "start", "init_lora_weights")
# And those that an option of the method sets.
KIND += ("oft_block_size", "use_cayley_neumann", "effective_rank", "eva_config.rho")
DRAWN = (True, False, "gaussian", "orthogonal")  # PEFT's random starts, which leave the base as it is

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return the method `name` with its options set.

    Raises:
        UserError: an unknown method or option, naming the nearest, or a value that the method refuses.
    """
    if name not in METHODS:
        raise UserError(f"method: no method {name!r}{nearest(name, METHODS)}")
    kind, options = METHODS[name], dict(options or {})
    known = [field.name for field in fields(kind)]
    for key in options:
        if key not in known:
            raise UserError(f"method.options.{name}: no option {key!r}{nearest(key, known) if known else ''}")
    try:
        made = kind(**options)
    except TypeError:
        raise UserError(f"method.options.{name}: a value is of the wrong type in {options}") from None
    check_types(made, options)
    return made


def method_of(model: nn.Module) -> Method:
    """Return the method that a fresh adapter's config stands for; plain LoRA's where it stands for none."""
    config = active_config(model)
    if not isinstance(config, LoraNullConfig):
        return Method()
    if config.variant == "nb":
        return make_method("nb-lora", {key: getattr(config, key) for key in ("null_multiple", "null_energy", "start")})
    return make_method(f"lora-null-{config.variant}")


def load_method_file(path: str) -> list[str]:
    """Import a user's own file and return the names of the methods that it enters in the table.

    Raises:
        UserError: no such file, it fails to import, or it enters none.
    """
    if not Path(path).is_file():
        raise UserError(f"method: no file {path}")
    before = dict(METHODS)
    name = f"method_{hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]}_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look up what annotations mean
        spec.loader.exec_module(sys.modules[name])
    except Exception as error:
        sys.modules.pop(name, None)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"method: {path} cannot be imported ({kind}{error})") from None
    entered = [name for name, kind in METHODS.items() if before.get(name) is not kind]
    if not entered:
        raise UserError(f"method: {path} enters no method; put @method over its class")
    return entered


def check_base(method: Method | type[Method], *, quantized: bool) -> None:
    """Refuse a method on a base that it cannot start from.

    Raises:
        UserError: naming the methods that work there.
    """
    if quantized and not method.supports_quantized_base:
        able = sorted(name for name, other in METHODS.items() if other.supports_quantized_base)
        raise UserError(
            f"method: {method.name} needs plain weights, not a quantized base; those that work on one: {', '.join(able)}"
        )


def check_trainer(method: Method | type[Method], *, pairs: bool) -> None:
    """Refuse a method that cannot learn from preferences where these are the rows.

    Raises:
        UserError: naming the methods that can.
    """
    if pairs and not method.supports_preferences:
        able = sorted(name for name, other in METHODS.items() if other.supports_preferences)
        raise UserError(f"method: {method.name} learns no preferences (DPO); those that do: {', '.join(able)}")


def check_engine(
    method: Method | type[Method], *, fsdp: int | None, zero: int | None, args: TrainingArguments
) -> None:
    """Refuse an engine that cuts across the layers of an adapter, rounds it, or under which a method cannot train.

    Args:
        method: the method, or its class.
        fsdp: the version of FSDP that shards; None for none.
        zero: the stage of DeepSpeed's ZeRO; None where DeepSpeed does not train.
        args: the trainer's.

    Raises:
        UserError: naming the engine to use.
    """
    if fsdp == 1:
        raise UserError(
            "fsdp_version: 1 cuts across the layers of an adapter; set it to 2, as in the package's recipes/accelerate/fsdp2.yaml"
        )
    if (
        fsdp is not None
        and args.torch_compile
        and not parse_flag_from_env("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    ):
        raise UserError(
            "torch_compile: under FSDP2 the adapter would be saved under names that PEFT does not load; set it to False"
        )
    mixed = next((key for key in ("bf16", "fp16") if getattr(args, key)), None)
    if zero is not None and mixed:
        raise UserError(
            f"training.{mixed}: DeepSpeed turns what trains into {mixed} too, and saves that; training.{mixed}=false leaves "
            "it float32, and the base as it is"
        )
    if zero is not None and not method.supports_deepspeed:
        raise UserError(f"method: {method.name} reads gradients, and DeepSpeed leaves none; use DDP for it")
    if not method.supports_deepspeed and steps_in_backward(optim := optimizer_name(args, None, None)):
        raise UserError(f"method: {method.name} reads gradients, and {optim} leaves none; use adamw_torch for it")
    if not method.supports_sharding and (fsdp is not None or zero == 3):
        able = "DDP or ZeRO-2" if method.supports_deepspeed else "DDP"
        raise UserError(f"method: {method.name} needs whole weights while it trains; use {able} for it")


def check_has_method(model: Any, config: PeftConfig | None) -> None:
    """Refuse, where no method is given, an adapter that only a method starts: it would train as a plain LoRA.

    Args:
        model: what the trainer is given: the model or its name, or a PEFT model.
        config: of the adapter that is put on it; None for no new one.

    Raises:
        UserError: naming the method to give.
    """
    if isinstance(model, PeftModel):
        config = active_config(model)
        by_hand = getattr(config, "init_lora_weights", None) == "eva"  # PEFT's own call leaves B = 0
        if by_hand or is_started(model, active_adapter(model)):
            return
    start = getattr(config, "init_lora_weights", None)
    ours = isinstance(config, ResidualLoraConfig) and not isinstance(config, LoraNullConfig)
    if start in ("eva", "lora_ga") or ours:
        name = start.replace("_", "-") if isinstance(start, str) else "pissa"
        raise UserError(
            f"method: {type(config).__name__} of init_lora_weights={start!r} is started by a method, and none is given; "
            f"pass method= too, the one whose method.config(…) made it, such as make_method({name!r})"
        )


def check_adapter(method: Method, model: Any, config: PeftConfig | None) -> None:
    """Refuse a method on an adapter of another kind than it makes: it would train or save something else.

    A LoRA that was trained already goes on under plain LoRA's methods and those that only freeze. It does not go on under

    - a method that computes a start, unless the adapter is of that method's kind: it gets no start any more;
    - a method that shapes s·BA, where its base is residual: s·BA is not the whole change there.

    Args:
        method: the method.
        model: what it is given: the model or its name, or a PEFT model.
        config: of the adapter that is put on it; None for no new one.

    Raises:
        UserError: naming the config that goes with the method.
    """
    started = isinstance(model, PeftModel) and is_started(model, active_adapter(model))
    config = active_config(model) or config
    wanted = _expected_config(method)
    if wanted is None and config is not None:
        raise UserError(f"peft_config: {method.name} trains the model itself, without an adapter; leave it out")
    going_on = started and isinstance(config, LoraConfig)
    on_residual = method.constrains_delta and getattr(config, "carries_residual", False)
    untrue = going_on and adapts_plainly(method) and (method.computes_whole or on_residual)
    if wanted is None or (config is not None and not untrue and _is_alike(config, wanted, method)):
        return
    if (
        going_on
        and not untrue
        and (method.only_freezes or adapts_plainly(method))
        and start_that_rewrites(config) is None
    ):
        return
    start = getattr(config, "init_lora_weights", True)
    of = f" of init_lora_weights={start!r}" if isinstance(start, str) else ""
    found = "no adapter" if config is None else f"another {type(config).__name__}{of}"
    if going_on:
        raise UserError(
            f"method: {method.name} would train or save something else of {found} that was trained already; leave method "
            "out to go on with the adapter as it is"
        )
    raise UserError(f"peft_config: {method.name} cannot train {found}; give peft_config=method.config(r=…)")


def adapts_plainly(method: Method) -> bool:
    """Return whether a method's adapter is a plain LoRA on the untouched base, whatever it does with it in training."""
    return is_plain_lora(_expected_config(method))


def _expected_config(method: Method) -> PeftConfig | None:
    return copy.copy(method).config(**ANY_ADAPTER)  # a copy, as it may note what it is asked for


def _is_alike(config: PeftConfig, wanted: PeftConfig, method: Method) -> bool:
    """Return whether a config is of the wanted kind; where that is a plain LoRA's, A and B may be drawn in any way."""
    ours = all(isinstance(config, kind) == isinstance(wanted, kind) for kind in (LoraNullConfig, ResidualLoraConfig))
    told = KIND
    if adapts_plainly(method) and not method.computes_whole and getattr(config, "init_lora_weights", None) in DRAWN:
        told = ()
    same = all(_read(config, key) == _read(wanted, key) for key in told)
    return ours and same and isinstance(config, type(wanted))


def _read(config: PeftConfig, key: str) -> Any:
    """Return a field, or a field of a field; None where there is none."""
    return functools.reduce(lambda found, name: getattr(found, name, None), key.split("."), config)
