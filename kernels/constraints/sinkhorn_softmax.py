"""The Sinkhorn form of the DeepSeek-V4 code: a small eps in the start and in every division."""

from typing import ClassVar

from mhc_compile.kernels.constraints.sinkhorn import Sinkhorn


class SinkhornSoftmax(Sinkhorn):
    """``M = softmax(h) + eps`` over columns, then rows, then ``iters - 1`` times columns and rows.

    Every divisor is ``sum + eps``, so rows sum to about ``1 - eps``. That code stores the
    transpose, ``comb[in, out]``: its softmax over the last axis is our column step.

    Reference:
        DeepSeek-V4 (arXiv 2606.19348); ``DeepseekV4HyperConnection`` in transformers.
    """

    name: ClassVar[str] = "sinkhorn_softmax"
    default_eps: ClassVar[float] = 1e-6
    start_eps: ClassVar[bool] = True
