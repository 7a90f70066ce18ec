"""`lora-null judge`: grade MT-Bench answers in FastChat's format with a judge model.

It writes the judgments beside the answers and prints the scores; run again, it goes on where it stopped. The questions are
those that a run leaves beside its answers; for answers of another source give --questions and --references.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_null.eval_harness.documents import read_documents
from lora_null.eval_harness.mt_bench.judge import Judge, JudgeError, judge_answers
from lora_null.eval_harness.mt_bench.task import ANSWERS_FILE, JUDGMENTS_FILE, QUESTIONS_FILE, as_questions, scores
from lora_null.recipes.output import check_place
from lora_null.utils.errors import UserError

FILES = ("answers", "questions", "references")


def run(given: argparse.Namespace) -> int:
    """Grade a file of answers; return 0, or 1 where the endpoint fails.

    Raises:
        UserError: a file that cannot be read, or an endpoint that cannot be asked.
    """
    judge = Judge(**{field.name: getattr(given, field.name) for field in fields(Judge) if field.name != "wait"})
    for name in ("attempts", "parallel", "requests_per_minute"):
        if (value := getattr(given, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: must be more than 0, not {value:g}")
    judge.check()
    answered = Path(given.answers)
    if answered.is_dir():
        found = next(answered.rglob(ANSWERS_FILE), answered / ANSWERS_FILE)
        raise UserError(f"{answered}: is a folder; give the file of its answers, such as {found}")
    beside = answered.with_name(QUESTIONS_FILE)
    if given.questions is None and not beside.is_file():
        raise UserError(f"--questions: {beside} is not there; give MT-Bench's questions")
    given.questions = given.questions or str(beside)
    read = {name: read_documents([Path(path)], f"--{name}").rows for name in FILES if (path := getattr(given, name))}
    questions = as_questions(read["questions"], read.get("references", ()))
    answers = _turns(read["answers"], answered)
    if not answers.keys() & {question["question_id"] for question in questions}:
        raise UserError(
            f"{answered}: none of its question_ids is one of the questions', such as {questions[0]['question_id']!r}"
        )
    own = answered.name == ANSWERS_FILE  # a run's own judgments are gone on with
    path = answered.with_name(JUDGMENTS_FILE) if own else answered.with_suffix(".judgments.jsonl")
    check_place(path.parent, "answers")
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):  # a grade is paid for
            grades = judge_answers(
                judge, questions, answers, path, model_id=read["answers"][0].get("model_id", "model")
            )
    except Timeout:
        raise UserError(f"{answered}: is being graded by another command, which writes {path}; wait for it") from None
    except JudgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, metric in scores("MT-Bench", "task", list(answers), grades).metrics.items():
        print(f"{name:16} {metric.value:.2f} (n = {metric.n})")
    print(f"judge: {judge.describe()}")
    print(f"missing: {2 * len(answers) - len(grades)} of {2 * len(answers)} grades; judgments: {path}")
    return 0


def _turns(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[Any, list[str]]:
    """Return the answers to both turns by question.

    Raises:
        UserError: a row that is not in FastChat's format, or answers a question again.
    """
    found = {}
    for number, row in enumerate(rows, start=1):
        try:
            turns = row["choices"][0]["turns"]
            if not turns or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
            again = row["question_id"] in found
        except (LookupError, TypeError):
            raise UserError(f"{path}: row {number} is not in FastChat's format (question_id, choices)") from None
        if again:
            raise UserError(
                f"{path}: row {number} answers question {row['question_id']!r} again; give one model's answers"
            )
        found[row["question_id"]] = turns
    return found
