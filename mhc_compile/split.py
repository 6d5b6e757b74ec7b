"""Cut a rewritten model into the stages of a pipeline."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.fx import Graph, GraphModule, Node

from mhc_compile._torch_private import copy_signature
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.match import SEEN, settle_options
from mhc_compile.passes.annotate import annotate_values
from mhc_compile.passes.cuts import Flow, crossing, find_flow, parts_of
from mhc_compile.passes.states import COLLAPSE, EXPAND, POST, PRE, spec_of
from mhc_compile.passes.values import describe, dims, dtype_of
from mhc_compile.rewrite import rewrite
from mhc_compile.site import MHCSites

Boundary = Literal["streams", "collapsed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One edge between two stages, and what each form of it sends a token in each direction."""

    site: str
    """The last site before it: "layers.3.add1"."""
    streams_bytes: int
    """n C elements: the n-stream state."""
    collapsed_bytes: int
    """C elements: its mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSplit:
    """The stages of a model, in order, for ``torch.distributed.pipelining.PipelineStage``."""

    stages: tuple[GraphModule, ...]
    """The first takes the arguments of the model, the others one tensor; the last returns what the
    model does. Parameters are those of the model, under the same names."""
    cuts: tuple[Cut, ...]
    boundary: Boundary
    possible: tuple[str, ...]
    """Every site behind which the model can be cut."""

    @property
    def bytes_per_token(self) -> int:
        """Sent over all edges together, in each direction."""
        form = "streams_bytes" if self.boundary == "streams" else "collapsed_bytes"
        return sum(getattr(cut, form) for cut in self.cuts)


def split_stages(
    model: nn.Module,
    *args: Any,
    stages: int | Sequence[str],
    boundary: Boundary = "streams",
    config: MHCConfig | None = None,
    **kwargs: Any,
) -> PipelineSplit:
    """Rewrite a model and cut it where exactly one n-stream tensor is alive.

    The stages together compute what `mhc_compile.rewrite` gives. Each runs in eager mode, as
    zero-bubble schedules want, or compiled: ``stage.compile(backend="mhc")`` joins the seams inside
    the stage and chooses its recompute blocks, so that no block lies across an edge.

    Args:
        model: the module; a converted one lends its parameters.
        *args: example inputs of the size of one microbatch, which is baked in.
        stages: how many, cut so that each has the same number of sites if possible; or the names of
            the sites behind which to cut.
        boundary: what goes over an edge: ``"streams"`` is the network itself. ``"collapsed"`` sends
            the mean of the streams, 1/n of the bytes, and starts equal streams from it: the same
            function at conversion, in training a network whose streams meet at every edge.
        config: as for `mhc_compile.rewrite`.
        **kwargs: further example inputs.

    Raises:
        ConfigError: ``stages`` or ``boundary`` is not allowed, or a site is unknown.
        UnsupportedGraphError: the model cannot be rewritten, or cut so often; or two stages share a
            parameter.
    """
    if boundary not in ("streams", "collapsed"):
        raise ConfigError(f"boundary={boundary!r} is not allowed: use 'streams' or 'collapsed'")
    config = config or settle_options(model.modules(), frozenset(), MHCConfig())
    # A seam makes the branch input of the next site as well: no cut leads through it.
    unjoined = replace(config, skip_passes=(*config.skip_passes, "join_seams_pass"))
    gm = rewrite(model, *args, config=unjoined, **kwargs)
    gm.graph.eliminate_dead_code()
    annotate_values(gm)
    flow = find_flow(gm.graph)
    chosen = _choose(gm, flow, stages)
    parts = parts_of(gm.graph, flow, chosen)
    _refuse_effects(parts, chosen)
    modules = tuple(
        _stage(gm, parts, chosen, number, boundary) for number in range(len(chosen) + 1)
    )
    for module in modules:
        _adopt_sites(module, gm, config.skip_passes)
    _refuse_shared(modules)
    return PipelineSplit(
        stages=modules,
        cuts=tuple(_cut(node) for node in chosen),
        boundary=boundary,
        possible=tuple(_site_name(node) for node in flow.cuts),
    )


def _choose(gm: GraphModule, flow: Flow, stages: int | Sequence[str]) -> list[Node]:
    """The cuts, in graph order."""
    if not isinstance(stages, int):
        named = {_site_name(node): node for node in flow.cuts}
        unknown = [name for name in stages if name not in named]
        if unknown:
            raise ConfigError(
                f"stages={stages!r} is not allowed: the model cannot be cut behind {unknown[0]!r}, "
                f"but behind {', '.join(named) or 'no site'}"
            )
        return [node for name, node in named.items() if name in stages]
    if stages < 1:
        raise ConfigError(f"stages={stages!r} is not allowed: use a number >= 1, or names of sites")
    posts = list(gm.graph.find_nodes(op="call_function", target=POST))
    if len(flow.cuts) < stages - 1:
        raise UnsupportedGraphError(
            f"the model cannot be cut into {stages} stages: it has {len(posts)} sites, and behind "
            f"{len(flow.cuts)} of them one n-stream tensor is all that is alive. "
            + _obstacle(posts, flow)
        )
    chosen: list[Node] = []
    for number in range(1, stages):
        first = flow.cuts.index(chosen[-1]) + 1 if chosen else 0
        left = flow.cuts[first : len(flow.cuts) - (stages - 1 - number)]
        ideal = number * len(posts) / stages
        chosen.append(min(left, key=lambda node: abs(posts.index(node) + 1 - ideal)))
    return chosen


def _obstacle(posts: Sequence[Node], flow: Flow) -> str:
    """What keeps the site in the middle of those that are no cut from being one."""
    others = [post for post in posts if post in flow.moving and post not in flow.cuts]
    if not others:
        return ""
    post = others[len(others) // 2]
    values = ", ".join(describe(node) for node in crossing(flow, post)[:3])
    return (
        f"Behind {_site_name(post)} also alive: {values}. Sizes that are dynamic are such values: "
        "give example inputs of the size of one microbatch"
    )


def _site_name(post: Node) -> str:
    """``owner.key`` of a converted site; of one that the model has of its own, the node's name."""
    h_post = post.args[2]
    assert isinstance(h_post, Node)
    pre = h_post.args[0] if h_post.target is operator.getitem else None
    bias = pre.args[2] if isinstance(pre, Node) and pre.target is PRE else None
    path = str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else ""
    owner, found, key = path.removesuffix(".bias").rpartition("mhc.")
    return f"{owner}{key}" if found else post.name


def _cut(post: Node) -> Cut:
    dtype, spec = dtype_of(post), spec_of(post)
    assert dtype is not None, "values were annotated"
    narrow = dims(post)[spec.dim] * dtype.itemsize
    return Cut(site=_site_name(post), streams_bytes=spec.streams * narrow, collapsed_bytes=narrow)


def _stage(
    gm: GraphModule, parts: dict[Node, int], cuts: Sequence[Node], number: int, boundary: Boundary
) -> GraphModule:
    """The module of one part: its nodes, and what they need that does not come from inputs."""
    is_first, is_last = number == 0, number == len(cuts)
    graph, copies = Graph(), {}
    if not is_first:
        copies[cuts[number - 1]] = _receive(graph, cuts[number - 1], boundary)
    needed = _constants(gm.graph, parts, number)
    for node in gm.graph.nodes:
        if node in needed or parts.get(node) == number:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    if not is_last:
        graph.output(_send(graph, copies[cuts[number]], boundary))
    copy_signature(gm.graph, graph, inputs=is_first, outputs=is_last)
    stage = GraphModule(gm, graph)
    stage.train(gm.training)
    return stage


def _constants(graph: Graph, parts: dict[Node, int], number: int) -> set[Node]:
    """Parameters, buffers and what is made of them alone, as far as one part reads it."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in needed or parts.get(node) == number:
            needed.update(source for source in node.all_input_nodes if source not in parts)
    return needed


def _receive(graph: Graph, cut: Node, boundary: Boundary) -> Node:
    state = graph.placeholder("state")
    if boundary == "streams":
        return state
    spec = spec_of(cut)
    return graph.call_function(EXPAND, (state, spec.streams, spec.dim))


def _send(graph: Graph, state: Node, boundary: Boundary) -> Node:
    if boundary == "streams":
        return state
    spec = spec_of(state)
    return graph.call_function(COLLAPSE, (state, None, None, None, "mean", spec.encode()))


def _adopt_sites(stage: GraphModule, gm: GraphModule, skip_passes: tuple[str, ...]) -> None:
    """Put site modules in the place of the plain ones that ``GraphModule`` made of them.

    So the backend, which joins the seams of the stage, finds how it was converted; what conversion
    left alone stays so.
    """
    for name, sites in gm.named_modules():
        if isinstance(sites, MHCSites) and _has(stage, name):
            kept = {key: sites.site(key) for key, _ in stage.get_submodule(name).named_children()}
            config = {**sites.config, "skip_passes": skip_passes}
            stage.set_submodule(name, MHCSites(kept, sites.records, config))
    for module in stage.modules():
        setattr(module, SEEN, True)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _refuse_effects(parts: Mapping[Node, int], cuts: Sequence[Node]) -> None:
    """An updated buffer does not move with the inputs, and no cut could send it."""
    for node, part in parts.items():
        for source in node.all_input_nodes:
            if parts.get(source, part) != part and source not in cuts:
                raise UnsupportedGraphError(
                    f"stage {parts[source]} writes {describe(source)}, and stage {part} reads it: "
                    "keep what is updated within one stage, or cut elsewhere"
                )


def _refuse_shared(stages: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            first = owner.setdefault(id(parameter), number)
            if first != number:
                raise UnsupportedGraphError(
                    f"stages {first} and {number} both read the parameter {name}: each would train "
                    "a copy of its own. Untie it (give the last layer a parameter of its own), or "
                    "cut elsewhere"
                )
