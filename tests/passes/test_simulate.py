"""The simulator of stream programs, on programs whose times are plain."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.passes.simulate import LINK, Costs, Span, Timeline, simulate
from mhc_compile.passes.stream_program import (
    Free,
    Hold,
    Launch,
    Program,
    Record,
    Step,
    Wait,
    synchronize,
)
from tests.passes.test_happens_before import make, random_steps


def costs(launch: float = 0.0, sync: float = 0.0, **kernels: float) -> Costs:
    return Costs(kernels=kernels, transfers={}, launch=launch, sync=sync)


def ends(timeline: Timeline) -> dict[str, float]:
    return {span.name: span.end for span in timeline.spans}


def test_kernels_of_one_stream_follow_each_other() -> None:
    timeline = simulate((make("a", 0), make("b", 0)), costs(a=2, b=3))
    assert timeline.spans == (Span("a", 0, 0, 2), Span("b", 0, 2, 5))
    assert (timeline.makespan, timeline.busy(0), timeline.busy(1)) == (5, 5, 0)


def test_streams_run_beside_each_other() -> None:
    timeline = simulate((make("a", 0), make("b", 1)), costs(a=2, b=3))
    assert (timeline.makespan, timeline.busy(0), timeline.busy(1)) == (3, 2, 3)


def test_a_stream_waits_for_what_stood_before_the_record_and_no_more() -> None:
    program = (make("a", 0), Record(0, 0), make("b", 0), Wait(0, 1), make("c", 1, "a"))
    assert ends(simulate(program, costs(a=2, b=10, c=1))) == {"a": 2, "b": 12, "c": 3}


def test_a_slow_host_issues_kernels_later_than_they_could_run() -> None:
    timeline = simulate((make("a", 0), make("b", 0)), costs(launch=4, a=1, b=1))
    assert timeline.spans == (Span("a", 0, 4, 5), Span("b", 0, 8, 9))
    assert (timeline.makespan, timeline.host) == (9, 8)


def test_the_host_may_be_the_last_to_be_done() -> None:
    timeline = simulate((make("a", 0), Hold("a", 0), Free("a")), costs(launch=1, sync=5, a=1))
    assert (timeline.makespan, timeline.host) == (6, 6)


def test_syncs_take_time_of_the_host() -> None:
    program = (make("a", 0), Record(0, 0), Wait(0, 1), Hold("a", 1), make("b", 1, "a"))
    assert ends(simulate(program, costs(launch=1, sync=1, a=1, b=1))) == {"a": 2, "b": 6}


def test_what_is_not_on_the_device_takes_no_time() -> None:
    assert simulate((make("inputs", 0), make("a", 0)), costs(launch=1, a=1)).makespan == 2


def transfer(*between: Launch) -> Program:
    start = Launch("s", 0, ("a",), ("s",), "start")
    wait = Launch("w", 0, ("s",), ("s",), "wait")
    return (make("a", 0), start, *between, wait, make("b", 0, "s"))


def test_a_transfer_runs_beside_kernels_until_it_is_waited_for() -> None:
    own = Costs(kernels={"a": 1, "b": 1, "c": 4, "s": 0}, transfers={"s": 3}, launch=0, sync=0)
    assert simulate(transfer(), own).makespan == 5
    timeline = simulate(transfer(make("c", 0)), own)
    assert ends(timeline) == {"a": 1, "s": 4, "c": 5, "b": 6}
    assert timeline.busy(LINK) == 3


def test_transfers_follow_each_other_on_the_link() -> None:
    starts = [Launch(name, 0, (), (name,), "start") for name in ("s", "t")]
    own = Costs(kernels={}, transfers={"s": 3, "t": 2}, launch=0, sync=0)
    timeline = simulate((*starts, Launch("w", 0, ("t",), ("t",), "wait")), own)
    assert timeline.spans == (Span("s", LINK, 0, 3), Span("t", LINK, 3, 5))


def test_waiting_for_an_event_that_comes_later_in_the_program_is_no_program() -> None:
    with pytest.raises(KeyError):
        simulate((Wait(0, 1), Record(0, 0)), costs())


@settings(max_examples=100, deadline=None)
@given(random_steps(), st.lists(st.integers(1, 9), min_size=12, max_size=12))
def test_no_program_is_faster_than_its_longest_chain_or_slower_than_one_stream(
    steps: list[Step], seconds: list[int]
) -> None:
    kernels = {f"k{number}": float(value) for number, value in enumerate(seconds)}
    own = Costs(kernels=kernels, transfers={}, launch=0, sync=0)
    timeline = simulate(synchronize(steps), own)
    total = sum(kernels.get(step.name, 0.0) for step in steps if isinstance(step, Launch))
    assert _longest_chain(steps, kernels) <= timeline.makespan <= total
    assert sum(timeline.busy(stream) for stream in range(3)) == total


def _longest_chain(steps: list[Step], kernels: dict[str, float]) -> float:
    """Along values alone: the least that any number of streams needs."""
    done: dict[str, float] = {}
    for step in steps:
        if isinstance(step, Launch):
            end = max((done.get(name, 0.0) for name in step.reads), default=0.0)
            done |= dict.fromkeys(step.writes, end + kernels.get(step.name, 0.0))
    return max(done.values())


def test_a_second_stream_shortens_a_backward_of_two_sites() -> None:
    """The chain of the streams needs 3 + 3 of 26, and products of weights stand before it."""
    work: dict[str, Any] = {"d1": 5, "w1": 5, "side1": 3, "d2": 5, "w2": 5, "side2": 3}
    steps: list[Step] = []
    for site, before in ((1, "grad"), (2, "side1")):
        steps += [make(f"d{site}", 0, before), make(f"w{site}", 0, before)]
        steps += [make(f"side{site}", 1, f"d{site}")]
    two = synchronize([make("grad", 0), *steps])
    one = [Launch(s.name, 0, s.reads, s.writes) for s in steps if isinstance(s, Launch)]
    assert simulate(tuple(one), costs(**work)).makespan == 26
    assert simulate(two, costs(**work)).makespan == 20
