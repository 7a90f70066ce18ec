import numpy as np
import oracle
import pytest
import torch

from lora_null.factors import leakage, null_factors


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    X = torch.randn(30, 26, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 26, dtype=torch.float64)
    return W, X, torch.from_numpy(np.ascontiguousarray(oracle.null_space(X.numpy(), 6)))


@pytest.mark.parametrize("s", [1.0, 0.25, 2.0])
def test_factors_are_those_of_the_full_svd(case, s):
    W, X, U = case
    found = null_factors(W, U, s)
    T = oracle.projection(W.numpy(), X.numpy(), 6)
    A0, B0 = oracle.factors(T, 6, s)
    signs = np.sign(np.sum(A0 * found.A.numpy(), axis=1))
    assert np.abs(s * (found.B @ found.A).numpy() - T).max() < 1e-10
    assert np.abs(found.A.numpy() - signs[:, None] * A0).max() < 1e-8
    assert np.abs(found.B.numpy() - signs * B0).max() < 1e-8


def test_theorem_1_the_rows_of_a_span_the_null_space(case):
    W, _, U = case
    A = null_factors(W, U, 1.0).A
    assert torch.linalg.matrix_norm(A - A @ U @ U.T) < 1e-10
    assert torch.linalg.matrix_rank(A) == 6


def test_statistics(case):
    W, X, U = case
    found = null_factors(W, U, 0.5)
    T = oracle.projection(W.numpy(), X.numpy(), 6)
    S = np.linalg.svd(T, compute_uv=False)
    assert found.energy == pytest.approx(np.linalg.norm(T) ** 2 / np.linalg.norm(W.numpy()) ** 2)
    assert found.condition == pytest.approx(S[0] / S[5])
    assert leakage(W[:6], X @ X.T) == pytest.approx(oracle.leak(W[:6].numpy(), X.numpy()))


def test_signs_do_not_depend_on_the_basis_of_the_null_space(case):
    W, _, U = case
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    one, other = null_factors(W, U, 1.0), null_factors(W, U @ rotation, 1.0)
    assert torch.allclose(one.A, other.A, atol=1e-9) and torch.allclose(one.B, other.B, atol=1e-9)
