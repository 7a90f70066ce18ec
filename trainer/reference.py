"""The reference that DPO and its like compare with: the original model, and nothing that TRL would take in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lora_null.layer import active_adapter, active_config
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import start_that_rewrites, trains_biases


def has_reference(trainer: type, args: Any) -> bool:
    """Return whether a trainer of TRL compares with a reference, the model without its adapter or a copy of it."""
    names = {kind.__name__ for kind in trainer.__mro__}
    if names & {"GRPOTrainer", "RLOOTrainer"}:
        return bool(getattr(args, "beta", 0.0))
    return bool(names & {"DPOTrainer", "KTOTrainer"})


def check_reference(given: Mapping[str, Any], *, takes_it: bool) -> None:
    """Raise a UserError where TRL would load the reference by the name of a model that has none, or take another model for it.

    `given` holds the trainer's arguments by name; `takes_it` says whether it takes a `ref_model`.
    """
    if given.get("ref_model") is not None:
        return
    model = given.get("model")
    if (trained := active_adapter(model)) != "default":
        raise UserError(
            f"model: TRL takes the adapter 'default' for the reference, and {trained!r} trains; load it under the name 'default'"
        )
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        raise UserError(
            "model: holds the reference of an earlier trainer; after model.delete_adapter('ref') it is compared with what it is now"
        )
    config = active_config(model) or given.get("peft_config")
    if config is not None and (start := start_that_rewrites(config)) is not None:
        raise UserError(
            f"init_lora_weights: {start!r} takes its factors out of the base, which would be the reference without them; "
            "give ref_model=, or a method of ours, such as make_method('pissa'), whose reference is the original model"
        )
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if isinstance(model, PreTrainedModel) and config is None and not ahead and not model.config.name_or_path:
        where, instead = "model", "save it, and load it with from_pretrained"
        if takes_it:
            where, instead = "ref_model", "give ref_model=copy.deepcopy(model), or precompute_ref_log_probs=True"
        raise UserError(
            f"{where}: every weight trains, and the model was loaded from no path that would give the reference; {instead}"
        )


def check_reference_stays(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise a UserError where the reference, the model without its adapter, would train too."""
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if given.get("ref_model") is None and not ahead and trains_biases(model):
        raise UserError(
            "bias: biases of the base would train, and with them the reference, which is the model without its adapter; "
            "set it to 'none', or give precompute_ref_log_probs=True"
        )
