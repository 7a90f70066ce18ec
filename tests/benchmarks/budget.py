"""What a budget keeps, what the dial shows beside retraining, and what is left of tasks in sequence; on SmolLM2.

    python tests/benchmarks/budget.py budgets --out runs/budgets     # 20 runs with a budget, and a sweep without
    python tests/benchmarks/budget.py dial --out runs/budgets        # strengths of the sweep's highest rates against its lower ones
    python tests/benchmarks/budget.py sequence --out runs/sequence   # math, code, instructions
    python tests/benchmarks/budget.py sketch --out runs/sequence     # what a sketch of an earlier task's Grams loses

Each writes ordinary runs below --out, goes on with them where it was broken off, and prints a table of what they found.
--toy takes few steps, rows and rates, to see that it works; --methods other methods.

budgets: KL 0.01 on NQ-open. "unseen" is the KL on nq_open_tune.jsonl, rows that neither probe nor check ever saw, and "kept"
whether it is within the budget by one standard error. "best fixed" is the learning of the best rate of a sweep without a budget
whose KL there is within it; the sweep takes four methods, each at rates where that is to be expected.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from lora_null.earlier_tasks import from_lower_triangle, sketch_of
from lora_null.nullspace import bottom_eigenspace
from lora_null.recipes.commands import main as commands
from lora_null.recipes.report.dial import read_dial
from lora_null.recipes.results import Results, load_results
from lora_null.utils.files import read_safetensors

AT_MOST = 0.01
FORM = 'prompt: question, response: answer, template: "Q: {prompt}?\\nA:"'
SAMPLES = "recipes/samples"
UNSEEN, LEARNED = "NQ unseen kl", "GSM8K nll"
RETENTION = (
    f"eval.retention=[{{answers: NQ, path: {SAMPLES}/nq_open_test.jsonl, {FORM}}}, "
    f"{{answers: NQ unseen, path: {SAMPLES}/nq_open_tune.jsonl, {FORM}}}]"
)
OVER: list[str] = []  # what the command line lays over every recipe
TOY = ["training.max_steps=8", "eval.limit=24"]
RATES = {  # of the sweep without a budget
    "lora": ["3e-5", "1e-4", "3e-4"],
    "lora-null-v1": ["3e-5", "1e-4", "3e-4"],
    "lora-null-v2": ["1e-3", "3e-3", "1e-2"],
    "nb-lora": ["3e-4", "1e-3", "3e-3"],
}
STRENGTHS = "0.2,0.4,0.6,0.8,1,1.25"


def run(out: Path, words: list[str], recipe: str = "quickstart") -> Results:
    """Run a recipe, or what is left of it; return its results."""
    if not (out / "report.html").is_file():
        resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
        status = commands(
            ["train", recipe, "--output-dir", str(out), "training.save_strategy=no", *words, *OVER, *resume]
        )
        if status:
            sys.exit(status)
    return load_results(out)


def held(out: Path, methods: str, toy: bool) -> Results:
    """Return the grid of runs with a budget."""
    rates = "training.learning_rate=" + ("1e-3,3e-3" if toy else "3e-4,1e-3,3e-3,1e-2")
    words = ["--method", methods, RETENTION, *(TOY if toy else []), "--sweep", rates]
    return run(out / "held", [*words, "--max-forgetting", str(AT_MOST)])


def free(out: Path, toy: bool) -> Results:
    """Return the sweep without a budget, each method at rates of its own."""
    cut = 2 if toy else None
    own = ", ".join(f"{name}: {{training.learning_rate: [{', '.join(rates[:cut])}]}}" for name, rates in RATES.items())
    sweep = ["grid.sweep={training.learning_rate: [3e-4]}", f"grid.per_method={{{own}}}"]  # each own takes its place
    return run(out / "free", ["--method", ",".join(RATES), RETENTION, *(TOY if toy else []), *sweep])


def budgets(out: Path, methods: str, toy: bool) -> None:
    """Print for each method and rate how the budget was kept, and what the best fixed rate would have learned."""
    runs, sweep = held(out, methods, toy), free(out, toy)
    print(
        f"{'method':14} {'rate':>7} {'strength':>8} {'checked':>16} {'unseen':>17} kept  {LEARNED:>9} {'best fixed':>10} {'at rate':>7}"
    )
    kept = 0
    for cell in runs.grid.cells:
        if cell.budget is None:
            continue
        unseen = cell.metrics[UNSEEN]
        inside = unseen.value <= AT_MOST + (unseen.stderr or 0)
        kept += inside
        others = [other for other in sweep.grid.cells if other.method == cell.method and not other.diverged]
        best = min((o for o in others if o.metrics[UNSEEN].value <= AT_MOST), key=learned, default=None)
        fixed = (float("nan"), float("nan")) if best is None else (learned(best), best.point["training.learning_rate"])
        print(
            f"{cell.method:14} {cell.point['training.learning_rate']:7.0e} {cell.budget.strength:8.3f} "
            f"{cell.budget.value:.4f} ± {cell.budget.stderr or 0:.4f}  {unseen.value:.4f} ± {unseen.stderr or 0:.4f}  "
            f"{'yes' if inside else 'NO ':4} {cell.metrics[LEARNED].value:9.3f} {fixed[0]:10.3f} {fixed[1]:7.0e}"
        )
    print(f"{kept} of {len(runs.grid.cells)} within one standard error; base {sweep.base.metrics[LEARNED].value:.3f}")


def learned(run: Any) -> float:
    """Return the loss on the task, of a run of a grid or of a point of a dial."""
    return run.metrics[LEARNED].value


def dial(out: Path, methods: str, toy: bool) -> None:
    """Print for each method the frontier of its highest rate by strength, and that of the trainings at its lower rates."""
    sweep = free(out, toy)
    for method in methods.split(","):
        cells = [cell for cell in sweep.grid.cells if cell.method == method and not cell.diverged]
        *lower, highest = sorted(cells, key=lambda cell: cell.point["training.learning_rate"])
        folder = out / "free" / highest.folder / method
        if read_dial(folder) is None and commands(
            ["dial", str(folder), "--strengths", STRENGTHS[: 7 if toy else None]]
        ):
            sys.exit(1)
        found = read_dial(folder)
        print(f"{method}: base {LEARNED} {learned(sweep.base):.3f}")
        for point in found.points:
            print(
                f"  strength {point.strength:<9g} {learned(point):.3f}  NQ unseen kl {point.metrics[UNSEEN].value:.5f}"
            )
        print(f"  the dial took {found.seconds:.0f} s")
        for cell in (*lower, highest):
            seconds = cell.seconds.init + cell.seconds.train + cell.seconds.eval
            print(
                f"  rate {cell.point['training.learning_rate']:<13g} {learned(cell):.3f}  NQ unseen kl "
                f"{cell.metrics[UNSEEN].value:.5f}  in {seconds:.0f} s"
            )


def sequence(out: Path, methods: str, toy: bool) -> None:
    """Print the matrix of each method: every task after every task, and the knowledge."""
    found = run(
        out,
        ["--method", methods, f"training.max_steps={6 if toy else 100}", *(["eval.limit=24"] if toy else [])],
        "sequence",
    ).sequence
    for t in found.transfers:
        print(f"{t.method}: after {', '.join(found.tasks)}")
        for j, (name, row) in enumerate(zip(found.metrics, t.matrix)):
            lost = f"  lost {t.lost[j].value:+.3f} ± {t.lost[j].stderr or 0:.3f}" if j < len(t.lost) else ""
            print(f"  {name:18} base {found.base[name].value:.3f}  {'  '.join(f'{m.value:.3f}' for m in row)}{lost}")
        for name, values in found.knowledge[t.method].items():
            print(f"  {name:18}            {'  '.join(f'{m.value:.5f}' for m in values if m)}")
        print(
            f"  backward transfer {t.backward.value:+.3f} ± {t.backward.stderr or 0:.3f}, forward {t.forward.value:+.3f} ± {t.forward.stderr or 0:.3f}"
        )


def sketch(out: Path, methods: str, toy: bool) -> None:
    """Print how much of a task's inputs a start catches that knows the task by a sketch: energy beside the Gram's own."""
    folder = next(iter(sorted(out.glob("tasks/1-*/*/grams"))), None)
    if folder is None:
        sys.exit(f"{out}: holds no Grams; run `sequence` with a method that keeps them first")
    files = sorted(folder.glob("*.safetensors"))[: 4 if toy else None]
    print(
        f"{folder.parent.name}, rank 32: energy of the inputs inside the start, as a share of all; mean and largest of {len(files)} inputs"
    )
    shares: dict[str, list[float]] = {}
    for path in files:
        gram = from_lower_triangle(read_safetensors(path)[0]["lower"], torch.device("cpu"))
        for width in (None, 512, 256, 128, 64):
            if width is not None and width > len(gram):
                continue
            factor = None if width is None else sketch_of(gram, width)
            known = gram if factor is None else factor @ factor.T
            U = bottom_eigenspace(known, 32).vectors
            size = 4 * (len(gram) * (len(gram) + 1) if factor is None else factor.numel())
            key = "Gram" if width is None else f"{width} columns"
            shares.setdefault(key, []).append(float((U.T @ gram @ U).trace() / gram.trace()))
            shares.setdefault(f"{key} bytes", []).append(size)
    for key in [key for key in shares if not key.endswith("bytes")]:
        values = torch.tensor(shares[key])
        print(f"  {key:12} {values.mean():.2e} {values.max():.2e}  {sum(shares[f'{key} bytes']) / 1e6:.0f} MB")


def main() -> None:
    """Run one of the studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("budgets", "dial", "sequence", "sketch"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument(
        "words", nargs="*", metavar="key.subkey=value", help="laid over the recipe, such as another model"
    )
    arguments = parser.parse_intermixed_args()
    OVER.extend(arguments.words)
    default = {
        "budgets": "lora,lora-fa,pissa,lora-null-v1,lora-null-v2",
        "dial": "lora,lora-null-v1,lora-null-v2",
    }
    default["sequence"] = "lora,replay,lora-null-v2,nb-lora"
    methods = arguments.methods or default.get(arguments.study, "")
    {"budgets": budgets, "dial": dial, "sequence": sequence, "sketch": sketch}[arguments.study](
        arguments.out, methods, arguments.toy
    )


if __name__ == "__main__":
    main()
