"""PEFT's `forgetting`: by how much the loss on general text rose, as its method_comparison/MetaMathQA measures it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from lora_null.eval_harness.likelihood import TokenizedPair, check_pairs_fit, record_or_read_base, score_answers
from lora_null.eval_harness.results import Metric, Role, TaskResult
from lora_null.eval_harness.statistics import mean_and_error
from lora_null.eval_harness.tasks import RunOptions, Task
from lora_null.utils.errors import UserError
from lora_null.utils.limits import PositionLimit
from lora_null.utils.model_state import replaced


@dataclass(frozen=True)
class ForgettingTask(Task):
    """Texts whose loss is measured before and after training ("NAME loss", "NAME forgetting" =
    after − before), in nats per token.

    As in PEFT's comparison each text is cut to its first `max_length` tokens, with the special tokens that the tokenizer
    adds, and the loss is the mean cross-entropy over all tokens of all texts but each text's first. PEFT takes the
    first 100 rows of HuggingFaceFW/finewiki and 768 tokens, and computes the cross-entropy in the model's dtype, here it
    is float32 from the model's logits. For the base model itself the forgetting is 0 by definition.

    Args:
        name: what to call the results.
        texts: at least one, each of two tokens or more.
        max_length: tokens of a text, at most.
        role: as in `LmEvalTask`.
    """

    name: str
    texts: list[str] = field(repr=False)
    max_length: int = 768
    role: Role = "retention"

    noise_documents: ClassVar[int | None] = None
    max_batch_size: ClassVar[int | None] = 4  # PEFT's; logits are computed at every token

    @property
    def metric_names(self) -> list[str]:
        return [f"{self.name} forgetting", f"{self.name} loss"]

    @property
    def reference_file(self) -> str:
        return f"{self.name} loss.json"

    def check(self) -> None:
        super().check()
        if self.max_length < 2:
            raise UserError(f"{self}: max_length must be at least 2, not {self.max_length}")
        if not self.texts:
            raise UserError(f"{self} has no texts")
        for i, text in enumerate(self.texts):
            if not isinstance(text, str) or not text:
                raise UserError(f"{self}: text {i} must be a text that is not empty, not {text!r}")

    def check_positions(self, tokenizer: PreTrainedTokenizerBase, limit: PositionLimit) -> None:
        check_pairs_fit(self.name, self.tokenized(tokenizer), limit.tokens)

    def describe(self, limit: int | None) -> dict[str, Any]:
        texts = hashlib.sha256(repr(self.texts[:limit]).encode()).hexdigest()
        return {"max_length": self.max_length, "limit": limit, "texts_sha256": texts}

    def run(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: RunOptions) -> TaskResult:
        """Measure the loss; the forgetting is missing where the base's was not recorded.

        Raises:
            UserError: a text of one token, or if the base's loss was recorded for other texts.
        """
        pairs = self.tokenized(tokenizer, options.limit)
        tokens = np.array([len(pair.ids) - 1 for pair in pairs])
        sums = score_answers(model, pairs, **options.scoring(self.name)).nll
        found, measures = TaskResult(), {"loss": sums}
        path = options.find_reference(self.reference_file)
        if path is not None:
            measures["forgetting"] = sums - record_or_read_base(path, pairs, sums, record=options.record_reference)
        for measure, values in measures.items():
            metric = Metric(*mean_and_error(values / tokens, tokens), len(pairs), False, self.role, "nats")
            found.add(f"{self.name} {measure}", metric, values / tokens, tokens)
        return found

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[TokenizedPair]:
        """Return the texts' tokens, of which all but the first are predicted.

        Raises:
            UserError: a text of a single token.
        """
        with replaced(tokenizer, "truncation_side", "right"):
            cut = tokenizer(self.texts[:limit], truncation=True, max_length=self.max_length)["input_ids"]
        short = next((i for i, ids in enumerate(cut) if len(ids) < 2), None)
        if short is not None:
            raise UserError(f"{self}: text {short} has only {len(cut[short])} token, two are needed")
        return [TokenizedPair(tuple(ids), 1) for ids in cut]
