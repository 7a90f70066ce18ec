"""The files for Slurm, SkyPilot, Kubeflow and HF Jobs: each read by its own parser, and the line in them starts and resumes."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from kill_harness import outcome, run
from packaging.version import Version
from torch.distributed.run import get_args_parser
from world import make_world

import lora_null.recipes.config.load as load
from lora_null.recipes import launch
from lora_null.trainer.checkpoints import last_checkpoint
from lora_null.utils.errors import UserError

CLUSTERS = load.RECIPES / "clusters"
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TWO = {
    "slurm": {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "node-7"},
    "skypilot": {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8"},
    "kubeflow": {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "node-0-0.node",
        "PET_NPROC_PER_NODE": "8",
    },
    "hf-jobs": {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"},
}


def matching(pattern):
    def check(text):
        if not re.fullmatch(pattern, text):
            raise ValueError(text)
        return text

    return check


def sbatch():
    """The options of sbatch that the file uses, with the forms that its manual gives them."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--time", type=matching(r"(\d+-)?\d+(:\d\d){1,2}"))
    parser.add_argument("--mem", type=matching(r"\d+[KMGT]?"))
    parser.add_argument("--signal", type=matching(r"([RB]{1,2}:)?[A-Z]+(@\d+)?"))
    parser.add_argument("--open-mode", choices=("append", "truncate"))
    parser.add_argument("--output", type=matching(r"[\w%.-]+"))
    parser.add_argument("--job-name")
    parser.add_argument("--requeue", action="store_true")
    return parser


@pytest.mark.parametrize("path", sorted(CLUSTERS.iterdir()), ids=lambda path: path.name)
def test_a_file_says_its_command_and_that_it_has_not_been_run(path):
    text = path.read_text()
    assert f"recipes/clusters/{path.name}" in text and "Not yet run on" in text
    assert "lora_null.recipes.launch" in text and "LORA_NULL_CACHE" in text and "HF_HOME" in text
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)


def fake(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def test_slurm_knows_every_line_and_a_saved_job_goes_back_into_the_queue(tmp_path):
    head = re.findall(r"^#SBATCH (.*)$", (CLUSTERS / "slurm.sh").read_text(), flags=re.MULTILINE)
    found = sbatch().parse_args([word for line in head for word in shlex.split(line)])
    assert found.ntasks_per_node == 1 and found.requeue and found.signal == "TERM@300" and found.open_mode == "append"
    for name in ("srun", "scontrol"):
        fake(tmp_path / "bin", name, f'echo "{name} $*" >> "$CALLS"; [ {name} = srun ] && exit "$ENDS"; echo first')
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_JOB_ID": "42"}
    for ends, requeued in (("0", False), ("1", False), ("143", True)):
        (tmp_path / "calls").write_text("")
        words = ["bash", CLUSTERS / "slurm.sh", "math", "method.rank=64"]
        ended = subprocess.run(words, env={**environment, "ENDS": ends}, cwd=tmp_path)
        calls = (tmp_path / "calls").read_text()
        assert ended.returncode == int(ends) and ("scontrol requeue 42" in calls) is requeued
        assert "python -m lora_null.recipes.launch math method.rank=64" in calls


def test_skypilot_reads_its_task(monkeypatch, tmp_path):
    raw = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert set(raw["envs"]) >= {"WORDS", "OUTPUT"} and raw["file_mounts"]["/shared"]["mode"] == "MOUNT_CACHED"
    assert raw["envs"]["OUTPUT"].startswith("/shared/") and "$OUTPUT" in raw["run"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    monkeypatch.chdir(load.RECIPES.parent.resolve())
    sky = pytest.importorskip("sky", reason="pip install skypilot in an environment of its own runs this")
    task = sky.Task.from_yaml(str(CLUSTERS / "skypilot.yaml"))
    assert task.num_nodes == 1 and task.run == raw["run"]


def test_kubeflow_reads_its_trainjob():
    raw = yaml.safe_load((CLUSTERS / "trainjob.yaml").read_text())
    assert (raw["apiVersion"], raw["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api runs this")
    assert models.TrainerV1alpha1TrainJob.from_dict(raw).to_dict() == raw  # what it does not know it drops


@pytest.mark.parametrize("nodes", [1, 2])
def test_hf_jobs_takes_its_command(tmp_path, nodes):
    """By huggingface_hub's own parser, with --dry-run; and what the job would run is this package's line."""
    hf = Path(sys.executable).parent / "hf"
    fake(tmp_path / "bin", "hf", f'printf "%s\\n" "$@" "$HOME" >> "$CALLS"; {hf} "$@"')
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    environment |= {"IMAGE": "me/lora-null:cu130", "BUCKET": "me/runs", "JOBS_OPTIONS": "--dry-run"}
    environment |= {"NNODES": str(nodes), "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "1"}
    words = ["bash", CLUSTERS / "hf-jobs.sh", "math", "--output-dir", "/shared/runs/math"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Job not submitted") == nodes and "hf_none" not in ended.stdout
    calls = (tmp_path / "calls").read_text()
    assert calls.count("NNODES=") == nodes and calls.count("--network-group") == (nodes if nodes > 1 else 0)
    assert "launch\nmath\n--output-dir\n/shared/runs/math\n" in calls


@pytest.mark.parametrize("cluster", TWO)
@pytest.mark.parametrize("engine", launch.ENGINES)
def test_two_machines_meet_at_the_first(cluster, engine):
    words = launch.command(["--engine", engine, "math", "--resume", "method.rank=64"], TWO[cluster], gpus=8)
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    found = _validate_launch_command(launch_command_parser().parse_args(words[3:]))[0]
    assert (found.num_machines, found.num_processes, found.machine_rank) == (2, 16, 1)
    assert (
        found.main_process_ip in ("node-7", "10.0.0.7", "node-0-0.node", "node0") and found.main_process_port == 29500
    )
    assert found.rdzv_backend == "static" and found.module and found.training_script == "lora_null.recipes"
    assert found.training_script_args == ["math", "method.rank=64", "--resume"]
    assert (found.use_fsdp, found.use_deepspeed) == (engine == "fsdp2", engine.startswith("zero"))
    if found.use_deepspeed:  # by torchrun on each machine, not by pdsh, with which each would be alone
        found.deepspeed_fields_from_accelerate_config = ""
        assert prepare_deepspeed_cmd_env(found)[0] is None  # no command of DeepSpeed's own
        assert (found.nnodes, found.nproc_per_node, found.node_rank) == ("2", "8", 1)


def test_one_machine_and_one_gpu(monkeypatch):
    for environment in ({}, {"SLURM_NNODES": "1", "SLURM_NODEID": "0"}, {"PET_NNODES": "1"}):
        several = launch.command(["math"], environment, gpus=8)
        found = _validate_launch_command(launch_command_parser().parse_args(several[3:]))[0]
        assert found.multi_gpu and found.num_processes == 8 and found.num_machines == 1
        for gpus in (0, 1):
            alone = launch.command(["math"], environment, gpus)
            assert alone == [sys.executable, "-m", "lora_null.recipes", "math", "--resume"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", launch.SECONDS_TO_SAVE)
    if Version(torch.__version__) >= Version("2.13"):  # 2.11 has neither this option nor the variable
        assert get_args_parser().parse_args(["script.py"]).shutdown_timeout is None  # the variable counts then


def test_a_machine_of_several_without_a_gpu_does_not_run_alone():
    with pytest.raises(UserError, match="2 machines, and PyTorch sees no GPU on this one"):
        launch.command(["math"], TWO["slurm"], 0)


def test_what_cannot_start_is_told_in_a_line():
    with pytest.raises(UserError, match="begin anew after every interruption"):
        launch.command(["math", "--overwrite"], {}, gpus=1)
    with pytest.raises(UserError, match="SLURM_NNODES is 2, and MASTER_ADDR is not set"):
        launch.command(["math"], {"SLURM_NNODES": "2", "SLURM_NODEID": "0"}, gpus=8)
    two = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "node"}
    for wrong, message in (
        ({"PET_NNODES": "1:2"}, "PET_NNODES is '1:2', not a whole number"),
        ({"PET_NODE_RANK": "-1"}, "PET_NODE_RANK is '-1', not a whole number"),
        ({"PET_NODE_RANK": "2"}, r"PET_NODE_RANK is 2, and of 2 machines \(PET_NNODES\) the last is 1"),
        ({"PET_MASTER_ADDR": " "}, "PET_NNODES is 2, and PET_MASTER_ADDR is not set"),
    ):
        with pytest.raises(UserError, match=message):
            launch.machines(two | wrong)
    assert launch.machines(two | {"PET_NNODES": "", "PET_NODE_RANK": ""}) == (1, 0, "localhost")
    with pytest.raises(UserError, match="--engine: invalid choice: 'fsdp'"):
        launch.command(["--engine", "fsdp", "math"], {}, gpus=1)


PATIENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}  # seconds that torch's agent waits for what it was told to end


def preempted(command, folder, log):
    """Run a command, send its first process alone SIGTERM once it trains; return its status and what it said."""
    with open(folder / "said.txt", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **CPU, **PATIENT}, cwd=folder)
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
    return status, (folder / "said.txt").read_text()


def test_the_same_line_starts_and_goes_on_after_a_preemption(tmp_path):
    """At the end is what an unbroken run gives, to the last bit."""
    recipe = make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4})
    few = ["training.max_steps=60", "training.save_steps=100000"]
    line = [sys.executable, "-m", "lora_null.recipes.launch", str(recipe), *few]
    status, said = preempted(line, tmp_path, tmp_path / "out" / "lora-null-v2" / "train_log.jsonl")
    assert status == 143 and "Traceback" not in said, said[-2000:]
    step = re.search(r"stopped by SIGTERM after step (\d+); --resume goes on from there", said)[1]
    checkpoint = last_checkpoint(tmp_path / "out" / "lora-null-v2")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == int(step) < 60
    again = launch.command(line[3:], {}, gpus=0)[3:]  # the recipe's words, in a process that has imported all
    assert run(again[0], tmp_path / "out", *again[1:]) == 0 and run(recipe, tmp_path / "unbroken", *few) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "unbroken")


def test_several_processes_save_when_their_launcher_is_told(tmp_path):
    """accelerate starts several processes on GPUs with torch's agent, which hands SIGTERM on; here by torchrun."""
    recipe = make_world(tmp_path, method={"name": "lora", "rank": 4})
    words = ["-m", "lora_null.recipes", str(recipe), "training.max_steps=5000", "training.learning_rate=1e-4"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    status, said = preempted([*line, "--resume"], tmp_path, tmp_path / "out" / "lora" / "train_log.jsonl")
    assert status != 0 and said.count("--resume goes on from there") == 1, said[-2000:]
    step = re.search(r"stopped by SIGTERM after step (\d+)", said)[1]
    assert last_checkpoint(tmp_path / "out" / "lora").name == f"checkpoint-{step}"
