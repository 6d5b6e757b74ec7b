import itertools

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_named
from mhc_compile.kernels.spec import SiteSpec

STOCHASTIC = [name for name, kind in CONSTRAINTS.items() if kind.doubly_stochastic]


def _logits(name: str, n: int, tokens: int, std: float, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(tokens, constraint_named(name).logits(n)) * std).to(dtype)


def _matrix(name: str, n: int, logits: torch.Tensor, iters: int = 20) -> torch.Tensor:
    return constraint_named(name).matrix(logits, SiteSpec(streams=n, constraint=name, iters=iters))


def test_analytic_backward_equals_autograd(constraint: str, n: int) -> None:
    kind = constraint_named(constraint)
    spec = SiteSpec(streams=n, constraint=constraint, sinkhorn_eps=kind.default_eps * 1e4)
    logits = _logits(constraint, n, 6, 2.0, torch.float64).reshape(2, 3, -1).requires_grad_()
    matrix = kind.matrix(logits, spec)
    grad = torch.randn_like(matrix)
    expected = torch.zeros_like(logits)
    if matrix.requires_grad:  # the identity depends on nothing
        (expected,) = torch.autograd.grad(matrix, logits, grad)
    assert matrix.shape == (2, 3, n, n)
    torch.testing.assert_close(kind.matrix_backward(grad, logits, spec), expected)


def test_sinkhorn_with_eps_differentiates_its_own_iterations() -> None:
    spec = SiteSpec(streams=3, constraint="sinkhorn", sinkhorn_eps=0.1, iters=3)
    kind = constraint_named("sinkhorn")
    logits = _logits("sinkhorn", 3, 5, 1.0, torch.float64).requires_grad_()
    matrix = kind.matrix(logits, spec)
    grad = torch.randn_like(matrix)
    (expected,) = torch.autograd.grad(matrix, logits, grad)
    torch.testing.assert_close(kind.matrix_backward(grad, logits, spec), expected)


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_sinkhorn_is_the_papers_iteration(n: int, iters: int) -> None:
    logits = _logits("sinkhorn", n, 50, 1.0, torch.float64)
    matrix = logits.view(-1, n, n).exp()
    for _ in range(iters):
        matrix = matrix / matrix.sum(-2, keepdim=True)  # columns: over the outputs
        matrix = matrix / matrix.sum(-1, keepdim=True)  # rows: over the inputs
    torch.testing.assert_close(_matrix("sinkhorn", n, logits, iters), matrix)


def test_sinkhorn_softmax_is_deepseeks_iteration_transposed() -> None:
    n, eps, iters = 4, 1e-2, 5
    comb_logits = _logits("sinkhorn_softmax", n, 50, 2.0, torch.float64).view(-1, n, n)  # [in, out]
    comb = comb_logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    spec = SiteSpec(streams=n, constraint="sinkhorn_softmax", iters=iters, sinkhorn_eps=eps)
    ours = constraint_named("sinkhorn_softmax").matrix(comb_logits.mT.flatten(-2), spec)
    torch.testing.assert_close(ours, comb.mT)


@pytest.mark.parametrize("std", [0.0, 1.0, 4.0, 8.0, 30.0, 1e4])
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "sinkhorn_exp"])
def test_rows_sum_to_one_and_nothing_is_negative_for_any_logits(name: str, std: float) -> None:
    matrix = _matrix(name, 4, _logits(name, 4, 2000, std, torch.float32))
    assert matrix.min() >= 0
    assert (matrix.sum(-1) - 1).abs().max() < 1.5e-6


@pytest.mark.parametrize("name", ["identity", "permutations", "kronecker"])
def test_exact_constraints_have_columns_that_sum_to_one(name: str) -> None:
    matrix = _matrix(name, 4, _logits(name, 4, 2000, 3.0, torch.float32))
    assert (matrix.sum(-2) - 1).abs().max() < 1.5e-6


def test_sinkhorn_columns_converge_for_moderate_logits() -> None:
    matrix = _matrix("sinkhorn", 4, _logits("sinkhorn", 4, 2000, 1.0, torch.float32))
    error = (matrix.sum(-2) - 1).abs()
    assert error.mean() < 1e-5
    assert error.max() < 1e-2


@pytest.mark.parametrize("std", [1.0, 4.0, 8.0, 30.0])
def test_sinkhorn_in_float32_follows_float64(std: float) -> None:
    logits = _logits("sinkhorn", 4, 4000, std, torch.float32)
    kind, spec = constraint_named("sinkhorn"), SiteSpec(streams=4)
    exact = kind.matrix(logits.double(), spec)
    assert (kind.matrix(logits, spec) - exact).abs().max() < 2e-6
    grad = torch.randn_like(exact)
    exact_grad = kind.matrix_backward(grad, logits.double(), spec)
    error = kind.matrix_backward(grad.float(), logits, spec) - exact_grad
    assert error.norm() / exact_grad.norm() < 1e-6


def test_a_row_that_underflows_gives_neither_nan_nor_a_wrong_row() -> None:
    logits = torch.zeros(4, 4)
    logits[2] = -500.0  # exp(-500) is 0 in float32, yet rows are scaled to 1
    kind, spec = constraint_named("sinkhorn"), SiteSpec(streams=4)
    torch.testing.assert_close(kind.matrix(logits.flatten(), spec), torch.full((4, 4), 0.25))
    assert kind.matrix_backward(torch.randn(4, 4), logits.flatten(), spec).isfinite().all()


def test_orthogonal_matrices_preserve_norms() -> None:
    for n, std in itertools.product((1, 2, 3, 4, 8), (0.1, 1.0, 30.0)):
        matrix = _matrix("orthogonal", n, _logits("orthogonal", n, 100, std, torch.float64))
        error = (matrix @ matrix.mT - torch.eye(n, dtype=torch.float64)).abs().max()
        assert error < 1e-10


def test_orthogonal_is_the_cayley_transform() -> None:
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    skew = torch.tensor([[0, 0.3, -0.7], [-0.3, 0, 1.1], [0.7, -1.1, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    expected = (eye - skew) @ torch.linalg.inv(eye + skew)
    torch.testing.assert_close(_matrix("orthogonal", 3, logits), expected)


def test_kronecker_is_the_product_of_its_factors() -> None:
    logits = torch.randn(3, 2, dtype=torch.float64)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    keep = logits.softmax(-1)[:, 0]
    factors = [p * torch.eye(2, dtype=torch.float64) + (1 - p) * swap for p in keep]
    expected = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    torch.testing.assert_close(_matrix("kronecker", 8, logits.flatten()), expected)


def test_each_permutation_logit_selects_one_permutation() -> None:
    chosen = [_matrix("permutations", 3, row) for row in torch.eye(6) * 200.0]
    seen = {tuple(matrix.argmax(-1).tolist()) for matrix in chosen}
    assert seen == set(itertools.permutations(range(3)))
    assert torch.equal(chosen[0].round(), torch.eye(3))


@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_initial_matrices_have_rows_of_one_and_favour_the_diagonal(
    constraint: str, n: int, init: str
) -> None:
    kind = constraint_named(constraint)
    spec = SiteSpec(streams=n, constraint=constraint, sinkhorn_eps=kind.default_eps)
    matrix = kind.matrix(kind.initial_bias(n, init), spec)
    ones = torch.ones(n, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(-1), ones, rtol=0, atol=2 * kind.default_eps + 1e-12)
    assert (matrix.diagonal() >= matrix.max(-1).values - 1e-12).all()


@pytest.mark.parametrize("name", ["sinkhorn", "permutations", "kronecker", "orthogonal", "none"])
def test_preserving_start_leaves_the_gradient_alive(name: str) -> None:
    kind, spec = constraint_named(name), SiteSpec(streams=4, constraint=name)
    jacobian = torch.autograd.functional.jacobian(
        lambda logits: kind.matrix(logits, spec), kind.initial_bias(4, "preserve")
    )
    assert jacobian.abs().max() > 0.05


def test_published_diagonals_of_the_two_starts() -> None:
    kind, spec = constraint_named("sinkhorn"), SiteSpec(streams=4)
    for init, diagonal in (("preserve", 0.7112), ("paper", 0.9926)):
        matrix = kind.matrix(kind.initial_bias(4, init), spec)
        assert matrix[0, 0].item() == pytest.approx(diagonal, abs=1e-4)
