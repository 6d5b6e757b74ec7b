"""Is a plan for streams free of races? A checker that shares nothing with the planner.

Of every stream it keeps the set of launches that are done before the next one may start; a record
copies the set, a wait adds it. Two uses of a storage, one of them a write, must be in one another's
set. When the host drops a storage, its owner may overwrite the block at once, as the caching
allocator of torch lets it: that counts as a write.
"""

from collections import defaultdict
from dataclasses import dataclass

from mhc_compile.errors import VerificationError
from mhc_compile.passes.stream_program import Free, Hold, Launch, Program, Record, Wait, owners

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Race:
    """Two uses of one storage that nothing orders."""

    storage: str
    first: str
    second: str
    """The later launch; "" if the block was given away."""

    def __str__(self) -> str:
        """One sentence."""
        if not self.second:
            return f"the block of {self.storage!r} is reused while {self.first!r} may still use it"
        return f"{self.second!r} does not wait for {self.first!r}, and both use {self.storage!r}"


def find_races(program: Program) -> list[Race]:
    """Every pair of uses that a program leaves unordered, in its order.

    Sets are integers, one bit for each launch: n launches cost n^2 / 8 bytes moved at most.
    """
    owner = owners(program)
    launches: list[Launch] = []
    done: dict[int, int] = defaultdict(int)  # stream -> set of launches
    events: dict[int, int] = {}
    written: dict[str, int] = defaultdict(int)
    read: dict[str, int] = defaultdict(int)
    held: dict[str, set[int]] = defaultdict(set)
    users: dict[str, int] = defaultdict(int)
    races: list[Race] = []

    def unordered(storage: str, left: int, second: str) -> None:
        while left:
            lowest = left & -left
            races.append(Race(storage, launches[lowest.bit_length() - 1].name, second))
            left ^= lowest

    for step in program:
        match step:
            case Record(event, stream):
                events[event] = done[stream]
            case Wait(event, stream):
                done[stream] |= events.get(event, 0)
            case Hold(storage, stream):
                held[storage].add(stream)
            case Free(storage):
                known = done[owner[storage]]
                for stream in held[storage]:
                    known |= done[stream]
                unordered(storage, users[storage] & ~known, "")
            case Launch(name, stream, reads, writes):
                mark = 1 << len(launches)
                launches.append(step)
                for storage in reads:
                    unordered(storage, written[storage] & ~done[stream], name)
                for storage in writes:
                    uses = written[storage] | read[storage]
                    unordered(storage, uses & ~done[stream], name)
                for storage in reads:
                    read[storage] |= mark
                    users[storage] |= mark
                for storage in writes:
                    written[storage], read[storage] = mark, 0
                    users[storage] |= mark
                done[stream] |= mark
    return races


def check_program(program: Program) -> None:
    """Refuse a program that has a race.

    Raises:
        VerificationError: two uses of a storage are not ordered; the message names them.
    """
    races = find_races(program)
    if races:
        shown = "; ".join(map(str, races[:_SHOWN]))
        more = f"; and {len(races) - _SHOWN} more" if len(races) > _SHOWN else ""
        raise VerificationError(
            f"a plan for streams has {len(races)} races: {shown}{more}. This is a fault of "
            "mhc-compile: switch the plan off with skip_passes=('assign_streams_pass',)"
        )
