"""How long a program for streams takes: a simulation by events.

The host issues launches in their order, each after the one before. A kernel starts when it is
issued, its stream is free and the events it waits for have happened. Transfers between devices run
one after the other on a link of their own, beside all streams.

Kernels of two streams do not slow each other down here. On a device they share its memory and its
processors, so that a gain is at most what the simulation says.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from mhc_compile.passes.stream_program import Free, Launch, Program, Record, Wait


@dataclass(frozen=True, slots=True)
class Costs:
    """What the steps of a program take, in seconds."""

    kernels: Mapping[str, float]
    """On the device, by the name of the launch; 0 if it is not there."""
    transfers: Mapping[str, float]
    """On the link, for launches that start a transfer."""
    launch: float
    """What the host needs to issue a kernel."""
    sync: float
    """What the host needs to record an event, to wait for one, or to hold a storage."""


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, or a transfer, in time."""

    name: str
    stream: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What ran when; `LINK` is the stream of transfers."""

    spans: tuple[Span, ...]
    makespan: float
    """Seconds until everything is done, the host included."""
    host: float
    """Seconds until the host has issued everything."""

    def busy(self, stream: int) -> float:
        """Seconds in which ``stream`` ran something."""
        return sum(span.end - span.start for span in self.spans if span.stream == stream)


LINK = -1


def simulate(program: Program, costs: Costs) -> Timeline:
    """Run a program through the model above."""
    now = 0.0
    free: dict[int, float] = defaultdict(float)
    events: dict[int, float] = {}
    arrival: dict[str, float] = {}  # storage -> end of the transfer that writes it
    spans: list[Span] = []

    def run(name: str, stream: int, start: float, seconds: float) -> float:
        begin = max(start, free[stream])
        free[stream] = begin + seconds
        if seconds:
            spans.append(Span(name, stream, begin, free[stream]))
        return free[stream]

    for step in program:
        match step:
            case Free():
                continue
            case Launch(name, stream, reads, writes, link):
                seconds = costs.kernels.get(name, 0.0)
                if link == "wait":
                    free[stream] = max(free[stream], *(arrival.get(name, 0.0) for name in reads))
                    continue
                now += costs.launch if seconds else 0.0
                end = run(name, stream, now, seconds)
                if link == "start":
                    end = run(name, LINK, end, costs.transfers[name])
                    arrival |= dict.fromkeys(writes, end)
            case Record(event, stream):
                now += costs.sync
                events[event] = max(now, free[stream])
            case Wait(event, stream):
                now += costs.sync
                free[stream] = max(free[stream], events[event])
            case _:
                now += costs.sync
    return Timeline(tuple(spans), max(now, *free.values(), 0.0), now)
