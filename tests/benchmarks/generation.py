"""Generation through this package against the lm_eval command: same model, adapter, documents, batch size and threads.

    python tests/benchmarks/generation.py --model FOLDER --nq NQ-open.dev.jsonl --gsm8k test.jsonl --limit 32

Prints the seconds of each whole process (imports and loading included), of generation alone, and their ratio; and whether
both gave the same scores. The adapter is a random LoRA of rank 32 that changes little.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = {
    "nq_open": ("nq_open/nq_open.yaml", ("train", "validation")),
    "gsm8k": ("gsm8k/gsm8k.yaml", ("train", "test")),
}
BATCH_SIZE = 8
LM_EVAL_COMMAND = Path(__file__).resolve().parents[1] / "lm_eval_command.py"


def make_adapter(model: str, folder: Path, dtype: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    adapted.save_pretrained(folder)


def ours(model: str, adapter: str, files: dict[str, str], limit: int, device: str, dtype: str) -> None:
    """Evaluate in this process and print the result as JSON."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_null.eval_harness import LmEvalTask, evaluate

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    peft_model = PeftModel.from_pretrained(base, adapter)
    tasks = [LmEvalTask(name, path=path, num_fewshot=0) for name, path in files.items()]
    found = evaluate(peft_model, AutoTokenizer.from_pretrained(model), tasks, limit=limit, batch_size=BATCH_SIZE)
    scores = {name: metric.value for name, metric in found.metrics.items()}
    print(json.dumps({"scores": scores, "seconds": found.seconds}))


def theirs(model: str, adapter: str, files: dict[str, str], given: argparse.Namespace, folder: Path) -> list:
    """Return the lm_eval command over the same documents."""
    import lm_eval.tasks

    for name, path in files.items():
        yaml, splits = TASKS[name]
        data_files = "".join(f"    {split}: {path}\n" for split in splits)
        (folder / f"my_{name}.yaml").write_text(
            f"include: {Path(lm_eval.tasks.__file__).parent / yaml}\ntask: my_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n{data_files}"
        )
    words = f"pretrained={model},peft={adapter},dtype={given.dtype}"
    program = [LM_EVAL_COMMAND] if given.quick else ["-m", "lm_eval"]
    command = [sys.executable, *program, "--model", "hf", "--model_args", words, "--device", given.device]
    command += ["--tasks", ",".join(f"my_{name}" for name in files), "--include_path", folder, "--num_fewshot", "0"]
    return [*command, "--batch_size", BATCH_SIZE, "--limit", given.limit, "--output_path", folder / "out"]


def timed(command: list) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return time.perf_counter() - began, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    for name in TASKS:
        parser.add_argument(f"--{name.removesuffix('_open')}", dest=name)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON")
    parser.add_argument("--quick", action="store_true", help="without lm-eval's own tasks: shows that it runs")
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = {name: str(Path(path).resolve()) for name in TASKS if (path := getattr(given, name))}
    if given.ours:
        ours(given.model, given.ours, files, given.limit, given.device, given.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_adapter(given.model, folder / "adapter", given.dtype)
        again = [f"--{name.removesuffix('_open')}={path}" for name, path in files.items()]
        command = [sys.executable, __file__, "--model", given.model, "--limit", given.limit, *again]
        command += ["--device", given.device, "--dtype", given.dtype]
        own_seconds, text = timed([*command, "--ours", folder / "adapter"])
        own = json.loads(text[text.index('{"scores"') :].splitlines()[0])
        lm_eval_seconds, _ = timed(theirs(given.model, folder / "adapter", files, given, folder))
        (saved,) = (folder / "out").glob("**/results_*.json")
        results = json.loads(saved.read_text())
        same = {
            name: value == results["results"][f"my_{name.split('/')[0]}"][_key(name)]
            for name, value in own["scores"].items()
        }
        generated = float(results["total_evaluation_time_seconds"])
    if given.out:
        found = {"seconds": own_seconds, "own_clock": own["seconds"], "lm_eval_seconds": lm_eval_seconds}
        found |= {"lm_eval_clock": generated, "scores_equal": same, "documents": given.limit}
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "generation.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"lm_eval command  {lm_eval_seconds:6.1f} s, by its own clock {generated:6.1f} s")
    print(f"lora_null        {own_seconds:6.1f} s, by its own clock {own['seconds']:6.1f} s")
    print(f"ratio            {own_seconds / lm_eval_seconds:.2f}; scores equal: {same}")


def _key(name: str) -> str:
    found = re.fullmatch(r"gsm8k/(.+)", name)
    return f"exact_match,{found[1]}" if found else "exact_match,remove_whitespace"


if __name__ == "__main__":
    main()
