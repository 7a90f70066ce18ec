"""What an initialization costs: ours, the reference algorithm, PEFT's CorDA and EVA, beside the bare forward pass.

    python tests/benchmarks/init.py                         # SmolLM2 whole, half of a Llama-7B-shaped layer, and PEFT's
    python tests/benchmarks/init.py --cases packed          # SmolLM2 on packed windows of 1024 tokens
    python tests/benchmarks/init.py --cases layer --scale 1 # the layer at full width, 7 minutes of it the reference
    python tests/benchmarks/init.py --cases layer --scale 1 --windows 4  # on 4,096 tokens
    python tests/benchmarks/init.py --cases whole --device cuda  # Llama-2-7B's shape; a linear of each shape the reference

Every contender runs in a process of its own, so that its peak memory is its own; the forward pass and ours run several
times, in turns. The reference is the paper's algorithm as its text has it: every linear's covariance apart, its full
SVD, P = U Uᵀ, and the full SVD of W P (tests/test_benchmarks.py checks that it finds our subspace).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import common
import psutil
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_null import LoraNullConfig
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.layerwise import walk_layers
from lora_null.recipes.environment import keep_freed_memory
from lora_null.recipes.models.smollm2 import smollm2
from lora_null.trainer.calibration_data import CalibrationArgs, calibration_windows, padded_batches

SHARE = 8  # of the batches of the whole model, the reference is timed on one in so many
QUESTIONS = Path(__file__).resolve().parents[2] / "recipes" / "samples" / "nq_open_calibration.jsonl"
CASES = {
    "smollm2": dict(windows=16, length=256, rank=32, contenders="forward ours reference", repeated=2),
    "peft": dict(windows=16, length=256, rank=32, contenders="forward ours eva corda", repeated=1),
    "packed": dict(windows=32, length=1024, rank=32, contenders="forward ours", repeated=1),
    "layer": dict(windows=12, length=1024, rank=64, contenders="forward ours reference", repeated=1),
    "whole": dict(windows=256, length=1024, rank=128, contenders="forward ours reference", repeated=1),
}


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--cases", default="smollm2,layer,peft", help=f"of {', '.join(CASES)}, separated by commas")
    parser.add_argument("--scale", type=float, default=0.5, help="width of `layer`, 1 is Llama-7B's")
    parser.add_argument("--windows", type=int, default=0, help="calibration windows (default: the case's own number)")
    parser.add_argument("--contenders", help="separated by commas (default: the case's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", help="internal: run one contender of one case and print JSON")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(_work(*options.worker.split("/"), options)))
        return
    if options.quick:
        options.cases = "layer"
    facts = common.machine(torch.device(options.device))
    print(common.headline(facts))
    results: dict[str, Any] = {"machine": facts, "cases": {}}
    for case in options.cases.split(","):
        results["cases"][case] = _run_case(case, options)
        common.write_json(options.out / "init.json", results)
    _draw(results, options.out / "init.png")


def _run_case(case: str, options: Any) -> dict[str, Any]:
    settings = CASES[case]
    raw: dict[str, list[dict[str, Any]]] = {}
    for turn in range(1 if options.quick else settings["repeated"]):
        for contender in (options.contenders or settings["contenders"].replace(" ", ",")).split(","):
            if turn == 0 or contender in ("forward", "ours"):
                raw.setdefault(contender, []).append(_start(f"{case}/{contender}", options))
                print(f"  {case}: {contender} {raw[contender][-1]['seconds']:.1f} s", flush=True)
    forward = median(run["seconds"] for run in raw["forward"]) if "forward" in raw else None
    rows = {name: _summary(runs, forward) for name, runs in raw.items()}
    about = next(iter(raw.values()))[0]["about"]
    _print_case(case, rows, about)
    return {"about": about, "rows": rows, "raw": raw}


def _start(worker: str, options: Any) -> dict[str, Any]:
    if options.quick:  # measures nothing, so it needs no process of its own
        return _work(*worker.split("/"), options)
    command = [sys.executable, __file__, "--worker", worker, "--device", options.device, "--scale", str(options.scale)]
    command += ["--windows", str(options.windows)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _summary(runs: list[dict[str, Any]], forward: float | None) -> dict[str, Any]:
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {**middle, "times_forward": forward and middle["seconds"] / forward}


def _print_case(case: str, rows: dict[str, Any], about: str) -> None:
    head = ("", "seconds", "x forward", "calibrate", "solve", "other", "peak GiB", "leakage (worst)")
    table = []
    for name, row in rows.items():
        parts = [
            f"{row['parts'][part]:.1f}" if part in row["parts"] else "-" for part in ("calibrate", "solve", "other")
        ]
        leak = f"{row['leakage']:.2e}" if row.get("leakage") else "-"
        table.append(
            [
                name,
                f"{row['seconds']:.1f}",
                f"{row['times_forward'] or math.nan:.2f}",
                *parts,
                f"{row['peak_gib']:.2f}",
                leak,
            ]
        )
    common.print_table(f"{case}: {about}", head, table)
    if {"reference", "ours"} <= rows.keys():
        print(f"  ours is {rows['reference']['seconds'] / rows['ours']['seconds']:.1f} times as fast as the reference")


def _work(case: str, contender: str, options: Any) -> dict[str, Any]:
    """Run one contender in this process; return its times, its peak memory above the loaded model, its leakage."""
    keep_freed_memory()
    device = torch.device(options.device)
    model, batches, name = _world(case, options, device)
    rank, config = 8 if options.quick else CASES[case]["rank"], model.config
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    size = {"tokens": tokens, "length": batches[0]["input_ids"].shape[1], "rank": rank}
    size["shape"] = [config.num_hidden_layers, config.hidden_size, config.intermediate_size]
    size["shape"] += [config.num_key_value_heads * config.head_dim, config.vocab_size]
    about = f"{name}, {tokens:,} tokens, r {rank}"
    with torch.no_grad():
        backbone = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
        backbone(**{key: value[:1, :16].to(device) for key, value in batches[0].items()}, use_cache=False)  # warm up
    run = {"forward": forward, "ours": ours, "reference": reference, "corda": corda, "eva": eva}[contender]
    with _Peak(device) as peak:
        found = run(model, batches, rank)
    return {**found, **size, "seconds": sum(found["parts"].values()), "peak_gib": peak.gib, "about": about}


class _Peak(common.Peak):
    """The most memory in use above what there was before: the accelerator's own count, or the process polled."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> _Peak:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        return super().__enter__()

    def now(self) -> tuple[int]:
        return (torch.cuda.max_memory_allocated() if self.cuda else psutil.Process().memory_info().rss,)

    @property
    def gib(self) -> float:
        return self.above[0] / 2**30


def _world(case: str, options: Any, device: torch.device) -> tuple[nn.Module, list[dict[str, torch.Tensor]], str]:
    settings = CASES[case]
    windows, length = (2, 64) if options.quick else (options.windows or settings["windows"], settings["length"])
    if case in ("smollm2", "packed", "peft"):
        model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        texts = [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()]
        texts *= -(-windows * length // (8 * len(texts)))  # the sample over and over, in other orders, fills them
        cut = CalibrationArgs(windows, length, "packed")
        batches = padded_batches(calibration_windows(texts, AutoTokenizer.from_pretrained(smollm2()), cut), 0)
        name = "SmolLM2-135M, float32"
    else:
        model, name = _llama(case, options)
        ids = torch.randint(0, model.config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
        size = max(1, 4096 // length)
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]
        name = f"{name}, random weights, {str(model.dtype).removeprefix('torch.')}"
    return model.to(device).eval(), batches, name


def _llama(case: str, options: Any) -> tuple[nn.Module, str]:
    """Return a Llama of the 7B shape, or one of its layers scaled; its inputs have a real-looking spectrum."""
    scale = 0.05 if options.quick else options.scale if case == "layer" else 1.0
    width, inner = int(4096 * scale) // 128 * 128 or 128, int(11008 * scale) // 16 * 16
    layers = 1 if case == "layer" else 2 if options.quick else 32
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=max(1, width // 128), num_key_value_heads=max(1, width // 128))  # fmt: skip
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.float32 if case == "layer" else torch.bfloat16)
        scales = torch.arange(1, width + 1).float().pow(-0.8)
        basis, _ = torch.linalg.qr(torch.randn(width, width))
        with torch.no_grad():
            spectrum = (torch.randn(config.vocab_size, width) * scales) @ basis
            model.model.embed_tokens.weight.copy_(spectrum / spectrum.std())
    return model, f"{'a Llama-7B-shaped layer' if case == 'layer' else 'Llama-2-7B shape'}, {width} and {inner} wide"


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _on(batch: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.to(next(model.parameters()).device) for key, value in batch.items()}


@torch.no_grad()
def forward(model: nn.Module, batches: list, rank: int) -> dict[str, Any]:
    """The bare calibration pass: the decoder without its head."""
    seconds, _ = _timed(lambda: [model.model(**_on(batch, model), use_cache=False) and None for batch in batches])
    return {"parts": {"calibrate": seconds}}


def ours(model: nn.Module, batches: list, rank: int) -> dict[str, Any]:
    """`start_adapter`, written to a folder; beside it a walk through the layers that measures no Grams."""
    peft_model = get_peft_model(model, LoraNullConfig(r=rank, variant="v2"))
    with tempfile.TemporaryDirectory() as folder:
        seconds, (report, _) = _timed(
            lambda: start_adapter(peft_model, batches, InitOptions(progress=False, min_tokens=1), folder=Path(folder))
        )
    calibrate, solve = report.seconds["calibrate"], report.seconds["solve"]
    bare, _ = _timed(
        lambda: list(walk_layers(peft_model, adapted_layers(peft_model), batches, gram=False, progress=False))
    )
    parts = {"calibrate": calibrate, "solve": solve, "other": seconds - calibrate - solve}
    return {"parts": parts, "walk_without_grams": bare, "leakage": max(line.leakage for line in report.layers)}


@torch.no_grad()
def reference(model: nn.Module, batches: list, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The paper's algorithm with full SVDs, every linear apart.

    Of the whole model one linear of each shape is solved, after an eighth of the batches, and the rest extrapolated.
    """
    linears = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    covariances = {
        name: torch.zeros(m.in_features, m.in_features, dtype=dtype, device=m.weight.device)
        for name, m in linears.items()
    }

    def add(name: str) -> Any:
        def hook(_: nn.Module, args: tuple) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).to(dtype)
            covariances[name].addmm_(rows.T, rows)

        return hook

    some = len(model.model.layers) > 1 and model.config.hidden_size >= 4096
    few = batches[: -(-len(batches) // SHARE)] if some else batches
    handles = [module.register_forward_pre_hook(add(name)) for name, module in linears.items()]
    calibrate, _ = _timed(lambda: [model.model(**_on(batch, model), use_cache=False) and None for batch in few])
    for handle in handles:
        handle.remove()
    alike: dict[torch.Size, list[str]] = {}
    for name, module in linears.items():
        alike.setdefault(module.weight.shape, []).append(name)
    solve = 0.0
    for shape, names in alike.items():
        for name in names[: 1 if some else None]:
            weight, covariance = linears[name].weight, covariances.pop(name)
            seconds, _ = _timed(lambda: reference_factors(weight, covariance, rank))  # noqa: B023
            common.note(f"{name}, {tuple(shape)}: {seconds:.1f} s")
            solve += seconds * (len(names) if some else 1)
    parts = {"calibrate": calibrate * len(batches) / len(few), "solve": solve}
    return {"parts": parts, "extrapolated_from": len(alike) if some else None}


def reference_factors(weight: torch.Tensor, covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 and B0 from the full SVD of the covariance and the full SVD of W U Uᵀ."""
    U, _, _ = torch.linalg.svd(covariance)
    null = U[:, -rank:]
    P, S, Vh = torch.linalg.svd(weight.to(covariance) @ (null @ null.T))
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], P[:, :rank] * root


def corda(model: nn.Module, batches: list, rank: int) -> dict[str, Any]:
    """PEFT's CorDA in the knowledge-preserved mode; its hook takes one sequence at a time."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )  # fmt: skip
    config.target_modules = sorted(
        {n.rpartition(".")[2] for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    )

    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            for row in _on(batch, model)["input_ids"]:
                model.model(input_ids=row[None], use_cache=False)

    calibrate, _ = _timed(lambda: preprocess_corda(model, config, run_model=run))
    solve, _ = _timed(lambda: get_peft_model(model, config))
    return {"parts": {"calibrate": calibrate, "solve": solve}}


def eva(model: nn.Module, batches: list, rank: int) -> dict[str, Any]:
    """PEFT's EVA at a uniform rank: the *top* directions of the inputs, by incremental SVD."""
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    peft_model = get_peft_model(model, config)
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]
    seconds, _ = _timed(lambda: initialize_lora_eva_weights(peft_model, rows, show_progress_bar=False))
    return {"parts": {"solve": seconds}}


def _draw(results: dict[str, Any], path: Path) -> None:
    cases = results["cases"]
    figure, axes = common.panels(
        1, len(cases), (5 * len(cases), 3), "Initialization: seconds, and as many forward passes"
    )
    for axis, (case, found) in zip(axes[0], cases.items()):
        names = list(found["rows"])[::-1]
        left = [0.0] * len(names)
        for part, color in zip(("calibrate", "solve", "other"), common.COLORS):
            values = [found["rows"][name]["parts"].get(part, 0.0) for name in names]
            axis.barh(names, values, left=left, color=color, label=part)
            left = [a + b for a, b in zip(left, values)]
        for place, name in enumerate(names):
            row = found["rows"][name]
            axis.text(
                left[place], place, f"  {row['seconds']:.1f} s, {row['times_forward'] or math.nan:.1f}x", va="center"
            )
        axis.set_xlim(0, max(left) * 1.35)
        axis.set_title(f"{case}: {found['about']}", fontsize=8)
        axis.set_xlabel("seconds")
    axes[0][0].legend(loc="lower right", frameon=False)
    common.save_picture(figure, path)


if __name__ == "__main__":
    main()
