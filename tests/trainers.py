"""What tests of trainers train on, calibrate with, and the arguments of a short training."""

from datasets import Dataset

from lora_null.trainer import CalibrationArgs

TEXTS = [f"who was the {i}th of the {'great ' * (i % 4)}kings" for i in range(64)]
ROWS = Dataset.from_dict(
    {"prompt": [f"Q: {i}+{i}\nA:" for i in range(48)], "completion": [f" {2 * i} is it" for i in range(48)]}
)
PAIRS = Dataset.from_dict(
    {
        "prompt": [f"Q: {i}+{i}\nA:" for i in range(32)],
        "chosen": [f" {2 * i} is it" for i in range(32)],
        "rejected": [f" {3 * i} no" for i in range(32)],
    }
)
CUT = CalibrationArgs(samples=64, max_length=64, mode="separate")


def quick(folder, **changes):
    """Arguments of a short training."""
    fixed = dict(output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=4, max_steps=6)
    fixed |= dict(learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
    return {**fixed, "gradient_checkpointing": False, **changes}
