"""No process loads the whole model: under FSDP2 weights stay in their files until each process reads its own shards."""

import traceback
from pathlib import Path

import datasets
import pytest
import torch
from engine_worlds import world
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import random_batches, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig
from trl import SFTConfig

from lora_null import LoraNullConfig, UserError, checkpoint_reader
from lora_null.checkpoint_reader import open_in_files
from lora_null.initialize import InitOptions
from lora_null.trainer import LoraNullSFTTrainer
from lora_null.trainer.methods.base import starts_in_files

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


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint-3" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save_tiny(folder / "model")
    found = world(2, [str(folder)], folder / "said.txt", "fsdp2", both_ways)
    assert found == [0, 0], (folder / "said.txt").read_text()[-4000:]
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_from_files_is_what_is_trained_from_whole_weights(trained, variant):
    ours, theirs = weights_in(trained / f"{variant}-files"), weights_in(trained / f"{variant}-whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_engine_that_does_not_shard_reads_everything_after_all(tmp_path, monkeypatch):
    """accelerate takes FSDP for GPUs alone and goes on without it."""
    path = str(save_tiny(tmp_path / "model"))
    train(tmp_path, "v1", path, "plain")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    opened = []
    monkeypatch.setattr(
        checkpoint_reader, "open_in_files", lambda *a, **k: opened.append(open_in_files(*a, **k)) or opened[0]
    )
    train(tmp_path, "v1", path, "asked")
    assert opened
    ours, theirs = weights_in(tmp_path / "asked"), weights_in(tmp_path / "plain")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_files_that_name_their_weights_otherwise_are_not_left(tmp_path):
    config = MixtralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no weight 'model.layers.0.mlp\S+', load the model whole instead"):
        open_in_files(AutoModelForCausalLM.from_pretrained, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (LoraNullConfig(r=4), True),
        (LoraConfig(r=4), True),
        (LoraConfig(r=4, init_lora_weights="pissa"), False),
        (LoraConfig(r=4, modules_to_save=["lm_head"]), False),
        (LoraConfig(r=4, bias="all"), False),
        (None, False),
    ],
)
def test_what_needs_all_weights_does_not_start_in_files(config, fits):
    assert starts_in_files(config) == fits
