"""Which module keeps the parameters of which residual add, under which key.

The host is the module whose forward does the add, or the nearest module around it that can keep
sites (a ``Sequential`` cannot). Sites of one call of a host are numbered in graph order: ``add0``,
``add1``; every call uses the same parameters, as every call uses the same weights.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Graph

from mhc_compile.guard import CALL, RETURN, refusal
from mhc_compile.passes.owners import ModuleCall, module_calls
from mhc_compile.passes.sites import Residuals
from mhc_compile.passes.values import source_line

CUT = (
    "a graph break cuts its function, and what follows the break does not use self any more: its "
    "module is not known there. Remove the cause of the break, or let the rest use self"
)

Resolve = Callable[[ModuleCall], nn.Module | None]
NumberOf = Callable[[str, int], int]
"""(source line, how many sites of that line came before) -> number of the site in its host."""


@dataclass(frozen=True, slots=True)
class HostedSite:
    """Where one found site belongs."""

    index: int
    """Position in `Residuals.sites`."""
    host: nn.Module | None
    call: str
    """Which call of the host; "" is the frame's own."""
    key: str
    source: str
    refusal: str = ""
    """Why no module can keep it; empty otherwise."""
    kinds: tuple[str, ...] = ()
    """Its form and traits, for filters."""

    def name(self, names: Mapping[int, str]) -> str:
        """``owner.key`` with the paths of ``names`` (by ``id``), as filters and reports show it."""
        return f"{names.get(id(self.host), '')}.{self.key}".lstrip(".")


def _host(calls: tuple[ModuleCall, ...], resolve: Resolve) -> tuple[nn.Module | None, str, str]:
    """(host, its call, reason if there is none): the innermost of ``calls`` that can keep sites."""
    reason = "the add happens in a plain function: put it into the forward of a module"
    for number, call in enumerate(reversed(calls)):
        module = resolve(call)
        if module is None:
            continue
        refused = refusal(module)
        if refused is None:
            return module, call.call, ""
        if number == 0 or reason.startswith("the add happens"):
            reason = f"no module around the add can keep its parameters: {refused}"
    return None, "", reason


def hosted_sites(
    residuals: Residuals, resolve: Resolve, number_of: NumberOf | None = None
) -> list[HostedSite]:
    """The host and key of every site, in the order of ``residuals.sites``.

    Args:
        residuals: the sites of one graph.
        resolve: the module of a `ModuleCall`, or None if it is unknown.
        number_of: numbers the sites of the frame's own call, if the graph is only a piece of it.
    """
    counts: dict[tuple[int, str], int] = defaultdict(int)
    lines: dict[str, int] = defaultdict(int)
    hosted = []
    for index, site in enumerate(residuals.sites):
        host, call, reason = _host(module_calls(site.root), resolve)
        number = counts[id(host), call]
        counts[id(host), call] += 1
        if number_of is not None and call == "":
            source = source_line(site.root)
            reason = reason and CUT
            number = number_of(source, lines[source])
            lines[source] += 1
        hosted.append(
            HostedSite(
                index,
                host,
                call,
                f"add{number}",
                source_line(site.root),
                reason,
                (site.form, *site.traits),
            )
        )
    return hosted


def hosts_below(
    hosted: Sequence[HostedSite], captured: nn.Module | None, running: nn.Module | None
) -> list[HostedSite] | None:
    """The sites with hosts below ``running`` where they were below ``captured``; None if it is.

    Args:
        hosted: as captured.
        captured: the module whose forward the graph was captured from.
        running: the one whose forward runs the graph now.
    """
    if captured is None or running is None or captured is running:
        return None
    paths = {id(module): path for path, module in captured.named_modules()}
    return [
        replace(site, host=running.get_submodule(paths[id(site.host)]))
        if id(site.host) in paths
        else site
        for site in hosted
    ]


class ParameterOwners:
    """Tells which modules a graph runs for, by the parameters it is given.

    Dynamo compiles one graph for all layers of a kind (per-layer compilation, a break in the loop
    over layers) and shows the backend the first layer only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}

    def hosts_for(
        self, hosted: Sequence[HostedSite], examples: Sequence[Any], args: Sequence[Any]
    ) -> list[HostedSite] | None:
        """The sites with the hosts of this run; None if they are the captured ones.

        Args:
            hosted: as captured.
            examples: the inputs of the graph when it was captured.
            args: those of this run, in the same order.
        """
        moved: dict[str, str] = {}  # path of a parameter as captured -> now
        for example, arg in zip(examples, args, strict=True):
            if (
                isinstance(example, nn.Parameter)
                and arg is not example
                and id(arg) in self._parameters
            ):
                moved[self._parameters.get(id(example), "")] = self._parameters[id(arg)]
        if not moved:
            return None
        return [replace(site, host=self._host_now(site.host, moved)) for site in hosted]

    def _host_now(self, host: nn.Module | None, moved: Mapping[str, str]) -> nn.Module | None:
        path = self._paths.get(id(host))
        if path is None:
            return host
        prefix = f"{path}." if path else ""
        for before, now in moved.items():
            below = before.removeprefix(prefix)
            if before.startswith(prefix) and now.endswith(below):
                return self._modules.get(now.removesuffix(below).removesuffix("."), host)
        return host


@dataclass(slots=True)
class MarkedCall:
    """What of one call of a converted module lies in a graph: both ends, or one."""

    host: nn.Module
    begins: bool = False
    returns: bool = False


def marked_calls(graph: Graph, resolve: Resolve) -> dict[tuple[int, str], MarkedCall]:
    """The calls of converted modules that ``graph`` holds whole or in part, by (id, call)."""
    calls: dict[tuple[int, str], MarkedCall] = {}
    for node in graph.nodes:
        if node.target in (CALL, RETURN):
            call = module_calls(node)[-1]
            module = resolve(call)
            if module is not None:
                marked = calls.setdefault((id(module), call.call), MarkedCall(module))
                marked.begins |= node.target is CALL
                marked.returns |= node.target is RETURN
    return calls


def erase_markers(graph: Graph) -> None:
    """Remove every marker from a graph that is about to be rewritten, or only looked at."""
    for node in list(graph.nodes):
        if node.target in (CALL, RETURN):
            graph.erase_node(node)


def resolve_by_id(modules: Mapping[int, nn.Module], root: nn.Module | None) -> Resolve:
    """Resolve the calls of a Dynamo graph."""
    return lambda call: modules.get(int(call.module)) if call.module else root


def resolve_by_path(model: nn.Module) -> Resolve:
    """Resolve the calls of an exported graph."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return lambda call: modules.get(call.module)
