"""Put hyper-connection parameters on a model, and take them off again."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mhc_compile._torch_private import reset_dynamo
from mhc_compile.analysis import refuse_filtered
from mhc_compile.capture import Capture, capture_model
from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.guard import check_calls_, refuse_wrapped, uncheck_calls_
from mhc_compile.hosts import HostedSite
from mhc_compile.kernels.init import initial_head, initial_parameters
from mhc_compile.match import SEEN, sites_of
from mhc_compile.report import Report
from mhc_compile.reporting import build_report
from mhc_compile.site import MHCSite, MHCSites, SiteRecord
from mhc_compile.uses import SiteUse, site_uses


def explain(model: nn.Module, *args: Any, config: MHCConfig | None = None, **kwargs: Any) -> Report:
    """Find the residual sites of a model and say what conversion would do; change nothing.

    Args:
        model: any module; converted ones are reported as such.
        *args: example inputs, as the model takes them.
        config: choices; if None those of the conversion, or the defaults of `MHCConfig`.
        **kwargs: further example inputs.

    Returns:
        All sites, trunks and rejected adds, each with its reason.
    """
    already = _conversion(model)
    config = config or (MHCConfig(**already) if already is not None else MHCConfig())
    config = select_sites(config, model, args, kwargs)
    capture = _capture(model, args, kwargs, config, converted=already is not None)
    return build_report(model, capture, config, site_uses(capture), converted=already is not None)


def convert_(
    model: nn.Module, *args: Any, config: MHCConfig | None = None, **kwargs: Any
) -> Report:
    """Widen a model's residual trunks to n streams, in place: adds parameters, changes no output.

    Runs the model on the example inputs, in its own and in train mode, to find its sites. Registers
    one `MHCSite` a site as ``owner.mhc["add0"]`` on the module whose forward does the add. Old
    parameters, buffers and state_dict keys stay as they are. Make optimizers, wrap (FSDP, DDP) and
    compile afterwards.

    Args:
        model: the model; bit for bit as it was if anything fails.
        *args: example inputs, as the model takes them. Later shapes may differ.
        config: choices; the defaults of `MHCConfig` if None.
        **kwargs: further example inputs.

    Returns:
        What was found and converted. Converting twice changes nothing and reports the first.

    Raises:
        ConfigError: the model is converted already, with another configuration.
        UnsupportedGraphError: nothing of the model can be captured or converted; it says why.
    """
    config = config or MHCConfig()
    already = _conversion(model)
    config = select_sites(config, model, args, kwargs)
    if already is not None and already != (wanted := asdict(config)):
        differ = [name for name in wanted if already.get(name) != wanted[name]]
        there = ", ".join(f"{name}={already.get(name)!r}" for name in differ)
        raise ConfigError(
            f"the model is converted already, with {there} and not "
            f"{', '.join(f'{name}={wanted[name]!r}' for name in differ)}: "
            "mhc_compile.revert_(model) takes that off"
        )
    capture = _capture(model, args, kwargs, config, converted=already is not None)
    uses = site_uses(capture)
    if already is None:
        attach_(uses, config)
        for module in model.modules():
            setattr(module, SEEN, True)
        reset_dynamo()
    else:
        _refuse_partial(uses)
    return build_report(model, capture, config, uses, converted=True)


def _capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: MHCConfig,
    *,
    converted: bool,
) -> Capture:
    """The capture in the model's mode, or that in train mode if graph breaks part more there.

    What is trained in one mode must compute the same in the other: where both show the same sites,
    they are converted as the mode has them that links fewer.
    """
    names = _names(model)

    def refuse(hosted: list[HostedSite]) -> dict[int, str]:
        return refuse_filtered(hosted, config, names)

    capture = capture_model(model, args, kwargs, refuse, single_pass=config.single_pass)
    if model.training or converted:
        return capture
    modes = [(module, module.training) for module in model.modules()]
    try:
        other = capture_model(model.train(), args, kwargs, refuse, single_pass=config.single_pass)
    except Exception:  # whatever the model has against training on these inputs: it need not
        return capture
    finally:
        for module, mode in modes:
            module.training = mode
    mine, theirs = site_uses(capture), site_uses(other)
    same = Counter(map(_place, mine)) == Counter(map(_place, theirs))
    return other if same and _linked(theirs) < _linked(mine) else capture


def _place(use: SiteUse) -> tuple[int, str]:
    return id(use.hosted.host), use.hosted.source


def _linked(uses: Sequence[SiteUse]) -> tuple[int, int]:
    """How many sites lie in no broken branch, and how many take over the streams of another."""
    return sum(not use.site.crosses for use in uses), sum(use.follows for use in uses)


def select_sites(
    config: MHCConfig, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> MHCConfig:
    """``config`` with patterns alone: functions are asked about the sites of ``model``."""
    if not config.has_predicate:
        return config
    everything = replace(config, include=("*",), exclude=())
    return config.select(explain(model, *args, config=everything, **kwargs).sites)


def _refuse_partial(uses: Sequence[SiteUse]) -> None:
    for use in uses:
        host = use.hosted.host
        if use.planned is not None and host is not None and sites_of(host) is None:
            raise UnsupportedGraphError(
                f"only a part of the model is converted: the add of {type(host).__name__} at "
                f"{use.hosted.source} is not. Take the parameters off with "
                "mhc_compile.revert_(model) and convert the whole model at once"
            )


def is_converted(model: nn.Module) -> bool:
    """Whether `convert_` or a first call has put parameters on any module of ``model``."""
    return _conversion(model) is not None


def _conversion(model: nn.Module) -> dict[str, Any] | None:
    """The configuration ``model`` was converted with; None if it was not."""
    if not isinstance(model, nn.Module):
        raise UnsupportedGraphError(
            f"a {type(model).__name__} is no torch.nn.Module: parameters would have no place. Put "
            "the computation into the forward of a module"
        )
    sites = (sites_of(module) for module in model.modules())
    return next((found.config for found in sites if found is not None), None)


def revert_(model: nn.Module) -> None:
    """Take all hyper-connection parameters off again, in place; the model is then the plain one.

    Raises:
        UnsupportedGraphError: a module was wrapped in a new class (``fully_shard``) meanwhile.
    """
    for module in model.modules():
        refuse_wrapped(module)
    for module in list(model.modules()):
        detach_(module)
        vars(module).pop(SEEN, None)
    reset_dynamo()


def mhc_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything conversion added, for optimizer groups."""
    ours = {
        id(p)
        for m in model.modules()
        if isinstance(m, MHCSite)
        for p in m.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in ours:
            yield name, parameter


@dataclass(slots=True)
class _Owned:
    """Everything that will be attached to one host."""

    host: nn.Module
    uses: list[SiteUse] = field(default_factory=list)


def attach_(uses: Sequence[SiteUse], config: MHCConfig) -> None:
    """Create the parameters of all ``uses`` and register them, all or none.

    Raises:
        UnsupportedGraphError: a host has an attribute ``mhc`` of its own, or its calls differ.
    """
    ready = [(host, sites) for host, sites in build_sites(uses, config) if len(sites)]
    done: list[nn.Module] = []
    try:
        for host, sites in ready:
            done.append(host)
            host.add_module("mhc", sites.train(host.training))
            check_calls_(host, sites.signature, config.on_eager)
    except BaseException:
        for host in done:
            detach_(host)
        raise


def detach_(host: nn.Module) -> None:
    """Take the sites of one module off again, in place."""
    if sites_of(host) is not None:
        del host._modules["mhc"]
    uncheck_calls_(host)


def build_sites(uses: Sequence[SiteUse], config: MHCConfig) -> list[tuple[nn.Module, MHCSites]]:
    """Fresh parameters for every host of ``uses``, attached to nothing yet."""
    owned: dict[int, _Owned] = {}
    for use in uses:
        if use.hosted.host is not None:
            owned.setdefault(id(use.hosted.host), _Owned(use.hosted.host)).uses.append(use)
    return [(entry.host, _build(entry, config)) for entry in owned.values()]


def _build(entry: _Owned, config: MHCConfig) -> MHCSites:
    """The sites of one host, from all its calls."""
    host, records = entry.host, _records(entry)
    if any(record.converted for record in records) and hasattr(host, "mhc"):
        raise UnsupportedGraphError(
            f"{type(host).__name__} has an attribute 'mhc' of its own, where the parameters would "
            "go"
        )
    modules: dict[str, MHCSite] = {}
    for record in records:
        if not record.converted:
            continue
        use = next(u for u in entry.uses if u.hosted.key == record.key and u.planned is not None)
        assert use.planned is not None
        modules[record.key] = new_site(use, record, config, _device(host))
    return MHCSites(modules, records, asdict(config))


def _records(entry: _Owned) -> tuple[SiteRecord, ...]:
    by_key: dict[str, list[SiteUse]] = defaultdict(list)
    for use in entry.uses:
        by_key[use.hosted.key].append(use)
    records = []
    for key, uses in by_key.items():
        if len({use.planned is not None for use in uses}) > 1:
            raise UnsupportedGraphError(
                f"the add at {uses[0].hosted.source} is a site in one call of "
                f"{type(entry.host).__name__} and not in another "
                f"({next(u.reason for u in uses if u.planned is None)}): exclude it, or its module"
            )
        records.append(
            SiteRecord(
                key=key,
                source=uses[0].hosted.source,
                converted=uses[0].planned is not None,
                starts=any(u.starts for u in uses),
                follows=any(u.follows for u in uses),
                continues=any(u.continues for u in uses),
                ends=any(not u.continues for u in uses),
                skip_at=uses[0].site.skip_at,
                crosses=any(u.site.crosses for u in uses),
            )
        )
    return tuple(records)


def new_site(use: SiteUse, record: SiteRecord, config: MHCConfig, device: torch.device) -> MHCSite:
    """Fresh parameters for one site, float32, on ``device``."""
    assert use.planned is not None
    spec, width = config.spec(), use.planned.width
    # Tensors of inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        tensors = initial_parameters(spec, width, config.init, use.step)
        head = initial_head(spec, width) if config.collapse == "learned" and record.ends else {}
        return MHCSite(
            spec,
            width,
            {name: tensor.to(device) for name, tensor in tensors.items()},
            {name: tensor.to(device) for name, tensor in head.items()},
        )


def _device(host: nn.Module) -> torch.device:
    tensor = next(itertools.chain(host.parameters(), host.buffers()), None)
    return tensor.device if tensor is not None else torch.get_default_device()


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}
