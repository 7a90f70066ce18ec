"""What a folder RUN/METHOD is: the recipe it was trained by, what it left, the base it belongs to."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import CHAT_TEMPLATE_DIR

from lora_null.adapters.base_hash import same_base
from lora_null.adapters.inspection import check_copies, check_modules
from lora_null.adapters.plain import CONFIG_FILE
from lora_null.adapters.saved import SavedAdapter, read_adapter
from lora_null.adapters.strength import beyond_factors
from lora_null.recipes.config.load import read_yaml
from lora_null.recipes.config.run_folder import CELLS_FOLDER, RECIPE_FILE, TASKS_FOLDER, is_of_run, whole_of
from lora_null.recipes.config.schema import ModelSection, parse_section
from lora_null.recipes.models.bases import TOKENIZER, Base
from lora_null.recipes.results import EVAL_FILE, Row, read_row
from lora_null.utils.errors import UserError, nearest

LAST_WRITTEN = {"adapter": CONFIG_FILE, "model": "tokenizer_config.json"}  # what is written last
# What cards and checks say.
QUANTIZED_NOTE = "trained on the base quantized to {}; on the base as it is, figures differ"


def weights_in(home: Path) -> Path | None:
    """Return RUN/METHOD/adapter or RUN/METHOD/model, what a method left; None where it kept nothing, or it is gone."""
    written = (home / kind for kind, mark in LAST_WRITTEN.items() if (home / kind / mark).is_file())
    return next((folder for folder in written if any(folder.glob("*.safetensors"))), None)


def lost_of(home: Path, row: Row, *, keeps_weights: bool = True) -> str | None:
    """Return what a finished method, by its row, has left in RUN/METHOD and is gone; None where all is there."""
    if row.diverged is not None:
        return None
    if row.metrics and not (home / EVAL_FILE).is_file():
        return EVAL_FILE
    return "adapter or model" if keeps_weights and weights_in(home) is None else None


@dataclass
class Trained:
    """A finished method of a run, or an adapter that was made elsewhere.

    Attributes:
        run: folder of the run.
        method: name of the method's folder.
        kind: "adapter" or "model", what it left.
        recipe: the resolved recipe, as it lies in the folder; empty for an adapter made elsewhere.
        base: the model that the recipe names.
        elsewhere: the folder of an adapter that no run left.
    """

    run: Path
    method: str
    kind: str
    recipe: dict[str, Any]
    base: Base = field(repr=False)
    elsewhere: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        return self.elsewhere or self.home / self.kind

    @cached_property
    def adapter(self) -> SavedAdapter:
        """What it holds, of the kind "adapter", read when it is first asked for."""
        return read_adapter(self.folder)

    @property
    def home(self) -> Path:
        """RUN/METHOD, or the folder of an adapter made elsewhere."""
        return self.elsewhere or self.run / self.method


def copy_tokenizer(place: Path, folder: Path) -> None:
    """Copy the tokenizer and the chat templates that lie in a folder, where it has any."""
    for path in (path for pattern in TOKENIZER for path in place.glob(pattern) if path.is_file()):
        shutil.copyfile(path, folder / path.name)  # not its mode: a read-only file could not be flushed
    if (templates := place / CHAT_TEMPLATE_DIR).is_dir():  # those beside the default one, such as tool_use
        shutil.copytree(templates, folder / templates.name, copy_function=shutil.copyfile)


def find_trained(folder: Path, base: str | None = None, *, trust: bool = False) -> Trained:
    """Return what lies in RUN/METHOD.

    Args:
        folder: RUN/METHOD, or the folder of any PEFT LoRA.
        base: folder or hub id of the base, where it is no longer what the recipe names.
        trust: run the base's own code, also where the recipe does not say so.

    Raises:
        UserError: the folder is something else, or the method has not finished.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give RUN/METHOD, such as runs/quickstart/lora-null-v2")
    folder = _in_its_run(folder)
    if folder.name in LAST_WRITTEN and is_of_run(folder.parent.parent / RECIPE_FILE):
        folder = folder.parent  # whose recipe knows more of it
    recipe_file = folder.parent / RECIPE_FILE
    check_holds_one_result(folder)
    if (folder / LAST_WRITTEN["adapter"]).is_file():
        return _made_elsewhere(folder, base, trust)
    if not recipe_file.is_file():
        raise UserError(f"{folder}: not a method of a run, {recipe_file} is missing; give RUN/METHOD")
    recipe = read_yaml(recipe_file)
    kind = next((kind for kind, mark in LAST_WRITTEN.items() if (folder / kind / mark).is_file()), None)
    if kind is None:
        raise UserError(f"{folder}: {_why_empty(folder)}")
    section = {**recipe.get("model", {})} | ({"name_or_path": base, "revision": None} if base else {})
    section |= {"trust_remote_code": True} if trust else {}
    named = Base(parse_section(ModelSection, "model", section), "" if base else str(recipe_file))
    return Trained(folder.parent, folder.name, kind, recipe, named)


def _in_its_run(folder: Path) -> Path:
    """Return a folder's own path; that of the link to it where the link alone lies in a run, as of a method on another disk."""
    real, named = folder.resolve(), Path(os.path.abspath(folder))
    of_run = [any(is_of_run(parent / RECIPE_FILE) for parent in list(path.parents)[:2]) for path in (real, named)]
    return named if of_run == [False, True] else real


def _why_empty(home: Path) -> str:
    """Say why RUN/METHOD holds no weights."""
    row = read_row(home)
    if row is not None and row.diverged is not None:
        return f"diverged at step {row.diverged} and left no weights"
    if row is not None and CELLS_FOLDER in home.relative_to(whole_of(home.parent)).parts:
        return "holds no weights: the grid kept none (grid.keep_weights), or they were removed"
    return "holds neither an adapter nor a model yet; finish the run with --resume"


def check_holds_one_result(folder: Path) -> None:
    """Raise a UserError for a run, naming its methods, and for a checkpoint of a sequence's later task, as it holds that alone."""
    if (folder / RECIPE_FILE).is_file():
        raise UserError(f"{folder}: a run; give one of its methods{nearest('', methods_in(folder))}")

    folder = folder.resolve()
    task = folder.parent.parent
    later = task.parent.name == TASKS_FOLDER and not task.name.startswith("1-") and is_of_run(task / RECIPE_FILE)
    if later and folder.name.startswith("checkpoint-"):
        raise UserError(
            f"{folder}: a checkpoint of a later task, whose change it holds alone; METHOD/adapter holds all tasks so far"
        )


def _made_elsewhere(folder: Path, base: str | None, trust: bool) -> Trained:
    """Return any PEFT LoRA, with the base that its config names, in the dtype that the base's own config names."""
    named = base_of(read_adapter(folder), base, trust=trust)
    try:
        dtype = str(named.config.dtype).removeprefix("torch.")
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    named.section.dtype = dtype if dtype in ("bfloat16", "float16") else "float32"  # pyright: ignore[reportAttributeAccessIssue]
    return Trained(folder.parent, folder.name, "adapter", {}, named, folder)


def base_of(adapter: Any, base: str | None, *, trust: bool = False) -> Base:
    """Return the base that `base` or the config of a saved adapter names.

    Its own code runs with `trust`, or where the recipe of a run that the adapter lies in says so.

    Raises:
        UserError: neither does.
    """
    name = base or adapter.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter.folder}: its config names no base; --base says which")
    revision = None if base else adapter.config.get("revision")
    recipe = adapter.folder.resolve().parent.parent / RECIPE_FILE
    if is_of_run(recipe):
        trust = trust or read_yaml(recipe).get("model", {}).get("trust_remote_code", False)
    section = {"name_or_path": str(name), "revision": revision, "trust_remote_code": trust}
    return Base(parse_section(ModelSection, "model", section), "" if base else "the adapter's config")


def check_adapter_fits(source: Trained) -> None:
    """Check, before any weight loads, that there is an adapter and that it belongs to its base.

    Raises:
        UserError: whole weights, something else than A and B, an option of PEFT's by which they are not the change, or
            another base: by its hash, or by its shapes.
    """
    if source.kind != "adapter":
        raise UserError(f"{source.home}: {source.method} trains whole weights, which have no strength")
    adapter = source.adapter
    if adapter.config.get("use_dora"):
        raise UserError(f"{source.folder}: DoRA rescales whole weights, its change is not linear in a strength")
    if option := beyond_factors(adapter.config):
        raise UserError(
            f"{source.folder}: has {option}, by which A and B are not all of its change, or more than it; only plain LoRA is "
            "scaled, repaired or exported"
        )
    adapter.pairs()  # refuses what is no A or B
    empty = source.base.empty
    if misfit := next(
        itertools.chain(check_modules(adapter, empty), check_copies(adapter, empty, source.base.folder)), None
    ):
        raise UserError(
            f"{source.folder}: made for another base than {source.base.name}: {misfit}; --base names the right one"
        )
    if same_base(adapter.metadata, source.base.folder) is False:
        raise another_base(source)


def another_base(source: Trained) -> UserError:
    """Return what to raise where an adapter's hash of its base is not that of the base at hand."""
    name = source.base.name
    return UserError(
        f"{source.folder}: trained on another base than {name} (its weights differ); --base names the right one"
    )


def methods_in(run: Path) -> list[str]:
    """Return where in a run's folder its finished methods lie, those of a grid's runs and of a sequence's tasks too."""
    marks = (
        f"{place}/{kind}/{mark}"
        for place in ("*", f"{CELLS_FOLDER}/**/seed=*/*", f"{TASKS_FOLDER}/*/*")
        for kind, mark in LAST_WRITTEN.items()
    )
    found = {str(path.parents[1].relative_to(run)) for pattern in marks for path in run.glob(pattern)}
    return sorted(found) or ["none is finished"]
