"""What runs inside the jails: `python -I -S -c THIS_FILE program|examiner LIMITS`, started by `jails.py`.

A program and its tests never share a process. The examiner holds the tests; the program's process holds the functions
that the model wrote, and does what the examiner asks of them. Only plain values come back (numbers, texts, lists, tuples,
sets, dicts with their keys and items, decimals, fractions, ranges, dates), so that no object of the program decides what a
test finds; everything else stays there, and the examiner holds a `Remote` for it. Both processes start for every program, so this file imports next to nothing: its own messages
take 20 lines, `json` as long to import as Python to start.
"""

import builtins
import os
import resource
import sys

KINDS = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}
VIEWS = {"keys": type({}.keys()), "items": type({}.items())}  # of a dict; they equal sets, and have an order
# The standard library's whose values equal plain ones or each other; they are made again of what `__reduce__` says.
STANDARD = ("decimal.Decimal", "fractions.Fraction", "builtins.range", "builtins.bytearray", "datetime.date")
STANDARD += ("datetime.time", "datetime.datetime", "datetime.timedelta", "datetime.timezone")
LONGEST = 2**26  # bytes of a message
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # its system call's number
JOIN_SESSION_KEYRING = 1


def encode(value, refer):
    """Return a value as bytes: a letter for its kind, a number, a line's end, and for some kinds that many bytes or members.

    `refer` gives the number of what is no plain value.
    """
    if value is None or value is True or value is False:
        return b"cNone\n" if value is None else b"cTrue\n" if value else b"cFalse\n"
    if isinstance(value, int):
        return b"i%x\n" % value
    if isinstance(value, float):
        return b"f%s\n" % float.hex(value).encode()
    if isinstance(value, complex):
        return b"j%s %s\n" % (float.hex(value.real).encode(), float.hex(value.imag).encode())
    if isinstance(value, str | bytes | memoryview):
        letter, data = (
            (b"s", value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else (b"b", bytes(value))
        )
        return b"%s%d\n%s" % (letter, len(data), data)
    if isinstance(value, dict):
        pairs = [encode(part, refer) for pair in value.items() for part in pair]
        return b"d%d\n%s" % (len(value), b"".join(pairs))
    for letter, kind in KINDS.items():
        if isinstance(value, kind):
            return b"%s%d\n%s" % (letter, len(value), b"".join([encode(member, refer) for member in value]))
    for view, kind in VIEWS.items():
        if isinstance(value, kind):
            return b"v%s\n%s" % (view.encode(), encode(dict.fromkeys(value) if view == "keys" else dict(value), refer))
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in STANDARD:
        return b"m%s\n%s" % (name.encode(), encode(value.__reduce__()[1], refer))
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return b"k%s\n" % value.__name__.encode()
    return b"r%s\n" % str(refer(value)).encode()


def decode(data, resolve, start=0) -> tuple:
    """Return the value that `encode` wrote and where its bytes end; `resolve` gives what a number or name stands for.

    Raises:
        ValueError, TypeError, ArithmeticError, RecursionError: the bytes are no value.
    """
    end = data.index(b"\n", start) + 1
    letter, number = data[start : start + 1], data[start + 1 : end - 1].decode()
    if letter == b"c":
        return {"None": None, "True": True, "False": False}.get(number), end
    if letter == b"i":
        return int(number, 16), end
    if letter == b"f":
        return float.fromhex(number), end
    if letter == b"j":
        return complex(*map(float.fromhex, number.split(" "))), end
    if letter == b"r":
        return resolve(number), end
    if letter == b"k":
        if not isinstance(kind := getattr(builtins, number, None), type):
            raise ValueError(number)
        return kind, end
    if letter in (b"v", b"m"):
        if number not in (VIEWS if letter == b"v" else STANDARD):
            raise ValueError(number)
        held, end = decode(data, resolve, end)
        if letter == b"v":
            return getattr(dict, number)(held), end
        module, _, name = number.partition(".")
        return getattr(__import__(module), name)(*held), end
    size = int(number)
    if letter in (b"s", b"b"):
        text, end = data[end : end + size], end + size
        return text if letter == b"b" else text.decode("utf-8", "surrogatepass"), end
    members = []
    for _ in range(2 * size if letter == b"d" else size):
        member, end = decode(data, resolve, end)
        members.append(member)
    return dict(zip(members[::2], members[1::2])) if letter == b"d" else KINDS[letter](members), end


def send(file, value, refer=None):
    """Write a value to an open file number, after its length in 8 bytes."""
    data = encode(value, refer)
    left = memoryview(len(data).to_bytes(8, "big") + data)
    while left:
        left = left[os.write(file, left) :]


def receive(file, resolve=None):
    """Return the value that was sent.

    Raises:
        EOFError: the other side has ended, or sends what is too long; and what `decode` raises.
    """
    size = int.from_bytes(_read(file, 8), "big")
    if size > LONGEST:
        raise EOFError
    return decode(_read(file, size), resolve)[0]


def _read(file, size):
    parts = []
    while size:
        part = os.read(file, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def limit(what, most):
    """Lower a resource limit for good; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def limit_all(memory_mb, seconds, file_mb, tasks):
    """Limit address space, processor time, file size, open files, and processes with threads (0: left as they are)."""
    limit(resource.RLIMIT_AS, memory_mb * 2**20)
    limit(resource.RLIMIT_CPU, seconds)
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
    """Return the numbers of the files that this process was started with; the standard ones are empty from now on."""
    numbers = [os.dup(number) for number in range(3)]
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    return numbers


# --- the program's side ----------------------------------------------------------------------------------------------


def hold_program():
    """Run the program, then do with its functions and objects what the examiner asks, until nobody asks any more."""
    requests, answers, errors = take_pipes()
    os.close(errors)
    leave_keyring()
    names = vars(sys.modules.setdefault("program", type(sys)("program")))  # not __main__: HumanEval runs no main block
    objects = []

    def keep(value):
        objects.append(value)
        return len(objects) - 1

    def resolve(key):
        if key.isdecimal():
            return objects[int(key)]
        if key not in names:
            raise NameError(f"name {key!r} is not defined")
        return names[key]

    operations = {"call": lambda function, *args, **keywords: function(*args, **keywords), "next": next, "len": len}
    operations |= {"getattr": getattr, "setattr": setattr, "iter": iter, "bool": bool, "str": str}
    operations |= {"getitem": lambda value, key: value[key], "ready": lambda: None}
    operations["run"] = lambda code: exec(compile(code, "program.py", "exec"), names)
    while True:
        operation, asked = receive(requests)
        try:
            (args, keywords), _ = decode(asked, resolve)
            send(answers, ("value", operations[operation](*args, **keywords)), keep)
        except BaseException as error:
            send(answers, ("raised", [kind.__name__ for kind in type(error).__mro__], _text(error)))


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
    asked = encode((args, keywords), _number_of)
    try:
        send(to_program, (operation, asked))
        kind, *found = receive(from_program, Remote)
        if kind == "value":
            (value,) = found
            return value
        names, text = found
        known = [getattr(builtins, name, None) for name in names]
    except (OSError, EOFError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
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
    """Say when the program's process answers, run the tests, and send the verdict: (whether they passed, why not)."""
    global from_program, to_program
    from_program, to_program, verdict = take_pipes()
    job = receive(from_program)
    ask("ready")
    send(verdict, "ready")
    passed, reason = False, ""
    try:
        ask("run", job["code"])
        names = Names(__name__="tests", **{name: Remote(name) for name in job["names"]})
        for part in ("setup", "tests"):
            exec(compile(job[part], f"{part}.py", "exec"), names)
        passed = True
    except Ended:
        reason = "ended early"
    except MemoryError:
        reason = "no memory"
    except BaseException as error:
        reason = ": ".join(filter(None, ("" if isinstance(error, Raised) else type(error).__name__, _text(error))))
    send(verdict, (passed, reason[:500]))
    os._exit(0)


if __name__ == "__main__":
    os.closerange(3, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16))  # such as folders outside the jail
    role, *numbers = sys.argv[1:]
    limit_all(*map(int, numbers))
    {"program": hold_program, "examiner": examine}[role]()
