"""What Dynamo says, keeps and forgets, and what other parts of torch hide."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.exc import ShortenTraceback, TorchDynamoException

DYNAMO_ERRORS = (TorchDynamoException,)
"""What Dynamo raises where it cannot go on; all else comes from the code that it traces or runs."""
_BREAK = re.compile(r"in user code at (.+):(\d+)\nGraph Break Reason: (.*)", re.DOTALL)


def custom_op_bodies(namespace: str) -> dict[Any, Callable[..., Any]]:
    """Operator -> the Python function it was made from, for ``torch.library`` ops."""
    from torch._library.custom_ops import OPDEFS

    return {
        definition._opoverload: definition._init_fn
        for name, definition in OPDEFS.items()
        if name.startswith(f"{namespace}::")
    }


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``), where tlparse lists it."""
    torch._logging._internal.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload
    )


def passing_through(error: Exception) -> Exception:
    """``error`` as an exception that Dynamo hands to the user as it is.

    Others become a BackendCompilerFailed, which ``except UnsupportedGraphError`` does not catch.
    """
    kind = type(error)

    def init(self: Any, message: str) -> None:
        # A ValueError among the bases keeps the initialisers from calling each other.
        ShortenTraceback.__init__(self, message, first_useful_frame=None)

    cls = type(kind.__name__, (kind, ShortenTraceback), {
        "__module__": kind.__module__, "__init__": init,
    })  # fmt: skip
    return cls(str(error)).with_traceback(error.__traceback__)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """Where Dynamo could not go on, and what it says of it."""

    source: str
    """``file.py:123`` of the user's line."""
    reason: str
    """Its explanation, and the setting that it proposes where there is one."""


class _BreakHandler(logging.Handler):
    """Reads graph breaks off Dynamo's log: it keeps no list of those that give up a whole frame."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[GraphBreak] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = _BREAK.search(record.getMessage())
        if found is not None:
            path, line, text = found.groups()
            lines = [part.strip() for part in text.splitlines()]
            told = [part for part in lines if part.startswith("Explanation:")][:1] or lines[:1]
            told += [p for p in lines if p.startswith("Hint:") and "torch._dynamo.config" in p]
            reason = " ".join(told).removeprefix("Explanation: ")
            name = path.replace(chr(92), "/").rsplit("/", 1)[-1]
            self.breaks.append(GraphBreak(f"{name}:{line}", reason))


@contextlib.contextmanager
def watch_breaks() -> Iterator[list[GraphBreak]]:
    """The graph breaks that happen inside, in their order; what the user logs stays the same."""
    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    was_on, level, propagate = logger.isEnabledFor(logging.DEBUG), logger.level, logger.propagate
    handler = _BreakHandler()
    logger.addHandler(handler)
    if not was_on:
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    try:
        yield handler.breaks
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def reset_dynamo() -> None:
    """Forget everything compiled so far."""
    torch._dynamo.reset()


def without_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as something Dynamo neither traces nor guards on."""
    return torch._dynamo.disable(function)  # type: ignore[no-untyped-call, no-any-return]
