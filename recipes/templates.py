"""Prompt templates: how turns become the text a model sees, the same in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lora_null.errors import UserError, nearest

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


def check_template(template: str, where: str, *, chat: bool = False) -> None:
    """Accept a template's name or a text that contains {prompt}; "chat" only where `chat` says so.

    Raises:
        UserError: naming `where` and the nearest template.
    """
    names = [*TEMPLATES, CHAT] if chat else [*TEMPLATES]
    if template not in names and "{prompt}" not in template:
        raise UserError(f"{where}: no template {template!r}{nearest(template, names)} and it has no {{prompt}}")


def render(template: str, prompt: str, response: str) -> tuple[str, str]:
    """Return the prompt text and the completion text; the completion starts with the space that separates them."""
    return TEMPLATES.get(template, template).replace("{prompt}", prompt.strip()), " " + response.strip()


def need_chat_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError where "chat" is asked of a tokenizer that has no chat template."""
    if template == CHAT and not tokenizer.chat_template:
        raise UserError("data.template: 'chat' needs a model with a chat template, this one has none; use alpaca")


def prompts_and_ends(
    template: str, turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, str]]:
    """Yield, for every turn of a conversation, the text up to its response and the text through its end token.

    Args:
        template: a text template, under which the turns follow each other with a blank line between; or "chat".
        turns: (prompt, response) each.
        tokenizer: for its end token, and its chat template.
    """
    if template == CHAT:
        messages: list[dict[str, str]] = []
        for prompt, response in turns:
            messages.append({"role": "user", "content": prompt.strip()})
            before = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": response.strip()})
            yield before, tokenizer.apply_chat_template(messages, tokenize=False)
        return
    text, end = "", tokenizer.eos_token
    for prompt, response in turns:
        question, answer = render(template, prompt, response)
        before = f"{text}\n\n{question}" if text else question
        text = before + answer.removesuffix(end) + end
        yield before, text
