"""HumanEval and MBPP: right solutions pass, wrong ones do not, nothing runs without consent."""

import functools
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_null.eval_harness import LmEvalTask, evaluate, validate_tasks
from lora_null.eval_harness.code.jails import UNSAFE, find_jail
from lora_null.eval_harness.code.programs import (
    extract_code,
    humaneval_completion,
    humaneval_program,
    mbpp_program,
    run_program,
    use_jail,
)
from lora_null.utils.errors import UserError

DATA = Path(os.environ.get("LORA_NULL_DATA") or Path(__file__).parents[3] / "shared" / "data")
HUMANEVAL = {
    "task_id": "t/0",
    "prompt": 'import math\n\n\ndef area(r: float) -> float:\n    """ Area of a circle. """\n',
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(f):\n    assert abs(f(1) - math.pi) < 1e-9\n    assert f(0) == 0\n",
}
MBPP = {
    "task_id": 11,
    "text": "Add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
}
ANSWERS = {  # what a model may write for HUMANEVAL, and whether it is right
    "    return math.pi * r * r\n": True,
    "    return 3 * r * r\n": False,
    " def area(r):\n    return math.pi * r * r": True,  # behind the space that training puts before a response
    " ```python\ndef area(r):\n\treturn math.pi * r * r\n```": True,
    "Here it is:\n```python\ndef area(r):\n    return math.pi * r ** 2\n```\nIt squares r.": True,
    "```\ndef area(r):\n    return math.pi * r ** 2\n": True,
    "```python\n    return math.pi * r * r\n```": True,
    "```python\nprint(1)\n```\n```python\ndef area(r):\n    return math.pi * r * r\n```": True,
    "```bash\npip install x\n```\nThen:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nDone.": True,
    "Output:\n```text\n3.14\n```\nof\n~~~Python title='a'\ndef area(r):\n    return math.pi * r * r\n~~~": True,
    "1. Like this:\n   ```python\n   def area(r):\n       return math.pi * r * r\n   ```": True,
    "Call ```area(1)``` then\n```python\r\ndef area(r):\r\n    return math.pi * r * r\r\n```": True,
    "def area(r):\n    return math.pi * r * r\nif __name__ == '__main__':\n    print(area(float(input())))": True,
    "@dataclasses.dataclass\nclass C:\n    x: int\ndef area(r):\n    return math.pi * r * C(r).x": False,
    "import dataclasses\n@dataclasses.dataclass\nclass C:\n    x: int\ndef area(r):\n    return math.pi * r * C(r).x": True,
    "def area(r):\n    return r": False,
    "I cannot do that.": False,
    "": False,
    "    import sys; sys.exit(0)": False,
}


def _jail():
    """Return the jail where one works here; what is tested here does not depend on it."""
    try:
        return find_jail().name
    except UserError:
        return UNSAFE


@pytest.fixture(autouse=True)
def jail():
    with use_jail(_jail()):
        yield


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer):
    assert run_program(humaneval_program(HUMANEVAL, answer)).passed is ANSWERS[answer]


def test_mbpp_answers():
    assert run_program(mbpp_program(MBPP, f"Sure.\n```python\n{MBPP['code']}\n```")).passed
    assert run_program(mbpp_program(MBPP, MBPP["code"])).passed
    assert not run_program(mbpp_program(MBPP, "def add(a, b):\n    return a - b")).passed


def test_fences():
    assert extract_code("```py\nx = 1\n```") == "x = 1"
    assert extract_code("no code") == "no code"
    for body in (
        "'''\n```\nf(1)\n```\n'''\nx = 1",
        '"""Use ```f(1)``` so."""',
        "x = '```'  # don't ```",
        "# it's\nx = 1",
    ):
        assert extract_code(f"Here:\n```python\n{body}\n```\nIt's that.\n```\ny\n```") == body
    assert extract_code('```python\nx = """a\n```\nb') == 'x = """a'  # a string that does not end
    assert extract_code("```js\nlet x\n```") == "let x"  # no Python, which its tests will tell


def _rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _passed(programs):
    run = functools.partial(run_program, jail=find_jail(_jail()), seconds=60)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [outcome.passed for outcome in pool.map(run, programs)]


def test_all_of_humanevals_own_solutions_pass_and_none_of_the_bad():
    rows = _rows("humaneval/HumanEval.jsonl")
    assert all(_passed(humaneval_completion(row, row["canonical_solution"]) for row in rows))
    assert not any(_passed(humaneval_program(row, "    return NotImplemented\n") for row in rows[::4]))


def test_mbpps_own_solutions_pass_and_none_of_the_bad():
    rows = [row for row in _rows("mbpp/mbpp.jsonl") if 11 <= row["task_id"] <= 510]
    odd = [
        row for row in rows if row["task_id"] in (126, 367)
    ]  # a function called sum, and tests that build its objects
    assert all(_passed(mbpp_program(row, row["code"]) for row in rows[::4] + odd))
    assert not any(_passed(mbpp_program(row, "def f():\n    pass") for row in rows[:20]))


def test_nothing_runs_without_consent(model, tokenizer, write):
    path = write("h.jsonl", [HUMANEVAL] * 2)
    with pytest.raises(UserError, match=r"runs code that the model writes; .*--allow-code-execution"):
        evaluate(model, tokenizer, [LmEvalTask("sandbox_humaneval", path=path)])


@pytest.mark.parametrize("task, row", [("sandbox_humaneval", HUMANEVAL), ("sandbox_mbpp", MBPP)])
@pytest.mark.parametrize("processes", [1, 2])
def test_right_answers_score_1_and_wrong_ones_0(model, tokenizer, write, monkeypatch, task, row, processes):
    """Through lm-eval, with the model's text replaced: one right answer and two wrong ones. Where other
    processes wait, programs run while they meet, on the answers that are there."""
    from lora_null.eval_harness.lm_eval import model as lm
    from lora_null.eval_harness.lm_eval import task as running

    ran = []

    def used(*args, run_programs=True):
        ran.append((run_programs, threading.current_thread() is threading.main_thread()))
        return use_jail(*args, run_programs=run_programs)

    def in_a_thread(act):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(act).result()

    monkeypatch.setattr(running, "num_processes", lambda: processes)
    monkeypatch.setattr(running, "slowly_on_first_process", in_a_thread)
    right = row.get("canonical_solution") or row["code"]
    answers = iter([right, "    return None", "```python\nraise"])
    answer = lambda self, requests, **_: [next(answers) for _ in requests]  # noqa: E731
    monkeypatch.setattr(lm.RowwiseLM, "generate_until", answer)
    path = write("rows.jsonl", [row] * 3)
    model.config.max_position_embeddings = 2048
    asked = validate_tasks([LmEvalTask(task, path=path, confirm_run_unsafe_code=True, jail=_jail())])
    monkeypatch.setattr(running, "use_jail", used)
    found = evaluate(model, tokenizer, asked)
    assert found.samples[task] == [1.0, 0.0, 0.0]
    assert ran == ([(True, True)] if processes == 1 else [(False, True), (True, False)])
