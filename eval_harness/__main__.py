"""Grade MT-Bench answers in FastChat's format with a judge model:

    python -m lora_null.eval_harness judge ANSWERS.jsonl --model gpt-4 --prompts judge_prompts.jsonl

writes the judgments beside the answers and prints the scores; run again, it goes on where it stopped. The questions are
those that a run leaves beside its answers; for answers of another source give --questions and --references.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_null.eval_harness.documents import read_documents
from lora_null.eval_harness.mt_bench.judge import OPENAI, Judge, JudgeError, judge_answers
from lora_null.eval_harness.mt_bench.task import ANSWERS_FILE, JUDGMENTS_FILE, QUESTIONS_FILE, as_questions, scores
from lora_null.utils.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="lora_null.eval_harness", description="Grade MT-Bench answers with a judge model."
    )
    made.add_argument("command", choices=["judge"])
    made.add_argument("answers", help="answers in FastChat's format")
    made.add_argument("--questions", help=f"MT-Bench's questions (default: {QUESTIONS_FILE} beside the answers)")
    made.add_argument("--references", help="reference answers, for math, reasoning and coding")
    made.add_argument("--model", required=True, help="the judge")
    made.add_argument("--base-url", default=OPENAI, help="an OpenAI-compatible endpoint (default: %(default)s)")
    made.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", help="variable that holds the key (default: %(default)s)"
    )
    made.add_argument("--prompts", help="FastChat's judge_prompts.jsonl: scores comparable with published ones")
    made.add_argument("--requests-per-minute", type=float, help="at most")
    made.add_argument("--parallel", type=int, default=4, help="requests under way at once (default: %(default)s)")
    made.add_argument("--attempts", type=int, default=5, help="for one grade, at most (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Grade a file of answers; return 0 done, 1 the endpoint fails, 2 a user's mistake."""
    return grade(parser().parse_args(argv))


def grade(given: argparse.Namespace) -> int:
    """Grade a file of answers with parsed arguments, which `lora-null judge` has too; return the exit status."""
    judge = Judge(
        given.model,
        given.base_url,
        given.api_key_env,
        attempts=given.attempts,
        requests_per_minute=given.requests_per_minute,
        prompts=given.prompts,
        parallel=given.parallel,
    )
    try:
        for name in ("attempts", "parallel", "requests_per_minute"):
            if (value := getattr(given, name)) is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')}: must be more than 0, not {value:g}")
        judge.check()
        beside = Path(given.answers).with_name(QUESTIONS_FILE)
        if given.questions is None and not beside.is_file():
            raise UserError(f"--questions: {beside} is not there; give MT-Bench's questions")
        given.questions = given.questions or str(beside)
        read = {name: list(_read(path, name)) for name, path in vars(given).items() if path and name in _FILES}
        questions = as_questions(read["questions"], read.get("references", ()))
        answers = {row["question_id"]: row["choices"][0]["turns"] for row in read["answers"]}
        answered = Path(given.answers)  # a run's own judgments are gone on with
        own = answered.name == ANSWERS_FILE
        path = answered.with_name(JUDGMENTS_FILE) if own else answered.with_suffix(".judgments.jsonl")
        model_id = read["answers"][0].get("model_id", "model")
        grades = judge_answers(judge, questions, answers, path, model_id=model_id)
    except (UserError, JudgeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    for name, metric in scores("MT-Bench", "task", list(answers), grades).metrics.items():
        print(f"{name:16} {metric.value:.2f} (n = {metric.n})")
    print(f"judge: {judge.describe()}")
    print(f"missing: {2 * len(answers) - len(grades)} of {2 * len(answers)} grades; judgments: {path}")
    return 0


_FILES = ("answers", "questions", "references")


def _read(path: str, name: str) -> Sequence[dict[str, Any]]:
    return read_documents([Path(path)], f"--{name}").rows


if __name__ == "__main__":
    sys.exit(main())
