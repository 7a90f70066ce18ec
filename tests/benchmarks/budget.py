"""What a budget keeps, what the dial shows beside retraining, and what is left of tasks in sequence; on SmolLM2.

    python tests/benchmarks/budget.py budgets --out runs/budgets     # 20 runs with a budget, and the same rates without
    python tests/benchmarks/budget.py dial --out runs/dial           # strengths of one training against lower rates
    python tests/benchmarks/budget.py sequence --out runs/sequence   # math, code, instructions
    python tests/benchmarks/budget.py sketch --out runs/sequence     # what a sketch of an earlier task's Grams loses

Each writes ordinary runs below --out, goes on with them where it was broken off, and prints a table of what they found.
--toy takes few steps, rows and rates, to see that it works; --methods other methods.

budgets: KL 0.01 on NQ-open. "unseen" is the KL on nq_open_tune.jsonl, rows that neither probe nor check ever saw, and "kept"
whether it is within the budget by one standard error. "best fixed" is the learning of the best rate of the same sweep without
a budget whose KL there is within it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from lora_null.earlier import sketch_of
from lora_null.nullspace import bottom_eigenspace
from lora_null.recipes.__main__ import main as recipes
from lora_null.recipes.report.dial_page import read_dial
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


def run(out: Path, words: list[str], recipe: str = "quickstart") -> Results:
    """Run a recipe, or what is left of it; return its results."""
    if not (out / "report.html").is_file():
        resume = ["--resume"] if (out / "recipe.yaml").is_file() else []
        status = recipes([recipe, "--output-dir", str(out), "training.save_strategy=no", *words, *OVER, *resume])
        if status:
            sys.exit(status)
    return load_results(out)


def budgets(out: Path, methods: str, toy: bool) -> None:
    """Print for each method and rate how the budget was kept, and what the best fixed rate would have learned."""
    rates = "1e-3,3e-3" if toy else "3e-4,1e-3,3e-3,1e-2"
    words = ["--method", methods, RETENTION, "--sweep", f"training.learning_rate={rates}", *(TOY if toy else [])]
    held = run(out / "held", [*words, "--max-forgetting", str(AT_MOST)])
    free = run(out / "free", words)
    print(
        f"{'method':14} {'rate':>7} {'strength':>8} {'checked':>16} {'unseen':>17} kept  {LEARNED:>9} {'best fixed':>10} {'free':>7}"
    )
    kept = 0
    for cell in held.grid.cells:
        if cell.budget is None:
            continue
        unseen = cell.metrics[UNSEEN]
        inside = unseen.value <= AT_MOST + (unseen.stderr or 0)
        kept += inside
        others = [other for other in free.grid.cells if other.method == cell.method and not other.diverged]
        fixed = [o.metrics[LEARNED].value for o in others if o.metrics[UNSEEN].value <= AT_MOST]
        same = next((o.metrics[LEARNED].value for o in others if o.point == cell.point), float("nan"))
        print(
            f"{cell.method:14} {cell.point['training.learning_rate']:7.0e} {cell.budget.strength:8.3f} "
            f"{cell.budget.value:.4f} ± {cell.budget.stderr or 0:.4f}  {unseen.value:.4f} ± {unseen.stderr or 0:.4f}  "
            f"{'yes' if inside else 'NO ':4} {cell.metrics[LEARNED].value:9.3f} {min(fixed, default=float('nan')):10.3f} {same:7.3f}"
        )
    print(f"{kept} of {len(held.grid.cells)} within one standard error; base {free.base.metrics[LEARNED].value:.3f}")


def dial(out: Path, methods: str, toy: bool) -> None:
    """Print for each method the frontier of one training by its strength, and that of trainings at lower rates."""
    rates = ["1e-3", "3e-4"] if toy else ["1e-3", "6e-4", "3e-4", "2e-4", "1e-4"]
    words = ["--method", methods, *(TOY if toy else [])]
    strengths = "eval.strengths=[0.2,0.4,0.6,0.8,1,1.25]"
    runs = {
        rate: run(out / rate, [*words, f"training.learning_rate={rate}", *([strengths] if rate == rates[0] else [])])
        for rate in rates
    }
    for method in methods.split(","):
        found = read_dial(out / rates[0] / method)
        print(f"{method}: base {LEARNED} {runs[rates[0]].base.metrics[LEARNED].value:.3f}")
        for point in found.points if found else ():
            print(
                f"  strength {point.strength:<5g} {LEARNED} {point.metrics[LEARNED].value:.3f}  NQ kl {point.metrics['NQ kl'].value:.5f}"
            )
        print(f"  the dial took {found.seconds if found else 0:.0f} s")
        for rate, results in runs.items():
            row = next(row for row in results.rows if row.method == method)
            print(
                f"  rate {rate:9} {LEARNED} {row.metrics[LEARNED].value:.3f}  NQ kl {row.metrics['NQ kl'].value:.5f}  trained in {row.seconds.train:.0f} s"
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
        gram = read_safetensors(path)[0]["gram"].double()
        for width in (None, 512, 256, 128, 64):
            if width is not None and width > len(gram):
                continue
            factor = None if width is None else sketch_of(gram, width)
            known = gram if factor is None else factor @ factor.T
            U = bottom_eigenspace(known, 32).vectors
            size = 4 * (len(gram) ** 2 if factor is None else factor.numel())
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
        "dial": "lora,lora-null-v1,lora-null-v2,nb-lora",
    }
    default["sequence"] = "lora,replay,lora-null-v2,nb-lora"
    methods = arguments.methods or default.get(arguments.study, "")
    {"budgets": budgets, "dial": dial, "sequence": sequence, "sketch": sketch}[arguments.study](
        arguments.out, methods, arguments.toy
    )


if __name__ == "__main__":
    main()
