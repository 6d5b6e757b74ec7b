"""Single-pass sites: the streams are read by the H_pre of the site before."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.reference import post_ref, pre_ref, read_ref, seam_ref
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
MakeSite = Callable[..., Any]
GATED = [name for name, kind in CONSTRAINTS.items() if kind.gate == "sigmoid"]
LAYOUTS = [((19, 12), -1), ((2, 12, 5), -2), ((2, 12, 3, 3), -3)]
KERNELS = ["reference", "cpp"]
Tensors = Sequence[torch.Tensor | None]


class _Single:
    """A single-pass site and the one before it, whose gates and H_res it is reached with."""

    def __init__(self, make_site: MakeSite, *args: Any, kernels: str = "reference", **kwargs: Any):
        site = make_site(*args, **kwargs)
        self.spec = replace(site.spec, single_pass=True, kernels=kernels)
        self.X, self.f, self.parameters = site.X, site.f, site.parameters
        before = make_site(*args, **{**kwargs, "seed": 1})
        _, gates, h_res = pre_ref(before.X, *before.parameters, self.spec)
        self.gates, self.h_res = gates.detach().requires_grad_(), h_res.detach()
        self.mixes = CONSTRAINTS[self.spec.constraint].mixes
        self.h_res.requires_grad_(self.mixes)

    @property
    def text(self) -> str:
        return self.spec.encode()

    def calls(self) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], Tensors]]:
        """Every op with its reference, without what cannot be differentiated."""
        spec, text, used = self.spec, self.text, 3 if self.mixes else 2
        mine = (self.X, *self.parameters)
        yield (
            "pre",
            lambda gates, *site: OPS.pre(*site, text, gates)[:used],
            lambda gates, *site: pre_ref(*site, spec, gates)[:used],
            (self.gates, *mine),
        )
        yield (
            "entry",
            lambda *site: OPS.pre(*site, text)[:used],
            lambda *site: pre_ref(*site, spec)[:used],
            mine,
        )
        yield (
            "seam",
            lambda *site: OPS.seam(*site, text)[: 1 + used],
            lambda *site: seam_ref(*site, spec)[: 1 + used],
            (self.X, self.f, self.gates, self.h_res, *self.parameters),
        )
        yield (
            "post",
            lambda *site: (OPS.post(*site, text),),
            lambda *site: (post_ref(*site, spec),),
            (self.X, self.f, self.gates, self.h_res),
        )
        yield (
            "read",
            lambda *site: (OPS.read(*site, text),),
            lambda *site: (read_ref(*site, spec),),
            (self.X, self.gates),
        )


def _results(call: Callable[..., Any], tensors: Tensors, dtype: torch.dtype | None) -> list[Any]:
    """Outputs, then the gradients of a random weighted sum of them; ``dtype`` of a copy."""
    if dtype is not None:
        tensors = [
            t if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad)
            for t in tensors
        ]
    outputs = call(*tensors)
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double() * weight).sum()
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(output.detach() for output in outputs), *grads]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.detach()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp(min=1e-3))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("name", "n"), [(name, 2) for name in GATED] + [("sinkhorn_softmax", 3)])
def test_finite_differences_confirm_every_op(
    make_site: MakeSite, name: str, n: int, dynamic: bool
) -> None:
    single = _Single(make_site, name, n, (2, 3), dynamic=dynamic, iters=5)
    for _, op, _, tensors in single.calls():
        assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", GATED)
def test_ops_agree_with_the_reference(make_site: MakeSite, name: str, dynamic: bool) -> None:
    for n, (shape, dim) in zip((2, 4, 2), LAYOUTS, strict=True):
        single = _Single(make_site, name, n, shape, dim=dim, dynamic=dynamic)
        for what, op, reference, tensors in single.calls():
            for found, exact in zip(
                _results(op, tensors, None), _results(reference, tensors, None), strict=True
            ):
                assert _error(found, exact) <= 1e-12, what


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("name", "n", "layout"),
    [("sinkhorn", 4, 0), ("sinkhorn_softmax", 3, 1), ("identity", 2, 2), ("permutations", 2, 0)],
)
def test_generated_cpp_agrees_with_float64(
    make_site: MakeSite, name: str, n: int, layout: int, dynamic: bool
) -> None:
    shape, dim = LAYOUTS[layout]
    single = _Single(make_site, name, n, shape, dim=dim, dynamic=dynamic, kernels="cpp")
    plain = _Single(make_site, name, n, shape, dim=dim, dynamic=dynamic)
    for (what, op, _, tensors), (*_, reference, _) in zip(
        single.calls(), plain.calls(), strict=True
    ):
        exact = _results(reference, tensors, None)
        for found, true in zip(_results(op, tensors, torch.float32), exact, strict=True):
            assert _error(found, true) <= 1e-5, what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_streams_are_rounded_once(make_site: MakeSite, dtype: torch.dtype) -> None:
    single = _Single(make_site, "sinkhorn", 4, (19, 24), kernels="cpp", dtype=torch.float32)
    X = single.X.detach().to(dtype)
    gates, text = single.gates.detach(), single.text
    u, mappings, *_ = OPS.pre(X, *single.parameters, text, gates)
    exact = pre_ref(X.double(), *(p.double() for p in single.parameters), single.spec, gates)
    assert torch.equal(u, OPS.read(X, gates, text))
    assert _error(u, exact[0]) <= torch.finfo(dtype).eps
    assert _error(mappings, exact[1]) <= 1e-5


def test_the_first_site_reads_the_first_stream(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5))
    text = replace(site.spec, single_pass=True).encode()
    u, gates, *_ = OPS.pre(site.X, *site.parameters, text)
    assert torch.equal(u, site.X[..., 0, :])
    assert torch.equal(OPS.read(site.X, None, text), u)
    _, h_post, *_ = OPS.pre(site.X, *site.parameters, site.text)
    assert torch.equal(gates[..., 4:], h_post)


def test_the_weights_of_one_site_read_for_the_next(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 3, 5))
    text = replace(site.spec, single_pass=True).encode()
    two_pass = OPS.pre(site.X, *site.parameters, site.text)[0]
    gates = OPS.pre(site.X, *site.parameters, text)[1]
    assert torch.allclose(OPS.read(site.X, gates, text), two_pass, rtol=1e-12)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_seam_is_its_post_and_pre_bit_for_bit(
    make_site: MakeSite, kernels: str, dynamic: bool
) -> None:
    single = _Single(
        make_site, "sinkhorn", 4, (19, 24), dynamic=dynamic, kernels=kernels, dtype=torch.float32
    )
    given = (single.X, single.f, single.gates, single.h_res)
    seam = OPS.seam(*given, *single.parameters, single.text)
    X = OPS.post(*given, single.text)
    for one, other in zip(
        seam, (X, *OPS.pre(X, *single.parameters, single.text, single.gates)), strict=True
    ):
        assert torch.equal(one, other)


def test_opcheck_accepts_the_ops(make_site: MakeSite) -> None:
    single = _Single(make_site, "sinkhorn", 2, (3, 4))
    gates, text = single.gates, single.text
    site = (single.X, *single.parameters, text)
    u, h_post, h_res, saved = (t.detach() for t in OPS.pre(*site, gates))
    plain = [t.detach() for t in (single.X, *single.parameters)]
    for given in (gates, None):
        torch.library.opcheck(OPS.pre.default, (*site, given))
        torch.library.opcheck(OPS.read.default, (single.X, given, text))
        arguments = (u, h_post, h_res, *plain, saved, text, plain[0])
        detached = None if given is None else given.detach()
        torch.library.opcheck(OPS.pre_backward.default, (*arguments, detached))
        torch.library.opcheck(OPS.read_backward.default, (u, plain[0], detached, text))
    torch.library.opcheck(OPS.seam.default, (single.X, single.f, gates, single.h_res, *site[1:]))


def test_what_does_not_fit_is_refused(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 2, (3, 4))
    single = replace(site.spec, single_pass=True)
    gates = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(KernelError, match="single_pass=False"):
        OPS.pre(site.X, *site.parameters, site.text, gates)
    with pytest.raises(KernelError, match=r"gates has shape \(3, 2\).*needs \(3, 4\)"):
        OPS.pre(site.X, *site.parameters, single.encode(), gates[:, :2])
    unbounded = replace(single, constraint="none").encode()
    with pytest.raises(KernelError, match="have no sigmoid"):
        OPS.pre(site.X, *site.parameters, unbounded)


def test_the_specification_travels_as_text() -> None:
    spec = SiteSpec(streams=4, single_pass=True)
    assert spec.encode() == "n=4 constraint=sinkhorn single_pass=True"
    assert SiteSpec.decode(spec.encode()) == spec
    assert (spec.gates, replace(spec, single_pass=False).gates) == (8, 4)
