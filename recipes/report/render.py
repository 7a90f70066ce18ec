"""Writes the report of a run: `report.md`, `report.html` (one file, no network) and `forgetting.png`."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lora_null.recipes.report.figures import curves_png, forgetting_png, frontier_png, plane_points, row_colors
from lora_null.recipes.report.following import following, probe_curves
from lora_null.recipes.report.grid_page import grid_content, grid_headline
from lora_null.recipes.report.headline import Measure, forgetting, headline, learning, verdicts
from lora_null.recipes.report.paper import paper_table
from lora_null.recipes.report.table import Column, Table, build_table
from lora_null.recipes.results import LOG_FILE, Results, load_log, load_results
from lora_null.utils.files import replacing

STYLES = {"best": "bold", "second": "underline", None: ""}
CURVES = (("loss", "Training loss"), ("drift_mean", "Drift of the layers' outputs"))
CURVES += (("reward_margin", "Reward margin"), ("reward_accuracy", "Reward accuracy"))  # DPO


def write_report(output_dir: str | Path, results: Results | None = None, name: str = "report") -> None:
    """Write the three files of the report from what lies in `output_dir`; equal inputs give equal bytes.

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
    picture = frontier_png(results) if results.grid else forgetting_png(results)
    content = _content(results, output_dir) | {"plane": _data_uri(picture), "picture": drawn}
    templates = templates_in(Path(__file__).parent)
    pages = {
        page: templates.get_template(template).render(content).encode()
        for page, template in ((f"{name}.md", "report.md.j2"), (f"{name}.html", "page.html.j2"))
    }
    for file, data in ({drawn: picture} | pages).items():
        with replacing(output_dir / file) as temporary:
            temporary.write_bytes(data)


def templates_in(*folders: Path) -> jinja2.Environment:
    """Return the environment of the templates in the folders; `md` is the filter for literal Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escape_markdown}
    return environment


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the headline and the table; columns that do not fit the terminal go into further tables below."""
    console, table = console or Console(), build_table(results)
    console.print(Text(_headline(results), style="bold"))
    for columns in _fitting(table, console.width):
        drawn = RichTable(show_edge=False, pad_edge=False, header_style="")
        drawn.add_column("Method", overflow="fold", min_width=_name_width(table), max_width=_name_width(table))
        for column in columns:
            drawn.add_column(Text(column.heading), justify="right", overflow="fold")
        for i, label in enumerate(table.labels):
            cells = [Text(str(c.cells[i]), STYLES[c.cells[i].mark]) for c in columns]
            drawn.add_row(Text(label), *cells, style="dim" if i == 0 else "", end_section=i == 0)
        console.print(drawn)


def _headline(results: Results) -> str:
    return grid_headline(results) if results.grid else headline(results)


def escape_markdown(text: object) -> str:
    """`text` as literal Markdown on one line, safe inside a table cell."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(str(text).split()))


def _name_width(table: Table) -> int:
    return min(24, max(map(len, [*table.labels, "Method"])))


def _fitting(table: Table, width: int) -> list[list[Column]]:
    """The columns, split into as few runs as fit `width` beside the method's name."""
    room = width - _name_width(table)
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


def _content(results: Results, output_dir: Path) -> dict[str, Any]:
    """Everything the two templates show, as text and numbers ready to print."""
    labels, table = results.labels(), build_table(results)
    if results.grid:  # its runs have reports of their own, with their curves
        return _shared(results, table) | {"grid": grid_content(results), "follows": following(results, output_dir, [])}
    folders = [row.method for row in results.rows]
    linked = output_dir / "logs"  # of a comparison, whose rows come from several runs
    places = [linked / str(i) if linked.is_dir() else output_dir / folder for i, folder in enumerate(folders)]
    logs = [load_log(place / LOG_FILE) for place in places]
    curves = [(title, curves_png(results, logs, key, title)) for key, title in (*CURVES, *probe_curves(logs))]
    found = verdicts(results)
    adapters = [i for i, row in enumerate(results.rows) if row.adapter_params]
    best = next((i for verdict in found for i in verdict.winners if i in adapters), next(iter(adapters), None))
    return _shared(results, table) | {
        "follows": following(results, output_dir, logs),
        "verdicts": found,
        "curves": [(title, _data_uri(png)) for title, png in curves if png],
        "without_log": [labels[i] for i in range(1, len(labels)) if not logs[i].entries],
        "unreadable": [f"{folders[i]} ({log.unreadable})" for i, log in enumerate(logs) if log.unreadable],
        "snippet": None if best is None else peft_snippet(results.model, f"{folders[best]}/adapter"),
        "adapter_folders": list(dict.fromkeys(f"{folders[i]}/adapter" for i in adapters if i != best)),
    }


def _shared(results: Results, table: Table) -> dict[str, Any]:
    """What the report of a run and that of a grid have in common; what only a run has is empty."""
    return {
        "results": results,
        "title": f"{results.recipe}: what was learned, what was forgotten",
        "headline": _headline(results),
        "verdicts": [],
        "labels": results.labels(),
        "colors": row_colors(results),
        "table": table,
        "name_width": _name_width(table),
        "alt": plane_alt(results),
        "paper": paper_table(results),
        "grid": None,
        "curves": [],
        "without_log": [],
        "unreadable": [],
        "snippet": None,
        "adapter_folders": [],
        "settings": _flat({"model": results.model, "seed": results.seed} | results.settings),
        "environment": _flat(results.environment),
    }


def plane_alt(results: Results) -> str:
    """What the plane shows, in words, for those who do not see it."""
    kept, learned = forgetting(results), learning(results)
    labels, points = results.labels(), plane_points(kept, learned)
    if not points:
        return "; ".join(f"{m.title}: {_values(labels, m)}" for m in (kept, learned) if m) or "No metric was measured."
    points_in_words = [f"{labels[i]}: {learned.title} {learned.text(i)}, {kept.title} {kept.text(i)}" for i in points]
    return (
        f"Learning against forgetting. {labels[0]}: {learned.title} {learned.text(0)}; "
        + "; ".join(points_in_words)
        + "."
    )


def _values(labels: list[str], measure: Measure) -> str:
    return ", ".join(f"{labels[i]} {measure.text(i)}" for i in sorted(measure.measured))


def peft_snippet(model: str, adapter: str) -> str:
    """Three lines of Python that load an adapter, to be run in the output directory."""
    return (
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(model)})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(adapter)})"
    )


def _flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text)."""
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            pairs.append(
                (f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            )
    return pairs


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
