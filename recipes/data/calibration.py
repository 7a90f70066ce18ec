"""The texts that a recipe calibrates on, source by source, and the windows that are cut from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lora_null.eval_harness.documents import BadRow
from lora_null.recipes.config.schema import CalibrationSection, CalibrationSource, DataSection
from lora_null.recipes.data.conversations import prompt_text
from lora_null.recipes.data.examples import Example, RowReader, check_encoding, describe_bad_rows, leave_out
from lora_null.recipes.data.formats import detect_format
from lora_null.recipes.data.rows import RowText, load_documents
from lora_null.recipes.data.templates import CHAT
from lora_null.start import MIN_TOKENS
from lora_null.trainer import CalibrationArgs, calibration_windows
from lora_null.trainer.written_texts import beginnings
from lora_null.utils.chat import conversation_text, without_bos
from lora_null.utils.distributed import is_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.limits import position_limit
from lora_null.utils.values import EmptyValue, Message, as_messages, as_text, chat_options, is_conversation

SAMPLES = Path(__file__).parents[1] / "samples"
GENERAL_MIX, PROMPTS = SAMPLES / "general_mix.jsonl", SAMPLES / "prompts.txt"
WITHOUT_CHAT = "qa"  # the template of conversations for a model that has none of its own


@dataclass(frozen=True)
class Source:
    """Texts of one source.

    Attributes:
        title: what they are.
        texts: the texts; None where the model has still to write them.
        prompts: the beginnings after which it writes.
        share: of the windows, between 0 and 1.
        kinds: how many texts there are of each kind, where the rows say it.
    """

    title: str
    texts: list[str] | None
    prompts: list[str]
    share: float
    kinds: dict[str, int]


@dataclass(frozen=True)
class Windows:
    """Calibration windows, lists of token ids, and what they cover, one line per source."""

    ids: list[list[int]]
    covered: list[str]

    def check_tokens(self) -> None:
        """Raise a UserError for fewer tokens than a start can be computed from."""
        tokens = sum(map(len, self.ids))
        if tokens < MIN_TOKENS:
            raise UserError(
                f"calibration: only {tokens} tokens, at least {MIN_TOKENS} are needed; give more texts or samples"
            )


def calibration_sources(
    section: CalibrationSection,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example] = (),
    template: str = "",
) -> list[Source]:
    """Return the sources with their texts, as far as these can be had without the model.

    Args:
        section: the recipe's.
        tokenizer: the model's.
        examples: the training rows, for what the model writes after their prompts.
        template: theirs.

    Raises:
        UserError: as `load_documents`, a missing field, a row whose field is no text, by number, or training rows that have
            no prompts.
    """
    whole = sum(source.weight for source in section.each)
    found = []
    for number, entry in enumerate(section.each):
        where = f"calibration.sources.{number}" if section.sources else "calibration"
        texts, kinds, prompts = None, {}, []
        if entry.source == "self":
            prompts = _prompts(str(entry.self), tokenizer, examples, template, where)
        else:
            texts, kinds = _texts(entry, tokenizer, where)
        found.append(Source(entry.title, texts, prompts, entry.weight / whole, kinds))
    return found


def window_args(
    section: CalibrationSection, seed: int, config: PreTrainedConfig, key: str = "calibration.max_length"
) -> CalibrationArgs:
    """Return how a section's windows are cut.

    Args:
        section: the recipe's.
        seed: where the section has none.
        config: the model's, whose positions the windows fit in; see `CalibrationArgs.fitting`.
        key: what their length is called where it was set.
    """
    own = seed if section.seed is None else section.seed
    asked = CalibrationArgs(section.samples, section.max_length, section.mode, own)
    return asked.fitting(position_limit(config), key)


def cut_windows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    args: CalibrationArgs,
    write: Callable[[Source, int], list[str]] | None = None,
) -> Windows:
    """Cut every source's share of the windows from its texts; what the model writes is never packed, or is left out.

    Args:
        sources: where from.
        tokenizer: the model's.
        args: how the windows of all sources together are cut.
        write: returns texts that the model writes itself, as many as are asked for; see `caches.written_windows`. None leaves them out.

    Raises:
        UserError: as `calibration_windows`; a source without a share, or with nothing to write after.
    """
    windows, covered = [], []
    for source, count in zip(sources, shares([source.share for source in sources], args.samples)):
        if not count:
            raise UserError(f"calibration.samples: {args.samples} windows leave none for {source.title}")
        texts, mode = source.texts, args.mode
        if texts is None:
            if write is None:
                beginnings(tokenizer, source.prompts, args.max_length)
                continue
            texts, mode = write(source, count), "separate"
        cut = calibration_windows(texts, tokenizer, CalibrationArgs(count, args.max_length, mode, args.seed))
        kinds = ", ".join(f"{n} {kind}" for kind, n in source.kinds.items())
        tokens = sum(map(len, cut))
        missing = "" if len(cut) == count else f" of {count}"
        full = sum(len(ids) == args.max_length for ids in cut) if mode == "separate" else 0
        long = f", {full} of them up to max_length" if full else ""
        covered.append(
            f"{source.title}: {len(cut)}{missing} windows, {tokens:,} tokens{long}" + f" ({kinds})" * bool(kinds)
        )
        windows += cut
    return Windows(windows, covered)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to the weights that add up to `total`: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _texts(
    section: CalibrationSource, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[str], dict[str, int]]:
    """Return the texts of a path or of the general mix, and how many there are of each kind.

    A row without text is left out, and up to 1% of those that cannot be used, which is said.

    They are one field of each row, a template filled with several, or what is found out: a conversation, which the
    model's chat template writes, a question with its answer, which is a conversation too, or a text. Where the model has
    no chat template, a conversation that was found out is written as questions and answers.
    """
    path = str(GENERAL_MIX) if section.source == "general" else str(section.path)
    documents = load_documents(
        path, subset=section.subset, split=section.split, where=where, keep_bad=True, limit=section.limit
    )
    last = math.inf if section.limit is None else section.limit
    texts: list[str] = []
    kinds: Counter[str] = Counter()
    bad = [row for row in documents.bad if row.row <= last]
    empty = 0
    if not documents.rows:
        raise UserError(f"{where}: no row can be used: {describe_bad_rows(bad)}")
    text_of = _reader(section, documents.columns, documents.rows, tokenizer, where)
    for number, row in zip(documents.numbers, documents.rows):
        if number > last:  # rows count as training and evaluation count them, those that are left out too
            break
        try:
            text = without_bos(text_of(row), tokenizer)
            check_encoding([text])
        except EmptyValue:
            text = ""
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
            continue
        empty += not text
        if text:
            texts.append(text)
            kinds[row.get("kind", "")] += section.source == "general"
    if empty and is_first_process():
        print(f"{empty} of {empty + len(texts) + len(bad)} rows of {where} hold no text")
    leave_out(bad, len(texts) + len(bad), f"rows of {where}", where=where, hint="")
    return texts, {kind: count for kind, count in kinds.items() if count}


def _reader(
    section: CalibrationSource,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> Callable[[Mapping[str, Any]], str]:
    """Return what makes the text of a row."""
    if section.template is None and section.field is None:
        found = detect_format(rows, columns, f"{where}.path").keys
        if "text" in found:
            if not section.answers:
                raise UserError(f"{where}.answers: false goes with conversations and questions, these rows are texts")
            return lambda row: as_text(row.get(found["text"]))
        data, preferences = DataSection(path=where, **found), "rejected" in found
        reader = RowReader(data, columns, where, preferences=preferences, first=rows[0])
        return lambda row: _found_text(row, reader, tokenizer, section.answers)
    key = f"{where}.{'field' if section.template is None else 'template'}"
    if not section.answers and not any(is_conversation(row.get(section.field or "")) for row in rows):
        raise UserError(f"{where}.answers: false goes with conversations and questions, {section.field!r} is text")
    field = RowText(str(section.field if section.template is None else section.template), columns, key, answer=True)

    def text_of(row: Mapping[str, Any]) -> str:
        if field.is_field and is_conversation(row.get(field.spec)):
            if section.answers:
                return conversation_text(row[field.spec], row, tokenizer)
            return _conversation_text(as_messages(row[field.spec])[0], row, tokenizer, answers=False)
        return field.text(row)

    return text_of


def _found_text(row: Mapping[str, Any], reader: RowReader, tokenizer: PreTrainedTokenizerBase, answers: bool) -> str:
    conversation = reader.data.messages
    if conversation is not None and row.get(conversation) is None and isinstance(row.get("text"), str):
        return row["text"]  # the general mix holds texts beside conversations
    if not answers and conversation is None and row.get(reader.data.response) in (None, ""):
        row = {**row, reader.data.response: "-"}  # which is left out as any other answer
    return _conversation_text(reader.messages(row)[0], row, tokenizer, answers=answers)


def _conversation_text(
    messages: list[Message], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, answers: bool
) -> str:
    """Return a conversation as the model sees it, through its last answer or up to where that begins."""
    if answers and tokenizer.chat_template:
        return conversation_text(messages, row, tokenizer)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    said, options = messages if answers else messages[:last], chat_options(row)
    return without_bos(
        prompt_text(CHAT if tokenizer.chat_template else WITHOUT_CHAT, said, tokenizer, options), tokenizer
    )


def _prompts(
    kind: str, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: str, where: str
) -> list[str]:
    """Return the beginnings after which the model writes; for "bos" none."""
    if kind == "bos":
        return []
    if kind == "prompts":
        lines = [line.strip() for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        asked = [line for line in lines if line and not line.startswith("#")]
        return [
            _conversation_text([{"role": "user", "content": line}], {}, tokenizer, answers=False) for line in asked
        ]
    starts = [(example.written.text, example.written.spans[0][0]) for example in examples if example.written.messages]
    if not starts:
        raise UserError(f"{where}.self: there are no prompts in data to write after; use self: prompts or bos")
    texts = list(dict.fromkeys(text[:start] for text, start in starts))
    return [without_bos(text, tokenizer) if template == CHAT else text for text in texts]
