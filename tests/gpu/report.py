"""What `run.py` found, as Markdown for a README and a picture: each claim, its target, what was measured, on which card.

python tests/gpu/report.py DIR…          # writes DIR/report.md and DIR/progress.png of the first, and prints the table
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "benchmarks")]

import common  # noqa: E402
import roofline  # noqa: E402

TITLES = {
    "a": "correctness",
    "b": "initialization",
    "c": "a training step",
    "d": "a 4-bit base",
    "e": "FSDP2 and ZeRO-3",
    "f": "generation",
    "g": "the study",
}
COLORS = {"done": common.COLORS[2], "failed": "#c0392b", "cut": common.COLORS[1], "skipped": "#b8bec8"}
# Dense bfloat16 peaks in FLOP/s, from the makers' data sheets, by a part of the card's name.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
TARGETS = {"v1": 1.02, "v2": 0.85, "nb": 1.05}
LAYERS_70B = 80
Line = tuple[str, str, str, bool | None]  # claim, target, measured, whether it holds


def read(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return every step's JSON, in order of parts."""
    found = []
    for folder in folders:  # a card each
        own = [json.loads(path.read_text()) for path in sorted(folder.glob("?/*/step.json"))]
        done = {step["step"]: step["result"]["cases"]["whole"]["rows"] for step in own if _is_whole(step)}
        if {"7b-whole", "7b-paper"} <= done.keys():
            done["7b-whole"]["reference"] = done["7b-paper"]["reference"]
        found += own
    return sorted(found, key=lambda step: (step["part"], step["order"]))


def _is_whole(step: dict[str, Any]) -> bool:
    return step["status"] == "done" and step["step"] in ("7b-whole", "7b-paper")


def lines_of(step: dict[str, Any]) -> Iterator[Line]:
    """Return the lines of one step for the table."""
    if step["status"] != "done":
        said, holds = ("failed", False) if step["status"] == "failed" else ("not run", None)
        yield f"{TITLES[step['part']]}: {step['step']}", "", f"{said}: {step['reason']}", holds
    if not step.get("result") or step["status"] == "cut":
        return
    readers: dict[str, Callable[[dict[str, Any]], Iterator[Line]]] = {
        "a": _suite, "b": _initialization, "c": _steps, "d": _steps, "e": _engines, "f": _generation, "g": _study,
    }  # fmt: skip
    yield from readers[step["part"]](step)


def _suite(step: dict[str, Any]) -> Iterator[Line]:
    found = step["result"]
    total = found["passed"] + len(found["failed"])
    yield "tests on the accelerator that pass", f"{total}", f"{found['passed']}", not found["failed"]
    for name, message in found["failed"].items():
        yield f"{name}", "", message.splitlines()[0] if message else "failed", False


def _initialization(step: dict[str, Any]) -> Iterator[Line]:
    if "runs" in step["result"]:
        runs = list(step["result"]["runs"].items())
        (few, one), (many, more) = runs[0], runs[-1]
        layer = (more["seconds"] - one["seconds"]) / (int(many) - int(few))
        yield (
            "70B shape from files, a layer",
            "",
            f"{layer:.1f} s, {LAYERS_70B} of them {layer * LAYERS_70B / 60:.1f} min (extrapolated)",
            None,
        )
        on_card = "accelerator_peak" in more
        peak = more["accelerator_peak"] if on_card else more["anonymous"] - more["kept"]
        where = "GPU memory" if on_card else "memory beside what is kept"
        yield f"70B shape from files, peak {where}", "", f"{peak / 2**30:.1f} GiB", None
        return
    whole = step["step"] == "7b-whole"
    for found in step["result"]["cases"].values():
        ours, forward, paper = (found["rows"].get(name) for name in ("ours", "forward", "reference"))
        if ours is None:
            continue  # the paper's algorithm alone: told beside ours
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["parts"].items())
        name = "7B shape, whole" if whole else "a 7B layer"
        yield (
            f"{name}: seconds",
            "≤ 60 (one H100)" if whole else "",
            f"{ours['seconds']:.1f} ({parts}){_floors(step) if whole else ''}",
            ours["seconds"] <= 60 if whole else None,
        )
        yield f"{name}: × the bare forward pass", "", f"{ours['seconds'] / forward['seconds']:.2f}", None
        if paper is not None:
            times = paper["seconds"] / ours["seconds"]
            said = " (the paper's from one linear of each shape, extrapolated)" * bool(paper.get("extrapolated_from"))
            yield f"{name}: faster than the paper's algorithm", "≥ 50 ×", f"{times:.0f} ×{said}", times >= 50
        yield f"{name}: peak above the model", "", f"{ours['peak_gib']:.1f} GiB", None


def _floors(step: dict[str, Any]) -> str:
    """Say what an H100 needs at least for the whole 7B shape (the H200 multiplies as fast), where this is one."""
    if not any(card in step["machine"]["measured_on"] for card in ("H100", "H200")):
        return ""
    found = roofline.initialization(roofline.SHAPES["7B"], roofline.H100, *roofline.CALIBRATION)
    solve = found["solve"] + found["factors"]
    calibrate = sum(found.values()) - solve - found["read"] - found["write"]
    return f"; an H100's floor: calibrate {calibrate:.1f}, solve {solve:.1f}"


def _steps(step: dict[str, Any]) -> Iterator[Line]:
    found = step["result"]
    form = {"compiled": "torch.compile", "flash-attention": "FlashAttention"}.get(step["step"], "")
    form = ", ".join(filter(None, ["4-bit" if step["part"] == "d" else "", form]))
    layers = found["setting"]["layers"]
    for case, rows in found["summary"].items():
        for name, row in rows.items():
            if name == "lora" and step["step"] not in ("lora-again", "compiled", "flash-attention"):
                continue
            ratio, target = row["ratio_to_lora"], TARGETS.get(name)
            words = [
                f"{ratio['median']:.3f} ({ratio['q1']:.3f}–{ratio['q3']:.3f})",
                f"{row['tokens_per_second']:,.0f} tokens/s",
            ]
            words += [f"MFU {share:.0%}" for share in _mfu(step, name, row)]
            if row["memory_bytes"]:
                words.append(f"{row['memory_bytes']['peak'] / 2**30:.1f} GiB")
            yield (
                f"{name}, {case}{', ' + form if form else ''}, {layers} layers: × LoRA's step",
                f"≤ {target}" if target else "",
                ", ".join(words),
                ratio["median"] <= target if target else None,
            )


def _mfu(step: dict[str, Any], name: str, row: dict[str, Any]) -> list[float]:
    """Return the model FLOP utilization: 6 FLOPs a parameter and token, 4 where the base's gradients are not computed."""
    peak = next((peak for card, peak in PEAKS.items() if card in step["machine"]["measured_on"]), None)
    parameters = step["result"].get("base_parameters")
    if peak is None or not parameters:
        return []
    return [(6 if name == "full" else 4) * parameters * row["tokens_per_second"] / peak]


def _engines(step: dict[str, Any]) -> Iterator[Line]:
    found = step["result"]
    for method, distance in found["methods"].items():
        name = f"{found['engine']}, {found['processes']} processes, {method}: end weights against one process"
        yield name, "≤ 1e-4", f"{distance:.1e}", distance <= 1e-4


def _generation(step: dict[str, Any]) -> Iterator[Line]:
    found = step["result"]
    if "lm_eval_clock" not in found:
        yield "vLLM, the same documents", "", f"{found['own_clock']:.1f} s by its own clock", None
        return
    ratio, seconds = found["seconds"] / found["lm_eval_seconds"], found["seconds"]
    text = f"{ratio:.2f} ({seconds:.1f} s for {found['documents']} documents, imports and loading included)"
    yield "generation: whole command ÷ the lm_eval command", "≤ 1", text, ratio <= 1
    yield (
        "generation: scores equal lm_eval's",
        "yes",
        str(all(found["scores_equal"].values())).lower(),
        all(found["scores_equal"].values()),
    )


def _study(step: dict[str, Any]) -> Iterator[Line]:
    found = step["result"]
    for run in found.get("runs") or found.get("rows") or []:
        row = run.get("row", run)
        metrics = row.get("metrics") or {}
        text = ", ".join(f"{name} {metric['value']:.4g}" for name, metric in metrics.items())
        if text:
            yield f"study, {row.get('method', '')}", "", text, None
    for name in found["missing"]:
        yield f"study, {name}", "", "not run: not in the table of methods", None


def table(steps: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown, a table for each card and kind of run."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for step in steps:
        facts = step["machine"]
        groups.setdefault(
            (step["toy"], facts["measured_on"], facts["torch"], facts["transformers"], step["date"][:10]), []
        ).append(step)
    text = []
    for (toy, card, torch_version, transformers, date), members in groups.items():
        head = f"**{card}**, {date}, torch {torch_version}, transformers {transformers}"
        note = (
            "\n\nToy sizes on a CPU: this shows that every part runs. None of these numbers says anything about a GPU."
            if toy
            else ""
        )
        rows = [
            (*line[:3], None if toy and step["part"] in "bcdf" else line[3])
            for step in members
            for line in lines_of(step)
        ]
        marks = {True: "yes", False: "**no**", None: ""}
        body = [f"| {_cell(a)} | {_cell(b)} | {_cell(c)} | {marks[step_ok]} |" for a, b, c, step_ok in rows]
        text.append("\n".join([head + note, "", "| | target | measured | holds |", "|:--|:--|:--|:--|", *body]))
    return "\n\n".join(text) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def draw(steps: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the seconds of every step, colored by what became of it; where it was not run, the reason."""
    figure, axes = common.panels(1, 1, (10, 1.4 + 0.28 * len(steps)), _title(steps))
    axis = axes[0][0]
    names = [f"({step['part']}) {step['step']}" for step in steps]
    seconds = [step.get("seconds", 0.0) for step in steps]
    axis.barh(names, seconds, color=[COLORS[step["status"]] for step in steps])
    for place, step in enumerate(steps):
        text = f"{step['seconds']:.0f} s" if step["status"] == "done" else f"{step['status']}: {step['reason']}"
        axis.annotate(text[:90], (seconds[place], place), (4, 0), textcoords="offset points", va="center", size=7)
    axis.set_xlim(0, 1.9 * max([*seconds, 1.0]))
    axis.set_xlabel("seconds")
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    common.save_picture(figure, path)


def _title(steps: Sequence[dict[str, Any]]) -> str:
    facts = steps[0]["machine"]
    return common.headline(facts) + (" · toy sizes, measures nothing" if steps[0]["toy"] else "")


def write(folders: Sequence[Path]) -> str:
    """Write the report and the picture into the first folder; return the report."""
    steps = read(folders)
    if not steps:
        raise SystemExit(f"{', '.join(map(str, folders))}: no step.json of tests/gpu/run.py is there")
    text = table(steps)
    (folders[0] / "report.md").write_text(text)
    draw(steps, folders[0] / "progress.png")
    return text


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    print(write([Path(word) for word in sys.argv[1:]]))
