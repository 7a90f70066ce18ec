"""MT-Bench: answers to 80 two-turn questions in FastChat's format, graded by a judge model.

In an evaluation it is an `MTBenchTask`; `lora-null judge` grades answers that were written before.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.documents import with_lists
from lora_null.eval_harness.generate import check_room, generate_texts
from lora_null.eval_harness.mt_bench.judge import NEED_REFERENCE, Judge, JudgeError, judge_answers
from lora_null.eval_harness.results import Metric, Role, TaskResult
from lora_null.eval_harness.statistics import mean_and_error
from lora_null.eval_harness.tasks import RunOptions, Task
from lora_null.utils.distributed import get_logger, slowly_on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_text
from lora_null.utils.limits import PositionLimit
from lora_null.utils.values import as_text

logger = get_logger(__name__)

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # FastChat's; 0 for all others
QUESTIONS_FILE, ANSWERS_FILE, JUDGMENTS_FILE = "questions.jsonl", "answers.jsonl", "judgments.jsonl"


def as_questions(
    rows: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Return questions with the same fields, whether from FastChat's files or the hub's `HuggingFaceH4/mt_bench_prompts`.

    Args:
        rows: `question_id`, `category`, `turns`; or `prompt_id`, `category`, `prompt`, `reference`.
        references: FastChat's reference answers: `question_id`, `choices`.

    Returns:
        `question_id`, `category`, `turns` and `reference` (empty where there is none) of each.

    Raises:
        UserError: a row without those fields, or without two turns.
    """
    try:
        known = {row["question_id"]: row["choices"][0]["turns"] for row in references}
    except (LookupError, TypeError):
        raise UserError("MT-Bench: the references are not in FastChat's format (question_id, choices)") from None
    questions = []
    for number, row in enumerate(map(with_lists, rows), start=1):
        identity, turns = row.get("question_id", row.get("prompt_id")), row.get("turns", row.get("prompt"))
        if identity is None or "category" not in row or not isinstance(turns, list) or len(turns) != 2:
            raise UserError(f"MT-Bench: row {number} is no question with question_id, category and two turns")
        reference = known.get(identity) or row.get("reference") or []
        reference = [reference] if isinstance(reference, str) else reference  # of the first turn
        if not isinstance(reference, list):
            raise UserError(f"MT-Bench: row {number} has a reference that is neither a text nor a list of texts")
        reference = [*(text or "" for text in reference), ""][:2] if any(reference) else []
        try:
            turns, reference = [as_text(turn) for turn in turns], [as_text(text) for text in reference]
        except ValueError as error:
            raise UserError(f"MT-Bench: row {number} cannot be used: a turn {error}") from None
        if not all(turn.strip() for turn in turns):
            raise UserError(f"MT-Bench: row {number} cannot be used: a turn is empty")
        if identity in {question["question_id"] for question in questions}:
            raise UserError(f"MT-Bench: row {number} has the id {identity!r} of a row before it")
        fields = {"question_id": identity, "category": row["category"], "turns": turns, "reference": reference}
        questions.append(fields)
    return questions


@dataclass(frozen=True)
class MTBenchTask(Task):
    """MT-Bench on a live model.

    Both turns are answered, with FastChat's temperature for each category. The answers go to `answers.jsonl`, and are graded
    if there is a judge; if it fails, they can be graded later by `lora-null judge`, and no score is reported.

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

    output_folder: ClassVar[str] = "mt_bench"
    in_training_template: ClassVar[bool] = True

    name: str
    questions: list[dict[str, Any]] = field(repr=False)
    ask: Callable[[list[tuple[str, str]], str], str] = field(repr=False)
    special_tokens: bool = True
    stops: tuple[str, ...] = ()
    judge: Judge | None = None
    max_new_tokens: int = 1024
    role: Role = "task"

    def check(self) -> None:
        super().check()
        if not self.questions:
            raise UserError(f"{self} has no questions")
        if self.judge is not None:
            self.judge.check()

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:
        check_room(self.max_new_tokens, limit)

    def report_notes(self) -> dict[str, str]:
        if self.judge is None:
            return {}
        bare = sum(q["category"] in NEED_REFERENCE and not q["reference"] for q in self.questions)
        missing = f"; {bare} questions of {', '.join(NEED_REFERENCE)} without a reference answer" if bare else ""
        return {f"judge of {self.name}": self.judge.describe() + missing}

    def describe(self, limit: int | None) -> dict[str, Any]:
        asked = [self.ask([(question["turns"][0], "")], question["turns"][1]) for question in self.questions[:limit]]
        judge = self.judge
        judged = judge and {"model": judge.model, "base_url": judge.base_url, "prompts": judge.digest()}
        digest = hashlib.sha256(repr((asked, self.questions[:limit])).encode()).hexdigest()
        return {"limit": limit, "max_new_tokens": self.max_new_tokens, "judge": judged, "questions_sha256": digest}

    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Answer, write the answers, have them graded; the settings say how many grades there are and are missing.

        Raises:
            UserError: there is no `output_dir` to keep the answers in.
        """
        if options.output_dir is None:
            raise UserError(f"{self}: needs output_dir, where its answers and grades are kept")
        questions, folder = self.questions[: options.limit], options.output_dir / self.output_folder
        answers = self._answer(model, tokenizer, questions, options)
        grades = slowly_on_first_process(lambda: self._grade(questions, answers, folder, options.progress))
        found = scores(self.name, self.role, [question["question_id"] for question in questions], grades)
        found.settings["judged"] = len(grades)
        if self.judge is not None:
            found.settings["missing"] = 2 * len(questions) - len(grades)
        return found

    def _grade(
        self, questions: Sequence[Mapping[str, Any]], answers: Mapping[int, list[str]], folder: Path, progress: bool
    ) -> dict[tuple[int, int], float]:
        """Write the answers and have them graded; return what `judge_answers` does, nothing where the judge fails."""
        model_id = folder.parent.name
        write_answers(folder / ANSWERS_FILE, answers, model_id=model_id)
        write_text(folder / QUESTIONS_FILE, "".join(json.dumps(question) + "\n" for question in questions))
        if self.judge is None:
            later = Judge("MODEL").command(folder / ANSWERS_FILE)
            logger.info(f"{self.name}: the answers are written and not graded; this grades them: {later}")
            return {}
        try:
            path = folder / JUDGMENTS_FILE
            return judge_answers(self.judge, questions, answers, path, model_id=model_id, progress=progress)
        except JudgeError as error:
            later = self.judge.command(folder / ANSWERS_FILE)
            logger.warning(f"{self.name}: not graded ({error}); this goes on with it: {later}")
            return {}

    def _answer(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Mapping[str, Any]],
        options: RunOptions,
    ) -> dict[int, list[str]]:
        """Return the answers to both turns by question id; the second turn is asked after the model's own first answer."""
        answers: dict[int, list[str]] = {question["question_id"]: [] for question in questions}
        for turn in range(2):
            before = [list(zip(question["turns"], answers[question["question_id"]])) for question in questions]
            texts = generate_texts(
                model,
                tokenizer,
                [self.ask(turns, question["turns"][turn]) for turns, question in zip(before, questions)],
                temperatures=[TEMPERATURES.get(question["category"], 0.0) for question in questions],
                max_new_tokens=self.max_new_tokens,
                stops=self.stops,
                special_tokens=self.special_tokens,
                batch_size=options.batch_size,
                autocast_dtype=options.autocast_dtype,
                seed=options.seed + turn,
                progress=f"{self.name} turn {turn + 1}" if options.progress else None,
            )
            for question, text in zip(questions, texts):
                answers[question["question_id"]].append(text.strip())
        return answers


def write_answers(path: Path, answers: Mapping[int, list[str]], *, model_id: str) -> None:
    """Write answers in FastChat's format, one question per line."""
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


def scores(name: str, role: Role, ids: Sequence[int], grades: Mapping[tuple[int, int], float]) -> TaskResult:
    """Return the mean of all grades, and of each turn's, with standard errors clustered by question.

    Args:
        name: of the task.
        role: of the metrics.
        ids: of the questions.
        grades: (question id, turn, from 1) → grade; those that are missing are left out.
    """
    found = TaskResult()
    for label, turns in ((name, (1, 2)), (f"{name} turn 1", (1,)), (f"{name} turn 2", (2,))):
        graded = [given for i in ids if (given := [grades[i, turn] for turn in turns if (i, turn) in grades])]
        if graded:
            sums, counts = np.array([sum(given) for given in graded]), np.array([len(given) for given in graded])
            metric = Metric(*mean_and_error(sums / counts, counts), int(counts.sum()), True, role, "score")
            found.metrics[label] = metric
            if len(graded) == len(ids):
                found.add(label, metric, sums / counts, counts)
    return found
