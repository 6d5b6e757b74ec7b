"""Give the rewrite the nodes that hold each site's parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile._torch_private import Frame, is_dtensor, note_source
from mhc_compile.analysis import Analysis
from mhc_compile.errors import UnsupportedGraphError
from mhc_compile.passes.lane import Lane
from mhc_compile.passes.plan import PlannedSite
from mhc_compile.passes.values import value_of
from mhc_compile.passes.widen import Departure, Head, SiteInputs, Widening
from mhc_compile.site import MHCSite, MHCSites, SiteRecord

SitesOf = Callable[[nn.Module], MHCSites | None]
NodeOf = Callable[[nn.Module, str, str], Node]
"""(host, key, parameter name) -> the node of the working graph that holds it."""


def bind(
    analysis: Analysis,
    records: Mapping[int, SiteRecord],
    sites_of: SitesOf,
    node_of: NodeOf,
    arriving: Mapping[Node, Lane],
    departing: Sequence[Departure] = (),
) -> Widening:
    """Everything `widen_trunks_pass` needs for an analysed graph.

    Args:
        analysis: of the graph to be rewritten.
        records: of its planned sites, by site index.
        sites_of: parameters of a host.
        node_of: where the graph holds a parameter.
        arriving: values whose streams come from another graph.
        departing: trunks whose streams go on in another graph.
    """
    plan = analysis.plan
    inputs, heads, middle = {}, {}, "mean"
    for planned in plan.sites:
        record, host = records[planned.index], analysis.host_of(planned)
        sites = sites_of(host)
        assert sites is not None, "a planned site has parameters"
        middle = "sum" if sites.config["collapse"] == "sum" else "mean"
        nodes = {name: node_of(host, record.key, name) for name in parameter_names(sites, record)}
        site = sites.site(record.key)
        own = {name: node for name, node in nodes.items() if not name.startswith("head_")}
        head = {name.removeprefix("head_"): node for name, node in nodes.items() if name not in own}
        inputs[planned.index] = _inputs(record.key, site, planned.dim, own)
        if head and planned is plan.trunks[planned.trunk][-1]:
            dim = plan.dims[planned.site.root]
            heads[planned.trunk] = Head("learned", _inputs("collapse", site, dim, head))
    for trunk in range(len(plan.trunks)):
        heads.setdefault(trunk, Head(middle))
    return Widening(
        plan, inputs, heads=heads, arriving=arriving, departing=departing, middle=middle
    )


def parameter_names(sites: MHCSites, record: SiteRecord) -> list[str]:
    """Parameters of one site: bias, phi and alpha if dynamic, head_* for a learned collapse."""
    return [name for name, _ in sites.site(record.key).named_parameters(recurse=False)]


def lift_parameters(
    captured: GraphModule,
    analysis: Analysis,
    records: Mapping[int, SiteRecord],
    sites_of: SitesOf,
    frame: Frame,
    where: dict[Node, Node],
) -> NodeOf:
    """Let Dynamo lift the parameters of every planned site, and mirror them into the working copy.

    Args:
        captured: the graph Dynamo gave; it gains placeholders, nothing else.
        analysis: of the working copy, which gains the same placeholders in the same order.
        records: of the planned sites.
        sites_of: parameters of a host.
        frame: the frame being compiled.
        where: node of ``captured`` -> node of the copy.
    """
    lifted: dict[tuple[int, str, str], Node] = {}
    for planned in analysis.plan.sites:
        record, host = records[planned.index], analysis.host_of(planned)
        sites = sites_of(host)
        assert sites is not None
        for name in parameter_names(sites, record):
            lifted[id(host), record.key, name] = frame.lift(host, ("mhc", record.key), name)
        _refuse_mixed(planned, record, sites)
    _mirror(captured, analysis.gm, where)
    return lambda host, key, name: where[lifted[id(host), key, name]]


def _refuse_mixed(planned: PlannedSite, record: SiteRecord, sites: MHCSites) -> None:
    """DTensors and plain tensors do not go into one operation."""
    is_sharded = is_dtensor(value_of(planned.start))
    if is_sharded != is_dtensor(sites.site(record.key).bias):
        here, there = ("a DTensor", "are not") if is_sharded else ("a plain tensor", "are DTensors")
        raise UnsupportedGraphError(
            f"the trunk at {record.key} ({record.source}) is {here}, and the parameters of the "
            f"site {there}: mhc_compile.distributed.replicate_parameters_(model, mesh) makes them "
            "DTensors, use_local_output=True in a plan makes the trunk plain"
        )


def _inputs(name: str, site: MHCSite, dim: int, nodes: Mapping[str, Node]) -> SiteInputs:
    spec = replace(site.spec, dim=dim)
    return SiteInputs(name, spec, nodes["bias"], nodes.get("phi"), nodes.get("alpha"))


def _mirror(captured: GraphModule, copy: GraphModule, where: dict[Node, Node]) -> None:
    """Give ``copy`` the placeholders that lifting added to ``captured``, in the same places."""
    graph = copy.graph
    previous: Node = graph._root  # the sentinel before the first node
    for node in captured.graph.nodes:
        if node.op != "placeholder":
            continue
        if node not in where:
            with graph.inserting_after(previous):
                new = graph.placeholder(node.name)
            new.meta = dict(node.meta)
            new._dynamo_source = note_source(node)
            where[node] = new
        previous = where[node]
