"""The model card of a run's method and of an export: metadata as the hub expects it, the table, the recipe, the data."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lora_null.recipes.config.load import resume_command
from lora_null.recipes.config.schema import DATA_FILES, CalibrationSection, Recipe
from lora_null.recipes.models import smollm2
from lora_null.recipes.models.plan import MethodPlan
from lora_null.recipes.report import render
from lora_null.recipes.report.dial_page import read_dial
from lora_null.recipes.report.table import build_table
from lora_null.recipes.results import DISPLAY, Results, Row, load_results
from lora_null.trainer.methods import METHODS
from lora_null.utils.files import write_text

TEMPLATE, CARD_FILE = "model_card.md.j2", "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SAMPLES = {"gsm8k_": "openai/gsm8k", "nq_open_": "google-research-datasets/nq_open"}  # drawn from these, on the hub


def write_card(export: Any, difference: Any, *, license_id: str | None = None) -> None:
    """Write `README.md` into the export's folder.

    Args:
        export: `commands.export.Export`.
        difference: what its verification found.
        license_id: of the base; None reads it from the base's own card.
    """
    write_text(export.folder / CARD_FILE, _render(content(export, difference, license_id or license_of(export))))


@dataclass(frozen=True)
class RunMethod:
    """A method of a run that is under way, or finished: what `content` asks of an `Export` and its source."""

    run: Path
    method: str
    kind: str
    recipe: dict[str, Any]
    base_name: str
    rank: int | None
    notes: list[str]
    strength: float = 1
    truncated: bool = False
    elsewhere: bool = False

    @property
    def source(self) -> RunMethod:
        return self

    @property
    def form(self) -> str:
        return "adapter" if self.kind == "adapter" else "merged"


def write_run_card(folder: Path, recipe: Recipe, plan: MethodPlan, results: Results | None) -> None:
    """Write `README.md` into RUN/METHOD, and into what the method has saved there.

    Args:
        folder: RUN/METHOD.
        recipe: the run's.
        plan: the method's.
        results: the base's row and this method's; None while it trains.
    """
    state = f"Not finished: `{resume_command(folder.parent)}` goes on."
    copied = f"`lora-null export {shlex.quote(str(folder))} --out DIR` verifies and copies it"
    saved = f"The {plan.saves} is in `{plan.saves}/`; {copied}."
    name, rank = recipe.model.name_or_path, METHODS[plan.name]().saved_rank(plan.rank) if plan.rank else None
    notes, raw = [saved if results else state], recipe.model_dump(mode="json")
    written = RunMethod(folder.parent, plan.name, plan.saves, raw, name, rank, notes)
    local = Path(name) / CARD_FILE
    license_id = smollm2.LICENSE if name == smollm2.NAME else _license_in(local) if local.is_file() else None
    text = _render(content(written, None, license_id) | {"table": results and _table_of(results)})
    for place in (folder, *(path for path in (folder / "adapter", folder / "model") if path.is_dir())):
        write_text(place / CARD_FILE, text)


def _render(shown: dict[str, Any]) -> str:
    templates = render.templates_in(Path(__file__).parent, Path(render.__file__).parent)
    return templates.get_template(TEMPLATE).render(shown)


def content(export: Any, difference: Any, license_id: str | None) -> dict[str, Any]:
    """Return everything that the template shows."""
    source, base = export.source, hub_base(export)
    recipe, title = shareable(source.recipe), DISPLAY.get(source.method, source.method)
    short = base or export.base_name.rstrip("/").rpartition("/")[2]
    return {
        "metadata": metadata(export, base, license_id).to_yaml(),
        "title": f"{title} on {short.rpartition('/')[2]}",
        "method": title,
        "base": short,
        "form": export.form,
        "rank": export.rank,
        "whole": source.kind == "model",
        "license": license_id,
        "table": None if export.truncated else results_table(source, export.strength),
        "notes": export.notes,
        "difference": difference and str(difference),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
        "data": data_lines(recipe),
        "peft": base or f"path/to/{short}",  # the name under which a reader loads the base
    }


def metadata(export: Any, base: str | None, license_id: str | None) -> ModelCardData:
    """Return the card's YAML head."""
    library = {"adapter": "peft", "merged": "transformers"}.get(export.form)
    relation = "finetune" if export.form == "merged" else "adapter"
    tags = ["lora-null", *(["lora"] if export.source.kind == "adapter" else []), *([export.form] * (library is None))]
    tags += [f"base_model:{relation}:{base}"] if base else []
    known = {"base_model": base, "base_model_relation": relation} if base else {}
    known |= {"library_name": library, "license": license_id, "pipeline_tag": "text-generation", "tags": tags}
    return ModelCardData(**known, datasets=datasets_of(export.source.recipe) or None)


def hub_base(export: Any) -> str | None:
    """Return the base's id on the hub; None for a folder whose id nobody gave."""
    name = export.base_name
    if name == smollm2.NAME:
        return smollm2.HUB
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(export: Any) -> str | None:
    """Return what the base's own card says, in its folder or on the hub; None where neither can be read."""
    if export.base_name == smollm2.NAME:
        return smollm2.LICENSE
    local = export.source.base.folder / CARD_FILE
    cards = filter(None, (local if local.is_file() else None, hub_base(export)))
    return next(filter(None, map(_license_in, cards)), None)


def _license_in(card: Path | str) -> str | None:
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license
    except Exception:  # unreachable or without metadata: then it is not known here
        return None


def datasets_of(recipe: dict[str, Any]) -> list[str]:
    """Return the hub ids of the training and the calibration data."""
    found = []
    calibration = recipe.get("calibration", {})
    for section in (recipe.get("data", {}), calibration, *(calibration.get("sources") or [])):
        path = str(section.get("path") or "")
        sample = next((name for prefix, name in SAMPLES.items() if Path(path).name.startswith(prefix)), None)
        if "samples" in Path(path).parts and sample:
            found.append(sample)
        elif HUB_ID.fullmatch(path) and not path.endswith(DATA_FILES):
            found.append(path)
    return list(dict.fromkeys(found))


def data_lines(recipe: dict[str, Any]) -> list[str]:
    """Return one line a data set: what it was used for."""
    evaluation = recipe.get("eval", {})
    lines = [f"Trained on {recipe['data']['path']}."] if recipe.get("data", {}).get("path") else []
    if "calibration" in recipe:
        lines.append(f"The knowledge to keep was measured on {CalibrationSection(**recipe['calibration']).title}.")
    for role, word in (("retention", "Retention"), ("task", "Learning")):
        names = [entry if isinstance(entry, str) else _entry_name(entry) for entry in evaluation.get(role) or []]
        lines += [f"{word} was measured by {', '.join(names)}."] if names else []
    return lines


def _entry_name(entry: dict[str, Any]) -> str:
    name = str(entry.get("answers") or entry.get("task") or next(iter(entry.values())))
    return f"{name} ({entry['path']})" if entry.get("path") else name


def shareable(value: Any) -> Any:
    """Return a recipe in which files of this machine are called by their names alone."""
    if isinstance(value, dict):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shareable(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def results_table(source: Any, strength: float = 1.0) -> Any:
    """Return the report's table with the base and this method alone; None where that was not evaluated.

    Args:
        source: the finished method.
        strength: of the export; at another one than 1 the row is what the dial measured there.
    """
    if not (source.run / "results.json").is_file() or source.elsewhere:
        return None
    results = load_results(source.run)
    rows = [results.base, *(row for row in results.rows[1:] if row.method == source.method)]
    if strength != 1:
        point = found.at(strength) if (found := read_dial(source.home)) else None
        if point is None:
            return None
        base = Row(method="base", metrics=found.points[0].metrics)  # of the questions that the dial asked
        rows = [base, Row(method=source.method, variant=f"strength {strength:g}", metrics=point.metrics)]
    return _table_of(results.model_copy(update={"rows": rows}))


def _table_of(results: Results) -> Any:
    table = build_table(results)
    return table if len(results.rows) > 1 and table.columns else None
