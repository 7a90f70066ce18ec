"""Chats as ChatGPT and Claude export them, turn by turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_null.utils.values import is_conversation

SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant"}  # in exported chats, and their roles here
SHOWN = ("text", "multimodal_text")  # what ChatGPT shows as text
# what Claude writes in the place of a tool's call
UNSHOWN = re.compile(r"(?:```\s*)?This block is not supported on your current device yet\.(?:\s*```)?")


def is_export(path: Path) -> bool:
    """Whether a file holds chats as ChatGPT or Claude exports them, by how it begins."""
    with path.open("rb") as file:
        start = file.read(2**16)
    return path.suffix.lower() == ".json" and (b'"mapping"' in start or b'"chat_messages"' in start)


def exported_turns(entry: dict[str, Any]) -> list[tuple[Any, str]] | None:
    """Return (who, text) of each turn of a chat as ChatGPT or Claude exports it, "" for what is not shown; None for other rows."""
    turns = entry.get("chat_messages")
    if isinstance(turns, list) and not is_conversation(turns):
        turns = [_dict(turn) for turn in turns]
        # `text` has a note in the place of each tool, `content` in parts has none
        return [
            (turn.get("sender"), _text(turn.get("content"), "text") or _text([turn.get("text")])) for turn in turns
        ]
    tree, name, found = entry.get("mapping"), entry.get("current_node"), []
    if not isinstance(tree, dict) or "current_node" not in entry:
        return None
    while isinstance(name, str) and name in tree and len(found) < len(tree):  # the way up from the last message shown
        message, name = _dict(_dict(tree[name]).get("message")), _dict(tree[name]).get("parent")
        content, notes = _dict(message.get("content")), _dict(message.get("metadata"))
        is_shown = content.get("content_type") in SHOWN and not notes.get("is_visually_hidden_from_conversation")
        is_shown = is_shown and message.get("recipient") in ("all", None)  # others are tools
        found.append((_dict(message.get("author")).get("role"), _text(content.get("parts")) if is_shown else ""))
    return found[::-1]


def joined_messages(turns: Iterable[tuple[Any, str]]) -> list[dict[str, str]]:
    """Return the messages of a chat through its last answer, turns of one speaker joined; none where no question has one."""
    messages: list[dict[str, str]] = []
    for role, text in ((SPEAKERS.get(str(who)), text) for who, text in turns):
        if role and text and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        elif role and text:
            messages.append({"role": role, "content": text})
    messages = messages[:-1] if messages and messages[-1]["role"] == "user" else messages
    return messages if len(messages) > 1 else []


def _text(parts: Any, kind: str | None = None) -> str:
    """Return the texts among the parts of a turn, of one kind alone where it is given."""
    parts = parts if isinstance(parts, list) else []
    found = [
        _dict(part).get("text") if isinstance(part, dict) else part
        for part in parts
        if kind in (None, _dict(part).get("type"))
    ]
    return "\n\n".join(text for part in found if isinstance(part, str) and (text := UNSHOWN.sub("", part).strip()))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
