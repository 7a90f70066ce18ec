"""`lora-null new`: write a commented recipe for a model and a file of data; what can be read from them is not asked for."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from trl import DPOConfig, SFTConfig

from lora_null.eval_harness.documents import TEXT_FIELDS, BadRow, Documents
from lora_null.recipes.config.load import load_recipe
from lora_null.recipes.config.schema import (
    YAML_SUFFIXES,
    CalibrationSection,
    DataSection,
    ModelSection,
    Recipe,
    parse_recipe,
    parse_section,
)
from lora_null.recipes.config.yaml_text import Dumper
from lora_null.recipes.data.calibration import calibration_sources
from lora_null.recipes.data.examples import (
    MAX_BAD_SHARE,
    Example,
    RowReader,
    cut_before_the_answer,
    describe_bad_rows,
    leave_out,
    tokenize,
)
from lora_null.recipes.data.formats import Format, detect_format
from lora_null.recipes.data.rows import load_documents
from lora_null.recipes.environment import accelerator, computes_bf16
from lora_null.recipes.models.bases import Base, load_tokenizer
from lora_null.recipes.models.plan import GIB, activation_bytes, plan_methods
from lora_null.recipes.models.quantization import weight_bytes
from lora_null.recipes.output import check_place
from lora_null.recipes.preview import show_samples
from lora_null.recipes.report.render import templates_in
from lora_null.recipes.results import MIN_ROWS
from lora_null.targets import bypassed_linears, shape_of
from lora_null.trainer.preflight import check_predicts_next_token
from lora_null.utils.errors import UserError
from lora_null.utils.files import write_text
from lora_null.utils.limits import position_limit
from lora_null.utils.values import OPTIONS

TEMPLATE = "recipe.yaml.j2"
NARROW = 16  # of the width of the model, at which a linear is left out
METHOD = "lora-null-v2"
MAX_ROWS_READ = 2000  # rows whose lengths are counted
BATCHES = (64, 32, 16, 8, 4, 2, 1)
STEPS = 60  # optimizer steps that a run should have at least, if the rows allow it
MAX_MEMORY_SHARE = 0.8  # of the memory there is, at most
LONGEST, WINDOW = 4096, 1024  # tokens of a sequence and of a calibration window, unless the user asks for more
HELD_OUT = 64  # rows at the end that are measured instead of learned, or a tenth where there are few
BUDGET_ROWS = 2 * MIN_ROWS  # which a budget needs of what it measures: some for the probe, others for the check
DROPPED_NOTE = "thoughts of all turns, the last too; the template leaves out those of earlier ones"
SHOWN, LETTERS = 2, 1500  # rows, as the model sees them, and the characters of each, at most
SHIPPED = (  # what is measured beside the user's own: knowledge in the form of a question, prose, code
    ("facts", "samples/nq_open_test.jsonl", {"template": "Q: {prompt}?\nA:"}),
    ("prose", "samples/wikitext_test.jsonl", {"prompt": "prompt", "response": "response", "template": "plain"}),
    ("code", "samples/code_test.jsonl", {"prompt": "prompt", "response": "response"}),
    ("instructions", "samples/instructions_test.jsonl", {"prompt": "prompt", "response": "response"}),
)


@dataclass
class Machine:
    """What trains, and its memory in bytes."""

    name: str
    memory: int
    on_cpu: bool


@dataclass
class Rows:
    """A data set as it was found.

    Attributes:
        path: as the recipe is to name it.
        split: of a hub data set, or of a folder; None for a file, which is its own.
        format: what the rows are.
        documents: the rows, of a hub's data set the first.
        count: how many; None for a hub's, which is not read whole.
        held_out: how many at the end are to be measured only.
    """

    path: str
    split: str | None
    format: Format
    documents: Documents
    count: int | None
    held_out: int

    @property
    def learned(self) -> int | None:
        """The first rows that are not held out; None for all."""
        return self.count - self.held_out if self.count and self.held_out else None

    @property
    def is_of_texts(self) -> bool:
        """Whether the rows are chunks of texts, whose ends can be asked for."""
        return self.documents.columns == TEXT_FIELDS

    @property
    def unused(self) -> list[str]:
        """The fields that are neither learned nor asked with, nor read by a chat template."""
        if self.is_of_texts:
            return []
        options = () if "text" in self.format.keys else OPTIONS
        read = [spec for spec in (*self.format.keys.values(), *options) if spec]
        return [
            name for name in self.documents.columns if not any(spec == name or f"{{{name}}}" in spec for spec in read)
        ]

    def keys(self) -> dict[str, Any]:
        """Return what the recipe names the data by."""
        return {"path": self.path} | ({"split": self.split} if self.split else {})


class Names:
    """The names of what is measured: after its file, with its role in front where another one is called so."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, path: str, role: str) -> str:
        stem = re.sub(r"[^\w.-]+", " ", Path(path).resolve().stem).strip() or role
        numbered = (f"{role} {stem} {number}" for number in itertools.count(2))
        name = next(name for name in itertools.chain((stem, f"{role} {stem}"), numbered) if name not in self.taken)
        self.taken.add(name)
        return name


@dataclass
class Kept:
    """What one --keep names.

    Attributes:
        path: as it was given.
        rows: what lies there.
        entry: of `eval.retention`, which asks the rows that are held out; None where none can be asked.
        asked: how many of them can be.
        unusable: those that cannot.
    """

    path: str
    rows: Rows
    entry: dict[str, Any] | None = None
    asked: int = 0
    unusable: list[BadRow] = field(default_factory=list)

    @property
    def bounds(self) -> bool:
        """Whether a budget can be kept on its rows."""
        return self.asked >= BUDGET_ROWS


@dataclass
class Draft:
    """All that the template of the recipe writes."""

    name: str
    model: dict[str, Any]
    adapter: dict[str, Any]
    rows: Rows
    data: dict[str, Any]
    training: dict[str, Any]
    calibration: dict[str, Any]
    retention: list[dict[str, Any]]
    bounded: list[str]  # names of the entries that a budget can bound, see `Kept`
    task: list[dict[str, Any]]
    notes: dict[str, str] = field(default_factory=dict)

    def comment(self, key: str, value: Any) -> str:
        """Return what stands behind a key of the recipe, such as "data.template"."""
        comments = {
            "method.target_modules": "without those so narrow that they would hold the rank down",
            "training.max_length": self.notes["lengths"],
            "training.total_batch_size": "rows of an optimizer step",
            "training.per_device_train_batch_size": "of these at once: memory, not the result",
            "training.bf16": "where the device has bf16 instructions",
            "data.limit": "the rows after these are measured, in eval.task",
            "data.on_bad_row": f"left out: {self.notes.get('left out')}",
            "data.template": "the model's own" if value == "chat" else "",
            "data.thinking": DROPPED_NOTE if value == "drop" else "",
            "calibration.source": "the shipped mix of facts, prose, code, math, instructions; self: what the model writes itself",
            "calibration.path": "weight: share of the windows" + self._kept_comment(value),
            "calibration.max_length": self.notes["windows"],
            "calibration.mode": "one text per window",
        }
        return f"   # {comments[key]}" if comments.get(key) else ""

    @property
    def budget(self) -> str:
        """The options that bound what is forgotten of what the user keeps."""
        several = ", ".join(f"{name} kl" for name in self.bounded)
        return "--max-forgetting 0.01 budget.then=repair" + (
            f' "budget.measure=[{several}]"' if len(self.bounded) > 1 else ""
        )

    def _kept_comment(self, source: Any) -> str:
        if not isinstance(source, dict) or "limit" not in source:
            return ""
        name = next(entry["answers"] for entry in self.retention if entry["path"] == source["path"])
        return f'; the rows after limit are measured as "{name}"'


def run(arguments: argparse.Namespace) -> None:
    """Write the recipe, show some rows as the model sees them, say what comes next.

    Raises:
        UserError: a model or data that cannot be read or is of no known format, or a file that is there already.
    """
    for name in ("model", "data"):  # as the keys of a recipe are
        setattr(arguments, name, os.path.expanduser(getattr(arguments, name)))
    arguments.keep = list(map(os.path.expanduser, arguments.keep))
    out = arguments.out or Path(f"{Path(arguments.data.rstrip('/')).stem or 'recipe'}.yaml")
    if out.suffix not in YAML_SUFFIXES:
        raise UserError(f"--out: {out} is no YAML file, such as {out.with_suffix('.yaml').name}")
    if os.path.lexists(out):
        raise UserError(f"--out: {out} exists already; choose another name")
    check_place(out.parent, "--out")
    draft, quoted = _draft(arguments, out), shlex.quote(str(out))
    template = templates_in(Path(__file__).parent).get_template(TEMPLATE)
    write_text(out, template.render(d=draft, y=_yaml, out=quoted))
    for key, note in draft.notes.items():
        print(f"{key:<11} {note}")
    show_samples(load_recipe(str(out)), SHOWN, most=LETTERS)
    print(f"written     {out}; its comments say why, change what you know better")
    print(f"next        lora-null train {quoted} --dry-run     # the plan, in seconds")
    print(f"            lora-null train {quoted}")
    if len(draft.bounded) > 1:
        print(f"            lora-null train {quoted} {draft.budget}")


def _draft(arguments: argparse.Namespace, out: Path) -> Draft:
    machine = _machine()
    model = parse_section(ModelSection, "model", {"name_or_path": arguments.model, "dtype": "float32"})
    base = Base(model)
    config = base.config
    check_predicts_next_token(config, "error", "--model")
    tokenizer = load_tokenizer(base)
    size = weight_bytes(base.empty, model)  # in float32
    model.dtype = "float32" if (machine.on_cpu or not computes_bf16()) and size < machine.memory / 3 else "bfloat16"
    rows = _rows(arguments.data, arguments.split, "data", out)
    data, examples, bad = _data(rows, tokenizer)
    ends = (False, True) if rows.format.preferences else (False,)
    sides = [tokenize(examples, data["template"], tokenizer, rejected=rejected) for rejected in ends]
    lengths = sorted(max(len(tokens.ids) for tokens in row) for row in zip(*sides))
    limit = position_limit(config)
    room = LONGEST if limit is None else min(limit.tokens, LONGEST)
    length = _max_length(lengths, room)
    too_long = cut_before_the_answer(examples, sides[0], length)
    bad += too_long
    _check_usable(bad, len(examples) - len(too_long))
    names, template = Names(), "chat" if tokenizer.chat_template else "alpaca"
    kept = [
        _kept(path, _rows(path, "train", "keep", out), template, data.get("thinking"), tokenizer, names)
        for path in arguments.keep
    ]
    task, unusable_held_out = _task(rows, data, machine, tokenizer, names.of(arguments.data, "learned"))
    calibration, retention = _calibration_and_retention(kept, template, machine, names)
    unusable_kept = [row for each in kept for row in each.unusable]
    bad += [row for row in unusable_held_out if row.row not in {other.row for other in bad}]
    data |= {"on_bad_row": "skip"} if bad or unusable_kept else {}
    windows = _window_lengths(calibration, tokenizer, arguments.keep)
    calibration |= {"max_length": _max_length(windows, min(room, WINDOW)), "mode": "separate"}
    draft = Draft(
        name=out.stem,
        model={
            "name_or_path": _named_from(arguments.model, out) if Path(arguments.model).is_dir() else arguments.model,
            "dtype": model.dtype,
        },
        adapter=_adapter(config, base.empty),
        rows=rows,
        data=rows.keys() | data | ({"limit": rows.learned} if rows.learned else {}),
        training={"max_length": length},
        calibration=calibration,
        retention=retention,
        bounded=[each.entry["answers"] for each in kept if each.entry and each.bounds] or [retention[0]["answers"]],
        task=task,
    )
    _fit(draft, config, machine, size if model.dtype == "float32" else size // 2)
    count = f"{rows.count:,}" if rows.count else f"the first {len(examples):,}"
    draft.notes = {
        "data": f"{arguments.data}: {count} rows, {rows.format.name}",
        **({"not used": unused} if (unused := _what_is_unused(rows, kept)) else {}),
        "template": f"{data['template']}" + (", the model's own" if data["template"] == "chat" else ""),
        "lengths": _what_is_cut("rows", lengths, length),
        "windows": _what_is_cut("texts", windows, calibration["max_length"]),
        **({"thinking": f"drop: {DROPPED_NOTE}"} if data.get("thinking") == "drop" else {}),
        **({"measured": also} if task and (also := _also_learned(rows, task[0])) else {}),
        **({"left out": left_out} if (left_out := _what_is_left_out(bad, unusable_kept)) else {}),
        **draft.notes,
        **({"budget": told} if (told := _what_no_budget_bounds(kept, draft.bounded)) else {}),
    }
    return draft


def _machine() -> Machine:
    device = accelerator()
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Machine(properties.name, properties.total_memory, False)
    name = "this CPU" if device is None else str(device)
    return Machine(name, psutil.virtual_memory().available, device is None)


def _rows(path: str, split: str, where: str, out: Path) -> Rows:
    """Read a data set, find its format, and decide how many of its rows are held out."""
    local = Path(path).exists()
    documents = load_documents(path, subset=None, split=split, where=where, keep_bad=True, limit=MAX_ROWS_READ)
    if not documents.rows:
        leave_out(documents.bad, len(documents.bad), "rows", where=where)
    form = detect_format(documents.rows, documents.columns, f"--{where}")
    last = max([*documents.numbers, *(row.row for row in documents.bad)])  # as rows are numbered, blank lines too
    named = _named_from(path, out) if local else path
    found = Rows(named, split, form, documents, last if local else None, 0)
    can_be_asked = "text" not in form.keys or found.is_of_texts
    fewest = BUDGET_ROWS if where == "keep" and last >= 64 else 0
    found.held_out = min(HELD_OUT, max(last // 10, fewest)) if local and last >= 40 and can_be_asked else 0
    found.split = None if Path(path).is_file() else split
    return found


def _named_from(path: str, out: Path) -> str:
    """Return a path as a recipe is to name it: whole where the recipe lies elsewhere, since what lies here comes first."""
    return path if out.parent.resolve() == Path.cwd() else str(Path(path).resolve())


def _data(rows: Rows, tokenizer: Any) -> tuple[dict[str, Any], list[Example], list[BadRow]]:
    """Return the section `data`, rows written under it, and those that cannot be.

    Raises:
        UserError: hardly a row can be used.
    """
    template = "plain" if "text" in rows.format.keys else "chat" if tokenizer.chat_template else "alpaca"
    tries = []
    for thinking in (None, "keep", "drop") if template != "plain" else (None,):
        keys = {**rows.format.keys, "template": template} | ({"thinking": thinking} if thinking else {})
        tries.append((keys, *_written(rows, keys, tokenizer)))
        good, bad = len(tries[-1][1]), len(tries[-1][2])
        if bad <= MAX_BAD_SHARE * (good + bad):  # which are left out unasked
            break
    keys, examples, bad = min(tries, key=lambda found: len(found[2]))  # the first of equals
    _check_usable(bad, len(examples))
    return keys, examples, bad


def _check_usable(bad: Sequence[BadRow], good: int) -> None:
    if len(bad) >= good:
        leave_out(bad, len(bad) + good, "rows", "error")


def _reader(rows: Rows, keys: dict[str, Any]) -> RowReader:
    section, documents = DataSection(path=rows.path, **keys), rows.documents
    preferences = "rejected" in keys
    return RowReader(section, documents.columns, "data", preferences=preferences, first=documents.rows[0])


def _written(rows: Rows, keys: dict[str, Any], tokenizer: Any, after: int = 0) -> tuple[list[Example], list[BadRow]]:
    """Write the first rows behind number `after`, and those that are held out, as the recipe will; return good and bad ones."""
    documents, reader = rows.documents, _reader(rows, keys)
    examples, bad = [], [row for row in documents.bad if row.row > after]
    numbered = [(number, row) for number, row in zip(documents.numbers, documents.rows) if number > after]
    for number, row in numbered[:MAX_ROWS_READ] + numbered[max(MAX_ROWS_READ, len(numbered) - HELD_OUT) :]:
        try:
            examples.append(reader.example(number, row, tokenizer))
        except ValueError as error:
            bad.append(BadRow(number, str(error)))
    return examples, bad


def _quantile(lengths: Sequence[int], share: float) -> int:
    return lengths[min(len(lengths) - 1, math.ceil(share * len(lengths)) - 1)]


def _max_length(lengths: Sequence[int], limit: int) -> int:
    """Return room for every row, or for 99% of them where the longest are far longer."""
    most, longest = _quantile(lengths, 0.99), lengths[-1]
    return min(limit, max(16, 16 * math.ceil((longest if longest <= 2 * most else most) / 16)))


def _what_is_cut(name: str, lengths: Sequence[int], length: int) -> str:
    half, most, longest = (_quantile(lengths, q) for q in (0.5, 0.95, 1.0))
    cut = sum(n > length for n in lengths)
    return (
        f"half of the {name} have at most {half:,} tokens, 95% {most:,}, the longest {longest:,}; "
        f"max_length {length:,} cuts {f'{cut:,} of {len(lengths):,}' if cut else 'none'}"
    )


def _adapter(config: Any, empty: Any) -> dict[str, Any]:
    """Return the rank, 64 or a power of two that is at most a quarter of the narrowest layer's width, and where it goes.

    Linears far narrower than the model, such as the gate of a shared expert, one wide, are left out, and those that kernels
    multiply past an adapter.
    """
    least = config.get_text_config(decoder=True).hidden_size // NARROW
    widths: dict[str, int] = {}
    past = {
        name.rpartition(".")[2]
        for name in bypassed_linears(empty, [name for name, _ in empty.named_modules() if name])
    }
    for name, module in empty.named_modules():
        if (shape := shape_of(module)) and module is not empty.get_output_embeddings():
            leaf = name.rpartition(".")[2]
            widths[leaf] = min(*shape, widths.get(leaf, shape[0]))
    wide = {leaf: width for leaf, width in widths.items() if width >= least and leaf not in past} or widths
    rank = {"rank": min(64, 2 ** max(int(math.log2(min(wide.values()))) - 2, 0))}
    return rank if len(wide) == len(widths) else rank | {"target_modules": list(wide)}


def _kept(path: str, rows: Rows, template: str, thinking: str | None, tokenizer: Any, names: Names) -> Kept:
    """Return how rows to keep are measured. Where no row that is held out can be asked, all are calibrated on."""
    entry = _answers_entry(rows, template)
    if entry is None or not rows.learned:
        return Kept(path, rows)
    found, unusable = _written(rows, entry | {"thinking": thinking}, tokenizer, after=rows.learned)
    if not found:
        rows.held_out = 0
        return Kept(path, rows)
    measured = {"answers": names.of(path, "kept"), **rows.keys(), **entry, "offset": rows.learned}
    return Kept(path, rows, measured, len(found), unusable)


def _calibration_and_retention(
    kept: Sequence[Kept], template: str, machine: Machine, names: Names
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the sections `calibration` and `eval.retention`: what the user names, and the general mix beside it."""
    samples, limit = (128, 32) if machine.on_cpu else (256, 64)
    shipped = [
        {"answers": names.of(name, "shipped"), "path": path, "template": template, **keys, "limit": limit}
        for name, path, keys in SHIPPED
    ]
    if not kept:
        return {"source": "general", "samples": samples}, shipped
    own = [
        each.rows.keys() | {"weight": 3} | ({"limit": each.rows.learned} if each.rows.learned else {}) for each in kept
    ]
    first, last = (
        [
            each.entry | {"limit": min(limit, each.rows.held_out)}
            for each in kept
            if each.entry and each.bounds == bounds
        ]
        for bounds in (True, False)
    )
    sources = [*own, {"source": "general", "weight": len(kept)}]
    return {"sources": sources, "samples": samples}, [*first, *shipped, *last]  # a budget takes the first


def _window_lengths(calibration: dict[str, Any], tokenizer: Any, given: Sequence[str]) -> list[int]:
    """Return how many tokens the texts to calibrate on have, of many rows the first, sorted; `given` is what --keep names.

    Raises:
        UserError: a row without a text.
    """
    section = parse_section(CalibrationSection, "calibration", calibration)
    for source in section.sources:
        if source.path is not None:
            source.limit = min(source.limit or MAX_ROWS_READ, MAX_ROWS_READ)
    try:
        sources = calibration_sources(section, tokenizer)
    except UserError as error:
        named = re.sub(r"calibration\.sources\.(\d+)(\.path)?", lambda key: f"--keep {given[int(key[1])]}", str(error))
        raise UserError(named) from None
    texts = [text for source in sources for text in source.texts or []]
    return sorted(len(ids) for ids in tokenizer(texts)["input_ids"])


def _what_is_unused(rows: Rows, kept: Sequence[Kept]) -> str:
    """Return the fields that are not read of the data and of what is kept; "" for none."""
    found = [("", rows.unused), *((f" of {each.path}", each.rows.unused) for each in kept)]
    return "; ".join(f"the fields {', '.join(unused)}{of}" for of, unused in found if unused)


def _what_is_left_out(bad: Sequence[BadRow], unusable_kept: Sequence[BadRow]) -> str:
    kept = f"of those to keep {describe_bad_rows(unusable_kept)}" if unusable_kept else ""
    return "; ".join(filter(None, [describe_bad_rows(bad), kept]))


def _what_no_budget_bounds(kept: Sequence[Kept], bounded: Sequence[str]) -> str:
    """Return what of the user's own has too few rows for a budget, and what one would bound instead; "" for nothing."""
    few = []
    for each in kept:
        held_out = f"{each.asked} usable row{'s' if each.asked > 1 else ''}" if each.asked else "no usable row"
        few += [] if each.bounds else [f"{each.path} holds out {held_out}"]
    instead = f"bounds {', '.join(bounded)} alone" if len(few) < len(kept) else "would bound the shipped facts"
    return f"--max-forgetting {instead}: {', '.join(few)}, and a budget needs {BUDGET_ROWS}" if few else ""


def _answers_entry(rows: Rows, template: str) -> dict[str, Any] | None:
    """Return how rows are asked as an entry `answers`; None for texts that have no end to ask for."""
    keys = {key: value for key, value in rows.format.keys.items() if key != "rejected"}
    if "text" in keys:
        return {"prompt": "beginning", "response": "ending", "template": "plain"} if rows.is_of_texts else None
    if keys.get("prompt", "") is None:  # pairs of conversations that hold their prompt
        keys = {key: value for key, value in keys.items() if key == "system"} | {"messages": keys["response"]}
    return keys | {"template": template}


def _task(
    rows: Rows, data: dict[str, Any], machine: Machine, tokenizer: Any, name: str
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """Return the section `eval.task`, the rows that are held out, and which of these cannot be measured.

    Where none of them can be, none is held out.
    """
    if rows.format.preferences:
        kind = "preferences"
        entry = {key: value for key, value in rows.format.keys.items() if key != "system"}
    else:
        kind = "answers"
        entry = _answers_entry(rows, data["template"])
    if not rows.learned or entry is None:
        return [], []
    written = {key: data[key] for key in ("template", "thinking") if key in data} | entry
    found, bad = _written(rows, written, tokenizer, after=rows.learned)
    if not found:
        rows.held_out = 0
        return [], []
    limit = {"limit": 32} if machine.on_cpu and rows.held_out > 32 else {}
    return [{kind: name, **rows.keys(), **entry, "offset": rows.learned, **limit}], bad


def _also_learned(rows: Rows, entry: dict[str, Any]) -> str:
    """Return how many of the prompts that an entry of `eval.task` asks are among those that are learned; "" for none."""
    reader = _reader(rows, {key: entry[key] for key in entry.keys() & DataSection.model_fields.keys() - {"path"}})
    sides: tuple[list[str], list[str]] = ([], [])
    for number, row in zip(rows.documents.numbers, rows.documents.rows):
        with contextlib.suppress(ValueError):  # no conversation, or one without an answer
            messages, _ = reader.messages(row)
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            sides[number > entry["offset"]].append(json.dumps(messages[:last], default=str))
    learned, asked = set(sides[0]), sides[1]
    count = sum(prompt in learned for prompt in asked)
    return f"{count} of the {len(asked)} held-out prompts are also learned" if count else ""


def _fit(draft: Draft, config: Any, machine: Machine, weights: int) -> None:
    """Choose batch, epochs and checkpointing so that a step fits the machine's memory, and note what they come to."""
    preferences = draft.rows.format.preferences
    count = draft.rows.learned or draft.rows.count
    epochs = 1 if count is None or count >= 2000 else 2 if count >= 500 else 3
    total = next((batch for batch in BATCHES[1:] if (count or math.inf) * epochs / batch >= STEPS), 1)
    raw = {
        "model": draft.model,
        "method": {"name": METHOD, **draft.adapter},
        "data": draft.data,
        "calibration": draft.calibration,
        "trainer": "dpo" if preferences else "sft",
    }
    recipe = parse_recipe(raw, draft.name)
    needed, batch, checkpointing = _fitting(
        recipe, config, machine, weights, draft.training["max_length"], min(total, 16)
    )
    draft.training |= {
        "learning_rate": 5e-6 if preferences else 3e-4,
        "num_train_epochs": epochs,
        "total_batch_size": total,
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": checkpointing,
        "bf16": "auto",
    }
    steps = f"about {math.ceil(count / total) * epochs:,} steps" if count else "steps"
    draft.notes["train"] = f"{epochs} epoch{'s' if epochs > 1 else ''}, {steps} of {total} rows, {batch} at once"
    advice = "; that is too little: lower training.max_length, or model.quantization=nf4"
    fits = "" if needed <= machine.memory else advice
    draft.notes["memory"] = f"about {needed / GIB:.1f} GiB of {machine.memory / GIB:.1f} on {machine.name}{fits}"
    draft.notes["keep"] = f"{recipe.calibration.title}, {recipe.calibration.samples} windows of text" + (
        ""
        if recipe.calibration.source or len(draft.retention) > len(SHIPPED)
        else "; no row of it is held out and measured"
    )


def _fitting(
    recipe: Recipe, config: Any, machine: Machine, weights: int, length: int, most: int
) -> tuple[float, int, bool]:
    """Return the bytes that a step needs, its largest batch that fits, and whether with checkpointing; else the least."""
    plan = plan_methods(recipe, config)[0]
    tried = []
    for checkpointing, batch in itertools.product((False, True), (b for b in BATCHES if b <= most)):
        training = (DPOConfig if recipe.trainer == "dpo" else SFTConfig)(
            output_dir="unused", use_cpu=machine.on_cpu, bf16=False, per_device_train_batch_size=batch, max_length=length,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        needed = plan.peak_bytes(weights, activation_bytes(config, training))
        tried.append((needed, batch, checkpointing))
        if needed <= MAX_MEMORY_SHARE * machine.memory:
            return tried[-1]
    return min(tried, key=lambda found: found[0])


class _OneLine(Dumper):
    """Writes texts of several lines in double quotes."""

    def represent_str(self, data: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_OneLine.add_representer(str, _OneLine.represent_str)


def _yaml(value: Any) -> str:
    """Return a value as YAML in one line."""
    how = {"default_flow_style": True, "allow_unicode": True, "sort_keys": False, "width": 10**6}
    return yaml.dump(value, Dumper=_OneLine, **how).removesuffix("...\n").strip()
