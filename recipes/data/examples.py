"""From the rows of a data set to training examples: the fields of a recipe, and every row that is no good by number."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
from datasets import Json, List
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.documents import TEXT_FIELDS, BadRow
from lora_null.recipes.config.schema import DataSection
from lora_null.recipes.data.conversations import (
    Written,
    check_chat_template,
    write_conversation,
    write_preference,
)
from lora_null.recipes.data.rows import RowText, check_field, documents_of, field_text
from lora_null.recipes.data.templates import CHAT, trimmed, trimmed_prompt
from lora_null.utils.chat import (
    SYSTEM,
    common_prefix,
    special_tokens,
    thought_of,
    thoughts_in_content,
    without_bos,
    without_end,
    without_thoughts,
)
from lora_null.utils.distributed import print_once
from lora_null.utils.errors import UserError
from lora_null.utils.values import EmptyValue, Message, as_messages, chat_options, is_conversation

EQUAL = "chosen equal to rejected"
MAX_BAD_SHARE = 0.01  # the share of bad rows that is left out unasked
BATCH = 2**22  # characters tokenized at once, counting those before each end of a span


@dataclass(frozen=True)
class Example:
    """A row, written under the template.

    Attributes:
        row: its number.
        written: the conversation and what of it is learned; for preferences with the chosen end.
        rejected: for preferences, the conversation with the rejected end.
        prompt: for preferences, how many messages both share.
        options: what the row gives its chat template beside the messages.
    """

    row: int
    written: Written
    rejected: Written | None
    prompt: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Tokenized:
    """Token ids, and labels of the same length that are −100 wherever nothing is learned; four bytes each."""

    ids: array[int]
    labels: array[int]


@dataclass(frozen=True)
class TrainingData:
    """What a trainer gets.

    Attributes:
        rows: for SFT `input_ids` and `labels`; for DPO `prompt`, `chosen` and `rejected`, texts or messages.
        examples: the same rows, written under the template.
        bad: the rows that were left out.
        cut: how many of the rows are longer than a sequence may be; of pairs, whose chosen response is.
    """

    rows: datasets.Dataset
    examples: list[Example]
    bad: list[BadRow]
    cut: int = 0


def training_data(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, preferences: bool, max_length: int | None
) -> TrainingData:
    """Read, check and template the training rows; print which are left out.

    Args:
        data: the recipe's section.
        tokenizer: the model's.
        preferences: pairs of chosen and rejected responses for DPO, instead of responses.
        max_length: tokens of a sequence, at most; None where nothing is cut.

    Raises:
        UserError: unreadable data, a missing field, or bad rows that `data.on_bad_row` does not allow to leave out.
    """
    examples, bad = read_examples(data, tokenizer, preferences=preferences)
    total = len(examples) + len(bad)
    tokenized = tokenize(examples, data.template, tokenizer)
    too_long = cut_before_the_answer(examples, tokenized, max_length)
    numbers = {row.row for row in too_long}
    kept = [(example, tokens) for example, tokens in zip(examples, tokenized) if example.row not in numbers]
    if preferences and max_length is not None:
        long = [(example, tokens.ids[:max_length]) for example, tokens in kept if len(tokens.ids) > max_length]
        others = tokenize([example for example, _ in long], data.template, tokenizer, rejected=True)
        equal = [example.row for (example, ids), other in zip(long, others) if other.ids[:max_length] == ids]
        too_long += [BadRow(row, f"{EQUAL} within max_length ({max_length} tokens)") for row in equal]
        kept = [(example, tokens) for example, tokens in kept if example.row not in set(equal)]
    bad = sorted([*bad, *too_long], key=lambda row: row.row)
    leave_out(bad, total, "training rows", data.on_bad_row)
    cut = sum(max_length is not None and len(tokens.ids) > max_length for _, tokens in kept)
    if cut:
        print_once(
            f"data: {cut:,} of {len(kept):,} training rows are longer than training.max_length ({max_length} tokens); they are cut "
            "there and their ends are not learned"
        )
    examples = [example for example, _ in kept]
    _say_special(examples, tokenizer)
    if preferences:
        rows = _preference_rows(examples, data.template)
    else:
        columns = {
            "input_ids": [np.asarray(tokens.ids[:max_length]) for _, tokens in kept],
            "labels": [np.asarray(tokens.labels[:max_length]) for _, tokens in kept],
        }
        rows = datasets.Dataset.from_dict(columns)
    return TrainingData(rows, examples, bad, cut)


def _say_special(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print how many rows hold special tokens within what is said, which a tokenizer does not tell from those of a template."""
    special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    found = []
    for example in examples:
        messages = [*example.written.messages, *(example.rejected.messages if example.rejected else ())]
        # A text template leaves out an end token behind an answer; a chat template's messages come without it.
        texts = (
            without_end(text, ends) if message["role"] == "assistant" else text
            for message in messages
            if isinstance(text := message.get("content"), str)
        )
        if first := next(filter(None, map(special.search, texts)), None):
            found.append((example.row, first[0]))
    if found:
        row, token = found[0]
        what = f"{len(found)} of {len(examples)} training rows hold special tokens within their texts"
        print_once(f"{what} (the first {token!r} in row {row}); the model reads these as its own")


def cut_before_the_answer(
    examples: Sequence[Example], tokenized: Sequence[Tokenized], max_length: int | None
) -> list[BadRow]:
    """Return the rows of which nothing that is learned is left within `max_length` tokens."""
    reason = f"prompt longer than max_length ({max_length} tokens)"
    lost = (all(label == -100 for label in tokens.labels[:max_length]) for tokens in tokenized)
    return [BadRow(example.row, reason) for example, is_lost in zip(examples, lost) if is_lost]


def read_examples(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, preferences: bool, where: str = "data"
) -> tuple[list[Example], list[BadRow]]:
    """Return the good rows after the offset and up to the limit, written under the template, and the bad ones.

    Raises:
        UserError: as `load_documents`, a missing field, an offset that leaves no row, or a model without the chat template
            that is asked for.
    """
    check_chat_template(data.template, tokenizer, where)
    last = None if data.limit is None else data.offset + data.limit
    documents = documents_of(data, where, keep_bad=True, limit=last)
    numbers = [*documents.numbers, *(row.row for row in documents.bad)]
    if numbers and max(numbers) <= data.offset:
        raise UserError(f"{where}.offset: {data.path} has only {len(numbers)} rows")
    wanted = range(data.offset + 1, sys.maxsize if last is None else last + 1)
    bad, examples = [row for row in documents.bad if row.row in wanted], []
    if not documents.rows:
        return examples, bad
    reader = RowReader(data, documents.columns, where, preferences=preferences, first=documents.rows[0])
    taken = [(number, row) for number, row in zip(documents.numbers, documents.rows) if number in wanted]
    unwanted = sum(row.get("label") is False for _, row in taken)
    if unwanted and where == "data":
        print_once(
            f"data: {unwanted:,} of {len(taken):,} rows have the label false, as answers that are not wanted have; all are "
            "learned"
        )
    for number, row in taken:
        try:
            examples.append(reader.example(number, row, tokenizer))
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
    return examples, bad


class RowReader:
    """Makes examples of rows: finds the fields once, then decides for each row by the types of its values.

    Args:
        data: which fields, and the template.
        columns: the fields there are.
        where: the recipe key, for messages.
        preferences: pairs of a chosen and a rejected response.
        first: the first row; tells whether preferences are conversations that hold their prompt.

    Raises:
        UserError: a missing field.
    """

    def __init__(
        self, data: DataSection, columns: Sequence[str], where: str, *, preferences: bool, first: Mapping[str, Any]
    ) -> None:
        self.data, self.preferences = data, preferences
        self.of_chunks = list(columns) == TEXT_FIELDS
        self.prompt = None
        if data.system:
            of_data = preferences and where != "data"  # an entry of held-out pairs has no such key
            check_field(columns, data.system, f"data.system, also in {where}" if of_data else f"{where}.system")
        if data.messages or data.text:
            key = "messages" if data.messages else "text"
            check_field(columns, str(getattr(data, key)), f"{where}.{key}")
            return
        default = data.prompt == DataSection.model_fields["prompt"].default
        implicit = preferences and default and data.prompt not in columns and is_conversation(first.get(data.response))
        if data.prompt is not None and not implicit:
            self.prompt = RowText(data.prompt, columns, f"{where}.prompt")
        check_field(columns, data.response, f"{where}.response")
        if preferences:
            check_field(columns, data.rejected, f"{where}.rejected")

    def example(self, number: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
        """Return the example of a row.

        Raises:
            ValueError: why the row cannot be used.
        """
        data, rejected, prompt = self.data, None, 0
        if data.text:
            text = _text_of(row, data.text, answer=False)
            check_encoding([text])
            goes_on = self.of_chunks and row.get("last") is False
            end, text = "" if goes_on else str(tokenizer.eos_token or ""), without_bos(text, tokenizer)
            text = text.rstrip() if end and text.rstrip().endswith(end) else text + end
            return Example(number, Written(text, [(0, len(text))], []), None, 0, {})
        messages, learned = self.messages(row)
        conversational = any(is_conversation(row.get(name)) for name in (data.prompt, data.response))
        options = chat_options(row) if conversational or data.messages or data.template == CHAT else {}
        if self.preferences:
            rejected, learned_rejected = self._prepared(row, *self._answered(row, data.rejected))
            prompt = _shared(messages, rejected)
            if not all((*learned[prompt:], *learned_rejected[prompt:])):
                raise ValueError("chosen and rejected differ before turns that are not learned, such as the user's")
        turns = [turn for turn, is_learned in enumerate(learned) if is_learned]
        _check(messages, rejected, turns)
        if rejected is None:
            written = self._write(
                messages, turns, lambda said: write_conversation(data.template, said, turns, tokenizer, options)
            )
            return Example(number, written, None, 0, options)
        sides = [
            self._write(
                side,
                [i for i in range(prompt, len(side)) if side[i]["role"] == "assistant"],
                lambda said: write_preference(data.template, said, prompt, tokenizer, options),
            )
            for side in (messages, rejected)
        ]
        if sides[0].text == sides[1].text:
            raise ValueError(EQUAL)
        return Example(number, *sides, prompt, options)

    def messages(self, row: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
        """Return the conversation of a row that is no text, of a pair with the chosen end, and which turns are learned.

        Raises:
            ValueError: why the row cannot be used; an EmptyValue where it holds nothing.
        """
        if self.data.messages:
            return self._prepared(row, *as_messages(row.get(self.data.messages)))
        return self._prepared(row, *self._answered(row, self.data.response))

    def _prepared(
        self, row: Mapping[str, Any], messages: list[Message], learned: list[bool]
    ) -> tuple[list[Message], list[bool]]:
        """Return a conversation without its thoughts where these are dropped, and with the row's system text first."""
        if self.data.thinking == "drop":
            messages = without_thoughts(messages)
        text = field_text(row, self.data.system).strip() if self.data.system else ""
        own = messages[0].get("content", "").strip() if messages[0]["role"] in SYSTEM else ""
        if text in ("", own):
            return messages, learned
        if messages[0]["role"] in SYSTEM:
            raise ValueError(f"{self.data.system!r} beside a conversation that has a system text of its own")
        return [{"role": "system", "content": text}, *messages], [False, *learned]

    def _write(
        self, messages: list[Message], turns: Sequence[int], write: Callable[[list[Message]], Written]
    ) -> Written:
        """Return a conversation written; where thoughts are to be kept, in the content if that alone shows them."""
        thoughts = [thought_of(messages[turn]) for turn in turns]
        if self.data.thinking != "keep" or not any(thoughts):
            return write(messages)
        for said in (messages, thoughts_in_content(messages)):
            with contextlib.suppress(ValueError):
                written = write(said)
                shown = "".join("".join(written.text[start:end] for start, end in written.spans).split())
                if all("".join(thought.split()) in shown for thought in thoughts):
                    return written
        raise ValueError(
            "the chat template leaves out thoughts of turns that are learned; data.thinking=drop leaves out all"
        )

    def _answered(self, row: Mapping[str, Any], response: str) -> tuple[list[Message], list[bool]]:
        """Return prompt and response as one conversation, and which of its turns are learned.

        The response's own turns are learned. It may be a complete conversation that begins with the prompt (UltraFeedback)
        or has it as one of its questions; what comes before is then its context.
        """
        prompt = self._prompt(row)
        if not is_conversation(row.get(response)):
            if self.prompt is None:
                raise ValueError(f"{response!r} is text, and without data.prompt only a conversation holds its prompt")
            text = _text_of(row, response, answer=True)
            # A text template joins the two itself, by the whitespace that stands between them.
            said = text if self.data.template == CHAT else field_text(row, response, answer=True)
            answer: Message = {"role": "assistant", "content": said}
            return [*prompt, answer], [False] * len(prompt) + [True]
        answered, learned = as_messages(row[response])
        asked, bare = [_stripped(message) for message in prompt], [_stripped(message) for message in answered]
        if bare[: len(asked)] == asked:
            shared = len(prompt)
        elif answered[0]["role"] == "assistant" or prompt[-1]["role"] == "assistant":
            answered, learned, shared = [*prompt, *answered], [False] * len(prompt) + learned, len(prompt)
        elif len(asked) == 1 and asked[0] in bare:
            shared = bare.index(asked[0]) + 1
        else:
            raise ValueError(f"{response!r} is a conversation that does not hold {self.prompt.spec!r}")
        return answered, [False] * shared + learned[shared:]

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        if self.prompt is None:
            return []
        if self.prompt.is_field and is_conversation(row.get(self.prompt.spec)):
            return as_messages(row[self.prompt.spec])[0]
        text = trimmed_prompt(self.data.template, self.prompt.text(row))
        if not text.strip():
            raise EmptyValue(f"empty {self.prompt.spec!r}")
        return [{"role": "user", "content": text}]


def _text_of(row: Mapping[str, Any], field: str, *, answer: bool) -> str:
    """Return the text of a field; raise a ValueError where it is empty, or no text."""
    text = trimmed(field_text(row, field, answer=answer))
    if not text:
        raise EmptyValue(f"empty {field!r}")
    return text


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return how many messages a pair has in common; raise a ValueError where the two are equal, or begin differently."""
    shared = common_prefix(chosen, rejected)
    if chosen == rejected:
        raise ValueError(EQUAL)
    if shared == min(len(chosen), len(rejected)):
        raise ValueError("one of chosen and rejected is the beginning of the other")
    if not shared:
        raise ValueError("chosen and rejected without a common prompt")
    return shared


def _stripped(message: Message) -> Message:
    return {key: value.strip() if isinstance(value, str) else value for key, value in message.items()}


def _check(messages: Sequence[Message], rejected: Sequence[Message] | None, learned: Sequence[int]) -> None:
    """Raise a ValueError that says what is wrong with a row's conversation."""
    if not learned:
        weighted = any(message["role"] == "assistant" for message in messages)
        raise ValueError(f"a conversation without a turn of the assistant to learn{' (all weights are 0)' * weighted}")
    check_encoding([*messages, *(rejected or ())])


def check_encoding(said: Sequence[Any]) -> None:
    """Raise a ValueError where texts or messages hold the character that stands for what could not be read."""
    if "\ufffd" in json.dumps(said, ensure_ascii=False, default=str):
        raise ValueError("wrong encoding (the replacement character U+FFFD)")


def leave_out(
    bad: Sequence[BadRow],
    total: int,
    rows: str,
    policy: str | None = None,
    *,
    where: str = "data",
    hint: str = "; data.on_bad_row=skip leaves them out",
) -> None:
    """Print which of `rows`, such as "training rows", are left out.

    Raises:
        UserError: `policy` (`data.on_bad_row`) does not allow it, or none is left: how many of which kind, the first of each
            by number, with the `hint`.
    """
    if not bad:
        return
    allowed = policy == "skip" or (policy is None and len(bad) <= MAX_BAD_SHARE * total)
    if not allowed or len(bad) == total:
        hint = "" if len(bad) == total else hint
        raise UserError(f"{where}: {len(bad)} of {total} rows cannot be used: {describe_bad_rows(bad)}{hint}")
    print_once(f"left out {len(bad)} of {total} {rows}: {describe_bad_rows(bad)}")


def describe_bad_rows(bad: Iterable[BadRow]) -> str:
    """Return "4 chosen equal to rejected (rows 12, 88, 90, …), 1 empty 'rejected' (row 7)"."""
    by_reason: dict[str, list[int]] = defaultdict(list)
    for row in bad:
        by_reason[row.reason].append(row.row)
    reasons = []
    for reason, numbers in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        reasons.append(f"{len(numbers)} {reason} (row{'s' if len(numbers) > 1 else ''} {shown})")
    return ", ".join(reasons)


def tokenize(
    examples: Sequence[Example], template: str, tokenizer: PreTrainedTokenizerBase, *, rejected: bool = False
) -> list[Tokenized]:
    """Tokenize conversations; the turns that are to be learned and their end tokens are, nothing else is.

    As in TRL, prompt and response are tokenized as one text, and a response starts where that diverges from the
    tokenized prompt.

    Args:
        examples: the conversations.
        template: the one they were written under.
        tokenizer: the model's.
        rejected: take the rejected end instead of the chosen one.
    """
    found, batch, size = [], [], 0
    for example in examples:
        written = example.rejected if rejected else example.written
        batch.append(written)
        size += len(written.text) + sum(map(sum, written.spans))
        if size >= BATCH:
            found += _tokenize(batch, tokenizer, template != CHAT)
            batch, size = [], 0
    return found + _tokenize(batch, tokenizer, template != CHAT) if batch else found


def _tokenize(
    batch: Sequence[Written], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> list[Tokenized]:
    encoded = tokenizer([written.text for written in batch], add_special_tokens=add_special_tokens)
    cuts = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if not t.normalized and not t.single_word}
    anchors = [
        _anchors(written.text, encoded[i], cuts) if tokenizer.is_fast and len(written.spans) > 1 else [(0, 0, 0)]
        for i, written in enumerate(batch)
    ]
    ends = [[end for span in written.spans for end in span] for written in batch]
    # From which character to tokenize up to an end of a span, and which token that is: a special token, or the first.
    begins = [[at[bisect_right(at, end, key=itemgetter(1)) - 1] for end in row] for at, row in zip(anchors, ends)]
    parts: dict[bool, list[str]] = {True: [], False: []}
    for written, row, places in zip(batch, ends, begins):
        for end, (first, _, token) in zip(row, places):
            parts[token == 0].append(written.text[first:end])
    ids = {
        whole: iter(tokenizer(texts, add_special_tokens=whole and add_special_tokens)["input_ids"] if texts else [])
        for whole, texts in parts.items()
    }
    found = []
    for all_ids, places in zip(encoded["input_ids"], begins):
        counts = [n + common_prefix(part := next(ids[n == 0]), all_ids[n : n + len(part)]) for _, _, n in places]
        found.append(_label(all_ids, zip(counts[::2], counts[1::2])))
    return found


def _anchors(text: str, encoding: Encoding, cuts: Mapping[int, str]) -> list[tuple[int, int, int]]:
    """Return (start, end, token) of the special tokens in a text, after (0, 0, 0), its beginning.

    A tokenizer cuts a text at these before all else, so what follows one can be tokenized without what stands before.
    """
    whole = [(0, 0, 0)]
    if not encoding.offsets or encoding.offsets[-1][1] == 0:  # a token behind the text, which no part of it would have
        return whole
    places = enumerate(zip(encoding.ids, encoding.offsets))
    return whole + [(a, b, n) for n, (i, (a, b)) in places if n and i in cuts and text[a:b] == cuts[i]]


def _label(ids: list[int], spans: Iterable[tuple[int, int]]) -> Tokenized:
    """Return a conversation's ids, labeled from one token to another."""
    found = Tokenized(array("i", ids), array("i", [-100]) * len(ids))
    for start, end in spans:
        found.labels[start:end] = found.ids[start:end]
    return found


def _preference_rows(examples: Sequence[Example], template: str) -> datasets.Dataset:
    """Return what TRL's DPOTrainer tokenizes as `tokenize` does: templated texts, or messages for "chat"."""
    if template != CHAT:
        return datasets.Dataset.from_list([_texts(example) for example in examples])
    rows, features = [], {side: List(Json()) for side in ("prompt", "chosen", "rejected")}
    for example in examples:
        chosen, rejected, n = example.written.messages, example.rejected.messages, example.prompt
        rows.append({"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]})
    if any(example.options for example in examples):
        features |= {"tools": Json(), "chat_template_kwargs": Json()}
        for row, example in zip(rows, examples):
            row["tools"] = example.options.get("tools")
            row["chat_template_kwargs"] = {key: value for key, value in example.options.items() if key != "tools"}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _texts(example: Example) -> dict[str, str]:
    (start, _), (other, _) = *example.written.spans, *example.rejected.spans
    prompt, chosen = example.written.text[:start], example.written.text[start:]
    return {"prompt": prompt, "chosen": chosen, "rejected": example.rejected.text[other:]}
