"""From the rows of a data set to training examples: the fields of a recipe, and every row that is no good by number."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from lora_null.errors import UserError
from lora_null.eval_harness.documents import BadRow
from lora_null.recipes.data import fill, first_answer, load_documents, need_field
from lora_null.recipes.schema import DataSection
from lora_null.recipes.templates import CHAT, need_chat_template, prompts_and_ends, render

USERS, ASSISTANTS = ("human", "user"), ("gpt", "assistant")
MOST_BAD = 0.01  # the share of bad rows that is left out unasked
BATCH = 1000  # examples tokenized at once


@dataclass(frozen=True)
class Example:
    """A conversation to learn: (prompt, response) turns, and for preferences the rejected last response."""

    row: int
    turns: tuple[tuple[str, str], ...]
    rejected: str | None = None


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and labels of the same length that are −100 wherever nothing is learned."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainingData:
    """What a trainer gets.

    Attributes:
        rows: for SFT `input_ids` and `labels`; for DPO `prompt`, `chosen` and `rejected`, texts or messages.
        examples: the same rows as conversations.
        bad: the rows that were left out.
    """

    rows: datasets.Dataset
    examples: list[Example]
    bad: list[BadRow]


def training_data(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, preferences: bool, max_length: int | None
) -> TrainingData:
    """Read, check and template the training rows.

    Args:
        data: the recipe's section.
        tokenizer: the model's.
        preferences: pairs of chosen and rejected responses for DPO, instead of responses.
        max_length: tokens of a sequence, at most; None where nothing is cut.

    Raises:
        UserError: unreadable data, a missing field, or bad rows that `data.on_bad_row` does not allow to leave out.
    """
    need_chat_template(data.template, tokenizer)
    examples, bad = read_examples(data, preferences=preferences)
    total = len(examples) + len(bad)
    tokenized = tokenize(examples, data.template, tokenizer)
    kept = []
    for example, tokens in zip(examples, tokenized):
        if all(label == -100 for label in tokens.labels[:max_length]):
            bad.append(BadRow(example.row, f"prompt longer than max_length ({max_length} tokens)"))
        else:
            kept.append((example, tokens))
    bad.sort(key=lambda row: row.row)
    settle_bad_rows(bad, total, data.on_bad_row)
    examples = [example for example, _ in kept]
    if preferences:
        rows = _preference_rows(examples, data.template)
    else:
        columns = {
            "input_ids": [t.ids[:max_length] for _, t in kept],
            "labels": [t.labels[:max_length] for _, t in kept],
        }
        rows = datasets.Dataset.from_dict(columns)
    return TrainingData(rows, examples, bad)


def read_examples(data: DataSection, *, preferences: bool, where: str = "data") -> tuple[list[Example], list[BadRow]]:
    """Return the good rows as conversations, and the bad ones.

    Raises:
        UserError: as `load_documents`, and for a missing field.
    """
    documents = load_documents(data.path, subset=data.subset, split=data.split, where=where, keep_bad=True)
    last = data.limit if data.limit is not None else float("inf")
    bad, examples = [row for row in documents.bad if row.row <= last], []
    if len(documents.rows):
        _need_fields(documents.rows, data, preferences, where)
    for number, row in zip(documents.numbers, documents.rows):
        if number > last:
            break
        try:
            single = () if data.messages else ((fill(data.prompt, row), _response(row[data.response])),)
            turns = _turns(row[data.messages]) if data.messages else single
            rejected = _response(row[data.rejected]) if preferences else None
            _check(turns, rejected, data)
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
        else:
            examples.append(Example(number, turns, rejected))
    return examples, bad


def _need_fields(rows: datasets.Dataset, data: DataSection, preferences: bool, where: str) -> None:
    if data.messages:
        need_field(rows, data.messages, f"{where}.messages")
    else:
        for name in re.findall(r"{(\w+)}", data.prompt) or [data.prompt]:
            need_field(rows, name, f"{where}.prompt")
        need_field(rows, data.response, f"{where}.response")
    if preferences:
        need_field(rows, data.rejected, f"{where}.rejected")


def _response(value: Any) -> str:
    """Return a response's text; of a list of messages (UltraFeedback's `chosen`) the last one's."""
    messages = isinstance(value, list) and value and isinstance(value[-1], dict)
    return (value[-1].get("content") or "") if messages else first_answer(value)


def _turns(messages: Any) -> tuple[tuple[str, str], ...]:
    """Return the turns of a conversation in ShareGPT's form (from, value) or OpenAI's (role, content).

    Raises:
        ValueError: no turns, or turns that do not alternate between a human and an assistant.
    """
    said = [(m.get("from") or m.get("role"), m.get("value") or m.get("content") or "") for m in messages or []]
    if not said or len(said) % 2:
        raise ValueError("a conversation that does not end with an assistant's turn")
    pairs = tuple(zip(said[::2], said[1::2]))
    if any(ask not in USERS or answer not in ASSISTANTS for (ask, _), (answer, _) in pairs):
        raise ValueError("turns that do not alternate between a human and an assistant")
    return tuple((prompt, response) for (_, prompt), (_, response) in pairs)


def _check(turns: Sequence[tuple[str, str]], rejected: str | None, data: DataSection) -> None:
    """Raise a ValueError that says what is wrong with a row's texts."""
    names = ("human's turn", "assistant's turn") if data.messages else (data.prompt, data.response)
    for texts in turns:
        for text, name in zip(texts, names):
            if not text.strip():
                raise ValueError(f"empty {name!r}")
    if rejected is not None and not rejected.strip():
        raise ValueError(f"empty {data.rejected!r}")
    if rejected is not None and rejected.strip() == turns[-1][1].strip():
        raise ValueError("chosen equal to rejected")
    if any("\ufffd" in text for texts in turns for text in (*texts, rejected or "")):
        raise ValueError("wrong encoding (the replacement character U+FFFD)")


def settle_bad_rows(bad: Sequence[BadRow], total: int, policy: str | None, *, where: str = "data") -> None:
    """Refuse bad rows unless the recipe allows to leave them out: `policy` is `data.on_bad_row`.

    Raises:
        UserError: how many of which kind, the first of each by number.
    """
    allowed = policy == "skip" or (policy is None and len(bad) <= MOST_BAD * total)
    if bad and (not allowed or len(bad) == total):
        hint = "" if len(bad) == total else "; data.on_bad_row=skip leaves them out"
        raise UserError(f"{where}: {len(bad)} of {total} rows cannot be used: {describe_bad_rows(bad)}{hint}")


def describe_bad_rows(bad: Iterable[BadRow]) -> str:
    """Return "4 chosen equal to rejected (rows 12, 88, 90, …), 1 empty 'rejected' (row 7)"."""
    by_reason: dict[str, list[int]] = defaultdict(list)
    for row in bad:
        by_reason[row.reason].append(row.row)
    parts = []
    for reason, numbers in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        parts.append(f"{len(numbers)} {reason} (row{'s' if len(numbers) > 1 else ''} {shown})")
    return ", ".join(parts)


def tokenize(
    examples: Sequence[Example], template: str, tokenizer: PreTrainedTokenizerBase, *, rejected: bool = False
) -> list[Tokenized]:
    """Tokenize conversations; every response and its end token are learned, nothing else is.

    As in TRL, prompt and response are tokenized as one text, and a response starts where that diverges from the
    tokenized prompt.

    Args:
        examples: the conversations.
        template: see `prompts_and_ends`.
        tokenizer: the model's.
        rejected: take the rejected last response instead of the chosen one, and learn only that.
    """
    found = []
    for first in range(0, len(examples), BATCH):
        texts = []
        for example in islice(examples, first, first + BATCH):
            turns = (*example.turns[:-1], (example.turns[-1][0], example.rejected)) if rejected else example.turns
            texts.append(list(prompts_and_ends(template, turns, tokenizer)))
        flat = [text for pairs in texts for pair in pairs for text in pair]
        encoded = iter(tokenizer(flat, add_special_tokens=template != CHAT)["input_ids"])
        found += [_label([(next(encoded), next(encoded)) for _ in pairs], rejected) for pairs in texts]
    return found


def _label(turns: list[tuple[list[int], list[int]]], only_last: bool) -> Tokenized:
    """Return the whole conversation's ids, labeled in the spans between each turn's prompt and its end."""
    whole = turns[-1][1]
    labels = [-100] * len(whole)
    for before, through in turns[-1:] if only_last else turns:
        start, end = _common_prefix(before, whole), _common_prefix(through, whole)
        labels[start:end] = whole[start:end]
    return Tokenized(whole, labels)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _preference_rows(examples: Sequence[Example], template: str) -> datasets.Dataset:
    """Return what TRL's DPOTrainer tokenizes as `tokenize` does: templated texts, or messages for "chat"."""
    rows = []
    for example in examples:
        (prompt, chosen), rejected = example.turns[-1], example.rejected
        if template == CHAT:
            sides = {"chosen": chosen, "rejected": rejected}
            row = {"prompt": [{"role": "user", "content": prompt.strip()}]}
            row |= {side: [{"role": "assistant", "content": text.strip()}] for side, text in sides.items()}
        else:
            question, chosen = render(template, prompt, chosen)
            row = {"prompt": question, "chosen": chosen, "rejected": render(template, prompt, rejected)[1]}
        rows.append(row)
    return datasets.Dataset.from_list(rows)
