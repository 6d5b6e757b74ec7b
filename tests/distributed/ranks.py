"""Run a function on several gloo ranks, with a time limit and every rank's error.

Ranks are forked from a server that has imported torch once: a start costs a fraction of a second
instead of the seconds of an import.
"""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "mhc_compile.distributed", "tests.distributed.models"])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended."""

    value: Any = None
    error: str = ""
    """Its traceback; empty if it returned."""
    exitcode: int | None = None
    """Negative: the signal that killed it."""


def outcomes(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    seconds: float = 400,
    patience: float = 200,
) -> list[Outcome]:
    """Call ``function(rank, *args)`` on ``world`` ranks of a new process group.

    Args:
        world: number of processes.
        function: of a module that can be imported; returns plain data.
        *args: plain data.
        seconds: after that every process is killed, and the test fails. Ample: machines are busy.
        patience: how long a collective waits for the other ranks.

    Returns:
        One outcome a rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe(duplex=False) for _ in range(world)]
        store = str(Path(folder) / "store")
        processes = [
            _context.Process(
                target=_run, args=(rank, world, store, patience, ends[rank][1], function, args)
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for _, writer in ends:
            writer.close()
        try:
            return _collect([reader for reader, _ in ends], processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def on_ranks(world: int, function: Callable[..., Any], *args: Any, **limits: float) -> list[Any]:
    """`outcomes` of a function that must not fail: what each rank returned."""
    ends = outcomes(world, function, *args, **limits)
    for rank, end in enumerate(ends):
        assert end.exitcode == 0, f"rank {rank} ended with {end.exitcode}\n{end.error}"
    return [end.value for end in ends]


def _collect(readers: list[Any], processes: list[Any], seconds: float) -> list[Outcome]:
    deadline = monotonic() + seconds
    said: dict[int, tuple[Any, str]] = {}
    waiting: dict[Any, int] = {reader: rank for rank, reader in enumerate(readers)}
    while waiting:
        ready = wait(list(waiting), timeout=deadline - monotonic())
        late = sorted(waiting.values())
        assert ready, f"ranks {late} still run after {seconds} s; the others: {said}"
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            with contextlib.suppress(EOFError):  # killed before it could say anything
                said[rank] = pickle.loads(reader.recv_bytes())
    found = []
    for rank, process in enumerate(processes):
        process.join(max(deadline - monotonic(), 1))
        value, error = said.get(rank, (None, "it said nothing"))
        found.append(Outcome(value, error, process.exitcode))
    return found


def _run(
    rank: int,
    world: int,
    store: str,
    patience: float,
    writer: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    value, error = None, ""
    try:
        with _group(rank, world, store, patience):
            value = function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    writer.send_bytes(pickle.dumps((value, error)))
    writer.close()
    if error:  # no teardown: a group whose other ranks died could block in it
        os._exit(1)


@contextlib.contextmanager
def _group(rank: int, world: int, store: str, patience: float) -> Iterator[None]:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=patience),
    )
    yield
    dist.barrier()  # nobody leaves while another one still talks to it
    dist.destroy_process_group()
