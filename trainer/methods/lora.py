"""LoRA, and LoRA-FA, which keeps LoRA's random A."""

from __future__ import annotations

from lora_null.trainer.methods.base import Method, method


@method
class LoRA(Method):
    """A Kaiming, B = 0; A and B train."""

    name = "lora"
    starts_in_files = True


@method
class LoRAFA(Method):
    """LoRA's start, B trains alone under plain AdamW: the paper's baseline.

    Not PEFT's LoRA-FA optimizer, which multiplies B's gradient by pinv(A Aᵀ): another algorithm.
    """

    name = "lora-fa"
    freezes_A = True
    starts_in_files = True
