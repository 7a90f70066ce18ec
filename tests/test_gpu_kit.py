"""tests/gpu/run.py end to end at toy size, and what it does with cuts, failures and machines that cannot."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

KIT = Path(__file__).parent / "gpu"
OWN = ("run", "report", "step", "common", "roofline")


@pytest.fixture(scope="module")
def kit():
    before = list(sys.path)
    sys.path.insert(0, str(KIT))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path[:] = before
        for name in OWN:
            sys.modules.pop(name, None)


def found_in(folder):
    return {
        (one["part"], one["step"]): one
        for one in map(json.loads, (p.read_text() for p in folder.glob("?/*/step.json")))
    }


def test_all_parts_at_toy_size(tmp_path):
    command = [sys.executable, str(KIT / "run.py"), "--toy", "--minutes", "20", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = found_in(tmp_path)
    assert ran.returncode == 0, [
        (key, one["reason"]) for key, one in found.items() if one["status"] == "failed"
    ] or ran.stderr
    assert {part for (part, _), one in found.items() if one["status"] == "done"} == set("abcdefg")
    assert all(one["toy"] and one["machine"]["measured_on"] == "cpu" for one in found.values())
    assert all(one["reason"] for one in found.values() if one["status"] == "skipped")
    assert found["a", "suite"]["result"]["passed"] >= 8
    assert found["e", "fsdp2-2"]["result"]["methods"]["lora-null-v2"] < 1e-4
    report = (tmp_path / "report.md").read_text()
    assert "None of these numbers says anything about a GPU" in report and "not run: has no toy size" in report
    assert (tmp_path / "progress.png").stat().st_size > 10_000
    for picture in ("b/7b-layer/init.png", "b/70b-from-files/memory.png", "c/adapters/step.png", "d/nf4/step.png"):
        assert (tmp_path / picture).is_file()


def step(kit, name, code, seconds=20, lacking=None):
    return kit.Step(
        "a", name, seconds, lacking, ["-c", code], lambda folder: {"passed": 1, "failed": {}, "skipped": {}}
    )


def run(kit, tmp_path, steps, *words):
    return kit.main(["--out", str(tmp_path), *words], lambda machine: steps)


def test_a_cut_run_goes_on_and_repeats_nothing(kit, tmp_path, monkeypatch):
    mark = tmp_path / "marks"
    clock = [0.0, 55.0, 60.0]  # before, after one and after two steps have begun: the second has 5 s of a minute
    begun = lambda: len(mark.read_text()) if mark.exists() else 0  # noqa: E731
    monkeypatch.setattr(kit, "time", SimpleNamespace(monotonic=lambda: clock[min(begun(), 2)]))
    write = f"open({str(mark)!r}, 'a').write('x')"
    first = [
        step(kit, "one", write),
        step(kit, "two", f"{write}; import time; time.sleep(30)"),
        step(kit, "three", write),
    ]
    assert run(kit, tmp_path, first, "--minutes", "1") == 0
    found = found_in(tmp_path)
    assert found["a", "one"]["status"] == "done" and found["a", "two"]["status"] == "cut"
    assert ("a", "three") not in found and mark.read_text() == "xx"
    assert "the minutes were over" in (tmp_path / "report.md").read_text()
    second = [first[0], step(kit, "two", f"{write}; import time; time.sleep(30)"[: len(write)]), first[2]]
    assert run(kit, tmp_path, second) == 0
    assert mark.read_text() == "xxxx" and {one["status"] for one in found_in(tmp_path).values()} == {"done"}
    assert run(kit, tmp_path, second) == 0 and mark.read_text() == "xxxx"


def test_a_step_that_fails_or_cannot_run_says_why(kit, tmp_path):
    mark = tmp_path / "marks"
    steps = [
        step(kit, "fails", f"open({str(mark)!r}, 'a').write('x'); raise SystemExit('out of memory')"),
        step(kit, "hangs", "import time; time.sleep(60)", seconds=1),
        step(kit, "lacks", "raise SystemExit(1)", lacking="vllm is not installed"),
        step(kit, "goes on", "pass"),
    ]
    assert run(kit, tmp_path, steps) == 1
    found = {name: (one["status"], one["reason"]) for (_, name), one in found_in(tmp_path).items()}
    assert found == {
        "fails": ("failed", "exit status 1: out of memory"),
        "hangs": ("failed", "took more than 1 s"),
        "lacks": ("skipped", "vllm is not installed"),
        "goes on": ("done", None),
    }
    assert run(kit, tmp_path, steps) == 0 and mark.read_text() == "x"
    assert run(kit, tmp_path, steps, "--again") == 1 and mark.read_text() == "xx"
    text = (tmp_path / "report.md").read_text()
    assert "failed: exit status 1: out of memory | **no** |" in text and "not run: vllm is not installed" in text


def test_without_a_gpu_nothing_is_measured(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(kit.torch.cuda, "is_available", lambda: False)
    assert kit.main(["--out", str(tmp_path)]) == 0
    found = found_in(tmp_path)
    assert {one["status"] for one in found.values()} == {"skipped"} and {part for part, _ in found} == set("abcdefg")
    assert "no GPU is here (--toy runs it at toy size on the CPU)" in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit):
        kit.main(["--out", str(tmp_path), "--part", "a,x"])


@pytest.mark.parametrize("memory, layers", [(140, 22), (80, 12), (24, 2), (8, 1)])
def test_what_fits_on_the_card_is_taken(kit, memory, layers):
    machine = kit.Machine("cuda", memory, 1, False, None)
    (one,) = (one for one in kit.steps(machine) if (one.part, one.name) == ("c", "adapters"))
    assert abs(int(one.command[one.command.index("--layers") + 1]) - layers) <= 1
    assert (one.lacking is None) == (memory >= 16)


def test_the_table_of_a_card(kit, tmp_path):
    """With what an H100 might give: targets, MFU and the extrapolation are said as they are."""
    facts = {"measured_on": "NVIDIA H100 80GB HBM3", "torch": "2.11", "transformers": "5.17"}
    common = {
        "toy": False,
        "status": "done",
        "reason": None,
        "machine": facts,
        "date": "2026-01-02T00:00:00",
        "order": 0,
    }
    row = {"tokens_per_second": 20000.0, "memory_bytes": {"peak": 40 * 2**30}}
    rows = {
        name: row | {"ratio_to_lora": {"q1": r - 0.01, "median": r, "q3": r + 0.01}}
        for name, r in (("lora", 1.0), ("v2", 0.9))
    }
    training = {"setting": {"layers": 32}, "base_parameters": 6_600_000_000, "summary": {"bf16": rows}}
    forward, ours = {"seconds": 11.0}, {"seconds": 40.0, "parts": {"calibrate": 30.0, "solve": 10.0}, "peak_gib": 5.0}
    paper = {"seconds": 3000.0, "extrapolated_from": 3}
    whole = {"cases": {"whole": {"rows": {"forward": forward, "ours": ours}}}}
    theirs = {"cases": {"whole": {"rows": {"forward": forward, "reference": paper}}}}
    memory = {
        "runs": {"1": {"seconds": 10.0, "accelerator_peak": 2**33}, "3": {"seconds": 22.0, "accelerator_peak": 2**33}}
    }
    steps = [
        common | {"part": "b", "step": "7b-whole", "result": whole},
        common | {"part": "b", "step": "70b-from-files", "result": memory},
        common | {"part": "b", "step": "7b-paper", "result": theirs},
        common | {"part": "c", "step": "adapters", "result": training},
    ]
    for one in steps:
        place = tmp_path / one["part"] / one["step"]
        place.mkdir(parents=True)
        (place / "step.json").write_text(json.dumps(one))
    text = kit.report.table(kit.report.read([tmp_path]))
    assert text.startswith("**NVIDIA H100 80GB HBM3**, 2026-01-02, torch 2.11")
    assert "40.0 (calibrate 30.0, solve 10.0); an H100's floor: calibrate 7.8, solve 1.4 | yes |" in text
    assert "| ≥ 50 × | 75 × (the paper's from one linear of each shape, extrapolated) | yes |" in text
    assert "6.0 s, 80 of them 8.0 min (extrapolated)" in text
    assert (
        "| v2, bf16, 32 layers: × LoRA's step | ≤ 0.85 | 0.900 (0.890–0.910), 20,000 tokens/s, MFU 53%, 40.0 GiB | **no** |"
        in text
    )
