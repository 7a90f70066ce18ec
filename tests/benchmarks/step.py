"""What a training step costs: full fine-tuning, LoRA, LoRA-FA, LoRA-Null v1, v2 and nb, side by side.

    python tests/benchmarks/step.py                                     # SmolLM2-135M, 4 × 224 tokens
    python tests/benchmarks/step.py --cases float32:5 --contenders lora,v1,v2
    python tests/benchmarks/step.py --device cuda --model llama-7b --rank 128 --batch 8 --length 512

A case is a precision, with `+ckpt` under gradient checkpointing, and its number of rounds after the colon:

    float32     float32 weights
    autocast    float32 weights under bfloat16 autocast
    bf16        a bfloat16 base with float32 adapters, under bfloat16 autocast

The contenders take turns, one step each a round, the first of them another one every round; what is reported is the
median over rounds of the ratio to plain PEFT LoRA's step of the same round, with quartiles. `lora-again` among the
contenders shows how far two equal ones differ. Adapters have alpha = r and random factors: a step costs the same
wherever they start. v1 runs on its residual base, nb keeps A in a random basis of 4 r directions, as in training. Memory is
measured apart, each contender alone (on a CPU in a process of its own): the peak of a step above the loaded weights, so
gradients, optimizer state, what autograd keeps, and temporaries. Saved bytes are what autograd keeps between forward and
backward pass, each storage once, parameters not counted, copies of weights in another dtype apart.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from common import (
    COLORS,
    arguments,
    headline,
    load,
    machine,
    note,
    panels,
    print_table,
    save_picture,
    spread,
    write_json,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lora_null import LoraNullConfig, keep_in_null_basis
from lora_null.calibration import measure_inputs
from lora_null.config import MULTIPLE
from lora_null.drift import DriftMeter
from lora_null.initialize import finish_initialization
from lora_null.layer import NullBasis, adapted_layers
from lora_null.recipes.environment import keep_freed_memory, peak_memory_bytes, reset_peak_memory
from lora_null.recipes.models.smollm2 import smollm2

SHAPES = {
    "llama-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    "tiny": dict(vocab_size=101, hidden_size=64, intermediate_size=176, num_attention_heads=4),
}
CONTENDERS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "lora-fa": "LoRA-FA",
    "v1": "LoRA-Null v1",
    "v2": "LoRA-Null v2",
    "v2-matched": "v2, matched parameters",
    "nb": "nb-lora",
    "lora-again": "LoRA again (noise)",
}
DEFAULT_CONTENDERS = "full,lora,lora-fa,v1,v2,v2-matched,nb"
DEFAULT_CASES = "float32:5,autocast:5,autocast+ckpt:3"
QUICK = dict(model="tiny", rank=4, batch=2, length=16, cases="float32:2,autocast:2,autocast+ckpt:2")
PRECISIONS = ("float32", "autocast", "bf16")
PHASES = ("forward", "backward", "optimizer")
LEARNING_RATE = 1e-5
WARM_UP_TOKENS = 8
DRIFT_SECONDS = 1.0
# glibc gives every freed block of this size back at once, so that resident memory is what is really in use.
TIGHT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One condition to train under."""

    precision: str
    checkpointing: bool
    rounds: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read `precision[+ckpt][:rounds]`."""
        name, _, rounds = text.partition(":")
        precision, _, extra = name.partition("+")
        if precision not in PRECISIONS or extra not in ("", "ckpt") or not (rounds or "5").isdigit():
            raise SystemExit(f"--cases: {text!r} is not one of {', '.join(PRECISIONS)}, then +ckpt, then :ROUNDS")
        return cls(precision, bool(extra), int(rounds or 5))

    def __str__(self) -> str:
        return self.precision + "+ckpt" * self.checkpointing

    @property
    def base_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision != "float32")


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    model: str
    layers: int
    rank: int
    batch: int
    length: int
    device: torch.device
    quantization: str | None = None
    attention: str = "sdpa"
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def base_model(setting: Setting, dtype: torch.dtype) -> nn.Module:
    """Return the model without adapter: SmolLM2, a random one of a known shape, or any checkpoint."""
    if setting.model in SHAPES:
        config = llama_config(setting)
        torch.manual_seed(0)
        with setting.device:
            model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=setting.attention)
    else:
        folder = smollm2() if setting.model == "smollm2" else setting.model
        options = {"dtype": dtype, "attn_implementation": setting.attention}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).to(setting.device)
    if setting.quantization:
        store_in_4_bit(model, setting.device)
    model.config.use_cache = False
    return model.train()


def llama_config(setting: Setting) -> LlamaConfig:
    return LlamaConfig(**SHAPES[setting.model], num_hidden_layers=setting.layers)


def base_parameters(setting: Setting) -> int | None:
    """Return how many parameters a random model has without its embeddings, which multiply nothing; None for others."""
    if setting.model not in SHAPES:
        return None
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(setting))
    return model.num_parameters() - model.get_input_embeddings().weight.numel()


def store_in_4_bit(model: nn.Module, device: torch.device) -> None:
    """Store the linears of the decoder as nf4, as `model.quantization: nf4` loads them from files."""
    from bitsandbytes import nn as bnb

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            how = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "device": "meta"}
            stored = bnb.Linear4bit(module.in_features, module.out_features, **how)
            weight = bnb.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            stored.weight = weight.to(device)  # here it is quantized
            model.model.set_submodule(name, stored)
    model.is_loaded_in_4bit, model.is_quantized = True, True


def build(contender: str, setting: Setting, dtype: torch.dtype) -> nn.Module:
    """Return the contender's model, ready to train."""
    model = base_model(setting, dtype)
    if contender == "full":
        return model
    torch.manual_seed(1)
    common = dict(r=setting.rank, lora_alpha=setting.rank, target_modules="all-linear")
    if contender.startswith("lora"):
        model = get_peft_model(model, LoraConfig(**common))
        for layer in adapted_layers(model).values():
            layer.lora_A["default"].weight.requires_grad_(contender != "lora-fa")
        return model
    if contender == "v2-matched":
        common |= dict.fromkeys(("r", "lora_alpha"), matched_rank(model, setting.rank))
    model = get_peft_model(model, LoraNullConfig(variant=contender[:2], **common))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
    if contender == "nb":
        confine(model)
    finish_initialization(model, "default")  # v1: the base becomes W0 − s·BA
    return model


def confine(model: nn.Module) -> None:
    """Give every input of the layers a random basis, one for q, k, v and one for gate, up."""
    basis = None
    for name, layer in adapted_layers(model).items():
        A = layer.lora_A["default"].weight
        if basis is None or name.rpartition(".")[2] not in ("k_proj", "v_proj", "up_proj"):
            drawn = torch.randn(layer.in_features, MULTIPLE * len(A), dtype=torch.float64, device=A.device)
            basis = NullBasis.for_factor(torch.linalg.qr(drawn)[0], A)
        layer.set_basis("default", basis)
        layer.project_A("default")


def matched_rank(model: nn.Module, rank: int) -> int:
    """Return the largest rank at which v2 trains no more parameters than LoRA does at `rank`."""
    head = model.get_output_embeddings()
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return rank * sum(d_out + d_in for d_out, d_in in shapes) // sum(d_out for d_out, _ in shapes)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def random_tokens(setting: Setting, model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(setting.device)
    return {"input_ids": ids, "labels": ids}


class Watch:
    """Times the parts of one step, on the accelerator's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between the marks."""
        pairs = list(zip(self.marks, self.marks[1:]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


class Trainee:
    """A contender's model with its optimizer."""

    def __init__(self, contender: str, setting: Setting, dtype: torch.dtype) -> None:
        self.setting = setting
        self.model = build(contender, setting, dtype)
        if setting.compiled:
            self.model.compile(dynamic=False)
        self.rank = setting.rank
        if contender != "full":
            self.rank = next(iter(adapted_layers(self.model).values())).r["default"]
        self.batch = random_tokens(setting, self.model, setting.batch, setting.length)
        self.fresh_optimizer()

    def fresh_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def prepare(self, case: Case) -> None:
        """Switch checkpointing, and let a small step create the optimizer's state."""
        if case.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.step(case, random_tokens(self.setting, self.model, 1, WARM_UP_TOKENS))

    def forward(self, case: Case, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with case.autocast(self.setting.device):
            return self.model(**batch).loss

    def step(self, case: Case, batch: dict[str, torch.Tensor] | None = None) -> list[float]:
        """Train one step; return the seconds of its forward pass, its backward pass and its optimizer step."""
        watch = Watch(self.setting.device)
        loss = self.forward(case, batch or self.batch)
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimizer.step()
        keep_in_null_basis(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        return watch.seconds()


def time_case(trainees: dict[str, Trainee], case: Case) -> dict[str, list[dict[str, float]]]:
    """Return, per contender, the phases of one step a round; the contenders take turns."""
    names = list(trainees)
    for trainee in trainees.values():
        trainee.prepare(case)
        trainee.step(case)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(case.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(dict(zip(PHASES, trainees[name].step(case))))
        note(f"{case}: round {turn + 1} of {case.rounds}")
    return times


def time_drift(model: nn.Module, setting: Setting) -> list[float]:
    """Return the seconds of one `DriftMeter.summary()`, several times.

    For v2 the r × r matrix is random here: the cost depends on its size alone.
    """
    layers = adapted_layers(model)
    ids = random_tokens(setting, model, 1, max(WARM_UP_TOKENS, setting.length))["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calibration = measure_inputs(model, layers, [batch], gram=False, progress=False)
    for name, layer in layers.items():
        A = layer.lora_A["default"].weight
        if not A.requires_grad:
            calibration.projected[name] = torch.randn(len(A), len(A), dtype=torch.float64, device=A.device)
    meter = DriftMeter(model, calibration)
    timer = Timer("meter.summary()", globals={"meter": meter}, num_threads=torch.get_num_threads())
    measured = timer.blocked_autorange(min_run_time=DRIFT_SECONDS)
    return list(measured.times)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class WeightCopies(TorchDispatchMode):
    """Holds every copy that is made of a parameter in another dtype, by storage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {storage_of(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self.copies: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self.own:
            self.copies[storage_of(out)] = out
        return out


def saved_bytes(trainee: Trainee, case: Case) -> dict[str, int]:
    """Return the bytes that one forward pass leaves to its backward pass: activations, and copies of weights."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # itself, it could hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), WeightCopies(trainee.model) as weights:
        loss = trainee.forward(case, trainee.batch)
    del loss
    activations = sum(size for place, size in saved.items() if place not in weights.own | weights.copies.keys())
    return {
        "saved_activations": activations,
        "saved_weight_copies": sum(size for place, size in saved.items() if place in weights.copies),
    }


def memory_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def measure_memory(contender: str, setting: Setting, cases: list[Case]) -> dict[str, dict[str, int]]:
    """Return per case the memory of one step, in bytes; on a CPU to be run in a process of its own."""
    logging.disable_progress_bar()
    found = {}
    for dtype in {case.base_dtype: None for case in cases}:
        trainee = Trainee(contender, setting, dtype)
        with torch.no_grad():  # weights that were mapped from a file become resident
            trainee.model(**random_tokens(setting, trainee.model, 1, WARM_UP_TOKENS))
        for case in cases:
            if case.base_dtype == dtype:
                found[str(case)] = _step_memory(trainee, case)
        del trainee
        gc.collect()
    return found


def _step_memory(trainee: Trainee, case: Case) -> dict[str, int]:
    device = trainee.setting.device
    trainee.fresh_optimizer()
    gc.collect()
    loaded = memory_now(device)
    trainee.prepare(case)
    state = sum(t.nbytes for values in trainee.optimizer.state.values() for t in values.values())
    gradients = sum(parameter.nbytes for parameter in trainee.optimizer.param_groups[0]["params"])
    reset_peak_memory()
    trainee.step(case)
    peak = peak_memory_bytes()
    sizes = {"loaded": loaded, "peak": peak, "step": peak - loaded, "optimizer_state": state, "gradients": gradients}
    return sizes | saved_bytes(trainee, case)


@contextlib.contextmanager
def environment_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def memory_apart(contender: str, setting: Setting, cases: list[Case]) -> dict[str, dict[str, int]]:
    """Return `measure_memory`, on a CPU from a fresh process: an accelerator counts its memory itself."""
    note(f"memory: {CONTENDERS[contender]}")
    if setting.device.type == "cuda":
        found = measure_memory(contender, setting, cases)
        torch.cuda.empty_cache()
        return found
    spawn = multiprocessing.get_context("spawn")
    with (
        environment_variables(TIGHT_ALLOCATOR | {"CUDA_VISIBLE_DEVICES": ""}),
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        return pool.submit(measure_memory, contender, setting, cases).result()


def time_all(contenders: list[str], setting: Setting, cases: list[Case]) -> dict[str, Any]:
    """Return raw times per case, of the drift per contender, and the parameter counts."""
    result: dict[str, Any] = {"times": {}, "drift_seconds": {}, "trainable": {}, "ranks": {}}
    for dtype in {case.base_dtype: None for case in cases}:
        trainees = {name: Trainee(name, setting, dtype) for name in contenders}
        for case in cases:
            if case.base_dtype == dtype:
                result["times"][str(case)] = time_case(trainees, case)
        for name, trainee in trainees.items():
            result["trainable"][name] = sum(parameter.numel() for parameter in trainable(trainee.model))
            if name != "full":
                result["ranks"][name] = trainee.rank
                result["drift_seconds"].setdefault(name, time_drift(trainee.model, setting))
        del trainees, trainee
        gc.collect()
    return result


def summarize(raw: dict[str, Any], memory: dict[str, dict[str, dict[str, int]]], tokens: int) -> dict[str, Any]:
    """Return case → contender → figures."""
    cases: dict[str, Any] = {}
    for case, times in raw["times"].items():
        totals = {name: [sum(step.values()) for step in steps] for name, steps in times.items()}
        lora = totals["lora"]
        cases[case] = {
            name: {
                "step_seconds": spread(seconds),
                "tokens_per_second": tokens / spread(seconds)["median"],
                "ratio_to_lora": spread([mine / theirs for mine, theirs in zip(seconds, lora)]),
                **{f"{phase}_seconds": spread([step[phase] for step in times[name]]) for phase in PHASES},
                **_drift_share(raw, name, seconds),
                "memory_bytes": memory.get(name, {}).get(case),
            }
            for name, seconds in totals.items()
        }
    return cases


def _drift_share(raw: dict[str, Any], name: str, seconds: list[float]) -> dict[str, float]:
    if name not in raw["drift_seconds"]:
        return {}
    return {"drift_percent_of_step": 100 * spread(raw["drift_seconds"][name])["median"] / spread(seconds)["median"]}


def show(summary: dict[str, Any], raw: dict[str, Any]) -> None:
    """Print one table per case."""
    head = ("", "rank", "trainable", "step s", "× LoRA", "quartiles", "tokens/s", "step GB", "saved GB", "drift %")
    for case, lines in summary.items():
        print_table(case, head, [_row(name, line, raw) for name, line in lines.items()])
    print("\nstep GB: peak above the loaded weights; saved GB: activations kept for the backward pass;")
    print("drift %: one DriftMeter.summary() in percent of a step")


def _row(name: str, line: dict[str, Any], raw: dict[str, Any]) -> list[str]:
    ratio, memory = line["ratio_to_lora"], line["memory_bytes"]
    return [
        CONTENDERS[name],
        str(raw["ranks"].get(name, "–")),
        f"{raw['trainable'][name] / 1e6:.2f}M",
        f"{line['step_seconds']['median']:.3f}",
        f"{ratio['median']:.3f}",
        f"{ratio['q1']:.3f}–{ratio['q3']:.3f}",
        f"{line['tokens_per_second']:.0f}",
        f"{memory['step'] / 1e9:.3f}" if memory else "–",
        f"{memory['saved_activations'] / 1e9:.3f}" if memory else "–",
        f"{line['drift_percent_of_step']:.2f}" if "drift_percent_of_step" in line else "–",
    ]


def draw(summary: dict[str, Any], title: str, path: Any) -> None:
    """Draw the ratios of time, the peak memory and the saved activations, a row for each contender."""
    names = list(next(iter(summary.values())))
    height = 1.6 + len(names) * (0.25 + 0.2 * len(summary))
    figure, axes = panels(1, 3, (10, height), title, sharey=True, width_ratios=(1.25, 1, 1))
    time_axis, memory_axis, saved_axis = axes[0]
    width = 0.8 / len(summary)
    for i, (case, lines) in enumerate(summary.items()):
        places = [place + (i - (len(summary) - 1) / 2) * width for place in range(len(names))]
        ratios = [lines[name]["ratio_to_lora"] for name in names]
        _draw_ratios(time_axis, places, ratios, COLORS[i], case)
        _draw_bars(memory_axis, places, [_gigabytes(lines[n], "step") for n in names], width, COLORS[i])
        _draw_bars(saved_axis, places, [_gigabytes(lines[n], "saved_activations") for n in names], width, COLORS[i])
    time_axis.axvline(1, color="#555555", linewidth=1)
    time_axis.set(xlabel="step time ÷ LoRA's (median, quartiles)", title="Time of a step")
    time_axis.set_yticks(range(len(names)), [CONTENDERS[name] for name in names])
    time_axis.invert_yaxis()
    memory_axis.set(xlabel="GB above the loaded weights", title="Peak memory of a step")
    saved_axis.set(xlabel="GB kept for the backward pass", title="Saved activations")
    for axis in axes[0]:
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
    figure.legend(*time_axis.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save_picture(figure, path)


def _draw_ratios(axis: Any, places: list[float], ratios: list[dict[str, float]], color: str, label: str) -> None:
    middle = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["q1"] for ratio in ratios]
    above = [ratio["q3"] - ratio["median"] for ratio in ratios]
    axis.errorbar(middle, places, xerr=(below, above), fmt="o", markersize=5, capsize=3, color=color, label=label)
    for value, place, reach in zip(middle, places, above):
        axis.annotate(f"{value:.2f}", (value + reach, place), (5, 0), textcoords="offset points", va="center", size=7)
    axis.margins(x=0.12)


def _draw_bars(axis: Any, places: list[float], values: list[float], width: float, color: str) -> None:
    bars = axis.barh(places, values, height=0.9 * width, color=color)
    axis.bar_label(bars, fmt="%.2g" if max(values) < 1 else "%.2f", padding=2, size=7)
    axis.margins(x=0.12)


def _gigabytes(line: dict[str, Any], key: str) -> float:
    return line["memory_bytes"][key] / 1e9 if line["memory_bytes"] else 0.0


def read_arguments() -> Any:
    parser = arguments("Time and memory of a training step, LoRA-Null beside LoRA, LoRA-FA and full fine-tuning.")
    parser.add_argument("--model", default="smollm2", help=f"smollm2, {', '.join(SHAPES)}, or a checkpoint")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of llama-7b and tiny")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=224, help="tokens per sequence")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--cases", default=DEFAULT_CASES, help="precision[+ckpt][:rounds], by commas; see above")
    parser.add_argument("--contenders", default=DEFAULT_CONTENDERS, help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--quantization", choices=["nf4"], help="store the base so (with the precision bf16)")
    parser.add_argument("--attention", default="sdpa", help="sdpa, flash_attention_2, eager")
    parser.add_argument("--compile", action="store_true", help="torch.compile each contender's model")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurements out")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    unknown = set(options.contenders.split(",")) - set(CONTENDERS)
    if unknown:
        parser.error(f"--contenders: {', '.join(sorted(unknown))} not among {', '.join(CONTENDERS)}")
    if "lora" not in options.contenders.split(","):
        parser.error("--contenders: lora has to be among them, everything is compared with it")
    return options


def in_clock(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what the action returns, and its seconds."""
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def main() -> None:
    options = read_arguments()
    logging.disable_progress_bar()
    setting = Setting(
        options.model,
        options.layers,
        options.rank,
        options.batch,
        options.length,
        torch.device(options.device),
        options.quantization,
        options.attention,
        options.compile,
    )
    cases = [Case.parse(text) for text in options.cases.split(",")]
    contenders = options.contenders.split(",")
    facts = machine(setting.device)
    memory, memory_seconds = {}, 0.0
    if not options.no_memory:
        memory, memory_seconds = in_clock(lambda: {n: memory_apart(n, setting, cases) for n in contenders})
    keep_freed_memory()  # as the recipes do before they train
    raw, time_seconds = in_clock(lambda: time_all(contenders, setting, cases))
    summary = summarize(raw, memory, setting.tokens)
    payload = {
        "machine": {**facts, "load_average_after": load()},
        "setting": {key: str(value) if key == "device" else value for key, value in vars(setting).items()},
        "base_parameters": base_parameters(setting),
        "took_seconds": {"memory": memory_seconds, "times": time_seconds},
        "summary": summary,
        "raw": raw,
    }
    write_json(options.out / "step.json", payload)
    title = (
        f"{setting.model}, {setting.batch} × {setting.length} tokens per step, rank {setting.rank}\n{headline(facts)}"
    )
    draw(summary, title, options.out / "step.png")
    print(title)
    show(summary, raw)


if __name__ == "__main__":
    main()
