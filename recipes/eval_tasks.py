"""From a recipe's `eval` section to the harness's tasks, asked in the same template as training."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from lora_null.eval_harness import AnswerTask, ForgettingTask, LmEvalTask, MTBenchTask, PreferenceTask, Task
from lora_null.eval_harness.code.jails import UNSAFE
from lora_null.eval_harness.documents import TEXT_FIELDS, BadRow, read_documents
from lora_null.eval_harness.likelihood import TokenizedPair
from lora_null.eval_harness.lm_eval.loading import manager_of, name_in
from lora_null.eval_harness.lm_eval.task import CHAT_SUFFIX, HAS_CHAT_TWIN
from lora_null.eval_harness.mt_bench.judge import Judge
from lora_null.eval_harness.mt_bench.task import as_questions
from lora_null.eval_harness.results import Role
from lora_null.eval_harness.tasks import TASK_FILES
from lora_null.recipes.config.schema import (
    YAML_SUFFIXES,
    AnswersEntry,
    CodeSection,
    DataSection,
    ForgettingEntry,
    LmEvalEntry,
    MTBenchEntry,
    PreferencesEntry,
    Recipe,
)
from lora_null.recipes.data.conversations import prompt_text
from lora_null.recipes.data.examples import Example, Tokenized, leave_out, read_examples, tokenize
from lora_null.recipes.data.formats import askable, detect_format, question_and_answer
from lora_null.recipes.data.rows import RowText, documents_of
from lora_null.recipes.data.templates import CHAT, trimmed_prompt
from lora_null.recipes.training import trained_part, training_value
from lora_null.utils.errors import UserError

# Keys that entries with rows share with `data`.
SHARED_KEYS = {"path", "subset", "split", "prompt", "response", "template", "offset", "limit"}
# Stop strings: what a model writes next that does not end its answer.
STOPS = {"alpaca": ("### Instruction:",), "qa": ("\nQuestion:",)}


@dataclass(frozen=True)
class EvalContext:
    """What every entry of `eval` needs to become a task.

    Attributes:
        recipe: the recipe.
        tokenizer: the model's.
        allow_code_execution: whether tasks may run what the model writes; "unsafe": without a jail.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    allow_code_execution: bool | str = False


def eval_tasks(context: EvalContext) -> list[Task]:
    """Return the harness's tasks, their documents loaded and templated.

    Raises:
        UserError: unreadable data, a missing field, or a template that a task is not asked in.
    """
    section = context.recipe.eval
    return [task for role in get_args(Role) for task in _make_tasks(getattr(section, role), role, context)]


def probe_tasks(context: EvalContext) -> dict[Role, list[Task]]:
    """Return by role the tasks of the entries that `eval.probe` names itself; raises as `eval_tasks`."""
    probe = context.recipe.eval.probe
    entries = {role: getattr(probe, role) if probe else [] for role in get_args(Role)}
    return {role: _make_tasks(own, role, context) if isinstance(own, list) else [] for role, own in entries.items()}


def _make_tasks(entries: Sequence[Any], role: Role, context: EvalContext) -> list[Task]:
    return [MAKERS[type(entry)](entry, role, context) for entry in entries]


def _lm_eval(entry: LmEvalEntry, role: Role, context: EvalContext) -> LmEvalTask:
    """Return a task of lm-eval; of this package's own, the one that is asked in the training template."""
    fields = entry.model_dump() | {"name": entry.name or entry.task}
    fields["include_path"] = context.recipe.eval.include_path
    template = context.recipe.data.template
    if Path(entry.task).suffix in YAML_SUFFIXES:
        path = Path(entry.task)
        task = name_in(path)
        fields |= {"task": task, "name": entry.name or task, "include_path": str(path.parent)}
    framed = fields["task"].removesuffix(CHAT_SUFFIX)
    if framed in HAS_CHAT_TWIN:
        # A file of the user's own has no twin: the package's is another task.
        both = ("alpaca", CHAT) if _is_of_package(fields["task"], fields["include_path"]) else ("alpaca",)
        templates = both if fields["task"] == framed else (CHAT,)
        if template not in templates:
            asked_in = " or ".join(templates)
            raise UserError(f"eval.{role}: {entry.task} is asked in {asked_in}, and data.template is {template!r}")
        if template == CHAT:
            fields |= {"task": framed + CHAT_SUFFIX, "chat": True}
    code = context.recipe.eval.code or CodeSection()
    allowed = context.allow_code_execution
    fields |= {"jail": UNSAFE if allowed == UNSAFE else code.jail, "jail_image": code.image}
    return LmEvalTask(**fields, role=role, confirm_run_unsafe_code=bool(allowed))


def _is_of_package(task: str, include_path: str | None) -> bool:
    path = manager_of(task, include_path).task_index[task].yaml_path
    return path is not None and TASK_FILES.resolve() in Path(path).resolve().parents


def _answers(entry: AnswersEntry, role: Role, context: EvalContext) -> AnswerTask:
    where = f"eval.{role}"
    fields = entry.model_dump(include=SHARED_KEYS | {"messages", "system"}, exclude_none=True)
    if entry.messages is None:
        fields = _fields_of(entry, where) | fields
    fields.setdefault("template", CHAT if "messages" in fields and context.tokenizer.chat_template else "qa")
    section = DataSection(**fields, thinking=context.recipe.data.thinking)
    examples, bad = read_examples(section, context.tokenizer, preferences=False, where=where)
    policy = entry.on_bad_row or context.recipe.data.on_bad_row or "error"
    leave_out(bad, len(examples) + len(bad), f"rows of {where}", policy, where=where)
    end = _end_of(section.template, context.tokenizer)
    pairs = [_text_pair(example, end) for example in examples]
    special = section.template != CHAT
    return AnswerTask(name=entry.answers, pairs=pairs, kl=True, role=role, special_tokens=special)


def _fields_of(entry: AnswersEntry, where: str) -> dict[str, Any]:
    """Return the fields of question and answer: those that are given, else those with usual names, else a conversation's or a text's."""
    if entry.prompt and entry.response:
        return {"prompt": entry.prompt, "response": entry.response}
    first = documents_of(entry, where, limit=1, keep_bad=True)
    if found := question_and_answer(askable(first.columns, first.rows), entry.prompt, entry.response):
        return found
    if entry.prompt is None and entry.response is None:
        if first.columns == TEXT_FIELDS:
            return {"prompt": "beginning", "response": "ending", "template": "plain"}
        with contextlib.suppress(UserError, KeyError):
            keys = detect_format(first.rows, first.columns, where).keys
            return {"messages": keys["messages"], **({"system": keys["system"]} if "system" in keys else {})}
    raise UserError(
        f"{where}: {entry.path} has no question and answer under a usual name (its fields: {', '.join(first.columns)}); "
        "give {answers: NAME, path: FILE, prompt: FIELD, response: FIELD}, or messages: FIELD for conversations"
    )


def _end_of(template: str, tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what a template writes behind an answer: the end token; of a chat any special one (Gemma's turns have their own)."""
    eos = tokenizer.eos_token or ""
    if template != CHAT:
        return re.compile(rf"(?:{re.escape(eos)})?\Z")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = "|".join(re.escape(token) for token in [eos, *special] if token)
    return re.compile(rf"(?:{ends}|\s)+\Z" if ends else r"\s+\Z")


def _text_pair(example: Example, end: re.Pattern[str]) -> tuple[str, str]:
    """Return what comes before the last answer, and the answer without what ends it."""
    text, (start, through) = example.written.text, example.written.spans[-1]
    return text[:start], end.sub("", text[start:through], count=1)


def _preferences(entry: PreferencesEntry, role: Role, context: EvalContext) -> PreferenceTask:
    where = f"eval.{role}"
    recipe, tokenizer = context.recipe, context.tokenizer
    keys = entry.model_dump(include=SHARED_KEYS | {"rejected"})
    keys |= recipe.data.model_dump(include={"template", "system", "thinking"})
    examples, bad = read_examples(DataSection(**keys), tokenizer, preferences=True, where=where)
    sides = [tokenize(examples, recipe.data.template, tokenizer, rejected=rejected) for rejected in (False, True)]
    part = trained_part(recipe)
    chosen, rejected = ([_pair(tokens, part) for tokens in side] for side in sides)
    kept = [i for i, pair in enumerate(chosen) if pair and rejected[i]]
    lost = [examples[i].row for i in sorted({*range(len(examples))} - {*kept})]
    longest = training_value(recipe, "max_length")
    bad = [*bad, *(BadRow(row, f"prompt longer than max_length ({longest} tokens)") for row in lost)]
    policy = entry.on_bad_row or recipe.data.on_bad_row
    leave_out(bad, len(kept) + len(bad), f"rows of {where}", policy, where=where)
    beta = entry.beta or recipe.training.get("beta", DPOConfig.beta)
    return PreferenceTask(entry.preferences, [chosen[i] for i in kept], [rejected[i] for i in kept], beta, role)


def _pair(tokens: Tokenized, part: slice) -> TokenizedPair | None:
    """Return the prompt with its response, the part that training keeps; None where nothing of the response is left."""
    start = next(i for i, label in enumerate(tokens.labels) if label != -100)
    ids, start = tokens.ids[part], max(1, start - range(len(tokens.ids))[part].start)
    return TokenizedPair(tuple(ids), start) if start < len(ids) else None


def _mt_bench(entry: MTBenchEntry, role: Role, context: EvalContext) -> MTBenchTask:
    where = f"eval.{role}"
    recipe = context.recipe
    rows = documents_of(entry, where).rows
    references = read_documents([Path(entry.references)], f"{where}.references").rows if entry.references else ()
    template, judge = recipe.data.template, recipe.eval.judge

    def ask_next(before: Sequence[tuple[str, str]], question: str) -> str:
        said = [trimmed_prompt(template, text) for text in (*chain.from_iterable(before), question)]
        messages = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), said)]
        return prompt_text(template, messages, context.tokenizer)

    return MTBenchTask(
        name=entry.mt_bench,
        questions=as_questions(rows, references)[: entry.limit],
        ask=ask_next,
        special_tokens=template != CHAT,
        stops=STOPS.get(template, ()),
        judge=None if judge is None else Judge(**judge.model_dump()),
        max_new_tokens=entry.max_new_tokens,
        role=role,
    )


def _forgetting(entry: ForgettingEntry, role: Role, context: EvalContext) -> ForgettingTask:
    where = f"eval.{role}"
    found = documents_of(entry, where, limit=entry.limit)
    text_of = RowText(entry.field, found.columns, f"{where}.field")
    texts: list[str] = []
    for number, row in list(zip(found.numbers, found.rows))[: entry.limit]:
        try:
            texts.append(text_of.text(row))
        except ValueError as error:
            raise UserError(f"{where}: row {number} of {entry.path} cannot be used: {error}") from None
        if len(context.tokenizer(texts[-1], truncation=True, max_length=2)["input_ids"]) < 2:
            raise UserError(f"{where}: row {number} of {entry.path} has fewer than two tokens; leave it out")
    return ForgettingTask(entry.forgetting, texts, entry.max_length, role)


# A new kind of evaluation is a class in eval_harness, its entry in config/schema.py, and a line here.
MAKERS: dict[type, Callable[[Any, Role, EvalContext], Task]] = {
    LmEvalEntry: _lm_eval, AnswersEntry: _answers, PreferencesEntry: _preferences, MTBenchEntry: _mt_bench,
    ForgettingEntry: _forgetting,
}  # fmt: skip


def templates_of(tasks: Sequence[Task], template: str) -> str:
    """Return for the report which evaluations are asked in the training template."""
    own = [task.label for task in tasks if task.in_training_template]
    return f"{template}, in training and in {', '.join(own)}" if own else template
