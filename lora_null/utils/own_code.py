"""Code of somebody's own in a model: hooks, and forward passes that were put into classes of libraries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from inspect import isfunction
from types import FunctionType
from typing import Any

from torch import nn

LIBRARIES = {"torch", "transformers", "peft", "accelerate", "trl", "lora_null"}  # whose hooks leave the numbers alone


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
