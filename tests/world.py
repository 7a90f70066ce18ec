"""A small world for whole runs: a tiny model folder, local data files, a recipe that uses them."""

import json
from pathlib import Path

import torch
import yaml
from tiny import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_world(folder: Path, **changes) -> Path:
    """Write model, data and `tiny.yaml` into the folder; return the recipe's path."""
    save_tiny(folder / "model")
    numbers = [{"question": f"what is {i}+{i}", "answer": f"it is {2 * i}"} for i in range(40)]
    facts = [
        {"question": f"who was king {i} of the {'old ' * (i % 3)}land", "answer": [f"k{i}", f"King {i}"]}
        for i in range(60)
    ]
    write_rows(folder / "numbers.jsonl", numbers)
    write_rows(folder / "facts.jsonl", facts)
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "method": {"name": "lora, lora-null-v1, lora-null-v2", "rank": 4},
        "calibration": {"path": str(folder / "facts.jsonl"), "max_length": 32, "samples": 60},
        "data": {"path": str(folder / "numbers.jsonl"), "prompt": "question", "response": "answer", "template": "qa"},
        "training": {
            "learning_rate": 1e-2,
            "max_steps": 4,
            "total_batch_size": 4,
            "per_device_train_batch_size": 2,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_steps": 2,
        },
        "eval": {
            "batch_size": 4,
            "examples": 0,
            "cache": False,
            "retention": [{"answers": "facts", "path": str(folder / "facts.jsonl"), "limit": 12}],
            "task": [{"answers": "numbers", "path": str(folder / "numbers.jsonl"), "limit": 10}],
        },
        "output_dir": str(folder / "out"),
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}))
    return path


def base(folder: Path) -> PreTrainedModel:
    """The world's model, as it was written."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def results(folder: Path) -> dict:
    """What a finished run says of itself."""
    return json.loads((folder / "out" / "results.json").read_text())
