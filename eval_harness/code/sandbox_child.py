"""The process in which one generated program runs: `python -I sandbox_child.py MEMORY_MB SECONDS`, by `programs.py`.

Reads a token and the program from standard input; prints the token as its last word only if the program reaches its end.
It imports nothing but the standard library, and not this package, so that it starts in a few milliseconds.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

# linux/filter.h, linux/seccomp.h, linux/audit.h, linux/prctl.h
LOAD, EQUAL, BITS_SET, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # DENY: the call fails with EPERM
NO_SYSCALL = 0x00050026  # the call fails with ENOSYS, so that libc tries its older form
SET_NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
X32 = 0x40000000
CLONE_THREAD = 0x10000
COMMON = {"io_uring_setup": 425, "pidfd_open": 434, "pidfd_send_signal": 424}
MACHINES = {  # (audit architecture, clone, clone3, everything else that is denied)
    "x86_64": (0xC000003E, 56, 435, {"socket": 41, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101,
                                    "tkill": 200, "execveat": 322, **COMMON}),
    "aarch64": (0xC00000B7, 220, 435, {"socket": 198, "execve": 221, "kill": 129, "ptrace": 117, "tkill": 130,
                                      "execveat": 281, **COMMON}),
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CHANGES |= {"os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.chflags", "shutil.rmtree", "shutil.move"}
REFUSED = ("ctypes.", "subprocess.", "socket.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "pty.")


def instructions() -> list[tuple[int, int, int, int]]:
    """Return the filter (code, jump if true, jump if false, value): no socket, no program, no process, no signal."""
    architecture, clone, clone3, denied = MACHINES[platform.machine()]
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, DENY)]
    for number in denied.values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, DENY)]
    steps += [(EQUAL, 0, 1, clone3), (RETURN, 0, 0, NO_SYSCALL)]
    # A thread is a clone with CLONE_THREAD among its flags, the first argument; any other clone is a process.
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (BITS_SET, 1, 0, CLONE_THREAD), (RETURN, 0, 0, DENY)]
    return [*steps, (RETURN, 0, 0, ALLOW)]


def close_the_kernel() -> None:
    """Install the filter for good.

    Raises:
        OSError: the kernel refuses it.
    """
    program = b"".join(struct.pack("=HBBI", *step) for step in instructions())
    code = ctypes.create_string_buffer(program)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    filter_program = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    for call in ((SET_NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER, ctypes.byref(filter_program), 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


def limit(memory_mb: int, seconds: float) -> None:
    """Limit address space, processor time, file size and core dumps, and wake up when the time is over."""
    for what, most in (
        (resource.RLIMIT_AS, memory_mb * 2**20),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 16 * 2**20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def watch(folder: str) -> None:
    """Refuse, from now on, what changes anything outside the folder, and C libraries."""
    inside = os.path.join(os.path.realpath(folder), "")

    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is not allowed")
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if event in CHANGES or writing:
            for path in arguments[:2] if event in ("os.rename", "os.link", "shutil.move") else arguments[:1]:
                if not isinstance(path, int) and not os.path.realpath(os.fsdecode(path)).startswith(inside):
                    raise PermissionError(f"{event} outside the temporary folder is not allowed")

    sys.addaudithook(refuse)


def main() -> None:
    """Read the program, set its limits, run it, and print the token if it reached its end."""
    token, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").partition("\n")
    sys.stdin = open(os.devnull)  # noqa: SIM115  a program that reads its input finds it empty
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        close_the_kernel()
    except (OSError, KeyError) as error:
        print(f"sandbox: generated code cannot be kept off the network here ({error})", file=sys.stderr)
        return
    limit(int(sys.argv[1]), float(sys.argv[2]))
    watch(os.getcwd())
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os.write(out, token.encode())


if __name__ == "__main__":
    main()
