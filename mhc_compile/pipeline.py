"""The passes in their order, and the runner that checks after each."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from mhc_compile._torch_private import torch_streams
from mhc_compile.passes.canonicalize import canonicalize_pass
from mhc_compile.passes.chains import Chain, rewrite_chains_pass
from mhc_compile.passes.gradients import accumulate_gradients_pass
from mhc_compile.passes.overlap import Overlap, overlap_collectives_pass
from mhc_compile.passes.recompute import tag_recompute_pass
from mhc_compile.passes.replay import keep_mappings_pass, replay_sites_pass
from mhc_compile.passes.seam_norms import join_norms_pass
from mhc_compile.passes.seams import join_seams_pass
from mhc_compile.passes.split import split_sites_pass
from mhc_compile.passes.stream_lowering import lower_streams_pass
from mhc_compile.passes.streams import assign_streams_pass
from mhc_compile.passes.widen import Widening, widen_trunks_pass

Pass = Callable[[GraphModule, Sequence[Any]], PassResult]
Observer = Callable[[str, GraphModule], None]

OPTIONAL_PASSES = (
    *("join_seams_pass", "join_norms_pass", "keep_mappings_pass", "replay_sites_pass"),
    "accumulate_gradients_pass",
    *("split_sites_pass", "overlap_collectives_pass"),
    *("assign_streams_pass", "lower_streams_pass"),
)
"""The passes that only improve a graph, and so can be switched off."""
ORDERING_PASSES = frozenset({"overlap_collectives_pass", "assign_streams_pass"})
"""The passes whose result is the order of the nodes, which nothing behind them may change."""


def canonical_passes(kernels: str, chains: list[Chain]) -> list[tuple[str, Pass]]:
    """What happens to a captured graph before its residuals are looked for, in order.

    Args:
        kernels: what computes new mhc ops, see `MHCConfig`.
        chains: gets what is recognised of hand-written hyper-connections.
    """
    return [
        ("canonicalize_pass", canonicalize_pass),
        # Before residuals: a recognised state is no trunk, and what is left may hold plain ones.
        (
            "rewrite_chains_pass",
            functools.partial(rewrite_chains_pass, kernels=kernels, found=chains),
        ),
    ]


def rewrite_passes(widening: Widening) -> list[tuple[str, Pass]]:
    """What happens to an analysed (and so canonical) graph, in order."""
    return [
        ("widen_trunks_pass", functools.partial(widen_trunks_pass, widening=widening)),
    ]


def improving_passes(
    skip: Collection[str] = (),
    *,
    recompute: int | Literal["auto", "off"] = "off",
    seam_norm: bool = False,
) -> list[tuple[str, Pass]]:
    """What happens to a graph of mhc ops, wherever they come from, in order.

    Args:
        skip: names to leave out, of `OPTIONAL_PASSES`.
        recompute: as in `MHCConfig`.
        seam_norm: likewise.
    """
    length = recompute if isinstance(recompute, int) else None
    passes: list[tuple[str, Pass]] = []
    if recompute != "off":
        tag = functools.partial(tag_recompute_pass, length=length)
        passes.append(("tag_recompute_pass", tag))
    # After the tags: a seam across the start of a block would make its state twice.
    passes.append(("join_seams_pass", join_seams_pass))
    if seam_norm:
        passes.append(("join_norms_pass", join_norms_pass))
    return [(name, function) for name, function in passes if name not in skip]


def joint_passes(skip: Collection[str] = ()) -> list[tuple[str, Pass]]:
    """What happens to the graph of both directions that AOTAutograd makes, in order.

    Args:
        skip: names to leave out, of `OPTIONAL_PASSES`.
    """
    passes: list[tuple[str, Pass]] = [("keep_mappings_pass", keep_mappings_pass)]
    return [(name, function) for name, function in passes if name not in skip]


def lowered_passes(
    skip: Collection[str] = (),
    *,
    overlap: Literal["auto", "off"] = "off",
    side_stream: bool = False,
    report: Callable[[Overlap], None] | None = None,
) -> list[tuple[str, Pass]]:
    """What happens to each graph that AOTAutograd makes, forward and backward, in order.

    Args:
        skip: names to leave out, of `OPTIONAL_PASSES`.
        overlap: as in `MHCConfig`.
        side_stream: likewise.
        report: gets what runs while collectives are pending.
    """
    passes: list[tuple[str, Pass]] = [
        ("replay_sites_pass", replay_sites_pass),
        ("accumulate_gradients_pass", accumulate_gradients_pass),
    ]
    if overlap != "off":
        # First: it makes work for the windows that the next one fills.
        passes.append(("split_sites_pass", split_sites_pass))
        schedule = functools.partial(overlap_collectives_pass, report=report)
        passes.append(("overlap_collectives_pass", schedule))
    if side_stream:
        # Behind whatever changes the order: plans hold for one order alone.
        passes.append(("assign_streams_pass", assign_streams_pass))
        lower = functools.partial(lower_streams_pass, table=torch_streams())
        passes.append(("lower_streams_pass", lower))
    return [(name, function) for name, function in passes if name not in skip]


def run_passes(
    gm: GraphModule,
    inputs: Sequence[Any],
    passes: Sequence[tuple[str, Pass]],
    observe: Observer | None = None,
) -> list[str]:
    """Run ``passes`` on ``gm`` in place; lint and recompile after each that changed something.

    Args:
        gm: the graph.
        inputs: its example inputs.
        passes: names and bound passes.
        observe: called with the name and the graph after each change (dumps).

    Returns:
        Names of the passes that changed something.
    """
    changed = []
    for name, function in passes:
        if function(gm, inputs).modified:
            changed.append(name)
            gm.graph.lint()
            gm.recompile()
            if observe is not None:
                observe(name, gm)
    return changed
