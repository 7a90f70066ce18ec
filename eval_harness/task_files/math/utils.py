"""What the math task files call."""

from __future__ import annotations

from typing import Any

import datasets

from lora_null.eval_harness import math_answers

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
SUBJECTS += ("prealgebra", "precalculus")


def load_math(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the test split of all seven subjects of MATH as one."""
    splits = [datasets.load_dataset("EleutherAI/hendrycks_math", subject, split="test") for subject in SUBJECTS]
    return {"test": datasets.concatenate_datasets(splits)}


def score_gsm8k(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Return whether the final number is the right one, and whether the paper's own rule finds it."""
    right = doc["answer"].split("####")[-1]
    by_rule = math_answers.metamath_number(results[0])
    return {
        "exact_match": int(math_answers.same_number(math_answers.extract_answer(results[0]), right)),
        "metamath_rule": int(by_rule is not None and by_rule == math_answers.to_number(right)),
    }


def score_math(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """Return whether the final answer is the right one, by mathematics and by the paper's string rule."""
    right = math_answers.boxed_answer(doc["solution"])
    return {
        "math_verify": int(math_answers.equivalent(math_answers.extract_answer(results[0]), right)),
        "string_match": int(math_answers.same_string(math_answers.metamath_answer(results[0]), right)),
    }
