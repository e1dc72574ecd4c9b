"""Regressions of a chosen rank against their definition, in fp64."""

import pytest
import torch

from lightsft.export.reduced_rank import Sums, chosen, reduced_rank


def rows(number, inputs=12, outputs=9, *, rank=None, noise=0.5, seed=0):
    """x with correlated features, t = W x + noise, and W."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mix = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights = torch.Generator().manual_seed(8)
    w = torch.randn(outputs, rank or inputs, generator=weights, dtype=torch.float64)
    w = w if rank is None else w @ torch.randn(rank, inputs, generator=weights, dtype=torch.float64)
    x = draw(number, inputs) @ mix
    return x, x @ w.T + noise * draw(number, outputs), w


def sums_of(x, t):
    sums = Sums(x.shape[1], t.shape[1])
    for part in range(3):
        sums.add(x[part::3], t[part::3])
    return sums


def cost(x, t, d, ridge):
    return float((t - x @ d.T).square().sum() + ridge * x.square().sum(0).mean() * d.square().sum())


@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 9, 20])
def test_factors_are_those_of_the_definition(rank, ridge):
    """The truncated singular value decomposition of D M^1/2, D being the solution without a limit of the rank."""
    x, t, _ = rows(200)
    m = x.T @ x + ridge * x.square().sum(0).mean() * torch.eye(12, dtype=torch.float64)
    d = torch.linalg.solve(m, x.T @ t).T
    values, vectors = torch.linalg.eigh(m)
    root, back = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, vt = torch.linalg.svd(d @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ back
    b, a = reduced_rank(sums_of(x, t), rank, ridge)
    assert b.shape == (9, min(rank, 9))
    assert torch.allclose(b @ a, expected, rtol=1e-8, atol=1e-9)


def test_no_other_matrix_of_that_rank_costs_less():
    x, t, _ = rows(60)
    b, a = reduced_rank(sums_of(x, t), 2, 1e-2)
    least = cost(x, t, b @ a, 1e-2)
    truncated = torch.linalg.svd(torch.linalg.lstsq(x, t).solution.T, full_matrices=False)
    plain = (truncated.U[:, :2] * truncated.S[:2]) @ truncated.Vh[:2]
    assert least < cost(x, t, plain, 1e-2)  # of the solution itself, in another metric
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            nearby = (b + scale * torch.randn(b.shape, generator=generator, dtype=torch.float64)) @ (
                a + scale * torch.randn(a.shape, generator=generator, dtype=torch.float64)
            )
            assert least <= cost(x, t, nearby, 1e-2)


def test_the_error_is_that_of_the_rows():
    x, t, _ = rows(50)
    sums = sums_of(x, t)
    b, a = reduced_rank(sums, 3, 1e-2)
    assert sums.error(b, a) == pytest.approx(float((t - x @ (b @ a).T).square().sum()), rel=1e-9)
    assert sums.t == pytest.approx(float(t.square().sum()))
    assert sums.rows == 50


def test_a_map_of_a_lower_rank_is_found_with_that_rank():
    x, t, w = rows(100, rank=2, noise=0.0)
    found = chosen(sums_of(x[:80], t[:80]), sums_of(x[80:], t[80:]), 6)
    assert found.rank == 2
    assert torch.allclose(found.b @ found.a, w, atol=1e-6)
    assert found.error <= 1e-12 * found.held
    assert found.ridge == 1e-9


def test_the_ridge_is_that_of_the_least_error_on_rows_that_were_kept():
    """Few rows and much noise want a strong one; what is then fitted is fitted to all rows."""
    x, t, _ = rows(16, noise=20.0)
    others = rows(400, noise=20.0, seed=1)[:2]
    fit, held = sums_of(x, t), sums_of(*others)
    ridges = (1e-9, 1e-3, 1.0, 10.0)
    found = chosen(fit, held, 4, ridges)
    errors = {ridge: held.error(*reduced_rank(fit, 4, ridge)) for ridge in ridges}
    assert found.ridge == min(errors, key=errors.__getitem__) != 1e-9
    assert found.error == errors[found.ridge] < found.held
    both = reduced_rank(sums_of(torch.cat([x, others[0]]), torch.cat([t, others[1]])), 4, found.ridge)
    assert torch.allclose(found.b @ found.a, both[0] @ both[1])


def test_noise_gets_no_factors():
    x, t, _ = rows(15)
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    others = rows(300, seed=1)[0]
    other_noise = torch.randn(300, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = chosen(sums_of(x, noise), sums_of(others, other_noise), 4)
    assert found.rank == 0
    assert found.b.shape == (9, 0)
    assert found.error == found.held > 0


def test_inputs_of_zeros_get_no_factors():
    sums = Sums(4, 3)
    sums.add(torch.zeros(5, 4), torch.ones(5, 3))
    b, a = reduced_rank(sums, 2, 1e-2)
    assert (b.shape, a.shape) == ((3, 0), (0, 4))
