"""Run a model once under Dynamo and keep its graphs, without changing anything of the model."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile import carry
from mhc_compile._torch_private import Frame, copy_captured, reset_dynamo, without_tracing
from mhc_compile.analysis import Analysis, Refuse, analyse
from mhc_compile.errors import MHCError
from mhc_compile.hosts import HostedSite, erase_markers, resolve_by_id
from mhc_compile.passes.values import is_state

GraphObserver = Callable[[int, str, GraphModule], None]
"""Sees (number of the graph, name of the pass or "before", the graph)."""
BROKEN = "a graph break splits the forward of its module"


@dataclass(slots=True)
class TrunkPiece:
    """The part of a trunk that lies in one graph."""

    graph: int
    trunk: int
    previous: "TrunkPiece | None" = None
    """The piece in an earlier graph whose streams arrive here."""


@dataclass(slots=True)
class Capture:
    """The graphs of one run, in the order they first ran."""

    graphs: list[Analysis] = field(default_factory=list)
    pieces: list[TrunkPiece] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    """For how many modules each graph ran: a shared one only shows its first owner."""


def capture_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    refuse: Refuse,
    observe: GraphObserver | None = None,
) -> Capture:
    """Trace ``model(*args, **kwargs)`` and analyse every graph of it.

    Buffers and random state are put back, compiled submodules are looked into, and Dynamo's caches
    are reset before and after: tracing leaves no mark.

    Raises:
        MHCError: as the analysis raises it.
    """
    capture = Capture()
    reset_dynamo()
    try:
        with _untouched(model):
            torch.compile(model, backend=_Collector(capture, refuse, observe))(*args, **kwargs)
    except Exception as error:
        cause = error.__cause__ or error.__context__
        ours = error if isinstance(error, MHCError) else getattr(error, "inner_exception", cause)
        if isinstance(ours, MHCError):
            raise ours from error
        raise
    finally:
        reset_dynamo()
    return capture


class _Collector:
    """A backend that analyses each graph and then runs it as it is."""

    def __init__(self, capture: Capture, refuse: Refuse, observe: GraphObserver | None) -> None:
        self.capture = capture
        self.refuse = refuse
        self.observe = observe
        self.__name__ = "mhc_collector"

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        frame = Frame.current(gm)
        copy, _ = copy_captured(gm)
        number = len(self.capture.graphs)
        observe = functools.partial(self.observe, number) if self.observe is not None else None
        analysis = analyse(
            copy, resolve_by_id(frame.modules, frame.root), self._refuse_in(frame), observe
        )
        self.capture.graphs.append(analysis)
        self.capture.runs.append(0)
        pieces = [TrunkPiece(number, trunk) for trunk in range(len(analysis.plan.trunks))]
        self.capture.pieces += pieces
        runner, _ = copy_captured(gm)
        for module in runner.modules():
            if isinstance(module, GraphModule):
                erase_markers(module.graph)
                module.recompile()

        inputs = [node for node in copy.graph.nodes if node.op == "placeholder"]
        states = [position for position, node in enumerate(inputs) if is_state(node)]
        owners: list[list[int]] = []

        @without_tracing
        def run(*args: Any) -> Any:
            owner = [id(args[position]) for position in states]
            if owner not in owners:
                owners.append(owner)
                self.capture.runs[number] += 1
            if owner != owners[0]:  # its sites are left as they are, so no streams pass through
                return runner(*args)
            for piece, arrival in zip(pieces, analysis.plan.arrivals, strict=True):
                if arrival is not None and piece.previous is None:
                    found = carry.get(args[arrival.position], arrival.dim)
                    piece.previous = found if isinstance(found, TrunkPiece) else None
            outputs = runner(*args)
            for piece, departure in zip(pieces, analysis.plan.departures, strict=True):
                if departure is not None:
                    carry.put(outputs[departure.position], piece, departure.dim)
            return outputs

        return run

    def _refuse_in(self, frame: Frame) -> Refuse:
        def refuse(hosted: list[HostedSite]) -> dict[int, str]:
            refused = dict(self.refuse(hosted))
            if frame.is_partial:
                refused.update({site.index: BROKEN for site in hosted if site.call == ""})
            return refused

        return refuse


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers, random state and per-module compilation back afterwards."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    compiled = {
        m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None
    }
    for module in compiled:
        module._compiled_call_impl = None
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
