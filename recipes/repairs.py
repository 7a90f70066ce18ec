"""Repair of a trained adapter by the texts and the rows of its recipe: in a run (`budget.then: repair`), or afterward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE, state_of
from lora_null.adapters.repair import REPAIR_NOTE, Repair, repair
from lora_null.adapters.saved import SavedAdapter
from lora_null.layer import adapted_layers
from lora_null.recipes.budget import repair_to_budget
from lora_null.recipes.config.load import whole_path
from lora_null.recipes.config.schema import CalibrationSection, Recipe
from lora_null.recipes.data.examples import Example
from lora_null.recipes.job import Job
from lora_null.recipes.measure import budget_measurement
from lora_null.recipes.results import Budget, shareable
from lora_null.recipes.training import trained_ids
from lora_null.utils.files import write_json, write_safetensors

Batches = list[dict[str, torch.Tensor]]

ROWS = 256  # of what was learned, of each task
WEIGHTS = [
    10 ** (k / 2) for k in range(-6, 5)
]  # among which a budget chooses what an adapter that does not keep it needs


def rows_of_task(recipe: Recipe, examples: Sequence[Example], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of training rows, evenly spread over all of them, cut as the recipe is trained on them."""
    count = min(ROWS, len(examples))
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    return trained_ids(recipe, chosen, tokenizer)


def repair_within(
    job: Job, base: nn.Module, adapter: SavedAdapter, keep: Batches, task: Batches
) -> tuple[Repair, Budget, PeftModel]:
    """Return an adapter repaired at the smallest weight that keeps the job's budget, or at the largest where none does.

    The weight of one that keeps the budget as it is is 0.

    Args:
        job: with a budget, whose base has been evaluated.
        base: the original model, without an adapter; it gets this one.
        adapter: what was trained.
        keep, task: batches of the texts to keep, and of what was learned.

    Returns:
        The repair, what became of the budget, and the live model with the repaired adapter.
    """
    model = PeftModel.from_pretrained(base, adapter.folder).eval()
    measured = budget_measurement(job, model)
    if measured.keeps_on_probe() and (as_it_is := repair_to_budget(measured, [0.0], lambda _: None)).kept:
        return Repair(0.0, adapter.pairs(), 1.0, 1.0), as_it_is, model
    base = model.unload()
    found = {made.weight: made for made in repair(base, adapter, keep, task, weights=WEIGHTS)}
    model = PeftModel.from_pretrained(base, adapter.folder).eval()
    layers = adapted_layers(model)

    def apply(weight: float) -> None:
        for name, (A, _) in found[weight].pairs.items():
            layers[name].lora_A["default"].weight.data.copy_(A)

    held = repair_to_budget(budget_measurement(job, model), WEIGHTS, apply)
    return found[held.weight], held, model


def what_is_left_alone(calibration: CalibrationSection) -> str:
    """Return "to leave notes.md, the general mix alone", without folders of this machine."""
    return f"to leave {titles_of(calibration)} alone"


def titles_of(calibration: CalibrationSection) -> str:
    """Return the names of its sources, without folders of this machine."""
    return ", ".join(shareable(whole_path(source.title)) for source in calibration.each)


def write_repaired(folder: Path, adapter: SavedAdapter, made: Repair, method: str, purpose: str) -> None:
    """Write a repaired adapter into a folder, with a note of what was done to it.

    Args:
        folder: to write into.
        adapter: what was trained.
        made: the repair.
        method: the adapter's name.
        purpose: what it is to do and to leave alone, half a sentence.
    """
    note = f"Repaired without training from the adapter {method}, at weight {made.weight:.3g}, {purpose}."
    metadata = adapter.metadata | ({REPAIR_NOTE: note} if made.weight else {})
    write_safetensors(folder / WEIGHTS_FILE, adapter.tensors | state_of(made.pairs), metadata)
    write_json(folder / CONFIG_FILE, adapter.config)
