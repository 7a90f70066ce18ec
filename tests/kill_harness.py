"""Kill a run at random points, resume it, kill it again: what it ends in must be what an unbroken run ends in.

    python tests/kill_harness.py --kills 40 --out kills.json

Half of the kills come from outside, SIGKILL at a random time. The other half come from within, just before or just after
a random one of the calls that move, flush or write a file, so that half-written states are met and not only the long
stretches between them. Runs are forked, one at a time, from a process that has imported everything and done nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

METHODS = ("lora", "pissa", "roselora", "lora-null-v1", "lora-null-v2")
WRITES = (("os", "replace"), ("os", "fsync"), ("os", "link"), ("torch", "save"), ("safetensors.torch", "save_file"))

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["lora_null.recipes.__main__", "lora_null.recipes.run", "lora_null.recipes.grid"])


def run(recipe: Path, out: Path, *words: str, kill_after: float | None = None, kill_at: int | None = None) -> int:
    """Run the command in a forked process; return its exit status, -9 where it was killed.

    Args:
        recipe: the YAML.
        out: the output folder.
        words: more of the command line.
        kill_after: seconds after which to kill from outside.
        kill_at: kill from within at this one of the process's writes, before it (even) or after it (odd).
    """
    words = [str(recipe), "--output-dir", str(out), *words]
    child = FORK.Process(target=_command, args=(words, out.parent / "log.txt", kill_at))
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    child.join()
    return child.exitcode


def _command(words: list[str], log: Path, kill_at: int | None) -> None:
    from lora_null.recipes.__main__ import main

    gc.freeze()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    writes = Writes(kill_at)
    try:
        sys.exit(main(words))
    finally:
        sys.stdout.flush()
        (log.parent / "writes.txt").write_text(str(writes.count))


class Writes:
    """Counts the calls that write to disk, and kills its own process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self.kill_at = 0, kill_at
        for module, name in WRITES:
            self._wrap(importlib.import_module(module), name)
        from lora_null.utils import files

        files.save_file = sys.modules["safetensors.torch"].save_file

    def _wrap(self, module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            result = plain(*args, **kwargs)
            self._tick()
            return result

        setattr(module, name, counted)

    def _tick(self) -> None:
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def outcome(out: Path) -> dict[str, str]:
    """Return what must be the same: a hash of every adapter, and of the figures in results.json."""
    found = {
        str(path.relative_to(out)): _sha(path.read_bytes()) for path in sorted(out.glob("*/adapter/*.safetensors"))
    }
    results = json.loads((out / "results.json").read_text())
    rows = [{key: row[key] for key in ("method", "metrics", "drift", "trainable_params")} for row in results["rows"]]
    return found | {"results.json": _sha(json.dumps(rows, sort_keys=True).encode())}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def phase(out: Path) -> str:
    """Say what a killed run was doing, from what it left."""
    if not (out / "recipe.yaml").is_file():
        return "before the folder was taken"
    if (out / "results.json").is_file():
        return "report"
    if not (out / "base" / "eval.json").is_file():
        return "base evaluation"
    begun = [name for name in METHODS if (out / name).is_dir()]
    if not begun:
        return "between methods"
    last = max(begun, key=METHODS.index)
    folder = out / last
    if (folder / "row.json").is_file():
        return f"{last}: finished"
    if (folder / "adapter").is_dir():
        return f"{last}: evaluation"
    steps = [path for path in folder.glob("checkpoint-*") if not (path / "complete.json").is_file()]
    if steps:
        return f"{last}: checkpointing"
    return f"{last}: training" if (folder / "train_log.jsonl").is_file() else f"{last}: initialization"


def _is_finished(out: Path) -> bool:
    return (out / "report.html").is_file() and (out / "results.json").is_file()


def harness(recipe: Path, scratch: Path, kills: int, seed: int = 0, kills_a_run: int = 4) -> dict[str, Any]:
    """Run unbroken once, then broken `kills` times in all, each run up to `kills_a_run` times before it may end.

    Returns:
        `unbroken` (the outcome), `points` (what was killed, how, in which phase), `ends` (of each broken run: "equal",
        or what differs).
    """
    first = FORK.Process(
        target=sys.exit
    )  # the server's imports are no part of a run: no blow is to fall after its end
    first.start()
    first.join()
    start = time.perf_counter()
    assert run(recipe, scratch / "unbroken") == 0, (scratch / "log.txt").read_text()[-2000:]
    whole, seconds = outcome(scratch / "unbroken"), time.perf_counter() - start
    writes = int((scratch / "writes.txt").read_text())
    draw, points, ends = random.Random(seed), [], []
    while len(points) < kills:
        out = scratch / f"broken{len(ends)}"
        for _ in range(min(kills_a_run, kills - len(points))):
            how = (
                {"kill_after": draw.uniform(0.05, seconds)}
                if draw.random() < 0.5
                else {"kill_at": draw.randrange(writes)}
            )
            if _is_finished(out) or (status := run(recipe, out, "--resume", **how)) != -signal.SIGKILL:
                break  # it ended before the blow
            points.append({**how, "status": status, "phase": phase(out)})
        status = 0 if _is_finished(out) else run(recipe, out, "--resume")
        found = outcome(out) if status == 0 else {}
        differing = [name for name in whole if found.get(name) != whole[name]]
        ends.append("equal" if not differing else f"status {status}, differs in {', '.join(differing)}")
    return {"unbroken": whole, "seconds": seconds, "writes": writes, "points": points, "ends": ends}


def main() -> int:
    """Print the log of the kills; return 1 when a broken run ended in something else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from world import make_world

    with tempfile.TemporaryDirectory() as folder:
        recipe = make_world(Path(folder), method={"name": ",".join(METHODS), "rank": 4})
        found = harness(recipe, Path(folder), arguments.kills, arguments.seed)
    for number, point in enumerate(found["points"], 1):
        how = f"after {point['kill_after']:.2f} s" if "kill_after" in point else f"at write {point['kill_at']}"
        print(f"{number:3}  {how:16} {point['phase']}")
    print(dict(Counter(point["phase"].split(": ")[-1] for point in found["points"])))
    print(f"{len(found['points'])} kills, {len(found['ends'])} runs:", dict(Counter(found["ends"])))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    return int(any(end != "equal" for end in found["ends"]))


if __name__ == "__main__":
    sys.exit(main())
