"""How often, and by how much, a model prefers the chosen of two responses more than the base model does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lora_null.eval_harness.likelihood import TokenizedPair, score_answers
from lora_null.eval_harness.tasks import OwnTask, Role, RunOptions
from lora_null.utils.distributed import broadcast, rank_and_world
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_json


@dataclass(frozen=True)
class PreferenceTask(OwnTask):
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

    def check(self) -> None:
        if not self.chosen or len(self.chosen) != len(self.rejected):
            raise UserError(f"evaluation task {self.name!r} needs as many chosen as rejected responses, at least one")

    def describe(self, limit: int | None) -> dict[str, Any]:
        return {"beta": self.beta, "limit": limit, "pairs_sha256": self._hash(limit)}

    def _hash(self, limit: int | None) -> str:
        pairs = [(pair.ids, pair.start) for pair in (*self.chosen[:limit], *self.rejected[:limit])]
        return hashlib.sha256(repr(pairs).encode()).hexdigest()

    def run(self, model: nn.Module, tokenizer: Any, options: RunOptions) -> tuple[dict, dict, dict]:
        """Return (metrics, samples, nothing for the settings); no metrics where there is no reference.

        Raises:
            UserError: if the reference was recorded for other pairs.
        """
        pairs = [*self.chosen[: options.limit], *self.rejected[: options.limit]]
        scoring = {"batch_size": options.batch_size, "autocast_dtype": options.autocast_dtype, "progress": self.name}
        log_probs = -score_answers(model, pairs, **scoring).nll
        path = options.reference(f"{self.name} preferences.json")
        if path is None:
            return {}, {}, {}
        if options.record_reference:
            if rank_and_world()[0] == 0:
                write_json(path, {"pairs_sha256": self._hash(options.limit), "log_probs": log_probs.tolist()})
            reference = log_probs
        else:
            reference = broadcast(self._read(path, options.limit) if rank_and_world()[0] == 0 else None)
        chosen, rejected = np.split(self.beta * (log_probs - reference), 2)
        return self._results(chosen - rejected)

    def _read(self, path: Path, limit: int | None) -> np.ndarray:
        saved = json.loads(path.read_text())
        if saved["pairs_sha256"] != self._hash(limit):
            raise UserError(f"the reference {path} was recorded for other pairs or another tokenizer; record it again")
        return np.array(saved["log_probs"])

    def _results(self, margins: np.ndarray) -> tuple[dict, dict, dict]:
        samples = {
            f"{self.name} reward accuracy": np.where(margins == 0, 0.5, margins > 0),
            f"{self.name} reward margin": margins,
        }
        units = ("fraction", "nats")
        metrics = {name: self.metric(values, unit) for (name, values), unit in zip(samples.items(), units)}
        return metrics, {name: values.tolist() for name, values in samples.items()}, {}

    def metric(self, values: Sequence[float], unit: str) -> dict[str, Any]:
        """Return a mean over pairs with its standard error."""
        n = len(values)
        error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
        value = float(np.mean(values))
        return {"value": value, "stderr": error, "n": n, "higher_is_better": True, "role": self.role, "unit": unit}
