"""The least time that an initialization and a training step can take: operations and bytes over what a machine can do.

    python tests/benchmarks/roofline.py                      # a 7B and a 70B model on an H100, from its data sheet
    python tests/benchmarks/roofline.py --measured DIR/init.json     # this CPU, beside what `init.py` measured on it

Every part is counted for this package's algorithm as if it alone were running, at the peak: parts that could overlap
are added up, and nothing is allowed for launching and waiting. A time below its floor shows that this count is wrong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import common
import torch

from lora_null.calibration import SKETCH_COLUMNS
from lora_null.gram import CHUNK_TOKENS, CHUNKS_TOGETHER, EXACT_BELOW
from lora_null.nullspace import ACCELERATOR, CPU, FIRST_TEST, KRYLOV_MAX_RANK_SHARE, Crossover


@dataclass(frozen=True)
class Machine:
    """What a machine can do: FLOP/s of products in the model's dtype, in float32 and in float64; bytes/s."""

    model: float
    float32: float
    float64: float
    memory: float
    disk: float = 5e9  # assumed
    element: int = 2  # bytes of a number in the model's dtype
    crossover: Crossover = ACCELERATOR


@dataclass(frozen=True)
class Shape:
    """A Llama: `layers` of `width` and `inner`, keys and values `kv` wide."""

    layers: int
    width: int
    inner: int
    kv: int
    vocabulary: int = 32000

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(d_out, d_in) of a layer's linears."""
        d, i, k = self.width, self.inner, self.kv
        return [(d, d), (k, d), (k, d), (d, d), (i, d), (i, d), (d, i)]

    @property
    def weights(self) -> int:
        """Weights of a layer."""
        return sum(out * inside for out, inside in self.linears)

    @property
    def inputs(self) -> list[int]:
        """Widths of a layer's distinct inputs: of q, k, v; o; gate and up; down."""
        return [self.width, self.width, self.width, self.inner]


H100 = Machine(model=989e12, float32=67e12, float64=67e12, memory=3.35e12)
CALIBRATION = (256 * 1024, 1024, 128)  # tokens, length of a window, rank: the paper's
SHAPES = {"7B": Shape(32, 4096, 11008, 4096), "70B": Shape(80, 8192, 28672, 1024)}


def initialization(shape: Shape, machine: Machine, tokens: int, length: int, rank: int) -> dict[str, float]:
    """Return the seconds of each part, at least."""
    layer = {
        "forward": _forward(shape, tokens, length) / machine.model,
        "Grams": sum(_gram(w, machine, tokens) for w in shape.inputs),
        "float64 sums": sum(_sums(w, machine, tokens) for w in shape.inputs),
        "sketches": sum(2 * tokens * w * SKETCH_COLUMNS for w in shape.inputs) / machine.float32,
        "norms": tokens * sum(out for out, _ in shape.linears) * machine.element / machine.memory,
        "solve": sum(_solve(w, rank, machine.crossover) for w in shape.inputs) / machine.float64,
        "factors": sum(2 * out * w * rank + 4 * out * rank**2 for out, w in shape.linears) / machine.float64,
        "write": 4 * rank * sum(map(sum, shape.linears)) / machine.disk,
    }
    model = shape.layers * shape.weights + shape.vocabulary * shape.width
    return {"read": model * machine.element / machine.disk, **{part: shape.layers * t for part, t in layer.items()}}


def _forward(shape: Shape, tokens: int, length: int) -> float:
    """FLOPs of a layer: each weight once per token, and causal attention over `length` tokens."""
    return tokens * (2 * shape.weights + 2 * length * shape.width)


def _exact(w: int, tokens: int) -> int:
    """Return the tokens whose products are float64, if the first question finds that float32 will do."""
    return min(tokens, -(-EXACT_BELOW * w // CHUNK_TOKENS) * CHUNK_TOKENS)


def _gram(w: int, machine: Machine, tokens: int) -> float:
    """Seconds for one triangle of X Xᵀ: w² FLOPs per token."""
    exact = _exact(w, tokens)
    return w**2 * (exact / machine.float64 + (tokens - exact) / machine.model)


def _sums(w: int, machine: Machine, tokens: int) -> float:
    """Seconds to read and write the float64 triangle at each product; where no kernel adds to it, the float32 one before."""
    on_cpu = machine.crossover is CPU
    moved = 4 + 4 + 8 + 8 if on_cpu else (8 + 8) / CHUNKS_TOGETHER
    return tokens / CHUNK_TOKENS * w**2 / 2 * moved / machine.memory


def _solve(w: int, rank: int, crossover: Crossover) -> float:
    """FLOPs of one eigenspace: Cholesky, the block Lanczos up to its first test, and the test of its answer; or `eigh`."""
    if w < crossover.krylov_width or rank * KRYLOV_MAX_RANK_SHARE > w:
        return 9 * w**3  # Golub and Van Loan, symmetric QR with vectors
    columns = FIRST_TEST * rank
    return 2 * w**3 / 3 + 2 * w**2 * (columns + rank) + 4 * w * columns**2


def step(shape: Shape, machine: Machine, length: int, rank: int) -> dict[str, float]:
    """Return tokens per second, at most: a weight costs 2 FLOPs forward, 2 for the input's gradient, 2 for its own."""
    base = shape.layers * shape.weights + shape.vocabulary * shape.width  # the head's too
    A, B = (shape.layers * rank * sum(sizes) for sizes in zip(*((w, out) for out, w in shape.linears)))
    attention = 3 * shape.layers * 2 * length * shape.width
    flops = {"full": 6 * base, "LoRA, v1": 4 * base + 6 * (A + B), "v2": 4 * base + 4 * A + 6 * B}
    flops |= {f"{name}, checkpointed": f + 2 * base + attention / 3 for name, f in flops.items()}
    return {name: machine.model / (f + attention) for name, f in flops.items()}


def this_cpu() -> Machine:
    """Measure the best of several products and copies on this CPU."""

    def best(call, work: float, times: int = 5) -> float:
        call()
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return work / min(seconds)

    n, rates = 2048, {}
    for dtype in (torch.float32, torch.float64):
        a, out = torch.randn(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)
        rates[dtype] = best(lambda a=a, out=out: torch.mm(a, a, out=out), 2 * n**3)
    source, target = torch.ones(2**26), torch.empty(2**26)
    memory = best(lambda: target.copy_(source), 2 * source.nbytes)
    return Machine(rates[torch.float32], rates[torch.float32], rates[torch.float64], memory, element=4, crossover=CPU)


def beside(found: Mapping[str, float], row: Mapping[str, float], forward: float) -> dict[str, tuple[float, float]]:
    """Return (floor, measured) seconds of the parts that `init.py` tells apart."""
    calibrate = sum(found[part] for part in ("forward", "Grams", "float64 sums", "sketches", "norms"))
    parts = row["parts"]
    return {
        "forward": (found["forward"], forward),
        "Grams": (found["Grams"] + found["float64 sums"], parts["calibrate"] - row["walk_without_grams"]),
        "calibrate": (calibrate, parts["calibrate"]),
        "solve": (found["solve"] + found["factors"], parts["solve"]),
    }


def main() -> None:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, metavar="FILE", help="init.json of this machine")
    options = parser.parse_args()
    if options.measured:
        _print_measured(json.loads(options.measured.read_text()))
        return
    tokens, length, rank = CALIBRATION
    floors = {name: initialization(shape, H100, tokens, length, rank) for name, shape in SHAPES.items()}
    rows = [[part, *(f"{found[part]:.2f}" for found in floors.values())] for part in next(iter(floors.values()))]
    rows.append(["all", *(f"{sum(found.values()):.1f}" for found in floors.values())])
    common.print_table(f"H100: seconds for {tokens:,} tokens at r {rank}, at least", ["", *SHAPES], rows)
    steps = {name: step(shape, H100, length, rank) for name, shape in SHAPES.items()}
    rows = [[name, *(f"{found[name]:,.0f}" for found in steps.values())] for name in steps["7B"]]
    common.print_table(f"H100: tokens per second in a training step, {length} long, at most", ["", *SHAPES], rows)


def _print_measured(results: dict) -> None:
    if results["machine"]["measured_on"] != "cpu":
        raise SystemExit(f"--measured: is of {results['machine']['device']}, not of this CPU")
    machine = this_cpu()
    print(f"{common.headline(common.machine(torch.device('cpu')))}: {machine.float32 / 1e9:.0f} GFLOP/s in float32, "
          f"{machine.float64 / 1e9:.0f} in float64, {machine.memory / 1e9:.0f} GB/s")  # fmt: skip
    for case in results["cases"].values():
        ours, forward = case["rows"]["ours"], case["rows"]["forward"]["seconds"]
        found = initialization(Shape(*ours["shape"]), machine, ours["tokens"], ours["length"], ours["rank"])
        pairs = beside(found, ours, forward)
        table = [[part, f"{floor:.1f}", f"{time:.1f}", f"{floor / time:.0%}"] for part, (floor, time) in pairs.items()]
        common.print_table(case["about"], ["", "floor s", "measured s", "of the peak"], table)


if __name__ == "__main__":
    main()
