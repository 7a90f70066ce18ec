"""Which calibration keeps what: SmolLM2 learns GSM8K, once for each text to calibrate on, and forgets more or less of six sets.

    python tests/benchmarks/calibration.py                                  # all rows; about five minutes each on one core
    python tests/benchmarks/calibration.py --rows "general mix,self: bos"   # some of them; finished ones are not run again
    python tests/benchmarks/calibration.py --methods lora-null-v2,nb-lora --steps 60 --seeds 0,1

KL is the mean over the answers' tokens from the base model's predictions, in nats. Methods that learn less forget less, so
every row is compared with what LoRA forgets where it has learned as much: LoRA runs at three learning rates under the same
data, seeds, steps and evaluation, and log KL is interpolated between these over the NLL of the held-out GSM8K answers. A
ratio of 0.1 is a tenth of LoRA's forgetting at equal learning; "–" where no LoRA run learned that much or that little.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, headline, machine, note, print_table, write_json

from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.environment import prepare_cpu
from lora_null.recipes.output import is_finished
from lora_null.recipes.results import load_results
from lora_null.recipes.run import run
from lora_null.trainer.methods import METHODS

QUESTIONS = {"path": "samples/nq_open_calibration.jsonl"}
ANSWERED = QUESTIONS | {"template": "Q: {question}?\nA: {answer}"}
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "bare questions": QUESTIONS | {"field": "question", "mode": "packed"},  # the paper's
    "questions with answers": ANSWERED,
    "chat": QUESTIONS,  # the same as conversations, through the chat template
    "general mix": {"source": "general"},
    "self: prompts": {"self": "prompts"},
    "self: data": {"self": "data"},
    "self: bos": {"self": "bos"},
    "mix of three": {"sources": [ANSWERED, {"source": "general", "weight": 2}, {"self": "prompts"}]},
}
FORMS = {"NQ": "Q: {prompt}?\nA:", "NQ other form": "Tell me, {prompt}? It is"}
MEASURED = [
    *({"answers": name, "path": "samples/nq_open_test.jsonl", "template": form} for name, form in FORMS.items()),
    {"answers": "WebQS", "path": "samples/webquestions_test.jsonl", "template": FORMS["NQ other form"]},
    {"answers": "WikiText", "path": "samples/wikitext_test.jsonl", "prompt": "prompt", "response": "response", "template": "plain"},
    {"answers": "code", "path": "samples/code_test.jsonl", "prompt": "prompt", "response": "response", "template": "chat"},
    {"answers": "instructions", "path": "samples/instructions_test.jsonl", "prompt": "prompt", "response": "response", "template": "chat"},
]  # fmt: skip
NAMES = [entry["answers"] for entry in MEASURED]
LEARNED = "GSM8K nll"
LORA_RATES, RATE = (1e-4, 3e-4, 1e-3), 6e-4


def one_run(
    options: Any, name: str, method: str, rate: float, seed: int, calibration: dict[str, Any]
) -> dict[str, float]:
    """Train and measure once, unless it is done already; return the metrics."""
    folder = options.out / "calibration" / f"{name}-{method}-{rate:g}-{seed}".replace(" ", "_").replace(":", "")
    recipe = load_recipe("quickstart", output_dir=str(folder), methods=method)
    cut = {"samples": options.samples, "max_length": 256, "mode": "separate"}
    steps = {"max_steps": options.steps, "learning_rate": rate}
    raw = recipe.model_dump(mode="json") | {"calibration": cut | calibration, "seed": seed}
    raw["training"] |= steps
    raw["eval"] |= {"retention": MEASURED, "limit": options.limit}
    path = Path(f"{folder}.yaml")  # a rate has a point too
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, raw)  # JSON is YAML
    if not is_finished(folder):
        note(f"{name}: {method} at {rate:g}, seed {seed}")
        run(load_recipe(str(path), output_dir=str(folder)), resume=(folder / "recipe.yaml").is_file())
    row = load_results(folder).rows[-1]
    return {key: metric.value for key, metric in row.metrics.items()}


def equal_learning(points: list[dict[str, float]], nll: float, measure: str) -> float | None:
    """Return LoRA's KL where it has learned as much: log KL linear in the NLL between two of its runs."""
    known = sorted((point[LEARNED], math.log(max(point[measure], 1e-12))) for point in points)
    if not known[0][0] <= nll <= known[-1][0]:
        return None
    return math.exp(float(np.interp(nll, *map(list, zip(*known)))))


def mean(values: list[float | None]) -> float | None:
    return None if None in values or not values else float(np.mean([value for value in values if value is not None]))


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rows", default=",".join(CALIBRATIONS), help="calibrations, separated by commas")
    parser.add_argument("--methods", default=",".join(m for m in ("lora-null-v2", "nb-lora") if m in METHODS))
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of 4 rows")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--limit", type=int, default=48, help="rows of each set that is measured")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples, options.limit = 2, 32, 4
    unknown = [row for row in options.rows.split(",") if row not in CALIBRATIONS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}, only {', '.join(CALIBRATIONS)}")
    prepare_cpu()
    seeds, rows = [int(seed) for seed in options.seeds.split(",")], []
    lora = {s: [one_run(options, "LoRA", "lora", rate, s, ANSWERED) for rate in LORA_RATES] for s in seeds}
    for name in options.rows.split(","):
        for method in options.methods.split(","):
            found = {s: one_run(options, name, method, RATE, s, CALIBRATIONS[name]) for s in seeds}
            row: dict[str, Any] = {"calibration": name, "method": method}
            row[LEARNED] = mean([point[LEARNED] for point in found.values()])
            for measure in (f"{name} kl" for name in NAMES):
                against = mean([equal_learning(lora[s], point[LEARNED], measure) for s, point in found.items()])
                kl = mean([point[measure] for point in found.values()])
                row[measure] = {"kl": kl, "ratio": kl / against if kl is not None and against else None}
            rows.append(row)
            report(rows, lora, options)


def report(rows: list[dict[str, Any]], lora: dict[int, list[dict[str, float]]], options: Any) -> None:
    """Print what is known so far, and write it."""
    facts = machine(torch.device("cpu"))
    cell = lambda value, form: "–" if value is None else form.format(value)  # noqa: E731
    for key, title, form in (("kl", "KL", "{:.2g}"), ("ratio", "KL / LoRA's at equal learning", "{:.3f}")):
        lines = [
            [f"{row['calibration']}, {row['method']}", cell(row[LEARNED], "{:.3f}")]
            + [cell(row[f"{name} kl"][key], form) for name in NAMES]
            for row in rows
        ]
        if key == "kl":
            for i, rate in enumerate(LORA_RATES):
                points = [runs[i] for runs in lora.values()]
                measured = [mean([point[f"{name} kl"] for point in points]) for name in NAMES]
                learned = cell(mean([point[LEARNED] for point in points]), "{:.3f}")
                lines.append([f"LoRA at {rate:g}", learned, *(cell(kl, form) for kl in measured)])
        print_table(title, ["calibrated on", LEARNED, *NAMES], lines)
    note(headline(facts))
    write_json(
        options.out / "calibration.json",
        {"machine": facts, "options": vars(options) | {"out": str(options.out)}, "rows": rows, "lora": lora},
    )


if __name__ == "__main__":
    main()
