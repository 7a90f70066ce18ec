"""Programs that a model writes: taken out of its answer to a programming task, and run with the task's tests.

A program and its tests run in two processes, each in a jail of its own (`jails.py`). The tests' process, the examiner,
calls the functions that the model wrote and compares the plain values that come back (`inside.py`), so the program
neither sees the tests nor has a say in whether they passed: whatever it does to its own process, it can only answer.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import IO, Any

from lora_null.eval_harness.code import inside
from lora_null.eval_harness.code.jails import BWRAP, IMAGE, Jail, Limits, find_jail
from lora_null.utils.errors import UserError

START_SECONDS = 60  # for a jail to start on a busy machine; a program's own time begins afterwards
VERDICT_BYTES = 2**16
PYTHON = ("", "python", "python3", "py")  # what a fence may say of its block
FENCE = re.compile(
    r"""```[^`\n]+``` |  # code within a line
    (?P<indent>^[ \t]*)?(?P<fence>```+|~~~+)[ \t]*(?P<language>[\w+#.-]*)[^\n`]*\n
    (?P<code>(?>  # whole strings and comments at once: a fence within them ends nothing
        \"\"\"(?:\\.|[^\\])*?\"\"\" | \'\'\'(?:\\.|[^\\])*?\'\'\' |
        "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | \#[^\n]* | .
    )*?)(?:\n?[ \t]*(?P=fence)|\Z)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def extract_code(response: str, defines: str | None = None) -> str:
    """Return the code of a response: its first fenced block of Python, the first that defines a function where there is one.

    A block is Python where its fence names that or nothing, or where no block's does. Without a fence the whole response is
    code, whose leading blank lines and common indentation are kept; not the one space that training puts before a response.

    Args:
        response: the model's text.
        defines: the name of a function that the code should define.
    """
    text = re.sub(r"\A (?=\S)", "", response)
    found = [match for match in FENCE.finditer(text) if match["fence"]]
    blocks = [_block(match) for match in found if match["language"].lower() in PYTHON] or [_block(m) for m in found]
    if not blocks:
        return text
    return next((block for block in blocks if defines and _defines(block, defines)), blocks[0])


def _block(match: re.Match[str]) -> str:
    """Return the code between two fences, without the indentation of the first: that of a list around it."""
    indent = len(match["indent"] or "")
    return re.sub(rf"^[ \t]{{1,{indent}}}", "", match["code"], flags=re.MULTILINE) if indent else match["code"]


@dataclass(frozen=True)
class Program:
    """What a model wrote, and how it is examined.

    Attributes:
        code: the model's, run in the program's process.
        setup: code of the task that the tests need, run in the examiner before them.
        tests: run in the examiner; they pass if they run to their end.
        names: what the tests find in the program's process, and not in their own.
    """

    code: str
    setup: str = ""
    tests: str = ""
    names: tuple[str, ...] = ()


def humaneval_program(doc: Mapping[str, Any], response: str) -> Program:
    """Return the program of a HumanEval answer: a whole function, or the body of the one in the prompt; and the tests.

    Args:
        doc: `prompt`, `entry_point` and `test`.
        response: the model's text.
    """
    code, name = extract_code(response, doc["entry_point"]), doc["entry_point"]
    if not _defines(code, name):
        return humaneval_completion(doc, code)
    return _humaneval(doc, f"{_imports_and_helpers(doc)}\n{code}\n")


def humaneval_completion(doc: Mapping[str, Any], completion: str) -> Program:
    """Return the program of a HumanEval prompt, what the model went on with, and the tests."""
    return _humaneval(doc, f"{doc['prompt']}{completion}\n")


def _humaneval(doc: Mapping[str, Any], code: str) -> Program:
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    return Program(code, _without_unused_imports(_imports_and_helpers(doc), tests), tests, (doc["entry_point"],))


def _imports_and_helpers(doc: Mapping[str, Any]) -> str:
    return re.split(rf"^def {re.escape(doc['entry_point'])}\b", doc["prompt"], maxsplit=1, flags=re.MULTILINE)[0]


def _without_unused_imports(setup: str, tests: str) -> str:
    """Return what comes before a function without the imports that tests do not use: typing takes as long as Python."""
    try:
        tree, names = ast.parse(setup), [node for text in (setup, tests) for node in ast.walk(ast.parse(text))]
    except SyntaxError:
        return setup
    used = {node.id for node in names if isinstance(node, ast.Name)} | {"*"}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [name for name in node.names if (name.asname or name.name.partition(".")[0]) in used]
    tree.body = [node for node in tree.body if getattr(node, "names", True)]
    return ast.unparse(tree)


def mbpp_program(doc: Mapping[str, Any], response: str) -> Program:
    """Return the program of an MBPP answer with its `test_setup_code` and `test_list`."""
    setup, tests = doc.get("test_setup_code") or "", "\n".join([*doc["test_list"], ""])
    names = _names_of_program(f"{setup}\n{tests}", doc.get("code") or "")
    function = next((name for name in names if re.search(rf"\b{name}\(", doc["test_list"][0])), None)
    return Program(extract_code(response, function), setup, tests, names)


def _names_of_program(tests: str, solution: str) -> tuple[str, ...]:
    """Return what tests use and do not define, in their order: built-in names only where the solution defines them.

    So a program that defines its own `set` or `abs` does not change what the tests compare by.
    """
    try:
        nodes = list(ast.walk(ast.parse(tests)))
        solved = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    except SyntaxError:
        return ()
    names = [node for node in nodes if isinstance(node, ast.Name)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | (sys.stdlib_module_names - called)
    known = (known | set(dir(builtins))) - solved
    return tuple(dict.fromkeys(node.id for node in names if node.id not in known))


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*def {re.escape(name)}\b", code, re.MULTILINE) is not None


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed its tests, and if not why: an error's name and text, "timed out" or "no memory"."""

    passed: bool
    reason: str = ""


@dataclass
class JailContext:
    """What `use_jail` says of the programs within its block.

    Attributes:
        name, image: the jail, as `find_jail` takes it.
        run_programs: whether programs run at all; where not, none passes.
        used: whether there was a program.
    """

    name: str = BWRAP
    image: str = IMAGE
    run_programs: bool = True
    used: bool = False


_current: ContextVar[JailContext | None] = ContextVar("jail", default=None)


@contextlib.contextmanager
def use_jail(name: str, image: str = IMAGE, *, run_programs: bool = True) -> Iterator[JailContext]:
    """Within the block, programs of this thread run in this jail, or none of them does; see `JailContext`."""
    context = JailContext(name, image, run_programs)
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def run_program(
    program: str | Program, *, seconds: float = 10.0, memory_mb: int = 1024, jail: Jail | None = None
) -> Outcome:
    """Run a program and its tests.

    A text alone has no tests apart from it. It passes if its process says that it came to its end, which a program that
    is written to deceive can say too; with tests, there is nothing to deceive.

    Args:
        program: what the model wrote, with its tests; or a text.
        seconds: of wall-clock time, from when both processes have started.
        memory_mb: of address space, in MiB.
        jail: what holds it; None for that of `use_jail`, or bubblewrap.

    Raises:
        UserError: no jail works here.
    """
    program = Program(program) if isinstance(program, str) else program
    context = _current.get() or JailContext()
    context.used = True
    if not context.run_programs:
        return Outcome(False, "not run in this process")
    with _examined(program, jail or find_jail(context.name, context.image), Limits(seconds, memory_mb)) as verdicts:
        try:
            if _message(verdicts, START_SECONDS) != "ready":
                raise ValueError("no answer")
        except (EOFError, ValueError, TimeoutError) as error:
            raise UserError(f"code execution: the jail did not start ({str(error) or 'no answer'})") from None
        try:
            return Outcome(*_message(verdicts, seconds))
        except TimeoutError:
            return Outcome(False, "timed out")
        except (EOFError, ValueError):
            return Outcome(False, "ended early, with its tests")


@contextlib.contextmanager
def _examined(program: Program, jail: Jail, limits: Limits) -> Iterator[int]:
    """Start a program and its examiner, each the other's standard input and output; yield the file of the verdict."""
    with contextlib.ExitStack() as started:
        with contextlib.ExitStack() as handed:
            requests, to_program = os.pipe()
            handed.callback(os.close, requests)
            handed.callback(os.close, to_program)
            pipes = {"stdin": subprocess.PIPE, "stdout": to_program, "stderr": subprocess.PIPE}
            examiner = started.enter_context(jail.start("examiner", limits, **pipes))
            assert examiner.stdin and examiner.stderr
            started.enter_context(examiner.stderr)
            pipes = {"stdin": requests, "stdout": examiner.stdin, "stderr": subprocess.DEVNULL}
            started.enter_context(jail.start("program", limits, **pipes))
            job = {**vars(program), "names": list(program.names)}
            # Beside the wait for an answer: what is longer than the pipe holds is sent as the examiner reads it, if it does.
            threading.Thread(target=_hand_over, args=(examiner.stdin, job), daemon=True).start()
        yield examiner.stderr.fileno()


def _hand_over(file: IO[bytes], job: dict[str, Any]) -> None:
    """Send a job and close the file; where the examiner did not start, what it wrote says why."""
    with file, contextlib.suppress(BrokenPipeError):
        inside.send(file.fileno(), job)


def _message(file: int, seconds: float) -> Any:
    """Return what an examiner sends.

    Raises:
        TimeoutError: it sends nothing in that time.
        EOFError: it has ended.
        ValueError: what it sends is no message; with its text.
    """
    until, found, size = time.monotonic() + seconds, b"", None
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while size is None or len(found) < size:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            part = os.read(file, (size or 8) - len(found))
            found += part
            if size is None and len(found) == 8:
                size = 8 + int.from_bytes(found, "big")
            if not part or (size or 0) > VERDICT_BYTES:
                if found:
                    raise ValueError((found + os.read(file, 500)).decode("utf-8", "replace").strip())
                raise EOFError
    return inside.decode(found[8:], None)[0]
