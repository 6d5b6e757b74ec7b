"""Convert a model on its first call, for those who only write ``torch.compile``."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mhc_compile import carry
from mhc_compile._torch_private import Compiled, Frame, without_tracing
from mhc_compile.analysis import Analysis
from mhc_compile.config import MHCConfig
from mhc_compile.convert import attach_, detach_
from mhc_compile.errors import MHCWarning, UnsupportedGraphError
from mhc_compile.match import Matches, sites_of
from mhc_compile.uses import new_uses


@dataclass(frozen=True, slots=True)
class _Piece:
    """Hangs on the output that shows the end of a lazily converted trunk."""

    hosts: tuple[nn.Module, ...]
    what: str


def convert_now(
    analysis: Analysis, matches: Matches, frame: Frame, config: MHCConfig, inputs: Sequence[Any]
) -> None:
    """Attach parameters for everything planned that conversion never saw, and note its records.

    Args:
        analysis: of the graph.
        matches: of its sites; completed here.
        frame: for messages.
        config: how to convert.
        inputs: example inputs of the graph, in order.

    Raises:
        UnsupportedGraphError: the graph continues a trunk that was converted on a call of its own;
            that one is converted back.
    """
    uses = new_uses(analysis, matches.records)
    if not uses:
        return
    for arrival in analysis.plan.arrivals:
        before = carry.get(inputs[arrival.position], arrival.dim) if arrival is not None else None
        if isinstance(before, _Piece):
            for host in before.hosts:
                detach_(host)
            raise UnsupportedGraphError(
                f"{frame.where} continues the residual stream of {before.what}, but each was "
                "compiled by itself (block by block, or after a graph break): the n streams could "
                "not pass from one to the other. Call mhc_compile.convert_(model, ...) on the "
                "whole model first; then any way of compiling it will do"
            )
    attach_(uses, config)
    matches.adopt(analysis, sites_of)
    new = [use for use in uses if use.planned is not None]
    what = type(frame.root).__name__ if frame.root is not None else frame.where
    warnings.warn(
        f"{what} was converted to {config.streams} residual streams on its first call: "
        f"{len(new)} sites in {len({use.trunk for use in new})} trunks. An optimizer, DDP or "
        "FSDP wrapper made before this call does not know the new parameters: call "
        "mhc_compile.convert_(model, ...) first",
        MHCWarning,
        stacklevel=2,
    )


def watch_ends(compiled: Compiled, analysis: Analysis, frame: Frame) -> Compiled:
    """Let outputs that show the end of a trunk say that it was converted on a call of its own."""
    ends = [departure for departure in analysis.plan.departures if departure is not None]
    if not ends:
        return compiled
    hosts = dict.fromkeys(analysis.host_of(planned) for planned in analysis.plan.sites)
    piece = _Piece(tuple(hosts), frame.where)

    @without_tracing
    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        for end in ends:
            visible = outputs[end.position]
            if isinstance(visible, torch.Tensor):
                carry.put(visible, piece, end.dim)
        return outputs

    return call
