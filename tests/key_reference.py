"""The table of every key of a recipe, made from the schema. After a change of the schema:

python tests/key_reference.py     # writes the table into recipes/README.md anew
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lora_null.recipes.config.schema import (
    ENTRIES,
    REFUSED,
    BudgetSection,
    CodeSection,
    JudgeSection,
    ProbeSection,
    Recipe,
    SequenceSection,
    VLLMSection,
    WeightedSource,
)

README = Path(__file__).parents[1] / "recipes" / "README.md"
BEGIN, END = "<!-- keys: made by python tests/key_reference.py -->\n", "<!-- end of keys -->\n"
WORDS = {str: "text", int: "integer", float: "number", bool: "true, false", dict: "mapping", list: "list"}


def describe_keys() -> str:
    """Return the table of every key, one table for each section, as Markdown."""
    sections = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    plain = {name: field for name, field in Recipe.model_fields.items() if name not in sections}
    tables = [_table("", "At the top of the file", plain)]
    sections |= {"eval.judge": JudgeSection, "eval.vllm": VLLMSection, "eval.code": CodeSection}
    sections |= {"eval.probe": ProbeSection, "budget": BudgetSection, "sequence": SequenceSection}
    tables += [_table(f"{name}.", f"`{name}`: {_summary(kind)}", kind.model_fields) for name, kind in sections.items()]
    title = f"An entry of `calibration.sources`: {_summary(WeightedSource)}"
    tables.append(_table("", title, WeightedSource.model_fields))
    for name, kind in ENTRIES.items():
        title = f"An entry of `eval.retention` or `eval.task` with the key `{name}`: {_summary(kind)}"
        tables.append(_table("", title, kind.model_fields))
    return "\n".join([*tables, describe_refused()])


def describe_refused() -> str:
    """Return the table of what `training` does not take of TRL's configurations, and why."""
    reasons: dict[str, list[str]] = {}
    for key, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{key}`")
    lines = ["**What `training` does not take of TRL's SFTConfig and DPOConfig; every other field passes through**\n"]
    lines += ["| fields | |", "|:--|:--|", *(f"| {', '.join(keys)} | {reason} |" for reason, keys in reasons.items())]
    return "\n".join(lines) + "\n"


def _summary(kind: type[BaseModel]) -> str:
    text = kind.__doc__.splitlines()[0].rstrip(".")
    return text if text[1].isupper() else text[0].lower() + text[1:]


def _table(prefix: str, title: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"**{title}**\n", "| key | value | default | |", "|:--|:--|:--|:--|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{_default(field)}`"
        cells = (f"`{prefix}{name}`", _value(field.annotation), default, field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(exclude_defaults=True))
    return "null" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def _value(annotation: Any) -> str:
    """Say in words what a key takes."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(inside[0])
    if origin is Literal:
        return ", ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        kinds = [_value(kind) for kind in inside if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    return WORDS.get(origin or annotation, "section")


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{describe_keys()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
