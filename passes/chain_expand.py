"""Recognise how a state starts: one tensor repeated into every stream.

X = x.unsqueeze(-2).expand(..., n, C)      in any spelling  ->  expand(x, n)
"""

from torch.fx import Node

from mhc_compile.passes.chain_ops import read
from mhc_compile.passes.chain_scope import Scope, axes_of
from mhc_compile.passes.chain_terms import NotExpressible
from mhc_compile.passes.chain_values import Atom
from mhc_compile.passes.opnames import first_input, op_name
from mhc_compile.passes.values import dims, is_float_tensor
from mhc_compile.passes.vocabulary import LAYOUT

_REPEATS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})


def repeated_tensor(root: Node, stream: int, channel: int, streams: int) -> Node | None:
    """What the state ``root`` repeats, ``[tokens..., C]``; None if it is made in another way."""
    chain = [root]
    while op_name(chain[-1]) in LAYOUT | _REPEATS:
        source = first_input(chain[-1])
        if source is None or not is_float_tensor(source):
            return None
        chain.append(source)
    narrow = chain.pop()
    if not any(op_name(node) in _REPEATS for node in chain):
        return None
    scope = Scope(narrow, axes_of(narrow, ()), None, read)
    try:
        for node in reversed(chain):
            scope.values[node] = read(scope, node)
    except NotExpressible:
        return None
    found = scope.value(root)
    if found is None or found.dims[stream] != (Atom("any", streams),):
        return None
    order = [axis for axis in range(len(dims(root))) if axis not in (stream, channel)]
    kept = [dim for axis in (*order, channel) if (dim := found.dims[axis])]
    return narrow if kept == [dim for dim in axes_of(narrow, ()) if dim] else None
