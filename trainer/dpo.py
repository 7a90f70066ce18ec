"""Preference training (DPO) with LoRA-Null."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from lora_null.errors import UserError
from lora_null.trainer.mixin import LoraNullMixin


class LoraNullDPOTrainer(LoraNullMixin, DPOTrainer):
    """TRL's `DPOTrainer` with an initialization before the first step.

        trainer = LoraNullDPOTrainer(
            model="meta-llama/Llama-2-7b-hf",
            args=DPOConfig(output_dir="out"),
            train_dataset=preferences,  # rows of prompt, chosen, rejected
            peft_config=LoraNullConfig(r=32, variant="v2"),
            calibration_dataset=questions,  # texts that carry the knowledge to keep
        )
        trainer.train()

    The reference is the original model. TRL computes it with the adapter disabled, and a LoRA-Null layer that is
    disabled gives W0 back, also under v1, whose base is W0 − s·B0A0. So rewards start at 0, and reference
    log-probabilities that TRL computes ahead (`precompute_ref_log_probs`, before the initialization) are the same.

    Every argument but those of `LoraNullMixin` is `DPOTrainer`'s.
    """

    def _first_rows(self) -> list[dict[str, Any]]:
        """Return the first preferences as rows with labels: each chosen and each rejected completion.

        Raises:
            UserError: every pair of the first batch has equal completions, so that nothing would be learned.
        """
        pairs = super()._first_rows()
        if pairs and all(pair["chosen_ids"] == pair["rejected_ids"] for pair in pairs):
            raise UserError("training data: chosen and rejected are equal in the whole first batch")
        return [
            {
                "input_ids": [*pair["prompt_ids"], *pair[side]],
                "labels": [-100] * len(pair["prompt_ids"]) + [*pair[side]],
            }
            for pair in pairs
            for side in ("chosen_ids", "rejected_ids")
        ]
