"""How often, and by how much, a model prefers the chosen of two responses more than the base model does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.likelihood import (
    TokenizedPair,
    check_pairs_fit,
    hash_pairs,
    record_or_read_base,
    score_answers,
)
from lora_null.eval_harness.results import Metric, Role, TaskResult
from lora_null.eval_harness.statistics import mean_and_error
from lora_null.eval_harness.tasks import RunOptions, Task
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit


@dataclass(frozen=True)
class PreferenceTask(Task):
    """Pairs of a chosen and a rejected response to the same prompt.

    DPO's implicit reward of a response y to x is beta · (log p(y|x) − log p_base(y|x)). Reported are the share of pairs
    whose chosen response has the higher reward, ties counted half ("NAME reward accuracy"), and the mean difference
    ("NAME reward margin"). For the base model itself these are 0.5 and 0 by definition.

    Args:
        name: what to call the results.
        chosen: prompts with their chosen responses, tokenized as in training.
        rejected: the same prompts with their rejected responses.
        beta: of the reward, DPO's.
        role: as in `LmEvalTask`.
    """

    name: str
    chosen: list[TokenizedPair] = field(repr=False)
    rejected: list[TokenizedPair] = field(repr=False)
    beta: float = 0.1
    role: Role = "task"

    noise_documents: ClassVar[int | None] = None
    in_training_template: ClassVar[bool] = True

    @property
    def metric_names(self) -> list[str]:
        return [f"{self.name} reward accuracy", f"{self.name} reward margin"]

    def has_noise(self, metric: str) -> bool:
        """The base's margins are rounding alone, and its accuracy would be that of their signs."""
        return not metric.endswith("accuracy")

    @property
    def reference_file(self) -> str:
        return f"{self.name} preferences.json"

    def check(self) -> None:
        super().check()
        if not self.chosen or len(self.chosen) != len(self.rejected):
            raise UserError(f"{self} needs as many chosen as rejected responses, at least one")

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:
        check_pairs_fit(self.name, self._pairs(None), limit.tokens)

    def describe(self, limit: int | None) -> dict[str, Any]:
        return {"beta": self.beta, "limit": limit, "pairs_sha256": hash_pairs(self._pairs(limit))}

    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Compare with the base's likelihoods; there are no metrics where those were not recorded.

        Raises:
            UserError: if the reference was recorded for other pairs.
        """
        pairs = self._pairs(options.limit)
        log_probs = -score_answers(model, pairs, **options.scoring(self.name)).nll
        path = options.find_reference(self.reference_file)
        if path is None:
            return TaskResult()
        base = record_or_read_base(path, pairs, log_probs, record=options.record_reference)
        chosen, rejected = np.split(self.beta * (log_probs - base), 2)
        margins, found = chosen - rejected, TaskResult()
        measures = {"accuracy": (np.heaviside(margins, 0.5), "fraction"), "margin": (margins, "nats")}
        for measure, (values, unit) in measures.items():
            metric = Metric(*mean_and_error(values), len(values), True, self.role, unit)
            found.add(f"{self.name} reward {measure}", metric, values)
        return found

    def _pairs(self, limit: int | None) -> list[TokenizedPair]:
        return [*self.chosen[:limit], *self.rejected[:limit]]
