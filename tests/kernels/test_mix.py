"""``mhc::mix``: H_res X alone, and with the post of a site that does not mix the whole post."""

from dataclasses import replace

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.cpp.select import parts
from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import OPS, TOLERANCE, Tensors, random_site

MIXING = [*(("sinkhorn", n) for n in (2, 3, 4, 8)), ("none", 2), ("kronecker", 4)]


def run(spec: SiteSpec, tensors: Tensors, dtype: torch.dtype, kernels: str) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return OPS.mix(tensors[0].to(dtype), tensors[6].to(wide), f"{spec.encode()} kernels={kernels}")


def same_bits(spec: SiteSpec, tensors: Tensors, dtype: torch.dtype, kernels: str) -> None:
    X, f, h_post, h_res = (tensors[i].to(dtype) for i in (0, 1, 5, 6))
    spec = replace(spec, kernels=kernels)
    still = replace(spec, constraint="identity").encode()
    mixed = OPS.mix(X, h_res, spec.encode())
    assert (mixed.dtype, mixed.shape, mixed.is_contiguous()) == (X.dtype, X.shape, True)
    found = OPS.post(mixed, f, h_post, torch.eye(spec.streams), still)
    assert torch.equal(found, OPS.post(X, f, h_post, h_res, spec.encode()))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(0, 48), (1, 16), (2, 17, 129), (33, 512)])
@pytest.mark.parametrize(("name", "n"), MIXING)
def test_mixing_first_gives_the_bits_of_the_whole_post(
    name: str, n: int, shape: tuple[int, ...]
) -> None:
    spec, tensors = random_site(name, n, shape)
    same_bits(spec, tensors, torch.float32, "cpp")
    same_bits(spec, tensors, torch.float32, "reference")


@pytest.mark.parametrize("n", [16, pytest.param(12, marks=pytest.mark.slow)])
def test_more_streams_than_are_unrolled_keep_their_bits(n: int) -> None:
    spec, tensors = random_site("sinkhorn", n, (2, 17, 129), dynamic=False)
    same_bits(spec, tensors, torch.float32, "cpp")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("fields", [{"dim": -3}, {"dim": -2}, {"dynamic": False}])
def test_other_layouts_and_static_mappings_keep_their_bits(fields: dict[str, int]) -> None:
    spec, tensors = random_site("sinkhorn", 3, (2, 16, 5, 3), **fields)
    same_bits(spec, tensors, torch.float32, "cpp")
    same_bits(spec, tensors, torch.float64, "reference")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "n"), MIXING)
def test_the_generated_code_follows_float64(name: str, n: int) -> None:
    spec, tensors = random_site(name, n, (37, 50))
    exact = run(spec, tensors, torch.float64, "reference")
    assert (run(spec, tensors, torch.float32, "cpp") - exact).norm() <= TOLERANCE * exact.norm()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kernels", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_are_rounded_once(dtype: torch.dtype, kernels: str) -> None:
    spec, tensors = random_site("sinkhorn", 4, (37, 129))
    tensors[0] = tensors[0].to(dtype).double()
    exact = run(spec, tensors, torch.float64, "reference")
    found = run(spec, tensors, dtype, kernels)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_the_tokens(threads: int) -> None:
    spec, tensors = random_site("sinkhorn", 4, (130, 96))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same_bits(spec, tensors, torch.float32, "cpp")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_op_passes_opcheck(dynamic: bool) -> None:
    spec, tensors = random_site("sinkhorn", 4, (2, 3, 5), dynamic=dynamic)
    text = replace(spec, kernels="reference").encode()
    torch.library.opcheck(OPS.mix.default, (tensors[0].float(), tensors[6].float(), text))


def test_a_constraint_that_does_not_mix_and_another_matrix_are_refused() -> None:
    X = torch.zeros(3, 2, 8)
    with pytest.raises(KernelError, match=r"mhc::mix: constraint 'identity' does not mix"):
        OPS.mix(X, torch.eye(2), SiteSpec(streams=2, constraint="identity").encode())
    with pytest.raises(KernelError, match=r"h_res has shape \(2, 2\)"):
        OPS.mix(X, torch.eye(2), SiteSpec(streams=2).encode())


def test_a_library_of_its_own_is_built() -> None:
    assert parts("mhc::mix", SiteSpec(streams=2), learned=True) == ("mix",)
