"""Peak memory of an initialization that leaves the weights in their files: one layer's worth, however many there are.

    python tests/benchmarks/memory.py                   # random Llamas of 2, 12 and 24 layers of 50 MB
    python tests/benchmarks/memory.py --shape 70b --device cuda      # of 1 and 3 layers of Llama-70B, read to a GPU

Each is measured in three processes, the one with the median peak is reported. What stays of every layer is
counted apart, from the tensors themselves: its factors (twice, in the model and to be written), sketches and the small
matrices of the drift. Memory is what the process holds by itself (anonymous pages) and what it maps of files, both
polled; mapped pages are the kernel's to take back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch
from peft import get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lora_null import LoraNullConfig
from lora_null.checkpoint_reader import adapters_in_memory
from lora_null.initialize import InitOptions, start_adapter
from lora_null.layer import adapted_layers
from lora_null.recipes.config.schema import ModelSection
from lora_null.recipes.environment import reset_peak_memory
from lora_null.recipes.models.bases import Base, open_base

TURNS = 3  # the peak varies by a layer's worth from process to process
SHAPES = {  # layers, width, inner, heads, of them for keys and values, rank, windows, their length, dtype
    "small": ((2, 12, 24), 1024, 2816, 16, 16, 16, 8, 256, "float32"),
    "70b": ((1, 3), 8192, 28672, 64, 8, 128, 256, 1024, "bfloat16"),
    "quick": ((2, 4), 64, 128, 1, 1, 16, 8, 256, "float32"),
}


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["small", "70b"], default="small")
    parser.add_argument("--device", default="cpu", help="where layers are read to and solved")
    parser.add_argument("--worker", type=Path, help="internal: initialize the model in this folder and print JSON")
    options = parser.parse_args()
    shape = "quick" if options.quick else options.shape
    if options.worker:
        print(json.dumps(_work(options.worker, shape, torch.device(options.device))))
        return
    facts = common.machine(torch.device(options.device))
    print(common.headline(facts))
    turns = TURNS if options.device == "cpu" and not options.quick else 1
    runs = {n: _median([_run(n, options, shape) for _ in range(turns)]) for n in SHAPES[shape][0]}
    _print(runs)
    common.write_json(options.out / "memory.json", {"machine": facts, "runs": runs})
    _draw(runs, options.out / "memory.png")


def _median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return sorted(turns, key=lambda turn: turn["anonymous"])[len(turns) // 2]


def _run(count: int, options: Any, shape: str) -> dict[str, Any]:
    _, width, inner, heads, own, *_, dtype = SHAPES[shape]
    config = LlamaConfig(vocab_size=256, hidden_size=width, intermediate_size=inner, num_hidden_layers=count,
                         num_attention_heads=heads, num_key_value_heads=own)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with torch.device(options.device):  # where random numbers are drawn fastest
            model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
        model.cpu().save_pretrained(folder)
        del model
        if options.quick:  # measures nothing, so it needs no process of its own
            return _work(Path(folder), shape, torch.device(options.device))
        command = [sys.executable, __file__, "--worker", folder, "--shape", options.shape, "--device", options.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class RssPeak(common.Peak):
    """The most anonymous and file-backed memory of this process above what there was before."""

    def now(self) -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))


def _work(folder: Path, shape: str, device: torch.device) -> dict[str, Any]:
    *_, rank, windows, length, dtype = SHAPES[shape]
    config = AutoConfig.from_pretrained(folder)
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    base, weights = open_base(Base(section))
    with adapters_in_memory():
        peft_model = get_peft_model(base, LoraNullConfig(r=rank, variant="v2"))
    ids = torch.randint(0, config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
    batches = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in ids.split(max(1, 4096 // length) if device.type != "cpu" else 1)
    ]
    layer = peft_model.get_base_model().model.layers[0]
    layer_bytes = sum(
        getattr(torch, dtype).itemsize * p.numel() for name, p in layer.named_parameters() if "lora_" not in name
    )
    with tempfile.TemporaryDirectory() as out, RssPeak() as peak:
        options = InitOptions(
            weights=weights, progress=False, min_tokens=1, device=None if device.type == "cpu" else device
        )
        reset_peak_memory()
        began = time.perf_counter()
        report, calibration = start_adapter(peft_model, batches, options, folder=Path(out))
    factors = [layer.lora_A["default"].weight for layer in adapted_layers(peft_model).values()]
    factors += [layer.lora_B["default"].weight for layer in adapted_layers(peft_model).values()]
    kept = 2 * sum(factor.nbytes for factor in factors) + sum(L.nbytes for L in calibration.projected.values())
    kept += sum(stats.sketch.nbytes for stats in calibration.inputs)
    gram_bytes = 8 * (3 * config.hidden_size**2 + config.intermediate_size**2)
    anonymous, mapped = peak.above
    seconds = {"seconds": time.perf_counter() - began, "parts": report.seconds}
    if device.type == "cuda":
        seconds["accelerator_peak"] = torch.cuda.max_memory_allocated()
    return seconds | {
        "layer": layer_bytes,
        "grams": gram_bytes,
        "kept": kept,
        "anonymous": anonymous,
        "mapped": mapped,
    }


def _print(runs: dict[int, dict[str, Any]]) -> None:
    head = ("layers", "weights MB", "peak, own MB", "of it kept MB", "peak, mapped MB", "one layer's Grams MB")
    rows = []
    for count, run in runs.items():
        numbers = (count * run["layer"], run["anonymous"], run["kept"], run["mapped"], run["grams"])
        rows.append([count, *(f"{number / 1e6:.0f}" for number in numbers)])
    common.print_table("initialization with the weights in their files", head, rows)
    first, *_, last = runs.values()
    growth = last["anonymous"] - first["anonymous"] - (last["kept"] - first["kept"])
    print(
        f"  beyond what is kept the peak grows by {growth / last['layer']:+.2f} layers' weights from the first to the last"
    )


def _draw(runs: dict[int, dict[str, Any]], path: Path) -> None:
    figure, axes = common.panels(1, 1, (6, 3.2), "Peak memory of an initialization, weights in their files")
    axis, names = axes[0][0], [f"{count} layers" for count in runs]
    weights = [count * run["layer"] / 1e6 for count, run in runs.items()]
    kept = [run["kept"] / 1e6 for run in runs.values()]
    rest = [(run["anonymous"] - run["kept"]) / 1e6 for run in runs.values()]
    axis.plot(names, weights, "o--", color=common.COLORS[5], label="the model's weights")
    axis.bar(names, rest, color=common.COLORS[0], width=0.5, label="one layer, its Grams, activations")
    axis.bar(names, kept, bottom=rest, color=common.COLORS[1], width=0.5, label="kept of every layer")
    axis.set_ylabel("MB")
    axis.legend(frameon=False)
    common.save_picture(figure, path)


if __name__ == "__main__":
    main()
