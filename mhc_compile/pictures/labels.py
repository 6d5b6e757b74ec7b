"""What stands in a box."""

import re
from collections.abc import Sequence

from torch.fx import Node

from mhc_compile.passes.opnames import op_name
from mhc_compile.passes.states import spec_of
from mhc_compile.passes.values import dims
from mhc_compile.passes.vocabulary import CAST, LAYOUT
from mhc_compile.pictures.trunks import streams_of
from mhc_compile.pictures.view import Role

TRIVIAL = LAYOUT | CAST | {"getitem", "split", "chunk", "expand", "unbind"}
"""Operations that only move or cast a value: not worth a name beside others."""

_LONGEST = 30
_ROOT = re.compile(r"^L\['\w+'\]")
# How Dynamo spells the way from a module to one of its parts.
_STEP = re.compile(r"(\.__dict__)?(\[['\"]_modules['\"]\]|\._modules)")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


def short_path(path: str, parent: str) -> str:
    """A module's path as people write it, below ``parent``.

    >>> short_path("L['self'].transformer.h[0].attn", "transformer.h.0")
    'attn'
    """
    path = _ITEM.sub(r".\1", _STEP.sub("", _ROOT.sub("", path))).strip(".").partition("@")[0]
    return path.removeprefix(f"{parent}.") if parent and path != parent else path


def lines_of(role: Role, nodes: Sequence[Node], parts: Sequence[str], site: str) -> tuple[str, ...]:
    """The label of a box.

    Args:
        role: of the box.
        nodes: the operations it stands for.
        parts: the module that each is of; "" if it stands between modules.
        site: name of the site, for a part of one.
    """
    first, last = nodes[0], nodes[-1]
    match role:
        case "input":
            return (_input_name(first.name), _size(first))
        case "output":
            return ("output",)
        case "add":
            return ("+",)
        case "expand":
            return (f"mhc.expand  ×{streams_of(first)}",)
        case "pre":
            return (f"mhc.pre  {site}", f"u = H_pre X;  {_mapping(first)}")
        case "post":
            return (f"mhc.post  {site}", "H_res X + H_post f")
        case "seam":
            with_norm = " with its norm" if op_name(first) == "mhc.seam_norm" else ""
            return (f"{op_name(first)}  {site}", f"post, and pre of the next{with_norm}")
        case "collapse":
            return (
                ("mhc.read  H_pre X",)
                if op_name(first) == "mhc.read"
                else (f"mhc.collapse  {first.args[4]}",)
            )
    names = [part or op_name(n) for n, part in zip(nodes, parts, strict=True)]
    worth = [name for name in dict.fromkeys(names) if name not in TRIVIAL] or names[-1:]
    label = _clip(worth[0]) if len(worth) == 1 else in_a_row(worth)
    return (label, " → ".join(filter(None, (_count(len(nodes)), _size(last)))))


def _input_name(name: str) -> str:
    name = re.sub(r"^[lL]_(kwargs_|args_)?|_$", "", name)
    return f"input {name}" if name.isdecimal() else _clip(name)


def in_a_row(names: Sequence[str]) -> str:
    """Names of what follows one another: all of them where they fit, else the first and the last.

    >>> in_a_row(["norm1 → nonlinearity → conv1", "norm2", "conv2"])
    'norm1 … conv2'
    """
    label = " → ".join(names)
    if len(label) <= _LONGEST:
        return label
    return " … ".join(
        _clip(end, _LONGEST // 2) for end in (_ends(names[0])[0], _ends(names[-1])[1])
    )


def _ends(label: str) -> tuple[str, str]:
    names = re.split(" [→…] ", label)
    return names[0], names[-1]


def _mapping(node: Node) -> str:
    spec = spec_of(node)
    iterations = f" ×{spec.iters}" if spec.constraint.startswith("sinkhorn") else ""
    return f"H_res: {spec.constraint}{iterations}"


def _size(node: Node) -> str:
    """Sizes of a value, "2×16×64"; "" if it is no tensor."""
    return "×".join(map(str, dims(node)))


def _count(number: int) -> str:
    return "1 op" if number == 1 else f"{number} ops"


def _clip(text: str, most: int = _LONGEST) -> str:
    """The end of a long name: it tells more than the start."""
    return text if len(text) <= most else f"…{text[1 - most :]}"
