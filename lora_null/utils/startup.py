"""How a command starts: imports without garbage collections, and its own lines without the libraries' notes among them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from tqdm import tqdm


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
