"""Methods that start from the loss's gradient at W0 on the first training rows, as PEFT's LoRA-GA takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lora_null.trainer.methods.base import Method, check_count
from lora_null.utils.distributed import device_of
from lora_null.utils.errors import UserError


@dataclass
class FromGradient(Method):
    """Base of these methods.

    Attributes:
        rows: training rows whose gradient is taken, the first ones.
        batch_rows: rows of one backward pass.
    """

    supports_preferences = False  # the gradient is that of the labels' loss

    rows: int = 32
    batch_rows: int = 4

    def __post_init__(self) -> None:
        check_count(self, "rows", "batch_rows")

    def start_bytes(self, model: nn.Module) -> int:
        """As many bytes as the adapted weights have: what `take_gradients` leaves."""
        return sum(layer.get_base_layer().weight.nbytes for layer in self.layers(model).values())

    def training_batches(self, trainer: Any) -> list[dict[str, torch.Tensor]]:
        return first_batches(trainer, self.rows, self.batch_rows)


def take_gradients(trainer: Any, layers: Mapping[str, nn.Module], batches: list[dict[str, torch.Tensor]]) -> None:
    """Leave the mean gradient of the loss with respect to W0 in each layer's base, where PEFT's LoRA-GA looks for it."""

    def train_step() -> None:
        for batch in batches:
            trainer.model(**batch).loss.backward()

    bases = LoraConfig(target_modules=[f"{name}.base_layer" for name in layers], init_lora_weights="lora_ga")
    bases.lora_ga_config = LoraGAConfig()
    hooks = [(layer.get_base_layer(), layer.get_base_layer()._backward_hooks.copy()) for layer in layers.values()]
    try:
        preprocess_loraga(trainer.model.get_base_model(), bases, train_step)
    except BaseException:  # PEFT leaves gradients and hooks behind, which another attempt would count as its own
        for linear, before in hooks:
            linear.weight.grad = None
            linear._backward_hooks.clear()
            linear._backward_hooks.update(before)
        raise


def first_batches(trainer: Any, rows: int, batch_rows: int) -> list[dict[str, torch.Tensor]]:
    """Return the first training rows, tokenized and collated as the trainer does, on the model's device.

    Raises:
        UserError: a trainer whose batches have no labels.
    """
    taken, device = list(islice(iter(trainer.train_dataset), rows)), device_of(trainer.model)
    groups = [taken[i : i + batch_rows] for i in range(0, len(taken), batch_rows)]
    whole = [group for group in groups if len(group) == batch_rows] or groups
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    batches = [collate(group) for group in whole]  # of rows without padding it gives numbers too
    if not all(isinstance(batch, Mapping) and "labels" in batch for batch in batches):
        raise UserError(
            f"method: {trainer.method.name} reads labels, and {type(trainer).__name__} makes none; take another"
        )
    return [{key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()} for batch in batches]
