"""What is kept between runs: evaluations of a base, and texts that a base wrote to calibrate on; nothing is computed twice."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness import Evaluation, Task, evaluation
from lora_null.recipes.config.schema import Recipe
from lora_null.recipes.data.calibration import Source, Windows, cut_windows
from lora_null.recipes.models.bases import Base, attention, base_to_run, model_identity
from lora_null.recipes.results import EVAL_FILE
from lora_null.trainer import CalibrationArgs, own_texts
from lora_null.utils.distributed import get_logger, is_first_process, num_processes, on_first_process
from lora_null.utils.errors import UserError
from lora_null.utils.files import cache_root, hash_of, keep_newest, link, replacing_folder, write_json

logger = get_logger(__name__)

PACKAGES = tuple(name for name in evaluation.PACKAGES if name != "peft")  # by which no base is loaded
MAX_BASES, MAX_TEXTS = 16, 32  # the most entries that are kept; the longest unused goes first


def bases_folder() -> Path:
    """Return where evaluations of bases are kept."""
    return cache_root() / "base_evaluations"


def base_key(recipe: Recipe, base: Base, tasks: Sequence[Task], limit: int | None) -> str:
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
        "model": model_identity(base),
        "compute": [*compute, *filter(None, [model.eos_token, engine, recipe.training.get("tf32")])],
        "tasks": asked,
        "batch_size": section.batch_size,
        "device": [PartialState().device.type, torch.cuda.get_device_name() if torch.cuda.is_available() else None],
        "processes": num_processes(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "code": evaluation.code_hash(),
    }
    return hash_of(parts)


def fetch_base(key: str, target: Path, references: Sequence[str]) -> bool:
    """Put the kept evaluation and its reference files into a run's base folder; return whether there was a whole one."""
    kept = bases_folder() / key
    try:
        if not all((kept / name).is_file() for name in (EVAL_FILE, *references)):
            shutil.rmtree(kept, ignore_errors=True)  # makes room for one that is whole
            return False
        # Not the lock of a folder, which is held in it.
        files = [file for file in kept.rglob("*") if file.is_file() and file.name[0] != "."]
        for file in files:
            file.open("rb").close()  # or a link would be as closed to this user as the file is
    except OSError as error:
        logger.warning(f"base: measured again, {error.filename} of the cache cannot be read ({error.strerror})")
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(files, key=lambda file: file.name == EVAL_FILE):  # which says that the copy is whole
        link(file, target / file.relative_to(kept))
    _touch(kept)
    return True


def keep_base(key: str, source: Path, found: Evaluation) -> None:
    """Keep a run's base folder, unless grades are missing in it; what cannot be written is not kept."""
    if any(task.get("missing") for task in found.settings["tasks"].values()):
        return
    with contextlib.suppress(OSError, UserError):  # a UserError where another process was first
        with replacing_folder(bases_folder() / key) as made:
            hidden = shutil.ignore_patterns(".*")
            shutil.copytree(source, made, dirs_exist_ok=True, copy_function=link, ignore=hidden)
        keep_newest((path for path in bases_folder().iterdir() if path.name[0] != "."), MAX_BASES)


def written_windows(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    cut: CalibrationArgs,
    cache: bool,
) -> Windows:
    """Return the windows of all sources, of those too whose texts the base writes; it is loaded for the first of these.

    Args:
        base: the model.
        tokenizer: its tokenizer.
        sources: of the texts.
        cut: how the windows are cut, and the seed.
        cache: take equal texts of an earlier run, and keep these.
    """
    model = functools.cache(lambda: base_to_run(base))

    def write(source: Source, count: int) -> list[str]:
        path = cache_root() / "own_texts" / f"{_texts_key(base, source, count, cut)}.json"
        texts = on_first_process(lambda: _read_texts(path)) if cache else None
        if texts is not None:
            if is_first_process():
                print(f"calibration: {count} texts that the model wrote before ({path})")
            return texts
        options = {"count": count, "max_tokens": cut.max_length, "prompts": source.prompts, "seed": cut.seed}
        texts = own_texts(model(), tokenizer, **options)
        if cache:
            on_first_process(lambda: _keep_texts(path, texts))
        return texts

    return cut_windows(sources, tokenizer, cut, write)


def _texts_key(base: Base, source: Source, count: int, cut: CalibrationArgs) -> str:
    """Return a hash over all that the texts depend on."""
    section = base.section
    parts = {
        "model": model_identity(base),
        "compute": [section.dtype, section.quantization, attention(section), PartialState().device.type],
        "end": section.eos_token,
        "texts": [source.prompts, count, cut.max_length, cut.seed],
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        "code": Path(own_texts.__code__.co_filename).read_text(encoding="utf-8"),
    }
    return hash_of(parts)


def _read_texts(path: Path) -> list[str] | None:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    _touch(path)
    return texts


def _touch(path: Path) -> None:
    """Let an entry be the newest, unless it is another user's, in a cache that several share."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _keep_texts(path: Path, texts: list[str]) -> None:
    with contextlib.suppress(OSError):  # what cannot be written is not kept
        write_json(path, texts)
        keep_newest(path.parent.glob("*.json"), MAX_TEXTS)
