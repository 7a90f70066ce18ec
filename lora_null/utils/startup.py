"""How a command starts and ends: imports without garbage collections, its own lines, its status, its launcher."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm

from lora_null.utils.errors import UserError, causes, first_line

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
SIGTERM_STATUS = 128 + signal.SIGTERM
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # a full disk, a quota
WORKER, WORKERS = "LORA_NULL_WORKER", "LORA_NULL_WORKERS"  # of processes that work apart: which, of how many
LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"}
MARK = "ACCELERATE_MIXED_PRECISION"  # which accelerate sets for what it launches
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that comes when the parent ends


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections; later ones leave out what comes with PyTorch, which stays.

    Looking through its objects again and again takes a fifth of the time of the imports, and half a second of every
    later collection.
    """
    first, enabled = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if first and "torch" in sys.modules:
            gc.freeze()


class _LineHandler(logging.Handler):
    """Writes our own messages to stderr as plain lines, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stderr)


def show_messages() -> None:
    """Show the package's own messages as plain lines on stderr, as its commands do."""
    package = logging.getLogger("lora_null")
    package.handlers, package.propagate = [_LineHandler()], False
    package.setLevel(logging.INFO)


def quiet() -> None:
    """Show our own messages; silence the libraries' notes, bars and warnings about what we decide ourselves."""
    show_messages()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def end_with_launcher(number: int = signal.SIGTERM) -> None:
    """Let a signal come when the `accelerate launch` has ended that started this process alone; 0: none any more.

    On SIGTERM it ends without a word to its one process, which would train on with nobody to end it. Several processes,
    which LOCAL_RANK tells, get its signals from it. On macOS nothing tells of a parent's end. Any other parent may end as
    it likes: a shell, nohup.
    """
    if not sys.platform.startswith("linux") or MARK not in os.environ or "LOCAL_RANK" in os.environ:
        return
    parent, words = os.getppid(), []
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")
    if PurePath(words[0] if words else "").name.startswith("python") and LAUNCHERS & {PurePath(w).name for w in words}:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it has ended in between
            os.kill(os.getpid(), number)


class _Output(io.FileIO):
    """Stdout or stderr, whose reader may leave, as `head` does, or whose disk may fill: what follows goes nowhere.

    So no command stops half-way because nobody reads on, or for want of space for a log. Another pipe or socket that is
    closed is still an error.
    """

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, *NO_SPACE):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno in NO_SPACE:
                self.lost = True
                name, other = ("stdout", sys.stderr) if self.fileno() == 1 else ("stderr", sys.stdout)
                print(f"{name}: no space left on its disk; what follows is not written there", file=other)
            return super().write(data)


def stdout_is_whole() -> bool:
    """Return whether all that was printed is written, in a command whose output is its product."""
    sys.stdout.flush()
    raw = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer) if isinstance(sys.stdout, io.TextIOWrapper) else None
    return not (isinstance(raw, _Output) and raw.lost)


def _outlive_readers() -> None:
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if not isinstance(old, io.TextIOWrapper) or old is not getattr(sys, f"__{name}__"):
            continue  # another one's, as a test's
        old.flush()
        raw = _Output(old.fileno(), "w", closefd=False)
        buffer = raw if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(raw)  # python -u has no buffer
        new = io.TextIOWrapper(buffer, old.encoding, old.errors, None, old.line_buffering, old.write_through)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; return its status: 2 for a user's mistake or a file that is closed to the user, 1 for a full disk, each
    told in one line on stderr; 130 for Ctrl-C.

    Of many processes it is told once per machine. Any other exception is a fault of ours and keeps its traceback. What the
    encoding of stdout lacks is printed as "?". A reader of stdout or stderr that leaves, as `head` does, changes nothing, nor
    does a full disk that they are written to.
    """
    _outlive_readers()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return command() or 0
    except UserError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        _tell("\n".join(map(str, interrupt.args)) or "stopped", head="")
        return INTERRUPTED
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            _tell(f"no file or folder has a name as long as {error.filename}")  # pyright: ignore[reportAttributeAccessIssue]
            return 2
        refused = next(filter(None, map(_why_refused, causes(error, suppressed=False))), None)
        if refused is not None:
            _tell(refused)
            return 2
        reason = next(filter(None, map(_why_not_written, causes(error))), None)
        if reason is None:
            raise
        _tell(f"{reason}; what was finished before is whole; give the command again (`train` with --resume)")
        return 1


def launched_index() -> int:
    """Return which of several processes a launcher has started this one as, those that work apart from then on too.

    A RANK without a WORLD_SIZE or a LOCAL_RANK, which launchers give too, is a leftover, and this process alone.
    """
    if WORKER in os.environ:
        return int(os.environ[WORKER])
    return int(os.environ.get("RANK", 0)) if starts_several() else 0


def starts_several() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" in os.environ


def _tell(message: str, head: str = "error: ") -> None:
    """Print a message once per machine: a mistake may be one machine's alone, as a file that is not there."""
    if launched_index() == 0 or os.environ.get("LOCAL_RANK") == "0":
        tqdm.write(f"{head}{message}", file=sys.stderr)  # on a line of its own, whatever bar was running


def _why_refused(error: BaseException) -> str | None:
    """Return what an exception tells of a file that this user may not read or write."""
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    if number not in (errno.EACCES, errno.EPERM, errno.EROFS) or not isinstance(file, str | os.PathLike):
        return None
    return f"cannot read or write {os.fspath(file)} ({os.strerror(number)})"


def _why_not_written(error: BaseException) -> str | None:
    """Return what an exception tells of a full disk, a quota or a limit, which torch and safetensors wrap in their own."""
    number, text, file = getattr(error, "errno", None), str(error), getattr(error, "filename", None)
    if number in NO_SPACE or "No space left on device" in text:
        return "no space left on the disk" + (f" of {os.path.dirname(file)}" if file else "")
    if number == errno.EFBIG or "File too large" in text:
        return "a file is larger than the system lets one be (ulimit -f)"
    # torch.save's writer says no more than where it could not go on
    stopped = "unexpected pos" in text or "PytorchStreamWriter failed" in text
    return f"a file could not be written, as on a full disk ({first_line(error)})" if stopped else None
