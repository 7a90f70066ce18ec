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
    model = given.get("model")
    trained = active_adapter(model) if isinstance(model, PeftModel) else "default"
    if trained != "default" and given.get("ref_model") is None:
        raise UserError(
            f"model: TRL takes the adapter 'default' for the reference, and {trained!r} trains; load it under the name 'default'"
        )
    if isinstance(model, PeftModel) and "ref" in model.peft_config and given.get("ref_model") is None:
        raise UserError(
            "model: holds the reference of an earlier trainer; after model.delete_adapter('ref') it is compared with what it is now"
        )
    config = active_config(model) or given.get("peft_config")
    start = None if config is None or given.get("ref_model") is not None else start_that_rewrites(config)
    if start is not None:
        raise UserError(
            f"init_lora_weights: {start!r} takes its factors out of the base, which would be the reference without them; "
            "give ref_model=, or a method of ours, such as make_method('pissa'), whose reference is the original model"
        )
    without_reference = given.get("peft_config") is None and given.get("ref_model") is None
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    bare = isinstance(model, PreTrainedModel)
    if bare and without_reference and not ahead and not model.config.name_or_path:
        raise UserError(
            f"{'ref_model' if takes_it else 'model'}: every weight trains, and the model was loaded from no path that would give "
            "the reference; "
            + (
                "give ref_model=copy.deepcopy(model), or precompute_ref_log_probs=True"
                if takes_it
                else "save it, and load it with from_pretrained"
            )
        )


def check_reference_stays(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise a UserError where the reference, the model without its adapter, would train too."""
    ahead = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if given.get("ref_model") is None and not ahead and trains_biases(model):
        raise UserError(
            "bias: biases of the base would train, and with them the reference, which is the model without its adapter; "
            "set it to 'none', or give precompute_ref_log_probs=True"
        )
