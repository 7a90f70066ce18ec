"""How initialization grows: measured exponents beside the expected ones, and where the Krylov solver overtakes `eigh`.

    python tests/benchmarks/scaling.py
    python tests/benchmarks/scaling.py --parts crossover --out runs/crossover

Gram matrices are made up after those of real layers: eigenvalues λ_i ∝ i^−1.1 that bend down toward the end, a few
massive directions on top, in a random orthogonal basis. The parts:

    gram        X Xᵀ against d_in (expected 2) and against tokens (1)
    width       the solve against d_in: Cholesky (3), the rest of the Krylov solver (2), a full eigh (3)
    rank        the rest of the Krylov solver, and the factors of a weight, against r (1 each while r ≪ d_in)
    layers      a whole initialization of a small random model against its decoder layers (1)
    crossover   eigh's time over the Krylov solver's, by width and rank share, and the leakage of its answer over
                eigh's; what CPU.krylov_width and KRYLOV_MAX_RANK_SHARE in lora_null/nullspace.py rest on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import (
    COLORS,
    arguments,
    exponent,
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
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, LogLocator
from peft import get_peft_model
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from lora_null import LoraNullConfig, initialize_lora_null_weights
from lora_null.factors import null_factors
from lora_null.gram import Gram
from lora_null.nullspace import CPU, KRYLOV_MAX_RANK_SHARE, bottom_eigenspace
from lora_null.recipes.environment import keep_freed_memory

DECAY, BEND, BEND_POWER = 1.1, 0.85, 0.8  # fitted by eye to Grams of SmolLM2's 11th and 21st decoder layers
MASSIVE = (12.0, 3.0, 1.5)
MIN_SECONDS = 0.5  # of measuring, for each point
SIZES: dict[str, Any] = {
    "gram_widths": [512, 768, 1024, 1536, 2048],
    "gram_tokens": [2048, 4096, 8192, 16384],
    "gram_width": 1024,  # while the tokens vary
    "gram_count": 4096,  # while the width varies
    "widths": [512, 1024, 2048, 4096],
    "width_rank": 32,
    "ranks": [16, 32, 64, 128, 256],
    "rank_width": 2048,
    "layers": [2, 4, 8, 16],
    "layer_shape": dict(hidden_size=256, intermediate_size=688, num_attention_heads=4, vocab_size=101),
    "layer_tokens": (4, 512),
    "layer_rank": 16,
    "rounds": 3,
    "cross_widths": [192, 256, 384, 512, 768, 1024, 1536, 2048],
    "cross_shares": [48, 24, 16, 12, 8, 6, 4],  # d / r
}
QUICK: dict[str, Any] = {
    "gram_widths": [64, 128],
    "gram_tokens": [256, 512],
    "gram_width": 64,
    "gram_count": 256,
    "widths": [64, 128],
    "width_rank": 4,
    "ranks": [4, 8],
    "rank_width": 128,
    "layers": [1, 2],
    "layer_shape": dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=101),
    "layer_tokens": (4, 64),
    "layer_rank": 4,
    "rounds": 2,
    "cross_widths": [64, 96, 128],
    "cross_shares": [16, 8, 4],
}


def realistic_gram(d: int, seed: int = 0) -> torch.Tensor:
    """Return a (d, d) float64 Gram matrix with a spectrum like that of a real layer's inputs."""
    index = torch.arange(1, d + 1, dtype=torch.float64)
    values = index**-DECAY * (1 - BEND * index / d) ** BEND_POWER
    values[: len(MASSIVE)] *= torch.tensor(MASSIVE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    gram = (basis * values) @ basis.T
    return (gram + gram.T) / 2


def timed(action: Callable[[], Any], seconds: float) -> list[float]:
    """Return the seconds of one call, several times, with all threads."""
    timer = Timer("action()", globals={"action": action}, num_threads=torch.get_num_threads())
    return list(timer.blocked_autorange(min_run_time=seconds).times)


@contextmanager
def cholesky_clocked() -> Iterator[list[float]]:
    """Collect the seconds that `torch.linalg.cholesky_ex` takes meanwhile."""
    spent: list[float] = []
    original = torch.linalg.cholesky_ex

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spent.append(time.perf_counter() - start)
        return result

    with mock.patch.object(torch.linalg, "cholesky_ex", clocked):
        yield spent


def krylov_parts(gram: torch.Tensor, r: int) -> tuple[float, float]:
    """Return the seconds of one Krylov solve: of the factorization, and of everything else."""
    with cholesky_clocked() as spent:
        start = time.perf_counter()
        space = bottom_eigenspace(gram, r, solver="krylov")
        whole = time.perf_counter() - start
    if space.solver != "krylov":
        raise RuntimeError(f"the Krylov solver fell back to eigh at d = {len(gram)}, r = {r}")
    return sum(spent), whole - sum(spent)


def curve(sizes: Sequence[int], times: list[list[float]], expected: float) -> dict[str, Any]:
    """Return a line of the picture: medians, quartiles, raw times, the measured exponent beside the expected one."""
    medians = [spread(values)["median"] for values in times]
    return {
        "sizes": list(sizes),
        "seconds": [spread(values) for values in times],
        "exponent": exponent(sizes, medians),
        "expected": expected,
        "raw_seconds": times,
    }


def gram_part(sizes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time adding rows to a Gram matrix, in the float32 form (at least two tokens per dimension)."""

    def measure(d: int, tokens: int) -> list[float]:
        rows = torch.randn(tokens, d, generator=torch.Generator().manual_seed(0))
        gram = Gram(d, rows.device, tokens)
        gram.add(rows)
        return timed(lambda: gram.add(rows), seconds)

    by_width = [measure(d, sizes["gram_count"]) for d in sizes["gram_widths"]]
    by_tokens = [measure(sizes["gram_width"], tokens) for tokens in sizes["gram_tokens"]]
    return {
        "gram_width": {f"Gram, {sizes['gram_count']:,} tokens": curve(sizes["gram_widths"], by_width, 2)},
        "gram_tokens": {f"Gram, d = {sizes['gram_width']:,}": curve(sizes["gram_tokens"], by_tokens, 1)},
    }


def width_part(sizes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time the solvers against the width, taking turns."""
    r = sizes["width_rank"]
    cholesky, rest, full = [], [], []
    for d in sizes["widths"]:
        gram = realistic_gram(d)
        krylov_parts(gram, r)
        pairs, whole = [], []
        for _ in range(sizes["rounds"]):
            pairs.append(krylov_parts(gram, r))
            whole.append(_seconds(lambda gram=gram: bottom_eigenspace(gram, r, solver="eigh")))
        cholesky.append([pair[0] for pair in pairs])
        rest.append([pair[1] for pair in pairs])
        full.append(whole)
    widths = sizes["widths"]
    lines = {
        "full eigh": curve(widths, full, 3),
        "Cholesky": curve(widths, cholesky, 3),
        f"Krylov, rest, r = {r}": curve(widths, rest, 2),
    }
    return {"width": lines}


def rank_part(sizes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time the Krylov solver without its factorization, and the factors, against the rank."""
    d = sizes["rank_width"]
    gram = realistic_gram(d)
    weight = torch.randn(d, d, generator=torch.Generator().manual_seed(1)) / d**0.5
    rest, factors = [], []
    for r in sizes["ranks"]:
        krylov_parts(gram, r)
        rest.append([krylov_parts(gram, r)[1] for _ in range(sizes["rounds"])])
        space = bottom_eigenspace(gram, r, solver="krylov").vectors
        factors.append(timed(lambda space=space: null_factors(weight, space, 1.0), seconds))
    lines = {
        "Krylov without Cholesky": curve(sizes["ranks"], rest, 1),
        "factors of one weight": curve(sizes["ranks"], factors, 1),
    }
    return {"rank": lines}


def layers_part(sizes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time whole initializations against the number of decoder layers; the models take turns."""
    batch, length = sizes["layer_tokens"]
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    times: list[list[float]] = [[] for _ in sizes["layers"]]
    for turn in range(sizes["rounds"] + 1):
        for place, layers in enumerate(sizes["layers"]):
            torch.manual_seed(0)
            base = LlamaForCausalLM(LlamaConfig(**sizes["layer_shape"], num_hidden_layers=layers))
            model = get_peft_model(base, LoraNullConfig(r=sizes["layer_rank"]))
            took = _seconds(
                lambda model=model: initialize_lora_null_weights(model, batches, min_tokens=1, progress=False)
            )
            if turn:  # the first turn warms up
                times[place].append(took)
    label = f"whole initialization, d = {sizes['layer_shape']['hidden_size']}, {batch * length:,} tokens"
    return {"layers": {label: curve(sizes["layers"], times, 1)}}


def crossover_part(sizes: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time `eigh` and the Krylov solver, one after the other in every round, by width and rank share."""
    cells = []
    for d in sizes["cross_widths"]:
        gram = realistic_gram(d, seed=d)
        bottom_eigenspace(gram, 1, solver="eigh")
        for share in sizes["cross_shares"]:
            cells.append(_cell(gram, share, sizes["rounds"]))
        note(f"crossover: width {d}")
    return {"crossover": {"cells": cells, **_recommended(cells)}}


def _cell(gram: torch.Tensor, share: int, rounds: int) -> dict[str, Any]:
    r = max(1, len(gram) // share)
    pairs = []
    for turn in range(rounds + 1):
        spaces, took = {}, {}
        for solver in ("eigh", "krylov"):
            start = time.perf_counter()
            spaces[solver] = bottom_eigenspace(gram, r, solver=solver)
            took[solver] = time.perf_counter() - start
        if turn:
            pairs.append(took)
    energy = {name: torch.trace(space.vectors.T @ gram @ space.vectors) for name, space in spaces.items()}
    return {
        "d": len(gram),
        "share": share,
        "r": r,
        "fell_back": spaces["krylov"].solver == "eigh",
        "speedup": spread([pair["eigh"] / pair["krylov"] for pair in pairs]),
        "leakage_ratio": (energy["krylov"] / energy["eigh"]).sqrt().item(),
        "raw_seconds": pairs,
    }


def _recommended(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that the measurements ask for, beside those in force.

    The share: the largest rank share at which the Krylov solver wins at every one of the upper half of the widths. The
    width: the smallest from which on it wins at every smaller share as well.
    """
    widths = sorted({cell["d"] for cell in cells})
    shares = sorted({cell["share"] for cell in cells}, reverse=True)
    wins = {(cell["d"], cell["share"]): cell["speedup"]["median"] > 1 and not cell["fell_back"] for cell in cells}
    upper = widths[len(widths) // 2 :]
    good = [share for share in shares if all(wins[d, share] for d in upper)]
    share = good[-1] if good else None
    winning = [d for d in widths if all(wins[w, s] for w in widths if w >= d for s in shares if s >= (share or 0))]
    return {
        "measured": {"min_width": winning[0] if winning and share else None, "max_rank_share": share},
        "in_force": {"min_width": CPU.krylov_width, "max_rank_share": KRYLOV_MAX_RANK_SHARE},
    }


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[dict[str, Any], float], dict[str, Any]]] = {
    "gram": gram_part,
    "width": width_part,
    "rank": rank_part,
    "layers": layers_part,
    "crossover": crossover_part,
}
CURVES = {  # key → title, label of the x axis
    "gram_width": ("Gram against width", "d_in"),
    "gram_tokens": ("Gram against tokens", "tokens"),
    "width": ("Solve against width", "d_in"),
    "rank": ("Solve against rank", "rank r"),
    "layers": ("Initialization against layers", "decoder layers"),
}


def show(found: dict[str, Any]) -> None:
    """Print the exponents, and the crossover as a grid."""
    rows = []
    for key in CURVES:
        for label, line in found.get(key, {}).items():
            first, last = line["sizes"][0], line["sizes"][-1]
            ends = (f"{line['seconds'][0]['median']:.4f}", f"{line['seconds'][-1]['median']:.4f}")
            rows.append((label, CURVES[key][1], f"{first}–{last}", *ends, f"{line['exponent']:.2f}", line["expected"]))
    if rows:
        print_table("Exponents", ("", "against", "from–to", "s at first", "s at last", "measured", "expected"), rows)
    if "crossover" in found:
        _show_crossover(found["crossover"])


def _show_crossover(crossover: dict[str, Any]) -> None:
    cells = crossover["cells"]
    shares = list(dict.fromkeys(cell["share"] for cell in cells))
    rows = []
    for d in dict.fromkeys(cell["d"] for cell in cells):
        line = [cell for cell in cells if cell["d"] == d]
        leaks = max(cell["leakage_ratio"] for cell in line)
        rows.append((str(d), *(_words(cell) for cell in line), f"{leaks:.5f}"))
    head = ("d", *(f"r=d/{share}" for share in shares), "leakage")
    print_table("eigh's time ÷ Krylov's (* fell back to eigh); largest leakage ÷ eigh's", head, rows)
    for words, values in (("measured", crossover["measured"]), ("in force", crossover["in_force"])):
        print(f"  {words}: min width {values['min_width']}, max rank d / {values['max_rank_share']}")


def _words(cell: dict[str, Any]) -> str:
    return f"{cell['speedup']['median']:.2f}" + "*" * cell["fell_back"]


def draw(found: dict[str, Any], title: str, path: Any) -> None:
    """Draw every curve in log-log, and the crossover as a map."""
    keys = [key for key in (*CURVES, "crossover") if key in found]
    rows = (len(keys) + 1) // 2
    figure, axes = panels(rows, 2, (10, 0.6 + 3.5 * rows), title)
    for key, axis in zip(keys, axes.flat):
        if key == "crossover":
            _draw_crossover(figure, axis, found[key]["cells"])
        else:
            _draw_curves(axis, found[key], *CURVES[key])
    for axis in list(axes.flat)[len(keys) :]:
        axis.set_visible(False)
    save_picture(figure, path)


def _draw_curves(axis: Any, lines: dict[str, Any], title: str, label: str) -> None:
    for color, (name, line) in zip(COLORS, lines.items()):
        sizes = np.array(line["sizes"], dtype=float)
        middle = np.array([value["median"] for value in line["seconds"]])
        below = [value["median"] - value["q1"] for value in line["seconds"]]
        above = [value["q3"] - value["median"] for value in line["seconds"]]
        text = f"{name}: {line['exponent']:.2f} (expected {line['expected']:g})"
        axis.errorbar(sizes, middle, yerr=(below, above), fmt="o-", markersize=4, capsize=2, color=color, label=text)
        guide = np.exp(np.log(middle).mean()) * (sizes / np.exp(np.log(sizes).mean())) ** line["expected"]
        axis.plot(sizes, guide, "--", color=color, linewidth=1, alpha=0.6)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds", title=title)
    axis.set_xticks(line["sizes"], [f"{size:,}" for size in line["sizes"]])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** (0.13 * len(lines)))  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_crossover(figure: Any, axis: Any, cells: list[dict[str, Any]]) -> None:
    widths = list(dict.fromkeys(cell["d"] for cell in cells))
    shares = list(dict.fromkeys(cell["share"] for cell in cells))
    grid = np.log2([[c["speedup"]["median"] for c in cells if c["d"] == d] for d in widths])
    reach = max(1.0, float(np.abs(grid).max()))
    picture = axis.imshow(grid, cmap="PuOr", norm=TwoSlopeNorm(0, -reach, reach), aspect="auto", origin="lower")
    for cell in cells:
        place = (shares.index(cell["share"]), widths.index(cell["d"]))
        dark = abs(np.log2(cell["speedup"]["median"])) > 0.6 * reach
        color = "white" if dark else "black"
        axis.annotate(_words(cell), place, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(shares)), [f"d/{share}" for share in shares])
    axis.set_yticks(range(len(widths)), [f"{d:,}" for d in widths])
    axis.set(xlabel="rank r (* fell back to eigh)", ylabel="d_in", title="eigh's time ÷ Krylov's: above 1 Krylov wins")
    axis.grid(False)
    bar = figure.colorbar(picture, ax=axis, shrink=0.9)
    ticks = [tick for tick in (-4, -3, -2, -1, 0, 1, 2, 3, 4) if abs(tick) <= reach]
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}×" for tick in ticks])


def read_arguments() -> Any:
    parser = arguments("Cost of initialization against width, rank, tokens and layers; crossover of the solvers.")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure, by commas; see above")
    options = parser.parse_args()
    unknown = set(options.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))} not among {', '.join(PARTS)}")
    return options


def main() -> None:
    options = read_arguments()
    sizes = QUICK if options.quick else SIZES
    facts = machine(torch.device("cpu"))
    keep_freed_memory()  # as the recipes do
    found: dict[str, Any] = {}
    took = {}
    for part in options.parts.split(","):
        note(f"measuring: {part}")
        start = time.perf_counter()
        found |= PARTS[part](sizes, 0.02 if options.quick else MIN_SECONDS)
        took[part] = time.perf_counter() - start
    spectrum = {"decay": DECAY, "bend": BEND, "bend_power": BEND_POWER, "massive": MASSIVE}
    payload = {
        "machine": {**facts, "load_average_after": load()},
        "setting": {**sizes, "spectrum": spectrum},
        "took_seconds": took,
        **found,
    }
    write_json(options.out / "scaling.json", payload)
    title = f"Cost of initialization\n{headline(facts)}"
    draw(found, title, options.out / "scaling.png")
    print(title)
    show(found)


if __name__ == "__main__":
    main()
