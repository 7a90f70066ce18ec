"""`accelerate launch` of one process ends on SIGTERM without a word to it, which then trains on with nobody to end it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path, PurePath

LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"}
MARK = "ACCELERATE_MIXED_PRECISION"  # which accelerate sets for what it launches
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that comes when the parent ends


def end_with_launcher(number: int = signal.SIGTERM) -> None:
    """Let a signal come when the `accelerate launch` has ended that started this process alone; 0: none any more.

    Several processes, which LOCAL_RANK tells, get its signals from it. On macOS nothing tells of a parent's end. Any other
    parent may end as it likes: a shell, nohup.
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
