"""Trainers: TRL's own, with LoRA-Null's initialization inside `train()`."""

from lora_null.trainer.calibration_data import CalibrationArgs, calibration_windows
from lora_null.trainer.mixin import LoraNullMixin
from lora_null.trainer.trainers import LoraNullDPOTrainer, LoraNullSFTTrainer
from lora_null.trainer.written_texts import own_texts

__all__ = [
    "CalibrationArgs",
    "LoraNullDPOTrainer",
    "LoraNullMixin",
    "LoraNullSFTTrainer",
    "calibration_windows",
    "own_texts",
]
