"""No process loads the whole model: under FSDP2 weights stay in their files until each process reads its own shards."""

import math
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import PartialState
from engine_worlds import world
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import random_batches, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig
from trl import DPOConfig, SFTConfig

from lora_null import LoraNullConfig, UserError, checkpoint_reader
from lora_null.checkpoint_reader import adapters_in_memory, open_in_files
from lora_null.initialize import InitOptions
from lora_null.layer import adapted_layers
from lora_null.start import compute_start
from lora_null.store import REPORT_FILE
from lora_null.trainer import LoraNullDPOTrainer, LoraNullSFTTrainer
from lora_null.trainer.methods import make_method
from lora_null.trainer.methods.base import can_start_in_files
from lora_null.trainer.weights_in_files import leave_in_files
from lora_null.utils.distributed import broadcast_like, for_collective

METHODS = ("lora-null-v1", "lora-null-v2", "pissa", "full")
STEPS = 3


QUIET = dict(per_device_train_batch_size=2, learning_rate=1e-2, bf16=False, gradient_checkpointing=False)
QUIET |= dict(report_to="none", disable_tqdm=True, use_cpu=True)
IN_FLOAT32 = {"dtype": "float32"}


def built(kind: type, name: str, model, arguments, rows, **options):
    """Return a trainer of a method, calibrated on random tokens."""
    method = make_method(name)
    options = {"calibration_dataset": random_batches(), **options}
    return kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=method.config(r=4, lora_alpha=8, target_modules="all-linear"),
        method=method,
        init_options=InitOptions(min_tokens=1, progress=False),
        **options,
    )


def train(folder: Path, name: str, model, out: str, steps: int = STEPS) -> LoraNullSFTTrainer:
    """Train on random tokens; `resume` where a checkpoint of an earlier call lies in the folder."""
    rows = [
        ids[mask.bool()].tolist() for b in random_batches() for ids, mask in zip(b["input_ids"], b["attention_mask"])
    ]
    arguments = SFTConfig(
        output_dir=str(folder / out), max_steps=steps, save_steps=2, logging_steps=1, **QUIET,
        model_init_kwargs=IN_FLOAT32 if isinstance(model, str) else None,
    )  # fmt: skip
    given = {"calibration_dataset": None} if name == "pissa" else {}
    table = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = built(LoraNullSFTTrainer, name, model, arguments, table, preflight="off", **given)
    trainer.train(
        resume_from_checkpoint=(folder / out / "checkpoint-2").is_dir() and str(folder / out / "checkpoint-2")
    )
    trainer.save_model()
    return trainer


def both_ways(words: list[str]) -> int:
    """In each process: train from the files and from a model that was loaded whole."""
    folder = Path(words[0])
    try:
        for name in METHODS:
            path = str(folder / "model")
            whole = lambda: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # noqa: B023, E731
            trainer = train(folder, name, path, f"{name}-files")
            assert trainer._weights is not None
            local = sum(p.to_local().numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
            every = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
            assert local < 0.6 * every
            assert not any(p.is_meta for p in trainer.model.parameters())
            drifts = [line.get("drift_mean") for line in trainer.state.log_history]
            assert name == "pissa" or drifts[1] > 0
            other = train(folder, name, whole(), f"{name}-whole")
            assert drifts == [line.get("drift_mean") for line in other.state.log_history]
            train(folder, name, path, f"{name}-files", steps=STEPS + 1)  # resumed from the files
            train(folder, name, whole(), f"{name}-whole", steps=STEPS + 1)
            train(folder, name, path, f"{name}-files", steps=2)  # at its end already: nothing but loading
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    adapter, whole = checkpoint / "adapter_model.safetensors", checkpoint / "pytorch_model_fsdp.bin"
    return load_file(adapter) if adapter.is_file() else torch.load(whole, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save_tiny(folder / "model")
    found = world(2, [str(folder)], folder / "said.txt", "fsdp2", both_ways)
    assert found == [0, 0], (folder / "said.txt").read_text()[-20_000:]
    return folder


@pytest.mark.parametrize("step", [STEPS, STEPS + 1])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_from_files_is_what_is_trained_from_whole_weights(trained, name, step):
    """Also after a resumption, which took the last step."""
    files, whole = (weights_in(trained / f"{name}-{kind}" / f"checkpoint-{step}") for kind in ("files", "whole"))
    assert files.keys() == whole.keys()
    assert all(torch.equal(files[key], whole[key]) for key in files)


def preferences(words: list[str]) -> int:
    """In each process: DPO from the files; with a reference that is computed ahead, from whole weights."""
    folder = Path(words[0])
    pairs = datasets.load_from_disk(str(folder / "pairs"))
    try:
        losses = []
        for number, (name, ahead) in enumerate([("full", False), ("lora-null-v2", False), ("lora-null-v2", True)]):
            arguments = DPOConfig(
                output_dir=str(folder / f"{name}-{number}"), max_steps=2, save_strategy="no", logging_steps=1, **QUIET,
                model_init_kwargs=IN_FLOAT32, precompute_ref_log_probs=ahead,
            )  # fmt: skip
            trainer = built(LoraNullDPOTrainer, name, str(folder / "model"), arguments, pairs)
            assert (trainer._weights is None) == ahead
            trainer.train()
            losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert all(abs(first - math.log(2)) < 1e-6 for first, _ in losses), losses
        assert losses[1] == pytest.approx(losses[2], abs=1e-6)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def test_preferences_are_learned_from_files_too(tmp_path):
    save_tiny(tmp_path / "model")
    pairs = {key: [f"{key} {i}" for i in range(16)] for key in ("prompt", "chosen", "rejected")}
    datasets.Dataset.from_dict(pairs).save_to_disk(str(tmp_path / "pairs"))  # a reference is kept beside the rows
    found = world(2, [str(tmp_path)], tmp_path / "said.txt", "fsdp2", preferences)
    assert found == [0, 0], (tmp_path / "said.txt").read_text()[-20_000:]


def test_a_start_from_weights_alone_goes_on_after_a_kill(tmp_path):
    """PiSSA reads no texts: each layer is read from the files once, what is solved already is not solved again."""
    path = str(save_tiny(tmp_path / "model"))
    method = make_method("pissa")
    config = method.config(r=4, target_modules="all-linear")

    def factors(folder: Path, in_files: bool) -> dict[str, torch.Tensor]:
        load, weights = AutoModelForCausalLM.from_pretrained, None
        base = load(path, dtype=torch.float32)
        if in_files:
            base, weights = open_in_files(load, path, dtype=torch.float32)
        with adapters_in_memory():
            model = get_peft_model(base, config)
        options = InitOptions(weights=weights, progress=False)
        layers = adapted_layers(model, "default")
        compute_start(model, layers, None, options, rule=method.rule_for(options), folder=folder)
        assert all(layer.get_base_layer().weight.is_meta == in_files for layer in layers.values())
        return {name: layer.lora_A["default"].weight.clone() for name, layer in layers.items()}

    whole, files = factors(tmp_path / "whole", False), factors(tmp_path / "files", True)
    first, *others = sorted((tmp_path / "files").glob("factors.*"))
    assert others and all(torch.equal(whole[name], A) for name, A in files.items())
    others[0].unlink()
    (tmp_path / "files" / REPORT_FILE).unlink()
    written = first.stat().st_mtime_ns
    again = factors(tmp_path / "files", True)
    assert others[0].is_file() and first.stat().st_mtime_ns == written
    assert all(torch.equal(whole[name], A) for name, A in again.items())


def evaluated(words: list[str]) -> int:
    """In each process: evaluate before and after saving, with decoder layers under activation checkpointing or not."""
    folder = Path(words[0])
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = words[1]
    rows = datasets.Dataset.from_dict({"input_ids": [list(range(1, 12))] * 8})
    try:
        for name in ("lora-null-v2", "full"):
            arguments = SFTConfig(
                output_dir=str(folder / name), max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, **QUIET,
                model_init_kwargs=IN_FLOAT32, save_only_model=True,
            )  # fmt: skip
            given = {"eval_dataset": rows, "preflight": "off"}
            trainer = built(LoraNullSFTTrainer, name, str(folder / "model"), arguments, rows, **given)
            trainer.train()
            wrapped = any("_checkpoint_wrapped_module" in name for name, _ in trainer.model.named_modules())
            assert wrapped == (words[1] == "true")
            loss = trainer.evaluate()["eval_loss"]
            trainer.save_model()
            assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
            if name == "lora-null-v2":
                trainer.train(resume_from_checkpoint=True)  # at its end already, in the trainer that has the shards
                assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_evaluated_and_saved_and_evaluated(tmp_path, checkpointing):
    save_tiny(tmp_path / "model")
    found = world(2, [str(tmp_path), checkpointing], tmp_path / "said.txt", "fsdp2", evaluated)
    assert found == [0, 0], (tmp_path / "said.txt").read_text()[-20_000:]
    assert not any("wrapped" in key for key in load_file(tmp_path / "lora-null-v2" / "adapter_model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto")
    assert all(weight.isfinite().all() for weight in loaded.parameters())


def test_tensors_of_the_cpu_meet_on_the_accelerator_where_the_group_takes_no_others(monkeypatch):
    """NCCL beside weights that an engine leaves on the CPU; a copy on the CPU stands for the accelerator's."""
    tensor = torch.ones(3)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cpu"))
    for backend, copied in (("cuda:nccl", True), ("cpu:gloo,cuda:nccl", False)):
        monkeypatch.setattr("torch.distributed.get_backend_config", lambda backend=backend: backend)
        with for_collective(tensor) as here:
            here += 1
            assert torch.equal(tensor, here) != copied
        assert torch.equal(tensor, here)


def broadcast_columns(words: list[str]) -> int:
    """In each process: take what the second one has, whose columns lie one after the other in memory."""
    PartialState(cpu=True)
    told = torch.arange(15.0).reshape(3, 5).T
    got = broadcast_like(told if PartialState().process_index == 1 else None, torch.zeros(5, 3), 1)
    return int(not torch.equal(got, told))


def test_a_transposed_tensor_arrives_as_it_was_sent(tmp_path):
    assert world(2, [], tmp_path / "said.txt", run=broadcast_columns) == [0, 0]


def test_an_optimizer_of_deepspeeds_own_configuration_has_no_groups(monkeypatch):
    stand_in = object()
    monkeypatch.setattr("transformers.Trainer.create_optimizer", lambda *_, **__: stand_in)
    trainer = LoraNullSFTTrainer.__new__(LoraNullSFTTrainer)
    trainer._weights = trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    trainer.args = SimpleNamespace(learning_rate=1e-3, weight_decay=0.0)
    assert trainer.create_optimizer() is stand_in


@pytest.mark.parametrize("given", [{"revision": "main"}, {"cache_dir": "x"}])
def test_what_trl_loads_by_more_than_a_path_is_loaded_whole(tmp_path, given, caplog):
    path = str(save_tiny(tmp_path / "model"))
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs=given
    )
    assert leave_in_files({"model": path, "args": arguments}) == (None, path)
    assert f"model_init_kwargs sets {next(iter(given))}" in caplog.text


def test_an_engine_that_does_not_shard_reads_everything_after_all(tmp_path, monkeypatch):
    """accelerate takes FSDP for GPUs alone and goes on without it."""
    path, name = str(save_tiny(tmp_path / "model")), "lora-null-v1"
    train(tmp_path, name, path, "plain")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    opened = []
    monkeypatch.setattr(
        checkpoint_reader, "open_in_files", lambda *a, **k: opened.append(open_in_files(*a, **k)) or opened[0]
    )
    train(tmp_path, name, path, "asked")
    assert opened
    ours, theirs = (weights_in(tmp_path / kind / "checkpoint-3") for kind in ("asked", "plain"))
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
    assert can_start_in_files(config) == fits


@pytest.mark.parametrize(
    ("given", "fits"),
    [({}, True), ({"chat_template_path": "a/tokenizer"}, False), ({"chat_template_path": "a.jinja"}, True)],
)
def test_a_tokenizers_chat_template_adds_tokens_to_the_embeddings(tmp_path, given, fits):
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)
    assert (
        can_start_in_files(LoraNullConfig(r=4), None, arguments)
        == can_start_in_files(None, make_method("full"), arguments)
        == fits
    )
