"""Prompt templates: the text around a prompt, the same in training and in evaluation. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from lora_null.utils.errors import UserError, nearest

CHAT = "chat"  # the model's own chat template
TEMPLATES = {
    # The paper's Alpaca-style prompt, without the input field.
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:"
    ),
    "qa": "Question: {prompt}\nAnswer:",
    "plain": "{prompt}",
}


@lru_cache(maxsize=256)
def split_fields(template: str, where: str) -> tuple[tuple[str, bool], ...]:
    """Split a text made of {field}s into pieces, each with whether it is a field's name; {{ and }} write braces.

    Raises:
        UserError: a brace without its partner.
    """
    pieces = []
    for piece in re.findall(r"{{|}}|{[^{}]*}|[{}]|[^{}]+", template):
        if piece in ("{", "}"):
            raise UserError(f"{where}: a {piece} without its partner in {template!r}; {{{{ and }}}} write a brace")
        is_field = len(piece) > 1 and piece[0] == "{" and piece[-1] == "}"
        pieces.append((piece[1:-1] if is_field else piece[0] if piece in ("{{", "}}") else piece, is_field))
    return tuple(pieces)


def fill(template: str, where: str, value_of: Callable[[str], str]) -> str:
    """Return a text made of {field}s with each filled in by `value_of` its name."""
    return "".join(value_of(piece) if is_field else piece for piece, is_field in split_fields(template, where))


def check_template(template: str) -> str:
    """Return a template's name, "chat" among them, or a text that contains {prompt}.

    Raises:
        UserError: naming the nearest template.
    """
    names = [*TEMPLATES, CHAT]
    if template in names:
        return template
    fields = {piece for piece, is_field in split_fields(template, "template") if is_field}
    other = next((field for field in sorted(fields) if field != "prompt"), None)
    if other is not None:
        raise UserError(f"no field {{{other}}} in a template, only {{prompt}}; {{{{ and }}}} write a brace")
    if not fields:
        raise UserError(f"no template {template!r}{nearest(template, names)} and it has no {{prompt}}")
    return template


def render(template: str, prompt: str, response: str) -> tuple[str, str]:
    """Return the prompt text and the completion text.

    The completion starts with the space that separates them, unless one of the two has whitespace there; with a line break
    where its own stands before an indentation.
    """
    around, asked, said = TEMPLATES.get(template, template), trimmed_prompt(template, prompt), trimmed(response)
    text = fill(around, "template", lambda _: asked)
    between = " "
    if text[-1:].isspace():
        between = ""
    elif said[:1].isspace():
        between = "\n" if "\n" in response.removesuffix(response.lstrip()) else ""
    return text, between + said


def trimmed_prompt(template: str, prompt: str) -> str:
    """Return a prompt without whitespace around it, but for line breaks at its end where it ends the template."""
    end = prompt[len(prompt.rstrip()) :] if TEMPLATES.get(template, template).endswith("{prompt}") else ""
    return prompt.strip() + (end if "\n" in end else "")


def trimmed(response: str) -> str:
    """Return a response without blank lines or one single space in front, and without whitespace at its end.

    The indentation of its first line is kept; one space there is what TRL's completions begin with.
    """
    return re.sub(r"\A(?:\s*[\r\n])?(?: (?=\S))?", "", response.rstrip())
