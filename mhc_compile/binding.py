"""Give the rewrite the nodes that hold each site's parameters."""

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from mhc_compile._torch_private import Frame
from mhc_compile.analysis import Analysis
from mhc_compile.borders import Borders
from mhc_compile.match import sites_of
from mhc_compile.passes.plan import PlannedSite
from mhc_compile.passes.widen import Head, SiteInputs, Widening
from mhc_compile.site import MHCSite, SiteRecord


def bind_parameters(
    captured: GraphModule,
    analysis: Analysis,
    records: Mapping[int, SiteRecord],
    frame: Frame,
    where: dict[Node, Node],
    borders: Borders,
) -> Widening:
    """Let Dynamo lift the parameters of every planned site, and mirror them into the working copy.

    Args:
        captured: the graph Dynamo gave; it gains placeholders, nothing else.
        analysis: of the working copy, which gains the same placeholders in the same order.
        records: of the planned sites, by site index.
        frame: the frame being compiled.
        where: node of ``captured`` -> node of the copy.
        borders: where streams arrive from other graphs.
    """
    lifted: dict[int, dict[str, Node]] = {}
    heads: dict[int, dict[str, Node]] = {}
    for planned in analysis.plan.sites:
        record, site = records[planned.index], site_of(analysis, planned, records)
        host = analysis.hosted[planned.index].host
        assert host is not None
        names = [name for name, _ in site.named_parameters(recurse=False)]
        nodes = {name: frame.lift(host, ("mhc", record.key), name) for name in names}
        lifted[planned.index] = {n: node for n, node in nodes.items() if not n.startswith("head_")}
        if record.ends and planned is analysis.plan.trunks[planned.trunk][-1]:
            heads[planned.trunk] = {n.removeprefix("head_"): node for n, node in nodes.items() if n.startswith("head_")}
    _mirror(captured, analysis.gm, where)
    inputs, ends = {}, {}
    for planned in analysis.plan.sites:
        site = site_of(analysis, planned, records)
        name = records[planned.index].key
        inputs[planned.index] = _inputs(name, site, planned.dim, lifted[planned.index], where)
        if heads.get(planned.trunk) and planned is analysis.plan.trunks[planned.trunk][-1]:
            dim = analysis.plan.dims[planned.site.root]
            ends[planned.trunk] = Head("learned", _inputs("collapse", site, dim, heads[planned.trunk], where))
    return Widening(
        analysis.plan, inputs, heads=ends, arriving=borders.arrive(analysis.gm.graph), middle=_middle(analysis)
    )


def site_of(analysis: Analysis, planned: PlannedSite, records: Mapping[int, SiteRecord]) -> MHCSite:
    """The parameters of a planned site."""
    host = analysis.hosted[planned.index].host
    sites = sites_of(host) if host is not None else None
    assert sites is not None, "a planned site has a host, and that its sites"
    site = sites[records[planned.index].key]
    assert isinstance(site, MHCSite)
    return site


def _inputs(name: str, site: MHCSite, dim: int, nodes: Mapping[str, Node], where: Mapping[Node, Node]) -> SiteInputs:
    mapped = {key: where[node] for key, node in nodes.items()}
    return SiteInputs(
        name, replace(site.spec, dim=dim), mapped["bias"], mapped.get("phi"), mapped.get("alpha")
    )


def _middle(analysis: Analysis) -> str:
    for site in analysis.hosted:
        sites = sites_of(site.host) if site.host is not None else None
        if sites is not None and len(sites):
            return "sum" if sites.config["collapse"] == "sum" else "mean"
    return "mean"


def _mirror(captured: GraphModule, copy: GraphModule, where: dict[Node, Node]) -> None:
    """Give ``copy`` the placeholders that lifting added to ``captured``, in the same places."""
    previous: Node | None = None
    for node in captured.graph.nodes:
        if node.op != "placeholder":
            continue
        if node not in where:
            graph = copy.graph
            first = previous is None
            with graph.inserting_before(next(iter(graph.nodes))) if first else graph.inserting_after(previous):
                new = graph.placeholder(node.name)
            new.meta = dict(node.meta)
            new._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
            where[node] = new
        previous = where[node]
