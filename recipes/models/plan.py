"""What a run will cost, counted on the model's shape alone: no weights, no data."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from trl import DPOConfig, SFTConfig

from lora_null.config import starts_from_residual
from lora_null.eval_harness.lm_eval.vllm import max_lora_rank
from lora_null.recipes.config.schema import MethodSection, Recipe, parse_count
from lora_null.recipes.environment import is_under_deepspeed
from lora_null.recipes.models.bases import empty_model
from lora_null.recipes.models.quantization import check_stored
from lora_null.start import InitOptions
from lora_null.targets import add_adapter, check_not_bypassed
from lora_null.trainer.decay import check_decay_to_start, check_optimizer
from lora_null.trainer.methods import METHODS, Method, check_base, check_trainer, make_method
from lora_null.trainer.methods.base import check_rule, distinct_inputs
from lora_null.trainer.preflight import check_linears, check_targets
from lora_null.utils.errors import UserError

GIB = 1024**3


@dataclass(frozen=True)
class MethodPlan:
    """Counts of one method.

    Attributes:
        name: the method.
        rank: r; None where the method has none.
        trainable: parameters that train.
        saved: parameters of what is saved: the adapter (rank 2r where the base carries a residual), or the model.
        saves: "adapter" or "model".
        saved_rank: rank of a plain LoRA as it is saved, that of its widest layer; None for what saves none.
        gram_bytes: float64 Gram matrices held at once while calibrating, of a decoder layer; 0 where none are.
        extra_bytes: adapter or trained weights in float32, gradients, the two AdamW moments, what the method keeps besides.
        start_bytes: held besides while the start is computed.
        kept_bytes: the part of `extra_bytes` that the method keeps besides: bases, projections, predictions.
        costs: what the method computes or reads besides training, in words.
        input_widths: d_in of each input that its layers read.
    """

    name: str
    rank: int | None
    trainable: int
    saved: int
    saves: str
    saved_rank: int | None
    gram_bytes: int
    start_bytes: int
    extra_bytes: int
    kept_bytes: int
    costs: str = ""
    input_widths: tuple[int, ...] = ()

    def peak_bytes(self, weights: int, activations: int) -> int:
        """Return the most that a process takes at once, of weights and a step's activations in bytes."""
        starting = self.gram_bytes + self.start_bytes
        stepping = activations + max(self.start_bytes, self.extra_bytes)
        return weights + max(starting, stepping)

    @property
    def written_bytes(self) -> int:
        """What one run of it may write: the adapter or model, and checkpoints."""
        return 4 * self.saved + 3 * self.extra_bytes


def recipe_method(recipe: Recipe, name: str) -> Method:
    """Return a method with the options that the recipe gives it."""
    return make_method(name, recipe.method.options.get(name))


def adapter_config(section: MethodSection, method: Method, rank: int | None) -> Any:
    """Return the PEFT config of a method under the recipe's settings; None for a method without an adapter."""
    rank = rank or section.rank
    return method.config(
        r=rank,
        lora_alpha=rank if section.alpha is None else section.alpha,
        target_modules=section.target_modules,
        use_rslora=section.use_rslora,
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
        task_type="CAUSAL_LM",
    )


def check_methods(recipe: Recipe, model_config: Any) -> None:
    """Refuse what does not go together with the base as it is stored.

    Raises:
        UserError: as `check_stored`; a method that needs plain weights or learns no preferences, or an engine that would
            run other weights.
    """
    check_stored(recipe.model, model_config)
    for name in recipe.method.name:
        check_trainer(METHODS[name], pairs=recipe.trainer == "dpo")
        if recipe.eval.backend == "vllm" and not METHODS[name].saves_plain_lora:
            raise UserError(f"eval.backend: vllm runs no adapter of {name}, which is no LoRA; use hf")
    if recipe.model.quantization is None:
        return
    for name in recipe.method.name:
        check_base(METHODS[name], quantized=True)
    if recipe.eval.backend == "vllm":
        raise UserError("eval.backend: vllm does not run the quantized base that is trained on, use hf")


def plan_methods(recipe: Recipe, model_config: Any) -> list[MethodPlan]:
    """Put each method's adapter on the model without weights and count.

    Raises:
        UserError: no module matched, r too large for a layer, or a method that cannot start from this base.
    """
    check_methods(recipe, model_config)
    return [_plan_method(recipe, model_config, name) for name in recipe.method.name]


def matched_rank(recipe: Recipe, model_config: Any, name: str) -> int:
    """Return the largest rank at which the method trains no more parameters than `method.match` allows.

    What trains grows in proportion to r, so one count at r = 1 tells it.

    Raises:
        UserError: not even rank 1 fits, or ranks that differ from layer to layer.
    """
    section = recipe.method
    if section.rank_pattern:
        raise UserError("method.match: a rank_pattern sets the ranks itself, give one of the two")
    if section.match == "lora":
        budget = section.rank * _trained_at_one(recipe, model_config, "lora")
    else:
        budget = parse_count(section.match)
    method = recipe_method(recipe, name)
    if method.new_parameters and getattr(method, "rho", 1) > 1:
        raise UserError(
            f"method.match: {name} deals out the ranks by what it measures; method.options.{name}.rho=1 keeps them equal"
        )
    each = _trained_at_one(recipe, model_config, name)
    if each > budget:
        raise UserError(f"method.match: {name} trains {each:,} parameters at rank 1, more than {section.match}")
    return budget // each


def _trained_at_one(recipe: Recipe, model_config: Any, name: str) -> int:
    method = recipe_method(recipe, name)
    model = with_method(recipe, model_config, method, rank=1)
    return _count(model, method.trainable(model))


def _plan_method(recipe: Recipe, model_config: Any, name: str) -> MethodPlan:
    section = recipe.method
    method = recipe_method(recipe, name)
    rank = (matched_rank(recipe, model_config, name) if section.match else section.rank) if method.has_rank else None
    model = with_method(recipe, model_config, method, rank)
    if isinstance(model, PeftModel):
        check_linears(method, model)
        check_targets(model, recipe.preflight)
        check_not_bypassed(model.get_base_model(), method.layers(model))
        if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
            raise UserError(
                "target_modules: TRL's loss reads the weights of lm_head themselves, so that an adapter there would "
                "not train; leave it out"
            )
    elif recipe.training.get("precompute_ref_log_probs") and recipe.model.dtype != "float32":
        raise UserError(
            f"training.precompute_ref_log_probs: {name} trains in float32, and the references would be computed in "
            f"{recipe.model.dtype}; leave it out, or model.dtype=float32"
        )
    method.check(model)
    check_rule(method, method.rule_for(InitOptions()))
    layers = method.layers(model)
    trainable = _count(model, method.trainable(model))
    held = saved = trainable
    widest = None
    if method.saves == "model":
        saved = sum(p.numel() for p in empty_model(model_config, recipe.model).parameters())
    elif method.saves_plain_lora:
        held = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        widest = method.saved_rank(max(layer.r["default"] for layer in layers.values()))
        if recipe.eval.backend == "vllm":
            max_lora_rank(widest, name)
        saved = sum(widest * (layer.in_features + layer.out_features) for layer in layers.values())
        to_start = bool(recipe.training.get("weight_decay")) and section.decay_to_start is not False
        asked = recipe.model.quantization or to_start or recipe.trainer == "dpo"
        if starts_from_residual(adapter_config(section, method, rank)) and asked:
            held *= 2  # the residual: a second path there, where decay goes to, and what DPO's reference adds
    kept = method.held_bytes(model)
    return MethodPlan(
        name=name,
        rank=rank,
        trainable=trainable,
        saved=saved,
        saves=method.saves,
        saved_rank=widest,
        gram_bytes=method.grams * _gram_bytes(layers) if method.needs_gram else 0,
        start_bytes=method.start_bytes(model),
        extra_bytes=4 * held + (12 + method.state_bytes) * trainable + kept,
        kept_bytes=kept,
        costs=method.costs(),
        input_widths=tuple(int(layer.in_features) for layer in distinct_inputs(layers).values()),
    )


def with_method(recipe: Recipe, model_config: Any, method: Method, rank: int | None) -> PreTrainedModel | PeftModel:
    """Return the model without weights with the method on it."""
    model = empty_model(model_config, recipe.model)
    config = adapter_config(recipe.method, method, rank)
    method.check_bare(model)
    decay = float(recipe.training.get("weight_decay") or 0)
    try:
        residual = starts_from_residual(config)
        check_decay_to_start(recipe.method.decay_to_start, config, decay, residual=residual)
        if decay and recipe.method.decay_to_start is not False and residual:
            check_optimizer(str(recipe.training.get("optim") or "adamw"), deepspeed=is_under_deepspeed(recipe))
    except UserError as mistake:
        raise UserError(f"method.{mistake} ({method.name})") from None
    if config is not None:
        model = _wrap(model, config)
    method.prepare(model)
    return model


def _count(model: PreTrainedModel, names: set[str]) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)


def _wrap(empty: PreTrainedModel, config: Any) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match")  # add_adapter says it
            return add_adapter(empty, config, low_cpu_mem_usage=True)
    except UserError as mistake:
        raise UserError(f"method.{mistake}") from None


def _gram_bytes(layers: dict[str, LoraLayer]) -> int:
    """Return the bytes of one float64 Gram per distinct input of the largest decoder layer."""
    held: dict[str, int] = {}
    for name, layer in distinct_inputs(layers).items():
        block = re.match(r".*?\.\d+\.|", name)[0]
        held[block] = held.get(block, 0) + 8 * int(layer.in_features) ** 2
    return max(held.values(), default=0)


ACTIVATION_FACTOR = {"cpu": 2, "gpu": 1}
LOGIT_BYTES = {"cpu": 24, "gpu": 16}  # bytes per token and word; measured on SmolLM2 (8 × 380 tokens) and on an H200


def activation_bytes(model_config: Any, training: SFTConfig | DPOConfig) -> int:
    """Estimate the activations and logits of one training step in one process, in bytes.

    With checkpointing every block keeps its input and one block is recomputed; about 34 hidden-widths per token inside a
    block (the usual count for a Llama block with a fused attention, in 16 bits; in 32 on a CPU). Without it every block
    keeps them all. The loss keeps logits in several copies (`LOGIT_BYTES`).
    """
    tokens = training.per_device_train_batch_size * (training.max_length or 1024)
    tokens *= 2 if isinstance(training, DPOConfig) else 1  # chosen and rejected
    text = model_config.get_text_config()
    inside, between = 34 * text.hidden_size * tokens, 2 * text.hidden_size * tokens
    blocks, on = text.num_hidden_layers, "cpu" if training.use_cpu else "gpu"
    kept = blocks * between + inside if training.gradient_checkpointing else blocks * inside
    return ACTIVATION_FACTOR[on] * kept + LOGIT_BYTES[on] * text.vocab_size * tokens
