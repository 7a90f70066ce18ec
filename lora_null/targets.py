"""Which modules an adapter may be put on: what is refused of a model and its targets, before any work."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lora_null.adapters.plain import CONFIG_FILE
from lora_null.batches import backbone, check_architecture
from lora_null.checkpoint_reader import base_modules, checkpoint_name
from lora_null.config import LoraNullConfig
from lora_null.layer import NO_BASIS, LoraNullLinear, active_adapter, adapted_layers, is_started, plain_name
from lora_null.residual import check_no_head, why_hooked
from lora_null.solver import directions
from lora_null.start import rule_of
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, first_line, nearest
from lora_null.utils.model_state import base_model_of
from lora_null.utils.quantized import why_unreadable
from lora_null.utils.sharding import is_sharded

logger = get_logger(__name__)


def check_unadapted(model: Any) -> None:
    """Raise a UserError for a model that holds an adapter without being a PEFT model: an earlier trainer's, or one that
    transformers has loaded, as it does for the path of one.

    PEFT would write its own over it, and what trains whole weights would be saved as the adapter alone.

    Args:
        model: the model or its name; a PEFT model around it too.
    """
    adapter = isinstance(model, str) and (Path(model) / CONFIG_FILE).is_file()
    if adapter or getattr(base_model_of(model), "_hf_peft_config_loaded", False):
        raise UserError(
            f"model: {f'{model} is an adapter' if adapter else 'transformers has loaded an adapter into it'}; load its base "
            "with AutoModelForCausalLM, then PeftModel.from_pretrained(base, ADAPTER, is_trainable=True) goes on with it, and "
            "merge_and_unload() of that gives a model to start from"
        )
    bare = isinstance(model, nn.Module) and not isinstance(model, PeftModel)
    if bare and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "model: still holds the adapter that an earlier trainer, or inject_adapter_in_model, put into it; the model that "
            "this trainer has trained goes on with it, and unload() of that gives the original back, except for "
            "modules_to_save"
        )


def check_names(base: nn.Module, config: PeftConfig | None) -> None:
    """Raise a UserError for a name or a layer's number in an adapter's config that the base has not: PEFT takes it in silence."""
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, key, None)
        # PEFT adds those of heads of classifiers, whichever the model has.
        check_named(
            base,
            [n for n in names if n not in SEQ_CLS_HEAD_NAMES] if isinstance(names, list | tuple | set) else names,
            key,
        )
    chosen, depth = getattr(config, "layers_to_transform", None), getattr(base, "config", None)
    depth = getattr(depth.get_text_config(), "num_hidden_layers", None) if hasattr(depth, "get_text_config") else None
    for number in [chosen] if isinstance(chosen, int) else chosen or ():
        if depth is not None and number >= depth:
            raise UserError(f"layers_to_transform: there is no layer {number}, the last of {depth} is {depth - 1}")


@contextlib.contextmanager
def refusing_in_one_line() -> Iterator[None]:
    """Turn PEFT's refusal of a target that is no linear, which may print a whole module, into a UserError of one line."""
    try:
        yield
    except (ValueError, TypeError) as error:  # the latter from PEFT's OFT
        if kind := re.match(r"Target module (\w+)\(", str(error)):
            raise UserError(f"target_modules: a {kind[1]} is no linear, PEFT puts no adapter on it") from None
        if str(error).startswith("Cannot convert PEFT target"):
            raise UserError(f"target_modules: {error}") from None
        raise
    except re.error as error:
        raise UserError(f"target_modules: a pattern is no regular expression ({error})") from None


@refusing_in_one_line()
def check_named(model: nn.Module, targets: Any, key: str = "target_modules") -> None:
    """Raise a UserError for an entry of a list of modules that is the name of none: PEFT asks that one matches, or none.

    A text is a pattern to PEFT, which has to match the whole name of a module. Fused experts count, of which
    `warn_about_fused_experts` tells.
    """
    modules = {checkpoint_name(name): module for name, module in base_modules(model)}
    names = [*modules, *(name for name, parameter in model.named_parameters() if parameter.ndim == 3)]
    wrapped = r"\.(original_module|modules_to_save\.[^.]+)(?=\.|$)"  # by PEFT, already
    names += [re.sub(wrapped, "", name) for name, _ in model.named_modules()]
    is_pattern = isinstance(targets, str) and targets not in ("", "all-linear") and key == "target_modules"
    if is_pattern and not any(re.fullmatch(targets, name) for name in (*names, *dict(model.named_modules()))):
        instead = f"; give [{targets!r}]" if any(name.endswith(f".{targets}") for name in names) else ""
        raise UserError(
            f"{key}: no module matches {targets!r}, a text is a pattern for the whole name of a module{instead}"
        )
    for wanted in sorted(targets) if isinstance(targets, list | tuple | set) else ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            fitting = (name for name, x in modules.items() if key == "modules_to_save" or shape_of(x))
            leaves = {name.rpartition(".")[2] for name in fitting} - {""}
            raise UserError(f"{key}: no module matches {wanted!r}{nearest(wanted, leaves)}")


def shape_of(module: Any) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a linear, however its weight is stored; None of another module."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    is_linear = hasattr(module, "out_features") and hasattr(module, "in_features")
    return (module.out_features, module.in_features) if is_linear else None


def check_patterns(config: PeftConfig, layers: Mapping[str, Any]) -> None:
    """Raise a UserError for a key of `rank_pattern` or `alpha_pattern` that matches no adapted module, by PEFT's rule."""
    for field in ("rank_pattern", "alpha_pattern") if layers else ():  # none: another kind than LoRA
        for key in getattr(config, field, None) or ():
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers):
                leaves = {name.rpartition(".")[2] for name in layers}
                raise UserError(f"{field}: no adapted module matches {key!r}{nearest(key, leaves)}")


def check_layers(peft_model: PeftModel, layers: Mapping[str, LoraLayer], adapter_name: str = "default") -> None:
    """Refuse, before any work, what LoRA-Null cannot start correctly.

    Raises:
        UserError: one line that names the module and the reason.
    """
    check_architecture(peft_model)
    check_unadapted(peft_model)
    if made := next((name for name, parameter in peft_model.named_parameters() if parameter.is_inference()), None):
        raise UserError(f"model: {made} was made under torch.inference_mode(), so nothing can train; load it outside")
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, LoraNullConfig):
        raise UserError(f"adapter {adapter_name!r} has a {type(config).__name__}, not a LoraNullConfig")
    if not layers:
        raise UserError(f"target_modules: no linear of the model matches {config.target_modules!r}")
    check_names(peft_model.get_base_model(), config)
    check_no_experts(peft_model.get_base_model(), layers)  # for which PEFT has written patterns of its own
    check_patterns(config, layers)
    check_not_bypassed(peft_model.get_base_model(), layers)
    if is_started(peft_model, adapter_name):
        raise UserError(
            f"adapter {adapter_name!r} is started already (initialized, trained or loaded), and initializing it would "
            "throw that away; train on from it, or give the original model a new adapter"
        )
    multiple = rule_of(config).multiple or 1
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
        k = directions(layer.r[adapter_name], multiple)
        if k > int(layer.in_features):
            raise UserError(
                f"null_multiple: {multiple:g} r are {k} directions, more than {name} reads (d_in = {layer.in_features})"
            )
    for name, others in modules_sharing_weight(peft_model.get_base_model(), layers).items():
        out = "leave both out" if any(other in layers for other in others) else "leave it out"
        raise UserError(
            f"target_modules: {name} shares its weight with {', '.join(others)}, which would change with it; "
            f"{out} (exclude_modules)"
        )
    if config.starts_from_residual:
        check_no_head(peft_model, layers)
    base = peft_model.get_base_model()
    if reason := why_outside(base, layers, language_model_of(base) or backbone(base)):
        raise UserError(reason)


def why_outside(base: nn.Module, layers: Mapping[str, LoraLayer], decoder: nn.Module) -> str | None:
    """Return that adapted layers lie outside the decoder, and how to name those inside; None where none does."""
    inside = {id(module) for module in decoder.modules()}
    outside = [name for name, layer in layers.items() if id(layer) not in inside]
    if not outside:
        return None
    named = layers.keys() - set(outside) or {name for name, module in decoder.named_modules() if shape_of(module)}
    leaves = "|".join(sorted({name.rpartition(".")[2] for name in named}))
    place = re.escape(next(name for name, module in base.named_modules() if module is decoder))
    lie = f"and {len(outside) - 1} more lie" if len(outside) > 1 else "lies"
    return (
        f"target_modules: {outside[0]} {lie} outside the decoder of {type(base).__name__}, which alone reads texts; "
        f"target_modules=r'{place}.*({leaves})' names those inside"
    )


def language_model_of(base: nn.Module) -> nn.Module | None:
    """Return the part that reads text in a model that reads more than text; None of a language model."""
    config = getattr(base, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config
    return None if text is config else base.get_decoder()


def check_no_experts(base: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Refuse adapters that PEFT put on parameters: fused experts, each of which reads tokens of its own, and routers.

    Raises:
        UserError: naming the first, and the targets that are linears.
    """
    wrapped = {name.replace(".base_layer", ""): x for name, x in layers.items() if isinstance(x, ParamWrapper)}
    if not wrapped:
        return
    linears = {name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}
    linears |= set() if linears else {name for name, x in base.named_modules() if isinstance(x, nn.Linear)}
    named = sorted({name.rpartition(".")[2] for name in linears - {"lm_head"}})
    fused = next((name for name, layer in wrapped.items() if layer.get_param().ndim == 3), None)
    reason = "holds fused experts, each of which reads other tokens" if fused else "is a router, no linear"
    raise UserError(
        f"target_modules: {fused or next(iter(wrapped))} {reason}, and is not adapted here; name the other "
        f"linears: target_modules={named}"
    )


def bypassed_linears(base: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the linears whose weight a fused kernel may take in training, past an adapter, as Mamba's projections."""
    found = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        code = _source(type(base.get_submodule(parent)))
        if re.search(rf"(?<!isinstance\()(?<!getattr\()\bself\.{leaf}\.weight\s*[,@]", code):
            found.append(name)
    return found


def check_not_bypassed(base: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters on what `bypassed_linears` finds.

    Raises:
        UserError: naming the first, and the ends of all names.
    """
    if found := bypassed_linears(base, names):
        leaves = sorted({name.rpartition(".")[2] for name in found})
        raise UserError(
            f"target_modules: {type(base.get_submodule(found[0].rpartition('.')[0])).__name__}'s fused kernel reads the weight of "
            f"{found[0]} directly and would bypass its adapter; leave out {', '.join(leaves)}"
        )


@functools.cache
def _source(kind: type) -> str:
    """Return the text of a class and of those that it is made of, "" where there is none."""
    try:
        return "".join(inspect.getsource(part) for part in kind.__mro__ if part not in (nn.Module, object))
    except (OSError, TypeError):
        return ""


def add_adapter(base: nn.Module, config: PeftConfig, **options: Any) -> PeftModel:
    """Return `get_peft_model(base, config, **options)`; a target that PEFT refuses, or takes and ignores, is one line.

    Raises:
        UserError: naming the target, fused experts among them, or the pattern.
    """
    check_names(base, config)
    try:
        with refusing_in_one_line():
            model = get_peft_model(base, config, **options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"target_modules: {first_line(error)}") from None
    layers = adapted_layers(model, active_adapter(model))
    check_no_experts(base_model_of(model), layers)
    check_patterns(config, layers)
    return model


def warn_about_fused_experts(base: nn.Module) -> None:
    """Say how much of a mixture of experts is no linear and gets no adapter: three-dimensional parameters."""
    own = {name: p for name, p in base.named_parameters() if "lora_" not in name}
    fused = {n: p.numel() for n, p in own.items() if p.ndim == 3 and "expert" in n and "base_layer" not in n}
    if fused:
        share = sum(fused.values()) / sum(p.numel() for p in own.values())
        logger.warning(
            f"target_modules: the experts of {type(base).__name__} are fused parameters, no linears, and stay as they "
            f"are ({next(iter(fused))} and {len(fused) - 1} more, {share:.0%} of the weights)"
        )


def modules_sharing_weight(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, list[str]]:
    """Return, by adapted layer, the other modules that hold its weight or memory of it, under whatever name.

    One parameter of two modules, one module in two places, or tensors that are views of the same memory.
    """
    own = {id(layer.get_base_layer().weight): name for name, layer in layers.items()}
    found: dict[str, list[str]] = {}
    spans: list[tuple[int, int, str, bool]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        owner = plain_name(path).removesuffix(".base_layer")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            name = own.get(id(tensor))
            if name is not None and name != owner:
                found.setdefault(name, []).append(owner)
            if not (is_sharded(tensor) or tensor.is_meta) and tensor.numel():
                last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
                start = tensor.data_ptr()
                spans.append((start, start + (last + 1) * tensor.element_size(), owner, name is not None))
    spans.sort()
    for i, (_, end, owner, adapted) in enumerate(spans):
        for _, _, other, also in itertools.takewhile(lambda span, end=end: span[0] < end, spans[i + 1 :]):
            if owner != other and (adapted or also):
                found.setdefault(owner if adapted else other, []).append(other if adapted else owner)
    return {name: sorted(set(others)) for name, others in found.items()}


def _check_layer(name: str, layer: LoraLayer, adapter_name: str) -> None:
    if name in SEQ_CLS_HEAD_NAMES:
        raise UserError(
            f"target_modules: {name} is the model's head; give task_type='SEQ_CLS', which trains and saves it whole"
        )
    base = layer.get_base_layer()
    ours = isinstance(layer, LoraNullLinear)
    others = sorted(layer.r.keys() - {adapter_name})
    first = f", made by the adapter {others[0]!r}; add the LoraNullConfig before it" if others else ""
    carried = f"carries a {type(layer).__name__} of PEFT{first}"
    if reason := (why_unreadable(base) or why_hooked(base)) if ours else carried:
        raise UserError(f"target_modules: {name} {reason}")
    scaling = layer.scaling[adapter_name]
    if not 0 < scaling < float("inf"):
        raise UserError(f"lora_alpha: {name} has a scaling of {scaling:g}, it has to be above 0")
    check_fits(name, layer, layer.r[adapter_name])
    if layer.merged or layer.residual is not None:
        raise UserError(f"{name}: its base weight already carries an adapter, start from the original model")


def check_fits(name: str, layer: LoraLayer, count: int, what: str = "r", times: int = 1) -> None:
    """Raise a UserError, naming the option `what`, where times · count exceeds min(d_in, d_out) of a layer."""
    smallest = min(layer.in_features, layer.out_features)
    if times * count > smallest:
        held = "" if times == 1 else f", and {times} times as many are needed"
        raise UserError(f"{what}: {count} is larger than {name} allows (min(d_in, d_out) = {smallest}{held})")


def check_basis(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Refuse to go on with an adapter that is to stay in a basis, and has none: it was loaded.

    Raises:
        UserError: saying how it can go on.
    """
    if getattr(peft_model.peft_config[adapter_name], "variant", None) != "nb":
        return
    layers = adapted_layers(peft_model, adapter_name).values()
    if not all(adapter_name in getattr(layer, "bases", {}) for layer in layers):
        raise UserError(NO_BASIS)
