"""No process holds the whole model: under FSDP2 weights stay in their files until each process reads its own shards."""

import traceback
from pathlib import Path

import datasets
import pytest
import torch
from engine_worlds import world
from safetensors.torch import load_file
from tiny import random_batches, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from lora_null import LoraNullConfig
from lora_null.initialize import InitOptions
from lora_null.trainer import LoraNullSFTTrainer

VARIANTS = ("v1", "v2")
STEPS = 3


def train(folder: Path, variant: str, model, out: str, steps: int = STEPS) -> LoraNullSFTTrainer:
    """Train on random tokens; `resume` where a checkpoint of an earlier call lies in the folder."""
    rows = [
        ids[mask.bool()].tolist() for b in random_batches() for ids, mask in zip(b["input_ids"], b["attention_mask"])
    ]
    arguments = SFTConfig(
        output_dir=str(folder / out), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False,
        gradient_checkpointing=False, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        model_init_kwargs={"dtype": "float32"} if isinstance(model, str) else None,
    )  # fmt: skip
    trainer = LoraNullSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraNullConfig(r=4, variant=variant, lora_alpha=8),
        calibration_dataset=random_batches(),
        init_options=InitOptions(min_tokens=1, progress=False),
        preflight="off",
    )
    trainer.train(
        resume_from_checkpoint=(folder / out / "checkpoint-2").is_dir() and str(folder / out / "checkpoint-2")
    )
    trainer.save_model()
    return trainer


def both_ways(words: list[str]) -> int:
    """In each process: train from the files and from a model that was loaded whole."""
    folder = Path(words[0])
    try:
        for variant in VARIANTS:
            path = str(folder / "model")
            trainer = train(folder, variant, path, f"{variant}-files")
            assert trainer._weights is not None
            local = sum(p.to_local().numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
            whole = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
            assert local < 0.6 * whole
            assert not any(p.is_meta for p in trainer.model.parameters())
            train(folder, variant, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), f"{variant}-whole")
            train(folder, variant, path, f"{variant}-files", steps=STEPS + 1)  # resumed from the files
            train(folder, variant, path, f"{variant}-files", steps=2)  # at its end already: nothing but loading
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save_tiny(folder / "model")
    found = world(2, [str(folder)], folder / "said.txt", "fsdp2", both_ways)
    assert found == [0, 0], (folder / "said.txt").read_text()[-4000:]
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_from_files_is_what_is_trained_from_whole_weights(trained, variant):
    ours, theirs = (
        load_file(trained / f"{variant}-{way}" / "checkpoint-3" / "adapter_model.safetensors")
        for way in ("files", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
