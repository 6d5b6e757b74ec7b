"""An independent judge of programs for streams: the event handler of torch's CUDA sanitizer.

It is driven with made-up pointers, one for each storage, and needs no GPU. The caching allocator is
emulated at its worst: a dropped block is overwritten at once, on the stream that allocated it, or
after the streams that hold it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from unittest import mock

from torch.cuda import _sanitizer

from mhc_compile.passes.happens_before import find_races
from mhc_compile.passes.stream_program import (
    Free,
    Hold,
    Instruction,
    Launch,
    Program,
    Record,
    Wait,
    owners,
)

_SYNCS = (Record, Wait, Hold)
_REUSE = 1000
"""First of the streams on which dropped blocks are overwritten."""
_NO_STACKS = SimpleNamespace(
    walk_stack=lambda frame: (),
    StackSummary=SimpleNamespace(extract=lambda frames, lookup_lines: []),
)
"""It takes a stack trace of every launch, which is most of its time and tells nothing here."""


def sanitizer_errors(program: Program) -> int:
    """How many unsynchronised accesses the sanitizer sees."""
    with mock.patch.object(_sanitizer, "traceback", _NO_STACKS):
        return _errors(program, _sanitizer.EventHandler())


def _errors(program: Program, handler: _sanitizer.EventHandler) -> int:
    owner = owners(program)
    pointers: dict[str, int] = {}
    held: dict[str, set[int]] = defaultdict(set)
    fresh = count(_REUSE)
    errors = 0

    def launch(stream: int, reads: set[int], writes: set[int], name: str) -> int:
        aliases: dict[int, list[str]] = defaultdict(list)
        found = handler._handle_kernel_launch(stream, reads - writes, writes, writes, name, aliases)
        return len(found)

    def pointer(storage: str) -> int:
        return pointers.setdefault(storage, len(pointers) + 1)

    def overwritten(storage: str) -> int:
        """The block is given to somebody else, and comes back as it was: the caller may keep it."""
        reuser, event = next(fresh), next(fresh)
        handler._handle_stream_creation(reuser)
        for stream in (owner[storage], *held[storage]):
            handler._handle_event_creation(event)
            handler._handle_event_record(event, stream)
            handler._handle_event_wait(event, reuser)
        accesses = handler.tensors_accessed.accesses
        kept = accesses[pointer(storage)]
        accesses[pointer(storage)] = replace(kept, reads=list(kept.reads))
        found = launch(reuser, set(), {pointer(storage)}, "reuse")
        accesses[pointer(storage)] = kept
        return found

    for step in program:
        match step:
            case Launch(name, stream, reads, writes):
                errors += launch(stream, set(map(pointer, reads)), set(map(pointer, writes)), name)
            case Record(event, stream):
                handler._handle_event_creation(event)
                handler._handle_event_record(event, stream)
            case Wait(event, stream):
                handler._handle_event_wait(event, stream)
            case Hold(storage, stream):
                held[storage].add(stream)
            case Free(storage):
                errors += overwritten(storage)
    return errors


def mutants(program: Program) -> Iterator[tuple[Instruction, Program]]:
    """Every sync of a program, and the program without it."""
    for position, step in enumerate(program):
        if isinstance(step, _SYNCS):
            yield step, program[:position] + program[position + 1 :]


def syncs(program: Program) -> int:
    """How many records, waits and holds a program has."""
    return sum(isinstance(step, _SYNCS) for step in program)


def assert_sound(program: Program) -> int:
    """Both judges find a program free of races, and a race if any one of its syncs is missing.

    Returns:
        The number of syncs.
    """
    assert find_races(program) == []
    assert sanitizer_errors(program) == 0
    for step, mutant in mutants(program):
        assert find_races(mutant), f"the checker does not miss {step}"
        assert sanitizer_errors(mutant), f"the sanitizer does not miss {step}"
    return syncs(program)
