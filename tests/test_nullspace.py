import numpy as np
import oracle
import pytest
import torch

from lora_null.nullspace import bottom_eigenspace


def inputs(d, n, decay=6.0, seed=0):
    """X (d, n) with singular values falling over `decay` decades, like real activations."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, min(d, n), generator=generator, dtype=torch.float64))
    S = torch.logspace(0, -decay, min(d, n), dtype=torch.float64)
    return U[:, : min(d, n)] * S @ V.T


def same_space(P, Q):
    return np.linalg.norm(P @ P.T - Q @ Q.T)


def test_eigh_matches_the_full_svd_of_x():
    X = inputs(48, 200, decay=4)
    found = bottom_eigenspace(X @ X.T, 7, solver="eigh")
    assert same_space(found.vectors.numpy(), oracle.null_space(X.numpy(), 7)) < 1e-7
    assert found.rank == 48


@pytest.mark.parametrize("decay", [1.0, 4.0, 6.0])
@pytest.mark.parametrize("d, r", [(256, 8), (400, 32), (512, 64)])
def test_krylov_leaks_no_more_than_the_full_svd(d, r, decay):
    X = inputs(d, 3 * d, decay)
    found = bottom_eigenspace(X @ X.T, r, solver="krylov")
    assert found.solver == "krylov"
    best = oracle.leak(oracle.null_space(X.numpy(), r).T, X.numpy())
    assert oracle.leak(found.vectors.T.numpy(), X.numpy()) <= 1.01 * best
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(r, dtype=torch.float64), atol=1e-10)


def test_auto_chooses_by_size():
    small, wide = inputs(64, 200, 3), inputs(512, 900, 3)
    assert bottom_eigenspace(small @ small.T, 8).solver == "eigh"
    assert bottom_eigenspace(wide @ wide.T, 8).solver == "krylov"
    assert bottom_eigenspace(wide @ wide.T, 200).solver == "eigh"


@pytest.mark.parametrize("solver", ["eigh", "krylov"])
def test_exact_null_space_larger_than_r_is_chosen_the_same_after_a_rotation_of_rounding(solver):
    X = inputs(400, 300, decay=2)
    gram = X @ X.T
    found = bottom_eigenspace(gram, 8, solver=solver)
    assert found.rank == 300 and found.exact
    assert oracle.leak(found.vectors.T.numpy(), X.numpy()) < 1e-10
    noise = torch.randn(400, 400, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1e-17
    again = bottom_eigenspace(gram + noise @ noise.T, 8, solver=solver)
    assert same_space(found.vectors.numpy(), again.vectors.numpy()) < 1e-6


def test_same_input_same_bits():
    X = inputs(400, 900)
    first, second = (bottom_eigenspace(X @ X.T, 16).vectors for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("gram, r", [(torch.eye(4), 0), (torch.eye(4), 5), (torch.zeros(4, 4), 2)])
def test_refuses_what_has_no_answer(gram, r):
    with pytest.raises(ValueError):
        bottom_eigenspace(gram.double(), r)


def test_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        bottom_eigenspace(torch.full((3, 3), float("nan"), dtype=torch.float64), 1)
