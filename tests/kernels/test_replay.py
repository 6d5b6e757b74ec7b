"""``mhc::replay``: what sites made, made again from what a backward pass keeps of them."""

from dataclasses import replace

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import REPLAYED
from tests.kernels.cpp_runs import SITES, TOLERANCE
from tests.kernels.replays import OPS, Chain, error, make_chain


def same(found: list[torch.Tensor], made: list[torch.Tensor]) -> None:
    assert len(found) == len(made)
    assert all(torch.equal(one, other) for one, other in zip(found, made, strict=True))


@pytest.mark.parametrize(("name", "n"), SITES)
def test_the_reference_makes_what_the_sites_made(name: str, n: int) -> None:
    chain = make_chain(name, n, (2, 3, 5), 3, torch.float64)
    same(chain.replayed("reference"), chain.made)
    rest = chain.without_the_first_read()
    same(rest.replayed("reference"), rest.made)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "n"), [*SITES, ("sinkhorn", 12), ("none", 9)])
def test_generated_kernels_of_every_constraint_make_the_same_bits(name: str, n: int) -> None:
    chain = make_chain(name, n, (2, 17, 129), 2, kernels="cpp")
    same(chain.replayed("cpp"), chain.made)
    for found, truth in zip(chain.replayed("cpp"), chain.replayed("reference"), strict=True):
        assert error(found, truth) <= TOLERANCE


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(1, 16), (3, 129), (16, 64), (70, 200), (0, 16), (33, 512)])
def test_generated_kernels_make_the_same_bits_at_every_size(shape: tuple[int, int]) -> None:
    chain = make_chain("sinkhorn", 4, shape, 2, kernels="cpp")
    same(chain.replayed("cpp"), chain.made)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("sites", [0, 1, REPLAYED, REPLAYED + 1, 2 * REPLAYED + 3])
def test_chains_of_any_length_are_replayed(sites: int) -> None:
    chain = make_chain("kronecker", 2, (19, 32), sites, kernels="cpp")
    same(chain.replayed("cpp"), chain.made)
    if sites:
        rest = chain.without_the_first_read()
        same(rest.replayed("cpp"), rest.made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_are_rounded_where_the_sites_rounded_them(dtype: torch.dtype) -> None:
    chain = make_chain("sinkhorn", 4, (37, 64), 3, dtype, kernels="cpp")
    same(chain.replayed("cpp"), chain.made)


@pytest.mark.parametrize(("shape", "dim"), [((2, 6, 3, 5), -3), ((3, 7, 4), -2)])
def test_channels_may_be_on_any_axis(shape: tuple[int, ...], dim: int) -> None:
    chain = make_chain("sinkhorn", 4, shape, 2, kernels="cpp", dim=dim)
    same(chain.replayed("cpp"), chain.made)
    for found, truth in zip(chain.replayed("reference"), chain.made, strict=True):
        assert error(found, truth) <= TOLERANCE


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    chain, before = make_chain("sinkhorn", 4, (130, 96), 2, kernels="cpp"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = chain.replayed("cpp")
    finally:
        torch.set_num_threads(before)
    same(found, chain.made)


@pytest.mark.parametrize("name", ["sinkhorn", "identity"])
def test_it_passes_opcheck(name: str) -> None:
    chain = make_chain(name, 3, (2, 3, 5), 2)
    for one in (chain, chain.without_the_first_read()):
        torch.library.opcheck(OPS.replay.default, (*one.given, one.spec.encode()))


def test_lists_that_do_not_fit_are_refused() -> None:
    chain = make_chain("sinkhorn", 4, (2, 3, 5), 2)
    X, f, h_post, h_res, saved, bias, alpha = chain.given
    text = chain.spec.encode()
    with pytest.raises(KernelError, match=r"1 branch outputs with 2 h_post"):
        OPS.replay(X, f[:1], h_post, h_res, saved, bias, alpha, text)
    with pytest.raises(KernelError, match=r"3 saved with 2 biases"):
        OPS.replay(X, f, h_post, h_res, saved, bias[:2], alpha, text)
    with pytest.raises(KernelError, match=r"saved has shape"):
        OPS.replay(X, f, h_post, h_res, [s[..., :3] for s in saved], bias, alpha, text)
    with pytest.raises(KernelError, match=r"branch output has shape"):
        OPS.replay(X, [one[..., :2] for one in f], h_post, h_res, saved, bias, alpha, text)
    with pytest.raises(KernelError, match=r"static mappings"):
        OPS.replay(*chain.given, replace(chain.spec, dynamic=False).encode())


def test_a_branch_wider_than_its_streams_is_not_rounded() -> None:
    chain = make_chain("sinkhorn", 4, (37, 64), 2, torch.bfloat16)
    X, f, *rest = chain.given
    wide = Chain(chain.spec, (X, [one.float() for one in f], *rest), chain.made)
    same(wide.replayed("auto"), wide.replayed("reference"))
    with pytest.raises(KernelError, match="wider than its streams"):
        wide.replayed("cpp")
