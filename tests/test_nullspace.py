import numpy as np
import oracle
import pytest
import torch

from lora_null.nullspace import EXCESS, bottom_eigenspace, outer_eigenspace


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


@pytest.mark.parametrize("level", [1e-14, 3e-13, 1e-11])
def test_both_solvers_count_the_same_directions_as_empty(level):
    """480 eigenvalues of 1, 40 far below: between d·ε·λ_max = 1.2e-13 and d·ε·‖C‖_F = 2.5e-12 the solvers differed."""
    Q, _ = torch.linalg.qr(torch.randn(520, 520, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    gram = (Q * torch.ones(520).double().masked_fill(torch.arange(520) < 40, level)) @ Q.T
    gram = (gram + gram.T) / 2
    values = np.linalg.eigvalsh(gram.numpy())
    rank = int((values > 520 * np.finfo(np.float64).eps * np.sqrt((values**2).sum())).sum())
    for solver in ("eigh", "krylov"):
        found = bottom_eigenspace(gram, 8, solver=solver)
        assert (found.solver, found.rank, found.exact) == (solver, rank, rank == 480)
    assert outer_eigenspace(gram, 0.5).rank == rank


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


def tail_of(kind, count, generator):
    """Eigenvalues around 1 as they lie where a Krylov space of narrow blocks misses some of them."""
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    steps = torch.tensor([1.0, 1.3, 1.6], dtype=torch.float64).repeat_interleave(-(-count // 3))[:count]
    return {
        "flat": torch.ones(count, dtype=torch.float64),
        "nearly flat": 1 + 1e-3 * noise,
        "5%": 1 + 0.05 * noise,
        "20%": (1 + 0.2 * noise).abs(),
        "steps": steps,
        "one below": torch.cat([steps[:1] * 0.1, torch.ones(count - 1, dtype=torch.float64)]),
        "even": torch.linspace(0.01, 2, count, dtype=torch.float64),
    }[kind]


@pytest.mark.parametrize("kind", ["flat", "nearly flat", "5%", "20%", "steps", "one below", "even"])
@pytest.mark.parametrize("d, r, tail, level", [(512, 64, 150, 1e-5), (560, 16, 300, 1e-7), (600, 40, 60, 1e-2)])
def test_flat_tails_leak_no_more_than_one_percent_above_the_least(kind, d, r, tail, level):
    generator = torch.Generator().manual_seed(d)
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    head = torch.logspace(0, np.log10(level) + 0.5, d - tail, dtype=torch.float64)
    values = torch.cat([head, level * tail_of(kind, tail, generator)])
    gram = (Q * values) @ Q.T
    found = bottom_eigenspace((gram + gram.T) / 2, r)
    caught = np.trace(found.vectors.T.numpy() @ gram.numpy() @ found.vectors.numpy())
    least = np.linalg.eigvalsh(gram.numpy())[:r].sum()
    assert caught <= (1 + EXCESS) * least
    assert found.rank == d and not found.exact


def test_an_eigenvalue_that_is_missing_is_noticed():
    from lora_null.nullspace import _count_below, _is_complete

    Q, _ = torch.linalg.qr(torch.randn(90, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.linspace(1, 10, 90, dtype=torch.float64) / 100
    gram = (Q * values) @ Q.T
    for level in (0.005, 0.0105, 0.033, 0.0999, 0.11):
        assert _count_below(gram, level) == int((values < level).sum())
    assert _is_complete(gram, values[:20], Q[:, :20])
    for missing in (0, 7, 15):
        others = [i for i in range(21) if i != missing]
        assert not _is_complete(gram, values[others], Q[:, others])
        turned = Q[:, others] + 1e-6 * Q[:, 30:50]  # nearly the eigenvectors
        assert not _is_complete(gram, values[others], torch.linalg.qr(turned)[0])
