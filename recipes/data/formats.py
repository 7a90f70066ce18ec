"""Find out what the rows of a data set are: conversations, prompts and responses, preference pairs, or plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_null.utils.errors import UserError
from lora_null.utils.values import KNOWN, as_conversation, as_text, is_conversation, messages_in

INSPECTED_ROWS = 50
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "task", "user", "input", "text", "q")
PROMPTS += ("article", "document", "content", "body", "passage", "sentence")  # what is answered or summed up
RESPONSES = ("response", "completion", "answer", "answers", "output", "solution", "reply", "assistant", "target")
RESPONSES += ("code", "a", "summary", "highlights")
WORKED = ("response", "completion", "solution")  # what is learned before a short answer beside it
PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("preferred", "rejected"))
TEXTS = ("text", "content", "document", "body", "passage", "sentence")
SYSTEMS = ("system", "system_prompt")
NEITHER_PROMPT_NOR_RESPONSE = (*SYSTEMS, "", "unnamed: 0", "id", "idx", "index", "uuid", "source")
SAID_BY = ("role", "from", "sender", "speaker", "author")  # of a single turn, where they hold roles
METADATA_COLUMNS = (*SAID_BY[1:], "to", "name", "user", "username")  # who, when and where, beside a text
METADATA_COLUMNS += ("date", "time", "timestamp", "datetime", "created_at")
METADATA_COLUMNS += ("file", "filename", "path", "folder", "url")


@dataclass(frozen=True)
class Format:
    """How the rows of a data set are written.

    Attributes:
        name: in words.
        keys: what the recipe's section `data` says of it: `messages`; `prompt` and `response`, with `rejected` for
            pairs; or `text`; and `system`, where there is a field of that.
        preferences: whether they are pairs of a chosen and a rejected response.
    """

    name: str
    keys: dict[str, Any]
    preferences: bool = False


def detect_format(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> Format:
    """Return the format of rows by the names and the types of their fields.

    Args:
        rows: of which the first are looked at.
        columns: the fields that any row has.
        where: the option or key that named them, for messages.

    Raises:
        UserError: none that is known; it names the fields.
    """
    fields = {name.lower(): name for name in columns}
    conversations = {name for name in columns if any(is_conversation(row.get(name)) for row in rows[:INSPECTED_ROWS])}
    pair = next((pair for pair in PAIRS if fields.keys() >= set(pair)), None)
    asking = {name.lower(): name for name in askable(columns, rows)}
    found = _preferences(asking, conversations) or _conversation(fields, conversations, rows) or _answered(asking)
    found = found or (
        _messages(next(iter(conversations)), rows) if len(conversations) == 1 else _text(fields, rows, pair)
    )
    if found is None and pair is not None:
        raise UserError(
            f"{where}: {' and '.join(pair)} are texts without a prompt; what both begin with belongs into a field of its own, "
            "such as prompt"
        )
    listed = f"{where}: the fields {', '.join(columns)} are no conversation"
    if found is None and _are_turns(fields, rows):
        raise UserError(f'{listed}; if each row is a turn of one, put its turns into one row: {{"messages": [...]}}')
    if found is None:
        raise UserError(
            f"{listed}, prompt and response, or text that is known; "
            "rename them, or name them in a recipe (data.prompt, data.response, data.text)"
        )
    keys, system = found.keys, _first(SYSTEMS, fields)
    name = " ".join(found.name.split())  # a field's name may hold line breaks
    if system is not None and "text" not in keys:
        name, keys = f"{name}, with system texts", {**keys, "system": system}
    return Format(name, keys, found.preferences)


def askable(columns: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns without a `context` that is no text, such as a list of passages."""
    return [n for n in columns if n.lower() != "context" or all(_is_text(row.get(n)) for row in rows[:INSPECTED_ROWS])]


def _first(names: Sequence[str], fields: Mapping[str, str]) -> str | None:
    return next((fields[name] for name in names if name in fields), None)


def _preferences(fields: Mapping[str, str], conversations: set[str]) -> Format | None:
    for chosen, rejected in PAIRS:
        if chosen in fields and rejected in fields:
            conversation = _first([name for name in CONVERSATIONS if fields.get(name) in conversations], fields)
            asked = _first(PROMPTS, fields)
            prompt = asked if asked in conversations else _prompt(fields) or conversation
            keys = {"prompt": prompt, "response": fields[chosen], "rejected": fields[rejected]}
            if keys["prompt"] is None and keys["response"] not in conversations:
                return None
            return Format("preference pairs", keys, preferences=True)
    return None


def _conversation(
    fields: Mapping[str, str], conversations: set[str], rows: Sequence[Mapping[str, Any]]
) -> Format | None:
    name = _first([name for name in CONVERSATIONS if fields.get(name) in conversations], fields)
    prompt, response = (
        _first([n for n in names if fields.get(n) in conversations], fields) for names in (PROMPTS, RESPONSES)
    )
    if name is None and prompt and response:
        return Format("prompts and responses of messages", {"prompt": prompt, "response": response})
    return _messages(name, rows) if name else None


def _messages(name: str, rows: Sequence[Mapping[str, Any]]) -> Format:
    values = (as_conversation(row.get(name)) for row in rows)
    value = next(value for value in values if is_conversation(value))
    turns = messages_in(value)
    first = turns if isinstance(turns, Mapping) else turns[0]
    return Format("messages" if "role" in first else "ShareGPT conversations", {"messages": name})


def question_and_answer(
    columns: Iterable[str], prompt: str | None = None, response: str | None = None
) -> dict[str, str] | None:
    """Return `prompt` and `response`: those that are given, else the fields with a usual name; None where one is missing."""
    fields = {name.lower(): name for name in columns}
    response = response or _first([name for name in RESPONSES if fields.get(name) != prompt], fields)
    prompt = prompt or _prompt({name: column for name, column in fields.items() if column != response})
    return {"prompt": prompt, "response": response} if prompt and response else None


def _prompt(fields: Mapping[str, str]) -> str | None:
    """Return the field that asks, with the one that holds its input or what it asks about; None where there is none."""
    asked = _first(PROMPTS, fields)
    if {"instruction", "input"} <= fields.keys():
        return f"{{{fields['instruction']}}}\n\n{{{fields['input']}}}"
    return f"{{{fields['context']}}}\n\n{{{asked}}}" if asked and "context" in fields else asked


def _answered(fields: Mapping[str, str]) -> Format | None:
    keys = question_and_answer(fields.values(), response=_first(WORKED, fields))
    if keys is None:
        return None
    asked = (
        keys["prompt"] if keys["prompt"] in fields.values() else ", ".join(re.findall(r"\{(.*?)\}", keys["prompt"]))
    )
    return Format(f"{asked} and {keys['response']}", keys)


def _text(fields: Mapping[str, str], rows: Sequence[Mapping[str, Any]], pair: tuple[str, str] | None) -> Format | None:
    """Return plain text, also beside who, when and where; or, of two fields with names that say nothing, prompt and response.

    None for rows that are single messages, whose text is a turn.
    """
    if _are_turns(fields, rows):
        return None
    name = _first(TEXTS, fields)
    texts = [name for name in fields.values() if all(_is_text(row.get(name)) for row in rows[:INSPECTED_ROWS])]
    may_be_pair = pair is None and not any(
        name in NEITHER_PROMPT_NOR_RESPONSE or name.endswith("_id") for name in fields
    )
    # not user and note, but user and bot
    may_be_pair = may_be_pair and (fields.keys() <= KNOWN.keys() or fields.keys().isdisjoint(METADATA_COLUMNS))
    if name is None and len(fields) == len(texts) == 2 and may_be_pair:  # of a pair the second is not to be learned
        return Format(f"{texts[0]} and {texts[1]}", {"prompt": texts[0], "response": texts[1]})
    rest = [column for name, column in fields.items() if name not in METADATA_COLUMNS] or list(fields.values())
    name = name or (rest[0] if len(rest) == 1 and rest[0] in texts else None)
    return Format("plain text", {"text": name}) if name else None


def _are_turns(fields: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each row is a single message: it has a role, or the names of roles stand where it says who speaks."""
    who = _first(SAID_BY, fields)
    said_by = {str(row.get(who)).lower() for row in rows[:INSPECTED_ROWS]}
    return "role" in fields or (who is not None and said_by <= KNOWN.keys())


def _is_text(value: Any) -> bool:
    try:
        return isinstance(as_text(value), str)
    except ValueError:
        return False
