"""The ops inside torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

OPS = torch.ops.mhc
MakeSite = Callable[..., Any]


def _block(X: torch.Tensor, phi: Any, bias: Any, alpha: Any, text: str) -> torch.Tensor:
    u, h_post, h_res, _ = OPS.pre(X, phi, bias, alpha, text)
    X = OPS.post(X, torch.tanh(u), h_post, h_res, text)
    return OPS.collapse(X, None, None, None, "mean", text)


def _run(function: Any, site: Any) -> list[torch.Tensor]:
    out = function(site.X, *site.parameters, site.text)
    leaves = [t for t in (site.X, *site.parameters) if t is not None]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_aot_eager_equals_eager(make_site: MakeSite, constraint: str, dynamic: bool) -> None:
    site = make_site(constraint, 4, (2, 5, 8), dtype=torch.float32, dynamic=dynamic)
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    for mine, right in zip(_run(compiled, site), _run(_block, site), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.slow
def test_inductor_equals_eager(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 5, 8), dtype=torch.float32)
    compiled = torch.compile(_block, fullgraph=True)
    for mine, right in zip(_run(compiled, site), _run(_block, site), strict=True):
        torch.testing.assert_close(mine, right)


def test_marked_dynamic_tokens_add_no_graph(make_site: MakeSite) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_block, backend=counter, fullgraph=True)
    for tokens in (5, 7, 12):
        site = make_site("sinkhorn", 4, (3, tokens, 8), dtype=torch.float32)
        torch._dynamo.mark_dynamic(site.X, 1)
        for mine, right in zip(_run(compiled, site), _run(_block, site), strict=True):
            assert torch.equal(mine, right)
    assert counter.frame_count == 1


def test_compiled_autocast_keeps_coefficients_in_float32(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 5, 8), dtype=torch.float32)
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    right = _run(_block, site)
    with torch.autocast("cpu", torch.bfloat16):
        mine = _run(compiled, site)
    assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_a_wrong_shape_is_reported_while_compiling(make_site: MakeSite) -> None:
    site = make_site("sinkhorn", 4, (2, 5, 8), dtype=torch.float32)
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="phi has shape"):
        compiled(site.X, site.phi[:-1], site.bias, site.alpha, site.text)


def test_an_exported_program_runs_the_same_ops(make_site: MakeSite) -> None:
    class Block(torch.nn.Module):
        def forward(self, X: Any, phi: Any, bias: Any, alpha: Any) -> torch.Tensor:
            return _block(X, phi, bias, alpha, site.text)

    site = make_site("sinkhorn", 4, (2, 5, 8), dtype=torch.float32, requires_grad=False)
    inputs = (site.X, *site.parameters)
    program = torch.export.export(Block(), inputs)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"mhc.pre.default", "mhc.post.default", "mhc.collapse.default"} <= targets
    assert torch.equal(program.module()(*inputs), Block()(*inputs))
