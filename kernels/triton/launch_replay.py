"""The generated replay called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.rounds import by_turns, run_rounds
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.site import Site, floats

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
    """``mhc::replay``, so many sites a launch as one kernel takes."""
    site = Site(spec, X)
    states = [X.new_empty(X.shape) for _ in f]
    inputs = [X.new_empty((*X.shape[:-2], site.channels)) for _ in saved]

    def run(start: torch.Tensor, made: slice, read: slice) -> None:
        streams = (start, *f[made], *states[made], *inputs[read])
        mappings = (h_post[made], h_res[made], saved[read], bias[read], alpha[read])
        coefficients = (t for tensors in mappings for t in floats(*tensors))
        site.run_replay(len(f[made]), len(saved[read]), *streams, *coefficients)

    run_rounds(X, states, inputs, run)
    return by_turns(states, inputs)
