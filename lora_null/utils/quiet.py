"""Keep the libraries' notes out of the way of a command's own lines."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silence notes and progress bars of the libraries; warnings about what we decide ourselves are noise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
