"""Of a task that follows others: the model so far, and a start that leaves the earlier tasks alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_null.adapters.join import add_to_weights
from lora_null.adapters.saved import read_adapter
from lora_null.earlier import Earlier, WithEarlier
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.models.bases import load_base
from lora_null.trainer.methods import Method


def model_so_far(section: ModelSection, name: str, before: Path | None) -> Any:
    """Return the base with what the tasks before have changed in its weights; its files stay as they are.

    Args:
        section, name: of the base, as in `load_base`.
        before: METHOD of the task before; None for the first task.
    """
    if before is not None and (before / "model").is_dir():
        return load_base(section.model_copy(update={"revision": None}), str(before / "model"))
    model = load_base(section, name)
    if before is not None:
        add_to_weights(model, read_adapter(before / "adapter"))
    return model


def after_earlier(method: Method, earlier: Sequence[Earlier], knowledge: float) -> Method:
    """Let a method that starts from Gram matrices start from those of the earlier tasks too; return it."""
    if earlier:
        rule_for = method.rule_for

        def rule_after_earlier(options: Any) -> Any:
            rule = rule_for(options)
            return WithEarlier(rule, earlier, knowledge) if rule is not None and rule.needs_gram else rule

        method.rule_for = rule_after_earlier
    return method
