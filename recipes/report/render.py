"""Writes the report of a run: `report.md`, `report.html` (one file, no network), `forgetting.png` and `card.png`."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_null.recipes.comparisons import Evaluations, compare, noise_of, read_evaluations
from lora_null.recipes.config.run_folder import RECIPE_FILE
from lora_null.recipes.report.after_table import after_table, probe_curves
from lora_null.recipes.report.drawing import default_look, palette, variable
from lora_null.recipes.report.figures import (
    card_png,
    curves_picture,
    distances,
    forgetting_picture,
    forgetting_png,
    plane_alt,
    row_colors,
)
from lora_null.recipes.report.grid_figures import frontier_picture, frontier_png, magnitude_picture, magnitude_png
from lora_null.recipes.report.grid_page import diverged_rows, grid_content, grid_headline
from lora_null.recipes.report.headline import against_reference, headline, verdicts
from lora_null.recipes.report.paper import paper_table
from lora_null.recipes.report.table import (
    Column,
    Table,
    build_table,
    escape_markdown,
    metric_title,
    reference_row,
    scale_of,
)
from lora_null.recipes.results import DISPLAY, LOG_FILE, Results, display_name, load_log, load_results
from lora_null.utils.files import replacing

STYLES = {"best": "bold", "second": "underline", None: ""}
# What only the report of a run has, or only that of a grid.
EMPTY = {"verdicts": [], "grid": None, "curves": [], "without_log": [], "unreadable": [], "snippet": None}
EMPTY |= {"adapter_folders": []}
CURVES = (("loss", "Training loss"), ("drift_mean", "Drift of the layers' outputs"))
CURVES += (("reward_margin", "Reward margin"), ("reward_accuracy", "Reward accuracy"))  # DPO


@default_look
def write_report(output_dir: str | Path, results: Results | None = None, name: str = "report") -> None:
    """Write the files of the report (for a grid also `magnitude.png`) from what lies in `output_dir`; equal inputs give equal bytes.

    `report.html` is written last: it stands for a finished run.

    Args:
        output_dir: of a run.
        results: instead of its `results.json`.
        name: of the pages; the report of a run that goes on must not be called "report".

    Raises:
        UserError: when `results.json` is missing or malformed.
    """
    output_dir = Path(output_dir)
    results = results or load_results(output_dir)
    drawn = "forgetting.png" if name == "report" else f"{name}.png"
    evaluations = read_evaluations(output_dir, results)
    if results.paired is None:  # written by a version that did not compare
        results.paired, results.noise = compare(results, evaluations), noise_of(evaluations)
    content = _content(results, evaluations, output_dir) | {"picture_file": drawn}
    pages = {f"{name}.md": "report.md.j2", f"{name}.html": "page.html.j2"}  # the page last: it marks a finished run
    for page, file in pages.items():
        templates = templates_in(Path(__file__).parent, escape=page.endswith(".html"))
        pages[page] = templates.get_template(file).render(content).encode()
    sizes = magnitude_png(results) if results.grid else None
    pictures = {
        drawn: frontier_png(results) if results.grid else forgetting_png(results),
        "card.png": card_png(results, content["headline"]),
        **({"magnitude.png": sizes} if sizes else {}),
    }
    for file, data in (pictures | pages).items():
        with replacing(output_dir / file) as temporary:
            temporary.write_bytes(data)


@functools.cache
def templates_in(*folders: Path, escape: bool = False) -> jinja2.Environment:
    """Return the environment of the templates in the folders; `md` is the filter for literal Markdown.

    `escape` is for HTML, of what a page includes too.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape_markdown}
    return environment


def print_table(results: Results, console: Console | None = None, *, evaluations: Evaluations | None = None) -> None:
    """Print the headline and the table."""
    console = console or Console()
    console.print(Text(_headline(results, evaluations or {}), style="bold"))
    print_columns(build_table(results), "Method", console)


def print_columns(table: Table, head: str, console: Console) -> None:
    """Print a table under `head`, of its labels; columns that do not fit the terminal go into further tables below."""
    width = table.label_width(head)
    for columns in _fitting(table, console.width - width):
        drawn = RichTable(show_edge=False, pad_edge=False, header_style="")
        drawn.add_column(head, overflow="fold", min_width=width, max_width=width)
        for column in columns:
            drawn.add_column(Text(column.heading), justify="right", overflow="fold")
        for i, label in enumerate(table.labels):
            cells = [Text(str(c.cells[i]), STYLES[c.cells[i].mark]) for c in columns]
            drawn.add_row(Text(label), *cells, style="dim" if i == 0 else "", end_section=i == 0)
        console.print(drawn)


def _headline(results: Results, evaluations: Evaluations) -> str:
    grid = results.grid
    unfinished = grid and not grid.is_finished and f"{len(grid.cells)} of {grid.planned} runs are done."
    if _one_setting(results):
        found = [headline(results)]
    else:
        found = [grid_headline(results, evaluations), diverged_rows(results)]
    return " ".join(filter(None, [unfinished, *found]))


def _one_setting(results: Results) -> bool:
    """Return whether methods are compared as they are: in a run, and in a grid of one setting; else at equal learning."""
    return not results.grid or len({row.variant for row in results.rows[1:]}) == 1


def _fitting(table: Table, room: int) -> list[list[Column]]:
    """The columns, split into as few runs as fit the room beside the labels."""
    runs: list[list[Column]] = [[]]
    left = room
    for column in table.columns:
        needs = 3 + max(max(len(str(cell)) for cell in column.cells), max(map(len, column.heading.split())))
        if needs > left and runs[-1]:
            runs.append([])
            left = room
        runs[-1].append(column)
        left -= needs
    return runs


def _content(results: Results, evaluations: Evaluations, output_dir: Path) -> dict[str, Any]:
    """Everything the two templates show, as text and numbers ready to print."""
    shared = _shared(results, evaluations, output_dir)
    if results.grid:  # its runs have reports of their own, with their curves
        return shared | {
            "after_table": after_table(results, output_dir, []),
            "picture": frontier_picture(results),
            "grid": grid_content(results, evaluations),
            "sizes": magnitude_picture(results),
        }
    labels, folders = results.labels(), [row.method for row in results.rows]
    linked = output_dir / "logs"  # of a comparison, whose rows come from several runs
    places = [linked / str(i) if linked.is_dir() else output_dir / folder for i, folder in enumerate(folders)]
    logs = [load_log(place / LOG_FILE) for place in places]
    curves = [curves_picture(results, logs, key, title) for key, title in (*CURVES, *probe_curves(logs))]
    claims = verdicts(results)
    adapters = [i for i, row in enumerate(results.rows) if row.adapter_params and not results.of_several_runs]
    best = next((i for verdict in claims for i in verdict.winners if i in adapters), next(iter(adapters), None))
    return shared | {
        "after_table": after_table(results, output_dir, logs),
        "picture": forgetting_picture(results),
        "verdicts": claims,
        "curves": [curve for curve in curves if curve],
        "without_log": [labels[i] for i in range(1, len(labels)) if not logs[i].entries],
        "unreadable": [f"{folders[i]} ({log.unreadable})" for i, log in enumerate(logs) if log.unreadable],
        "snippet": None if best is None else peft_snippet(results, f"{folders[best]}/adapter"),
        "adapter_folders": list(dict.fromkeys(f"{folders[i]}/adapter" for i in adapters if i != best)),
    }


def _references(results: Results, labels: Sequence[str]) -> str:
    """Return the methods that others are compared with: of an unfinished grid not the same one at all settings."""
    references = (reference_row(results, row.variant) for row in results.rows[1:])
    rows = list(dict.fromkeys(i for i in references if i is not None))
    names = [display_name(results.rows[i].method) if results.grid else labels[i] for i in rows]
    first, *others = dict.fromkeys(sorted(names, key=lambda name: name != DISPLAY["lora"])) or ("LoRA",)
    return f"{first} (where it was not run: {', '.join(others)})" if others else first


def _shared(results: Results, evaluations: Evaluations, output_dir: Path) -> dict[str, Any]:
    """What the report of a run and that of a grid have in common; what only a run has is empty."""
    table, colors, labels = build_table(results), row_colors(results), results.labels()
    recipe, (paired_head, paired) = output_dir / RECIPE_FILE, _paired(results)
    tests = len([pair for pair in results.paired or () if pair.p is not None])
    compared = _one_setting(results) and bool(results.grid or tests)
    return EMPTY | {
        "results": results,
        "title": f"{results.recipe}: what was learned, what was forgotten",
        "headline": _headline(results, evaluations),
        "labels": labels,
        "colors": [variable(color) for color in colors],
        "answer_colors": _answer_colors(results, labels, colors),
        "variable": variable,
        "palette": palette(colors),
        "table": table,
        "marked": compared or any(cell.mark for column in table.columns for cell in column.cells),
        "few_seeds": any("†" in cell.error for column in table.columns for cell in column.cells),
        "name_width": table.label_width("Method"),
        "alt": plane_alt(results),
        "noise": _noise(results),
        "distances": [] if results.grid else distances(results),
        "reference": _references(results, labels),
        "paired": paired,
        "paired_head": paired_head,
        "tests": tests,
        "paper": paper_table(results),
        "command": results.environment.get("command"),
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        "settings": _flat({"model": results.model, "seed": results.seed} | results.settings),
        "environment": _flat({k: v for k, v in results.environment.items() if k != "command"}),
    }


def _paired(results: Results) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of differences; without settings where no row has any."""
    head, rows = ["Method", "Settings", "Metric", "Difference", "p"], against_reference(results)
    kept = [j for j, name in enumerate(head) if name != "Settings" or any(row[j] != "–" for row in rows)]
    return [head[j] for j in kept], [[row[j] for j in kept] for row in rows]


def _answer_colors(results: Results, labels: Sequence[str], colors: Sequence[str]) -> dict[str, str]:
    """The color of everyone who answered, by row or, in a grid, whose answers are of one of its runs, by method."""
    by_method = {display_name(row.method): variable(color) for row, color in zip(results.rows, colors)}
    return by_method | {label: variable(color) for label, color in zip(labels, colors)}


def _noise(results: Results) -> list[tuple[str, str]]:
    """What the base differs from itself by, in other batches: (metric, value) of the retention metrics."""
    names = [name for name in results.metric_names("retention") if name in results.noise]
    return [(metric_title(n), f"{scale_of(results.metric(n).unit) * results.noise[n]:.1g}") for n in names]


def peft_snippet(results: Results, adapter: str) -> str:
    """Three lines of Python that load an adapter, to be run in the output directory."""
    revision = results.settings.get("revision")
    named = json.dumps(results.model) + (f", revision={json.dumps(revision)}" if revision else "")
    return (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({named})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(adapter)})"
    )


def _flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text)."""
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
    return pairs
