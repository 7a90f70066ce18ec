"""Every claim about GPUs, tried on whatever accelerator is here: one command, some minutes, cut at any moment.

    python tests/gpu/run.py --out DIR                        # all parts, 9 minutes at most; again goes on where it was
    python tests/gpu/run.py --out DIR --part b,c/full --minutes 20
    python tests/gpu/run.py --out DIR --toy                  # toy sizes on the CPU: shows that it runs, measures nothing
    python tests/gpu/report.py DIR                           # what came back, as a table

Each step is a process of its own with a limit of its own. What it found is written to DIR/PART/STEP/step.json as soon as it
ends, and DIR/progress.png and DIR/report.md are made anew; steps that are done, or failed, are not run again (--again:
those that failed are). A step that was cut by --minutes, or with the machine, is. What a machine cannot do is skipped, with
the reason. Nothing is fetched: models are random ones of known shapes, and SmolLM2 where --smollm2 or the cache has it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as XML
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "benchmarks"
PATHS = [str(HERE.parents[1]), str(HERE.parent), str(BENCHMARKS)]  # the package may not be installed
sys.path[:0] = PATHS

import common  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from step import CONTENDERS  # noqa: E402
from tiny import save_tiny  # noqa: E402

from lora_null.trainer.methods import METHODS  # noqa: E402
from lora_null.utils.files import cache_root  # noqa: E402

PARTS = "abcdefg"
GSM8K = HERE.parents[1] / "recipes" / "samples" / "gsm8k_test.jsonl"
# Of one 7B layer: bfloat16 weights; an adapter's state; activations of a step. Of all else: logits, embeddings, the context.
LAYER_GB, ADAPTED_GB, ACTIVE_GB, OTHER_GB = 0.41, 0.16, 1.75, 8
COMPILED_LAYERS = 4  # a minute's work for the compiler
STUDY_STEPS = 1000
TOY_STUDY = ["eval.limit=2", "calibration.samples=16", "method.rank=4", "training.bf16=false"]
TOY_STUDY += ["training.max_length=1024", "training.per_device_train_batch_size=1", "training.total_batch_size=1"]
TOY_STUDY += ["eval.retention=[{answers: NQ, path: samples/nq_open_test.jsonl, prompt: question, response: answer}]"]


@dataclass(frozen=True)
class Machine:
    """What decides which steps run, and at which size.

    Attributes:
        device: "cuda" or "cpu".
        memory_gib: of the accelerator.
        count: accelerators.
        toy: toy sizes, on the CPU.
        smollm2: a folder with SmolLM2, if there is one.
    """

    device: str
    memory_gib: float
    count: int
    toy: bool
    smollm2: Path | None

    def lacks(self, gib: float = 0.0, *, package: str = "", toy: bool = True) -> str | None:
        """Return why a step cannot run here, None where it can.

        Args:
            gib: memory of the accelerator that it needs.
            package: that it needs.
            toy: whether it has a toy size.
        """
        if self.toy and not toy:
            return "has no toy size"
        if package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if not self.toy and self.device != "cuda":
            return "no GPU is here (--toy runs it at toy size on the CPU)"
        if not self.toy and gib > self.memory_gib:
            return f"needs {gib:.0f} GiB of GPU memory, {self.memory_gib:.0f} are here"
        return None


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        part: a letter.
        name: unique within the part.
        seconds: that it may take.
        lacking: why it cannot run here; None where it can.
        command: what follows `python`; "{out}" stands for its folder.
        read: from its folder and its exit status to what it found.
        prepare: called with its folder before it starts; returns further words of the command.
    """

    part: str
    name: str
    seconds: float
    lacking: str | None
    command: Sequence[str]
    read: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], list[str]] = field(default=lambda folder: [])

    def words(self, folder: Path) -> list[str]:
        return [word.replace("{out}", str(folder)) for word in self.command]


def steps(machine: Machine) -> list[Step]:
    """Return all steps, in the order in which they run."""
    makers = (correctness, initialization, training, quantized, engines, evaluation, study)
    return [step for make in makers for step in make(machine)]


def correctness(machine: Machine) -> list[Step]:
    command = ["-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(HERE)]
    command += ["--junitxml", "{out}/junit.xml", "--basetemp", "{out}/tests"]
    return [Step("a", "suite", 300, machine.lacks(), command, _junit)]


def _junit(folder: Path) -> dict[str, Any]:
    cases = list(XML.parse(folder / "junit.xml").iter("testcase"))
    bad = {
        case.get("name"): case[0].get("message", "")[:300] for case in cases if len(case) and case[0].tag != "skipped"
    }
    skipped = {
        case.get("name"): case[0].get("message", "") for case in cases if len(case) and case[0].tag == "skipped"
    }
    return {"passed": len(cases) - len(bad) - len(skipped), "failed": bad, "skipped": skipped}


def initialization(machine: Machine) -> list[Step]:
    """The paper's algorithm is a step of its own: its full SVDs take longer than all else."""
    quick = ["--quick"] * machine.toy
    script = [str(BENCHMARKS / "init.py"), "--out", "{out}", "--device", machine.device, *quick, "--cases"]
    layers = [str(BENCHMARKS / "memory.py"), "--out", "{out}", "--device", machine.device, "--shape", "70b", *quick]
    whole, layer = machine.lacks(30, toy=False), machine.lacks(16)
    if whole is None:
        layer = "the whole model stands for it"
    both, paper = ["whole", "--contenders", "forward,ours"], ["whole", "--contenders", "reference"]
    return [
        Step("b", "7b-whole", 300, whole, [*script, *both], _json("init.json")),
        Step("b", "7b-layer", 240, layer, [*script, "layer", "--scale", "1"], _json("init.json")),
        Step("b", "70b-from-files", 300, machine.lacks(45), layers, _json("memory.json")),
        # It holds a float32 covariance for each linear.
        Step("b", "7b-paper", 480, machine.lacks(46, toy=False), [*script, *paper], _json("init.json")),
    ]


def _json(name: str) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: json.loads((folder / name).read_text())


def _step(machine: Machine, contenders: str, cases: str, *, layers: int, extra: Sequence[str] = ()) -> list[str]:
    command = [str(BENCHMARKS / "step.py"), "--out", "{out}", "--device", machine.device, "--contenders", contenders]
    if machine.toy:
        return [*command, "--quick", "--no-memory", *extra]
    sizes = {"model": "llama-7b", "layers": layers, "rank": 128, "batch": 8, "length": 1024, "cases": cases}
    return [*command, *(word for name, value in sizes.items() for word in (f"--{name}", str(value))), *extra]


def _fitting(machine: Machine, per_layer: float) -> int:
    """Return how many layers of the 7B shape fit, at most all 32."""
    return max(1, min(32, int((0.9 * machine.memory_gib - OTHER_GB) / per_layer)))


def training(machine: Machine) -> list[Step]:
    """What trains an adapter takes turns, all on the card together; full fine-tuning with fewer layers where it has to."""
    adapters = (
        ["lora", "v2", "nb"] if machine.toy else [name for name in CONTENDERS if name not in ("full", "v2-matched")]
    )
    cases = "bf16:8,bf16+ckpt:6"
    together = _fitting(machine, len(adapters) * (LAYER_GB + ADAPTED_GB) + ACTIVE_GB)
    whole = _fitting(machine, 5 * LAYER_GB + ADAPTED_GB + ACTIVE_GB)
    few = min(COMPILED_LAYERS, together)
    command = _step(machine, ",".join(adapters), cases, layers=together)
    full = _step(machine, "lora,full", cases, layers=whole)
    compiled = _step(machine, "lora,v2", "bf16:8", layers=few, extra=["--compile"])
    flash = _step(machine, "lora,v2", "bf16:8", layers=few, extra=["--attention", "flash_attention_2"])
    lacks_flash = machine.lacks(16, package="flash_attn", toy=False)
    return [
        Step("c", "adapters", 300, machine.lacks(16), command, _json("step.json")),
        Step("c", "full", 240, machine.lacks(16, toy=False), full, _json("step.json")),
        Step("c", "compiled", 300, machine.lacks(16, toy=False), compiled, _json("step.json")),
        Step("c", "flash-attention", 300, lacks_flash, flash, _json("step.json")),
    ]


def quantized(machine: Machine) -> list[Step]:
    layers = _fitting(machine, 4 * (LAYER_GB / 4 + ADAPTED_GB) + LAYER_GB + ACTIVE_GB)  # one is there in bf16 at first
    names = "lora,v2" if machine.toy else "lora,v1,v2,nb"
    command = _step(machine, names, "bf16:6,bf16+ckpt:6", layers=layers, extra=["--quantization", "nf4"])
    return [Step("d", "nf4", 300, machine.lacks(16, package="bitsandbytes"), command, _json("step.json"))]


def engines(machine: Machine) -> list[Step]:
    found = []
    counts = sorted({1, max(1, machine.count)}) if machine.device == "cuda" else [2]
    for engine, package in (("fsdp2", ""), ("zero3", "deepspeed")):
        for count in counts:
            command = [str(HERE / "engines.py"), "--engine", engine, "--device", machine.device, "--out", "{out}"]
            command += ["--processes", str(count)]
            found.append(
                Step("e", f"{engine}-{count}", 240, machine.lacks(4, package=package), command, _json("engines.json"))
            )
    return found


def evaluation(machine: Machine) -> list[Step]:
    """Generation beside the lm_eval command; a random model never stops by itself, so all answers are of full length."""

    def model(folder: Path) -> list[str]:
        if machine.smollm2 and not machine.toy:
            return ["--model", str(machine.smollm2)]
        shape = {"max_position_embeddings": 2048}
        if not machine.toy:
            shape |= {
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 16,
                "initializer_range": 0.02,
            }
            shape |= {"num_attention_heads": 16, "num_key_value_heads": 16}
        return ["--model", str(save_tiny(folder / "model", **shape))]

    command = [str(BENCHMARKS / "generation.py"), "--gsm8k", str(GSM8K), "--device", machine.device, "--out", "{out}"]
    command += ["--limit", "2", "--quick"] if machine.toy else ["--limit", "64", "--dtype", "bfloat16"]
    vllm = [str(HERE / "served.py"), "--gsm8k", str(GSM8K), "--out", "{out}"]
    return [
        Step("f", "lm-eval", 300, machine.lacks(8), command, _json("generation.json"), model),
        Step("f", "vllm", 300, machine.lacks(8, package="vllm", toy=False), vllm, _json("served.json"), model),
    ]


def study(machine: Machine) -> list[Step]:
    """nb-lora beside its rivals at 1,000 steps: every method of the table that trains an adapter."""
    methods = [name for name in METHODS if name not in ("full", "roselora")]
    lacking = machine.lacks(8)
    if not machine.toy and machine.smollm2 is None:
        lacking = lacking or "SmolLM2 is not here; --smollm2 FOLDER names it"
    changes = ["grid.seeds=[0]", "grid.sweep={}", "grid.per_method={}", "grid.keep_weights=false", "eval.limit=64"]
    changes += ["data.path=samples/gsm8k_train.jsonl", "data.subset=null", "data.limit=null"]  # not the hub's
    changes += [f"training.max_steps={2 if machine.toy else STUDY_STEPS}", "eval.cache=false"]
    if machine.toy:
        methods = [name for name in ("lora", "lora-null-v2", "nb-lora") if name in METHODS][-2:]

    def prepare(folder: Path) -> list[str]:
        model = save_tiny(folder / "model", max_position_embeddings=2048) if machine.toy else machine.smollm2
        words = [f"model.name_or_path={model}", *(TOY_STUDY if machine.toy else [])]
        return [
            *words,
            *(["method.rank=4", "training.bf16=false"] if machine.toy else []),
            *["--resume"] * (folder / "run").exists(),
        ]

    def read(folder: Path) -> dict[str, Any]:
        return {"methods": methods, "missing": sorted({"nb-lora"} - set(METHODS))} | _json("run/results.json")(folder)

    command = [
        "-m",
        "lora_null.recipes",
        "study",
        "--method",
        ",".join(methods),
        "--output-dir",
        "{out}/run",
        *changes,
    ]
    return [Step("g", "study", 3600, lacking, command, read, prepare)]


def run_step(step: Step, folder: Path, facts: dict[str, Any], left: float, *, toy: bool, order: int) -> dict[str, Any]:
    """Run one step and write what it found; return that."""
    found: dict[str, Any] = {"part": step.part, "step": step.name, "order": order, "toy": toy, "machine": facts}
    found |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "status": "skipped", "reason": step.lacking}
    if step.lacking is None:
        if step.part != "g":  # which goes on from what it has; no other reads an earlier try's result for its own
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        words = [*step.words(folder), *step.prepare(folder)]
        allowed = step.seconds * (4 if toy else 1)  # a test suite's machine is busy with other tests
        began, limit = time.monotonic(), min(allowed, left)
        status = (_call_in_fork if toy else _call)(words, folder / "log.txt", limit)
        found |= {"command": words, "seconds": round(time.monotonic() - began, 1)}
        if status is None and left < allowed:
            found |= {"status": "cut", "reason": "the minutes were over; the next call runs it"}
        elif status is None:
            found |= {"status": "failed", "reason": f"took more than {allowed:.0f} s"}
        else:
            found |= _outcome(step, folder, status)
    common.write_json(folder / "step.json", found)
    return found


def _outcome(step: Step, folder: Path, status: int) -> dict[str, Any]:
    try:
        result = step.read(folder)
    except (OSError, ValueError, LookupError, XML.ParseError) as error:
        result, status = None, status or -1
        problem = f"left no result ({error})"
    else:
        problem = ""
    if status == 0:
        return {"status": "done", "reason": None, "result": result}
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    return {"status": "failed", "reason": f"exit status {status}: {(lines or [problem])[-1][:300]}", "result": result}


def _call(words: Sequence[str], log: Path, limit: float) -> int | None:
    """Return the exit status of a command, None where its time was over; nothing of it is left running."""
    paths = filter(None, [*PATHS, os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment["LORA_NULL_GPU_DEVICE"] = "cpu"
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        with subprocess.Popen([sys.executable, *words], **options) as process:
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _call_in_fork(words: Sequence[str], log: Path, limit: float) -> int | None:
    """As `_call`, in a fork of a process that has imported everything: at toy size imports are most of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_null.recipes.run", "pytest", "matplotlib.pyplot"])
    process = context.Process(target=_in_fork, args=(list(words), log))
    process.start()
    process.join(limit)
    status = process.exitcode
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    return status


def _in_fork(words: list[str], log: Path) -> None:
    gc.freeze()
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"HF_HUB_OFFLINE": "1", "LORA_NULL_GPU_DEVICE": "cpu"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH")]))
    run = runpy.run_path
    if words[0] == "-m":
        run, words = runpy.run_module, words[1:]
    sys.argv = words
    run(words[0], run_name="__main__")


def pending(step: Step, folder: Path, *, toy: bool, again: bool) -> bool:
    """Return whether a step has still to run: it was never started here, or cut, or is another one now."""
    try:
        before = json.loads((folder / "step.json").read_text())
    except (OSError, ValueError):
        return True
    same = before["toy"] == toy and before.get("command", [])[: len(step.command)] == step.words(folder)
    return not (same and (before["status"] == "done" or (before["status"] == "failed" and not again)))


def find_machine(*, toy: bool, smollm2: Path | None) -> Machine:
    cached = cache_root() / "SmolLM2-135M-Instruct-Q4_1"
    smollm2 = smollm2 or (cached if (cached / "config.json").is_file() else None)
    if toy or not torch.cuda.is_available():
        return Machine("cpu", 0.0, 0, toy, smollm2)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Machine("cuda", memory, torch.cuda.device_count(), toy, smollm2)


def main(argv: Sequence[str] | None = None, make: Callable[[Machine], list[Step]] = steps) -> int:
    """Run what is left; return 0 where nothing failed, 1 where something did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take (default: %(default)g)")
    parser.add_argument("--part", default=",".join(PARTS), help="letters, or letter/step, by commas (default: all)")
    parser.add_argument(
        "--toy", action="store_true", help="toy sizes on the CPU: shows that it runs, measures nothing"
    )
    parser.add_argument("--again", action="store_true", help="run again what failed")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="SmolLM2, for (f) and (g)")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a step has started ends with it
    parts = given.part.split(",")
    until = time.monotonic() + 60 * given.minutes
    machine = find_machine(toy=given.toy, smollm2=given.smollm2)
    every = make(machine)
    if unknown := sorted(set(parts) - set(PARTS) - {f"{step.part}/{step.name}" for step in every}):
        parser.error(
            f"--part: {', '.join(map(repr, unknown))} is none of {', '.join(PARTS)}, nor such as b/70b-from-files"
        )
    facts = common.machine(torch.device(machine.device)) | {
        "gpus": machine.count,
        "gpu_gib": round(machine.memory_gib, 1),
    }
    print(common.headline(facts))
    failed = 0
    for order, step in enumerate(every):
        folder = given.out.resolve() / step.part / step.name
        if not {step.part, f"{step.part}/{step.name}"} & set(parts) or not pending(
            step, folder, toy=given.toy, again=given.again
        ):
            continue
        left = until - time.monotonic()
        if left <= 0 and step.lacking is None:
            print(f"({step.part}) {step.name}: left for the next call")
            continue
        found = run_step(step, folder, facts, left, toy=given.toy, order=order)
        failed += found["status"] == "failed"
        seconds = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
        print(
            f"({step.part}) {step.name}: {found['status']}{seconds}"
            + (f", {found['reason']}" if found["reason"] else "")
        )
        report.write([given.out])
    print(f"report: {given.out / 'report.md'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
