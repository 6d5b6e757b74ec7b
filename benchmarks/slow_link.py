"""Gloo with an emulated slow link: a collective takes its time and burns no processor.

Gloo's own loopback is work on the cores that also compute, so that there is little to hide.
"""

import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

BACKEND = "slow_gloo"


class SlowLink(dist.ProcessGroup):
    """All-reduces over gloo; each occupies the link for `seconds`, one after the other."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.seconds = 0.0
        self._free = 0.0
        self._name = ""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        """Start one."""
        self._free = max(self._free, time.monotonic()) + self.seconds
        return _Late(self.gloo.allreduce(tensors, options), self._free)

    def getBackendName(self) -> str:  # noqa: N802 - torch calls it so
        """Name for messages."""
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        """Name under which operations find the group."""
        return self._name


class _Late(dist.Work):
    """Work that is not done before ``end``."""

    def __init__(self, work: dist.Work, end: float) -> None:
        super().__init__()
        self._work, self._end = work, end

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._work.wait()
        time.sleep(max(0.0, self._end - time.monotonic()))
        return True


def join(store: str, rank: int, size: int) -> SlowLink:
    """Make a group over the emulated link the default group of this process.

    Args:
        store: a file that all ranks know.
        rank: of this process.
        size: number of ranks.
    """
    dist.Backend.register_backend(BACKEND, SlowLink, devices=["cpu"])
    dist.init_process_group(BACKEND, store=dist.FileStore(store, size), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert isinstance(group, SlowLink)
    return group
