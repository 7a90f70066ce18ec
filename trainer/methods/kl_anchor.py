"""KL anchor: LoRA that pays for predictions that leave the base model's on the calibration texts."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from lora_null.drift import token_kl
from lora_null.trainer.calibration_data import padded_batches
from lora_null.trainer.methods.base import Method, MicroBatch, Term, check_count, check_option, method
from lora_null.utils.distributed import device_of, num_processes, process_index
from lora_null.utils.errors import UserError
from lora_null.utils.model_state import base_model_of, replaced, trains_biases

Batch = dict[str, torch.Tensor]


@method
class KLAnchor(Method):
    """LoRA with λ·KL(base ‖ model) on some calibration texts added to the loss.

    The KL is that of the next-token distributions, in nats, averaged over the tokens of `batch_rows` texts, which follow
    each other in one order drawn with the run's seed, again and again. It enters every m-th step, times λ·m, so that λ
    weighs as much as it would if each step paid. The base's predictions come from a forward pass with the adapter
    disabled. The texts of a step are shared out among its passes and the processes; the sum is the same however many.

    Attributes:
        weight: λ.
        every: m.
        batch_rows: calibration texts of one step.
        tokens: of a text, at most.
    """

    name = "kl-anchor"
    starts_in_files = True
    needs_texts = True
    terms = ("anchor_kl",)

    weight: float = 1.0
    every: int = 1
    batch_rows: int = 4
    tokens: int = 256

    def __post_init__(self) -> None:
        check_option(0 < self.weight < float("inf"), f"{self.name}.weight", "a number above 0", self.weight)
        check_count(self, "every", "batch_rows", "tokens")
        self.windows: list[list[int]] = []

    def prepare(self, model: nn.Module) -> None:
        if model.get_output_embeddings() is None:  # a classifier
            raise UserError(
                f"method: {self.name} compares next-token predictions, and {type(base_model_of(model)).__name__} makes none"
            )
        if trains_biases(model):
            raise UserError(
                f"bias: {self.name} compares with the model without its adapter, of which biases would train; set it to 'none'"
            )

    def held_bytes(self, model: nn.Module) -> int:
        """Return the bytes of both models' logits and log-probabilities, float32."""
        return 16 * self.batch_rows * self.tokens * model.config.get_text_config().vocab_size

    def costs(self) -> str:
        when = "each step" if self.every == 1 else f"one step of {self.every}"
        return (
            f"{when} two forward passes and a backward pass more, over {self.batch_rows} calibration texts of at most "
            f"{self.tokens} tokens"
        )

    def training_data(self, trainer: Any, windows: list[list[int]]) -> Any:
        cut = [window[: self.tokens] for window in windows]
        self.windows = random.Random(trainer.args.seed).sample(cut, len(cut))
        return trainer.train_dataset

    def rows_at(self, step: int) -> list[list[int]]:
        """Return the texts of an optimizer step, from 0."""
        first, count = step // self.every * self.batch_rows, len(self.windows)
        return [self.windows[i % count] for i in range(first, first + min(self.batch_rows, count))]

    def extra_loss(self, trainer: Any, model: nn.Module, micro_batch: MicroBatch) -> dict[str, Term]:
        if micro_batch.step % self.every:
            return {}
        world = num_processes()
        rows = self.rows_at(micro_batch.step)
        shares = [
            padded_batches(rows[micro_batch.index * world + i :: micro_batch.count * world], 0) for i in range(world)
        ]
        passes = max(map(len, shares))
        if not passes:  # nothing is left for this pass, on any process
            return {}
        summed = self._summed_kl(trainer, model, shares[process_index()], passes, padded_batches(rows[:1], 0)[0])
        return {"anchor_kl": Term(summed * world / sum(map(len, rows)), self.weight * self.every)}

    def _summed_kl(
        self, trainer: Any, model: nn.Module, batches: list[Batch], passes: int, filler: Batch
    ) -> torch.Tensor:
        """Return the KL summed over the tokens of the batches.

        Engines that shard need every process in every pass: where there are fewer batches, the filler runs and counts 0.
        """
        model = trainer.accelerator.unwrap_model(model)
        device = device_of(model)
        total = torch.zeros((), device=device)
        for i in range(passes):
            batch = batches[i] if i < len(batches) else filler
            batch = {key: value.to(device) for key, value in batch.items()}
            with torch.no_grad(), model.disable_adapter():
                model.eval()  # the base as it answers: without the dropout that it may have
                base = _log_probabilities(model, batch)
            model.train()
            with replaced(model.get_input_embeddings(), "training", False):  # NEFTune's noise is for the rows
                now = _log_probabilities(model, batch)
            total = total + (i < len(batches)) * token_kl(base, now).sum()
        return total


def _log_probabilities(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the next-token log-probabilities of a batch without its padding, (tokens, vocabulary) float32."""
    logits = model(**batch, use_cache=False).logits
    return logits[batch["attention_mask"].bool()].float().log_softmax(-1)
