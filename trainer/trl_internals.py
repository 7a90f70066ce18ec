"""What reaches into TRL: its constructors' arguments, its loss of labeled positions, its fused head."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import AutoProcessor, PreTrainedModel
from trl.trainer import utils as trl_utils

from lora_null.utils.errors import UserError
from lora_null.utils.model_state import base_model_of, replaced


def arguments_by_name(kind: type, mixin: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a trainer's arguments by name, those too that its constructor only hands on to its parent's.

    Args:
        kind: the trainer's class.
        mixin: the class before TRL's among its parents; the constructors behind it are read.
        args, kwargs: as they were given.
    """
    named: dict[str, Any] = {}
    after = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    for parent in (parent for parent in after if "__init__" in vars(parent)):
        parameters = inspect.signature(parent.__init__).parameters
        found = inspect.signature(parent.__init__).bind_partial(None, *args, **kwargs).arguments
        found.pop(next(iter(parameters)))  # self
        rest = {parameter.kind: name for name, parameter in parameters.items()}
        args = found.pop(rest.get(inspect.Parameter.VAR_POSITIONAL), ())
        kwargs = found.pop(rest.get(inspect.Parameter.VAR_KEYWORD), {})
        named |= found
        if not args and not kwargs:
            break
    return named


def processing_class_of(given: Mapping[str, Any]) -> Any:
    """Return the `processing_class` among a trainer's arguments, or the model's own, as TRL takes it where none is given.

    None where that cannot be loaded: TRL says why.
    """
    if given.get("processing_class") is not None:
        return given["processing_class"]
    model, args = given.get("model"), given.get("args")
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    of_name = (getattr(args, "model_init_kwargs", None) or {}) if isinstance(model, str) else {}
    options = {"revision": of_name.get("revision"), "trust_remote_code": getattr(args, "trust_remote_code", False)}
    with contextlib.suppress(Exception):
        return AutoProcessor.from_pretrained(name, **options) if name else None


def loss_of_labeled_positions() -> contextlib.AbstractContextManager[None]:
    """Make TRL's loss apply the LM head to labeled positions alone on CPU and MPS too, as it does where Triton runs.

    By default it applies it to all, since some accelerators recompile for every shape; unlabeled ones add nothing.
    """
    runs_triton = trl_utils._use_triton
    return replaced(trl_utils, "_use_triton", lambda device: device.type in ("cpu", "mps") or runs_triton(device))


def check_fused_head(model: nn.Module) -> None:
    """Raise a UserError where TRL's fused head would read weights of a head that has none: PEFT's of new tokens."""
    base = base_model_of(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if _fused_forward(base) is not None and isinstance(head, TrainableTokensWrapper):
        tied = base.config.get_text_config().tie_word_embeddings
        which = "with tied embeddings " if tied else ""
        instead = "[the embedding] and ensure_weight_tying=True" if tied else "[the embedding, the head]"
        raise UserError(
            f"trainable_token_indices: {which}TRL's loss cannot read what trains of the head; give modules_to_save="
            f"{instead} instead" + ("" if tied else ", or leave the head out")
        )


def _fused_forward(base: nn.Module) -> Any:
    """Return the function that TRL has put in a model's forward; None where it has put none."""
    fused = getattr(vars(base).get("forward"), "__func__", None)
    return fused if inspect.isfunction(fused) and "original_forward" in fused.__code__.co_freevars else None


def let_copies_compute(model: nn.Module) -> None:
    """Let a copy of a model that TRL has given its fused head compute with its own weights.

    TRL's forward keeps the one that it replaces in a closure, bound to the model, which a copy would call too.
    """
    base = base_model_of(model)
    fused = _fused_forward(base)
    if fused is None:
        return
    original = dict(zip(fused.__code__.co_freevars, fused.__closure__ or ()))["original_forward"].cell_contents
    if getattr(original, "__self__", None) is not base:  # accelerate's hooks, which a copy takes along
        return
    plain = original.__func__

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return fused(self, *args, fused_lm_head=True, **kwargs) if fused_lm_head else plain(self, *args, **kwargs)

    base.forward = MethodType(forward, base)
