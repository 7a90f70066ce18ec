"""Programs that a model writes: taken out of its answer to a programming task, and run apart from everything else.

A program runs in a process of its own, with no network, in a temporary folder, with limits on time and memory. What holds it,
outermost first: a clean environment and an empty folder that is removed afterwards; a wall clock after
which the process is killed; resource limits on memory, processor time and file size; a seccomp filter in the kernel, under
which it can open no socket, start no program and no process, and signal none; and Python's audit hooks, by which it
can neither write, move nor remove files outside its folder nor load C libraries. The hooks are a guard against accidents, not a
jail: a program written to break out of Python may read, and write, what its user may. See `sandbox_child.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_null.utils.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:\n```|```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_code(response: str, defines: str | None = None) -> str:
    """Return the code of a response: its first fenced block, the first that defines a function where there is one.

    Without a fence the whole response is code, whose leading blank lines and common indentation are kept.

    Args:
        response: the model's text.
        defines: the name of a function that the code should define.
    """
    blocks = FENCE.findall(response)
    if not blocks:
        return response
    return next((block for block in blocks if defines and _defines(block, defines)), blocks[0])


def humaneval_program(doc: Mapping[str, Any], response: str) -> str:
    """Return the program of a HumanEval answer: a whole function, or the body of the one in the prompt; and the tests.

    Args:
        doc: `prompt`, `entry_point` and `test`.
        response: the model's text.
    """
    code, name = extract_code(response, doc["entry_point"]), doc["entry_point"]
    if not _defines(code, name):
        return humaneval_completion(doc, code)
    imports_and_helpers = re.split(rf"^def {re.escape(name)}\b", doc["prompt"], maxsplit=1, flags=re.MULTILINE)[0]
    return f"{imports_and_helpers}\n{code}\n{doc['test']}\ncheck({name})\n"


def humaneval_completion(doc: Mapping[str, Any], completion: str) -> str:
    """Return the program of a HumanEval prompt, what the model went on with, and the tests."""
    return f"{doc['prompt']}{completion}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: Mapping[str, Any], response: str) -> str:
    """Return the program of an MBPP answer with its `test_setup_code` and `test_list`."""
    called = re.search(r"assert\s+\(*\s*(?:\w+\()*?(\w+)\(", doc["test_list"][0])
    code = extract_code(response, called and called[1])
    return "\n".join([code, doc.get("test_setup_code") or "", *doc["test_list"], ""])


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*def {re.escape(name)}\b", code, re.MULTILINE) is not None


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not why: the last line of its error, "timed out" or "no memory"."""

    passed: bool
    reason: str = ""


def run_program(program: str, *, seconds: float = 10.0, memory_mb: int = 1024) -> Outcome:
    """Run a Python program to its end.

    A program passes only if it reaches its last line: one that leaves early, with whatever status, does not.

    Args:
        program: the whole source, tests included.
        seconds: of wall-clock time.
        memory_mb: of address space, in MiB.

    Raises:
        UserError: the system cannot hold the program (no Linux, or no seccomp).
    """
    if not sys.platform.startswith("linux"):
        raise UserError("code execution: needs Linux, whose kernel keeps the generated code off the network")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lora-null-code-") as folder:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-I", "-B", str(CHILD), str(memory_mb), str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as child:
            try:
                given = f"{token}\n{program}".encode("utf-8", "surrogateescape")
                out, error = child.communicate(given, timeout=seconds + 5)
            except subprocess.TimeoutExpired:
                return Outcome(False, "timed out")
            finally:  # the whole session is killed, however the program ended
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
    return _outcome(child.returncode, out, error, token)


def _outcome(status: int, out: bytes, error: bytes, token: str) -> Outcome:
    lines = error.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else f"ended early with status {status}"
    if last.startswith("sandbox: "):
        raise UserError(f"code execution: {last.removeprefix('sandbox: ')}")
    if status == 0 and out.decode("utf-8", "replace").endswith(token):
        return Outcome(True)
    if status in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL) or "TimeoutError" in last:
        return Outcome(False, "timed out")
    return Outcome(False, "no memory" if last.startswith("MemoryError") else last)
