"""Random sites, shared by the tests of the op set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.layout import widened_shape
from mhc_compile.kernels.spec import SiteSpec


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site's specification and tensors; ``phi`` and ``alpha`` are None if static."""

    spec: SiteSpec
    X: torch.Tensor
    f: torch.Tensor
    phi: torch.Tensor | None
    bias: torch.Tensor
    alpha: torch.Tensor | None

    @property
    def text(self) -> str:
        return self.spec.encode()

    @property
    def parameters(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        return self.phi, self.bias, self.alpha


MakeSite = Callable[..., Site]

LEGAL = [
    (name, n) for name in CONSTRAINTS for n in (1, 2, 3, 4, 8)
    if not (name == "permutations" and n > 5) and not (name == "kronecker" and n == 3)
]  # fmt: skip
"""Every constraint with every number of streams it takes."""


def _build(
    constraint: str = "sinkhorn",
    n: int = 4,
    shape: Sequence[int] = (2, 3, 5),
    *,
    dim: int = -1,
    dynamic: bool = True,
    iters: int = 20,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    requires_grad: bool = True,
) -> Site:
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(size: Sequence[int], dtype: torch.dtype = parameter_dtype) -> torch.Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(requires_grad)

    # Three different epsilons, each large enough for a mix-up to show.
    kind = CONSTRAINTS[constraint]
    spec = SiteSpec(
        streams=n,
        constraint=constraint,
        iters=iters,
        sinkhorn_eps=2e-3 if kind.default_eps else 0.0,
        pre_eps=5e-3 if kind.default_eps else 0.0,
        norm_eps=1e-2,
        dynamic=dynamic,
        dim=dim,
    )
    channels, width = shape[dim], 2 * n + kind.logits(n)
    phi_shape = (channels, n + 2) if kind.per_stream else (n * channels, width)
    return Site(
        spec=spec,
        X=tensor(widened_shape(shape, n, dim), dtype),
        f=tensor(shape, dtype),
        phi=tensor(phi_shape) if dynamic else None,
        bias=tensor((width,)),
        alpha=tensor((3,)) if dynamic else None,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: on a busy machine a second thread costs 5 ms an operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every tensor made without values starts as NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_site() -> MakeSite:
    """Build a `Site` of random float64 tensors; see `_build` for what can be chosen."""
    return _build


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``constraint`` and ``n`` with every legal pair."""
    names = metafunc.fixturenames
    if "constraint" in names and "n" in names:
        metafunc.parametrize(("constraint", "n"), LEGAL)
    elif "constraint" in names:
        metafunc.parametrize("constraint", list(CONSTRAINTS))
