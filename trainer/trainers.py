"""TRL's trainers for SFT and DPO with a start of ours before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from trl import DPOTrainer, SFTConfig, SFTTrainer

from lora_null.trainer.mixin import LoraNullMixin
from lora_null.utils.quantized import keep_layout


class LoraNullSFTTrainer(LoraNullMixin, SFTTrainer):
    """TRL's `SFTTrainer` with an initialization before the first step.

        trainer = LoraNullSFTTrainer(
            model="meta-llama/Llama-2-7b-hf",
            args=SFTConfig(output_dir="out"),
            train_dataset=dataset,
            peft_config=LoraNullConfig(r=128, variant="v2"),
            calibration_dataset=questions,  # texts that carry the knowledge to keep
        )
        trainer.train()

    Every argument but those of `LoraNullMixin` is `SFTTrainer`'s.
    """

    learns_next_token = True

    def texts_read(self, given: Mapping[str, Any], columns: Collection[str] = ()) -> tuple[str, ...]:
        args = given.get("args")
        prepared = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
        if prepared or given.get("formatting_func") or {"messages", "conversations"} & {*columns}:
            return ()
        text = getattr(args, "dataset_text_field", SFTConfig.dataset_text_field)
        return ("prompt", "completion", text) if "prompt" in columns else (text,)


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

    learns_next_token = True
    learns_pairs = True
    nothing_learned = "chosen and rejected are equal, or only their prompts are left of them,"

    def texts_read(self, given: Mapping[str, Any], columns: Collection[str] = ()) -> tuple[str, ...]:
        return "prompt", "chosen", "rejected"

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """As the parent trainer, which does so inside its constructor where it is ahead of the training."""
        keep_layout(self.model)
        return super().compute_ref_log_probs(model, inputs)

    def labels_of(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the completions, first the chosen ones, then the rejected; a pair of equal ones teaches nothing."""
        if "completion_mask" not in batch:
            return None
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        chosen, rejected = labels.chunk(2)
        equal = (chosen == rejected).all(1)
        return labels.masked_fill(torch.cat([equal, equal])[:, None], -100)
