"""Keep the libraries' notes out of the way of a command's own lines."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from tqdm import tqdm


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
