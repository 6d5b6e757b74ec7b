"""The generated replay called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.cpp.call import (
    call,
    channels_last,
    coefficients,
    library,
    narrow_back,
    size_of,
    state_back,
    streams_last,
)
from mhc_compile.kernels.rounds import by_turns, run_rounds
from mhc_compile.kernels.spec import REPLAYED, SiteSpec

Tensors = Sequence[torch.Tensor]


def replay(
    X: torch.Tensor,
    f: Tensors,
    h_post: Tensors,
    h_res: Tensors,
    saved: Tensors,
    bias: Tensors,
    alpha: Tensors,
    spec: SiteSpec,
) -> list[torch.Tensor]:
    """``mhc::replay``, so many sites at a time as the generated function takes."""
    rows = streams_last(X, spec)
    branches = [channels_last(branch, spec, X.dtype) for branch in f]
    posts = [coefficients(*pair) for pair in zip(h_post, h_res, strict=True)]
    reads = [coefficients(*three) for three in zip(saved, bias, alpha, strict=True)]
    states = [rows.new_empty(rows.shape) for _ in f]
    inputs = [rows.new_empty((*rows.shape[:-2], rows.shape[-1])) for _ in saved]

    def run(start: torch.Tensor, made: slice, read: slice) -> None:
        table = _addresses(branches[made], posts[made], states[made], reads[read], inputs[read])
        call(library(spec, X.dtype, "replay"), "replay", (start, table), *size_of(rows))

    run_rounds(rows, states, inputs, run)
    back = [state_back(state, spec) for state in states]
    return by_turns(back, [narrow_back(u, spec) for u in inputs])


def _addresses(
    branches: Tensors,
    posts: Sequence[Tensors],
    states: Tensors,
    reads: Sequence[Tensors],
    inputs: Tensors,
) -> torch.Tensor:
    """The fields of a ``Chunk``, each 8 bytes."""

    def field(tensors: Tensors, room: int) -> list[int]:
        return [t.data_ptr() for t in tensors] + [0] * (room - len(tensors))

    fields = [len(branches), len(reads), *field(branches, REPLAYED)]
    for column in (0, 1):
        fields += field([mappings[column] for mappings in posts], REPLAYED)
    fields += field(states, REPLAYED)
    for column in (0, 1, 2):
        fields += field([mappings[column] for mappings in reads], REPLAYED + 1)
    fields += field(inputs, REPLAYED + 1)
    return torch.tensor(fields, dtype=torch.int64)
