"""Run a model once under Dynamo and keep its graphs, without changing anything of the model."""

import contextlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mhc_compile import carry
from mhc_compile._torch_private import (
    DYNAMO_ERRORS,
    Frame,
    GraphBreak,
    copy_captured,
    example_of,
    reset_dynamo,
    watch_breaks,
    without_tracing,
)
from mhc_compile.analysis import Analysis, Refuse, analyse, for_hosts
from mhc_compile.crossings import Answers, Autograd
from mhc_compile.errors import MHCError, UnsupportedGraphError
from mhc_compile.hosts import (
    NumberOf,
    ParameterOwners,
    erase_markers,
    hosts_below,
    resolve_by_id,
)

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_SHOWN = 400


@dataclass(slots=True)
class TrunkPiece:
    """The part of a trunk that lies in one run of one graph."""

    run: int
    trunk: int
    previous: "TrunkPiece | None" = None
    """The piece of an earlier run whose streams arrive here."""


@dataclass(slots=True)
class Capture:
    """Everything one call of a model showed, in the order it ran."""

    runs: list[Analysis] = field(default_factory=list)
    """One entry a run: a graph that runs for several modules is several entries."""
    pieces: list[TrunkPiece] = field(default_factory=list)
    graphs: int = 0
    """Number of different graphs."""
    breaks: list[GraphBreak] = field(default_factory=list)
    """Why there are several, as Dynamo tells it."""


def capture_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    refuse: Refuse,
    *,
    single_pass: bool = False,
) -> Capture:
    """Trace ``model(*args, **kwargs)`` and analyse every graph of it.

    Buffers and random state are put back, compiled submodules are looked into, and Dynamo's caches
    are reset before and after: tracing leaves no mark.

    Raises:
        MHCError: as the analysis raises it.
        UnsupportedGraphError: Dynamo cannot trace the call. An error of the model's own code stays
            what it is.
    """
    capture = Capture()
    collector = _Collector(model, capture, refuse, single_pass)
    reset_dynamo()
    try:
        with _untouched(model), watch_breaks() as capture.breaks:
            torch.compile(model, backend=collector)(*args, **kwargs)
    except Exception as error:
        cause = error.__cause__ or error.__context__
        ours = error if isinstance(error, MHCError) else getattr(error, "inner_exception", cause)
        if isinstance(ours, MHCError):
            raise ours from error
        if not isinstance(error, DYNAMO_ERRORS):  # raised by the model itself
            raise
        raise UnsupportedGraphError(_failure(model, error)) from error
    finally:
        reset_dynamo()
    return capture


def _failure(model: nn.Module, error: Exception) -> str:
    """What is wrong with a call that could not be traced, and where in the user's code."""
    text = str(error)
    frames = _FRAME.findall(text.partition("from user code:")[2])
    place = f" at {frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
    told = " ".join(text.partition("from user code:")[0].split())
    return (
        f"{type(model).__name__} cannot be traced with these example inputs: {type(error).__name__}"
        f"{place}: {told[:_SHOWN]}{' ...' if len(told) > _SHOWN else ''}. First see that "
        "model(...) itself runs on them; if it does, torch.compile cannot compile it as it is"
    )


class _Collector:
    """A backend that analyses each graph and then runs it as it is."""

    def __init__(
        self, model: nn.Module, capture: Capture, refuse: Refuse, single_pass: bool
    ) -> None:
        self.parameters = ParameterOwners(model)
        self.capture = capture
        self.refuse = refuse
        self.lines: dict[type, list[tuple[str, int]]] = defaultdict(list)
        """By class: the lines of the sites of calls that run in pieces, as `_numbers_in` says."""
        self.single_pass = single_pass
        self.__name__ = "mhc_collector"

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        frame = Frame.current(gm)
        root = frame.root  # Dynamo forgets the frame after its compilation
        self.capture.graphs += 1
        inputs = gm.graph.find_nodes(op="placeholder")
        examples = [example_of(node) for node in inputs]
        autograd = Autograd([node.name for node in inputs])
        number_of, resolve = self._numbers_in(frame), resolve_by_id(frame.modules, root)
        captured, is_partial = copy_captured(gm)[0], frame.is_partial
        analyses: dict[Answers, Analysis] = {}

        def analysis_of(args: Sequence[Any]) -> Analysis:
            """One graph may serve sums that are sites and others that are none."""
            answers = autograd.answers(args)
            if answers not in analyses:
                autograd.values = args
                made = analyse(
                    copy_captured(captured)[0],
                    resolve,
                    self.refuse,
                    ask=autograd.ask,
                    number_of=number_of,
                    single_pass=self.single_pass,
                )
                made.is_partial = is_partial
                analyses[autograd.answers(args)] = made
            return analyses[autograd.answers(args)]

        analysis_of(examples)
        runner, _ = copy_captured(gm)
        for module in runner.modules():
            if isinstance(module, GraphModule):
                erase_markers(module.graph)
                module.recompile()

        @without_tracing
        def run(*args: Any) -> Any:
            analysis = analysis_of(args)
            hosted = self.parameters.hosts_for(analysis.hosted, examples, args)
            if hosted is None:
                hosted = hosts_below(analysis.hosted, root, frame.running_root())
            now = analysis if hosted is None else for_hosts(analysis, hosted, self.refuse)
            pieces = self._record(now, args)
            outputs = runner(*args)
            for piece, departure in zip(pieces, now.plan.departures, strict=True):
                if departure is not None:
                    carry.put(outputs[departure.position], piece, departure.dim)
            return outputs

        return run

    def _record(self, analysis: Analysis, args: Sequence[Any]) -> list[TrunkPiece]:
        """Note one run, and which earlier run each of its trunks continues."""
        pieces = []
        for trunk, arrival in enumerate(analysis.plan.arrivals):
            found = carry.get(args[arrival.position], arrival.dim) if arrival is not None else None
            previous = found if isinstance(found, TrunkPiece) else None
            pieces.append(TrunkPiece(len(self.capture.runs), trunk, previous))
        self.capture.runs.append(analysis)
        self.capture.pieces += pieces
        return pieces

    def _numbers_in(self, frame: Frame) -> NumberOf | None:
        """How sites are numbered in a call that a graph break cuts: by line, as they come."""
        if not frame.is_partial:
            return None
        seen = self.lines[type(frame.root)]

        def number(source: str, before: int) -> int:
            if (source, before) not in seen:
                seen.append((source, before))
            return seen.index((source, before))

        return number


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers, attributes, random state and per-module compilation back afterwards."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    # A library may hook a module on its first call and note so in an attribute: put back both, or
    # the next call would hook it twice.
    contents = [
        (value, dict(value))
        for _, saved in attributes
        for value in saved.values()
        if type(value) in (dict, OrderedDict)  # another kind may refuse to be written
    ]
    for module, _ in attributes:
        module._compiled_call_impl = None
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, saved_attributes in attributes:
            vars(module).clear()
            vars(module).update(saved_attributes)
        for value, content in contents:
            value.clear()
            value.update(content)
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
