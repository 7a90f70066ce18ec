"""From what a model answers to a programming task to the program that is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_code(response: str, defines: str | None = None) -> str:
    """Return the code of a response: its first fenced block, the first that defines a function where there is one.

    Without a fence the whole response is code, whose leading blank lines and common indentation are kept.

    Args:
        response: the model's text.
        defines: the name of a function that the code should define.
    """
    blocks = _FENCE.findall(response)
    if not blocks:
        return response
    return next((block for block in blocks if defines and _defines(block, defines)), blocks[0])


def humaneval_program(doc: Mapping[str, Any], response: str) -> str:
    """Return the program of a HumanEval answer: a whole function, or the body of the one in the prompt; and the tests.

    Args:
        doc: `prompt`, `entry_point` and `test`.
        response: the model's text.
    """
    code, name = extract_code(response, doc["entry_point"]), doc["entry_point"]
    if not _defines(code, name):
        return humaneval_completion(doc, code)
    before = re.split(rf"^def {re.escape(name)}\b", doc["prompt"], maxsplit=1, flags=re.MULTILINE)[
        0
    ]  # imports, helpers
    return f"{before}\n{code}\n{doc['test']}\ncheck({name})\n"


def humaneval_completion(doc: Mapping[str, Any], completion: str) -> str:
    """Return the program of a HumanEval prompt, what the model went on with, and the tests."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: Mapping[str, Any], response: str) -> str:
    """Return the program of an MBPP answer with its `test_setup_code` and `test_list`."""
    called = re.search(r"assert\s+\(*\s*(?:\w+\()*?(\w+)\(", doc["test_list"][0])
    code = extract_code(response, called and called[1])
    return "\n".join([code, doc.get("test_setup_code") or "", *doc["test_list"], ""])


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*def {re.escape(name)}\b", code, re.MULTILINE) is not None
