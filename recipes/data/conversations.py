"""How a conversation becomes the text a model sees, under a text template or the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_null.recipes.data.templates import CHAT, render
from lora_null.utils.chat import SYSTEM, open_turn, render_chat, thought_of, turn_spans, turn_start, without_end
from lora_null.utils.errors import UserError
from lora_null.utils.values import Message


@dataclass(frozen=True)
class Written:
    """A conversation as text.

    Attributes:
        text: all of it, as the model sees it.
        spans: (start, end) in `text` of what is learned: turns of the assistant, each with its end token.
        messages: the conversation, as the template was given it.
    """

    text: str
    spans: list[tuple[int, int]]
    messages: list[Message]


def check_chat_template(template: str, tokenizer: PreTrainedTokenizerBase, where: str = "data") -> None:
    """Raise a UserError where "chat" is asked of a tokenizer that has no chat template."""
    if template == CHAT and not tokenizer.chat_template:
        raise UserError(f"{where}.template: 'chat' needs a model with a chat template, this one has none; use alpaca")


def write_conversation(
    template: str,
    messages: Sequence[Message],
    learned: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> Written:
    """Write a conversation of which some turns of the assistant are learned.

    Args:
        template: a text template, under which a system's text comes first and the turns follow each other, all with a
            blank line between; or "chat".
        messages: see `as_messages`.
        learned: the indices of the turns that are learned.
        tokenizer: for its end token, and its chat template.
        options: see `chat_options`; only for "chat".

    Raises:
        ValueError: the template cannot write something in it, or "chat" refuses it, with its own message.
    """
    if template == CHAT:
        chat = render_chat(messages, tokenizer, options)
        return Written(chat.text, turn_spans(chat, learned, tokenizer, options), chat.messages)
    text, spans = _write_text(template, messages, tokenizer.eos_token or "", options)
    if messages[-1]["role"] != "assistant":
        raise ValueError("a conversation that does not end with an assistant's turn; data.template=chat may take it")
    return Written(text, [spans[turn] for turn in learned], list(messages))


def write_preference(
    template: str,
    messages: Sequence[Message],
    prompt: int,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> Written:
    """Write a conversation of which all that follows the first `prompt` messages is learned, as TRL's DPOTrainer does.

    Raises:
        ValueError: as `write_conversation`.
    """
    if template == CHAT:
        chat = render_chat(messages, tokenizer, options)
        start = turn_start(chat, prompt, tokenizer, options)
        return Written(chat.text, [(start, len(chat.text))], chat.messages)
    return write_conversation(template, messages, [prompt], tokenizer, options)


def prompt_text(
    template: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] = {}
) -> str:
    """Return the text up to the response to a conversation that ends with a question."""
    if template == CHAT:
        return open_turn(messages, tokenizer, options)
    return _write_text(template, messages, tokenizer.eos_token or "", options)[0]


def _write_text(
    template: str, messages: Sequence[Message], end: str, options: Mapping[str, Any]
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Return a conversation under a text template, and where each turn of the assistant stands in it."""
    first = next((i for i, message in enumerate(messages) if message["role"] not in SYSTEM), len(messages))
    turns = messages[first:]
    _check_writable(turns, options)
    text = "\n\n".join(message["content"].strip() for message in messages[:first] if message.get("content"))
    spans = {}
    for index in range(0, len(turns), 2):
        answer = turns[index + 1]["content"] if index + 1 < len(turns) else None
        question, response = render(template, turns[index]["content"], answer or "")
        text = f"{text}\n\n{question}" if text else question
        if answer is not None:
            start, text = len(text), text + without_end(response, [end] if end else []) + end
            spans[first + index + 1] = start, len(text)
    return text, spans


def _check_writable(turns: Sequence[Message], options: Mapping[str, Any]) -> None:
    """Raise a ValueError where a conversation holds what only a chat template can write."""
    only = "only data.template=chat may have a place for"
    if "tools" in options or any("tool_calls" in message or message["role"] == "tool" for message in turns):
        raise ValueError(f"tools, which {only}")
    other = next((m["role"] for m in turns if m["role"] not in ("user", "assistant")), None)
    if other:
        raise ValueError(f"a turn of the {other} in the midst, which {only}")
    if any(thought_of(message) for message in turns):
        raise ValueError(f"reasoning beside the content, which {only}; data.thinking=drop leaves it out")
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(turns)):
        raise ValueError(f"turns that do not alternate between user and assistant, which {only}")
