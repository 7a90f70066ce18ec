"""The model card of a run's method and of an export: metadata as the hub expects it, the table, the recipe, the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lora_null.adapters.plain import CONFIG_FILE
from lora_null.recipes.config.load import whole_paths
from lora_null.recipes.config.run_folder import RECIPE_FILE
from lora_null.recipes.config.schema import DATA_FILES, CalibrationSection, Recipe, parse_section
from lora_null.recipes.models import smollm2
from lora_null.recipes.models.plan import MethodPlan
from lora_null.recipes.report import render
from lora_null.recipes.report.dial import read_dial
from lora_null.recipes.report.headline import left_nothing
from lora_null.recipes.report.table import build_table, escape_markdown
from lora_null.recipes.results import (
    RESULTS_FILE,
    Results,
    Row,
    display_name,
    load_results,
    shareable,
    told_of_repair,
)
from lora_null.recipes.trained import QUANTIZED_NOTE, Trained
from lora_null.trainer.methods import METHODS
from lora_null.utils.files import read_json, write_text

TEMPLATE, CARD_FILE = "model_card.md.j2", "README.md"
RESUME = f"lora-null train RUN/{RECIPE_FILE} --resume"  # RUN: a card may be read on another machine
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SAMPLES = {"gsm8k_": "openai/gsm8k", "nq_open_": "google-research-datasets/nq_open"}  # drawn from these, on the hub


def write_card(export: Any, difference: Any, *, license_id: str | None = None) -> None:
    """Write `README.md` into the export's folder.

    Args:
        export: `commands.export.Export`.
        difference: what its verification found.
        license_id: of the base; None reads it from the base's own card.
    """
    source, name = export.source, export.base_name
    text = _render(
        source.recipe, source.method, source.kind, export.form, name,
        terms=license_of(name, source.base.folder / CARD_FILE, hub_base(name), given=license_id),
        rank=export.rank,
        plain=True,
        revision=None if name != source.base.section.name_or_path else source.base.section.revision,
        table=None if export.truncated else results_table(source, export.strength),
        notes=export.notes,
        difference=str(difference),
    )  # fmt: skip
    write_text(export.folder / CARD_FILE, text)


def write_run_card(folder: Path, recipe: Recipe, plan: MethodPlan, results: Results | None) -> None:
    """Write `README.md` into RUN/METHOD, and into what the method has saved there; `results` is None while it trains."""
    plain, kept = METHODS[plan.name].saves_plain_lora, folder / plan.saves
    config = kept / CONFIG_FILE  # of an adapter
    quantized = recipe.model.quantization and f"{QUANTIZED_NOTE.format(recipe.model.quantization).capitalize()}."
    name, form = recipe.model.name_or_path, "adapter" if plan.saves == "adapter" else "merged"
    notes = [*filter(None, [quantized]), *(_kept_of(results.rows[-1], folder) if results else ())]
    shown = {
        "terms": license_of(name, Path(name) / CARD_FILE),
        "rank": read_json(config).get("r") if config.is_file() else None,
        "plain": plain,
        "revision": recipe.model.revision,
        "table": results and _table_of(results),
        "difference": None,
    }
    values = whole_paths(recipe).model_dump(mode="json")  # a run that goes on has whole paths, and says the same
    for place in (folder, *(path for path in (folder / "adapter", folder / "model") if path.is_dir())):
        state = _where(place, kept, plain) if results else f"Not finished: `{RESUME}` goes on."
        text = _render(values, plan.name, plan.saves, form, name, notes=[state, *notes], **shown)
        write_text(place / CARD_FILE, text)


def _where(place: Path, kept: Path, plain: bool) -> str:
    """Say on the card in `place` where a method's weights are and what exports them; `kept` is their folder."""
    if not kept.is_dir():
        return "Its weights were not kept."
    found = f"The {kept.name} is in {'this folder' if place == kept else f'`{kept.name}/`'}"
    exports = f"; `lora-null export RUN/{kept.parent.name} --out DIR` verifies and copies it" if plain else ""
    return f"{found}{exports}."


def _kept_of(row: Row, folder: Path) -> list[str]:
    """Say what a budget of forgetting has left of a method, whose folder may lie beside that of its repaired adapter."""
    told = [left_nothing(row, display_name(row.method))]
    if row.budget:
        told.append(f"The budget of forgetting{'' if row.budget.kept else ' is NOT kept'}: {row.budget.account()}.")
    told.append(told_of_repair(folder))
    return [escape_markdown(said) for said in told if said]


def _render(
    recipe: dict[str, Any], method: str, kind: str, form: str, base_name: str, *, terms: dict[str, str], **shown: Any
) -> str:
    """Return the card.

    Args:
        recipe: the resolved recipe.
        method: its name, or that of the folder of an adapter made elsewhere.
        kind: "adapter" or "model", what was trained.
        form: what the folder holds: adapter, merged or gguf.
        base_name: folder or hub id of the base.
        terms: the license of the base, as the fields of a card; empty where it is not known.
        shown: rank, plain, revision, table, notes and difference, as the template shows them.
    """
    title, base, shared = display_name(method), hub_base(base_name), shareable(recipe)
    short = base or base_name.rstrip("/").rpartition("/")[2]
    templates = render.templates_in(Path(__file__).parent, Path(render.__file__).parent)
    return templates.get_template(TEMPLATE).render(
        metadata=_metadata(recipe, kind == "adapter" and shown["plain"], form, base, terms).to_yaml(),
        title=f"{title} on {short.rpartition('/')[2]}",
        method=title,
        base=short,
        form=form,
        whole=kind == "model",
        license=terms.get("license_name") or terms.get("license"),
        recipe=yaml.safe_dump(shared, sort_keys=False, allow_unicode=True).strip(),
        data=data_lines(shared),
        peft=base or f"path/to/{short}",  # the name under which a reader loads the base
        **shown,
    )


def _metadata(recipe: dict[str, Any], lora: bool, form: str, base: str | None, terms: dict[str, str]) -> ModelCardData:
    """Return the card's YAML head."""
    library = {"adapter": "peft", "merged": "transformers"}.get(form)
    relation = "finetune" if form == "merged" else "adapter"
    tags = ["lora-null", *["lora"] * lora, *([form] * (library is None))]
    tags += [f"base_model:{relation}:{base}"] if base else []
    known = {"base_model": base, "base_model_relation": relation} if base else {}
    known |= {"library_name": library, "license": None, **terms, "pipeline_tag": "text-generation", "tags": tags}
    return ModelCardData(**known, datasets=datasets_of(recipe) or None)


def hub_base(name: str) -> str | None:
    """Return the base's id on the hub; None for a folder whose id nobody gave."""
    if name == smollm2.NAME:
        return smollm2.HUB
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(name: str, *cards: Path | str | None, given: str | None = None) -> dict[str, str]:
    """Return the fields of a card that say the license: `given`, or what the base's own says, a file or on the hub.

    Empty where none of them can be read.
    """
    if given or name == smollm2.NAME:
        return {"license": given or smollm2.LICENSE}
    return next(filter(None, map(_license_in, filter(None, cards))), {})


def _license_in(card: Path | str) -> dict[str, str]:
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # not there, unreachable or without metadata: then it is not known here
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: x for key, x in found.items() if x and (key != "license_link" or "://" in x)}  # no file beside it


def _tasks_of(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of a sequence; of another recipe none."""
    return (recipe.get("sequence") or {}).get("tasks") or []


def _trained_on(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the data of a recipe, or of each task of a sequence."""
    return [recipe.get("data", {}) | task.get("data", {}) for task in _tasks_of(recipe) or [{}]]


def datasets_of(recipe: dict[str, Any]) -> list[str]:
    """Return the hub ids of the training and the calibration data."""
    found = []
    calibration = recipe.get("calibration", {})
    for section in (*_trained_on(recipe), calibration, *(calibration.get("sources") or [])):
        path = str(section.get("path") or "")
        sample = next((name for prefix, name in SAMPLES.items() if Path(path).name.startswith(prefix)), None)
        if "samples" in Path(path).parts and sample:
            found.append(sample)
        elif hub_base(path) and not path.endswith(DATA_FILES):
            found.append(path)
    return list(dict.fromkeys(found))


def data_lines(recipe: dict[str, Any]) -> list[str]:
    """Return one line a data set: what it was used for."""
    evaluation = recipe.get("eval", {})
    paths = list(dict.fromkeys(section["path"] for section in _trained_on(recipe) if section.get("path")))
    lines = [f"Trained on {', then on '.join(paths)}."] if paths else []
    if "calibration" in recipe:
        section = parse_section(CalibrationSection, "calibration", recipe["calibration"])
        lines.append(f"The knowledge to keep was measured on {section.title}.")
    learning = [(task.get("eval") or {}).get("task") for task in _tasks_of(recipe)] or [evaluation.get("task")]
    asked = {
        "Retention": evaluation.get("retention"),
        "Learning": [entry for each in learning for entry in each or []],
    }
    for word, entries in asked.items():
        names = [entry if isinstance(entry, str) else _entry_name(entry) for entry in entries or []]
        lines += [f"{word} was measured by {', '.join(names)}."] if names else []
    return lines


def _entry_name(entry: dict[str, Any]) -> str:
    name = str(entry.get("answers") or entry.get("task") or next(iter(entry.values())))
    return f"{name} ({entry['path']})" if entry.get("path") else name


def results_table(source: Trained, strength: float = 1.0) -> Any:
    """Return the report's table with the base and this method alone; None where that was not evaluated.

    Args:
        source: the finished method.
        strength: of the export; at another one than 1 the row is what the dial measured there.
    """
    if not (source.run / RESULTS_FILE).is_file() or source.elsewhere:
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
