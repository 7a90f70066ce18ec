"""What runs inside the jails: `python -I -S -c THIS_FILE program|examiner LIMITS`, started by `jails.py`.

A program and its tests never share a process. The examiner holds the tests; the program's process holds the functions
that the model wrote, and answers what the examiner asks of them, one JSON line each. Only plain values come back (numbers,
texts, lists, tuples, sets, dicts), so that no object of the program decides what a test finds; everything else stays
there, and the examiner holds a `Remote` for it. This file imports the standard library alone and starts in milliseconds.
"""

import builtins
import json
import operator
import os
import resource
import signal
import sys

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
LONGEST_LINE = 2**26  # bytes of one answer
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # its system call's number
JOIN_SESSION_KEYRING = 1


def encode(value, refer):
    """Return a value as JSON can hold it; `refer` gives the number of what is no plain value."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else ["int", hex(value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(kept, refer)] for key, kept in value.items()]]
    for tag, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(member, refer) for member in value]]
    return ["ref", refer(value)]


def decode(data, resolve):
    """Return the value that `encode` wrote; `resolve` gives what a number stands for."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no encoded value")
        return data
    tag, body = data
    if tag in SEQUENCES:
        return SEQUENCES[tag]([decode(member, resolve) for member in body])
    if tag == "dict":
        return {decode(key, resolve): decode(kept, resolve) for key, kept in body}
    if tag == "int":
        return int(body, 16)
    if tag == "bytes":
        return bytes.fromhex(body)
    if tag == "complex":
        return complex(*body)
    if tag == "ref":
        return resolve(body)
    raise ValueError("no encoded value")


def limit(what, most):
    """Lower a resource limit for good; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def limit_all(memory_mb, seconds, file_mb, tasks):
    """Limit address space, processor time, file size, open files, and processes with threads (0: left as they are)."""
    limit(resource.RLIMIT_AS, memory_mb * 2**20)
    limit(resource.RLIMIT_CPU, int(seconds) + 1)
    limit(resource.RLIMIT_FSIZE, file_mb * 2**20)
    limit(resource.RLIMIT_NOFILE, 64)
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE):
        limit(what, 0)
    if tasks:
        limit(resource.RLIMIT_NPROC, tasks)


def leave_keyring():
    """Join an empty session keyring, since a process inherits the user's, with tickets and tokens in it."""
    import ctypes

    if (number := KEYCTL.get(os.uname().machine)) is not None:
        ctypes.CDLL(None).syscall(number, JOIN_SESSION_KEYRING, None, 0, 0, 0)


def take_pipes():
    """Return the streams that this process was started with; the standard ones are empty from now on."""
    streams = [os.fdopen(os.dup(number), mode, encoding="ascii") for number, mode in enumerate("rww")]
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    return streams


# --- the program's side ----------------------------------------------------------------------------------------------


def hold_program():
    """Run the program, then do with its functions and objects what the examiner asks, until nobody asks any more."""
    requests, answers, errors = take_pipes()
    errors.close()
    leave_keyring()
    names = {"__name__": "__main__"}
    objects = []

    def keep(value):
        objects.append(value)
        return len(objects) - 1

    def resolve(key):
        if isinstance(key, str) and key not in names:
            raise NameError(f"name {key!r} is not defined")
        return names[key] if isinstance(key, str) else objects[key]

    operations = {"call": lambda function, *args, **keywords: function(*args, **keywords), "next": next, "len": len}
    operations |= {"getattr": getattr, "setattr": setattr, "iter": iter, "bool": bool, "str": str}
    operations |= {"getitem": operator.getitem, "ready": lambda: None}
    operations["run"] = lambda code: exec(compile(code, "program.py", "exec"), names)
    for line in requests:
        operation, args, keywords = json.loads(line)
        try:
            args, keywords = decode(args, resolve), decode(keywords, resolve)
            answer = json.dumps(["value", encode(operations[operation](*args, **keywords), keep)])
        except BaseException as error:
            answer = json.dumps(["raised", [kind.__name__ for kind in type(error).__mro__], _text(error)])
        answers.write(answer + "\n")
        answers.flush()


def _text(error):
    try:
        return str(error)[:500]
    except BaseException:
        return ""


# --- the examiner's side ---------------------------------------------------------------------------------------------


class Ended(Exception):
    """The program's process has ended, or answers what is no answer."""


class Raised(RuntimeError):
    """What the program raised, where it is no built-in exception."""


def ask(operation, *args, **keywords):
    """Have the program's process do something, and return the plain value or a `Remote`.

    Raises:
        Ended: there is no answer any more.
        Exception: what the program raised, as the nearest built-in exception.
    """
    request = [operation, encode(list(args), _number_of), encode(keywords, _number_of)]
    try:
        to_program.write(json.dumps(request) + "\n")
        to_program.flush()
        line = from_program.readline(LONGEST_LINE)
        kind, *found = json.loads(line)
        if kind == "value":
            return decode(*found, Remote)
        names, text = found
        known = [getattr(builtins, name, None) for name in names if isinstance(name, str)]
        text = str(text)
    except (OSError, ValueError, TypeError, RecursionError):
        raise Ended from None
    for builtin in known:
        if isinstance(builtin, type) and issubclass(builtin, Exception) and builtin is not Exception:
            try:
                raised = builtin(text)
            except TypeError:
                break
            raise raised
    raise Raised(f"{names[0]}: {text}")


class Remote:
    """Something that stays in the program's process; a test may call it, and look at what it holds.

    It is equal to nothing but itself: whether two things are equal is never asked of the program.
    """

    def __init__(self, key):
        object.__setattr__(self, "_key", key)

    def __call__(self, *args, **keywords):
        return ask("call", self, *args, **keywords)

    def __getattr__(self, name):
        return ask("getattr", self, name)

    def __setattr__(self, name, value):
        ask("setattr", self, name, value)

    def __iter__(self):
        return ask("iter", self)

    def __next__(self):
        return ask("next", self)

    def __len__(self):
        return ask("len", self)

    def __bool__(self):
        return ask("bool", self)

    def __str__(self):
        return ask("str", self)

    def __getitem__(self, key):
        return ask("getitem", self, key)


def _number_of(value):
    if not isinstance(value, Remote):
        raise TypeError(f"a test cannot pass {type(value).__name__} to a program")
    return object.__getattribute__(value, "_key")


class Names(dict):
    """The names of the tests; those of the standard library's modules are known without an import."""

    def __missing__(self, name):
        if name in sys.stdlib_module_names and not hasattr(builtins, name):
            return __import__(name)
        raise KeyError(name)


def examine():
    """Run the tests and write the verdict: "ready" once the program's process answers, then a JSON line."""
    global from_program, to_program
    from_program, to_program, verdict = take_pipes()

    def end(passed, reason=""):
        verdict.write(json.dumps({"passed": passed, "reason": reason[:500]}) + "\n")
        verdict.flush()
        os._exit(0)

    job = json.loads(from_program.readline())
    ask("ready")
    verdict.write("ready\n")
    verdict.flush()
    signal.signal(signal.SIGALRM, lambda *_: end(False, "timed out"))
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])
    try:
        ask("run", job["code"])
        names = Names(__name__="tests", **{name: Remote(name) for name in job["names"]})
        for part in ("given", "tests"):
            exec(compile(job[part], f"{part}.py", "exec"), names)
    except Ended:
        end(False, "ended early")
    except MemoryError:
        end(False, "no memory")
    except BaseException as error:
        name = "" if isinstance(error, Raised) else type(error).__name__
        end(False, ": ".join(filter(None, (name, _text(error)))))
    end(True)


if __name__ == "__main__":
    os.closerange(3, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16))  # such as folders outside the jail
    limit_all(*json.loads(sys.argv[2]))
    {"program": hold_program, "examiner": examine}[sys.argv[1]]()
