"""SC-LoRA (Luo et al., arXiv 2505.23724): B0 spans the outputs that the new task has and the knowledge has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from lora_null.calibration import InputStats
from lora_null.layer import active_adapter
from lora_null.layerwise import measure_on_each
from lora_null.start import InitOptions
from lora_null.trainer.calibration_data import kept_part, padded_batches
from lora_null.trainer.methods.base import check_count, check_option, method
from lora_null.trainer.methods.residual import ResidualMethod
from lora_null.utils.distributed import broadcast_like, process_index, together
from lora_null.utils.errors import UserError
from lora_null.utils.quantized import weight_of


@method
class SCLoRA(ResidualMethod):
    """B0 = Q, A0 = Qᵀ W0, base W0 − B0A0; A and B train. Q: the top r eigenvectors of (1 − β)·Cov₊ − β·Cov₋.

    Cov is the uncentered covariance of a layer's outputs W0 x, the bias excluded: W0 C W0ᵀ / N from the Gram matrix C of
    its N inputs. Cov₊ is of the new task, the first training rows; Cov₋ of the knowledge, the calibration texts. With a
    scaling s, A0 and B0 are divided by √s each.

    Attributes:
        beta: β; more keeps more.
        rows: training rows that are looked at, the first ones.
    """

    name = "sc-lora"
    needs_gram = True
    grams = 2

    beta: float = 0.8
    rows: int = 256

    def __post_init__(self) -> None:
        check_option(0 <= self.beta <= 1, f"{self.name}.beta", "between 0 and 1", self.beta)
        check_count(self, "rows")

    def costs(self) -> str:
        return f"before it trains, a forward pass over the first {self.rows} training rows and two over the calibration texts"

    def training_batches(self, trainer: Any) -> list[dict[str, torch.Tensor]]:
        return padded_batches(first_rows(trainer, self.rows), 0)

    def compute(self, trainer: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return A0 and B0 of every layer, the same on every process; each input is solved where its Grams are."""
        model, tensors = trainer.model, {}
        layers, adapter = self.layers(model), active_adapter(model)
        options: InitOptions = trainer.init_options_here()
        with torch.no_grad():
            sets = [trainer.calibration_batches, batches]
            for part in measure_on_each(model, layers, sets, **options.measuring):
                names = {name: knowledge.owner for knowledge, _ in part for name in knowledge.modules}
                found = together(lambda part=part: self._solve(part, layers, adapter))
                for name, owner in names.items():
                    layer = layers[name]
                    for key, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                        key = f"{name}.{key}"
                        tensors[key] = broadcast_like(found.get(key), factor[adapter].weight, owner)
        return tensors

    def _solve(
        self, part: Sequence[tuple[InputStats, ...]], layers: Mapping[str, LoraLayer], adapter: str
    ) -> dict[str, torch.Tensor]:
        """Return the factors of the layers whose Grams, on the knowledge and on the task, this process holds."""
        found = {}
        for knowledge, task in part:
            if knowledge.owner != process_index() or knowledge.gram is None or task.gram is None:
                continue
            gram = (1 - self.beta) / task.tokens * task.gram - self.beta / knowledge.tokens * knowledge.gram
            for name in knowledge.modules:
                layer = layers[name]
                A, B = output_factors(weight_of(layer), gram, layer.r[adapter], layer.scaling[adapter])
                found |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        return found


def output_factors(
    weight: torch.Tensor, gram: torch.Tensor, r: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 = Qᵀ W0 / √s and B0 = Q / √s, float64, of the top r eigenvectors Q of W0 G W0ᵀ.

    Args:
        weight: W0, (d_out, d_in).
        gram: G, (d_in, d_in) float64 symmetric.
        r, scaling: of the adapter.
    """
    weight = weight.to(gram)
    Q = torch.linalg.eigh(weight @ gram @ weight.T).eigenvectors[:, -r:]
    return Q.T @ weight / scaling**0.5, Q / scaling**0.5


def first_rows(trainer: Any, rows: int) -> list[list[int]]:
    """Return the token ids of the first training rows, of packed ones each document's, which do not see each other in training.

    Of preferences it is the prompt with the chosen answer, cut as TRL does.

    Raises:
        UserError: the prepared rows hold no token ids.
    """
    found: list[list[int]] = []
    for row in islice(iter(trainer.train_dataset), rows):
        if "input_ids" not in row and "chosen_ids" not in row:
            raise UserError(f"method: {trainer.method.name} reads tokenized training rows, found {', '.join(row)}")
        if "input_ids" not in row:
            at_end = getattr(trainer.args, "truncation_mode", "") == "keep_end"  # which reward models do not have
            part = kept_part(trainer.args.max_length, at_end=at_end)
            found.append((row.get("prompt_ids", []) + row["chosen_ids"])[part])
            continue
        ids = iter(row["input_ids"])
        found += [list(islice(ids, length)) for length in row.get("seq_lengths") or [len(row["input_ids"])]]
    return found[:rows]
