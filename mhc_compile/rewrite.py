"""A stand-alone rewritten module, through torch.export."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from mhc_compile.analysis import analyse
from mhc_compile.binding import bind
from mhc_compile.config import MHCConfig
from mhc_compile.convert import build_sites, select_sites
from mhc_compile.errors import UnsupportedGraphError
from mhc_compile.hosts import resolve_by_path
from mhc_compile.match import Matches, settle_options, sites_of
from mhc_compile.pipeline import Observer, improving_passes, rewrite_passes, run_passes
from mhc_compile.site import MHCSites
from mhc_compile.uses import new_uses


def rewrite(
    model: nn.Module,
    *args: Any,
    config: MHCConfig | None = None,
    dynamic_shapes: Any = None,
    observe: Observer | None = None,
    **kwargs: Any,
) -> GraphModule:
    """Export a model and widen the result: a module of its own, for eager or any backend.

    A converted model lends its parameters: both then compute the same and train the same tensors. A
    plain one stays as it is, and the result gets fresh parameters. Names in ``state_dict`` are
    those of the converted model.

    Args:
        model: the module; train or eval mode is baked in, as torch.export does.
        *args: example inputs, as the model takes them.
        config: choices for a model that is not converted, and ``skip_passes`` (that of the
            conversion if None). What says how a graph is compiled has no meaning here: ``inner``,
            ``on_eager``, and ``recompute``, whose tags no backend would get to see.
        dynamic_shapes: as ``torch.export.export`` takes them.
        observe: sees the canonical graph ("before") and the graph after each pass.
        **kwargs: further example inputs.

    Returns:
        The rewritten graph module.

    Raises:
        UnsupportedGraphError: the model cannot be exported, or its sites are not those recorded.
    """
    config = config or settle_options(model.modules(), frozenset(), MHCConfig())
    config = select_sites(config, model, args, kwargs)
    exported = _export(model, args, kwargs, dynamic_shapes)
    scope = _ExportScope(model)
    matches = Matches(scope, config)
    in_force = settle_options(model.modules(), frozenset(), config)
    analysis = analyse(
        exported,
        resolve_by_path(model),
        matches.refuse,
        observe,
        kernels=config.kernels,
        single_pass=in_force.single_pass,
    )
    matches.check(analysis)
    built = {id(module): sites for module in model.modules() if (sites := sites_of(module))}
    built.update(
        {
            id(host): sites
            for host, sites in build_sites(new_uses(analysis, matches.records), config)
        }
    )

    def sites_in(host: nn.Module) -> MHCSites | None:
        return built.get(id(host))

    matches.adopt(analysis, sites_in)
    attributes = _Attributes(exported, scope.names, built)
    widening = bind(analysis, matches.records, sites_in, attributes.node_of, {})
    run_passes(exported, (), rewrite_passes(widening), observe)
    improving = improving_passes(config.skip_passes, seam_norm=config.seam_norm)
    run_passes(exported, (), improving, observe)
    return exported


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> GraphModule:
    try:
        program = torch.export.export(
            model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
        )
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UnsupportedGraphError(
            f"torch.export cannot trace {type(model).__name__}: {reason}. "
            'torch.compile(model, backend="mhc") needs no export'
        ) from error
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


class _ExportScope:
    """What `Matches` wants to know of an exported program."""

    is_partial = False

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.modules = {id(module): module for module in model.modules()}
        self.where = f"the exported {type(model).__name__}"


@dataclass(slots=True)
class _Attributes:
    """The parameters of sites as attributes of the exported module."""

    gm: GraphModule
    names: Mapping[int, str]
    sites: Mapping[int, MHCSites]
    nodes: dict[str, Node] = field(default_factory=dict)

    def node_of(self, host: nn.Module, key: str, name: str) -> Node:
        """A ``get_attr`` for a parameter of site ``key``; registers the sites of ``host`` first."""
        prefix = f"{self.names[id(host)]}.mhc".lstrip(".")
        target = f"{prefix}.{key}.{name}"
        if target not in self.nodes:
            self.gm.add_submodule(prefix, self.sites[id(host)])
            with self.gm.graph.inserting_before(next(iter(self.gm.graph.nodes))):
                self.nodes[target] = self.gm.graph.get_attr(target)
        return self.nodes[target]
