"""The same training by an engine that shards it, and by one process: how far the end weights differ.

python tests/gpu/engines.py --engine fsdp2 --processes 1 --out DIR      # on GPUs, as accelerate launches it
python tests/gpu/engines.py --engine fsdp2 --device cpu --out DIR       # two processes with gloo
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import torch
from engine_worlds import worlds_of
from launched import CONFIGURATIONS
from safetensors.torch import load_file
from world import make_world

METHODS = ("lora-null-v1", "lora-null-v2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["fsdp2", "zero3"], required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folder = given.out / "world"
    folder.mkdir(parents=True, exist_ok=True)
    methods = METHODS[1:] if given.device == "cpu" else METHODS
    recipe = write_recipe(folder, methods, given.processes)
    sharded = on_cpu(folder, recipe, given.engine) if given.device == "cpu" else on_gpus(folder, recipe, given)
    found = {"engine": given.engine, "processes": 2 if given.device == "cpu" else given.processes, "methods": {}}
    for method in methods:
        files = [path / method / "adapter" / "adapter_model.safetensors" for path in (sharded, folder / "one-1")]
        found["methods"][method] = distance(*files)
    print(json.dumps(found))
    (given.out / "engines.json").write_text(json.dumps(found, indent=1) + "\n")


def write_recipe(folder: Path, methods: tuple[str, ...], processes: int) -> Path:
    batch = processes * -(-4 // processes)  # a multiple, of at least 4
    training = {"learning_rate": 1e-2, "max_steps": 4, "total_batch_size": batch, "per_device_train_batch_size": 1}
    training |= {"bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no"}
    return make_world(folder, method={"name": ",".join(methods), "rank": 4}, training=training, eval={"before": False})


def on_gpus(folder: Path, recipe: Path, given: argparse.Namespace) -> Path:
    module = ["-m", "lora_null.recipes", str(recipe), "--overwrite", "--output-dir"]
    subprocess.run([sys.executable, *module, str(folder / "one-1")], check=True)
    name = folder / f"{given.engine}-{given.processes}"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / f"{given.engine}.yaml")]
    launch += ["--num_processes", str(given.processes)]
    subprocess.run([sys.executable, *launch, *module, str(name)], check=True)
    return name


def on_cpu(folder: Path, recipe: Path, engine: str) -> Path:
    worlds_of(recipe, folder, ["one-1", f"{engine}-2"], multiprocessing.get_context("fork"))
    return folder / f"{engine}-2"


def distance(ours: Path, theirs: Path) -> float:
    """Return the largest relative distance of a tensor of one file from that of the other."""
    a, b = load_file(ours), load_file(theirs)
    return max(float(torch.dist(a[key], b[key]) / torch.linalg.vector_norm(b[key])) for key in b)


if __name__ == "__main__":
    main()
