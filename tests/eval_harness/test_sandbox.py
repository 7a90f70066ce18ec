"""Generated code runs, and cannot do harm by accident."""

import os
import socket
import time
from pathlib import Path

import pytest

from lora_null.eval_harness.code.programs import run_program


def test_good_and_bad_programs():
    assert run_program("def f(x):\n    return x + 1\nassert f(1) == 2").passed
    failed = run_program("assert 1 == 2, 'no'")
    assert not failed.passed and failed.reason == "AssertionError: no"
    assert run_program("def f(:").reason.startswith("SyntaxError")


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()"])
def test_leaving_early_is_no_pass(leave):
    assert not run_program(f"{leave}\nassert False").passed


def test_printing_the_way_out_is_no_pass():
    assert not run_program("print('x' * 32); import os; os.write(1, b'0' * 32); os._exit(0)").passed


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "x = input"])
def test_time_is_limited(program):
    began = time.perf_counter()
    outcome = run_program(program, seconds=1)
    assert time.perf_counter() - began < 5
    assert outcome.passed == (program == "x = input") and outcome.reason == ("" if outcome.passed else "timed out")


def test_memory_is_limited():
    assert run_program("x = bytearray(3 * 2**30)").reason == "no memory"
    assert run_program("x = bytearray(2**28)").passed


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1)",
            f"import _socket; _socket.socket().connect(('127.0.0.1', {port}))",
        ):
            assert not run_program(program).passed, program


KERNEL = """
import sys
sys.path.insert(0, {folder!r})
import sandbox_child, ctypes
sandbox_child.close_the_kernel()
libc = ctypes.CDLL(None, use_errno=True)
for name, call in {{
    "socket": lambda: libc.socket(2, 1, 0),
    "fork": lambda: libc.fork(),
    "exec": lambda: libc.execv(b"/bin/true", None),
    "kill": lambda: libc.kill(1, 0),
}}.items():
    assert call() == -1 and ctypes.get_errno() == 1, name
import threading
thread = threading.Thread(target=print, args=("threads go on",))
thread.start(); thread.join()
"""


def test_the_kernel_itself_refuses(capfd):
    """Without the audit hooks, straight through libc: sockets, processes, programs and signals fail with EPERM."""
    import subprocess
    import sys

    import lora_null.eval_harness.code.sandbox_child as child

    done = subprocess.run(
        [sys.executable, "-c", KERNEL.format(folder=str(Path(child.__file__).parent))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "threads go on\n"


def test_no_other_process():
    for program in (
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
    ):
        assert not run_program(program).passed, program
    assert not run_program(f"import os, signal; os.kill({os.getpid()}, signal.SIGKILL)").passed


def test_files_outside_its_folder_are_safe(tmp_path):
    keep = tmp_path / "thesis.tex"
    keep.write_text("years of work")
    for program in (
        f"open({str(keep)!r}, 'w')",
        f"import os; os.remove({str(keep)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.rename({str(keep)!r}, 'mine')",
        f"import pathlib; pathlib.Path({str(tmp_path / 'new')!r}).touch()",
    ):
        assert not run_program(program).passed, program
    assert keep.read_text() == "years of work" and list(tmp_path.iterdir()) == [keep]
    assert run_program(
        "open('a.txt', 'w').write('x'); import os; os.rename('a.txt', 'b.txt'); os.remove('b.txt')"
    ).passed


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run_program("import os; assert 'OPENAI_API_KEY' not in os.environ").passed


def test_nothing_is_left_behind():
    folder = run_program("import os; raise ValueError(os.getcwd())").reason.removeprefix("ValueError: ")
    assert folder.startswith("/") and not Path(folder).exists()
