"""Conversations through a model's own chat template: the text, and where in it each turn of the assistant stands."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_null.utils.errors import first_line
from lora_null.utils.values import Message, as_messages, chat_options

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks in a template what the assistant says
PYTHON = ("{'", "None")  # what a template writes that prints a dict or a missing value
SYSTEM = ("system", "developer")
PROBE = "an answer"  # rendered to see what a template writes behind one
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what data and templates call thoughts beside the content
# Where a template's generation prompt opens the thought, the answer begins within it.
THINK = re.compile(r"(?:\A|\s*<think>)(?:(?!<think>).)*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Chat:
    """A conversation as the template renders it.

    Attributes:
        text: all of it.
        messages: those that the template was given: the arguments of tools are dicts, or JSON where it wants that.
        blocks: (start, end) in `text` of each {% generation %} block; None where the template has none.
    """

    text: str
    messages: list[Message]
    blocks: list[tuple[int, int]] | None


def conversation_text(value: Any, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as a text to calibrate on, without the token that the tokenizer itself puts before texts.

    Raises:
        ValueError: no conversation, no chat template, or one that refuses it.
    """
    if not tokenizer.chat_template:
        raise ValueError("a conversation, and the model has no chat template")
    text = render_chat(as_messages(value)[0], tokenizer, chat_options(row)).text
    return without_bos(text, tokenizer)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer itself puts its first token before a text."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text that already holds all its special tokens without the one that the tokenizer would put there again."""
    return text.removeprefix(tokenizer.bos_token or "") if adds_bos(tokenizer) else text


def thought_of(message: Message) -> str:
    """Return what a message holds of thoughts beside its content."""
    return next((str(message[key]).strip() for key in THOUGHTS if message.get(key)), "")


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation without the assistant's thoughts, those in its content (<think>…</think>) included.

    Raises:
        ValueError: a turn that is nothing else.
    """
    found = []
    for number, message in enumerate(messages, start=1):
        left = {key: value for key, value in message.items() if key not in THOUGHTS}
        if message["role"] == "assistant" and THINK.search(left.get("content") or ""):
            left["content"] = THINK.sub("", left["content"])
            if not left["content"] and "tool_calls" not in left:
                raise ValueError(f"turn {number}, of the assistant, is nothing but thoughts")
        found.append(left)
    return found


def thoughts_in_content(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation whose thoughts stand in the content, as <think>…</think> before what is said."""
    named = _renamed(messages, "content")
    return [
        new
        if not thought_of(old)
        else new | {"content": f"<think>\n{new['content']}\n</think>\n\n{old.get('content', '')}"}
        for old, new in zip(messages, named)
    ]


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Chat:
    """Render a conversation.

    OpenAI writes the arguments of a tool call as JSON and most templates want a dict, some the JSON; some cannot do with a
    call that has no content; and thoughts beside the content have several names. What the template renders without leaving
    anything out is taken.

    Args:
        messages: see `as_messages`.
        tokenizer: one with a chat template.
        options: see `chat_options`.

    Raises:
        ValueError: the template's own message where it refuses, or what it would leave out.
    """
    problem = ValueError("a conversation without messages")
    for variant in _variants(_as_told(messages, tokenizer, options)):
        try:
            text, blocks = _render(variant, tokenizer, options)
            _check_complete(text, variant, tokenizer, options)
            return Chat(text, variant, blocks)
        except ValueError as error:
            problem = error
    raise problem


def open_turn(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return the text that asks the assistant for its turn after `messages`."""
    return _render(_as_told(messages, tokenizer, options), tokenizer, options, add_generation_prompt=True)[0]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts that a tokenizer reads as control tokens: those it names, and others that its chat template writes.

    The one for what it does not know is among them where it is also the first, the last or the one to pad with (GPT-2's).
    """
    also = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    named = tuple(token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token or token in also)
    return named + _written_by(tokenizer, str(tokenizer.chat_template or ""), named)


@lru_cache(maxsize=4)
def _written_by(tokenizer: PreTrainedTokenizerBase, template: str, named: tuple[str, ...]) -> tuple[str, ...]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(
        token for token in special if token in template and token not in named and token != tokenizer.unk_token
    )


@lru_cache(maxsize=4)
def _ends(tokenizer: PreTrainedTokenizerBase, template: str, special: tuple[str, ...]) -> set[str]:
    """Return what a template writes directly behind an answer, in a last turn or an earlier one, and its end token.

    Any other special token that it knows closes a part of the answer, such as a call or a thought.
    """
    eos = str(tokenizer.eos_token or "")
    ends = {eos} if eos and ("eos_token" in template or eos in template) else set()
    longest_first = sorted(special, key=len, reverse=True)
    token = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    last = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    for messages in (last, [*last, last[0]]):
        try:
            behind = _render(messages, tokenizer, {}, chat_template=template)[0].partition(PROBE)[2]
        except ValueError:
            continue
        if found := token.match(behind):
            ends.add(found[1])
        elif messages is last and re.search(
            r"\w", behind
        ):  # an end that the tokenizer has no token for; no bare quote
            ends.add(behind.strip())
    return ends


def without_end(text: str, ends: Collection[str]) -> str:
    """Return a text without the end tokens that it ends with, and without the whitespace before and behind these."""
    left = text.rstrip()
    while end := next((end for end in ends if left.endswith(end)), ""):
        text = left = left.removesuffix(end).rstrip()
    return text


def _as_told(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[Message]:
    """Return a conversation whose developer is the system, unless the template knows the developer (OpenAI's later name),
    and whose answers do not themselves end with what the template writes behind them."""
    template = tokenizer.get_chat_template(None, options.get("tools"))
    ends = _ends(tokenizer, template, special_tokens(tokenizer))
    told = []
    for message in messages:
        if message["role"] == "developer" and "developer" not in template:
            message = {**message, "role": "system"}
        if message["role"] == "assistant" and message.get("content"):
            message = {**message, "content": without_end(message["content"], ends)}
        told.append(message)
    return told


def turn_spans(
    chat: Chat, learned: Sequence[int], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Return (start, end) in the text of some turns of the assistant, through the token that ends each.

    A template with {% generation %} blocks says it. Any other is asked: the turn begins where the conversation up to
    it, rendered with the generation prompt, ends, and what the turn itself renders to must follow there.

    Raises:
        ValueError: the template renders earlier turns in another way once a conversation goes on, or in part.
    """
    turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if chat.blocks is None:
        spans = [_asked_span(chat, turn, tokenizer, options) for turn in learned]
    elif len(chat.blocks) == len(turns):
        spans = [chat.blocks[turns.index(turn)] for turn in learned]
    elif list(learned) == turns and chat.blocks:
        return chat.blocks
    else:
        raise ValueError("turns that the {% generation %} blocks of the chat template do not tell apart")
    for turn, (start, end) in zip(learned, spans):
        content = chat.messages[turn].get("content", "")
        if "".join(content.split()) not in "".join(chat.text[start:end].split()):
            raise ValueError(f"the chat template leaves out a part of turn {turn + 1}, such as its reasoning")
    return spans


def turn_start(chat: Chat, turn: int, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> int:
    """Return where in the text a turn of the assistant begins: behind the generation prompt.

    The prompt may end in what the answer does not repeat (an empty thought); then the turn begins where they part.
    """
    before, nothing = chat.messages[:turn], ("", tokenizer.bos_token)
    # Behind a question what stands before need not be rendered: there is something.
    begins = all(message["role"] in SYSTEM for message in before)
    if begins and _told(before, tokenizer, options) in nothing:
        return _first_start(chat, turn, tokenizer, options)
    opened = open_turn(before, tokenizer, options)
    if opened not in nothing and chat.text.startswith(opened):
        return len(opened)
    start, told = common_prefix(opened, chat.text), _told(before, tokenizer, options)
    if told in nothing:
        return _first_start(chat, turn, tokenizer, options)
    parts_in_turn = "think>" in opened[start:] if told is None else start >= len(told)
    if not parts_in_turn or not chat.text.startswith(told or ""):
        raise ValueError(_CHANGES)
    return start


def _told(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str | None:
    """Return the text before a turn of the assistant, without what opens it; None where the template refuses to end there."""
    try:
        return _render(messages, tokenizer, options)[0] if messages else ""
    except ValueError:
        return None


def _first_start(chat: Chat, turn: int, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> int:
    """Return where the first turn of a text begins: as far from its end as where a question is put before that turn.

    What a template writes before its first message (a default system text) shows in no conversation without messages. Where
    it writes later turns otherwise too (the system in the first question), the turn's head and content are looked for.
    """
    question = [*chat.messages[:turn], {"role": "user", "content": "?"}]
    asked = [*question, *chat.messages[turn:]]
    told = _told(question, tokenizer, options)
    if told not in ("", tokenizer.bos_token):
        text, _ = _render(asked, tokenizer, options)
        start = turn_start(Chat(text, asked, None), len(question), tokenizer, options)
        if chat.text.endswith(text[start:]):
            return len(chat.text) - len(text[start:])
        head, content = (
            text[start if told is None else len(told) : start],
            chat.messages[turn].get("content", "").strip(),
        )
        written = text[start : text.find(content, start) + len(content)]
        for said in (written, content):
            if content and (at := chat.text.find(head + said)) >= 0:
                return at + len(head)
    raise ValueError("a first turn of the assistant of which the chat template does not show where it begins")


_CHANGES = (
    "turns that the chat template renders otherwise once the conversation goes on, so that they cannot be told apart"
)


def _asked_span(
    chat: Chat, turn: int, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> tuple[int, int]:
    start = turn_start(chat, turn, tokenizer, options)
    if turn == len(chat.messages) - 1:
        return start, len(chat.text)
    through, _ = _render(chat.messages[: turn + 1], tokenizer, options)
    if through[:start] != chat.text[:start]:
        raise ValueError(_CHANGES)
    # What ends a whole conversation (an end token of its own) or stands only in a last turn (an empty thought) is not in
    # the turn once it is an earlier one: what is left of the turn must follow in the text.
    said = through[start:].removesuffix("" if chat.text.startswith(through) else tokenizer.eos_token or "")
    said = next(said[i:] for i in range(len(said) + 1) if chat.text.startswith(said[i:], start))
    if not said:
        raise ValueError(_CHANGES)
    return start, start + len(said)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many characters or tokens two sequences begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], **how: Any
) -> tuple[str, list[tuple[int, int]] | None]:
    template = tokenizer.get_chat_template(how.pop("chat_template", None), options.get("tools"))
    marked = bool(GENERATION.search(template))
    try:
        texts, blocks = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **{**tokenizer.special_tokens_map, "tools": None, **options, **how},
        )
    except Exception as error:  # whatever a template's author lets happen
        reason = first_line(error)
        raise ValueError(f"the chat template refuses it: {reason}") from None
    spans: Any = blocks[0] if marked else None  # transformers calls them strings
    return str(texts[0]), spans


def _variants(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the ways to write tool calls (arguments as a dict or as JSON, with no content or with an empty one) and
    thoughts (under each of their names)."""
    if not any(thought_of(message) for message in messages):
        return _call_variants(messages)
    written = [list(messages), *(_renamed(messages, name) for name in THOUGHTS)]
    return [variant for one in written for variant in _call_variants(one)]


def _renamed(messages: Sequence[Message], name: str) -> list[Message]:
    thoughts = [{name: thought_of(message)} if thought_of(message) else {} for message in messages]
    return [{k: v for k, v in m.items() if k not in THOUGHTS} | thought for m, thought in zip(messages, thoughts)]


def _call_variants(messages: Sequence[Message]) -> list[list[Message]]:
    if not any("tool_calls" in message for message in messages):
        return [list(messages)]
    variants = []
    for empty in (False, True):
        for written in (_as_dict, _as_json):
            variant = copy.deepcopy(list(messages))
            for message in variant:
                if empty:
                    message.setdefault("content", "")
                for call in message.get("tool_calls", ()):
                    function = call.get("function", call)
                    if "arguments" in function:
                        function["arguments"] = written(function["arguments"])
            variants.append(variant)
    return variants


def _as_dict(arguments: Any) -> Any:
    return json.loads(arguments or "{}") if isinstance(arguments, str) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _check_complete(
    text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> None:
    """Raise a ValueError where the template leaves out a turn, a tool or a thought, or writes Python for text."""
    given = json.dumps([list(messages), dict(options)], ensure_ascii=False, default=str)
    template = tokenizer.get_chat_template(None, options.get("tools"))
    if any(word in text and word not in given and word not in template for word in PYTHON):
        raise ValueError("the chat template writes a value of Python where text is meant")
    if thought_of(messages[-1]) not in text:
        raise ValueError("the chat template leaves out the last turn's reasoning")
    plain = all(message["role"] in ("user", "assistant") and "tool_calls" not in message for message in messages)
    if not plain or "tools" in options or not _in_order(text, messages):
        _check_turns(messages, tokenizer, options)


def _in_order(text: str, messages: Sequence[Message]) -> bool:
    at = 0
    for message in messages:
        content = message.get("content", "").strip()
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True


def _check_turns(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Mark the text of every turn, the function of every call and the tools, and see whether the marks come out."""
    marked, options, marks = copy.deepcopy(list(messages)), copy.deepcopy(dict(options)), {}
    for tool in options.get("tools", ()):
        function = tool.get("function", tool)
        if isinstance(function.get("name"), str):
            function["name"] += "toolmark"
            marks["toolmark"] = "the tools"
    for number, message in enumerate(marked, start=1):
        if message.get("content"):
            message["content"] += f" turn{number}mark"
            marks[f"turn{number}mark"] = f"turn {number}, of the {message['role']}"
        for call in message.get("tool_calls", ()):
            call.get("function", call)["name"] += f"call{number}mark"
            marks[f"call{number}mark"] = f"the tool calls of turn {number}"
    text, _ = _render(marked, tokenizer, options)
    for mark, what in marks.items():
        if mark not in text:
            raise ValueError(f"the chat template leaves out {what}")
