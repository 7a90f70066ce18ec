"""Grade answers by a language model behind any OpenAI-compatible endpoint: FastChat's single-answer grading of MT-Bench.

Each of a question's two turns is graded from 1 to 10 by itself, with a reference answer for math, reasoning and coding, at
temperature 0; the grade is what the judge writes between double brackets. Judgments are written to a file in FastChat's
format as they come, so that a judging that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from lora_null.utils.errors import UserError, nearest

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
NEED_REFERENCE = ("math", "reasoning", "coding")
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
MISSING = -1  # FastChat's own mark for a judgment without a grade
REJECTED_REQUEST = (400, 413, 422)  # what an endpoint answers to one request that it does not take
REFUSED = re.compile(r"(?i)unsupported|not supported|unrecognized|use .?max_completion_tokens")  # and not: too large
RETRIED = (408, 409, 429)  # what the openai package asks again after, beside 500 and above
PROMPTS = Path(__file__).with_name("judge_prompts.json")
PROMPT_NAMES = tuple(f"single{kind}-v1{turn}" for kind in ("", "-math") for turn in ("", "-multi-turn"))
FASTCHAT_DIGEST = "ce7674b0a9c690046e0993878b3eaf2cb71a7334de092a39f8d86540bfe2d828"  # of these four in its file
MAX_TOKENS = 2048  # of a judgment
THINKING_TOKENS = 16384  # of a judgment with the thoughts before it, which newer judges count with it
MAX_TOKENS_KEY, MAX_COMPLETION_TOKENS_KEY = "max_tokens", "max_completion_tokens"


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible endpoint that grades.

    Args:
        model: the name that the endpoint knows it by.
        base_url: up to and without /chat/completions.
        api_key_env: the environment variable that holds the key; the key itself is read when it is needed, and never
            written anywhere. Without one, requests go without a key, as local servers take them.
        attempts: requests for one grade, at most; the openai package waits between those that fail.
        requests_per_minute: over all threads; None for no limit.
        parallel: requests under way at once.
        prompts: a file in FastChat's format (judge_prompts.jsonl) to judge by its very words; None takes this package's,
            which follow the same protocol in other words.
        wait: seconds before a judgment that holds no grade is asked for again.
    """

    model: str
    base_url: str = OPENAI
    api_key_env: str = "OPENAI_API_KEY"
    attempts: int = 5
    requests_per_minute: float | None = None
    parallel: int = 4
    prompts: str | None = None
    wait: float = 2.0

    @property
    def endpoint(self) -> str:
        """Machine and path: of two that know a judge by the same name, each gives grades of its own.

        Not the port, which another start of a server, or a tunnel to it, may change.
        """
        parts = urlsplit(self.base_url)
        return f"{parts.hostname}{parts.path.rstrip('/')}"

    def key(self) -> str | None:
        """Return the key, None where there is none.

        Raises:
            UserError: it has characters that no request can carry; the errors of others would show it.
        """
        key = os.environ.get(self.api_key_env)
        if key and not re.fullmatch(r"[!-~]+", key):
            raise UserError(
                f"judge: the key in the environment variable {self.api_key_env} holds a space, a line break or a letter "
                "that is not ASCII"
            )
        return key

    def check(self) -> None:
        """Raise a UserError for a missing package or key, an address that is none, or prompts that cannot be used."""
        try:
            parts = urlsplit(self.base_url)
            sound = parts.scheme in ("http", "https") and parts.hostname
        except ValueError:
            sound = False
        if not sound:
            raise UserError(f"judge.base_url: {self.base_url!r} is no address such as {OPENAI}")
        if "@" in urlsplit(self.base_url).netloc:
            raise UserError(
                "judge.base_url: holds a name or a password, which would be kept with the results; a key goes into the "
                "variable that judge.api_key_env names"
            )
        if importlib.util.find_spec("openai") is None:
            raise UserError("judge: needs the openai package; pip install openai")
        if self.base_url.rstrip("/") == OPENAI and not self.key():
            raise UserError(f"judge: {OPENAI} needs a key in the environment variable {self.api_key_env}")
        self.read_prompts()

    def check_endpoint(self) -> None:
        """Ask the endpoint once which models it has: it answers, takes the key, and knows the judge.

        Raises:
            UserError: it does not. An endpoint that lists no models is only known to answer.
        """
        import openai

        with closing(_Client(self)) as client:
            try:
                listed = client.openai.with_options(max_retries=0, timeout=5).models.list(extra_headers=client.headers)
                names = [model.id for model in listed.data or []]
            except openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise UserError(
                        f"judge: {self.base_url} refuses the key in {self.api_key_env} (HTTP status {error.status_code})"
                    ) from None
                return
            except openai.APIConnectionError as error:
                raise UserError(
                    f"judge.base_url: {self.base_url} does not answer ({error.__cause__ or error})"
                ) from None
            except (ValueError, TypeError, AttributeError):  # no list in OpenAI's format
                return
        if names and self.model not in names:
            raise UserError(f"judge.model: {self.base_url} has no {self.model!r}{nearest(self.model, names)}")

    def read_prompts(self) -> dict[str, dict[str, str]]:
        """Return the judge prompts by name.

        Raises:
            UserError: the file is missing, is no JSON, or lacks one of the four prompts.
        """
        path = Path(self.prompts or PROMPTS)
        try:
            text = path.read_text(encoding="utf-8")
            entries = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines()]
            prompts = {entry["name"]: entry for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"judge.prompts: cannot read {path} ({error})") from None
        if missing := [name for name in PROMPT_NAMES if name not in prompts]:
            raise UserError(f"judge.prompts: {path} has no prompt {missing[0]!r}")
        for name in PROMPT_NAMES:
            if not all(isinstance(prompts[name].get(key), str) for key in ("system_prompt", "prompt_template")):
                raise UserError(f"judge.prompts: {path}: {name!r} needs system_prompt and prompt_template")
        return prompts

    def digest(self) -> str:
        """Return what tells one set of prompts from another."""
        prompts = self.read_prompts()
        texts = [(prompts[name]["system_prompt"], prompts[name]["prompt_template"]) for name in PROMPT_NAMES]
        return hashlib.sha256(repr(texts).encode()).hexdigest()

    def describe(self) -> str:
        """Return who graded and by which prompts, as a report says it."""
        digest = self.digest()
        if digest == FASTCHAT_DIGEST:
            words = "FastChat's original prompts"
        elif self.prompts is None:
            words = "this package's own prompts, not comparable with published scores"
        else:
            words = f"the prompts of {Path(self.prompts).name} ({digest[:8]}), not FastChat's, not comparable with published scores"
        return f"{self.model}, by {words}"

    def command(self, answers: Path) -> str:
        """Return the command that grades a file of answers, or goes on with it."""
        words = ["lora-null", "judge", str(answers), "--model", self.model]
        for field in fields(self):
            if field.name not in ("model", "wait") and (value := getattr(self, field.name)) != field.default:
                text = f"{value:g}" if isinstance(value, float) else str(value)
                words += [f"--{field.name.replace('_', '-')}", text]
        return shlex.join(words)


def add_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add the options of a command that grades a file of answers; return those that name files."""
    add, default = parser.add_argument, {field.name: field.default for field in fields(Judge)}
    files = [
        add("answers", help="answers in FastChat's format"),
        add("--questions", help="MT-Bench's questions (default: questions.jsonl beside the answers)"),
        add("--references", help="reference answers, for math, reasoning and coding"),
        add("--prompts", help="FastChat's judge_prompts.jsonl: scores comparable with published ones"),
    ]
    add("--model", required=True, help="the judge")
    add("--base-url", default=default["base_url"], help="an OpenAI-compatible endpoint (default: %(default)s)")
    add("--api-key-env", default=default["api_key_env"], help="variable that holds the key (default: %(default)s)")
    add("--requests-per-minute", type=float, help="at most")
    add("--parallel", type=int, default=default["parallel"], help="requests under way at once (default: %(default)s)")
    add("--attempts", type=int, default=default["attempts"], help="for one grade, at most (default: %(default)s)")
    return files


class JudgeError(RuntimeError):
    """The endpoint does not answer, or refuses; what was judged before is kept."""


def judge_answers(
    judge: Judge,
    questions: Sequence[Mapping[str, Any]],
    answers: Mapping[int, Sequence[str]],
    path: Path,
    *,
    model_id: str,
    progress: bool = True,
) -> dict[tuple[int, int], float]:
    """Grade both turns of every question that has an answer; write each judgment to `path` as it comes.

    Args:
        judge: the endpoint.
        questions: `question_id`, `category`, `turns` (two), and `reference` (two, or none).
        answers: question id → the model's answers.
        path: a jsonl file in FastChat's format; grades that it already holds for these answers are kept.
        model_id: of the model that answered, for the file.
        progress: show a bar.

    Returns:
        {(question id, turn, from 1): grade}; turns whose judgment never held a grade are left out, and stand in the
        file with the score −1.

    Raises:
        JudgeError: the endpoint cannot be reached or refuses.
    """
    prompts = judge.read_prompts()
    answered = [question for question in questions if question["question_id"] in answers]
    requests = [r for question in answered for r in _requests(question, answers[question["question_id"]], prompts)]
    digest = judge.digest()
    known = _read_grades(path, (judge.model, digest, judge.endpoint))
    grades = {r.key: known[r.user_prompt] for r in requests if r.user_prompt in known}
    todo = [request for request in requests if request.key not in grades]
    if grades:
        logger.warning(f"judge: {len(grades)} of {len(requests)} grades are kept from before ({path})")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_nlink > 1:  # shared with a kept evaluation, which stays as it is
        os.replace(shutil.copyfile(path, path.with_suffix(".part")), path)
    lock = threading.Lock()
    with closing(_Client(judge)) as client, open(path, "a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a line that a killed run left half written

        def grade(request: _Request) -> None:
            text, score = client.grade(request)
            line = {"question_id": request.question_id, "model": model_id, "judge": [judge.model, request.prompt_name]}
            line |= {"user_prompt": request.user_prompt, "turn": request.turn, "judgment": text, "score": score}
            line |= {"tstamp": time.time(), "prompts": digest, "host": judge.endpoint}
            with lock:
                file.write(json.dumps(line) + "\n")
                file.flush()
                if score != MISSING:
                    grades[request.key] = score
                bar.update()

        bar = tqdm(total=len(todo), desc="judging", unit="turn", disable=not progress)
        with ThreadPoolExecutor(judge.parallel) as pool, bar:
            try:
                list(pool.map(grade, todo))
            except (JudgeError, KeyboardInterrupt) as error:
                if isinstance(error, KeyboardInterrupt):
                    logger.warning("judge: stops when the requests under way are answered, whose grades are kept")
                pool.shutdown(cancel_futures=True)
                raise
    return grades


@dataclass(frozen=True)
class _Request:
    question_id: int
    turn: int
    prompt_name: str
    system_prompt: str
    user_prompt: str

    @property
    def key(self) -> tuple[int, int]:
        return self.question_id, self.turn


def _requests(
    question: Mapping[str, Any], answers: Sequence[str], prompts: Mapping[str, Mapping[str, str]]
) -> list[_Request]:
    """Return the requests for the grades of a question's two turns."""
    reference = question.get("reference") or []
    kind = "-math" if question["category"] in NEED_REFERENCE and reference else ""
    turns = question["turns"]
    texts = {"question": turns[0], "answer": answers[0]}
    for number, (asked, answered) in enumerate(zip(turns, answers), start=1):
        texts |= {f"question_{number}": asked, f"answer_{number}": answered}
    texts |= {f"ref_answer_{number}": text for number, text in enumerate(reference, start=1)}
    requests = []
    for turn, suffix in ((1, ""), (2, "-multi-turn"))[: len(answers)]:
        prompt = prompts[f"single{kind}-v1{suffix}"]
        text = re.sub(r"{(\w+)}", lambda match: str(texts.get(match[1], match[0])), prompt["prompt_template"])
        requests.append(_Request(question["question_id"], turn, prompt["name"], prompt["system_prompt"], text))
    return requests


def _read_grades(path: Path, judge: tuple[str, str, str]) -> dict[str, float]:
    """Return {user prompt: grade} of what a judge (model, digest of its prompts, endpoint) has graded; half a line is left aside."""
    grades = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["score"] != MISSING and (entry["judge"][0], entry.get("prompts"), entry.get("host")) == judge:
            grades[entry["user_prompt"]] = entry["score"]
    return grades


def parse_grade(judgment: str) -> float:
    """Return the grade in a judgment, −1 where there is none from 1 to 10."""
    for rating in RATINGS:
        if found := rating.search(judgment):
            grade = float(found[1])
            return grade if 1 <= grade <= 10 else MISSING
    return MISSING


def _message_of(error: Any) -> str:
    """Return what the endpoint says of a refusal: its beginning, on one line and in brackets."""
    body = error.body if isinstance(error.body, dict) else {}
    text = " ".join(str(body.get("message") or "").split())
    return f" ({text[:200]})" if text else ""


class _Client:
    """Asks the endpoint through the openai package, which asks again when a failure may pass, no faster than allowed."""

    def __init__(self, judge: Judge) -> None:
        import openai

        key = judge.key()
        self.judge, self.lock, self.next_at = judge, threading.Lock(), 0.0
        self.openai = openai.OpenAI(
            api_key=key or "none",
            base_url=judge.base_url,
            timeout=120,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._wait_for_turn]}),
        )
        self.headers = {} if key else {"Authorization": openai.omit}
        self.options: dict[str, Any] = {"temperature": 0, MAX_TOKENS_KEY: MAX_TOKENS}
        self.judged = False  # whether any request was taken

    def close(self) -> None:
        """Close the connections."""
        self.openai.close()

    def grade(self, request: _Request) -> tuple[str, float]:
        """Return a judgment and its grade; the last judgment and −1 where no attempt gave a grade.

        Raises:
            JudgeError: no attempt gave a judgment, or the endpoint refuses them all.
        """
        import openai

        text, failure, left = None, "no answer in OpenAI's format", self.judge.attempts
        while left > 0:
            options = self.options
            try:
                judgment, used = self._ask(request, left, options)
            except openai.APIStatusError as error:
                status = error.status_code
                if status in (400, 422) and self._adapt(error, options):
                    continue
                if status in REJECTED_REQUEST and self.judged:  # as one that is too long; the others are judged
                    return f"refused with HTTP status {status}{_message_of(error)}", MISSING
                if status not in RETRIED and status < 500:
                    hint = f", check the key in {self.judge.api_key_env}" if status in (401, 403) else ""
                    message = (
                        f"judge: {self.judge.base_url} refuses with HTTP status {status}{hint}{_message_of(error)}"
                    )
                    raise JudgeError(message) from None
                failure = f"HTTP status {status}"
                break
            except openai.APIConnectionError as error:
                failure = f"{type(error).__name__}: {error.__cause__ or error}"
                break
            self.judged = True
            text = text if judgment is None else judgment
            if judgment is not None and (score := parse_grade(judgment)) != MISSING:
                return judgment, score
            left -= used
            if left > 0:
                time.sleep(self.judge.wait)
        if text is None:
            raise JudgeError(
                f"judge: {self.judge.base_url} gave no judgment in {self.judge.attempts} attempts ({failure})"
            )
        return text, MISSING

    def _ask(self, request: _Request, attempts: int, options: dict[str, Any]) -> tuple[str | None, int]:
        """Return the judgment, None where the answer holds none, and how many attempts it took."""
        client = self.openai.with_options(max_retries=attempts - 1)
        system = {"role": "system", "content": request.system_prompt}
        messages: Any = [system, {"role": "user", "content": request.user_prompt}]
        create = client.chat.completions.with_raw_response.create
        answer = create(model=self.judge.model, messages=messages, **options, extra_headers=self.headers)
        try:  # from the text: local servers do not always name its type, without which the package does not read it
            choice = next(iter(json.loads(answer.http_response.text)["choices"]), None) or {}
            text = (choice.get("message") or {}).get("content") or ""  # a filtered turn may have none of these
            text = text if isinstance(text, str) else None
        except (ValueError, LookupError, TypeError, AttributeError):
            text = None
        return text, 1 + answer.retries_taken

    def _adapt(self, error: Any, asked: dict[str, Any]) -> bool:
        """Ask from now on without what the endpoint names as refused; return whether that differs from what was asked.

        Newer judges have no temperature but their own, and count the tokens of their thoughts with the answer's.
        """
        text = f"{error.param} {error.message}"
        with self.lock:
            if MAX_TOKENS_KEY in text and MAX_TOKENS_KEY in self.options and REFUSED.search(text):
                kept = {key: value for key, value in self.options.items() if key != MAX_TOKENS_KEY}
                self.options = {MAX_COMPLETION_TOKENS_KEY: THINKING_TOKENS} | kept
            elif "temperature" in text and "temperature" in self.options:
                self.options = {key: self.options[key] for key in self.options if key != "temperature"}
                logger.warning(f"judge: {self.judge.model} takes no temperature of 0, it grades at its own")
            return self.options != asked

    def _wait_for_turn(self, _: Any) -> None:
        gap = 60 / self.judge.requests_per_minute if self.judge.requests_per_minute else 0.0
        with self.lock:
            start = max(time.monotonic(), self.next_at)
            self.next_at = start + gap
        time.sleep(max(0.0, start - time.monotonic()))
