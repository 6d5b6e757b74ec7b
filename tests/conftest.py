"""One environment for every test: offline, seeded, few threads, one compile cache."""

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

# Read while torch and transformers are imported, so set before they are.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "inductor")
)

import numpy as np
import pytest
import torch
from hypothesis import settings

# torch writes its structured trace for any handler it finds, and pytest takes every record: a third
# of the time of a test that compiles.
logging.getLogger("torch.__trace").propagate = False

# One thread for each of several processes.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

# deadline: the first example compiles. derandomize: a failure must be the change's, not the day's.
settings.register_profile("mhc", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mhc")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed every generator and leave no compiled code to the next test."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what models under test use
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Of several processes one takes a whole file, unless its tests name smaller groups.
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def fake_ranks() -> Iterator[None]:
    """A process group of two ranks that do not exist: collectives can be traced, and do nothing."""
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()
