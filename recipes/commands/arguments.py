"""The command line: every command's options, without what the commands do, which takes long to import."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import shtab

from lora_null import __version__
from lora_null.eval_harness.code.jails import UNSAFE
from lora_null.eval_harness.mt_bench.judge import add_options
from lora_null.recipes.config.load import shipped
from lora_null.recipes.config.schema import by_metric
from lora_null.utils.errors import UserError, nearest
from lora_null.utils.startup import launched_index

ALLOW, JAILED = "--allow-code-execution", "jailed"
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("adapter", "merged", "gguf")
NAMING = ("model", "data", "keep", "base", "calibration")  # options that name a model or data
# What messages call by the key of a recipe, and a command's user gives by an option.
KEYS_AS_OPTIONS = {
    "new": {
        "model.name_or_path": "--model",
        "; data.on_bad_row=skip leaves them out": "; mend them, or leave them out of the file",
        **dict.fromkeys(("data.path=", "data.path"), "--data"),
        "data.split": "--split",
        **dict.fromkeys(("keep.path=", "keep.path"), "--keep"),
        "keep.split: ": "--keep: name one of its files; ",
    },
    "init": {
        "model.name_or_path": "--model",
        "calibration.path": "--calibration",
        **{f"calibration.{key}": f"--{key}" for key in ("split", "field", "template", "samples", "mode")},
        "calibration.max_length": "--max-length",
        **{f"{key}: ": f"--{key.replace('_', '-')}: " for key in ("target_modules", "null_energy", "null_multiple")},
    },
    **{
        command: {
            "model.name_or_path": "--base",
            "model.trust_remote_code=true": "--trust-remote-code",
            "budget.measure": "--measure",
            "budget.at_most": "--max-forgetting",
        }
        for command in ("export", "dial", "check", "repair")
    },
}
MAX_WEIGHT = 1e6  # of a repair
STRENGTHS, MAX_STRENGTH = "0,0.2,0.4,0.6,0.8,1,1.25", 2.0


class _Store(argparse._StoreAction):
    """Stores an option's value, and says so where it is given twice and the last counts."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = vars(namespace).setdefault("given_options", set())
        if option_string and self.dest in given and launched_index() == 0:
            print(f"{option_string}: is given twice, the last counts", file=sys.stderr)
        given.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as every other mistake of a user is reported: in one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, _Store)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _adder(parser: Any) -> Callable[..., None]:
    """Return what adds an option to a parser or a group of it, with what a shell completes it by."""

    def add(*names: str, complete: Any = None, **options: Any) -> None:
        action = parser.add_argument(*names, **options)
        if complete is not None:
            action.complete = complete

    return add


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the complete command line, and the one of each command."""
    parser = Parser(
        prog="lora-null", description="Fine-tune a language model without forgetting; measured before and after."
    )
    parser.add_argument("--version", action="version", version=f"lora-null {__version__}")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    names = " ".join(shipped())
    complete = {
        "bash": f'_lora_null_recipe() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f'_lora_null_recipe() {{ _alternative "recipes:recipe:({names})" "files:file:_files" }}',
    }
    shtab.add_argument_to(parser, "--print-completion", preamble=complete, help="print a shell's completion script")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    by_name = {}
    for name, (fill, about) in COMMANDS.items():
        description = " ".join((fill.__doc__ or "").split())
        by_name[name] = commands.add_parser(name, help=about, description=description)
        fill(by_name[name])
    return parser, by_name


def _new(parser: Any) -> None:
    """Look at a model and a file of data and write a commented recipe for them: format, template, lengths, batch for
    the device at hand, what to calibrate on and what to measure. No weights are loaded.
    """
    add = _adder(parser)
    add("--model", required=True, help="hub id or local folder", complete=shtab.DIRECTORY)
    add("--data", required=True, help="file, folder or hub id of what to learn", complete=shtab.FILE)
    about = "file, folder or hub id of what to keep, several times for several, beside a quarter of a general mix; else the mix alone"
    add("--keep", action="append", default=[], metavar="PATH", help=about, complete=shtab.FILE)
    add("--split", default="train", help="split of a data set (default train); a single file is its own")
    add("--out", type=Path, metavar="RECIPE", help="the YAML to write (default: the data's name)", complete=shtab.FILE)


def _train(parser: Any) -> None:
    """Fine-tune with a recipe, measure what was learned and what was kept, write a report."""
    parser.usage = (
        "%(prog)s RECIPE [options] [key.subkey=value ...]\n"
        "       %(prog)s RECIPE RECIPE ... --sequence\n"
        "       %(prog)s --list"
    )
    add = _adder(parser)
    recipes = dict.fromkeys(("bash", "zsh"), "_lora_null_recipe")
    add("recipe", nargs="?", help="a shipped name, or the path of a YAML", complete=recipes)
    add("words", nargs="*", metavar="key.subkey=value", help="overrides, read as YAML; an empty value (key=) is null")
    add("--method", help="methods to run, separated by commas")
    add("--model-preset", metavar="NAME", help="the model: llama-2-7b, llama-3-8b, llama-3.1-8b, …")
    add("--seeds", help="a grid: one run for each of these seeds, such as 0,1,2")
    add("--sweep", action="append", default=[], metavar="KEY=V,V", help="a grid: one run for each value of a key")
    add("--quick", action="store_true", help="the recipe's own short variant")
    add(
        "--max-forgetting",
        metavar="X",
        help="how much may be forgotten (budget.at_most): of the first KL of eval.retention in nats per token, or without one of the first metric; 'NQ kl=0.01,notes kl=0.05' or budget.measure names others",
    )
    add("--sequence", action="store_true", help="learn the tasks of several recipes one after the other")
    add(
        "--output-dir",
        help="where everything goes (default: runs/RECIPE, with --quick runs/RECIPE-quick)",
        complete=shtab.DIRECTORY,
    )
    add("--resume", action="store_true", help="continue an unfinished run")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
    add(
        "--dry-run",
        action="store_true",
        help="print the plan and make every check of a run; takes seconds, loads no weights",
    )
    add("--show-samples", type=int, metavar="N", help="print the first N training examples as the model sees them")
    _add_consent(add)
    add("--print-config", action="store_true", help="print the resolved recipe")
    add("--list", action="store_true", help="list the shipped recipes")


def _report(parser: Any) -> None:
    """Write report.md, report.html and forgetting.png for a run or a grid. For an unfinished run, write
    unfinished.html. Several folders are also compared on one page.
    """
    add = _adder(parser)
    add(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="folder of the page that compares several (default: comparison)",
        complete=shtab.DIRECTORY,
    )
    add("words", nargs="+", metavar="DIR", help="output folder of a run", complete=shtab.DIRECTORY)


def _init(parser: Any) -> None:
    """Calibrate, solve, and write DIR/adapter (a plain LoRA for the original model, for any trainer to continue) and
    DIR/init (for a recipe: method.init=DIR). A killed run continues where it was.
    """
    add = _adder(parser)
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write", complete=shtab.DIRECTORY)
    variants = "v2 (default): B = 0, train B alone; v1: train A and B; nb: train A and B, A kept in a null basis N"
    add("--variant", choices=("v1", "v2", "nb"), default="v2", help=variants)
    add("--null-multiple", type=float, help="nb: N has this many times r directions (default 4)")
    add("--null-energy", type=float, help="nb, instead: share of the inputs' energy outside N, such as 0.99")
    add("--start", choices=("zero", "residual"), help="nb: B = 0 (default), or v1's start")
    add("--rank", type=int, default=128, help="r (default 128)")
    add("--alpha", type=float, help="numerator of the scaling (default: the rank, s = 1)")
    add("--target-modules", default="all-linear", help="names separated by commas, a regex, or all-linear (default)")
    add("--no-cache", action="store_true", help="neither use nor fill the cache of initializations")
    add = _adder(parser.add_argument_group("model"))
    add("--model", required=True, help="hub id or local folder", complete=shtab.DIRECTORY)
    add("--revision", help="hub revision")
    add(
        "--dtype",
        choices=(*DTYPES, "auto"),
        default="auto",
        help="of the base; auto (default): bfloat16 where the device has instructions for it, else float32",
    )
    add("--quantization", choices=("nf4", "int8"), help="store the base's linears so (bitsandbytes)")
    add("--device", help="where layers run and are solved (default: the accelerator if there is one)")
    add("--low-memory", action="store_true", help="leave the weights in their files, read layer by layer")
    _add_calibration(_adder(parser.add_argument_group("calibration")))


def _add_calibration(add: Callable[..., None]) -> None:
    """Add what says which texts to keep, and how they are cut."""
    add(
        "--calibration",
        default="general",
        help="hub id, local file or folder of the texts to keep; general: the shipped mix (default); self: what the model "
        "itself writes",
        complete=shtab.FILE,
    )
    add("--split", default="train", help="split of a data set (default train); a single file is its own")
    add("--field", help="field that holds the text (default: found out)")
    add("--template", help="text made of a row's fields, such as 'Q: {question}'")
    add("--samples", type=int, default=256, help="number of windows (default 256)")
    add("--max-length", type=int, default=1024, help="tokens of a window, at most (default 1024)")
    add(
        "--mode",
        choices=("packed", "separate"),
        default="packed",
        help="texts joined and cut (default), or one text per window",
    )
    add("--seed", type=int, default=0, help="seed of what is drawn at random (default 0)")


def _form(name: str) -> str:
    if name not in FORMS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one{nearest(name, FORMS)}")
    return name


def strength(text: str) -> float:
    """Return a strength; raise an ArgumentTypeError for one that is no number from 0 to 2."""
    value = float(text)
    if not 0 <= value <= MAX_STRENGTH:
        raise argparse.ArgumentTypeError(
            f"a strength is a number from 0 (the base) to {MAX_STRENGTH:g}, 1 being as saved, not {value}"
        )
    return value


def strengths(text: str) -> list[float]:
    """Return "0,0.5,1" as numbers; raise an ArgumentTypeError where one is no number from 0 to 2."""
    found = []
    for word in text.split(","):
        try:
            found.append(strength(word))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word.strip()!r} is not a number, such as 0.5; give 0,0.5,1") from None
    return found


def weight(text: str) -> float:
    """Return a repair's weight; raise an ArgumentTypeError for one that float64 cannot add to another."""
    if (value := amount(text)) > MAX_WEIGHT:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_WEIGHT:g}, not {value:g}")
    return value


def amount(text: str) -> float:
    """Return how much may be forgotten; raise an ArgumentTypeError for what is no number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 0.01") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {value}")
    return value


def amounts(text: str) -> float | dict[str, float]:
    """Return how much may be forgotten: a number for every metric, or metric → number for "NQ kl=0.01,notes kl=0.05"."""
    try:
        allowed = by_metric(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if isinstance(allowed, dict):
        return {name: amount(number) for name, number in allowed.items()}
    return amount(allowed)


def _export(parser: Any) -> None:
    """Write what RUN/METHOD trained to a new folder with a model card. It is loaded again on a fresh base and its
    logits on real text are compared with the run's before the folder appears.
    """
    add = _adder(parser)
    add("--out", required=True, type=Path, help="folder to write", complete=shtab.DIRECTORY)
    add("--form", type=_form, default="adapter", help="adapter (default), merged or gguf")
    add("--rank", type=int, help="adapter, gguf: truncate to this rank by SVD")
    add("--dtype", choices=DTYPES, help="merged: dtype of the weights (default: as the base's files)")
    _add_source(add)
    add("--base-name", metavar="ID", help="hub id of the base, for the config and the card")
    add("--strength", type=strength, metavar="S", help="write ΔW times S; 1 is the adapter as saved")
    _add_budget(add, "write ΔW times the largest factor that forgets no more than X, measured")
    _add_questions(add)
    add("--license", metavar="ID", help="license of the base, where its card does not say")
    add(
        "--push-to-hub",
        metavar="ID",
        help="upload the folder to this repository afterwards: a new one is private, of an old one adapters and weights beside the folders are replaced",
    )


def _add_source(add: Any) -> None:
    """Add the trained adapter that a command works on, and what says which base it is of."""
    about = "one method of a run, or any PEFT LoRA"
    add("source", type=Path, metavar="RUN/METHOD", help=about, complete=shtab.DIRECTORY)
    add("--base", help="folder or hub id of the base, where the recipe's or the config's is no longer there")
    _add_trust(add)


def _add_trust(add: Any) -> None:
    """Add the consent that bases need which bring code of their own."""
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code that the base's repository ships, once you have read it",
    )


def _add_budget(add: Any, about: str) -> None:
    """Add how much may be forgotten, and by which metrics."""
    add("--max-forgetting", type=amounts, metavar="X", help=about)
    add(
        "--measure",
        action="append",
        metavar="NAME",
        help="--max-forgetting: a metric, several times for several, or all: the first of every entry (default: those of the "
        "run's budget, else the first KL, else the first metric)",
    )


def _add_consent(add: Any) -> None:
    """Add the consent that tasks need which run what the model writes."""
    add(
        ALLOW,
        nargs="?",
        default=False,
        choices=[JAILED, UNSAFE],
        metavar=UNSAFE,
        help="run the code that the model writes (HumanEval, MBPP), in a jail; with =unsafe under limits alone",
    )


def _add_questions(add: Any) -> None:
    """Add what says what to measure, where it is not a run's own recipe."""
    add(
        "--keep", metavar="FILE", help="measure on these questions with answers what is forgotten", complete=shtab.FILE
    )
    add("--learn", metavar="FILE", help="and on these what was learned", complete=shtab.FILE)
    add("--prompt", help="field of the question (default: found by its name)")
    add("--response", help="field of the answer (default: found by its name)")
    add("--template", help="alpaca, qa (default), plain, chat, or a text with {prompt}")
    add("--limit", type=int, help="first questions of every file only")
    _add_consent(add)


def _dial(parser: Any) -> None:
    """Evaluate an adapter with ΔW times 0 … 1.25, without retraining, and draw what is learned against what is
    forgotten. Writes RUN/METHOD/dial; `export --strength` and `--max-forgetting` write the adapter at one of them.
    """
    add = _adder(parser)
    about = f"factors by which ΔW is multiplied; 1 is the adapter as saved (default {STRENGTHS})"
    add("--strengths", type=strengths, default=STRENGTHS, metavar="S,S", help=about)
    _add_budget(add, "say which of them forgets no more than X")
    _add_source(add)
    add("--out", type=Path, help="folder in which `dial` is written (default: RUN/METHOD)", complete=shtab.DIRECTORY)
    _add_questions(add)


def _repair(parser: Any) -> None:
    """Compute from an adapter of any LoRA training one that leaves the texts to keep alone and does what was learned,
    of the same rank, without training. Writes DIR/adapter.
    """
    add = _adder(parser)
    add("--keep", metavar="PATH", help="texts to leave alone (default: the run's calibration)", complete=shtab.FILE)
    add("--data", metavar="PATH", help="what was learned (default: the run's training rows)", complete=shtab.FILE)
    about = "of the texts to keep, compared with what was learned; more keeps more (default 1)"
    add("--weight", type=weight, metavar="W", help=about)
    _add_budget(add, "or the smallest weight that forgets no more than X, measured by the run's own questions")
    _add_consent(add)
    _add_source(add)
    about = "folder to write (default: RUN/METHOD-repaired)"
    add("--out", type=Path, metavar="DIR", help=about, complete=shtab.DIRECTORY)


def _check(parser: Any) -> None:
    """Look at an adapter's keys, shapes, ranks, dtypes, config and base as PEFT and vLLM read them; no weights of the
    base are loaded. Exit status 1 where something is wrong.
    """
    add = _adder(parser)
    add("folder", type=Path, metavar="DIR", help="folder of an adapter, or RUN/METHOD", complete=shtab.DIRECTORY)
    add("--base", help="folder or hub id of the base (default: what the adapter's config names)")
    _add_trust(add)


def _judge(parser: Any) -> None:
    """Grade MT-Bench answers in FastChat's format; writes the judgments beside them and prints the scores. Run again,
    it goes on where it stopped. Exit status 1 where the endpoint fails.
    """
    for action in add_options(parser):
        action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


# Name → what adds its options, whose docstring is the description that --help prints, and its line in the list of commands.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "new": (_new, "write a recipe for your model and your data"),
    "train": (_train, "train and evaluate methods by a recipe"),
    "report": (_report, "write a run's report again"),
    "init": (_init, "write an initial adapter and its factors"),
    "export": (_export, "write what a run trained as an adapter, a merged model or a GGUF adapter"),
    "check": (_check, "say whether a folder is a sound adapter, and how to serve it"),
    "judge": (_judge, "grade MT-Bench answers with a judge model"),
    "dial": (_dial, "evaluate an adapter at several strengths (factors of its change ΔW)"),
    "repair": (_repair, "take out of a trained adapter what it does to the texts to keep"),
}
