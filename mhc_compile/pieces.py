"""Calls of converted modules that run in pieces, because a graph break lies in them.

One graph then holds the beginning of the call, some hold a site each, one holds its return, and
what Dynamo could not trace runs in Python between them. No graph alone can tell whether every site
of the call was rewritten: a piece that Dynamo gave up would silently be a plain add. So the graphs
that ran are noted while they run, and compared with what the call should have when it returns.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhc_compile._torch_private import Compiled, without_tracing
from mhc_compile.errors import UnsupportedGraphError


@dataclass(slots=True)
class _OpenCall:
    what: str
    signature: str
    missing: set[str]
    depth: int
    """How deep in Python's stack it began."""


class _Calls(threading.local):
    def __init__(self) -> None:
        self.open: list[_OpenCall] = []

    def begin(self, what: str, signature: str, keys: frozenset[str]) -> None:
        """Note a call. One that began as deep in the stack, or deeper, ended by an exception."""
        depth = _depth()
        while self.open and self.open[-1].depth >= depth:
            self.open.pop()
        self.open.append(_OpenCall(what, signature, set(keys), depth))


def _depth() -> int:
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


_calls = _Calls()


@dataclass(frozen=True, slots=True)
class Piece:
    """What of one call of a converted module lies in a graph that does not hold all of it."""

    what: str
    """The module, for messages."""
    signature: str
    """``MHCSites.signature`` of the module."""
    keys: frozenset[str]
    """All converted sites of the module."""
    here: Sequence[str]
    """Those in this graph."""
    begins: bool
    returns: bool

    def wrap(self, compiled: Compiled) -> Compiled:
        """``compiled``, noting at each call what of the module ran."""

        @without_tracing
        def call(*args: Any) -> Any:
            if self.begins:
                _calls.begin(self.what, self.signature, self.keys)
            if self.here:
                self._note()
            outputs = compiled(*args)
            if self.returns:
                close_call()
            return outputs

        return call

    def _note(self) -> None:
        current = _calls.open[-1] if _calls.open else None
        if current is None or current.signature != self.signature:
            raise UnsupportedGraphError(
                f"the sites {', '.join(self.here)} of {self.what} run outside of a call of it: its "
                "forward was called by itself, or is compiled without what surrounds it. Call the "
                "module, inside of what is compiled"
            )
        current.missing.difference_update(self.here)


def close_call() -> None:
    """Note that the call of a converted module that began last returns.

    Raises:
        UnsupportedGraphError: not all of its sites ran as hyper-connections.
    """
    if not _calls.open:  # it was not compiled in pieces
        return
    call = _calls.open.pop()
    if call.missing:
        raise UnsupportedGraphError(
            f"{', '.join(sorted(call.missing))} of {call.what} did not run as hyper-connections: a "
            "graph break inside its forward left them to Python (TORCH_LOGS=graph_breaks shows "
            "it), or it took another path than at conversion. Remove the cause, convert in the "
            "mode (train or eval) in which it runs, or convert with exclude=(...) for these sites"
        )
