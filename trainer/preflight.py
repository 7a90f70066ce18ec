"""What a run would lose, told before anything is spent: one look at the model and at what will train; at rows, `collated_rows`.

Every finding here is a `UserError` with `preflight="error"`, a printed line with "warn", and nothing with "off".
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lora_null.layer import active_adapter, adapted_layers
from lora_null.targets import check_no_experts, language_model_of, warn_about_fused_experts, why_outside
from lora_null.utils.distributed import get_logger
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.limits import why_unsupported
from lora_null.utils.model_state import start_that_rewrites
from lora_null.utils.own_code import is_of_library
from lora_null.utils.quantized import why_unreadable

logger = get_logger(__name__)

Mode = Literal["error", "warn", "off"]
EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")  # what every evaluation gives


def check_mode(mode: str) -> None:
    """Raise a UserError for a `preflight` that is none."""
    if mode not in get_args(Mode):
        raise UserError(f"preflight: no {mode!r}{nearest(mode, get_args(Mode))}")


def raise_or_warn(mode: Mode, finding: str) -> None:
    """Refuse, say or leave out a finding."""
    if mode == "error":
        raise UserError(f"{finding} (preflight: 'warn' goes on all the same)")
    if mode == "warn":
        logger.warning(f"preflight: {finding}")


def config_of(model: Any, args: Any) -> PreTrainedConfig | None:
    """Return the configuration of a model, or of the name of one; None where only loading it will tell."""
    if not isinstance(model, str):
        return getattr(model, "config", None)
    options = getattr(args, "model_init_kwargs", None) or {}
    trusted = bool(options.get("trust_remote_code", getattr(args, "trust_remote_code", False)))
    known = {key: value for key, value in options.items() if key in ("revision", "token")}
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trusted, **known)
    except (OSError, ValueError):
        return None  # the trainer says what is wrong with it


def check_predicts_next_token(config: PreTrainedConfig, mode: Mode, where: str = "model") -> None:
    """Check that a model predicts the next token; `where` names it in the finding."""
    reason = why_unsupported(config)
    if reason:
        raise_or_warn(mode, f"{where}: {reason}")


def check_model(model: Any, args: Any, mode: Mode) -> None:
    """Check that a model predicts the next token, and has a head to do so.

    Args:
        model: the model, or its name; then nothing is loaded.
        args: the training arguments.
        mode: what to do with a finding.
    """
    config = config_of(model, args)
    if config is not None:
        check_predicts_next_token(config, mode)
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        raise_or_warn(
            mode, f"model: {type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )


def check_linears(method: Any, model: PeftModel) -> None:
    """Raise a UserError where PEFT adapts what has no A and B that the method could start, train and save: an embedding."""
    for name, layer in method.layers(model).items():
        if isinstance(layer, LoraLayer) and active_adapter(model) not in layer.lora_A:
            raise UserError(f"target_modules: {name} is no linear, and {method.name} is for those; leave it out")


def check_targets(model: PeftModel, mode: Mode) -> None:
    """Check that texts reach what LoRA-Null adapts, and say which experts it leaves as they are.

    Raises:
        UserError: experts that are one fused parameter, to which PEFT put an adapter that LoRA-Null cannot start.
    """
    base, layers = model.get_base_model(), adapted_layers(model, active_adapter(model))
    check_no_experts(base, layers)
    warn_about_fused_experts(base)
    language_model = language_model_of(base)
    if language_model is not None and (reason := why_outside(base, layers, language_model)):
        raise_or_warn(mode, reason)


def check_best_metric(trainer: Any) -> None:
    """Raise a UserError for a `metric_for_best_model` that the first evaluation would miss, where that is known before it.

    An evaluation gives its loss and speed, of several data sets under the name of each; what `compute_metrics`, TRL's log
    lines and code of one's own add is left to it.
    """
    asked, data = trainer.args.metric_for_best_model, trainer.eval_dataset
    parts = [*type(trainer).__mro__, *map(type, trainer.callback_handler.callbacks)]
    changed = {name for kind in parts if not is_of_library(kind.__module__) for name in vars(kind)}
    changed |= vars(trainer).keys()
    if asked is None or trainer.args.eval_strategy == "no" or changed & {"evaluate", "evaluation_loop", "on_evaluate"}:
        return
    name = asked if asked.startswith("eval_") else f"eval_{asked}"
    prefixes = [f"eval_{key}" for key in data] if isinstance(data, dict) else ["eval"]
    given = [f"{prefix}_{metric}" for prefix in prefixes for metric in EVALUATED]
    of_trl = any("log" in vars(kind) and kind.__module__.startswith("trl.") for kind in parts)
    adds = of_trl or "log" in changed or trainer.compute_metrics is not None
    if name not in given and (not adds or name.removeprefix("eval_") in EVALUATED):
        raise UserError(f"metric_for_best_model: no evaluation gives {name!r}{nearest(name, given)}")


def check_trainable(model: nn.Module, expected: set[str], mode: Mode) -> None:
    """Check that nothing of the base trains that is no part of the adapter and would be lost with it.

    Args:
        model: as it will train.
        expected: names of the parameters that should; empty where nobody can tell.
        mode: what to do with a finding.

    Raises:
        UserError: nothing trains at all, whatever the mode.
    """
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, extra = sorted(expected - found), sorted(found - expected) if expected else []
    if not found:
        raise UserError(
            "model: no parameter trains; an adapter from disk trains with PeftModel.from_pretrained(…, is_trainable=True)"
        )
    if extra:
        raise_or_warn(
            mode, f"model: {extra[0]} ({len(extra)} parameters) trains and is no part of the adapter, freeze it"
        )
    elif missing:
        logger.warning(
            f"model: {missing[0]} ({len(missing)} of {len(expected)} parameters of the adapter) does not train"
        )


def why_not_measured(model: nn.Module, adapter_name: str = "default") -> str | None:
    """Return why the drift of an adapter is no ‖s·BA X‖ / ‖W0 X‖, so that it cannot be followed; None where it is."""
    config = model.peft_config[adapter_name]
    if (start := start_that_rewrites(config)) is not None:
        return f"init_lora_weights={start!r} changes the base"
    layers = adapted_layers(model, adapter_name)
    if not layers:
        return f"{type(config).__name__} has no factors A and B"
    for name, layer in layers.items():
        variant = layer.lora_variant.get(adapter_name, layer)
        if variant is not layer or not _is_linear(layer) or why_unreadable(layer.get_base_layer()):
            return f"{name} has a {type(variant).__name__} of PEFT instead of W0 x + s·BA x"
    return None


def _is_linear(layer: LoraLayer) -> bool:
    factors = layer.lora_A.values() if isinstance(layer.lora_A, nn.ModuleDict) else ()
    return any(isinstance(factor, nn.Linear) for factor in factors) and not isinstance(layer, ParamWrapper)
