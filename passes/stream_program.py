"""What the host tells the streams of a device, in order: the language of plans.

    Launch(kernel, stream)   Record(event, stream)   Wait(event, stream)   Hold(storage, stream)

Kernels of one stream run in order. A stream that waits for an event goes on when everything is done
that stood before its record. A plan is such a program; `happens_before` checks it, `simulate` times
it, `stream_lowering` writes it into a graph. Stream 0 is the one that calls the graph.

`synchronize` puts events and holds into a program that has none, and no more than it needs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

MAIN = 0
"""The stream that calls the graph."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, with the storages it reads and those it writes."""

    name: str
    stream: int
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    link: Literal["", "start", "wait"] = ""
    """Whether it starts a transfer between devices, which runs beside all streams, or waits for
    those that write what it reads."""


@dataclass(frozen=True, slots=True)
class Record:
    """Note how far ``stream`` has come."""

    event: int
    stream: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Let ``stream`` go on when ``event`` has happened; nothing, if it was never recorded."""

    event: int
    stream: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Give the block of ``storage`` away only when ``stream`` is done (``record_stream``)."""

    storage: str
    stream: int


@dataclass(frozen=True, slots=True)
class Free:
    """The host drops ``storage``: the stream that allocated it may overwrite its block at once."""

    storage: str


Step: TypeAlias = Launch | Free
Instruction: TypeAlias = Launch | Record | Wait | Hold | Free
Program: TypeAlias = tuple[Instruction, ...]
_Clock: TypeAlias = dict[int, int]  # stream -> its last launch that is known to be done


def owners(steps: Iterable[Instruction]) -> dict[str, int]:
    """The stream that allocates each storage: the one that writes it first."""
    owner: dict[str, int] = {}
    for step in steps:
        if isinstance(step, Launch):
            for storage in step.writes:
                owner.setdefault(storage, step.stream)
    return owner


def synchronize(steps: Sequence[Step]) -> Program:
    """The same launches with the records, waits and holds that make them race-free.

    A launch waits for the last one of every other stream that it conflicts with, unless that is
    known to be done: by an earlier wait, or by another wait of the same launch. One record stands
    right behind each launch that is waited for. A storage is held for a stream that used it and is
    not known to be done with it when the host drops it.

    Args:
        steps: launches and drops in the order of the host.

    Reference:
        F. Mattern, "Virtual Time and Global States of Distributed Systems", 1989: an event carries
        the clock of its stream at the record, not the one at the wait. With three streams the
        difference is a race.
    """
    state = _State(owners(steps))
    waits: dict[int, list[int]] = {}
    holds: dict[int, list[int]] = {}
    for position, step in enumerate(steps):
        if isinstance(step, Launch):
            waits[position] = state.launch(position, step)
        else:
            holds[position] = state.free(step.storage)
    recorded = {event for events in waits.values() for event in events}
    numbers = {position: number for number, position in enumerate(sorted(recorded))}
    return tuple(_written(steps, waits, holds, numbers))


def _written(
    steps: Sequence[Step],
    waits: dict[int, list[int]],
    holds: dict[int, list[int]],
    numbers: dict[int, int],
) -> Iterator[Instruction]:
    for position, step in enumerate(steps):
        if isinstance(step, Free):
            yield from (Hold(step.storage, stream) for stream in holds[position])
            yield step
            continue
        yield from (Wait(numbers[event], step.stream) for event in waits[position])
        yield step
        if position in numbers:
            yield Record(numbers[position], step.stream)


@dataclass(slots=True)
class _State:
    """What is known about the streams between two steps."""

    owner: dict[str, int]
    clocks: dict[int, _Clock] = field(default_factory=dict)
    at_record: dict[int, _Clock] = field(default_factory=dict)
    """The clock of a launch's stream right behind it."""
    stream_of: dict[int, int] = field(default_factory=dict)
    written: dict[str, _Clock] = field(default_factory=dict)
    """The last write of a storage."""
    touched: dict[str, _Clock] = field(default_factory=dict)
    """The last use of a storage by every stream."""
    read: dict[str, _Clock] = field(default_factory=dict)
    """The same since its last write, reads alone."""

    def launch(self, position: int, step: Launch) -> list[int]:
        """Note a launch; the launches whose events it has to wait for."""
        own = self.clocks.setdefault(step.stream, {})
        needed: _Clock = {}
        for storage in step.reads:
            _merge(needed, self.written.get(storage, {}))
        for storage in step.writes:
            _merge(needed, self.written.get(storage, {}))
            _merge(needed, self.read.get(storage, {}))
        open_ = [p for stream, p in needed.items() if own.get(stream, -1) < p]
        events = [p for p in open_ if not any(self._covers(other, p) for other in open_)]
        for event in events:
            _merge(own, self.at_record[event])
        own[step.stream] = position
        self.stream_of[position] = step.stream
        self.at_record[position] = dict(own)
        for storage in step.reads:
            self.read.setdefault(storage, {})[step.stream] = position
            self.touched.setdefault(storage, {})[step.stream] = position
        for storage in step.writes:
            self.read[storage] = {}
            self.written[storage] = {step.stream: position}
            self.touched.setdefault(storage, {})[step.stream] = position
        return sorted(events)

    def free(self, storage: str) -> list[int]:
        """The streams to wait for before the owner of ``storage`` may overwrite it."""
        known = self.clocks[self.owner[storage]]
        uses = self.touched[storage]
        held = [stream for stream, last in uses.items() if known.get(stream, -1) < last]
        for stream in tuple(held):
            others = (self.clocks[other] for other in held if other != stream)
            if any(clock.get(stream, -1) >= uses[stream] for clock in others):
                held.remove(stream)
        return sorted(held)

    def _covers(self, event: int, position: int) -> bool:
        """Whether waiting for ``event`` also waits for the launch at ``position``."""
        stream = self.stream_of[position]
        return event != position and self.at_record[event].get(stream, -1) >= position


def _merge(clock: _Clock, other: _Clock) -> None:
    for stream, position in other.items():
        clock[stream] = max(clock.get(stream, -1), position)
