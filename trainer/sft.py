"""Supervised fine-tuning with LoRA-Null."""

from __future__ import annotations

from trl import SFTTrainer

from lora_null.trainer.mixin import LoraNullMixin


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
