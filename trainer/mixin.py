"""What LoRA-Null adds to a TRL trainer: an initialization before the first step, and the drift in every log line."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from lora_null.batches import checked_batches, other_inputs, texts_in
from lora_null.checkpoint_reader import adapters_in_memory
from lora_null.config import LoraNullConfig
from lora_null.drift import DriftMeter, WeightDriftMeter
from lora_null.earlier_tasks import after_earlier
from lora_null.fingerprint import check_whole
from lora_null.layer import active_config, is_started
from lora_null.layerwise import NotAChain
from lora_null.start import InitOptions, LayerReport, Start, WholeModel, compute_start, load_start
from lora_null.store import REPORT_FILE, cached_folder, clear, copy_store, find_initialization, read_report
from lora_null.targets import (
    check_basis,
    check_names,
    check_not_bypassed,
    check_unadapted,
    refusing_in_one_line,
    warn_about_fused_experts,
)
from lora_null.trainer.calibration_data import CalibrationArgs, as_batches
from lora_null.trainer.checkpoints import (
    METHOD_FILE,
    SavingMixin,
    as_json,
    bare,
    check_processes,
    check_settings,
    check_whole_checkpoint,
    checkpoints_in,
    last_checkpoint,
    warn_without_optimizer,
)
from lora_null.trainer.collated_rows import (
    check_can_write,
    check_last_batches,
    check_rows,
    check_rows_given,
    check_windows,
)
from lora_null.trainer.loss_terms import LossTermsMixin
from lora_null.trainer.methods import (
    METHODS,
    Method,
    adapts_plainly,
    check_adapter,
    check_base,
    check_engine,
    check_has_method,
    check_trainer,
    method_of,
)
from lora_null.trainer.methods.base import can_start_in_files, check_rule
from lora_null.trainer.optimizers import OptimizerMixin
from lora_null.trainer.preflight import (
    Mode,
    check_best_metric,
    check_linears,
    check_mode,
    check_model,
    check_targets,
    check_trainable,
    why_not_measured,
)
from lora_null.trainer.reference import check_reference, check_reference_stays, has_reference
from lora_null.trainer.training_watch import TrainingWatch
from lora_null.trainer.trl_internals import (
    arguments_by_name,
    check_fused_head,
    let_copies_compute,
    processing_class_of,
)
from lora_null.trainer.weights_in_files import WeightsInFilesMixin, leave_in_files
from lora_null.utils.distributed import all_gather, get_logger, on_first_process, together
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_json
from lora_null.utils.limits import position_limit, why_unsupported
from lora_null.utils.model_state import base_model_of, preserve, release_freed_memory
from lora_null.utils.quantized import keep_layout, quantized_layers
from lora_null.utils.sharding import is_launched_with_fsdp2, parameters_are_sharded, shard_layers

if TYPE_CHECKING:
    from lora_null.solver import Rule

logger = get_logger(__name__)

# Of an adapter's config: what is only told, what a run may change on the way, and what names the modules.
DECIDES_NOTHING = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
DECIDES_NOTHING += ("inference_mode", "runtime_config", "lora_dropout", "module_dropout")
DECIDES_NOTHING += ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class _Begin(TrainerCallback):
    """Acts before the first step, and again where training begins anew with smaller batches: checks an optimizer that the
    trainer did not make, forgets the terms of an earlier attempt, finds the best checkpoint so far, reads the weights
    where FSDP2 has sharded the model, and checks that the terms have entered the step."""

    def __init__(self, trainer: LoraNullMixin) -> None:
        self.trainer = trainer
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.first_step = state.global_step
        self.trainer.check_stepped_by(bare(optimizer))
        self.trainer.forget_terms()
        self.trainer.find_best()
        self.trainer.read_shards()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.first_step:
            self.trainer.check_passes()


class LoraNullMixin(LossTermsMixin, OptimizerMixin, WeightsInFilesMixin, SavingMixin):
    """Put before a TRL trainer class: `class MyTrainer(LoraNullMixin, SomeTrainer): pass`.

    `train()` first initializes the adapter (`LoraNullConfig`) in all processes together, once, and writes the factors and
    the layer report to `<output_dir>/init`; resuming restores them bit for bit, from the checkpoint's own copy, and
    calibrates nothing. An adapter that was trained already (by another trainer, or loaded) goes on from where it is.
    With any other LoRA config nothing is initialized, but the same drift is measured, so that methods can be compared.

    Args:
        calibration_dataset: texts, conversations, rows with `text`, `messages` or `input_ids`, or ready batches; see `as_batches`. Needed by
            LoRA-Null and by methods that read them in training; for others optional, and then only the drift depends on it.
        calibration_args: how windows are cut from texts.
        init_options: how to initialize; by default an equal initialization is taken from the cache, or left there.
        init_folder: an initialization to start from instead, written by an earlier run or by `lora-null init`.
        method: what else is initialized, frozen, done after a step and saved; see `lora_null.trainer.methods`. It goes
            with `peft_config=method.config(…)`.
        decay_to_start: let AdamW's weight decay pull A and B to A0 and B0, the original model, instead of to zero; by
            default where the base carries a residual and there is weight decay. See `lora_null.trainer.decay`.
        reuse_init: take the initialization that lies in `init_dir`, written by a run that starts in the same way; it has
            to be finished, and the one of `init_folder` where both are given.
        preflight: what to do with a finding of `lora_null.trainer.preflight`, such as labels that are all masked:
            "error" refuses it before anything is spent, "warn" says it in a line and goes on, "off" does not look.

    Raises:
        UserError: LoRA-Null without calibration data, or a finding of the preflight: a model that does not predict the
            next token, rows from which nothing or no end of an answer would be learned, rows or windows longer than a
            position table, weights that train and would be lost.
    """

    learns_next_token = False  # whether the trainer needs a language model; told by the trainers themselves
    learns_pairs = False  # whether its rows are preferences
    nothing_learned = "every label is masked"

    def __init__(
        self,
        *args: Any,
        calibration_dataset: Iterable[Any] | None = None,
        calibration_args: CalibrationArgs | None = None,
        init_options: InitOptions | None = None,
        init_folder: str | Path | None = None,
        method: Method | None = None,
        decay_to_start: bool | None = None,
        reuse_init: bool = False,
        preflight: Mode = "error",
        **kwargs: Any,
    ) -> None:
        check_mode(preflight)
        given = arguments_by_name(type(self), LoraNullMixin, args, kwargs)
        if isinstance(given.get("model"), os.PathLike):
            given["model"] = os.fspath(given["model"])
        if self.texts_read(given):
            given["processing_class"] = processing_class_of(given)
        start = {"calibration_dataset": calibration_dataset, "calibration_args": calibration_args}
        start |= {"init_options": init_options, "init_folder": init_folder, "reuse_init": reuse_init or None}
        self._check_given(given, method, start, preflight)
        self._preflight = preflight
        self._weights, self._given_model = init_options and init_options.weights, given.get("model")
        in_files = can_start_in_files(given.get("peft_config"), method, given.get("args"))
        if self._weights is None and is_launched_with_fsdp2() and in_files:
            self._weights, self._given_model = leave_in_files(given)
        self._construct(given)
        self.add_callback(_Begin(self))
        self.something_moved = True  # whether the last training changed anything of what trains, on any process
        self._watch = TrainingWatch()
        self.add_callback(self._watch)
        self._take_method(method, given.get("optimizers"))
        to_start = self._add_step_callbacks(decay_to_start)
        self._checkpoint_settings = self._settings(to_start) if self._has_method else {}
        self._prepared, self._prepared_dataset = False, object()
        self._start: tuple[Path, str] | None = None  # the folder that it was written to, and its key
        self.layer_report: LayerReport | None = None
        self.init_seconds = 0.0
        self.drift_meter: DriftMeter | WeightDriftMeter | None = None
        self.forget_terms()
        self._calibration_dataset = calibration_dataset
        limit = position_limit(self.model.config) if self._has_method and calibration_dataset is not None else None
        asked = calibration_args or CalibrationArgs()
        self._calibration_args = (replace(asked, seed=self.args.seed) if asked.seed is None else asked).fitting(limit)
        defaults = InitOptions(cache=True, seed=self.args.seed, progress=not self.args.disable_tqdm)
        self._init_options = replace(init_options or defaults, weights=self._weights)
        self._init_folder = None if init_folder is None else find_initialization(Path(init_folder))
        self._reuse_init = reuse_init
        self._check_start()

    def _check_given(
        self, given: Mapping[str, Any], method: Method | None, start: Mapping[str, Any], preflight: Mode
    ) -> None:
        """Check what can be known before a model loads.

        Args:
            given: the parent trainer's arguments, by name.
            method: the trainer's `method`.
            start: the mixin's own arguments that decide the start, by name; None for one not given.
            preflight: the trainer's `preflight`.
        """
        if method is not None and not isinstance(method, Method):
            name = getattr(method, "name", method)
            name = name if isinstance(name, str) and name in METHODS else "pissa"
            raise UserError(
                f"method: takes what make_method gives, not {method!r}; make_method({name!r}), with "
                "peft_config=method.config(r=…)"
            )
        for name, kind in (("calibration_args", CalibrationArgs), ("init_options", InitOptions)):
            if start[name] is not None and not isinstance(start[name], kind):
                raise UserError(f"{name}: takes {kind.__name__}(…), not a {type(start[name]).__name__}")
        args = given.get("args")
        if getattr(args, "sync_ref_model", False):
            raise UserError("sync_ref_model: moves the reference, which no checkpoint holds; leave it out")
        here = os.environ.get("LOCAL_WORLD_SIZE")  # not every launcher says it
        if here and getattr(args, "save_on_each_node", False) and args.world_size > int(here):
            raise UserError(
                "save_on_each_node: what a training starts from is written once, into a folder that all nodes share; leave it out"
            )
        model, peft_config = given.get("model"), given.get("peft_config")
        if given.get("model_init") is not None and (method is not None or any(v is not None for v in start.values())):
            raise UserError(
                "model_init: makes a new model when training begins, which nothing would have prepared or measured; give model"
            )
        check_unadapted(model)
        for name in ("train_dataset", "eval_dataset"):
            check_rows_given(name, given.get(name), functools.partial(self.texts_read, given))
        if self.texts_read(given):
            check_can_write(given)
        texts = start["calibration_dataset"] is not None
        if isinstance(peft_config, LoraNullConfig) and not texts and start["init_folder"] is None:
            raise UserError(
                "calibration_dataset: LoRA-Null needs texts that carry the knowledge to keep; to resume without them, give "
                "init_folder=CHECKPOINT/init"
            )
        if self.learns_next_token and preflight != "off":
            check_model(model, args, preflight)
        if method is not None:
            check_trainer(method, pairs=self.learns_pairs)
            check_adapter(method, model, peft_config)
            if isinstance(model, nn.Module):
                method.check_bare(model)
        elif peft_config is not None or isinstance(model, PeftModel):
            check_has_method(model, peft_config)
        else:
            for name in (name for name, value in start.items() if value is not None):
                raise UserError(
                    f"{name}: would not be read, there is no adapter and every weight trains; give "
                    "peft_config=LoraNullConfig(r=…), or method=make_method('full') to follow the drift of all weights"
                )
        if start["calibration_args"] is not None and not texts:
            raise UserError("calibration_args: would not be read, there is no calibration_dataset")
        if has_reference(type(self), args):
            check_reference(given, takes_it="ref_model" in inspect.signature(super().__init__).parameters)

    def texts_read(self, given: Mapping[str, Any], columns: Collection[str] = ()) -> tuple[str, ...]:
        """Return which columns the parent trainer reads as texts; none where others prepare them, or nobody knows."""
        return ()

    def _construct(self, given: dict[str, Any]) -> None:
        """Construct the parent trainer."""
        model = given.get("model")
        exact = [(p, p.data) for p in model.parameters() if p.requires_grad] if isinstance(model, PeftModel) else []
        on_meta = contextlib.nullcontext() if self._weights is None else adapters_in_memory()
        with on_meta, refusing_in_one_line():
            if isinstance(model, PreTrainedModel):
                check_names(model, given.get("peft_config"))
            super().__init__(**given)
        check_fused_head(self.model)
        for copied in filter(None, (self.model, getattr(self, "ref_model", None))):
            let_copies_compute(copied)
        for parameter, data in exact:  # which TRL rounds to bfloat16 on a quantized base
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        check_unadapted(self.model)  # of a name on the hub it is known only now
        if has_reference(type(self), self.args):
            check_reference_stays(self.model, given)

    def _take_method(self, method: Method | None, optimizers: tuple[Any, Any] | None) -> None:
        """Find out what is initialized, trained and measured, and prepare the adapter for it."""
        self._has_method = method is not None or isinstance(self.model, PeftModel)
        self._already_trained = isinstance(self.model, PeftModel) and is_started(self.model, self.adapter_name)
        self.method = method or (Method() if self._already_trained else method_of(self.model))
        if self._has_method:
            self._keep_quantized_base()
            if isinstance(self.model, PeftModel):
                check_not_bypassed(self.model.get_base_model(), self.method.layers(self.model))
            if not self._already_trained:
                if method is not None:
                    check_linears(method, self.model)
                if self.method.needs_gram or self.method.terms:
                    check_targets(self.model, self._preflight)
                elif isinstance(self.model, PeftModel):
                    warn_about_fused_experts(self.model.get_base_model())
                self.method.check(self.model)
            before = getattr(self.model, "dtype", None)
            self.method.prepare(self.model)
            if self.method.saves == "model" and self.model.dtype != before:
                self._take_reference_along(before)
        self._check_precision()
        if self._already_trained:
            check_basis(self.model, self.adapter_name)
        self._given_optimizer, self._made_optimizer = (optimizers or (None,))[0], None
        self._made_with = {}
        if self._given_optimizer is not None:
            self._check_own_optimizer(self._given_optimizer)

    def _take_reference_along(self, before: torch.dtype) -> None:
        """Give the reference the dtype that a method has given the model, without which rewards do not start at 0."""
        if getattr(self.args, "precompute_ref_log_probs", False):
            raise UserError(
                f"precompute_ref_log_probs: {self.method.name} trains in {self.model.dtype}, and the references were computed in "
                f"{before}; give model.float(), or set it to False"
            )
        reference = getattr(self, "ref_model", None)
        if reference is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            reference.to(self.model.dtype)

    def _check_precision(self) -> None:
        """Say what PEFT trains in the base's low precision, such as `modules_to_save`; refuse what would round the model for
        good: an evaluation before or after the training casts it in place.
        """
        trained = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        low = [name for name, dtype in trained.items() if dtype in (torch.bfloat16, torch.float16)]
        in_float32 = self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.mixed_precision != "no")
        if low and isinstance(self.model, PeftModel) and not in_float32:  # as these engines step
            logger.warning(
                f"model: {low[0]} ({len(low)} of {len(trained)} parameters that train) is {trained[low[0]]}, in which small "
                "steps are lost to rounding; load the model in float32, or leave it out of what trains"
            )
        for key, dtype in (("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)):
            if getattr(self.args, key) and {*trained.values()} - {dtype}:
                raise UserError(
                    f"{key}: an evaluation would round what trains for good; leave it out, bf16 evaluates so too"
                )

    def _check_start(self) -> None:
        """Check that what decides the start is there and will be read, now that the method is known."""
        method, folder, texts = self.method, self._init_folder, self._calibration_dataset is not None
        if folder is not None and (self._already_trained or method.rule_for(self._init_options) is None):
            reason = f"{method.name} computes no initialization"
            reason = "the adapter is started already" if self._already_trained else reason
            raise UserError(f"init_folder: would not be read, {reason}")
        if texts and folder is not None and not method.needs_texts:
            logger.info(f"calibration_dataset: not read, start and drift are those of {folder}")
        both = [self.init_dir, folder] if self._reuse_init and folder else []
        if len({read_report(found)["key"] for found in both}) > 1:
            raise UserError(
                f"reuse_init: {self.init_dir} holds another initialization than {folder}; give one of the two"
            )
        starts = method.needs_gram and not self._already_trained and folder is None
        if not texts and (starts or method.needs_texts):
            raise UserError(f"calibration_dataset: {method.name} needs texts that carry the knowledge to keep")

    def _settings(self, decays_to_start: bool) -> dict[str, Any]:
        """Return what decides the start and what trains, by the names of `check_settings`, as a checkpoint keeps it."""
        name = self.method.name
        config = active_config(self.model)
        found = {"started": self._already_trained and getattr(config, "variant", None), "method": name}
        found |= {f"method.options.{name}.{x.name}": getattr(self.method, x.name) for x in fields(self.method)}
        if config is not None:
            found |= {key: value for key, value in config.to_dict().items() if key not in DECIDES_NOTHING}
        found["modules"] = sorted(self.method.layers(self.model))
        if self.method.terms or self.method.needs_texts:  # what it adds, or in which order, is drawn with the seed
            found["seed"] = self.args.seed
        if self.args.weight_decay:
            found["decay_to_start"] = decays_to_start
        return as_json(found)

    def _keep_quantized_base(self) -> None:
        """On a quantized base, leave its weights as they are stored, and the adapter in float32 as on any other.

        TRL casts it to bfloat16 there, in which a step of the usual learning rates often changes nothing.
        """
        quantized = bool(quantized_layers(self.model))
        check_base(self.method, quantized=quantized)
        keep_layout(self.model)
        for parameter in self.model.parameters() if quantized else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @property
    def init_dir(self) -> Path:
        """Where the initial factors, the layer report and the drift probes are kept."""
        return Path(self.args.output_dir) / "init"

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Initialize (or restore), check, train; the arguments and the result are the parent trainer's."""
        if any(isinstance(module, BaseTunerLayer) and module.merged for module in self.model.modules()):
            raise UserError(
                "model: its adapter is merged into the weights; model.unmerge_adapter() takes it out again"
            )
        folder = Path(self.args.output_dir)
        wanted = resume_from_checkpoint
        if wanted is True and (wanted := on_first_process(lambda: last_checkpoint(folder))) is None:
            raise UserError(
                f"resume: no whole checkpoint in {folder}; train() without resume_from_checkpoint begins there"
            )
        checkpoint = Path(wanted) if wanted else None
        fsdp, zero = (getattr(self.accelerator.state, f"{engine}_plugin", None) for engine in ("fsdp", "deepspeed"))
        check_engine(self.method, fsdp=fsdp and fsdp.fsdp_version, zero=zero and zero.zero_stage, args=self.args)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            check_whole_checkpoint(checkpoint)
            self._take_batch_size(checkpoint)
            check_settings(checkpoint, self._checkpoint_settings)
            warn_without_optimizer(checkpoint)
            check_processes(checkpoint, *self._trained_by())
        if not self._prepared:
            self._check_optimizer()
            check_best_metric(self)
            start = time.perf_counter()
            self._prepare(resuming=checkpoint)
            self._prepared = True
            self._remember_start()
            self.init_seconds = time.perf_counter() - start
        else:
            if checkpoint is None:
                self._tell_of_changed_settings()
            self._find_start()
            if self.train_dataset is not self._prepared_dataset:  # other rows than those of the training before
                self._prepare_rows(checkpoint)
        if checkpoint is not None:
            self._call_back("load_state", checkpoint)
        try:
            if checkpoint is not None and self._has_reached_its_end(checkpoint):
                self._place(in_pieces=fsdp is not None and fsdp.fsdp_version == 2)
                return self._take_trained(checkpoint)
            output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs)
        finally:
            self._call_back("release_hooks")
        self.something_moved = any(all_gather(self._watch.moved(self.model)))
        if self._preflight != "off" and not self.something_moved:
            logger.warning(
                f"training: after {self.state.global_step} steps nothing has changed, {self._watch.why_not()}"
            )
        return output

    def _place(self, *, in_pieces: bool) -> None:
        """Place or shard the model as training would: no step follows here that would make the engine do it."""
        if parameters_are_sharded(self.model):
            return
        if in_pieces:
            shard_layers(self.model, self.accelerator.device)
        elif not self.place_model_on_device and not quantized_layers(self.model):
            self._move_model_to_device(self.model, self.args.device)

    def _prepare(self, *, resuming: Path | None) -> None:
        """Check the data, and put the model at its start, before an engine cuts the weights into pieces."""
        self._prepare_rows(resuming)
        if not self._has_method:
            return
        if not self.method.new_parameters:
            self._check_trainable()
        if self._weights is None:
            check_whole(self.model)
        start = self._load_or_compute(resuming)
        if start is not None:
            self._begin_with(start)
        del start
        if self._weights is not None:
            release_freed_memory()
        self.accelerator.wait_for_everyone()
        if self.method.new_parameters:
            self._check_trainable()

    def _load_or_compute(self, resuming: Path | None) -> Start | None:
        """Return what the model starts from, out of a folder or computed; None for nothing."""
        options, layers = self.init_options_here(), self.method.layers(self.model)
        rule = None if self._already_trained else self.method.rule_for(options)
        check_rule(self.method, rule)
        rule = after_earlier(rule, options.earlier, options.knowledge)
        finished = self._finished_start(resuming)
        if finished is not None:
            label = rule.label if rule is not None else ""
            start = load_start(
                finished, self.model, layers, rule=label, adapter_name=self.adapter_name, weights=self._weights
            )
            if self.args.should_save:
                copy_store(finished, self.init_dir)
            self.accelerator.wait_for_everyone()
            return start
        if self.args.should_save:  # what an earlier run started from goes, but for parts that this one may continue
            clear(self.init_dir, parts=options.cache)
        self.accelerator.wait_for_everyone()
        if not resuming:
            return self._compute(options, layers, rule)
        if self._calibration_dataset is not None:
            logger.warning(
                f"calibration_dataset: no drift is reported, {resuming} holds no start; another trainer wrote it"
            )
        return None

    def _compute(self, options: InitOptions, layers: Mapping[str, nn.Module], rule: Rule | None) -> Start | None:
        """Measure and compute what the model starts from; None where there is nothing to measure or to compute."""
        whole = None if self._already_trained else self._whole_model()
        measures = self._calibration_dataset is not None and (rule is not None or self._drift_is_measurable())
        if not measures and rule is None and whole is None:
            return None
        batches = self.calibration_batches if measures else None

        def compute(options: InitOptions) -> Start:
            return compute_start(
                self.model,
                layers,
                batches,
                options,
                rule=rule,
                whole=whole,
                adapter_name=self.adapter_name,
                folder=self.init_dir,
            )

        try:
            return compute(options)
        except NotAChain as reason:
            if self._weights is None:  # asked for by `form`
                raise
            logger.warning(f"{reason}; every process loads it whole")
            self.read_whole()
            return compute(replace(options, weights=None))

    def _check_trainable(self) -> None:
        if self._preflight != "off":
            check_trainable(self.model, self.method.trainable(self.model), self._preflight)

    def _prepare_rows(self, resuming: Path | None) -> None:
        """Let the method change the rows to train on, and look at them."""
        windows = self.calibration_texts if self.method.needs_texts else []
        if self.method.needs_texts:
            digest = hashlib.sha256(repr(windows).encode()).hexdigest()[:8]
            self._checkpoint_settings |= {"calibration texts": f"{len(windows)} ({digest})"}
            if resuming:
                check_settings(resuming, self._checkpoint_settings)
        if self.train_dataset is not self._prepared_dataset:  # else a broken-off attempt has changed them already
            if windows and self._preflight != "off":
                check_rows(self, self._preflight)  # without the texts among which nothing of them would be missed
            self.train_dataset = self._prepared_dataset = self.method.training_data(self, windows)
        if self._preflight != "off":
            check_rows(self, self._preflight)
            check_last_batches(self, self._preflight)

    def _finished_start(self, resuming: Path | None) -> Path | None:
        """Return the folder of the start to take: of a checkpoint its own copy, so that no other file is read."""
        if not resuming:
            return self.init_dir if self._reuse_init else self._init_folder
        kept = resuming / self.init_dir.name
        if (kept / REPORT_FILE).is_file():
            return kept
        if not self._already_trained and (
            self.method.computes_whole or self.method.rule_for(self._init_options) is not None
        ):
            raise UserError(
                f"resume: {resuming} does not hold what it started from ({kept.name}/{REPORT_FILE} is missing)"
            )
        return None

    def _whole_model(self) -> WholeModel | None:
        """Return what the method computes of the model as a whole, the same whatever was drawn before; None for nothing."""
        looked_at = self.method.training_batches(self)
        if looked_at is None:
            return None
        config = active_config(self.model)
        options = (getattr(config, key, None) for key in ("eva_config", "lora_ga_config"))
        rule = " ".join([repr(self.method), *(repr(given) for given in options if given is not None)])

        def compute() -> dict[str, torch.Tensor]:
            with preserve(self.model):
                set_seed(self._init_options.seed)
                return self.method.compute(self, looked_at)

        knowledge = []
        if self.method.needs_gram:
            fewest = self._init_options.min_tokens
            knowledge = together(lambda: checked_batches(self.model, self.calibration_batches, fewest))
        return WholeModel(rule, [*looked_at, *knowledge], compute, type(self.method))

    def _begin_with(self, start: Start) -> None:
        """Make the model what it is before the first step, and follow its drift from there."""
        if not self._already_trained:
            self.method.apply(self.model, start.tensors)
        if start.report.layers:
            self.layer_report = start.report
        if start.calibration.output_energy:
            self.drift_meter = self.method.drift_meter(self.model, start.calibration)

    def labels_of(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the tokens that a collated batch teaches, (rows, length), −100 where none; None where labels are none.

        As those of a token classifier, or of a model that fills gaps, whose answers have no end. A model whose head is not
        found may be one of these, or a language model that calls it otherwise: then labels are the tokens where they stand,
        or, where the collator shifts them, the next ones.
        """
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if not (torch.is_tensor(ids) and torch.is_tensor(labels) and ids.shape == labels.shape):
            return None
        head = getattr(base_model_of(self.model), "get_output_embeddings", lambda: None)()
        shifted = (labels[..., :-1] != -100).any() and _are_tokens(labels[..., :-1], ids[..., 1:])
        unknown = head is None and not (shifted or _are_tokens(labels, ids))
        return None if unknown or why_unsupported(self.model.config) else labels

    def _drift_is_measurable(self) -> bool:
        """Return whether the drift of a plain adapter can be followed; what cannot is said in a line."""
        config = active_config(self.model)
        asks = adapts_plainly(self.method) or getattr(config, "use_dora", False)
        reason = why_not_measured(self.model, self.adapter_name) if asks else None
        if reason is not None:
            logger.warning(f"calibration_dataset: no drift is reported, {reason}")
        return reason is None

    def init_options_here(self) -> InitOptions:
        """Return the options, with the accelerator as the place to run: engines that shard leave the model on the CPU."""
        device = self.accelerator.device
        away = self.model.device.type in ("cpu", "meta")
        if self._init_options.device is None and device.type != "cpu" and away:
            return replace(self._init_options, device=device)
        return self._init_options

    @functools.cached_property
    def calibration_batches(self) -> list[dict[str, Any]]:
        """The calibration windows in padded batches, read once; all processes ask for them together."""
        return together(self._batches)

    @property
    def calibration_texts(self) -> list[list[int]]:
        """The calibration windows as token ids, without padding."""
        return [text["input_ids"].tolist() for batch in self.calibration_batches for text in texts_in(batch)]

    def _batches(self) -> list[dict[str, Any]]:
        reads = other_inputs(self.model)
        batches = as_batches(self._calibration_dataset, self.processing_class, self._calibration_args, reads)
        if self._preflight != "off":
            check_windows(batches, self.model.config, self._preflight)
        return batches

    def _keep_start(self, checkpoint: Path) -> None:
        if self._has_method:
            write_json(checkpoint / METHOD_FILE, self._checkpoint_settings)
        clear(checkpoint / self.init_dir.name)  # of an earlier run's checkpoint of this step
        if (start := self._find_start()) is not None:
            copy_store(start, checkpoint / self.init_dir.name)

    def _remember_start(self) -> None:
        """Remember what `init_dir` holds: another trainer may write its own there."""
        kept = self._has_method and (self.init_dir / REPORT_FILE).is_file()
        self._start = (self.init_dir, read_report(self.init_dir)["key"]) if kept else None

    def _find_start(self) -> Path | None:
        """Return a folder that holds what this trainer started from; None where it kept nothing, or another process did.

        Raises:
            UserError: there is none any more.
        """
        if self._start is None:
            return None
        folder, key = self._start
        own = (checkpoint / folder.name for checkpoint in checkpoints_in(folder.parent))
        for place in (folder, self.init_dir, cached_folder(key), *own):
            if (place / REPORT_FILE).is_file() and read_report(place)["key"] == key:
                return place
        raise UserError(
            f"output_dir: {folder} no longer holds what this trainer started from, without which a checkpoint could not be "
            "resumed; give each trainer a folder of its own"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the knowledge drift (mean and max over the layers), and the loss's terms, to every training log line."""
        if "loss" in logs:
            logs |= self._logged_terms()
            drift = self.drift_meter.summary() if self.drift_meter is not None else {}
            logs |= {f"drift_{name}": value for name, value in drift.items()}
        super().log(logs, *args, **kwargs)


def _are_tokens(labels: torch.Tensor, ids: torch.Tensor) -> bool:
    """Return whether all labels but −100 are those tokens."""
    return bool(((labels == ids) | (labels == -100)).all())
