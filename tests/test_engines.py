"""The engines that accelerate starts: shipped configurations, and the same adapter from each, whole."""

import importlib.util
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from engine_worlds import FEWER_METHODS, REFUSED, begin, free_port, world, worlds_of
from launched import CONFIGURATIONS, arguments_of, environment_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_batches, tiny_model
from torch import nn
from trl import SFTConfig
from world import make_world

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights, start
from lora_null.adapters.plain import check_saved_adapter, save_plain_adapter
from lora_null.recipes import processes
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.processes import join_processes
from lora_null.recipes.training import training_arguments
from lora_null.trainer.checkpoints import check_processes, record_processes
from lora_null.utils.startup import exit_status

METHODS = ("lora-null-v1", "nb-lora", "lora-null-v2", "full")
FEWER = METHODS[:2]
NAMES = sorted(path.stem for path in CONFIGURATIONS.glob("*.yaml"))
WEIGHTS = "adapter_model.safetensors"


def test_all_engines_are_shipped():
    assert NAMES == ["ddp", "fsdp2", "multi-node", "one-gpu", "zero2", "zero3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_says_its_command_and_accelerate_knows_every_key(name):
    path = CONFIGURATIONS / f"{name}.yaml"
    text = path.read_text()
    assert text.startswith(f"# accelerate launch --config_file recipes/accelerate/{name}.yaml")
    assert "ot yet run on" in text or "Run on one GPU" in text  # what it has been tried on
    load_config_from_file(str(path))  # refuses what it does not know, at the top
    known = vars(launch_command_parser().parse_args(["script.py"]))
    raw = yaml.safe_load(text)
    assert set(raw.get("fsdp_config", {})) <= set(known)
    assert set(raw.get("deepspeed_config", {})) <= set(known)
    arguments = arguments_of(name)
    kinds = {"ddp": "multi_gpu", "multi-node": "multi_gpu", "fsdp2": "use_fsdp"}
    kinds |= {"zero2": "use_deepspeed", "zero3": "use_deepspeed"}
    assert name == "one-gpu" or getattr(arguments, kinds[name])
    assert arguments.num_machines == (2 if name == "multi-node" else 1) and arguments.mixed_precision == "no"


def test_fsdp2_sends_no_weights_from_the_first_process_and_saves_models_whole(monkeypatch):
    for key, value in environment_of("fsdp2").items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_passes_deepspeeds_own_parser(stage, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency; pip install deepspeed runs this")
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for key, value in environment_of(f"zero{stage}").items():
        monkeypatch.setenv(key, value)
    config = HfTrainerDeepSpeedConfig(DeepSpeedPlugin().deepspeed_config)
    config.trainer_config_process(arguments)  # fills "auto", raises where the two disagree
    unset_hf_deepspeed_config()
    assert not config.mismatches
    parsed = DeepSpeedConfig(config.config)
    assert parsed.zero_config.stage == stage and parsed.gradient_accumulation_steps == 4
    assert parsed.train_micro_batch_size_per_gpu == 2 and parsed.gradient_clipping == arguments.max_grad_norm
    assert not parsed.float16_config.enabled and not parsed.bfloat16_config.enabled


def run_worlds(folder: Path, *names: str, decay: float) -> None:
    recipe = folder / "tiny.yaml"
    if not recipe.is_file():
        training = {"learning_rate": 1e-2, "max_steps": 4, "total_batch_size": 4, "per_device_train_batch_size": 1}
        training |= {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_steps": 2}
        training |= {"weight_decay": decay}  # to the start, where there is a residual
        kept = [{"answers": "facts", "path": str(folder / "facts.jsonl"), "limit": 4}]
        changes = {"training": training, "eval": {"batch_size": 4, "cache": False, "retention": kept}}
        make_world(folder, method={"name": ",".join(METHODS), "rank": 4}, **changes)
    ended = worlds_of(recipe, folder, names)
    said = "".join(f"\n== {path.name}\n{path.read_text()[-3000:]}" for path in folder.glob("*.txt"))
    expected = {name: {2} if name == REFUSED else {0} for name in names}
    assert {name: set(statuses) for name, statuses in ended.items()} == expected, said


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    run_worlds(
        folder, "one-1", "ddp-4", "fsdp2-2", "resumed-1", "fsdp2_resumed-2", "fsdp2_killed-2", REFUSED, decay=0.3
    )
    return folder


def methods_of(name: str) -> tuple[str, ...]:
    return FEWER if name in FEWER_METHODS else METHODS


def weights_of(folder: Path, method: str) -> list[Path]:
    """Return the files of what a method leaves, at its end and in its checkpoints."""
    end, file = ("model", "model.safetensors") if method == "full" else ("adapter", WEIGHTS)
    return [folder / method / place / file for place in (end, "checkpoint-2", "checkpoint-4")]


def assert_same_weights(folder: Path, name: str) -> None:
    """Compare what a world leaves with the one process's: names, shapes, bytes on disk, and values to rounding."""
    for method in methods_of(name):
        for ours, theirs in zip(*(weights_of(folder / each, method) for each in (name, "one-1"))):
            assert ours.stat().st_size == theirs.stat().st_size
            a, b = load_file(ours), load_file(theirs)
            for key in b:
                error = torch.dist(a[key], b[key]) / torch.linalg.vector_norm(b[key])
                assert error < 1e-4, (ours, key, error)


@pytest.mark.parametrize("name", ["ddp-4", "fsdp2-2", "fsdp2_resumed-2", "fsdp2_killed-2"])
def test_every_world_ends_in_the_weights_of_one_process(worlds, name):
    assert_same_weights(worlds, name)
    for method in methods_of(name):
        rows = [json.loads((worlds / each / "results.json").read_text())["rows"] for each in (name, "one-1")]
        ours, theirs = (next(row for row in found if row["method"] == method) for found in rows)
        assert ours["trainable_params"] == theirs["trainable_params"]
        assert ours["drift"]["max"] == pytest.approx(theirs["drift"]["max"], rel=1e-3)
        for metric, value in theirs["metrics"].items():
            assert ours["metrics"][metric]["value"] == pytest.approx(value["value"], rel=1e-3, abs=1e-5)


def test_fsdp2_did_shard(worlds):
    assert (worlds / "fsdp2-2" / "full" / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()


def test_another_number_of_processes_goes_on_and_says_so(worlds):
    said = (worlds / "resumed-1.txt").read_text()
    assert said.count("was written by 4 processes, this run has 1; batches and their order stay") == len(FEWER)
    assert_same_weights(worlds, "resumed-1")


def test_a_mistake_that_the_first_process_finds_ends_all_in_one_line(worlds):
    said = (worlds / f"{REFUSED}.txt").read_text()
    assert said.count("error:") == 1 and "holds a finished run" in said and "Traceback" not in said


def test_zero_ends_in_the_weights_of_one_process(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency; pip install deepspeed runs this")
    names = ("zero2-2", "zero3-2", "zero2_resumed-2", "zero3_resumed-2")
    run_worlds(tmp_path, "one-1", *names, decay=0.0)  # it cannot decay to the start
    for name in names:
        assert list((tmp_path / name / METHODS[0] / "checkpoint-4").glob("global_step4/*optim_states.pt"))
        assert_same_weights(tmp_path, name)


def test_other_batches_or_deepspeeds_pieces_are_refused(tmp_path, capsys):
    record_processes(tmp_path, 2, 8, "DeepSpeed")
    with pytest.raises(UserError, match=r"batches of 8 \(2 processes\), this run takes 4 \(1 processes\)"):
        check_processes(tmp_path, 1, 4, None)
    with pytest.raises(UserError, match="cannot go on with 4; start 2"):
        check_processes(tmp_path, 4, 8, "DeepSpeed")
    check_processes(tmp_path, 2, 8, "DeepSpeed")
    assert capsys.readouterr().err == ""
    check_processes(tmp_path, 4, 8, None)  # without an optimizer there is nothing that an engine cannot read
    assert "results agree to rounding" in capsys.readouterr().err
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(
        UserError, match="trained under DeepSpeed, and its optimizer cannot be read without FSDP or Deep"
    ):
        check_processes(tmp_path, 2, 8, None)
    with pytest.raises(UserError, match="trained under DeepSpeed, and its optimizer cannot be read under FSDP"):
        check_processes(tmp_path, 2, 8, "FSDP")


def join(words):
    """Join the processes of an environment."""
    os.environ.update(word.split("=", 1) for word in words)
    return exit_status(join_processes)


@pytest.fixture
def refusal_of(tmp_path):
    """Return the one line that ends a process which is launched so."""

    def refused(place):
        said = tmp_path / "said.txt"
        status = world(1, [f"{key}={value}" for key, value in place.items()], said, run=join)
        assert status == [2] and "Traceback" not in said.read_text(), said.read_text()[-2000:]
        (line,) = [line for line in said.read_text().splitlines() if line.startswith("error:")]
        return line

    return refused


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_a_port_in_use_is_one_line(refusal_of):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} is in use" in refusal_of({**LAUNCHED, "WORLD_SIZE": "2", "MASTER_PORT": port})


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
@pytest.mark.parametrize("place", [{**LAUNCHED, "WORLD_SIZE": "1", "MASTER_PORT": "29400"}, {}])
def test_deepspeed_that_is_not_there_is_one_line(refusal_of, place):
    assert "DeepSpeed, which is not installed" in refusal_of({**place, "ACCELERATE_USE_DEEPSPEED": "true"})


def wait_for_another(words):
    """Join with a handler as the command has it, which cannot run while PyTorch waits."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes.TELL_SECONDS = 0.1
    return join(words)


def test_a_process_that_waits_says_for_whom_and_can_be_stopped(tmp_path):
    place, said = {**LAUNCHED, "WORLD_SIZE": "3", "MASTER_PORT": str(free_port())}, tmp_path / "said.txt"
    (process,) = begin(1, [f"{key}={value}" for key, value in place.items()], said, run=wait_for_another)
    until = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < until and not (said.is_file() and said.stat().st_size):
        time.sleep(0.05)
    process.terminate()
    process.join(10)
    process.kill()
    assert process.exitcode == -signal.SIGTERM
    told = f"waiting for 2 other processes at 127.0.0.1:{place['MASTER_PORT']}; unset RANK, WORLD_SIZE, LOCAL_RANK, "
    assert said.read_text().startswith(told)


@pytest.mark.parametrize(
    "left, missing",
    [
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set, as by a launcher, and RANK is not; unset LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "and MASTER_ADDR is not; unset LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, as by a launcher, and RANK is not; unset WORLD_SIZE"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "and MASTER_ADDR is not; unset OMPI_COMM_WORLD_SIZE",
        ),
    ],
)
def test_what_a_launcher_has_left_is_named(refusal_of, left, missing):
    assert missing in refusal_of(left)


def test_the_index_of_a_process_alone_silences_nothing(monkeypatch, capsys):
    def mistaken():
        raise UserError("a mistake")

    monkeypatch.setenv("RANK", "1")
    assert exit_status(mistaken) == 2 and "error: a mistake" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # left with it, and no process's beside this one
    assert exit_status(mistaken) == 2 and "error: a mistake" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_status(mistaken) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first process of another machine
    assert exit_status(mistaken) == 2 and "error: a mistake" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_batches_that_are_not_the_recipes_are_refused(tmp_path, monkeypatch, given):
    monkeypatch.setattr("lora_null.recipes.training.num_processes", lambda: 2)
    recipe = make_world(tmp_path, training={"accelerator_config": given})
    with pytest.raises(UserError, match=f"training.accelerator_config: {next(iter(given))}"):
        training_arguments(load_recipe(str(recipe)), tmp_path)


def test_processes_on_cards_of_their_own_agree_on_the_start():
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    options = [SimpleNamespace(solver="auto", form="auto", seed=0, device=device) for device in devices]
    assert len({start._key("", {}, "default", [], each, None, "") for each in options}) == 1


class TestWholeness:
    @pytest.fixture
    def model(self):
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4, variant="v1"))
        initialize_lora_null_weights(model, random_batches(), min_tokens=1, progress=False)
        return model

    def test_a_whole_adapter_passes(self, model, tmp_path):
        save_plain_adapter(model, tmp_path)
        check_saved_adapter(tmp_path, model)
        PeftModel.from_pretrained(tiny_model(), tmp_path)

    @pytest.mark.parametrize("damage", ["empty", "missing", "cut short"])
    def test_anything_less_is_an_error(self, model, tmp_path, damage):
        save_plain_adapter(model, tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        key = next(iter(tensors))
        if damage == "empty":  # 40 bytes a file: what ZeRO-3 leaves of a parameter on a process
            tensors[key] = torch.empty(0)
        else:
            del tensors[key]
        if damage == "cut short":
            os.truncate(tmp_path / WEIGHTS, 3000)
        else:
            save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(RuntimeError, match="whole"):
            check_saved_adapter(tmp_path, model)

    def test_a_piece_is_not_saved(self, model, tmp_path):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight = nn.Parameter(torch.empty(0, 4))
        layer.residual = None
        with pytest.raises(RuntimeError, match="not whole"):
            save_plain_adapter(model, tmp_path)
        assert not (tmp_path / WEIGHTS).exists()

    def test_no_start_from_pieces(self):
        model = get_peft_model(tiny_model(), LoraNullConfig(r=4))
        weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
        weight.ds_id = 7  # as ZeRO-3 marks a parameter that it has cut up
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.* is not whole on every process"):
            initialize_lora_null_weights(model, random_batches(), min_tokens=1, progress=False)
