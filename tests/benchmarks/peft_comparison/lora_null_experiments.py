"""What PEFT's comparison runner needs for LoRA-Null: a config of our class, a calibration, and nb-lora's step.

Copied beside the runner's `run.py`, to which `runner.patch` adds the two calls. An experiment takes part where its folder
holds `lora_null.json` beside `adapter_config.json`:

    {"config": {"variant": "v2"},
     "calibration": {"path": "google-research-datasets/nq_open", "template": "Q: {question}?\\nA: {answer}",
                     "samples": 256, "max_length": 256}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch.optim.optimizer import register_optimizer_step_post_hook

import lora_null
from lora_null.trainer import CalibrationArgs
from lora_null.trainer.calibration_data import as_batches

FILE = "lora_null.json"
TAKEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "task_type")


def with_lora_null(config: PeftConfig | None, experiment: str) -> PeftConfig | None:
    """Return the experiment's config as a `LoraNullConfig` where it is one of LoRA-Null, else as it is."""
    options = _options(experiment)
    if options is None or not isinstance(config, LoraConfig):
        return config
    return lora_null.LoraNullConfig(**{name: getattr(config, name) for name in TAKEN}, **options["config"])


def prepare(model: Any, tokenizer: Any, experiment: str) -> None:
    """Calibrate and start the adapter of an experiment of LoRA-Null; leave any other model as it is."""
    options = _options(experiment)
    if options is None or not isinstance(model, PeftModel):
        return
    chosen = options["calibration"]
    args = CalibrationArgs(chosen["samples"], chosen["max_length"], "separate", seed=0)
    lora_null.initialize_lora_null_weights(model, as_batches(_texts(**chosen), tokenizer, args))
    if options["config"]["variant"] == "nb":  # A stays in the null space after every step, whoever makes the optimizer
        register_optimizer_step_post_hook(lambda *_: lora_null.keep_in_null_basis(model))


def _options(experiment: str) -> dict[str, Any] | None:
    path = Path(experiment) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _texts(path: str, template: str, samples: int, **_: Any) -> list[str]:
    """Return the first texts of a hub data set or a local jsonl file; of several accepted answers the first counts."""
    rows = (
        load_dataset("json", data_files=path, split="train")
        if Path(path).is_file()
        else load_dataset(path, split="train")
    )
    first = [
        {key: v[0] if isinstance(v, list) else v for key, v in rows[i].items()} for i in range(min(samples, len(rows)))
    ]
    return [template.format(**row) for row in first]
