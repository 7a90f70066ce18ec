"""What a value of a data set means: a text, or the messages of a conversation. What is neither is refused with the reason.

The one boundary for training rows, calibration texts, evaluation documents and arguments in Python. Decided by type:

    str                       itself
    int, float, Decimal       its digits; NaN and infinity are refused
    None                      the empty text (a field that a row does not have)
    list of the above         the single text it holds; where an answer is meant, the first of several accepted ones
    {"text": …}, {"value": …} where an answer is meant: SQuAD's and TriviaQA's
    list of messages          a conversation: {"role", "content"} (OpenAI, TRL) or {"from", "value"} (ShareGPT)
    {"messages": […]}         the same, with its tools beside it (OpenAI's pairs)
    a list of messages as text  the same, in JSON, or as Python or NumPy prints it where that can be read
    all else                  refused: truth values, bytes, dates, other dicts, lists in lists
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

ROLES = {  # the names that chat templates know, and others in small letters; any other role stays as it is
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response"),
}
KNOWN = {name: role for role, names in ROLES.items() for name in names}
CALLS = ("function_call", "tool_call")  # roles of LLaMA-Factory and ms-swift: the call stands where the text does
OPTIONS = ("tools", "functions", "chat_template_kwargs")  # what a chat template gets of a row beside the messages
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
# what a message holds beside its content, as Open WebUI, Ollama and others write it
HELD = ("files", "attachments", "experimental_attachments", "image", "images", "audio", "audios", "video", "videos")
ANSWERS = ({"text", "answer_start"}, {"value", "aliases"})  # keys of SQuAD's and TriviaQA's dicts of accepted answers
STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# What NumPy and pandas print other than Python: array([…], dtype=object), and no comma between two strings or dicts.
ARRAYS = re.compile(
    rf"({STRING})(\s+(?=['\"]))?|(\}})(\s+(?=\{{))|(\\.)|\barray\((?=\[)|(?<=\])(?:,\s*dtype=\w+)?\)", re.DOTALL
)
PRINTED = re.compile(r"\s*(?:\[\s*)?\{\s*'")  # a dict, or a list that begins with one, as Python prints it
PRINTED_MESSAGES = re.compile(r"\s*\[\s*\{'(role|from|content|value)'\s*:")  # even where they cannot be read
HALF = "half a character (a lone surrogate)"  # what no tokenizer takes
WEIGHTS = ("weight", "loss", "train")  # OpenAI's name of whether a turn is learned, ms-swift's and Axolotl's
Message = dict[str, Any]


class EmptyValue(ValueError):
    """A field of a row that is there and holds nothing."""


class TextOfList(str):
    """A cell of a csv that is written as a list of texts: itself where a text is meant, one of them where an answer is."""

    items: list[str]

    def __new__(cls, text: str, items: list[str]) -> TextOfList:
        self = super().__new__(cls, text)
        self.items = items
        return self

    def __getnewargs__(self) -> tuple[str, list[str]]:  # for copies
        return str(self), self.items


def as_text(value: Any, *, answer: bool = False) -> str:
    """Return the text that a value stands for; see the table above.

    Args:
        value: a field of a row.
        answer: an answer is meant, so that of several accepted ones the first is taken.

    Raises:
        ValueError: why it is no text, to be put behind the field's name: "is a dict, not text".
    """
    value = value.items if answer and isinstance(value, TextOfList) else _plain(value)
    if answer and isinstance(value, Mapping):
        value = _plain(next((value[key] for key in ("text", "value") if key in value), value))
    if isinstance(value, list | tuple):
        texts = [_scalar(item, "holds ") for item in value]
        if not answer and len(set(texts)) > 1:
            of = "texts" if any(isinstance(_plain(item), str) for item in value) else "numbers"
            raise ValueError(f"is a list of several {of}, not one text")
        return texts[0] if texts else ""
    return _scalar(value, "is ")


def _plain(value: Any) -> Any:
    """Return arrays and scalars of NumPy and torch as lists and numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _scalar(value: Any, verb: str) -> str:
    value = _plain(value)
    if isinstance(value, str) and (PRINTED_MESSAGES.match(value) or _from_print(value) is not value):
        what = "answers" if "'answer_start'" in value or "'aliases'" in value else "messages"
        raise ValueError(f"{verb}{what} as Python prints them, not text; write them as JSON")
    if value is None or isinstance(value, str):
        return str(value or "")
    if isinstance(value, Real | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{verb}{'NaN' if math.isnan(value) else 'infinite'}, not text")
        return str(value)
    raise ValueError(f"{verb}a {type(value).__name__}, not text")


def is_conversation(value: Any) -> bool:
    """Whether a value is meant as messages: a dict with a role, a list that begins with one, or a dict that holds such.

    As text it is a list alone, of messages that say something: one dict may well be an answer in JSON.
    """
    written = isinstance(value, str)
    value = messages_in(as_conversation(value))
    first = value[0] if isinstance(value, list | tuple) and value else None if written else value
    if not isinstance(first, Mapping) or not {"role", "from"} & first.keys():
        return False
    return not written or bool({"content", "value", "tool_calls"} & first.keys())


def messages_in(value: Any) -> Any:
    """Return what a dict holds as `messages`, or the value itself."""
    value = _plain(value)
    has_messages = isinstance(value, Mapping) and value.get("messages") is not None
    return _plain(value["messages"]) if has_messages else value


def as_conversation(value: Any) -> Any:
    """Return a conversation that a file holds as text, as a csv must, as what it says; anything else as it is.

    The text is JSON, or what Python or NumPy prints of it, as pandas writes into a csv.
    """
    if not isinstance(value, str) or not is_written(value):
        return value
    found = _from_json(value)
    return _from_print(value) if found is value else found


def is_written(text: str) -> bool:
    """Whether a text begins as a list or a dict does that was written as text."""
    return text.lstrip().startswith(("[", "{"))


def as_written(text: str) -> Any:
    """Return the list or dict that a cell of a csv stands for, in JSON or as Python or NumPy prints it; else the text itself.

    These are lists of texts, messages, their parts, and SQuAD's and TriviaQA's dicts of accepted answers. Any other dict may
    well be an answer, and a list of numbers too.
    """
    found = _from_json(text)
    found = _literal(text) if found is text else found
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return TextOfList(text, found)
    return found if _is_meant(found) or is_conversation(text) else text


def _from_print(text: str) -> Any:
    """Return the messages, parts or accepted answers of which a text is what Python or NumPy prints; else the text itself."""
    found = _literal(text) if PRINTED.match(text) else text
    return found if _is_meant(found) or PRINTED_MESSAGES.match(text) else text


def _is_meant(value: Any) -> bool:
    """Whether a list or dict is one of messages, of their parts, or of accepted answers."""
    if isinstance(value, Mapping) and (
        isinstance(messages_in(value), list) or any(k <= value.keys() for k in ANSWERS)
    ):
        return True
    found = value if isinstance(value, list) else [value]
    return bool(found) and (all(map(_is_message, found)) or all(map(_is_part, found)))


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"content", "value", "tool_calls", "function_call"} & value.keys():
        return False
    return str(value.get("role", value.get("from"))).lower() in (*KNOWN, *CALLS)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("type") in TEXT_PARTS and "text" in value


def _literal(text: str) -> Any:
    """Return what a text is that Python, NumPy or pandas prints; the text where it cannot be read."""
    plain = ARRAYS.sub(lambda it: (it[1] or it[3] or it[5] or "") + ("," if it[2] or it[4] else ""), text.strip())
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("error")  # of an escape that Python never prints
        return ast.literal_eval(plain)
    return text


def as_messages(value: Any) -> tuple[list[Message], list[bool]]:
    """Return a conversation in the one form that chat templates read, and which of its turns are learned.

    Args:
        value: a list of messages, a single one, or a dict with `messages`; or any of these as JSON text. A message has
            a role and a text (a string, a number, or parts of which all are text), or calls of tools instead of it, and
            may have a `weight` (or `loss`, `train`): 0 for an assistant's turn that is not learned. Its other keys are
            left to the chat template, those that hold None are not.

    Returns:
        Messages {"role", "content"?, "tool_calls"?, …}, and for each whether it is learned: the assistant's are.

    Raises:
        ValueError: why it is no conversation.
    """
    value = messages_in(as_conversation(_plain(value)))
    value = [value] if isinstance(value, Mapping) else value
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"a conversation that is a {type(value).__name__}, not a list of messages")
    if not value:
        raise EmptyValue("a conversation without turns")
    messages = [_message(message) for message in value]
    return messages, [_weight(message) for message in messages]


def _message(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise ValueError(f"a conversation with a {type(given).__name__} among its messages")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if not isinstance(role, str):
        raise ValueError("a message without role")
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if role.lower() in CALLS:
        role, content, message["tool_calls"] = "assistant", None, content
    if "function_call" in message:
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    role = KNOWN.get(role.lower(), role)
    if attached := next((key for key in HELD if _plain(message.get(key))), None):
        raise ValueError(f"a turn of the {role} with {attached!r} beside its content; only text can be learned")
    calls = _tool_calls(message.pop("tool_calls", None))
    content, thought = _thought_parts(_plain(content))
    if thought:
        message.setdefault("reasoning_content", thought)
    text = _content(content, role)
    if not {"content", "value"} & given.keys() and not calls and not thought and role not in ("user", "assistant"):
        raise ValueError(f"a turn of the {role} without content (its keys: {', '.join(map(str, given))})")
    if not text.strip() and not calls and role in ("user", "assistant"):
        raise ValueError(f"an empty turn of the {role}")
    said = {"role": role} | ({} if content is None else {"content": text}) | ({"tool_calls": calls} if calls else {})
    return said | {key: value for key, value in message.items() if key != "from"}


def _thought_parts(content: Any) -> tuple[Any, str]:
    """Return content in parts without those that are thoughts, and these."""
    if not isinstance(content, list | tuple):
        return content, ""
    thoughts = [part for part in content if isinstance(part, Mapping) and part.get("type") in THOUGHT_PARTS]
    texts = [next((part[k] for k in ("thinking", "reasoning", "text") if k in part), None) for part in thoughts]
    if not thoughts or not all(isinstance(text, str) for text in texts):
        return content, ""
    return [part for part in content if part not in thoughts], "".join(texts)


def _content(content: Any, role: str) -> str:
    """Return a message's text; of content in parts, all its parts in a row."""
    content = _plain(content)
    if not isinstance(content, list | tuple):
        try:
            return _scalar(content, "is ")
        except ValueError as error:
            raise ValueError(f"a turn of the {role} whose content {error}") from None
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            found = f"of type {kind!r}" if isinstance(part, Mapping) else f"that is a {type(part).__name__}"
            raise ValueError(f"a turn of the {role} with a part {found}; only text can be learned")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    calls = _from_json(_plain(calls))
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    for call in calls if isinstance(calls, list | tuple) else (None,):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("tool_calls without the name of a function")
        if not isinstance(_from_json(function.get("arguments") or {}), Mapping):
            raise ValueError("a tool call whose arguments are no JSON object")
    return [_wrapped(call) for call in calls]


def _from_json(value: Any) -> Any:
    """Return what a string holds as JSON, or the value itself."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _weight(message: Message) -> bool:
    """Pop a message's `weight`, `loss` and `train` keys; return whether the loss counts its turn."""
    role, given = message["role"], {key: message.pop(key, None) for key in WEIGHTS}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise ValueError(f"a {key} of {value!r}; a turn is learned (1) or not (0)")
        if value and role != "assistant":
            raise ValueError(f"a {key} of {value!r} on a turn of the {role}; only the assistant's are learned")
    return all(given.values()) and role == "assistant"


def as_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the schemas of a row's tools, given as a list or as JSON; None where there are none.

    Raises:
        ValueError: they are something else.
    """
    tools = _from_json(_plain(value))
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list | tuple) else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("'tools' is no list of schemas")
    return [_wrapped(tool) for tool in tools]


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool or a call with its function under "function", as chat templates read it."""
    if "name" not in tool or "function" in tool or tool.get("type", "function") != "function":
        return dict(tool)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def chat_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row gives its chat template beside the messages: `tools`, and TRL's `chat_template_kwargs`.

    The tools are the row's, or stand beside the messages in one of its fields; `functions` are OpenAI's former name.

    Raises:
        ValueError: they are of the wrong kind.
    """
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise ValueError("'chat_template_kwargs' is no dict")
    beside = (value for value in row.values() if isinstance(value, Mapping) and "messages" in value)
    tools = next(filter(None, map(_tools_of, (row, *beside))), None)
    return {**options, **({} if tools is None else {"tools": tools})}


def _tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if tools := as_tools(row.get("tools")):
        return tools
    with contextlib.suppress(ValueError):  # other things are called functions too
        tools = as_tools(row.get("functions")) or []
        return tools if all("function" in tool for tool in tools) else None
    return None
