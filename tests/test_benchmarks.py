"""The reference algorithm that the benchmark times is the paper's: it finds the subspace and the factors that ours does."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

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
