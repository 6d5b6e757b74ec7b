"""Which module call an operation belongs to.

Dynamo keys ``nn_module_stack`` by ``str(id(module))``, with ``@k`` for the k-th repeated call, and
leaves the frame's root module out. torch.export keys it by name, root included.
"""

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of one module within a graph."""

    module: str
    """Identity of the module: ``str(id(module))`` in Dynamo graphs, its path in exported ones."""
    call: str
    """Unique per call; equal for all operations of one call."""


ROOT = ModuleCall("", "")
"""The call of the frame's (or the exported program's) own module."""


def module_calls(node: Node) -> tuple[ModuleCall, ...]:
    """The module calls ``node`` happened in, outermost (`ROOT`) first."""
    calls = [ROOT]
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        identity = key.partition("@")[0]
        if identity.isdecimal():
            # Dynamo counts the calls of each path; a module may have two.
            calls.append(ModuleCall(identity, f"{key} {path}"))
        elif path:
            # Export repeats the path as value and counts calls in the key.
            calls.append(ModuleCall(path.partition("@")[0], key))
    return tuple(calls)
