"""MT-Bench: answers to 80 two-turn questions in FastChat's format, graded by a judge model.

In an evaluation it is an `MTBenchTask`; `python -m lora_null.eval_harness judge` grades answers that were written before.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lora_null.eval_harness.likelihood import ratio_estimate
from lora_null.eval_harness.lm_eval.generate import generate_texts
from lora_null.eval_harness.mt_bench.judge import Judge, JudgeError, judge_answers
from lora_null.eval_harness.tasks import OwnTask, Role, RunOptions
from lora_null.utils.distributed import broadcast, rank_and_world
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_text
from lora_null.utils.values import as_text

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; 0 for all others
ANSWERS_FILE, JUDGMENTS_FILE = "answers.jsonl", "judgments.jsonl"


def as_questions(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return questions in one form, from FastChat's files or from the hub's `HuggingFaceH4/mt_bench_prompts`.

    Args:
        rows: `question_id`, `category`, `turns`; or `prompt_id`, `category`, `prompt`, `reference`.
        references: FastChat's reference answers: `question_id`, `choices`.

    Returns:
        `question_id`, `category`, `turns` and `reference` (empty where there is none) of each.

    Raises:
        UserError: a row without those fields, or without two turns.
    """
    known = {row["question_id"]: row["choices"][0]["turns"] for row in references}
    questions = []
    for number, row in enumerate(rows, start=1):
        identity, turns = row.get("question_id", row.get("prompt_id")), row.get("turns", row.get("prompt"))
        if identity is None or "category" not in row or not isinstance(turns, list) or len(turns) != 2:
            raise UserError(f"MT-Bench: row {number} is no question with question_id, category and two turns")
        reference = known.get(identity) or [text for text in row.get("reference") or [] if text]
        try:
            turns, reference = [as_text(turn) for turn in turns], [as_text(text) for text in reference]
        except ValueError as error:
            raise UserError(f"MT-Bench: row {number} cannot be used: a turn {error}") from None
        if not all(turn.strip() for turn in turns):
            raise UserError(f"MT-Bench: row {number} cannot be used: a turn is empty")
        questions.append(
            {"question_id": identity, "category": row["category"], "turns": turns, "reference": reference}
        )
    return questions


@dataclass(frozen=True)
class MTBenchTask(OwnTask):
    """MT-Bench on a live model.

    Both turns are answered, with FastChat's temperature for each category. The answers go to `answers.jsonl`, and are graded
    if there is a judge; if it fails, they can be graded later by this module's command, and no score is reported.

    Args:
        name: what to call the results: "NAME", "NAME turn 1", "NAME turn 2".
        questions: see `as_questions`.
        ask: (turns so far, next question) → the text that the model sees.
        special_tokens: whether the tokenizer adds its own to that text.
        stops: strings that end an answer.
        judge: who grades; None leaves the answers ungraded.
        max_new_tokens: tokens of an answer, at most.
        role: as in `LmEvalTask`.
    """

    generates: ClassVar[bool] = True

    name: str
    questions: list[dict[str, Any]] = field(repr=False)
    ask: Callable[[list[tuple[str, str]], str], str] = field(repr=False)
    special_tokens: bool = True
    stops: tuple[str, ...] = ()
    judge: Judge | None = None
    max_new_tokens: int = 1024
    role: Role = "task"

    def check(self) -> None:
        if not self.questions:
            raise UserError(f"evaluation task {self.name!r} has no questions")
        if self.judge is not None:
            self.judge.check()

    def describe(self, limit: int | None) -> dict[str, Any]:
        asked = [self.ask([(question["turns"][0], "")], question["turns"][1]) for question in self.questions[:limit]]
        judge = None if self.judge is None else {"model": self.judge.model, "base_url": self.judge.base_url}
        digest = hashlib.sha256(repr((asked, self.questions[:limit])).encode()).hexdigest()
        return {"limit": limit, "max_new_tokens": self.max_new_tokens, "judge": judge, "questions_sha256": digest}

    def run(self, model: nn.Module, tokenizer: Any, options: RunOptions) -> tuple[dict, dict, dict]:
        """Answer, write the answers, have them graded."""
        questions = self.questions[: options.limit]
        answers = self._answer(model, tokenizer, questions, options)
        grades: dict[tuple[int, int], float] = {}
        if rank_and_world()[0] == 0 and options.output_dir is not None:
            folder = options.output_dir / "mt_bench"
            write_answers(folder / ANSWERS_FILE, answers, model_id=options.output_dir.name)
            if self.judge is not None:
                grades = self._grade(questions, answers, folder, options.output_dir.name)
        grades = broadcast(grades)
        metrics, samples = scores(self.name, self.role, [question["question_id"] for question in questions], grades)
        missing = {} if self.judge is None else {"missing": 2 * len(questions) - len(grades)}
        return metrics, samples, {"judged": len(grades)} | missing

    def _answer(
        self, model: nn.Module, tokenizer: Any, questions: Sequence[Mapping[str, Any]], options: RunOptions
    ) -> dict[int, list[str]]:
        answers: dict[int, list[str]] = {question["question_id"]: [] for question in questions}
        for turn in range(2):
            prompts = []
            for question in questions:
                before = list(zip(question["turns"], answers[question["question_id"]]))
                prompts.append(self.ask(before, question["turns"][turn]))
            texts = generate_texts(
                model,
                tokenizer,
                prompts,
                temperatures=[TEMPERATURES.get(question["category"], 0.0) for question in questions],
                max_new_tokens=self.max_new_tokens,
                stops=self.stops,
                special_tokens=self.special_tokens,
                batch_size=options.batch_size,
                autocast_dtype=options.autocast_dtype,
                seed=options.seed + turn,
                progress=f"{self.name} turn {turn + 1}",
            )
            for question, text in zip(questions, texts):
                answers[question["question_id"]].append(text.strip())
        return answers

    def _grade(
        self, questions: Sequence[Mapping[str, Any]], answers: Mapping[int, list[str]], folder: Path, model_id: str
    ) -> dict[tuple[int, int], float]:
        try:
            return judge_answers(self.judge, questions, answers, folder / JUDGMENTS_FILE, model_id=model_id)
        except JudgeError as error:
            later = f"python -m lora_null.eval_harness judge {folder / ANSWERS_FILE}"
            print(f"{self.name}: not graded ({error}); {later} grades the answers", file=sys.stderr)
            return {}


def write_answers(path: Path, answers: Mapping[int, list[str]], *, model_id: str) -> None:
    """Write answers in FastChat's format, one question a line."""
    lines = [
        {
            "question_id": question_id,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id} {question_id} {turns}").hex[:22],
            "model_id": model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }
        for question_id, turns in answers.items()
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def scores(name: str, role: str, ids: Sequence[int], grades: Mapping[tuple[int, int], float]) -> tuple[dict, dict]:
    """Return metrics and samples: the mean of all grades, and of each turn's, with errors clustered by question."""
    metrics, samples = {}, {}
    for label, turns in ((name, (1, 2)), (f"{name} turn 1", (1,)), (f"{name} turn 2", (2,))):
        given = [[grades[i, turn] for turn in turns if (i, turn) in grades] for i in ids]
        given = [graded for graded in given if graded]
        if given:
            value, error = ratio_estimate(np.array([sum(g) for g in given]), np.array([len(g) for g in given]))
            metrics[label] = {"value": value, "stderr": error, "n": sum(map(len, given)), "higher_is_better": True}
            metrics[label] |= {"role": role, "unit": "score"}
            if len(given) == len(ids):
                samples[label] = [sum(graded) / len(graded) for graded in given]
    return metrics, samples
