"""Times of several runs by turns in one process, and what machine they were taken on."""

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def by_turns(runs: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Milliseconds of CPU time of this thread, ``repeat`` of each run, one after the other.

    One round before them is not counted. CPU time bears other load on the machine better than the
    clock on the wall; set one thread, or it counts a part only.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeat + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if number:
                times[name].append((time.thread_time() - start) * 1e3)
    return times


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine; threads as set now."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def return_freed_memory() -> None:
    """Have glibc give every freed block of 256 KB and more back to the system at once.

    By itself it raises that limit to 32 MB while a program runs, and keeps freed tensors below it
    in pieces: resident memory then shows the order of allocations as much as what is live.
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold, size = -3, 1 << 18
        ctypes.CDLL(None).mallopt(m_mmap_threshold, size)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of every size, as it does of those below 32 MB.

    Otherwise larger tensors would measure page faults, in every run alike.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold, size = -3, -1, 1 << 30
        libc.mallopt(m_mmap_threshold, size)
        libc.mallopt(m_trim_threshold, size)
