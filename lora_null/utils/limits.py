"""Limits of a model, by its configuration alone (positions, why it cannot train here), and of a device (float64)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lora_null.utils.errors import UserError

# Families without rotary positions and without a table: convolutions, states or a bias by distance carry the order, or
# the positions are computed. Their `max_position_embeddings` is what they were trained on.
NO_TABLE = {"inkling_text", "inkling2_text", "jamba", "kimi_linear", "nemotron_h", "rwkv", "whisper", "xglm", "zamba"}
# RoBERTa and its kin leave the first pad_token_id + 1 rows of their table to padding.
AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
LIMIT_KEYS = ("max_position_embeddings", "max_seq_len")  # the second is MPT's


@dataclass(frozen=True)
class PositionLimit:
    """How long a sequence may be.

    Attributes:
        tokens: positions there are, or that the model was trained on.
        key: what its configuration calls them.
        hard: whether there is no position beyond, as in a table of learned ones; with rotary ones there is.
        architecture: the model's class.
    """

    tokens: int
    key: str
    hard: bool
    architecture: str

    def __str__(self) -> str:
        verb = "takes" if self.hard else "was trained on"
        return f"{self.architecture} {verb} {self.tokens} ({self.key})"


def architecture_of(config: PreTrainedConfig) -> str:
    """Return the name of the model's class; of a model that was never saved, that of its family's language model."""
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    both = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if config.is_encoder_decoder else {}
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | both
    return named or str(kinds.get(config.model_type, config.model_type))


def position_limit(config: PreTrainedConfig) -> PositionLimit | None:
    """Return how many positions a model takes; None where nothing limits them.

    transformers gives every rotary model `rope_parameters`; of the families it knows, those that have none look positions
    up in a table. Of code that came with a model nothing is known, so its limit is taken for what it was trained on.
    """
    text = config.get_text_config(decoder=True)
    name = next((key for key in LIMIT_KEYS if isinstance(getattr(text, key, None), int)), None)
    if name is None or getattr(text, name) <= 0:
        return None
    native = type(text).__module__.startswith("transformers.")
    hard = native and not getattr(text, "rope_parameters", None) and text.model_type not in NO_TABLE
    tokens = getattr(text, name)
    if hard and text.model_type in AFTER_PADDING:
        tokens -= (text.pad_token_id or 0) + 1
    return PositionLimit(tokens, text.attribute_map.get(name, name), hard, architecture_of(config))


def is_shifted_by_padding(config: PreTrainedConfig) -> bool:
    """Return whether padding on the left changes the positions that a model sees: it counts columns and does not rotate.

    RoBERTa and its kin count the ids that are no padding themselves.
    """
    text = config.get_text_config(decoder=True)
    return not getattr(text, "rope_parameters", None) and text.model_type not in AFTER_PADDING


def why_unsupported(config: PreTrainedConfig) -> str | None:
    """Return why a model cannot learn to predict the next token here, naming its architecture; None where it can."""
    name = architecture_of(config)
    if config.is_encoder_decoder:
        return f"{name} is an encoder–decoder, whose encoder would read the answers; only decoders are trained here"
    text = config.get_text_config(decoder=True)
    causal = getattr(text, "is_decoder", getattr(text, "causal", True))
    if text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and causal is False:
        return f"{name} sees the tokens that it would learn to predict (is_decoder: false); only decoders are trained here"
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    if not {config.model_type, text.model_type} & known and not getattr(config, "auto_map", None):
        return f"{name} ({config.model_type}) is no language model that transformers knows"
    return None


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64; Apple's (mps) does not, nor do some of Intel's (xpu)."""
    if device.type == "cuda":  # asking would open a context on the first GPU
        return True
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=device).add(1).numel())
    except (TypeError, RuntimeError):
        return False


def check_float64(device: torch.device) -> None:
    """Refuse a device without float64, such as Apple's mps (UserError)."""
    if not has_float64(device):
        raise UserError(
            f"device: {device.type} has no float64, in which starts, drifts and forgetting are computed; take the CPU "
            "(use_cpu=True in the training arguments)"
        )
