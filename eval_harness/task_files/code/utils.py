"""What the code task files call."""

from __future__ import annotations

from typing import Any

import datasets

from lora_null.eval_harness.code import programs


def mbpp_test(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the rows of MBPP's test split, also of a file with all 974."""
    return rows.filter(lambda row: 11 <= row["task_id"] <= 510)


def score_humaneval(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Run the response's code with the problem's tests."""
    return _passed(programs.humaneval_program(doc, results[0]))


def score_humaneval_completion(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Run the prompt and its completion with the problem's tests."""
    return _passed(programs.humaneval_completion(doc, results[0]))


def score_mbpp(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Run the response's code with the task's tests."""
    return _passed(programs.mbpp_program(doc, results[0]))


def _passed(program: programs.Program) -> dict[str, int]:
    return {"pass@1": int(programs.run_program(program).passed)}
