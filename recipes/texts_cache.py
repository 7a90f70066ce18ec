"""Texts that the base writes to calibrate on, kept between runs: a model writes the same ones only once on a machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.data.calibration import Source
from lora_null.recipes.models.bases import attention, base_to_run, model_identity
from lora_null.trainer import CalibrationArgs, own_texts
from lora_null.utils.distributed import is_first_process, on_first_rank
from lora_null.utils.files import cache_root, hash_of, keep_newest, write_json

MAX_ENTRIES = 32  # the most sets of texts that are kept; the longest unused goes first


def folder() -> Path:
    """Return where the texts are kept."""
    return cache_root() / "own_texts"


@contextlib.contextmanager
def writer(
    section: ModelSection, name: str, tokenizer: PreTrainedTokenizerBase, cut: CalibrationArgs, cache: bool
) -> Iterator[Callable[[Source, int], list[str]]]:
    """Yield a function that returns as many texts as are asked for; the base is loaded when the first is to be written.

    Args:
        section: the recipe's model.
        name: its folder or hub id.
        tokenizer: its tokenizer.
        cut: how long a text may be, and the seed.
        cache: take equal texts of an earlier run, and keep these.
    """
    loaded: list[Any] = []

    def write(source: Source, count: int) -> list[str]:
        path = folder() / f"{_key(section, name, source, count, cut)}.json"
        texts = on_first_rank(lambda: _read(path)) if cache else None
        if texts is not None:
            if is_first_process():
                print(f"calibration: {count} texts that the model wrote before ({path})")
            return texts
        if not loaded:
            loaded.append(base_to_run(section, name))
        options = {"count": count, "max_tokens": cut.max_length, "prompts": source.prompts, "seed": cut.seed}
        texts = own_texts(loaded[0], tokenizer, **options)
        if cache:
            on_first_rank(lambda: _keep(path, texts))
        return texts

    try:
        yield write
    finally:
        loaded.clear()


def _key(section: ModelSection, name: str, source: Source, count: int, cut: CalibrationArgs) -> str:
    """Return a hash over all that the texts depend on."""
    parts = {
        "model": model_identity(section, name),
        "compute": [section.dtype, section.quantization, attention(section), PartialState().device.type],
        "end": section.eos_token,
        "texts": [source.prompts, count, cut.max_length, cut.seed],
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        "code": Path(own_texts.__code__.co_filename).read_text(encoding="utf-8"),
    }
    return hash_of(parts)


def _read(path: Path) -> list[str] | None:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        os.utime(path)
        return texts
    except (OSError, ValueError):
        return None


def _keep(path: Path, texts: list[str]) -> None:
    with contextlib.suppress(OSError):  # what cannot be written is not kept
        write_json(path, texts)
        keep_newest(path.parent.glob("*.json"), MAX_ENTRIES)
