"""Chats as ChatGPT and Claude export them, turn by turn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_null.utils.values import is_conversation

SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant"}  # in exported chats, and their roles here
SHOWN = ("text", "multimodal_text")  # what ChatGPT shows as text
# how Claude comes to its answer
WORK = ("thinking", "redacted_thinking", "tool_use", "tool_result", "token_budget", "flag")
CREATED = ("artifacts", "create_file", "present_files", "canmore")  # tools whose results are shown beside the chat
# what Claude writes in the place of a tool's call
UNSHOWN = re.compile(r"(?:```\s*)?This block is not supported on your current device yet\.(?:\s*```)?")
# what ChatGPT shows by its name, and the marks of its citations, of which the older ones are like 【4†source】
NAMED = re.compile(
    '\ue200(?:entity\ue202\\["[^"]*",\\s*"([^"]*)"|(?:url|link_title)\ue202([^\ue201\ue202]*))[^\ue201]*\ue201'
)
CITED = re.compile("[ \t]*(?:\ue200[^\ue201]*\ue201|【[^】†]*†[^】]*】)|[\ue200-\ue20f]")


@dataclass(frozen=True)
class Turn:
    """What a turn of an exported chat shows.

    Attributes:
        role: of who speaks; None for a tool, and for what is hidden.
        text: its text, a document's that was attached to it too.
        held: what it holds that is no text, such as "image"; "" for nothing.
    """

    role: str | None
    text: str = ""
    held: str = ""


def is_export(path: Path) -> bool:
    """Whether a file holds chats as ChatGPT or Claude exports them, by how it begins."""
    with path.open("rb") as file:
        start = file.read(2**16)
    return path.suffix.lower() == ".json" and (b'"mapping"' in start or b'"chat_messages"' in start)


def exported_turns(entry: Mapping[str, Any]) -> list[Turn] | None:
    """Return the turns up to the last one of a chat as ChatGPT or Claude exports it; None for other rows."""
    turns, tree = entry.get("chat_messages"), entry.get("mapping")
    if isinstance(turns, list) and not is_conversation(turns):
        return list(map(_claude_turn, _shown_last(_dicts(turns))))
    if not isinstance(tree, dict) or "current_node" not in entry:
        return None
    return [_chatgpt_turn(_dict(node.get("message"))) for node in _branch(tree, entry["current_node"], "parent")]


def joined_messages(turns: Iterable[Turn]) -> tuple[list[dict[str, str]], str]:
    """Return the messages of a chat through its last answer, turns of one speaker joined, and what ends it early.

    No message where no question has an answer. What ends it is what a turn holds besides text, or "blank" for a question
    without a text: what follows cannot be learned without it. "" where all is read.
    """
    messages: list[dict[str, str]] = []
    held = ""
    for turn in turns:
        last = messages[-1]["role"] if messages else None
        held = turn.held or ("blank" if turn.role == "user" != last and not turn.text else "")
        if held:
            messages = messages[:-1] if last == "assistant" and turn.role != "user" else messages  # half an answer
            break
        if turn.role and turn.text and last == turn.role:
            messages[-1]["content"] += f"\n\n{turn.text}"
        elif turn.role and turn.text:
            messages.append({"role": turn.role, "content": turn.text})
    messages = messages[:-1] if messages and messages[-1]["role"] == "user" else messages
    return messages if len(messages) > 1 else [], held


def _branch(nodes: Mapping[str, Any], last: Any, above: str) -> list[dict[str, Any]]:
    """Return the way down to the last message shown; `above` is the key of each that names the one above."""
    found: list[dict[str, Any]] = []
    while isinstance(last, str) and last in nodes and len(found) < len(nodes):
        found.append(_dict(nodes[last]))
        last = found[-1].get(above)
    return found[::-1]


def _shown_last(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the turns of a Claude chat along the branch of the last one; all where that does not lead up to a first turn."""

    def start(turn: Mapping[str, Any]) -> tuple[Any, Any]:
        return turn.get("parent_message_uuid") or None, turn.get("sender")

    named = {str(turn.get("uuid")): turn for turn in turns}
    branch = _branch(named, str(turns[-1].get("uuid")), "parent_message_uuid") if turns else []
    return branch if branch and start(branch[0]) == start(turns[0]) else turns


def _claude_turn(turn: Mapping[str, Any]) -> Turn:
    content, attached = turn.get("content"), _dicts(turn.get("attachments"))
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    # `text` has a note in the place of each tool, `content` in parts has none
    text = _text(part for part in parts if part.get("type") == "text") or _text([turn.get("text")])
    documents = [_text([each.get("extracted_content")]) for each in attached]
    kinds = [part.get("name") if part.get("name") in CREATED else part.get("type") for part in parts]
    held = [str(kind) for kind in kinds if kind not in ("text", *WORK)]
    names = {each.get("file_name") for each in attached} - {None, ""}  # which stand among `files` too
    files = [file for file in _dicts(turn.get("files")) if file.get("file_name") not in names]
    held += ["file"] * (len(files) + documents.count(""))
    return Turn(SPEAKERS.get(str(turn.get("sender"))), _text([text, *documents]), next(iter(held), ""))


def _chatgpt_turn(message: Mapping[str, Any]) -> Turn:
    role = SPEAKERS.get(str(_dict(message.get("author")).get("role")))
    content, notes = _dict(message.get("content")), _dict(message.get("metadata"))
    kind, to = str(content.get("content_type") or "unknown"), str(message.get("recipient") or "all")
    if notes.get("is_visually_hidden_from_conversation") or kind == "user_editable_context":
        return Turn(None)
    if to != "all":  # a tool
        return Turn(None, held=tool if (tool := to.partition(".")[0]) in CREATED else "")
    if kind not in SHOWN:
        return Turn(role, held=kind if role == "user" else "")
    parts = content["parts"] if isinstance(content.get("parts"), list) else []
    objects = list(filter(None, _dicts(parts)))
    others = [part for part in objects if not isinstance(part.get("text"), str)]
    if any(part.get("content_type") == "audio_transcription" for part in objects):
        others = [part for part in others if not _is_sound(part)]
    held = [str(part.get("content_type")).removesuffix("_asset_pointer") for part in others]
    held += ["file"] * len(_dicts(notes.get("attachments")))
    return Turn(role, _text(parts), next(iter(held), ""))


def _is_sound(part: Mapping[str, Any]) -> bool:
    seen = part.get("frames_asset_pointers") or part.get("video_container_asset_pointer")
    return "audio" in str(part.get("content_type")) and not seen


def _text(parts: Iterable[Any]) -> str:
    """Return the texts among the parts of a turn, without what stands in them that is not shown."""
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    shown = (CITED.sub("", NAMED.sub(r"\1\2", UNSHOWN.sub("", part))) for part in found if isinstance(part, str))
    return "\n\n".join(text for part in shown if (text := part.strip()))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return list(map(_dict, value)) if isinstance(value, list) else []
