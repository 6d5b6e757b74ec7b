"""kernels="triton": generated Triton, or an error that says why not."""

import pytest
import torch

from mhc_compile.config import MHCConfig
from mhc_compile.errors import KernelError
from mhc_compile.kernels import select
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton import launch

OPS = torch.ops.mhc
SITE = MHCConfig(kernels="triton").spec()


def test_the_choice_reaches_the_specification() -> None:
    assert SITE.kernels == "triton"
    assert SiteSpec.decode(SITE.encode()) == SITE


@pytest.mark.parametrize("op", ["post", "sinkhorn"])
def test_a_state_on_the_cpu_is_refused_with_the_reason(op: str) -> None:
    X, f = torch.randn(2, 4, 8), torch.randn(2, 8)
    arguments = {
        "post": (X, f, torch.rand(2, 4), torch.rand(2, 4, 4)),
        "sinkhorn": (torch.randn(2, 4, 4),),
    }[op]
    with pytest.raises(KernelError, match=f"mhc::{op}: kernels='triton' .* the state is on cpu"):
        getattr(OPS, op)(*arguments, SITE.encode())


def test_an_interpreting_process_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select.launcher("mhc::post", SITE, torch.randn(2, 4, 8)) is launch
    with pytest.raises(KernelError, match="streams are torch"):
        select.launcher("mhc::post", SITE, torch.randn(2, 4, 8).double())
