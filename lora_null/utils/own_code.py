"""Code of somebody's own: hooks of a model, forward passes that were put into classes of libraries, and the files it is in."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Iterator
from inspect import isfunction
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

LIBRARIES = {"torch", "transformers", "peft", "accelerate", "trl", "lora_null"}  # whose hooks leave the numbers alone
INSTALLED = {"site-packages", "dist-packages"}


def own_code_at(module: nn.Module) -> str | None:
    """Return the name of a forward hook, or of a forward put on this one module, that no library of ours has made."""
    replaced_forward = [vars(module)["forward"]] if "forward" in vars(module) else []
    own_forward = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    for outermost in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *replaced_forward):
        for code in _with_what_it_wraps(outermost):
            if code in own_forward:
                break
            # Not a function's `__module__`, which functools.wraps takes over from what it wraps.
            home = getattr(code, "__globals__", {}).get("__name__") or type(code).__module__
            if home.partition(".")[0] not in LIBRARIES:
                written = getattr(getattr(code, "__code__", None), "co_qualname", None)
                return written or getattr(code, "__qualname__", type(code).__name__)
    return None


def is_of_library(module: str) -> bool:
    """Return whether a Python module, by its name, is of Python or of a library whose code leaves the numbers alone."""
    return module.partition(".")[0] in LIBRARIES | sys.stdlib_module_names


def files_of(kind: type) -> set[Path]:
    """Return the files of one's own that a class, and those that it inherits from, are written in; see `own_files`."""
    names = {base.__module__ for base in kind.__mro__ if not is_of_library(base.__module__)}
    return own_files(Path(getattr(sys.modules.get(name), "__file__", None) or "") for name in names)


def own_files(files: Iterable[Path]) -> set[Path]:
    """Return files of one's own code, with those that they import, directly or through others, and that are not installed."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop().absolute()
        if file not in found and file.is_file():
            found.add(file)
            waiting += (path for path in _imported_by(file) if not INSTALLED & set(path.parts))
    return found


def _imported_by(file: Path) -> Iterator[Path]:
    """Yield the files of the modules, none of a library, that a Python file imports anywhere, also where it was not run yet."""
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (SyntaxError, ValueError):  # a compiled one
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            names, level = [alias.name for alias in node.names], 0
        elif isinstance(node, ast.ImportFrom):  # of a package it may name modules
            names, level = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names], node.level
        else:
            continue
        for parts in (name.split(".") for name in names if level or not is_of_library(name)):
            each = (parts[: i + 1] for i in range(len(parts)))
            yield from filter(None, (_file_of(part, file, level) for part in each))
            if level:
                yield file.parents[level - 1] / "__init__.py"


def _file_of(parts: list[str], importer: Path, level: int) -> Path | None:
    """Return the file of a module as Python finds it: loaded, beside what imports it, or on the path; None for none."""
    loaded = getattr(sys.modules.get(".".join(parts)), "__file__", None) if not level else None
    places = [importer.parents[level - 1]] if level else [importer.parent, *map(Path, sys.path)]
    each = (place.joinpath(*parts) for place in places)
    found = (path for module in each for path in (module.with_suffix(".py"), module / "__init__.py"))
    return Path(loaded) if loaded else next(filter(Path.is_file, found), None)


def foreign_code_in(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield user-defined functions in a library class's forward: patched in as the forward, or as what it calls."""
    home = next(k for k in kind.__mro__ if "forward" in vars(k))
    if is_of_library(home.__module__):
        yield from foreign_functions(vars(home)["forward"])


def foreign_functions(code: Any) -> Iterator[FunctionType]:
    """Yield the functions of no such library that a callable is, wraps, or calls by their names in its file."""
    for outer in filter(isfunction, _with_what_it_wraps(code)):
        called = (outer.__globals__.get(name) for name in outer.__code__.co_names)
        found = filter(isfunction, (outer, *called))
        yield from (function for function in found if not is_of_library(home_of(function)))


def home_of(function: FunctionType) -> str:
    """Return the name of the Python module whose globals a function reads; "" where it was made without one, as torch.fx does."""
    return str(function.__globals__.get("__name__") or "")


def _with_what_it_wraps(code: Any) -> Iterator[Any]:
    """Yield a callable and what is inside of it: of partials, of bound methods, of what functools.wraps has marked."""
    if isinstance(code, functools.partial):
        yield from _with_what_it_wraps(code.func)
    else:
        yield getattr(code, "__func__", code)
    if (inner := getattr(code, "__wrapped__", None)) is not None:
        yield from _with_what_it_wraps(inner)
