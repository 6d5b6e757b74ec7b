"""What a state gets from its other readers, added inside the backward of pre."""

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import OPS, SITES, TOLERANCE, leaves_of, random_site

Gradients = tuple[torch.Tensor, ...]


def gradients(
    spec: SiteSpec, tensors: list[torch.Tensor], dtype: torch.dtype, kernels: str, more: bool
) -> Gradients:
    """All outputs of ``mhc::pre_backward``, with or without what X gets from elsewhere."""
    text = f"{spec.encode()} kernels={kernels}"
    X, _, phi, bias, alpha, *_ = (
        None if t is None else t.detach() for t in leaves_of(tensors, dtype)
    )
    du, dX_next = (t.to(dtype) for t in tensors[7:9])
    dh_post, dh_res = (t.to(bias.dtype) for t in tensors[9:])
    saved = OPS.pre(X, phi, bias, alpha, text)[3]
    arguments = (du, dh_post, dh_res, X, phi, bias, alpha, saved, text)
    found = OPS.pre_backward(*arguments, *([dX_next] if more else []))
    return tuple(found)


def same_but_for_the_state(spec: SiteSpec, tensors: list[torch.Tensor], kernels: str) -> None:
    """Parameters' gradients keep their bits, that of the state is the sum in float64."""
    truth, *_ = gradients(spec, tensors, torch.float64, "reference", more=True)
    dX, *parameters = gradients(spec, tensors, torch.float32, kernels, more=True)
    _, *alone = gradients(spec, tensors, torch.float32, kernels, more=False)
    assert all(torch.equal(a, b) for a, b in zip(parameters, alone, strict=True))
    assert (dX - truth).abs().max() <= TOLERANCE * truth.abs().max()


def test_the_reference_adds_it() -> None:
    spec, tensors = random_site("sinkhorn", 4, (2, 5, 7))
    with_more = gradients(spec, tensors, torch.float64, "reference", more=True)
    alone = gradients(spec, tensors, torch.float64, "reference", more=False)
    torch.testing.assert_close(with_more[0], alone[0] + tensors[8])
    assert all(torch.equal(a, b) for a, b in zip(with_more[1:], alone[1:], strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [48, 129])
@pytest.mark.parametrize(("name", "n"), SITES)
def test_generated_kernels_of_every_constraint_add_it(name: str, n: int, channels: int) -> None:
    spec, tensors = random_site(name, n, (2, 17, channels))
    same_but_for_the_state(spec, tensors, "cpp")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 16), (16, 64), (70, 200), (33, 512)])
def test_generated_kernels_add_it_at_every_size(shape: tuple[int, int]) -> None:
    spec, tensors = random_site("sinkhorn", 4, shape)
    same_but_for_the_state(spec, tensors, "cpp")


@pytest.mark.parametrize("dim", [-3, -2])
def test_the_stream_axis_may_lie_elsewhere(dim: int) -> None:
    spec, tensors = random_site("sinkhorn", 3, (2, 16, 5, 3), dim=dim)
    same_but_for_the_state(spec, tensors, "cpp")


@pytest.mark.parametrize("name", ["sinkhorn", "identity", "none"])
def test_static_sites_add_it(name: str) -> None:
    spec, tensors = random_site(name, 4, (7, 48), dynamic=False)
    same_but_for_the_state(spec, tensors, "cpp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    spec, tensors = random_site("sinkhorn", 4, (9, 64))
    rounded = [None if t is None else t.to(dtype).double() for t in tensors]
    rounded[2:5] = tensors[2:5]
    rounded[9:] = tensors[9:]
    truth, *_ = gradients(spec, rounded, torch.float64, "reference", more=True)
    dX, *_ = gradients(spec, rounded, dtype, "cpp", more=True)
    step = torch.finfo(dtype).eps
    assert ((dX - truth).abs() <= step * truth.abs() + 1e-5).all()


def test_another_shape_is_refused() -> None:
    spec, tensors = random_site("sinkhorn", 4, (2, 5, 8))
    tensors[8] = tensors[8][:1]
    with pytest.raises(KernelError, match="dX_more"):
        gradients(spec, tensors, torch.float32, "cpp", more=True)
