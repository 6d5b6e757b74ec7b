"""What the tests of the search for residuals share: small branches, and one answer to check."""

import torch
from torch.fx import Graph, Node

from mhc_compile.passes.residuals import find_residuals
from mhc_compile.passes.sites import Rejected, ResidualSite
from tests.passes.graphs import Builder

SHAPE = (2, 6, 4)


def ffn(b: Builder, x: Node) -> Node:
    """A branch of two linear layers."""
    return b.linear(b.call(torch.relu, b.linear(x)))


def only_site(graph: Graph) -> ResidualSite:
    """The one site of a graph in which nothing is rejected."""
    found = find_residuals(graph)
    assert len(found.sites) == 1, found
    assert found.rejected == ()
    return found.sites[0]


def only_rejection(graph: Graph) -> Rejected:
    """The one rejected sum of a graph without sites."""
    found = find_residuals(graph)
    assert found.sites == ()
    assert len(found.rejected) == 1, found
    return found.rejected[0]
