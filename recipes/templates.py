"""Prompt templates: how a question becomes the text a model sees, the same in training and in evaluation."""

from __future__ import annotations

from lora_null.errors import UserError, nearest

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


def check_template(template: str, where: str) -> None:
    """Accept a template's name or a text that contains {prompt}.

    Raises:
        UserError: naming `where` and the nearest template.
    """
    if template not in TEMPLATES and "{prompt}" not in template:
        raise UserError(f"{where}: no template {template!r}{nearest(template, TEMPLATES)} and it has no {{prompt}}")


def render(template: str, prompt: str, response: str) -> tuple[str, str]:
    """Return the prompt text and the completion text; the completion starts with the space that separates them."""
    return TEMPLATES.get(template, template).replace("{prompt}", prompt.strip()), " " + response.strip()
