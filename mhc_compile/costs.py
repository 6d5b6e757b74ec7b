"""What widening costs, counted on a captured graph: parameters of a site, bytes of a call.

All bytes are those of the example inputs, and extra: what the widened network writes and the plain
one does not.
"""

from collections.abc import Iterable
from functools import lru_cache

from torch.fx import Node

from mhc_compile.kernels.init import initial_parameters
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.plan import PlannedSite
from mhc_compile.passes.values import dtype_of, numel
from mhc_compile.passes.vocabulary import LAYOUT
from mhc_compile.report import TrunkOperation

_COEFFICIENT = 4  # bytes: coefficients are float32 whatever the model's dtype
_COPIES = frozenset({"clone", "contiguous"})  # of the layout operations, those that write


@lru_cache(maxsize=64)
def parameter_count(spec: SiteSpec, width: int) -> int:
    """New scalar parameters of one site: phi, bias and alpha; a learned collapse has its own."""
    return sum(tensor.numel() for tensor in initial_parameters(spec, width).values())


def activation_bytes(planned: PlannedSite, spec: SiteSpec) -> int | None:
    """Extra bytes one call of a site writes; None where a size is dynamic.

    With T tokens, width C and n streams these are n streams in place of one sum, (n - 1) T C; the
    branch input u, T C, both in the dtype of the trunk; and the coefficients h_pre, h_post and
    H_res, n^2 + 2n float32 numbers a token (or in all, if ``dynamic`` is False).
    """
    elements, dtype = numel(planned.start), dtype_of(planned.site.root)
    if not isinstance(elements, int) or dtype is None:
        return None
    n = spec.streams
    tokens = elements // planned.width if spec.dynamic else 1
    return n * elements * dtype.itemsize + (n * n + 2 * n) * tokens * _COEFFICIENT


def trunk_operations(sites: Iterable[PlannedSite], streams: int) -> tuple[TrunkOperation, ...]:
    """What runs on every stream of one trunk, by operation, in the order of first use."""
    counts: dict[str, int] = {}
    written: dict[str, int | None] = {}
    for planned in sites:
        projected = planned.start is not planned.site.origin  # once, on the collapsed value
        skip = () if projected else reversed(planned.site.skip_path)
        for node in (*planned.region, *skip):
            name = op_name(node)
            if name == "getitem":  # of the results of one operation, or a view
                continue
            counts[name] = counts.get(name, 0) + 1
            written[name] = _plus(written.get(name, 0), _written(node, streams))
    return tuple(TrunkOperation(name, counts[name], written[name]) for name in counts)


def _written(node: Node, streams: int) -> int | None:
    name, elements, dtype = op_name(node), numel(node), dtype_of(node)
    if name in LAYOUT and name not in _COPIES:
        return 0
    if not isinstance(elements, int):
        return None
    return (streams - 1) * elements * (dtype.itemsize if dtype is not None else 0)


def _plus(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left + right
