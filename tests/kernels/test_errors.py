"""Wrong inputs are refused alike by the ops and by their fake implementations."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec

OPS = torch.ops.mhc
N, C = 4, 6
TEXT = SiteSpec(streams=N).encode()
STATIC = SiteSpec(streams=N, dynamic=False).encode()


@pytest.fixture(params=["real", "fake"], autouse=True)
def _mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield


def _site() -> dict[str, torch.Tensor]:
    return {
        "X": torch.ones(2, 3, N, C),
        "phi": torch.ones(N * C, 24),
        "bias": torch.ones(24),
        "alpha": torch.ones(3),
    }


def _pre(text: str = TEXT, **changed: Any) -> Any:
    return OPS.pre(*(_site() | changed).values(), text)


def _post(**changed: Any) -> Any:
    site = {
        "X": torch.ones(2, 3, N, C),
        "f": torch.ones(2, 3, C),
        "h_post": torch.ones(2, 3, N),
        "h_res": torch.ones(2, 3, N, N),
    }
    return OPS.post(*(site | changed).values(), TEXT)


PRE_FAULTS: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (
        lambda: {"X": torch.ones(2, 3, 5, C)},
        r"axis -2 .* 4 streams, but its shape is \(2, 3, 5, 6\)",
    ),
    (lambda: {"X": torch.ones(N)}, "at least 2 axes"),
    (lambda: {"X": torch.ones(2, N, C).int()}, "torch.int32"),
    (lambda: {"phi": torch.ones(C, 24)}, r"phi has shape \(6, 24\).*needs \(24, 24\)"),
    (lambda: {"phi": torch.ones(N * C, 24).int()}, "phi is torch.int32"),
    (lambda: {"phi": torch.ones(N * C, 24, device="meta")}, "phi is on meta and the state on cpu"),
    (lambda: {"bias": torch.ones(23)}, r"bias has shape \(23,\).*needs \(24,\)"),
    (lambda: {"alpha": torch.ones(2)}, r"alpha has shape \(2,\)"),
    (lambda: {"alpha": None}, "alpha absent.*dynamic mappings take both"),
    (lambda: {"phi": None, "alpha": None}, "phi is absent.*dynamic=True"),
    (lambda: {"text": STATIC}, "phi is given.*dynamic=False"),
    (lambda: {"text": "n=4 constraint=birkhoff"}, "use one of sinkhorn"),
    (lambda: {"text": "n=6 constraint=permutations"}, "720 permutations"),
    (lambda: {"text": "four"}, "specification"),
]


@pytest.mark.parametrize(("fault", "message"), PRE_FAULTS)
def test_pre_refuses(fault: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        _pre(**fault())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: {"f": torch.ones(2, 2, C)}, r"branch output has shape \(2, 2, 6\).*\(2, 3, 6\)"),
        (lambda: {"f": torch.ones(2, 3, 1)}, "branch output has shape"),
        (lambda: {"f": torch.ones(2, 3, C).bool()}, "branch output is torch.bool"),
        (lambda: {"h_post": torch.ones(N)}, r"h_post has shape \(4,\).*needs \(2, 3, 4\)"),
        (lambda: {"h_res": torch.ones(N, N)}, r"h_res has shape \(4, 4\)"),
    ],
)
def test_post_refuses(fault: Callable[[], dict[str, Any]], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        _post(**fault())


@pytest.mark.parametrize(
    ("x", "streams", "dim", "message"),
    [
        (lambda: torch.ones(2, 3), 17, -1, "use 1 to 16"),
        (lambda: torch.ones(2, 3), 0, -1, "use 1 to 16"),
        (lambda: torch.ones(2, 3), 4, 1, "count it from the end"),
        (lambda: torch.ones(2, 3), 4, -3, "no channel axis -3"),
        (lambda: torch.ones(2, 3).long(), 4, -1, "torch.int64"),
    ],
)
def test_expand_refuses(
    x: Callable[[], torch.Tensor], streams: int, dim: int, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        OPS.expand(x(), streams, dim)


@pytest.mark.parametrize(
    ("mode", "text", "given", "message"),
    [
        ("max", TEXT, "", "use mean, sum, learned"),
        ("mean", TEXT, "bias", "bias is given, but mode='mean'"),
        ("learned", TEXT, "", "phi is absent, but mode='learned' with dynamic=True needs it"),
        ("learned", STATIC, "phi bias alpha", "phi is given.*dynamic=False does not take it"),
        ("learned", STATIC, "", "bias is absent"),
    ],
)
def test_collapse_refuses(mode: str, text: str, given: str, message: str) -> None:
    head = {"phi": torch.ones(N * C, N), "bias": torch.ones(N), "alpha": torch.ones(1)}
    chosen = [tensor if name in given.split() else None for name, tensor in head.items()]
    with pytest.raises(KernelError, match=message):
        OPS.collapse(torch.ones(2, N, C), *chosen, mode, text)


@pytest.mark.parametrize(
    ("logits", "text", "message"),
    [
        (lambda: torch.ones(3, N, 5), TEXT, "4 x 4"),
        (lambda: torch.ones(3, N, N).int(), TEXT, "torch.int32"),
        (lambda: torch.ones(3, N, N), "n=4 constraint=orthogonal", "no Sinkhorn iteration"),
    ],
)
def test_sinkhorn_refuses(logits: Callable[[], torch.Tensor], text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        OPS.sinkhorn(logits(), text)
