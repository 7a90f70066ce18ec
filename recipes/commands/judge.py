"""`lora-null judge`: grade MT-Bench answers in FastChat's format with a judge model."""

from __future__ import annotations

import argparse
from typing import Any

import shtab

from lora_null.recipes.config.schema import JudgeSection


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the parser's subcommands."""
    parser = commands.add_parser(
        "judge",
        help="grade MT-Bench answers with a judge model",
        description="Grade MT-Bench answers in FastChat's format; writes ANSWERS.judgments.jsonl and prints the scores. "
        "Run again, it goes on where it stopped. Exit status 1 where the endpoint fails.",
    )
    default = {name: field.default for name, field in JudgeSection.model_fields.items()}
    add = parser.add_argument
    add("answers", help="answers in FastChat's format").complete = shtab.FILE
    add("--questions", required=True, help="MT-Bench's questions").complete = shtab.FILE
    add("--references", help="reference answers, for math, reasoning and coding").complete = shtab.FILE
    add("--model", required=True, help="the judge")
    add("--base-url", default=default["base_url"], help="an OpenAI-compatible endpoint (default: %(default)s)")
    add("--api-key-env", default=default["api_key_env"], help="variable that holds the key (default: %(default)s)")
    add("--prompts", help="FastChat's judge_prompts.jsonl, to judge by its very words").complete = shtab.FILE
    add("--requests-per-minute", type=float, help="at most")
    add("--attempts", type=int, default=default["attempts"], help="for one grade, at most (default: %(default)s)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Grade a file of answers; return 0, or 1 where the endpoint fails.

    Raises:
        UserError: a file that cannot be read, or an endpoint that cannot be asked.
    """
    from lora_null.eval_harness.__main__ import grade

    return grade(arguments)
