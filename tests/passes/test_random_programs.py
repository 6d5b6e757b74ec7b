"""Random residual networks keep their outputs and gradients when they are widened."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st

import mhc_compile
from mhc_compile.passes.opnames import op_name
from tests.passes.programs import KINDS, example, programs
from tests.passes.rewriting import assert_same, planned, traced, widen


def assert_gradients(found: Any, true: Any) -> None:
    """Relative to the largest gradient: that of a key bias, for one, is nothing but rounding."""
    scale = max(float(g.abs().max()) for g in true if g is not None)
    for a, b in zip(found, true, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert float((a - b).abs().max()) <= 1e-5 * scale


def check_graph(program: Any, latent: bool = False) -> None:
    """Widen the Dynamo graph of a program, and hold it against the original."""
    t = traced(*example(program, latent))
    outputs, gradients = t.run(), t.gradients()
    names = {node.name for node in t.gm.graph.nodes}
    plan = widen(t)
    assert_same(t.run(), outputs, 5e-6)
    assert_gradients(t.gradients()[: len(gradients)], gradients)
    assert all(n.users for n in t.gm.graph.nodes if n.op.startswith("call") and n.name not in names)
    counts = Counter(op_name(node) for node in t.gm.graph.nodes)
    assert counts["mhc.pre"] == counts["mhc.post"] == len(plan.sites)
    assert counts["mhc.expand"] == len(plan.trunks)
    assert counts["mhc.collapse"] >= bool(plan.sites)
    # Once more finds what was left the first time at most: none of the nodes that came in.
    assert {site.site.root.name for site in planned(t).sites} <= names


def check_model(program: Any) -> None:
    """Convert and compile the model of a program, and rewrite its export."""
    net, x = example(program)
    outputs, gradients = _run(net, net, x)
    mhc_compile.convert_(net, x)
    compiled = torch.compile(net, backend="mhc", options={"inner": "eager"})
    for function in (compiled, mhc_compile.rewrite(net, x)):
        found, grads = _run(function, net, x)
        assert_same(found, outputs, 5e-6)
        assert_gradients(grads, gradients)


def _run(function: Any, net: torch.nn.Module, x: torch.Tensor) -> Any:
    old = [p for name, p in net.named_parameters() if ".mhc." not in f".{name}"]
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    outputs = function(x)
    loss = sum((o.double() ** 2).sum() for o in outputs)
    return outputs, torch.autograd.grad(loss, [x, *old], allow_unused=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_keeps_outputs_and_gradients(kind):
    check_graph([(kind, None), ("skip_first", None)])


@settings(max_examples=25)
@given(programs, st.booleans())
@also([("skip_first", None), ("skip_first", 0)], True)
def test_random_programs_keep_outputs_and_gradients(program, latent):
    check_graph(program, latent)


@settings(max_examples=5)
@given(programs)
def test_random_models_compute_the_same_compiled_and_rewritten(program):
    check_model(program)


@pytest.mark.slow
@settings(max_examples=300)
@given(programs, st.booleans())
def test_many_random_programs_keep_outputs_and_gradients(program, latent):
    check_graph(program, latent)


@pytest.mark.slow
@settings(max_examples=100)
@given(programs)
def test_many_random_models_compute_the_same_compiled_and_rewritten(program):
    check_model(program)
