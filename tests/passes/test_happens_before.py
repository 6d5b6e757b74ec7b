"""The checker of stream programs, and the planner's syncs, against torch's CUDA sanitizer."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.errors import VerificationError
from mhc_compile.passes.happens_before import Race, check_program, find_races
from mhc_compile.passes.stream_program import (
    Free,
    Hold,
    Instruction,
    Launch,
    Program,
    Record,
    Step,
    Wait,
    synchronize,
)
from tests.passes.stream_oracle import assert_sound, mutants, sanitizer_errors, syncs


def make(name: str, stream: int, *reads: str) -> Launch:
    """A kernel that writes a storage of its own name."""
    return Launch(name, stream, reads, (name,))


def kinds(program: Program) -> list[type[Instruction]]:
    return [type(step) for step in program]


def test_a_consumer_on_another_stream_waits_for_its_producer() -> None:
    program = synchronize([make("a", 0), make("b", 1, "a")])
    assert program == (make("a", 0), Record(0, 0), Wait(0, 1), make("b", 1, "a"))
    assert find_races((make("a", 0), make("b", 1, "a"))) == [Race("a", "a", "b")]


def test_one_stream_needs_no_syncs() -> None:
    steps: list[Step] = [make("a", 0), make("b", 0, "a"), Free("a"), make("c", 0, "b")]
    assert synchronize(steps) == tuple(steps)


def test_two_consumers_on_one_stream_wait_once() -> None:
    program = synchronize([make("a", 0), make("b", 1, "a"), make("c", 1, "a")])
    assert kinds(program).count(Wait) == 1
    assert assert_sound(program) == 2


def test_consumers_on_two_streams_share_the_record() -> None:
    program = synchronize([make("a", 0), make("b", 1, "a"), make("c", 2, "a")])
    assert kinds(program) == [Launch, Record, Wait, Launch, Wait, Launch]
    assert assert_sound(program) == 3


def test_a_wait_for_a_later_launch_covers_the_earlier_ones_of_its_stream() -> None:
    program = synchronize([make("a", 0), make("b", 0), make("c", 1, "a", "b")])
    assert program[1:4] == (make("b", 0), Record(0, 0), Wait(0, 1))


def test_a_write_waits_for_the_readers_on_other_streams() -> None:
    program = synchronize([make("a", 0), make("b", 1, "a"), Launch("w", 0, (), ("a",))])
    assert program[-2] == Wait(1, 0)
    assert assert_sound(program) == 4


def test_an_event_carries_the_clock_of_its_record_not_of_its_wait() -> None:
    """Stream 1 waits for stream 2 only behind the record that stream 0 waits for."""
    steps: list[Step] = [
        make("a", 1),
        make("b", 2),
        make("c", 1, "b"),
        make("d", 0, "a"),
        make("e", 0, "b"),
    ]
    program = synchronize(steps)
    assert program[-4:] == (
        Wait(0, 0), make("d", 0, "a"), Wait(1, 0), make("e", 0, "b"),
    )  # fmt: skip
    assert assert_sound(program) == 5
    # What a planner gets that takes the clock of stream 1 as it is when stream 0 waits.
    naive = (*program[:-2], program[-1])
    assert [race.first for race in find_races(naive)] == ["b"]
    assert sanitizer_errors(naive) == 1


def test_a_wait_for_one_stream_is_also_one_for_those_it_has_waited_for() -> None:
    program = synchronize([make("a", 2), make("b", 1, "a"), make("c", 0, "a", "b")])
    assert program[-2:] == (Wait(1, 0), make("c", 0, "a", "b"))
    assert assert_sound(program) == 4


def test_a_storage_that_another_stream_uses_last_is_held() -> None:
    program = synchronize([make("a", 0), make("b", 1, "a"), Free("a")])
    assert program[-2:] == (Hold("a", 1), Free("a"))
    unheld = (*program[:-2], program[-1])
    assert find_races(unheld) == [Race("a", "b", "")]
    assert sanitizer_errors(unheld) == 1


def test_a_storage_is_not_held_for_a_stream_whose_work_its_owner_has_waited_for() -> None:
    steps = [make("a", 0), make("b", 1, "a"), make("c", 0, "b"), Free("a")]
    assert Hold not in kinds(synchronize(steps))


def test_a_wait_for_an_event_that_was_never_recorded_orders_nothing() -> None:
    assert len(find_races((make("a", 0), Wait(0, 1), make("b", 1, "a")))) == 1


def test_an_event_may_be_recorded_again() -> None:
    program = (
        *(make("a", 0), Record(0, 0), Wait(0, 1), make("b", 1, "a")),
        *(make("c", 0), Record(0, 0), Wait(0, 1), make("d", 1, "c")),
    )
    assert find_races(program) == []
    assert len(find_races(program[:5] + program[6:])) == 1


def test_the_error_names_both_kernels_and_how_to_go_on() -> None:
    steps = [make(f"a{i}", 0) for i in range(5)]
    program = (*steps, make("b", 1, *(step.name for step in steps)))
    with pytest.raises(VerificationError, match=r"5 races: 'b' does not wait for 'a0'.*2 more"):
        check_program(program)
    with pytest.raises(VerificationError, match="the block of 'a' is reused while 'b' may"):
        check_program((*synchronize([make("a", 0), make("b", 1, "a")]), Free("a")))


@st.composite
def random_steps(draw: Any, streams: int = 3) -> list[Step]:
    """Kernels with random operands on random streams, some in place; drops at the last use."""
    steps: list[Launch] = [Launch("in", 0, (), ("x", "y"))]
    known = ["x", "y"]
    for number in range(draw(st.integers(1, 12))):
        reads = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
        in_place = draw(st.booleans()) and draw(st.booleans())
        written = draw(st.sampled_from(known)) if in_place else f"v{number}"
        steps.append(
            Launch(f"k{number}", draw(st.integers(0, streams - 1)), tuple(reads), (written,))
        )
        known = list(dict.fromkeys([*known, written]))
    outputs = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
    steps.append(Launch("out", 0, tuple(outputs), ("x", "y")))
    kept = {"x", "y", *outputs}
    last = {name: i for i, step in enumerate(steps) for name in (*step.reads, *step.writes)}
    program: list[Step] = []
    for position, step in enumerate(steps):
        program.append(step)
        program += [Free(n) for n in known if n not in kept and last[n] == position]
    return program


@settings(max_examples=150, deadline=None)
@given(random_steps())
def test_random_programs_get_the_syncs_they_need_and_no_others(steps: list[Step]) -> None:
    program = synchronize(steps)
    assert [step for step in program if isinstance(step, Launch | Free)] == steps
    assert_sound(program)


@settings(max_examples=150, deadline=None)
@given(random_steps(), st.randoms(use_true_random=False))
def test_the_checker_and_the_sanitizer_agree_on_programs_with_syncs_missing(
    steps: list[Step], random: Any
) -> None:
    program = synchronize(steps)
    for _ in range(min(3, syncs(program))):
        mutant = random.choice([mutant for _, mutant in mutants(program)])
        assert bool(find_races(mutant)) == bool(sanitizer_errors(mutant))
        program = mutant
        if not syncs(program):
            break
