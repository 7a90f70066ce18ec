"""Imports without garbage collections."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import without garbage collections; what comes with PyTorch, which stays, is left out of later ones too.

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
