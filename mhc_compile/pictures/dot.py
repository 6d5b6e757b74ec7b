"""A view as Graphviz text: for other layouts, and for PNG where ``dot`` is installed."""

import json
import shutil
import subprocess

from mhc_compile.errors import ConfigError
from mhc_compile.pictures.svg import COLORS, FILLS, LANES
from mhc_compile.pictures.view import SPINE, GraphView, ViewEdge, ViewNode

_SHAPES = {
    "input": "box", "output": "box", "box": "box", "trunk": "box", "pre": "box",
    "add": "circle", "expand": "trapezium", "collapse": "invtrapezium",
    "post": "hexagon", "seam": "hexagon",
}  # fmt: skip
_LANE_WIDTH = 2.0
_DPI = 96


def to_dot(view: GraphView, title: str) -> str:
    """The view in the DOT language; trunks stay straight by group and weight."""
    lines = [
        "digraph {",
        f"  label={_text(title)}; labelloc=t; newrank=true; nodesep=0.3; ranksep=0.35;",
        '  graph [fontname="DejaVu Sans", fontsize=12, labeljust=l];',
        '  node [fontname="DejaVu Sans", fontsize=11, style="filled,rounded", margin="0.12,0.05"];',
        '  edge [arrowsize=0.7, fontname="DejaVu Sans", fontsize=9];',
    ]
    framed: set[int] = set()
    for number, frame in enumerate(view.frames):
        members = range(frame.first, frame.last + 1)
        framed.update(members)
        label = _text(f"{frame.label}  × {frame.times}")
        lines.append(f"  subgraph cluster_{number} {{ label={label}; style=rounded; penwidth=2;")
        lines += [f"    {_node(i, view.nodes[i])}" for i in members]
        lines.append("  }")
    lines += [f"  {_node(i, node)}" for i, node in enumerate(view.nodes) if i not in framed]
    lines += [f"  {_edge(edge)}" for edge in view.edges]
    return "\n".join([*lines, "}"]) + "\n"


def to_png(dot: str) -> bytes:
    """The DOT text drawn by Graphviz.

    Raises:
        ConfigError: Graphviz is not installed, or refuses the text.
    """
    program = shutil.which("dot")
    if program is None:
        raise ConfigError(
            "format png needs Graphviz: install it so that 'dot' is on the PATH, or use svg"
        )
    command = [program, "-Tpng", f"-Gdpi={_DPI}"]
    done = subprocess.run(command, input=dot.encode(), capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"dot failed with status {done.returncode}: {done.stderr.decode()}")
    return done.stdout


def _node(i: int, node: ViewNode) -> str:
    fill, stroke = FILLS[node.role]
    group = f', group="trunk{node.column}"' if node.role in SPINE else ""
    label = _text("\n".join(node.lines))
    return (
        f'n{i} [label={label}, shape={_SHAPES[node.role]}, fillcolor="{fill}", '
        f'color="{stroke}"{group}];'
    )


def _edge(edge: ViewEdge) -> str:
    options = [f'color="{COLORS[edge.kind]}"']
    if edge.kind == "coefficients":
        options += ["style=dashed", 'label="H_post, H_res"']
    if edge.kind == "state":
        options = [f'color="{COLORS["state"]}"', "penwidth=4", "weight=20"]
        if 1 < edge.streams <= len(LANES):
            colors = ":".join(LANES[: edge.streams])
            options = [f'color="{colors}"', f"penwidth={_LANE_WIDTH}", "weight=20"]
        elif edge.streams > 1:
            options.append(f'label="×{edge.streams}"')
    return f"n{edge.source} -> n{edge.target} [{', '.join(options)}];"


def _text(text: str) -> str:
    """A quoted DOT string: JSON escapes the same characters."""
    return json.dumps(text, ensure_ascii=False)
