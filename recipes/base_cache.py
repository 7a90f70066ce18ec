"""Keep the base model's evaluation between runs: the same model under the same settings is never measured twice."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState

import lora_null.eval_harness
from lora_null.eval_harness import Evaluation, Task
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.models.bases import attention, model_identity
from lora_null.recipes.results import EVAL_FILE
from lora_null.utils.files import cache_root, hash_of, keep_newest, link

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "math-verify")
MAX_ENTRIES = 16  # the most evaluations that are kept; the longest unused goes first


def folder() -> Path:
    """Return where evaluations are kept."""
    return cache_root() / "base_evaluations"


def key_of(recipe: Recipe, model_name: str, tasks: Sequence[Task], limit: int | None) -> str:
    """Return a hash over all that a base model's results depend on, where the tasks are evaluated up to `limit` documents.

    That is: its files (a hub model's commit), dtype and attention; every task with its documents (local ones by content),
    limits and template; batch size, device, number of processes; versions, and this package's own evaluation code.
    """
    model, section = recipe.model, recipe.eval
    packages = PACKAGES if model.quantization is None else (*PACKAGES, "bitsandbytes")
    packages += ("vllm",) * (section.backend == "vllm" and find_spec("vllm") is not None)
    engine = None if section.vllm is None else section.vllm.model_dump()
    compute = [model.dtype, attention(model), section.bf16, section.backend, model.quantization]
    asked = [{"label": t.label, "role": t.role} | t.describe(t.effective_limit(limit)) for t in tasks]
    parts = {
        "model": model_identity(model, model_name),
        "compute": [*compute, *filter(None, [model.eos_token, engine, recipe.training.get("tf32")])],
        "tasks": asked,
        "batch_size": section.batch_size,
        "device": [PartialState().device.type, torch.cuda.get_device_name() if torch.cuda.is_available() else None],
        "processes": PartialState().num_processes,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "code": _code_hash(),
    }
    return hash_of(parts)


def _code_hash() -> str:
    home, digest = Path(lora_null.eval_harness.__file__).parent, hashlib.sha256()
    for file in sorted(home.rglob("*")):
        if file.suffix in (".py", ".yaml", ".json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def fetch(key: str, target: Path) -> bool:
    """Put the kept evaluation and its references into a run's base folder; return whether there was one."""
    kept = folder() / key
    if not (kept / EVAL_FILE).is_file():
        return False
    target.mkdir(parents=True, exist_ok=True)
    # eval.json comes last: it says that the copy is whole.
    for file in sorted(kept.rglob("*"), key=lambda file: file.name == EVAL_FILE):
        if file.is_file() and file.name[0] != ".":  # as the lock of a folder is, which is held in it
            link(file, target / file.relative_to(kept))
    with contextlib.suppress(OSError):  # another user's, in a cache that several share
        os.utime(kept)
    return True


def keep(key: str, source: Path, found: Evaluation) -> None:
    """Keep a run's base folder, unless grades are missing in it; what cannot be written is not kept."""
    if any(task.get("missing") for task in found.settings["tasks"].values()):
        return
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder(), prefix=".new-") as scratch:
            shutil.copytree(source, Path(scratch) / key, copy_function=link, ignore=shutil.ignore_patterns(".*"))
            if not (folder() / key).exists():
                os.replace(Path(scratch) / key, folder() / key)
        keep_newest((path for path in folder().iterdir() if path.name[0] != "."), MAX_ENTRIES)
    except OSError:
        return
