"""Times of several runs by turns in one process, and what machine they were taken on."""

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
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


def in_cold_process(module: str, call: str) -> list[float]:
    """The numbers that a call gives in a new process where all caches of compiled code are empty.

    One thread and one compile worker.

    Args:
        module: of the function, whose name begins with no underscore.
        call: the call in its source form; it gives a sequence of numbers.
    """
    code = f"import {module} as module; print(*module.{call})"
    with tempfile.TemporaryDirectory() as cold:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cold}/inductor",
            "MHC_COMPILE_CACHE": f"{cold}/mhc",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


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
