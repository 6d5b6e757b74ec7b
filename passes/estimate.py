"""How long a node of an ATen graph takes: an estimate from its bytes and flops.

    seconds = launch + max(flops / rate, bytes / bandwidth)

A roofline, for decisions and simulations and not for reports: it knows no caches and no fusion, so
the pointwise operations that Inductor joins are counted one by one. Every tensor is read and
written once; an mhc op then moves what `mhc_compile.kernels.traffic.least_rows` says. Views cost
nothing. Symbolic sizes count with their hints and add no guards.

Reference:
    S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from mhc_compile.kernels.constraints import constraint_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.collectives import is_collective, is_wait, tensors
from mhc_compile.passes.opnames import is_mhc
from mhc_compile.passes.values import value_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What one device, and the link that joins it to its peers, do in a second."""

    name: str
    single_flops: float
    """Per second, in float32 (and wider: the estimate does not tell float64 apart)."""
    half_flops: float
    """Per second, in types of two bytes or less."""
    bandwidth: float
    """Bytes per second that its memory reads and writes."""
    launch: float
    """Seconds that any operation takes at least."""
    op_launch: float
    """The same for an mhc op, which torch dispatches through Python."""
    link_latency: float
    """Seconds that any collective takes at least."""
    link_bandwidth: float
    """Bytes per second that one device sends."""
    phi_apart: bool
    """Whether kernels make the gradient of phi in a pass of its own, also inside a whole op."""


CPU = Device(
    name="one core of a server CPU, over Ethernet",
    # Measured on the machine that docs/performance.md names, one thread: products of 1024 x 1024,
    # a copy of 64 MiB, an addition of 4 numbers and a pre-mix of one token.
    single_flops=85e9,
    half_flops=190e9,
    bandwidth=26e9,
    launch=1.5e-6,
    op_launch=45e-6,
    # Assumptions: TCP between two hosts, 10 Gbit/s.
    link_latency=100e-6,
    link_bandwidth=1.25e9,
    phi_apart=False,
)
H100 = Device(
    name="NVIDIA H100 SXM, over NVLink",
    # NVIDIA H100 Tensor Core GPU datasheet: 67 Tflop/s float32, 989 Tflop/s dense bfloat16,
    # 3.35 TB/s, NVLink 900 GB/s of both directions together.
    single_flops=67e12,
    half_flops=989e12,
    bandwidth=3.35e12,
    link_bandwidth=450e9,
    # Assumptions; the host runs ahead of the device.
    launch=4e-6,
    op_launch=4e-6,
    link_latency=15e-6,
    phi_apart=True,
)

_UNKNOWN = 1
"""Stands for a size that only the data tells."""
_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Any] = flop_registry | {  # which lacks those of a CPU
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (
        flop_registry[_ATEN._scaled_dot_product_flash_attention]
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_registry[_ATEN._scaled_dot_product_flash_attention_backward]
    ),
}
_VIEWS = frozenset({"aten::_unsafe_view", "aten::_reshape_alias"})
"""Views by what they do, though not by their schemas."""


def device_of(graph: Graph) -> Device:
    """The entry of the table for the device that the graph's tensors are on."""
    for node in graph.nodes:
        for tensor in tensors(value_of(node)):
            return CPU if tensor.device.type == "cpu" else H100
    return CPU


def estimate(graph: Graph, device: Device) -> dict[Node, float]:
    """`node_seconds` of every node, in the order of the graph."""
    return {node: node_seconds(node, device) for node in graph.nodes}


def node_seconds(node: Node, device: Device) -> float:
    """Seconds of compute that a node takes; a collective only its launch, a wait nothing."""
    if node.op not in ("call_function", "call_method") or is_free(node):
        return 0.0
    if is_collective(node):
        return device.launch
    first, *_ = tensors(value_of(node))  # statistics behind it are float32 whatever it is
    is_half = first.dtype.itemsize <= 2 and not is_mhc(node)
    rate = device.half_flops if is_half else device.single_flops
    launch = device.op_launch if is_mhc(node) else device.launch
    return launch + max(node_flops(node) / rate, node_bytes(node) / device.bandwidth)


def transfer_seconds(node: Node, device: Device) -> float:
    """Seconds between the start of a collective and the end of its transfer, on an idle link.

    In the limit of many ranks a ring all-reduce sends its tensor twice, any other collective the
    larger one of what it takes and gives once.
    """
    read = bytes_of(operand for source in node.all_input_nodes for operand in _values(source))
    sent = max(read, bytes_of(_values(node)))
    passes = 2 if "all_reduce" in str(node.target) else 1
    return device.link_latency + passes * sent / device.link_bandwidth


def is_free(node: Node) -> bool:
    """Whether a node runs no kernel: a view, a part of a tuple, a size, a wait."""
    return shows_operand(node) or not tensors(value_of(node))


def shows_operand(node: Node) -> bool:
    """Whether a node's value lies in the memory of its first operand."""
    if node.target is operator.getitem or is_wait(node):
        return True
    target = node.target
    return isinstance(target, OpOverload) and (target.is_view or target._schema.name in _VIEWS)


def node_bytes(node: Node) -> int:
    """Bytes of all tensors that the node reads and writes, each once."""
    read = (operand for source in node.all_input_nodes for operand in _values(source))
    return bytes_of(read) + bytes_of(_values(node))


def node_flops(node: Node) -> int:
    """Floating point operations of products, convolutions and attention, as torch counts them.

    Pointwise work and reductions are 0: their bytes take longer. So is a constraint of an mhc op:
    20 Sinkhorn steps at n = 4 are about 1300 operations a token, its projection 192 C.
    """
    if is_mhc(node):
        return _mhc_flops(node)
    formula = _FORMULAS.get(getattr(node.target, "overloadpacket", node.target))
    if formula is None:
        return 0
    # Formulas compare sizes, which would guard on symbolic ones: they get plain numbers.
    args, kwargs, out = pytree.tree_map_only(
        Node, _plain, (node.args, dict(node.kwargs), _plain(node))
    )
    return int(formula(*args, **kwargs, out_val=out))


def bytes_of(values: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(math.prod(_shape(tensor)) * tensor.element_size() for tensor in values)


def _values(node: Node) -> list[torch.Tensor]:
    return tensors(value_of(node))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(optimization_hint(size, fallback=_UNKNOWN) for size in tensor.shape)


def _plain(node: Node) -> Any:
    """The value of a node with meta tensors of plain sizes in place of its tensors."""
    return pytree.tree_map_only(
        torch.Tensor,
        lambda tensor: torch.empty(_shape(tensor), dtype=tensor.dtype, device="meta"),
        value_of(node),
    )


def _mhc_flops(node: Node) -> int:
    """Of an mhc op: its projection and its mixing, twice each in a backward."""
    assert isinstance(node.target, OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    given = dict(zip(names, node.args, strict=False))  # those with a default may be missing
    sizes = {name: _shape(value_of(arg)) for name, arg in given.items() if isinstance(arg, Node)}
    name = node.target._schema.name.removeprefix("mhc::")
    is_sum = name.startswith("collapse") and "bias" not in sizes
    kinds = ("pre", "post", "seam", "collapse", "read", "replay", "phi", "mix")
    if is_sum or name.partition("_")[0] not in kinds:
        return 0
    elements = math.prod(sizes["X" if "X" in sizes else "dY"])
    spec = SiteSpec.decode(str(given["spec"]))
    mix = elements * 2 * spec.streams if constraint_of(spec).mixes else 0  # H_res X
    post = mix + elements * 2  # H_post f added
    read = elements * 2  # H_pre X
    phi = elements * 2 * (sizes["phi"][-1] if "phi" in sizes else 0)  # vec(X) phi
    pre = phi + read
    again = post if "f" in sizes else 0  # X', which the backward did not keep
    if name == "replay":
        counts = {name: len(arg) for name, arg in given.items() if isinstance(arg, list)}
        return post * counts["f"] + read * counts["saved"]
    return {
        "pre": pre,
        "pre_backward": 2 * pre,
        "pre_backward_dz": 2 * pre - phi,
        "phi_backward": phi + again,
        "post": post,
        "mix": mix,
        "post_backward": 2 * post,
        "post_backward_branch": read,
        "post_backward_state": 2 * post - read,
        "seam": pre + post,
        "seam_backward": 2 * (pre + post) + again,
        "seam_backward_dz": 2 * (pre + post) + again - phi,
        "seam_norm": pre + post,
        "seam_norm_backward": 2 * (pre + post) + again + read,  # u, which was not kept either
        "read": read,
        "read_backward": 2 * read,
        "collapse": pre,
        "collapse_backward": 3 * pre,  # z is made again
    }[name]
