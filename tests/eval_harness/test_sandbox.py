"""Programs run, and cannot get out: one attack a test, on every jail that works here.

A jail that does not work here is skipped, with the reason. LORA_NULL_JAILS=podman tries all attacks on a container engine, with
the image LORA_NULL_IMAGE.
"""

import contextlib
import ctypes
import functools
import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_null.eval_harness.code import inside, jails, programs
from lora_null.eval_harness.code.jails import find_jail
from lora_null.eval_harness.code.programs import Program, run_program, use_jail
from lora_null.utils.errors import UserError

TRIED = os.environ.get("LORA_NULL_JAILS", "bwrap").split(",")
IMAGE = os.environ.get("LORA_NULL_IMAGE", jails.IMAGE)


def working(name):
    """Return the jail, or skip the test with the reason why it does not work here."""
    try:
        return find_jail(name, IMAGE)
    except UserError as error:
        pytest.skip(str(error).partition("; eval.code")[0])


@pytest.fixture(params=TRIED)
def jail(request):
    """A jail that works here."""
    return working(request.param)


@pytest.fixture
def run(jail):
    """`run_program` in a jail that works here."""
    return functools.partial(run_program, jail=jail)


@pytest.fixture(params=[*TRIED, "unsafe"])
def run_anyhow(request):
    """`run_program` in a jail that works here, or without one: what has nothing to do with the jail."""
    return functools.partial(run_program, jail=working(request.param))


def squares(code, count=3):
    """Return a program whose function `f` should square."""
    return Program(code, tests=f"for i in range(2, {2 + count}):\n    assert f(i) == i * i, i\n", names=("f",))


# --- what a program may do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", jails.JAILS)
def test_each_jail(name):
    jail = working(name)
    assert run_program(squares("def f(x): return x * x"), jail=jail).passed
    assert not run_program(squares("def f(x): return x"), jail=jail).passed


def test_good_and_bad_programs(run_anyhow):
    assert run_anyhow(squares("def f(x):\n    return x * x")).passed
    assert run_anyhow(squares("def f(x):\n    return x + x")).reason == "AssertionError: 3"
    assert run_anyhow("def f(x):\n    return x + 1\nassert f(1) == 2").passed
    assert run_anyhow("assert 1 == 2, 'no'").reason == "AssertionError: no"
    assert run_anyhow("def f(:").reason.startswith("SyntaxError")
    assert run_anyhow("class Odd(Exception): pass\nraise Odd('x')").reason == "Odd: x"
    assert run_anyhow(squares("")).reason == "NameError: name 'f' is not defined"


def test_a_program_may_write_files_start_threads_and_use_the_standard_library(run_anyhow):
    assert run_anyhow(
        "import os, threading\n"
        "open('a.txt', 'w').write('x'); os.rename('a.txt', 'b.txt'); os.remove('b.txt')\n"
        "thread = threading.Thread(target=list); thread.start(); thread.join()\n"
        "import sqlite3, decimal, ctypes, ssl, asyncio, json, random, tempfile; tempfile.TemporaryFile()\n"
        "x = input"
    ).passed


VALUES = [
    None,
    True,
    3,
    -(2**70),
    1.5,
    float("inf"),
    -0.0,
    1j,
    "é\ud800",
    b"\x00",
    [1, (2,)],
    {1: {2}, "a": frozenset()},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back_as_they_are(value):
    program = Program(
        "def f(x): return x",
        tests=f"x = {value.__name__ if isinstance(value, type) else repr(value)}\nassert repr(f(x)) == repr(x)".replace(
            "inf", "1e999"
        ),
        names=("f",),
    )
    assert run_program(program, jail=find_jail("unsafe")).passed


STANDARD = {  # what a program returns, and what equals it
    "{'b': 1, 'a': 2}.keys()": "{'a', 'b'}",
    "{'a': [1]}.items()": "{'a': [1]}.items()",
    "list({'b': 1, 'a': 2}.keys())": "['b', 'a']",
    "[decimal.Decimal('1.5')]": "[1.5]",
    "{fractions.Fraction(1, 2): 1}": "{0.5: 1}",
    "range(1, 7, 2)": "range(1, 6, 2)",
    "bytearray(b'ab')": "b'ab'",
    "memoryview(b'ab')": "b'ab'",
    "datetime.date(2020, 1, 2)": "datetime.date(2020, 1, 2)",
    "datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc)": "datetime.datetime.fromisoformat('2020-01-02T00:00+00:00')",
    "datetime.timedelta(1)": "datetime.timedelta(hours=24)",
}


@pytest.mark.parametrize("value", STANDARD)
def test_values_of_the_standard_library_equal_plain_ones(value):
    code = f"import datetime, decimal, fractions\ndef f(x): return {value} if x is None else x"
    tests = f"assert f(None) == {STANDARD[value]} and f({STANDARD[value]}) == {STANDARD[value]} and f(None) != 7\n"
    assert run_program(Program(code, tests=tests, names=("f",)), jail=find_jail("unsafe")).passed


def test_tests_may_hold_objects_of_the_program():
    code = (
        "class Pair:\n    def __init__(self, a, *, b=2): self.a, self.b = a, b\n"
        "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
        "def count(n): yield from range(n)\n"
        "def adder(n): return lambda m: n + m\n"
        "def fails(): raise ValueError('odd')\n"
    )
    tests = (
        "assert total([Pair(1), Pair(2, b=5)]) == 10\npair = Pair(3)\npair.a = 7\nassert pair.a == 7 and total([pair]) == 9\n"
        "assert list(count(3)) == [0, 1, 2] and adder(1)(2) == 3 and math.isclose(total([]), 0)\n"
        "try:\n    fails()\nexcept ValueError as error:\n    assert str(error) == 'odd'\nelse:\n    raise AssertionError\n"
    )
    found = run_program(
        Program(code, tests=tests, names=("Pair", "total", "count", "adder", "fails")), jail=find_jail("unsafe")
    )
    assert found.passed, found


# --- deciding its own verdict ----------------------------------------------------------------------------------------

FORGED = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit",
    "an exit in the function": "def f(x):\n    import os; os._exit(0)",
    "all equal": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "all equal and a number": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(7)",
    "no AssertionError": "import builtins\nclass E(BaseException): pass\nbuiltins.AssertionError = E\ndef f(x): return 7",
    "other builtins": "import builtins\nbuiltins.range = lambda *_: ()\nbuiltins.exec = print\ndef f(x): return 7",
    "a trace": "import sys\ndef f(x): return 7\nsys.settrace(lambda frame, *_: frame.f_locals.clear())\nsys.setprofile(print)",
    "exit hooks": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = print\ndef f(x): return 7",
    "a forged harness": "import sys\nmain = sys.modules['__main__']\nmain.decode = main.encode = main.examine = lambda *_: 9\ndef f(x): return 7",
    "answers before they are asked": (
        "import os\nfor n in range(64):\n    try: os.write(n, (b'\\0' * 7 + b'\\x12t2\\ns5\\nvaluecNone\\n') * 9 + b'\\0' * 7 + b'\\x0ft2\\ncTrue\\ns0\\n')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "a token of the caller": (
        "import os, sys\nframe = sys._getframe()\n"
        "while frame:\n"
        "    for text in [x for x in frame.f_locals.values() if isinstance(x, str) and len(x) == 32]:\n"
        "        for n in range(16):\n            try: os.write(n, text.encode())\n            except OSError: pass\n"
        "        os._exit(0)\n"
        "    frame = frame.f_back\n"
    ),
    "what the caller holds": (
        "import sys, os, gc\nfound, frame = gc.get_objects(), sys._getframe()\n"
        "while frame: found += [*frame.f_globals.values(), *frame.f_locals.values()]; frame = frame.f_back\n"
        "for text in [x.encode() if isinstance(x, str) else x for x in found if isinstance(x, (str, bytes))]:\n"
        "    for n in range(16):\n        try: os.write(n, text)\n        except OSError: pass\n"
        "os._exit(0)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_a_program_cannot_pass_without_right_answers(run_anyhow, how):
    found = run_anyhow(squares(FORGED[how]), seconds=3)
    assert not found.passed and found.reason


VALUE = b"t2\ns5\nvalue"  # a pair of this word and what follows
HOSTILE = {
    "no value": b"hello\n",
    "nothing": b"",
    "deeply nested": VALUE + b"l1\n" * 10**5,
    "a list in a set": VALUE + b"e1\nl0\n",
    "a very long list": VALUE + b"l999999999999\ni0\n",
    "an endless number": VALUE + b"i" + b"f" * 10**6 + b"\n",
    "a name for a number": VALUE + b"fnumber\n",
    "a function for a kind": VALUE + b"kexec\n",
    "an unknown kind": VALUE + b"q3\nabc",
    "a view of no dict": VALUE + b"vkeys\nl0\n",
    "no view": VALUE + b"vclear\nd0\n",
    "a class that is not offered": VALUE + b"mos.system\nt1\ns4\nexit",
    "a fraction by nothing": VALUE + b"mfractions.Fraction\nt2\ni1\ni0\n",
    "no decimal": VALUE + b"mdecimal.Decimal\nt1\ns1\nx",
    "a negative length": VALUE + b"s-5\nabc",
    "half a text": VALUE + b"s9\nabc",
    "no exception": b"t3\ns6\nraisedi1\ni2\n",
    "an exit": b"t3\ns6\nraisedl1\ns10\nSystemExits1\n0",
    "a verdict": b"t2\ncTrue\ns0\n",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_answer_that_is_none_ends_it(what):
    code = f"import os\ndef f(x):\n    data = {HOSTILE[what]!r}\n    os.write(4, len(data).to_bytes(8, 'big') + data); os._exit(0)"
    if what == "deeply nested":
        code = code.replace(repr(HOSTILE[what]), f"{VALUE!r} + b'l1\\n' * 10**5").replace(
            "os._exit(0)", "import time; time.sleep(9)"
        )
    found = run_program(squares(code), seconds=5, jail=find_jail("unsafe"))
    assert not found.passed and found.reason


@pytest.mark.parametrize("size", ["b'\\xff' * 8", "(2**27).to_bytes(8, 'big')"])
def test_an_answer_that_is_too_long_ends_it(size):
    code = f"import os, time\ndef f(x):\n    os.write(4, {size}); time.sleep(9)"
    assert run_program(squares(code), seconds=5, jail=find_jail("unsafe")).reason == "ended early"


def test_a_program_cannot_change_what_tests_compare_by():
    from lora_null.eval_harness.code.programs import mbpp_program

    doc = {
        "test_list": ["assert set(f([1])) == set([2])", "assert math.isclose(f(1), 2)", "assert sum(1, 2) == 3"],
        "code": "def f(x): 0\ndef sum(a, b): 0",
    }
    program = mbpp_program(
        doc, "def f(x): return 7\ndef set(x): return 1\nsum = max = abs = lambda *_: 3\nclass math: isclose = bool"
    )
    assert program.names == ("f", "sum")
    assert not run_program(program, jail=find_jail("unsafe")).passed


# --- the evaluating process ------------------------------------------------------------------------------------------


def refused(run, code, **options):
    """Say that a program which returns only if its attack succeeds does not."""
    found = run(code, **options)
    assert not found.passed and "Error" in found.reason, found


def test_limits_of_the_evaluating_process(run):
    before = [resource.getrlimit(what) for what in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE)]
    attack = "import os, resource\nfor what in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE): resource.prlimit({}, what, (1, 1))"
    run(attack.format("os.getppid()"))
    refused(run, attack.format(os.getpid()))
    assert before == [resource.getrlimit(w) for w in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE)]


def test_a_signal_to_the_evaluating_process(run):
    refused(run, f"import os, signal; os.kill({os.getpid()}, 0)")
    refused(run, f"import os, signal; os.killpg({os.getpgid(0)}, 0)")


def test_a_signal_to_everything(run):
    with subprocess.Popen(["sleep", "60"]) as other:
        assert not run(
            "import os, signal; os.kill(-1, signal.SIGKILL); os.kill(os.getppid(), signal.SIGKILL); os._exit(0)",
            seconds=2,
        ).passed
        assert other.poll() is None
        other.kill()


def test_ptrace(run):
    refused(run, f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0")


def test_memory_of_the_evaluating_process(run):
    refused(run, f"open('/proc/{os.getpid()}/mem', 'rb').seek(4096)")
    read = "import ctypes\nbuffer = ctypes.create_string_buffer(8)\nclass V(ctypes.Structure): _fields_ = [('a', ctypes.c_void_p), ('n', ctypes.c_size_t)]\n"
    there = ctypes.create_string_buffer(b"secret")
    read += f"assert ctypes.CDLL(None).process_vm_readv({os.getpid()}, ctypes.byref(V(ctypes.addressof(buffer), 8)), 1, ctypes.byref(V({ctypes.addressof(there)}, 8)), 1, 0) == 8"
    refused(run, read)


def test_environment_of_the_evaluating_process(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    refused(run, f"open('/proc/{os.getpid()}/environ').read()")
    refused(run, "import os; open(f'/proc/{os.getppid()}/environ').read()")
    found = run("import os; raise ValueError(sorted(os.environ))").reason
    assert "KEY" not in found and "PYTHONPATH" not in found, found


def test_files_that_the_evaluating_process_has_open(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with open(tmp_path / "thesis.tex", "r+") as file:
        os.set_inheritable(file.fileno(), True)
        refused(
            run,
            "import os\nfor n in range(3, 4096):\n    try: os.stat('..', dir_fd=n)\n    except OSError: continue\n    break\nelse: raise ValueError",
        )
        refused(run, f"import ctypes; assert ctypes.CDLL(None).syscall(434, {os.getpid()}, 0) >= 0")


@pytest.mark.parametrize("stream", ["2", "1", "4"])
def test_filling_the_evaluating_process_by_output(run, stream):
    code = f"import os\nlump = b'x' * 2**20\nfor _ in range(860): os.write({stream}, lump)\nos.write({stream}, b'\\n'); raise KeyError('done')"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(squares(code), seconds=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def thesis(tmp_path):
    """A file that is the same after the test, in a folder that nothing was added to, readable for everybody."""
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(0o777) if folder == tmp_path else folder.chmod(folder.stat().st_mode | 0o055)
    path.chmod(0o666)
    yield path
    assert path.read_text() == "years of work" and list(tmp_path.iterdir()) == [path]


OUTSIDE = {
    "open": "open({path!r}, 'w')",
    "read": "open({path!r}).read()",
    "remove": "import os; os.remove({path!r})",
    "rmtree": "import shutil; shutil.rmtree({folder!r})",
    "rename": "import os; os.rename({path!r}, '/tmp/x')",
    "hard link": "import os; os.link({path!r}, '/tmp/x')",
    "symbolic link": "import os; os.symlink({path!r}, '/tmp/x'); open('/tmp/x', 'a').write('!')",
    "write by dir_fd": "import os; root = os.open('/', os.O_RDONLY); os.open({path!r}[1:], os.O_WRONLY, dir_fd=root)",
    "create by dir_fd": "import os; root = os.open('/', os.O_RDONLY); os.open({folder!r}[1:] + '/new', os.O_CREAT, dir_fd=root)",
    "delete by dir_fd": "import os; root = os.open('/', os.O_RDONLY); os.unlink({path!r}[1:], dir_fd=root)",
    "by many parents": "import os; os.remove('../' * 20 + {path!r})",
    "by root of others": "import os; os.remove('/proc/1/root' + {path!r})",
    "by a C library": "import ctypes; assert ctypes.CDLL(None).truncate({path!r}.encode(), 0) == 0, ctypes.get_errno()",
    "chroot": "import os; os.mkdir('/tmp/a'); os.chroot('/tmp/a'); os.chdir('../' * 20); os.remove({path!r}[1:])",
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_a_file_outside(run, thesis, how):
    refused(run, OUTSIDE[how].format(path=str(thesis), folder=str(thesis.parent)))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/home", "/root/.bashrc", "/proc/self/status", "/sys/kernel", __file__]
)
def test_nothing_but_python_is_there(run, jail, path):
    if jail.name in jails.ENGINES and path != __file__:
        pytest.skip("an image has these of its own")
    refused(run, f"import os; os.stat({path!r})")


@pytest.mark.parametrize("folder", ["/", "/dev", "/dev/shm", "/etc", "{library}"])
def test_nothing_else_can_be_written(run, folder):
    refused(run, f"import os; open({folder!r}.format(library=os.path.dirname(os.__file__)) + '/new', 'w')")


def test_python_itself_cannot_be_changed(run):
    refused(run, "import os; os.chmod(os.__file__, 0o777)")
    refused(run, "import os; open(os.__file__, 'a').write('#')")
    assert run("import os").passed


def test_filling_the_disk(run):
    fill = "for n in range(9):\n    with open(f'/tmp/{n}', 'wb') as file:\n        for _ in range(8): file.write(bytes(2**20))\n"
    refused(run, fill)
    refused(
        run,
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); open('/tmp/x', 'wb').write(bytes(17 * 2**20))",
    )
    assert run("open('/tmp/x', 'wb').write(bytes(8 * 2**20))").passed


def test_nothing_is_left_behind(run_anyhow):
    where = run_anyhow("import os; open('x', 'w'); raise ValueError(os.getcwd())").reason.removeprefix("ValueError: ")
    assert where.startswith("/") and not Path(where, "x").exists()
    assert run_anyhow("import os; assert not os.listdir('.')").passed


# --- time, memory, processes -----------------------------------------------------------------------------------------


OWN_MB = 1000 + os.getpid() % 1000  # a limit on memory by which the processes of this test are known


def running():
    """Return the processes that were started with that limit and run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] * (f"\0{OWN_MB}\0".encode() in path.read_bytes())
    return found


def reaches(count):
    """Return whether that many run before 10 seconds are over: the kernel starts and ends them in its time."""
    until = time.monotonic() + 10
    while len(running()) != count and time.monotonic() < until:
        time.sleep(0.02)
    return len(running()) == count


STUBBORN = {
    "a loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "all signals ignored": "import signal, time\nfor n in set(signal.valid_signals()) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)",
    "nothing is caught": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a regular expression": "import re; re.match('(a*)*b', 'a' * 40)",
    "in the function": "def f(x):\n    while True: pass",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
}  # fmt: skip


@pytest.mark.parametrize("how", STUBBORN)
def test_time_is_limited(run, how):
    began = time.perf_counter()
    assert run(squares(STUBBORN[how]), seconds=0.5, memory_mb=OWN_MB).reason == "timed out"
    assert time.perf_counter() - began < 10 and reaches(0)


def test_time_is_limited_without_a_jail():
    with use_jail("unsafe"):
        assert run_program("while True: pass", seconds=0.5).reason == "timed out"


def test_memory_is_limited(run_anyhow):
    assert run_anyhow("x = bytearray(3 * 2**30)").reason == "no memory"
    assert run_anyhow("x = []\nwhile True: x.append(bytearray(2**24))", memory_mb=256).reason == "no memory"
    assert run_anyhow("x = bytearray(2**28)").passed


def test_a_result_that_does_not_fit(run):
    assert not run(squares("def f(x): return bytearray(2**20) * 600"), seconds=5).passed
    assert not run(squares("def f(x): return 'x' * 2**27"), seconds=5).passed


def test_a_fork_bomb(run):
    refused(run, "import os, time\nfor n in range(200):\n    if os.fork() == 0: time.sleep(60)\n", seconds=5)
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not run(squares(bomb), seconds=0.5, memory_mb=OWN_MB).passed
    assert reaches(0)


def test_a_thread_bomb(run):
    refused(
        run, "import threading, time\nfor n in range(200): threading.Thread(target=time.sleep, args=(60,)).start()"
    )


@pytest.mark.parametrize(
    "left", ["os.fork()", "os.fork() == 0 and os.setsid()", "threading.Thread(target=time.sleep, args=(60,)).start()"]
)
def test_what_a_program_leaves_running_ends_with_it(run, left):
    began = time.perf_counter()
    run(
        squares(
            f"import os, threading, time\nparent = os.getpid()\n{left}\nif os.getpid() != parent: time.sleep(60)\ndef f(x): return x * x"
        ),
        seconds=20,
        memory_mb=OWN_MB,
    )
    assert time.perf_counter() - began < 10 and reaches(0)


def test_it_ends_with_the_evaluating_process(jail):
    """An evaluating process that is killed leaves nothing running."""
    script = f"from lora_null.eval_harness.code.jails import find_jail\nfrom lora_null.eval_harness.code.programs import run_program\nrun_program('while True: pass', seconds=60, memory_mb={OWN_MB}, jail=find_jail({jail.name!r}, {IMAGE!r}))"
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        assert reaches(6)  # bubblewrap twice, and Python, for the program and for the examiner
        child.kill()
    assert reaches(0)


def test_it_is_the_first_to_go_when_memory_runs_out(jail):
    with jail.start("program", jails.Limits(1, OWN_MB), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL):
        assert reaches(3)
        assert {path.with_name("oom_score_adj").read_text().strip() for path in running()} == {"1000"}


# --- network, and what processes share -------------------------------------------------------------------------------


def test_network(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused(run, f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)")
        refused(run, f"import _socket; _socket.socket().connect(('127.0.0.1', {port}))")


def test_abstract_sockets(run):
    name = f"\0lora-null-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        refused(run, f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})")


def test_raw_sockets_and_no_way_out(run):
    refused(run, "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)")
    refused(run, "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))")


def test_shared_memory_of_others(run):
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x10AA0000 + os.getpid() % 2**16
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    try:
        refused(run, f"import ctypes; assert ctypes.CDLL(None).shmget({key}, 4096, 0o666) >= 0")
        refused(run, f"import ctypes; assert ctypes.CDLL(None).shmat({segment}, None, 0) not in (-1, None)")
    finally:
        libc.shmctl(segment, 0, None)


def test_keys_of_the_user(run):
    number = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
    libc = ctypes.CDLL(None, use_errno=True)
    add = {"x86_64": 248, "aarch64": 217}.get(os.uname().machine)
    key = libc.syscall(add, b"user", b"lora-null-test", b"secret", 6, -3) if add else -1
    if key < 0:
        pytest.skip("this kernel gives no keyring")
    try:
        refused(
            run,
            f"import ctypes; b = ctypes.create_string_buffer(6); assert ctypes.CDLL(None).syscall({number}, 11, {key}, b, 6, 0) == 6",
        )
        refused(
            run,
            f"import ctypes; assert ctypes.CDLL(None).syscall({number}, 10, -3, b'user', b'lora-null-test', 0) > 0",
        )
    finally:
        libc.syscall(number, 9, key, -3)  # unlink


# --- privileges ------------------------------------------------------------------------------------------------------


def test_becoming_root(run):
    refused(run, "import os; os.setuid(0)")
    refused(run, "import os; os.execv('/usr/bin/su', ['su'])")
    refused(run, "import subprocess; subprocess.run(['mount'])")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's jail runs as another user")
def test_roots_jail_is_nobodys():
    """Outside too, where the limit on processes counts."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with working("bwrap").start("program", jails.Limits(), **pipes) as process, process.stdin, process.stdout:
        inside.send(process.stdin.fileno(), ("ready", inside.encode(((), {}), None)))
        assert inside.receive(process.stdout.fileno())[0] == "value"
        status = Path(f"/proc/{process.pid}/status").read_text()
    lines = {line.partition(":")[0]: line.split()[1:] for line in status.splitlines()}
    assert {*lines["Uid"], *lines["Gid"]} == {str(jails.NOBODY)} and not lines["Groups"]


def test_namespaces_and_mounts(run):
    for call in (
        "unshare(0x10000000)",
        "unshare(0x20000)",
        "mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "umount2(b'/tmp', 2)",
        "setns(0, 0)",
    ):
        refused(run, f"import ctypes; assert ctypes.CDLL(None).{call} == 0")


def test_the_name_of_the_computer(run):
    before = socket.gethostname()
    refused(run, "import socket; socket.sethostname('mine')")
    assert socket.gethostname() == before


def test_typing_into_the_terminal(run):
    refused(run, "open('/dev/tty', 'w')")
    refused(
        run,
        "import fcntl, termios\nfor n in range(8):\n    try: fcntl.ioctl(n, termios.TIOCSTI, b'x')\n    except OSError: continue\n    break\nelse: raise ValueError",
    )


def test_devices(run):
    refused(run, "import os; os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0)); open('/tmp/disk', 'rb').read(1)")
    refused(run, "open('/dev/mem', 'rb')")


@pytest.mark.parametrize("numbers", ["range(3, 64)", "(3, 4)", "range(64)"])
def test_closing_all_files(run, numbers):
    assert run(
        squares(f"import os\nfor n in {numbers}:\n    try: os.close(n)\n    except OSError: pass"), seconds=3
    ).reason


# --- choosing a jail -------------------------------------------------------------------------------------------------


def test_a_jail_that_hangs_has_a_time_limit_for_a_long_job_too(monkeypatch):
    monkeypatch.setattr(programs, "START_SECONDS", 0.5)
    monkeypatch.setattr(jails.LimitsAlone, "command", lambda self, name: ["/bin/sh", "-c", "sleep 60", "sh"])
    with pytest.raises(UserError, match=r"the jail did not start \(no answer\)"):
        run_program(Program("x = 1", tests="#" * 2**18), jail=jails.LimitsAlone())


def test_where_no_jail_works_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    find_jail.cache_clear()
    with pytest.raises(
        UserError, match=r"bwrap is not installed .*eval.code.jail names another.*--allow-code-execution=unsafe"
    ):
        run_program("x = 1")
    with pytest.raises(UserError, match="podman is not installed"), use_jail("podman"):
        run_program("x = 1")
    with use_jail("unsafe"):
        assert run_program("x = 1").passed
    with pytest.raises(UserError, match=r"no jail is called 'bwarp' .did you mean 'bwrap'"):
        find_jail("bwarp")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: Unknown option --disable-userns' >&2; exit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    jails.bubblewrap_command.cache_clear()
    with pytest.raises(UserError, match=r"bwrap, which must be 0.8 or newer, does not start: .*"):
        run_program("x = 1")
    jails.bubblewrap_command.cache_clear()
    find_jail.cache_clear()


ENGINE = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open({log!r}, "a") as file: file.write(json.dumps(words) + chr(10))
if words[0] == "run":
    image = words.index("IMAGE:1")
    os.execv({python!r}, [{python!r}, *words[image + 1:]])
"""


def test_a_container_engine_is_asked_for_what_holds_a_program(monkeypatch, tmp_path):
    """A stand-in records what it is asked, and runs the Python of this machine."""
    log = tmp_path / "log"
    for engine in jails.ENGINES:
        (tmp_path / engine).write_text(ENGINE.format(python=jails.interpreter(), log=str(log)))
        (tmp_path / engine).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find_jail.cache_clear()
    for engine in jails.ENGINES:
        with use_jail(engine, "IMAGE:1"):
            assert run_program(squares("def f(x): return x * x")).passed
            assert run_program(squares("def f(x):\n    while True: pass"), seconds=1).reason == "timed out"
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    started = [words for words in asked if words[0] == "run"]
    names = [words[words.index("--name") + 1] for words in started]
    assert len(started) == 10 and len(set(names)) == 10
    assert {words[1] for words in asked if words[0] == "kill"} <= set(names) and sum(
        w[0] == "kill" for w in asked
    ) == 8
    for words in started:
        text = " ".join(words)
        for option in (
            "--network none",
            "--read-only",
            "--cap-drop ALL",
            "no-new-privileges",
            "--pids-limit 8",
            "--memory",
        ):
            assert option in text
    find_jail.cache_clear()


def test_without_a_jail_the_own_folder_is_removed_and_the_environment_empty(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with use_jail("unsafe"):
        assert "KEY" not in run_program("import os; raise ValueError(sorted(os.environ))").reason
