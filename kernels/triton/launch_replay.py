"""The generated replay called with tensors; see `launch`."""

from collections.abc import Sequence

import torch

from mhc_compile.kernels.spec import REPLAYED, SiteSpec
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
    site, first = Site(spec, X), len(saved) - len(f)
    states = [X.new_empty(X.shape) for _ in f]
    inputs = [X.new_empty((*X.shape[:-2], site.channels)) for _ in saved]
    start = X
    for at in range(0, max(1, len(f)), REPLAYED):
        some = slice(at, at + REPLAYED)
        # The branch inputs of these states, and before all of them that of X.
        read = slice(at + first if at else 0, at + first + REPLAYED)
        streams = (start, *f[some], *states[some], *inputs[read])
        coefficients = (h_post[some], h_res[some], saved[read], bias[read], alpha[read])
        site.run_replay(
            len(f[some]),
            len(saved[read]),
            *streams,
            *(t for ts in coefficients for t in floats(*ts)),
        )
        start = states[some][-1] if f else start
    made = iter(inputs)
    return [
        *(next(made) for _ in range(first)),
        *(tensor for state in states for tensor in (state, next(made))),
    ]
