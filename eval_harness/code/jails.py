"""What holds a program that a model wrote: bubblewrap, a container engine, or resource limits alone.

A jail starts `inside.py` with the system's or the image's Python. In bubblewrap's a process has namespaces of its own (users,
mounts, processes, network, interprocess communication, host name), sees Python's own files read-only and an empty
temporary folder of 16 MiB in memory, no /proc, no environment, no terminal, and has no capabilities, nor may it make
further namespaces. Where the evaluation runs as root, the jail runs as nobody, whose limit on processes holds.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_null.utils.errors import UserError, nearest

INSIDE = Path(__file__).with_name("inside.py")
BWRAP, UNSAFE, ENGINES = "bwrap", "unsafe", ("podman", "docker")
JAILS = (BWRAP, *ENGINES, UNSAFE)
IMAGE = "python:3.11-slim"
FILES_MB = 16  # of all files that a program writes, and of each of them
MAX_PROCESSES = 8  # processes and threads of a program
NOBODY = 65534
TRIAL_SECONDS = 60
PACKAGES = ("site-packages", "dist-packages")  # others', in the library's folder
NOT_COPIED = (*PACKAGES, "test", "tests", "tkinter", "idlelib", "ensurepip", "config-*")
# For Python, where root starts the jail. Popen's `user` would copy all of the page tables of a process with a model.
AS_NOBODY = f"import os, sys; sys.tracebacklimit = 0; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); os.execv(sys.argv[1], sys.argv[1:])"
FIRST_TO_DIE = (
    'echo 1000 > /proc/self/oom_score_adj; exec "$@"'  # for /bin/sh: if memory runs out, the jail goes first
)


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall-clock time, which the caller keeps; of processor time the next whole number and one more.
        memory_mb: of address space of each process, in MiB.
    """

    seconds: float = 10.0
    memory_mb: int = 1024


class Jail:
    """A way to hold programs.

    Attributes:
        name: what a recipe calls it.
        description: what the report says.
    """

    name: str
    description: str

    def command(self, name: str) -> list[str]:
        """Return the command line up to Python's arguments; `name` is unique to this start."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return further options of `subprocess.Popen`."""
        return {}

    def process_limit(self) -> int:
        """Return the limit on processes and threads that is set from inside; 0 where the jail itself limits them."""
        return MAX_PROCESSES

    def problem(self) -> str | None:
        """Return in a few words why it does not work here, None where it does."""
        return None

    @contextlib.contextmanager
    def start(self, role: str, limits: Limits, **pipes: Any) -> Iterator[subprocess.Popen[Any]]:
        """Start `inside.py` as "program" or "examiner"; when the block ends, nothing of it is left running."""
        name = f"lora-null-code-{secrets.token_hex(8)}"
        numbers = (limits.memory_mb, math.ceil(limits.seconds) + 1, FILES_MB, self.process_limit())
        python = ["-I", "-S", "-B", "-c", INSIDE.read_text(encoding="utf-8"), role, *map(str, numbers)]
        process = subprocess.Popen([*self.command(name), *python], start_new_session=True, **self.options(), **pipes)
        try:
            yield process
        finally:
            self.end(name)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def end(self, name: str) -> None:
        """End what killing the command does not end."""


def trial(command: Sequence[str], **options: Any) -> str | None:
    """Return the first line of a command's error output, None where it works."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, stdin=subprocess.DEVNULL, **options
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return None if done.returncode == 0 else lines[0]


class Bubblewrap(Jail):
    """bubblewrap (`bwrap`), 0.8 or newer."""

    name, description = "bwrap", "bubblewrap"

    def command(self, name: str) -> list[str]:
        return list(bubblewrap_command())

    def options(self) -> dict[str, Any]:
        return {"cwd": "/", "env": {}}

    def problem(self) -> str | None:
        if shutil.which("bwrap") is None:
            return "bwrap is not installed (apt install bubblewrap, dnf install bubblewrap)"
        wrong = trial([*bubblewrap_command(), "-I", "-S", "-c", ""], **self.options())
        return wrong and f"bwrap, which must be 0.8 or newer, does not start: {wrong.removeprefix('bwrap: ')}"


@functools.cache
def bubblewrap_command() -> tuple[str, ...]:
    """Return bubblewrap's command line with the files that Python needs, the interpreter last."""
    words = ["/bin/sh", "-c", FIRST_TO_DIE, "sh", shutil.which("bwrap") or "bwrap"]
    if os.geteuid() == 0:  # whose processes the system does not limit
        words = [interpreter(), "-I", "-S", "-B", "-c", AS_NOBODY, *words]
    words += ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--hostname", "jail"]
    words += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--die-with-parent", "--new-session", "--clearenv"]
    for path in python_files():
        words += ["--ro-bind", readable(path), path]
    for folder in (f"{path}/{packages}" for path in python_files() for packages in PACKAGES):
        if os.path.isdir(folder):  # other packages are not Python's own
            words += ["--perms", "0555", "--size", "4096", "--tmpfs", folder, "--remount-ro", folder]
    for device in ("null", "zero", "random", "urandom"):
        words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    words += ["--size", str(FILES_MB * 2**20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    for variable, value in {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}.items():
        words += ["--setenv", variable, value]
    return (*words, "--", interpreter())


def interpreter() -> str:
    """Return the path of the Python that this environment is made of."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def python_files() -> tuple[str, ...]:
    """Return what Python needs to start and to import its standard library: files, and the library's folders."""
    command = [interpreter(), "-I", "-S", "-c", "import sys; print('\\n'.join(sys.path))"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    library = [path for path in found if os.path.exists(path)]
    patterns = [f"{path}/{pattern}" for path in library for pattern in ("*.so", "lib-dynload/*.so")]
    modules = {file for pattern in patterns for file in glob.glob(pattern) if "_tkinter" not in file}  # no X libraries
    binaries = [interpreter(), *sorted(modules)]
    if (ldd := shutil.which("ldd") or shutil.which("/usr/bin/ldd")) is None:
        raise UserError("code execution: ldd, which tells what Python needs in the jail, is not installed")
    linked = subprocess.run([ldd, *binaries], capture_output=True, text=True).stdout
    libraries = re.findall(r"^\s.*?(/\S+) \(0x", linked, re.MULTILINE)
    paths = dict.fromkeys([interpreter(), *library, *libraries, "/etc/ld.so.cache"])
    return tuple(
        path for path in paths if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in library)
    )


def readable(path: str) -> str:
    """Return the path, or where nobody may not read it and the jail runs as nobody, that of a copy."""
    around = [path, *map(str, Path(path).resolve().parents)]
    if os.geteuid() != 0 or all(os.stat(one).st_mode & (1 if os.path.isdir(one) else 4) for one in around):
        return path
    copy = os.path.join(copies().name, secrets.token_hex(4))
    if os.path.isdir(path):
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns(*NOT_COPIED), ignore_dangling_symlinks=True)
        for packages in PACKAGES:
            os.makedirs(os.path.join(copy, packages), exist_ok=True)
    else:
        shutil.copy2(path, copy)
    return copy


@functools.cache
def copies() -> tempfile.TemporaryDirectory:
    """Return a folder that nobody may read and that is removed at the end of this process."""
    folder = tempfile.TemporaryDirectory(prefix="lora-null-python-")
    os.chmod(folder.name, 0o755)
    return folder


class Container(Jail):
    """podman or docker; the program runs on the Python of an image, in a container without network."""

    def __init__(self, name: str, image: str) -> None:
        self.name, self.image, self.description = name, image, f"{name}, {image}"

    def command(self, name: str) -> list[str]:
        words = [self.name, "run", "--rm", "--interactive", "--init", "--name", name, "--network", "none"]
        words += ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--ipc", "private"]
        words += ["--user", f"{NOBODY}:{NOBODY}", "--pids-limit", str(MAX_PROCESSES)]
        words += ["--memory", "2g", "--memory-swap", "2g"]
        words += ["--tmpfs", f"/tmp:rw,size={FILES_MB}m,mode=1777", "--shm-size", "1m", "--workdir", "/tmp"]
        return [*words, "--env", "HOME=/tmp", "--oom-score-adj", "1000", "--entrypoint", "python3", self.image]

    def process_limit(self) -> int:
        return 0

    def problem(self) -> str | None:
        if shutil.which(self.name) is None:
            return f"{self.name} is not installed"
        wrong = trial([*self.command(f"lora-null-trial-{secrets.token_hex(8)}"), "-I", "-S", "-c", ""])
        return wrong and f"{self.name} does not start {self.image}: {wrong}"

    def end(self, name: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([self.name, "kill", name], capture_output=True, timeout=TRIAL_SECONDS)


class LimitsAlone(Jail):
    """No jail: limits on time, memory and files. The program may read and write what its user may, and use the network."""

    name, description = UNSAFE, "no jail, limits on time, memory and files alone"

    def command(self, name: str) -> list[str]:
        return [interpreter()]

    def options(self) -> dict[str, Any]:
        return {"env": {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}}

    def process_limit(self) -> int:
        """Return the limit: the system counts all that its user runs, so what runs now and `MAX_PROCESSES` more."""
        running = 0
        for folder in glob.glob("/proc/[0-9]*/task"):
            with contextlib.suppress(OSError):
                running += len(os.listdir(folder)) if os.stat(folder).st_uid == os.getuid() else 0
        return running + MAX_PROCESSES

    @contextlib.contextmanager
    def start(self, role: str, limits: Limits, **pipes: Any) -> Iterator[subprocess.Popen[Any]]:
        with (
            tempfile.TemporaryDirectory(prefix="lora-null-code-", ignore_cleanup_errors=True) as folder,
            super().start(role, limits, cwd=folder, **pipes) as process,
        ):
            yield process


@functools.cache
def find_jail(name: str = BWRAP, image: str = IMAGE) -> Jail:
    """Return a jail that works here.

    Args:
        name: "bwrap", "podman", "docker" or "unsafe", which is none.
        image: for the container engines.

    Raises:
        UserError: no such jail, or it does not work here.
    """
    if name not in JAILS:
        raise UserError(f"code execution: no jail is called {name!r}{nearest(name, JAILS)}")
    jail = Container(name, image) if name in ENGINES else Bubblewrap() if name == BWRAP else LimitsAlone()
    if not sys.platform.startswith("linux") and name not in ENGINES:
        raise UserError(
            f"code execution: {name} needs Linux; eval.code.jail: podman or docker runs the code elsewhere"
        )
    if problem := jail.problem():
        raise UserError(
            f"code execution: {problem}; eval.code.jail names another of {', '.join((BWRAP, *ENGINES))}, and "
            f"--allow-code-execution={UNSAFE} runs the code with limits alone"
        )
    return jail
