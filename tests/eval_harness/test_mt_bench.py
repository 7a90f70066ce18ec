"""MT-Bench: answers in FastChat's format, graded by a stub server that speaks the real protocol."""

import importlib.util
import json
import os
import shlex
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from lora_null.eval_harness import AnswerTask, LmEvalTask, Metric, MTBenchTask, evaluate, generate
from lora_null.eval_harness.mt_bench.judge import PROMPTS, Judge, JudgeError, judge_answers, parse_grade
from lora_null.eval_harness.mt_bench.task import as_questions, scores, write_answers
from lora_null.recipes import commands
from lora_null.utils.errors import UserError

DATA = Path(os.environ.get("LORA_NULL_DATA") or Path(__file__).parents[3] / "shared" / "data")
ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Again, shorter."]},
    {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "And 2+2?"]},
    {"question_id": 121, "category": "coding", "turns": ["Print 1.", "Print {2}."]},
]
REFERENCES = [{"question_id": i, "choices": [{"turns": ["ref one", "ref two"]}]} for i in (111, 121)]
QUESTIONS = as_questions(ROWS, REFERENCES)
ANSWERS = {81: ["a poem", "poem"], 111: ["2", "4"], 121: ["print(1)", "print({2})"]}
KEY = "sk-very-secret"


REFUSALS = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
}


class Stub:
    """A server for POST /v1/chat/completions; `replies` are (status, content) or (status, content, headers), in order, the
    last for ever. Whatever is no proper request is answered with 400; `refuses` names
    parameters that it does not take, as newer judges do, and says so in OpenAI's words."""

    refuses = ()

    def __init__(self, replies):
        self.replies, self.seen, self.times, self.lock = list(replies), [], [], threading.Lock()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.seen.append((handler.headers, body))
            self.times.append(time.monotonic())
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        proper = (
            handler.path == "/v1/chat/completions"
            and handler.headers["Content-Type"] == "application/json"
            and [message["role"] for message in body["messages"]] == ["system", "user"]
            and (self.refuses or (body["temperature"] == 0 and body["max_tokens"] == 2048))
        )
        refused = next((key for key in self.refuses if key in body), None)
        if refused:
            message = REFUSALS[refused]
            proper, data = (
                False,
                json.dumps({"error": {"message": message, "param": refused, "code": "unsupported"}}).encode(),
            )
        status, content, headers = (*reply, {})[:3] if proper else (400, "", {})
        message = content if isinstance(content, dict) else {"role": "assistant", "content": content}
        text = json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})
        data = data if refused else b"<html>" if content is None else text.encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def serving(*replies):
    stub = Stub(replies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            stub.answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def judge(stub, **options):
    return Judge("judge-1", stub.url, **{"wait": 0.01, "parallel": 2, **options})


def grade(stub, folder, **options):
    return judge_answers(judge(stub, **options), QUESTIONS, ANSWERS, folder / "j.jsonl", model_id="m", progress=False)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_protocol(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving((200, "Fine. Rating: [[7]]")) as stub:
        grades = grade(stub, tmp_path)
    assert grades == {(i, turn): 7.0 for i in ANSWERS for turn in (1, 2)}
    assert all(
        headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "judge-1" for headers, body in stub.seen
    )
    judgments = {(line["question_id"], line["turn"]): line for line in lines(tmp_path / "j.jsonl")}
    assert set(judgments[81, 1]) == {
        "question_id",
        "model",
        "judge",
        "user_prompt",
        "judgment",
        "score",
        "turn",
        "tstamp",
        "prompts",
        "host",
    }
    names = {key: line["judge"][1] for key, line in judgments.items()}
    assert names[81, 1] == "single-v1" and names[81, 2] == "single-v1-multi-turn"
    assert names[111, 1] == "single-math-v1" and names[121, 2] == "single-math-v1-multi-turn"
    assert "ref one" in judgments[111, 1]["user_prompt"] and "ref two" not in judgments[111, 1]["user_prompt"]
    second = judgments[121, 2]["user_prompt"]
    assert all(text in second for text in ("Print 1.", "print(1)", "Print {2}.", "print({2})", "ref one", "ref two"))
    assert "Again, shorter." not in judgments[81, 1]["user_prompt"]
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "passing",
    [(429, "", {"Retry-After": "0.3"}), (500, ""), (503, ""), (200, None), (200, "hm"), (200, [{"text": "x"}])],
)
def test_passing_failures_are_retried(tmp_path, passing):
    with serving(passing, (200, "[[3]]")) as stub:
        grades = grade(stub, tmp_path, parallel=1)
    assert len(grades) == 6 and len(stub.seen) == 7
    if passing[0] == 429:
        assert stub.times[1] - stub.times[0] >= 0.3


def test_nonsense_is_retried_then_recorded_as_missing(tmp_path):
    with serving((200, "I would say it is good.")) as stub:
        assert grade(stub, tmp_path, attempts=3) == {}
    assert len(stub.seen) == 6 * 3
    assert {line["score"] for line in lines(tmp_path / "j.jsonl")} == {-1}
    found = scores("MT-Bench", "task", list(ANSWERS), {})
    assert found.metrics == {} and found.samples == {}


@pytest.mark.parametrize("failures", [[(500, "")], [(200, "hm")], [(500, ""), (200, "hm")], [(200, None), (429, "")]])
def test_attempts_count_every_request_for_a_grade(tmp_path, failures):
    with serving(*failures, *[(200, "no grade")] * 2, (200, "[[2]]")) as stub:
        asked = judge(stub, attempts=len(failures) + 2, parallel=1)
        one = {81: ANSWERS[81][:1]}
        grades = judge_answers(asked, QUESTIONS, one, tmp_path / "j.jsonl", model_id="m", progress=False)
    assert grades == {} and len(stub.seen) == len(failures) + 2
    assert [line["judgment"] for line in lines(tmp_path / "j.jsonl")] == ["no grade"]


def test_a_server_without_keys_gets_none(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving((200, "[[7]]")) as stub:
        grade(stub, tmp_path, api_key_env="NO_SUCH_KEY")
    assert stub.seen and not any("Authorization" in headers for headers, _ in stub.seen)


def test_without_the_openai_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(UserError, match=r"needs the openai package; pip install openai$"):
        Judge("m", "http://localhost").check()


def test_it_goes_on_where_it_stopped(tmp_path, caplog):
    with (
        serving(*[(200, "[[5]]")] * 4, (401, "")) as stub,
        pytest.raises(JudgeError, match="check the key in OPENAI_API_KEY"),
    ):
        grade(stub, tmp_path, parallel=1)
    with open(tmp_path / "j.jsonl", "a") as file:
        file.write('{"question_id": 81, "judge')  # what a kill may leave
    with serving((200, "[[9]]")) as stub:
        grades = grade(stub, tmp_path, parallel=1)
    assert len(stub.seen) == 2 and sorted(grades.values()) == [5, 5, 5, 5, 9, 9]
    with serving((200, "[[1]]")) as stub:
        assert sorted(grade(stub, tmp_path).values()) == [5, 5, 5, 5, 9, 9] and not stub.seen
        assert "judge: 6 of 6 grades are kept from before" in caplog.text
        other = judge_answers(judge(stub), QUESTIONS, {81: ["another", "poem"]}, tmp_path / "j.jsonl", model_id="m")
    assert other == {(81, 1): 1, (81, 2): 1}


def test_ctrl_c_keeps_the_grades_of_the_requests_under_way(tmp_path, caplog, monkeypatch):
    answer, said = Stub.answer, "stops when the requests under way are answered"

    def interrupted(stub, handler):
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 30
        while said not in caplog.text and time.monotonic() < end:  # the main thread may be late
            time.sleep(0.01)
        time.sleep(0.5)  # it cancels the others right after
        answer(stub, handler)

    monkeypatch.setattr(Stub, "answer", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which the workers of pytest-xdist ignore
    try:
        with serving((200, "[[5]]")) as stub, pytest.raises(KeyboardInterrupt):
            grade(stub, tmp_path, parallel=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said in caplog.text and [line["score"] for line in lines(tmp_path / "j.jsonl")] == [5]


@pytest.mark.parametrize("first", [(200, "[[5]]"), (429, "", {"Retry-After": "0.01"})])
def test_no_faster_than_allowed(tmp_path, first):
    began = time.monotonic()
    with serving(first, (200, "[[5]]")) as stub:
        grade(stub, tmp_path, requests_per_minute=600, parallel=4)
    assert len(stub.times) == 6 + (first[0] == 429)
    assert all(moment - began >= 0.1 * number for number, moment in enumerate(stub.times))


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_judge_of_the_newer_kind(tmp_path, parallel, caplog):
    """It is asked as it wants after it has refused once, and that costs none of a grade's attempts."""
    with serving((200, "[[5]]")) as stub:
        stub.refuses = ("max_tokens", "temperature")
        grades = grade(stub, tmp_path, parallel=parallel, attempts=1)
    assert len(grades) == 6 and set(grades.values()) == {5}
    assert 2 <= len(stub.seen) - 6 <= 2 * parallel
    assert "takes no temperature of 0" in caplog.text
    accepted = [body for _, body in stub.seen if "max_tokens" not in body and "temperature" not in body]
    assert len(accepted) == 6 and {body["max_completion_tokens"] for body in accepted} == {16384}


TOO_LONG = (
    "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 8192 tokens."
)


def test_a_turn_that_is_refused_ends_no_other(tmp_path):
    """As one that is too long for the judge, which names a parameter that it takes all the same."""
    refusal = json.dumps({"error": {"message": TOO_LONG, "param": "max_tokens"}})
    with serving((200, "[[5]]"), (400, refusal), (200, "[[5]]")) as stub:
        grades = grade(stub, tmp_path, parallel=1, attempts=1)
    assert len(grades) == 5 and {body["max_tokens"] for _, body in stub.seen} == {2048}
    assert sorted(line["score"] for line in lines(tmp_path / "j.jsonl")) == [-1, 5, 5, 5, 5, 5]


def test_judges_of_one_name_behind_one_gateway_are_two():
    one, same, other = (Judge("m", f"http://here:{place}") for place in ("8000/a/v1", "8001/a/v1/", "8000/b/v1"))
    assert one.endpoint == same.endpoint == "here/a/v1" != other.endpoint


def test_an_address_with_a_password_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"judge\.base_url: holds a name or a password"):
        Judge("judge-1", "https://user:secret@judge.example/v1").check()


def test_other_refusals_are_told_in_the_endpoints_words(tmp_path, monkeypatch):
    monkeypatch.setitem(REFUSALS, "model", "The model 'judge-1' does not exist.")
    monkeypatch.setattr(Stub, "refuses", ("model",))
    with (
        serving((200, "")) as stub,
        pytest.raises(JudgeError, match=r"status 400 \(The model 'judge-1' does not exist.\)"),
    ):
        grade(stub, tmp_path, parallel=1)


def prompts_file(tmp_path, name="judge_prompts.jsonl", extra=""):
    entries = json.loads(PROMPTS.read_text())
    path = tmp_path / name
    path.write_text(
        "".join(json.dumps(entry | {"system_prompt": entry["system_prompt"] + extra}) + "\n" for entry in entries)
    )
    return str(path)


def test_what_is_said_of_the_prompts(tmp_path, monkeypatch):
    assert Judge("gpt-4").describe() == "gpt-4, by this package's own prompts, not comparable with published scores"
    other = Judge("gpt-4", prompts=prompts_file(tmp_path, extra="!"))
    assert other.describe().startswith("gpt-4, by the prompts of judge_prompts.jsonl (")
    assert "not FastChat's" in other.describe()
    monkeypatch.setattr("lora_null.eval_harness.mt_bench.judge.FASTCHAT_DIGEST", other.digest())
    assert other.describe() == "gpt-4, by FastChat's original prompts"
    assert task(judge=other).report_notes() == {"judge of MT-Bench": other.describe()}
    bare = MTBenchTask("MT-Bench", as_questions(ROWS), ask, judge=other)
    assert bare.report_notes()["judge of MT-Bench"].endswith(
        "; 2 questions of math, reasoning, coding without a reference answer"
    )
    assert task(judge=other).describe(None) != task(judge=Judge("gpt-4")).describe(None)


def test_fastchats_own_prompts_are_known():
    """By LORA_NULL_JUDGE_PROMPTS, the path of FastChat's file, which is not shipped."""
    path = os.environ.get("LORA_NULL_JUDGE_PROMPTS")
    if not path:
        pytest.skip("FastChat's judge_prompts.jsonl is not here (LORA_NULL_JUDGE_PROMPTS)")
    assert Judge("gpt-4", prompts=path).describe() == "gpt-4, by FastChat's original prompts"


def test_grades_by_other_prompts_are_not_taken_over(tmp_path):
    other = prompts_file(tmp_path, extra=" Be strict.")
    with serving((200, "[[9]]")) as stub:
        grade(stub, tmp_path)
    with serving((200, "[[2]]")) as stub:
        assert set(grade(stub, tmp_path, prompts=other).values()) == {2} and len(stub.seen) == 6
    with serving((200, "[[1]]")) as stub:
        assert set(grade(stub, tmp_path).values()) == {9} and set(grade(stub, tmp_path, prompts=other).values()) == {2}
        assert not stub.seen


def test_grades_of_another_machine_are_not_taken_over(tmp_path):
    with serving((200, "[[9]]")) as stub:
        grade(stub, tmp_path)
        stub.url = stub.url.replace("127.0.0.1", "localhost")
        stub.replies[:] = [(200, "[[2]]")]
        assert set(grade(stub, tmp_path).values()) == {2}


def test_a_file_shared_with_a_kept_evaluation_is_not_written_into(tmp_path):
    (tmp_path / "kept.jsonl").write_text(
        "{}\n".replace("{}", json.dumps({"score": -1, "judge": ["x"], "user_prompt": ""}))
    )
    with serving((200, "[[9]]")) as stub:
        os.link(tmp_path / "kept.jsonl", tmp_path / "j.jsonl")
        judge_answers(judge(stub), QUESTIONS, ANSWERS, tmp_path / "j.jsonl", model_id="m", progress=False)
    assert len(lines(tmp_path / "kept.jsonl")) == 1 and len(lines(tmp_path / "j.jsonl")) == 7


def test_a_turn_without_content_is_missing_alone(tmp_path):
    with serving((200, {"role": "assistant", "refusal": "no"}), (200, {}), (200, "[[9]]")) as stub:
        grades = grade(stub, tmp_path, attempts=1, parallel=1)
    scores = [line["score"] for line in lines(tmp_path / "j.jsonl")]
    assert scores.count(-1) == 2 and scores.count(9) == len(scores) - 2 == len(grades)


def test_an_endpoint_that_is_not_there(tmp_path):
    nowhere = Judge("judge-1", "http://127.0.0.1:9/v1", attempts=2, wait=0.01)
    with pytest.raises(JudgeError, match="gave no judgment in 2 attempts"):
        judge_answers(nowhere, QUESTIONS, ANSWERS, tmp_path / "j.jsonl", model_id="m", progress=False)


@pytest.mark.parametrize(
    "text, value",
    [("[[8]]", 8), ("[[7.5]] or [[2]]", 7.5), ("[6]", 6), ("8", -1), ("[[0]]", -1), ("[[11]]", -1), ("", -1)],
)
def test_grades(text, value):
    assert parse_grade(text) == value


def test_users_mistakes(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs a key in the environment variable OPENAI_API_KEY"):
        Judge("gpt-4").check()
    for key in ("sk-é", "sk-a\n", "sk a"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="the key in the environment variable OPENAI_API_KEY holds") as told:
            Judge("gpt-4").check()
        assert key not in str(told.value)
    for url in ("localhost:9/v1", "http://", "http://[::1", ""):
        with pytest.raises(UserError, match=r"judge\.base_url: .* is no address such as https://"):
            Judge("m", url).check()
    (tmp_path / "p.jsonl").write_text('{"name": "single-v1", "prompt_template": ""}\n')
    with pytest.raises(UserError, match="has no prompt 'single-v1-multi-turn'"):
        Judge("m", "http://localhost", prompts=str(tmp_path / "p.jsonl")).check()
    with pytest.raises(UserError, match="row 1 is no question"):
        as_questions([{"question_id": 1, "category": "x", "turns": ["only one"]}])
    row = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    with pytest.raises(UserError, match="row 2 has the id 1 of a row before it"):
        as_questions([row, row])
    for reference in (42, {"a": 1}):
        with pytest.raises(UserError, match="row 1 has a reference that is neither a text nor a list of texts"):
            as_questions([row | {"reference": reference}])
    for given, kept in ((["", "4"], ["", "4"]), (["2"], ["2", ""]), (["", None], []), ("42", ["42", ""]), ("", [])):
        assert as_questions([row | {"reference": given}])[0]["reference"] == kept


def test_answers_are_kept_or_nothing_is_generated(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="'MT-Bench': needs output_dir"):
        evaluate(model, tokenizer, [task()])
    with pytest.raises(UserError, match="'other' would write over its mt_bench"):
        evaluate(model, tokenizer, [task(), replace(task(), name="other")], output_dir=tmp_path)


def test_the_hubs_form_of_the_questions():
    row = {"prompt_id": 111, "category": "math", "prompt": ["a", "b"], "reference": ["2", "4"]}
    assert as_questions([row]) == [
        {"question_id": 111, "category": "math", "turns": ["a", "b"], "reference": ["2", "4"]}
    ]


def ask(before, question):
    return "".join(f"U: {asked}\nA: {answered}\n" for asked, answered in before) + f"U: {question}\nA:"


def task(**options):
    return MTBenchTask("MT-Bench", QUESTIONS, ask, max_new_tokens=6, **options)


def test_a_live_model_answers_both_turns_and_is_graded(model, tokenizer, tmp_path, monkeypatch):
    asked = []
    original = generate.generate_texts

    def spy(model, tokenizer, prompts, **options):
        asked.append((prompts, options["temperatures"]))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr("lora_null.eval_harness.mt_bench.task.generate_texts", spy)
    with serving((200, "[[4]]")) as stub:
        found = evaluate(model, tokenizer, [task(judge=judge(stub))], output_dir=tmp_path / "lora")
    answers = lines(tmp_path / "lora" / "mt_bench" / "answers.jsonl")
    assert [row["question_id"] for row in answers] == [81, 111, 121] and {row["model_id"] for row in answers} == {
        "lora"
    }
    assert all(set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for row in answers)
    first, second = answers[0]["choices"][0]["turns"]
    assert asked[0] == (["U: Write a poem.\nA:", "U: What is 1+1?\nA:", "U: Print 1.\nA:"], [0.7, 0.0, 0.0])
    assert asked[1][0][0] == f"U: Write a poem.\nA: {first}\nU: Again, shorter.\nA:" and second
    assert found.metrics["MT-Bench"] == Metric(4.0, 0.0, 6, True, "task", "score")
    assert found.settings["tasks"]["MT-Bench"]["missing"] == 0 and "MT-Bench turn 2" in found.metrics


def test_answers_outlive_a_judge_that_fails(model, tokenizer, tmp_path, caplog):
    with serving((404, "")) as stub:
        found = evaluate(model, tokenizer, [task(judge=judge(stub))], output_dir=tmp_path)
    assert found.metrics == {} and len(lines(tmp_path / "mt_bench" / "answers.jsonl")) == 3
    assert "not graded" in caplog.text


@pytest.mark.parametrize("with_judge", [True, False])
def test_the_command_that_is_printed_grades(model, tokenizer, tmp_path, caplog, capsys, with_judge):
    """What a run prints where it could not grade is taken by the command as it stands, and goes on where the run stopped."""
    folder = tmp_path / "a run" / "lora"
    with serving((200, "[[3]]"), (200, "[[3]]"), (404, "")) as stub, caplog.at_level("INFO"):
        options = {"prompts": prompts_file(tmp_path, "my prompts.jsonl"), "attempts": 2, "requests_per_minute": 6000.0}
        evaluate(model, tokenizer, [task(judge=judge(stub, **options) if with_judge else None)], output_dir=folder)
        said = next(record.message for record in caplog.records if "graded" in record.message)
        stub.replies[:] = [(200, "[[8]]")]
        words = shlex.split(said.partition(": lora-null ")[2])
        if not with_judge:
            words = [word.replace("MODEL", "judge-1") for word in words] + ["--base-url", stub.url]
        stub.seen.clear()
        assert commands.main(words) == 0
    out = capsys.readouterr().out
    assert "missing: 0 of 6 grades" in out and str(folder / "mt_bench" / "judgments.jsonl") in out
    assert len(stub.seen) == (4 if with_judge else 6)
    assert ("my prompts.jsonl" in out) == with_judge


def test_sampled_answers_are_the_same_twice(model, tokenizer, tmp_path):
    for name in ("a", "b"):
        evaluate(model, tokenizer, [task()], output_dir=tmp_path / name)
    one, other = (lines(tmp_path / name / "mt_bench" / "answers.jsonl") for name in ("a", "b"))
    assert [row["choices"] for row in one] == [row["choices"] for row in other]


def test_the_command(tmp_path, capsys, monkeypatch):
    write_answers(tmp_path / "a.jsonl", ANSWERS, model_id="m")
    for name, rows in (("q.jsonl", ROWS), ("r.jsonl", REFERENCES)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["judge", str(tmp_path / "a.jsonl"), "--questions", str(tmp_path / "q.jsonl"), "--model", "judge-1"]
    with serving((200, "[[8]]")) as stub:
        assert commands.main([*words, "--references", str(tmp_path / "r.jsonl"), "--base-url", stub.url]) == 0
    out = capsys.readouterr().out
    assert "MT-Bench         8.00 (n = 6)" in out and "missing: 0 of 6 grades" in out
    with FileLock(tmp_path / ".a.judgments.jsonl.lock"):  # as another command holds it
        assert commands.main([*words, "--base-url", "http://127.0.0.1:9"]) == 2
    assert "a.jsonl: is being graded by another command" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert commands.main(words) == 2
    assert commands.main([*words[:2], "--model", "judge-1", "--base-url", "http://127.0.0.1:9"]) == 2
    assert commands.main([*words, "--base-url", "http://127.0.0.1:9", "--parallel", "0"]) == 2
    assert (
        commands.main([*words[:3], str(tmp_path / "none.jsonl"), *words[4:], "--base-url", "http://127.0.0.1:9"]) == 2
    )
    assert capsys.readouterr().err.count("error: ") == 4
    for row, message in (
        ({"question_id": 81}, "a.jsonl: row 1 is not in FastChat's format"),
        ({"question_id": 81, "choices": [{"turns": []}]}, "a.jsonl: row 1 is not in FastChat's format"),
        (
            {"question_id": 81, "choices": [{"turns": ["x"]}], "twice": True},
            "a.jsonl: row 2 answers question 81 again",
        ),
        (
            {"question_id": "81", "choices": [{"turns": ["x", "y"]}]},
            "none of its question_ids is one of the questions'",
        ),
    ):
        (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * (2 if row.pop("twice", False) else 1))
        assert commands.main([*words, "--base-url", "http://127.0.0.1:9"]) == 2 and message in capsys.readouterr().err


def test_all_80_questions(tmp_path):
    if not (DATA / "mt_bench").is_dir():
        pytest.skip(f"{DATA / 'mt_bench'} is not here")
    questions = as_questions(
        *(lines(DATA / "mt_bench" / f"{name}.jsonl") for name in ("question", "reference_answer_gpt-4"))
    )
    assert len(questions) == 80
    with serving((200, "[[6]]")) as stub:
        answers = {question["question_id"]: ["one", "two"] for question in questions}
        grades = judge_answers(judge(stub), questions, answers, tmp_path / "j.jsonl", model_id="m", progress=False)
    assert len(grades) == 160
    used = [line["judge"][1] for line in lines(tmp_path / "j.jsonl")]
    assert used.count("single-math-v1") == used.count("single-math-v1-multi-turn") == 30


def test_no_bar_of_any_task_is_shown_where_none_is_wanted(model, tokenizer, tmp_path, nq_file, sciq_file, capfd):
    with serving((200, "[[4]]")) as stub:
        graded = task(judge=judge(stub))
        asked = [AnswerTask("facts", [("a b", "c")] * 3), LmEvalTask("nq_open", path=nq_file, limit=2)]
        asked += [LmEvalTask("sciq", path=sciq_file, limit=2), graded]
        shown = {}
        for progress in (True, False):
            capfd.readouterr()
            evaluate(model, tokenizer, asked, output_dir=tmp_path / str(progress), progress=progress)
            shown[progress] = capfd.readouterr().err
    assert all(
        name in shown[True] for name in ("facts", "judging", "MT-Bench turn 1", "loglikelihood", "generate_until")
    )
    assert "it/s" not in shown[False] and "%|" not in shown[False]
