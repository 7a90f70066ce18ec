"""What a method of the comparison has to say of itself; the defaults are plain LoRA's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptLearningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback

from lora_null.adapters.plain import save_plain_adapter
from lora_null.config import LoraNullConfig
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.layer import active_adapter, active_config, adapted_layers, freeze_factor
from lora_null.targets import check_fits
from lora_null.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import Trainer

    from lora_null.calibration import Calibration
    from lora_null.solver import Rule
    from lora_null.start import InitOptions

METHODS: dict[str, type[Method]] = {}
# LoRA's own arguments, which other PEFT configurations lack: every recipe gives the first two, the rest are refused if set.
RANK, RANK_ASKED = ("r", "lora_alpha"), ("use_rslora", "rank_pattern", "alpha_pattern")
OURS = __name__.rpartition(".")[0] + "."  # the modules of the methods of this package
PAIRS = (("extra_loss", "terms"), ("compute", "training_batches"))  # of which one does nothing without the other
# A run keeps each method in a folder of its name, beside its other files and folders, which have these names; what ends in
# .py is taken for a file that holds a method.
NAME = re.compile(
    r"(?i)(?!(base|cells|tasks|init|dial)$|checkpoint-|.*\.(py|md|html|png|jsonl?|ya?ml)$)[a-z0-9][a-z0-9_.+-]*"
)
# Entries of the log that are not a term's.
LOGGED = re.compile(
    r"(train_|eval|drift_|rewards?\W|reward_|log(ps|its)\W).*|loss|step|epoch|seconds|learning_rate|grad_norm|(num_)?tokens"
    r"|entropy|mean_token_accuracy"
)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}


def method(kind: type[Method]) -> type[Method]:
    """Enter a subclass of `Method` in the table, as a dataclass whose fields are the method's options.

    Raises:
        UserError: a class that defines one of `PAIRS` alone, or has no name of its own: it would take another's place. A name
            that is another thing's in a run's folder, or a term's in its log.
    """
    if not isinstance(vars(kind).get("name"), str):
        raise UserError(
            f"{kind.__name__}: has no name of its own and would replace {kind.name!r}; set name = '…' in it"
        )
    replaced = METHODS.get(kind.name, kind)
    if replaced.__module__.startswith(OURS) and not kind.__module__.startswith(OURS):
        raise UserError(f"{kind.__name__}: {kind.name!r} is the name of a method of this package; give it another")
    if not NAME.fullmatch(kind.name):
        raise UserError(
            f"{kind.__name__}: {kind.name!r} cannot name a folder of a run; take small letters, digits, '-', '_' and '.', "
            "and no name of its other files"
        )
    if isinstance(kind.terms, str):
        raise UserError(f"{kind.__name__}: terms is a text; write terms = ({kind.terms!r},)")
    if taken := next(filter(LOGGED.fullmatch, kind.terms), None):
        raise UserError(
            f"{kind.__name__}: the term {taken!r} is the name of another entry of the log; give it another"
        )
    for pair in PAIRS:
        own = [name for name in pair if getattr(kind, name) != getattr(Method, name)]
        if len(own) == 1:
            (other,) = {*pair} - {*own}
            raise UserError(f"{kind.__name__}: {own[0]} does nothing without {other}; define both, or neither")
    kind = dataclass(kind)
    METHODS[kind.name] = kind
    return kind


class Term(NamedTuple):
    """What a method adds to the loss.

    Attributes:
        value: a scalar, which is logged as it is.
        weight: what it is multiplied with in the loss.
    """

    value: torch.Tensor
    weight: float


class MicroBatch(NamedTuple):
    """Which forward and backward pass of a training it is.

    Attributes:
        step: optimizer steps that were taken before.
        index: of the passes that add up to this step, from 0.
        count: how many of them there are.
    """

    step: int
    index: int
    count: int


@dataclass
class Method:
    """One method. An instance holds the options of one run, and what its callbacks have to remember.

    The trainer calls, in this order:

        constructor:  check_bare (there is no adapter yet), check, prepare, callbacks
        train():      training_data, trainable, rule_for, training_batches, compute, apply, drift_meter
        each pass:    extra_loss

    and a recipe calls save at the end. Resuming reads factors and tensors from disk: no training_batches and no compute, but
    apply. Where there is nothing to compute, to measure or to read, apply is not called either. An adapter that is trained
    already: no check, rule_for, training_batches, compute or apply.

    Attributes:
        name: what `--method` calls it.
        saves: "adapter", a plain LoRA for the original model, or "model", a whole one.
        needs_gram: whether it starts from Gram matrices, not only sketches, of the calibration inputs.
        grams: Gram matrices of an input that it holds at once, where it needs them.
        needs_texts: whether it reads the calibration texts while it trains.
        terms: the names of what `extra_loss` returns, as they are logged.
        supports_preferences: whether it can learn from preferences (DPO).
        supports_quantized_base: whether it can start on a quantized base.
        has_rank: whether `r` says how much of it trains.
        supports_sharding: whether it can train while weights are in pieces in several processes (FSDP2, ZeRO-3).
        supports_deepspeed: whether it can train under DeepSpeed, which leaves no gradients and no optimizer state to be read;
            nor do optimizers that step inside the backward pass (layerwise ones).
        starts_in_files: whether it starts layer by layer, so that weights can stay in their files until an engine shards them.
        state_bytes: what it keeps for each trained parameter besides weight, gradient and AdamW's moments.
        saves_plain_lora: whether the adapter that it saves is a plain LoRA.
        freezes_A: whether B trains alone.
        only_freezes: whether it only freezes parameters, so that it may continue an adapter that another method trained.
        constrains_delta: whether it projects, penalizes or prunes s·BA, which must then be the whole change (no residual base).
        new_parameters: whether its start puts new parameters in the place of the adapter's, as another rank does.
    """

    name: ClassVar[str] = "lora"
    saves: ClassVar[Literal["adapter", "model"]] = "adapter"
    needs_gram: ClassVar[bool] = False
    grams: ClassVar[int] = 1
    needs_texts: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ()
    supports_preferences: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True
    has_rank: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True
    supports_deepspeed: ClassVar[bool] = True
    starts_in_files: ClassVar[bool] = False
    state_bytes: ClassVar[int] = 0
    saves_plain_lora: ClassVar[bool] = True
    freezes_A: ClassVar[bool] = False
    only_freezes: ClassVar[bool] = False
    constrains_delta: ClassVar[bool] = False
    new_parameters: ClassVar[bool] = False

    def config(self, **adapter: Any) -> PeftConfig | None:
        """Return what PEFT puts on the model, from `peft.LoraConfig`'s arguments; None for no adapter."""
        return LoraConfig(**adapter)

    def saved_rank(self, r: int) -> int:
        """Return the rank of the adapter that is saved."""
        return r

    def layers(self, model: nn.Module) -> Mapping[str, Any]:
        """Return the linears that change, by their name in the base model: where inputs and drift are measured."""
        return adapted_layers(model, active_adapter(model))

    def prepare(self, model: nn.Module) -> None:
        """Freeze what must not train. Called once, after PEFT has added the adapter; what trains is cast to float32 for every method."""
        for layer in self.layers(model).values() if self.freezes_A else ():
            freeze_factor(layer, "lora_A", active_adapter(model))

    def trainable(self, model: nn.Module) -> set[str]:
        """Return the names of exactly those parameters that train."""
        return adapter_parameters(model, active_adapter(model))

    def check_bare(self, model: nn.Module) -> None:
        """Refuse a model that PEFT cannot put the adapter on, before it is asked to (UserError)."""

    def check(self, model: nn.Module) -> None:
        """Refuse, on the model without weights, what the method cannot start from (UserError)."""

    def held_bytes(self, model: nn.Module) -> int:
        """Return the memory that it takes besides what trains, in bytes, counted on the model without weights."""
        return 0

    def start_bytes(self, model: nn.Module) -> int:
        """Return the memory that is held while its start is computed, beside Grams, counted likewise."""
        return 0

    def costs(self) -> str:
        """Return what it computes or reads besides training, for the plan of a run; empty where that is nothing."""
        return ""

    def rule_for(self, options: InitOptions) -> Rule | None:
        """Return how A0 and B0 of a layer follow from its weight and its input; None where they do not."""
        return None

    def training_batches(self, trainer: Trainer) -> list[dict[str, torch.Tensor]] | None:
        """Return the training batches that `compute` looks at; None for a method that computes nothing from them."""
        return None

    @property
    def computes_whole(self) -> bool:
        """Whether `compute` starts it, of the model as a whole."""
        return type(self).training_batches is not Method.training_batches

    @property
    def rereads_texts(self) -> bool:
        """Whether it reads the calibration's texts themselves, where Gram matrices that were kept do not serve it."""
        return self.needs_texts or (self.needs_gram and self.computes_whole)

    @property
    def can_stop_early(self) -> bool:
        """Whether training may stop at any step; False where an option, such as a sparsity, holds at its end only."""
        return True

    def compute(self, trainer: Trainer, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors that `apply` writes; they are saved, so that resuming writes the same bits.

        Random numbers are seeded before; modes, `requires_grad` and random states are put back after it.

        Args:
            trainer: the model on its device.
            batches: what `training_batches` returned.
        """
        raise NotImplementedError

    @torch.no_grad()
    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the model what it is before the first step: factors of `rule_for` are in it; write `tensors`.

        By default LAYER.lora_A and LAYER.lora_B become A and B of that layer, and other names are refused (UserError).

        Args:
            model: with its adapter.
            tensors: what `compute` returned, now or, on resuming, in an earlier process.
        """
        layers, adapter = self.layers(model), active_adapter(model)
        for name, tensor in tensors.items():
            module, _, factor = name.rpartition(".")
            if module not in layers or factor not in ("lora_A", "lora_B"):
                raise UserError(
                    f"method: compute of {self.name} returns {name!r}, which is no LAYER.lora_A or LAYER.lora_B; define "
                    "apply, which writes it"
                )
            getattr(layers[module], factor)[adapter].weight.copy_(tensor)

    def rows_trained_on(self, rows: int) -> int:
        """Return how many rows `training_data` makes of so many."""
        return rows

    def training_data(self, trainer: Trainer, windows: list[list[int]]) -> Any:
        """Return the prepared rows to train on, for a method that changes them; the trainer's own by default.

        Args:
            trainer: with its `train_dataset` tokenized.
            windows: the calibration texts, as token ids; empty without `needs_texts`.
        """
        return trainer.train_dataset

    def extra_loss(self, trainer: Trainer, model: nn.Module, micro_batch: MicroBatch) -> dict[str, Term]:
        """Return what is added to the loss of a forward pass, by the names of `terms`.

        What is returned is summed over the passes of a step and averaged over the processes, however the trainer scales
        its own loss. So a penalty on the weights is returned by the first pass of a step alone, and what depends on
        texts may share them out among passes and processes.

        Args:
            trainer: in training, under its autocast; DPO's as well as SFT's.
            model: the model as the engine has wrapped it.
            micro_batch: which pass it is, the same on all processes.
        """
        return {}

    def drift_meter(self, model: nn.Module, calibration: Calibration) -> DriftMeter | WeightDriftMeter:
        """Return the meter of `layers`' drift. Called before the first step."""
        return DriftMeter(model, calibration, adapter_name=active_adapter(model))

    def callbacks(self) -> list[TrainerCallback]:
        """Return what happens around the optimizer's steps.

        `save_state(folder)` of one keeps in checkpoints what it knows, `load_state(folder)` reads it back; `release_hooks()` gives
        back hooks when training ends, by an error or an interruption too.
        """
        return []

    def save(self, model: nn.Module, directory: Path) -> int:
        """Write what loads with `peft` or `transformers` alone; return the number of parameters written."""
        return save_plain_adapter(model, directory, adapter_name=active_adapter(model))


def can_start_in_files(config: PeftConfig | None, method: Method | None = None, args: Any = None) -> bool:
    """Return whether a model whose weights are still in their files can be given its adapter, and started, there.

    It cannot where a method, an option of PEFT's, or one of the trainer's `args` computes from all weights at once, or
    copies some.
    """
    if getattr(args, "precompute_ref_log_probs", False):  # which DPO does before the weights are shared out
        return False
    chat = getattr(args, "chat_template_path", None)  # of a tokenizer: TRL adds its tokens to the embeddings
    if chat is not None and not str(chat).endswith((".jinja", ".j2")):
        return False
    if config is None:
        return method is not None and method.starts_in_files
    if not isinstance(config, LoraConfig):
        return False
    if not (
        method.starts_in_files if method is not None else isinstance(config, LoraNullConfig) or is_plain_lora(config)
    ):
        return False
    options = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "use_dora")
    return config.bias == "none" and not any(getattr(config, option, None) for option in options)


def is_plain_lora(config: PeftConfig | None) -> bool:
    """Return whether a config is PEFT's own LoRA with its default start, on the untouched base."""
    return type(config) is LoraConfig and config.init_lora_weights is True


def check_option(holds: bool, where: str, what: str, value: Any) -> None:
    """Raise a UserError for an option of a method, `where`, that is not `what` it has to be."""
    if not holds:
        raise UserError(f"method.options.{where}: must be {what}, not {value}")


def check_types(holder: Method, given: Mapping[str, Any]) -> None:
    """Raise a UserError for an option of another type than annotated, where a recipe can write all types annotated."""
    try:
        hints = get_type_hints(type(holder)) if given else {}
    except NameError:  # an annotation that type checkers alone can read
        return
    for name, value in given.items():
        kinds = get_args(hints[name]) if get_origin(hints[name]) in (Union, UnionType) else (hints[name],)
        if {*kinds} <= KINDS.keys():
            fits = type(value) in kinds or (type(value) is int and float in kinds)
            check_option(fits, f"{holder.name}.{name}", " or ".join(KINDS[kind] for kind in kinds), value)


def check_rule(holder: Method, rule: Any) -> None:
    """Raise a UserError for what `rule_for` returned, where it is neither None nor a `lora_null.solver.Rule`."""
    lacking = [name for name in ("label", "needs_gram", "of_input") if not hasattr(rule, name)]
    if rule is not None and lacking:
        raise UserError(
            f"method: what rule_for of {holder.name} returns has no {' and no '.join(lacking)}, see lora_null.solver.Rule"
        )


def check_terms(holder: Method, found: Any) -> None:
    """Raise a UserError for what `extra_loss` returned, where it is no scalar `Term` by each of its `terms`' names."""
    wrong = next((name for name in found if name not in holder.terms), None) if isinstance(found, dict) else None
    if wrong is not None:
        raise UserError(
            f"method: extra_loss of {holder.name} returns {wrong!r}, which its terms do not name{nearest(wrong, holder.terms)}"
        )
    terms = found.values() if isinstance(found, dict) else (found,)
    if not all(isinstance(term, Term) and torch.is_tensor(term.value) and term.value.numel() == 1 for term in terms):
        raise UserError(
            f"method: extra_loss of {holder.name} has to return {{name: Term(value, weight)}} with tensors of one number"
        )


def check_no_dora(method: Method, model: nn.Module) -> None:
    """Raise a UserError for a method that keeps directions of W0, whose rows DoRA rescales."""
    if getattr(active_config(model), "use_dora", False):
        raise UserError(f"use_dora: {method.name} keeps directions of W0, and DoRA rescales its rows; leave it out")


def check_columns(method: Method, model: nn.Module, k: int) -> None:
    """Raise a UserError where a layer is smaller than the k directions that a method takes of its inputs and outputs."""
    for name, layer in method.layers(model).items():
        check_fits(name, layer, k, f"method.options.{method.name}.k")


def column_bytes(method: Method, model: nn.Module, k: int) -> int:
    """Return the bytes of two float32 matrices of k columns per layer, one for its inputs and one for its outputs."""
    return 4 * k * sum(layer.in_features + layer.out_features for layer in method.layers(model).values())


def check_count(holder: Method, *names: str) -> None:
    """Raise a UserError for an option that is no whole number of at least 1."""
    for name in names:
        value = getattr(holder, name)
        check_option(type(value) is int and value >= 1, f"{holder.name}.{name}", "a whole number of at least 1", value)


def taken_by(kind: type[PeftConfig], name: str, adapter: Mapping[str, Any], *, but: str = "") -> dict[str, Any]:
    """Return `peft.LoraConfig`'s arguments as another PEFT config takes them: without rank and scaling.

    Args:
        kind: the other config.
        name: of the method.
        adapter: the arguments; "all-linear" is adapted where they name nothing.
        but: an argument that PEFT takes and ignores.

    Raises:
        UserError: an argument that the other config does not take.
    """
    check_no_ranks(name, adapter)
    given = {"task_type": "CAUSAL_LM"} | {k: value for k, value in adapter.items() if k not in RANK + RANK_ASKED}
    known = {field.name for field in fields(kind)} - {but}
    for key in given.keys() - known:
        raise UserError(f"{key}: {name} takes no such argument{nearest(key, known)}")
    return given | {"target_modules": given.get("target_modules") or "all-linear"}


def check_no_ranks(name: str, adapter: Mapping[str, Any]) -> None:
    """Refuse, for a method without A and B, what says more of their ranks and scalings than a recipe always does (UserError)."""
    for key in (key for key in RANK_ASKED if adapter.get(key)):
        raise UserError(f"{key}: {name} has no factors A and B whose ranks and scalings it could set, leave it out")


def distinct_inputs(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return one layer per input.

    Which modules share one is only known when tokens flow; by their names q/k/v and gate/up of one block count once.
    """
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for name, layer in layers.items():
        block, _, leaf = name.rpartition(".")
        found.setdefault((block, first.get(leaf, leaf)), (name, layer))
    return dict(found.values())


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> set[str]:
    """Return the names of the parameters that PEFT trains for an adapter, of whatever kind it is.

    PEFT's own layers and wrappers say where they keep them: factors, magnitudes, gates, modules_to_save, trainable
    tokens, virtual tokens; those left out that it records as frozen. `bias` of the config adds biases of the base.
    """
    prefixes = {prefix for name, x in model.named_modules() for prefix in _parameter_prefixes(name, x, adapter_name)}
    names = {name for name, _ in model.named_parameters() if _has_prefix(name, prefixes)}
    bias = getattr(getattr(model, "peft_config", {}).get(adapter_name), "bias", "none")
    if bias == "all":
        names |= {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    elif bias != "none":  # lora_only and its like: the biases of the adapted layers
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        own = {id(layer.bias) for layer in layers if getattr(layer.get_base_layer(), "bias", None) is not None}
        names |= {name for name, parameter in model.named_parameters() if id(parameter) in own}
    return names


def _parameter_prefixes(name: str, module: nn.Module, adapter_name: str) -> list[str]:
    """Return where a module of PEFT keeps what it trains for an adapter, as parameter name prefixes."""
    if isinstance(module, PeftModel):
        return (
            [f"prompt_encoder.{adapter_name}"] if isinstance(module.active_peft_config, PromptLearningConfig) else []
        )
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return []
    frozen = getattr(module, "frozen_peft_weight_names", {}).get(adapter_name, ())
    return [f"{name}.{part}.{adapter_name}" for part in module.adapter_layer_names if part not in frozen]


def _has_prefix(name: str, prefixes: set[str]) -> bool:
    return name in prefixes or any(name[:i] in prefixes for i, letter in enumerate(name) if letter == ".")
