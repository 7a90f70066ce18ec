"""The reference algorithm that the benchmark times is the paper's: it finds the subspace and the factors that ours does."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lora_null.factors import null_factors
from lora_null.nullspace import bottom_eigenspace

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def init_benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("init")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("init", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def roofline(init_benchmark):
    yield importlib.import_module("roofline")
    sys.modules.pop("roofline", None)


def _counted(counter):
    """Without the angles of the positions, which transformers 5.17 still computes by a matrix product."""
    angles = [ops for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in angles)


def test_the_roofline_counts_what_torch_counts(roofline):
    """A forward pass and a step, by torch's own count, which has attention without its causal half."""
    model = tiny_model(attn_implementation="eager")
    shape = roofline.Shape(layers=2, width=32, inner=48, kv=16, vocabulary=101)
    ids = torch.randint(4, 101, (3, 20))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.model(input_ids=ids)
    attention = 2 * shape.layers * 60 * 20 * 32  # of each half, causal and other
    assert _counted(forward) == shape.layers * roofline._forward(shape, 60, 20) + attention
    with FlopCounterMode(display=False) as step:
        model(input_ids=ids).logits.sum().backward()
    machine = roofline.Machine(model=1.0, float32=1.0, float64=1.0, memory=1.0)
    assert _counted(step) == pytest.approx(60 / roofline.step(shape, machine, 20, 4)["full"] + 3 * attention)


def test_the_floors_of_a_7b_model_are_those_of_the_data_sheet(roofline):
    found = roofline.initialization(roofline.SHAPES["7B"], roofline.H100, *roofline.CALIBRATION)
    assert found["read"] == pytest.approx(2 * (6.476e9 + 131e6) / 5e9, rel=0.01)  # its parameters but the head's
    assert found["forward"] == pytest.approx(2 * 6.476e9 * 262144 / 989e12, rel=0.05)
    row = {"parts": {"calibrate": 20.0, "solve": 3.0}, "walk_without_grams": 12.0}
    assert roofline.beside(found, row, 5.0)["Grams"] == (found["Grams"] + found["float64 sums"], 8.0)


def test_the_floor_is_that_of_the_size_that_was_measured(init_benchmark, roofline, monkeypatch, capsys, tmp_path):
    arguments = ["init.py", "--quick", "--contenders", "forward,ours", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    init_benchmark.main()
    results = json.loads((tmp_path / "init.json").read_text())
    machine = roofline.Machine(model=1e6, float32=1e6, float64=1e6, memory=1e6, crossover=roofline.CPU)
    monkeypatch.setattr(roofline, "this_cpu", lambda: machine)
    roofline._print_measured(results)
    floor = re.search(r"forward +([\d.]+)", capsys.readouterr().out.rpartition("floor s")[2])[1]
    shape = roofline.Shape(layers=1, width=128, inner=544, kv=128)
    assert floor == f"{roofline._forward(shape, 2 * 64, 64) / 1e6:.1f}"
    results["machine"]["measured_on"] = "NVIDIA H200"
    with pytest.raises(SystemExit, match="not of this CPU"):
        roofline._print_measured(results)


def test_the_reference_finds_our_factors(init_benchmark):
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 400, dtype=torch.float64)
    X = torch.randn(400, 900, generator=generator, dtype=torch.float64) * scales[:, None]
    weight = torch.randn(60, 400, generator=generator, dtype=torch.float64)
    A, B = init_benchmark.reference_factors(weight, X @ X.T, 16)
    found = bottom_eigenspace(X @ X.T, 16, solver="krylov")
    ours = null_factors(weight, found.vectors, 1.0)
    assert torch.dist(B @ A, ours.B @ ours.A) < 0.05 * torch.linalg.matrix_norm(B @ A)
    theirs, mine = (torch.linalg.matrix_norm(F @ X) / torch.linalg.matrix_norm(F) for F in (A, ours.A))
    assert mine <= 1.01 * theirs
