"""How much a converted model amplifies its streams: gains per site and over whole trunks.

With ``M = H_res(l+k) ... H_res(l)``, a signal grows by ``max_i |sum_j M[i, j]|`` on its way forward
and a gradient by ``max_j |sum_i M[i, j]|`` on its way back. Doubly stochastic maps keep both at 1;
unconstrained hyper-connections do not.

Reference:
    arXiv 2512.24880, sections 3.1 and 5.4 (Amax gain magnitude).
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.states import COLLAPSE, PRE, READ, SEAM, SEAM_NORM, trunk_of_states
from mhc_compile.passes.values import source_line
from mhc_compile.rewrite import rewrite


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Metrics of one stream mixing ``M[out, in]``, or of a product of several.

    Gains, diagonal and distance are those of the mean of ``M`` over the tokens; errors and the
    smallest entry are the worst of any token.
    """

    forward_gain: float
    """``max_i |sum_j M[i, j]|``."""
    backward_gain: float
    """``max_j |sum_i M[i, j]|``."""
    forward_gain_abs: float
    """The same with ``|M[i, j]|`` summed; larger only for maps with negative entries."""
    backward_gain_abs: float
    row_error: float
    """``max_i |sum_j M[i, j] - 1|``."""
    column_error: float
    smallest: float
    """Smallest entry; a doubly stochastic map has none below 0."""
    diagonal: float
    """Mean of the diagonal: 1 keeps the streams apart, 1/n mixes them completely."""
    uniform_distance: float
    """``max |M[i, j] - 1/n|``."""
    matrix: tuple[tuple[float, ...], ...]
    """The mean of ``M`` over the tokens: the effective ``H_res``, or the effective product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteStability:
    """One residual site."""

    name: str
    trunk: int
    """Index in `StabilityReport.trunks`."""
    mixing: Mixing
    composite: Mixing
    """Of the product from the start of the trunk up to and with this site."""
    spread: float
    """``|X - mean_i X| / |X|`` of the state the site reads: 0 while all streams are equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkStability:
    """All sites of one trunk, one after another."""

    index: int
    sites: int
    composite: Mixing
    """Of the product over the sites, token by token."""
    spread: float
    """Of the state at the end of the trunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StabilityReport:
    """Result of `stability`; sites and trunks in the order of the graph."""

    sites: tuple[SiteStability, ...]
    trunks: tuple[TrunkStability, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text, keys sorted."""
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)


def stability(model: nn.Module, *args: Any, **kwargs: Any) -> StabilityReport:
    """Measure gains, doubly stochastic errors and stream spread of a converted model.

    Args:
        model: a model that `mhc_compile.convert_` has converted; not changed.
        *args: positional arguments of the one call that is measured.
        **kwargs: its keyword arguments.

    Returns:
        One entry for each use of a site and one for each trunk.

    Raises:
        UnsupportedGraphError: the model cannot be rewritten as one graph.

    Reference:
        arXiv 2512.24880, figures 3 and 7.
    """
    return measure(rewrite(model, *args, **kwargs), *args, **kwargs)


def measure(module: fx.GraphModule, *args: Any, **kwargs: Any) -> StabilityReport:
    """`stability` for a module that is rewritten already.

    Args:
        module: what `mhc_compile.rewrite` returned, or any graph of mhc ops.
        *args: positional arguments of the call it was rewritten with.
        **kwargs: its keyword arguments, in the same order.
    """
    observer = _Observer(module)
    with torch.no_grad():
        # The graph takes the leaves: what packs and unpacks them belongs to the generated code.
        leaves = pytree.tree_leaves((args, kwargs))
        observer.run(*leaves, enable_io_processing=False)
    products: dict[int, torch.Tensor] = {}  # by trunk, token by token; later sites on the left
    composites: dict[int, Mixing] = {}
    counts = Counter(trunk for _, trunk, _, _ in observer.seen)
    sites = []
    for name, trunk, h_res, spread in observer.seen:
        products[trunk] = h_res @ products[trunk] if trunk in products else h_res
        composites[trunk] = _mixing(products[trunk])
        sites.append(
            SiteStability(
                name=name,
                trunk=trunk,
                mixing=_mixing(h_res),
                composite=composites[trunk],
                spread=spread,
            )
        )
    trunks = tuple(
        TrunkStability(index=index, sites=counts[index], composite=composites[index], spread=spread)
        for index, spread in observer.spreads.items()
        if index in composites
    )
    return StabilityReport(sites=tuple(sites), trunks=trunks)


class _Observer(fx.Interpreter):
    """Runs a rewritten graph and keeps what the mhc ops make and read."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.trunk_of = trunk_of_states(module.graph)
        self.seen: list[tuple[str, int, torch.Tensor, float]] = []
        """Name, trunk, H_res [tokens, n, n] (or [1, n, n] of a static site), spread."""
        self.spreads: dict[int, float] = dict.fromkeys(self.trunk_of.values(), 0.0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in (PRE, SEAM, SEAM_NORM):
            # A seam also makes the state that its pre reads.
            X, h_res = (self._state(n), result[2]) if n.target is PRE else (result[0], result[3])
            spec = SiteSpec.decode(cast("str", _argument(n, "spec")))
            maps = h_res.detach().double().reshape(-1, *h_res.shape[-2:])
            trunk = self.trunk_of[cast("fx.Node", _argument(n, "X"))]
            self.seen.append((_site_name(n), trunk, maps, _spread(X, spec)))
        elif n.target in (COLLAPSE, READ):
            X, spec = self._state(n), SiteSpec.decode(cast("str", _argument(n, "spec")))
            self.spreads[self.trunk_of[cast("fx.Node", _argument(n, "X"))]] = _spread(X, spec)
        return result

    def _state(self, n: fx.Node) -> torch.Tensor:
        return cast("torch.Tensor", self.env[cast("fx.Node", _argument(n, "X"))])


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an op by its name in the schema, however the node passes it."""
    names = [
        argument.name for argument in cast("torch._ops.OpOverload", node.target)._schema.arguments
    ]
    position = names.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]


def _site_name(node: fx.Node) -> str:
    """``layers.3.add0`` of a site whose bias is ``layers.3.mhc.add0.bias``.

    A site that the model has written by hand is called by its source line.
    """
    bias = _argument(node, "bias")
    if bias.op != "get_attr" or "mhc." not in bias.target:
        return source_line(node)
    owner, _, key = str(bias.target).removesuffix(".bias").rpartition("mhc.")
    return owner + key


def _spread(X: torch.Tensor, spec: SiteSpec) -> float:
    X = X.double()
    mean = X.mean(spec.dim - 1, keepdim=True)
    return float((X - mean).norm() / X.norm().clamp_min(torch.finfo(X.dtype).tiny))


def _mixing(maps: torch.Tensor) -> Mixing:
    """Metrics of [tokens, n, n]."""
    mean = maps.mean(0)
    return Mixing(
        forward_gain=float(mean.sum(1).abs().max()),
        backward_gain=float(mean.sum(0).abs().max()),
        forward_gain_abs=float(mean.abs().sum(1).max()),
        backward_gain_abs=float(mean.abs().sum(0).max()),
        row_error=float((maps.sum(2) - 1).abs().max()),
        column_error=float((maps.sum(1) - 1).abs().max()),
        smallest=float(maps.min()),
        diagonal=float(mean.diagonal().mean()),
        uniform_distance=float((mean - 1 / mean.shape[0]).abs().max()),
        matrix=tuple(map(tuple, mean.tolist())),
    )
