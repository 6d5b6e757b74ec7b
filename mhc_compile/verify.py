"""`mhc-compile verify`: does conversion keep a given model's function, and are gradients right?

Four properties, each measured against a bound: outputs and gradients of the old parameters are
those of the plain model; gradients of the new parameters are those of finite differences in
float64; ``H_res`` is doubly stochastic after its parameters have moved.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mhc_compile.config import MHCConfig
from mhc_compile.errors import UnsupportedGraphError, VerificationError
from mhc_compile.kernels.constraints import constraint_named
from mhc_compile.stability import SiteStability, measure
from mhc_compile.targets import Built

OUTPUT_BOUND = 2e-6
GRADIENT_BOUND = 1e-5
DIFFERENCE_BOUND = 1e-6
ROW_BOUND = 1e-5
COLUMN_BOUND = 1e-3
"""Of 20 Sinkhorn steps on logits as `_perturb` leaves them; wide logits need more steps."""

_SEED = 0
_STEP = 1e-6
_DIRECTIONS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One property: holds if ``value <= bound``."""

    name: str
    value: float
    bound: float
    detail: str = ""
    """Where the value was largest."""

    @property
    def passed(self) -> bool:
        """Whether the property holds; a NaN does not."""
        return self.value <= self.bound


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of `verify`."""

    model: str
    checks: tuple[Check, ...]
    sites: tuple[SiteStability, ...]
    """Each site after its parameters have moved."""

    @property
    def passed(self) -> bool:
        """Whether every property holds."""
        return all(check.passed for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise if a property does not hold.

        Raises:
            VerificationError: names each property that failed, with value and bound.
        """
        failed = [check for check in self.checks if not check.passed]
        if failed:
            texts = [f"{c.name} is {c.value:.1e} > {c.bound:.0e} ({c.detail})" for c in failed]
            raise VerificationError(f"{self.model}: {'; '.join(texts)}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        sites = [asdict(site) for site in self.sites]
        return {"model": self.model, "passed": self.passed, "checks": checks, "sites": sites}

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text, keys sorted."""
        return json.dumps(self.to_dict(), indent=indent, sort_keys=True)


def verify(
    build: Callable[[], Built],
    config: MHCConfig | None = None,
    *,
    tell: Callable[[str], None] = lambda step: None,
) -> VerifyReport:
    """Check the conversion of a model.

    Args:
        build: returns the plain model and the arguments of one call, the same on every call. Its
            dropout is set to 0 for the comparison in train mode.
        config: how to convert; None is the default.
        tell: is told what begins, for a progress display.

    Returns:
        One check for each property and mode, passed or not.

    Raises:
        UnsupportedGraphError: the model has no residual site, or cannot be rewritten.
        VerificationError: the model returns no float tensor to compare.
    """
    config = config or MHCConfig()
    checks: list[Check] = []
    for mode in ("eval", "train"):
        tell(f"plain against converted, {mode} mode")
        checks += _compare(build, config, train=mode == "train")
    tell("rewriting")
    model, args, kwargs = build()
    old = {name for name, _ in model.named_parameters()}
    module = _rewrite(model.eval(), args, kwargs, config)
    _perturb(module, old)
    sites = measure(module, *args, **kwargs).sites
    checks += _check_stochastic(sites, config)
    tell("finite differences")
    checks += _check_differences(module, old, args, kwargs)
    return VerifyReport(model=type(model).__name__, checks=tuple(checks), sites=sites)


def _rewrite(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: MHCConfig
) -> fx.GraphModule:
    from mhc_compile import rewrite

    return cast("fx.GraphModule", rewrite(model, *args, config=config, **kwargs))


def _compare(build: Callable[[], Built], config: MHCConfig, *, train: bool) -> list[Check]:
    """Outputs and gradients of the old parameters, converted against plain."""
    from mhc_compile import convert_

    model, args, kwargs = build()
    model.train(train)
    _disable_dropout(model)
    names = [name for name, _ in model.named_parameters()]
    plain_outputs, plain_gradients = _run(model, model, names, args, kwargs)

    model, args, kwargs = build()
    model.train(train)
    _disable_dropout(model)
    report = convert_(model, *args, config=config, **kwargs)
    if not report.converted:
        raise UnsupportedGraphError(f"{report.model} has no residual site that can be converted")
    default = MHCConfig()
    options = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }
    compiled = torch.compile(model, backend="mhc", options={**options, "inner": "aot_eager"})
    outputs, gradients = _run(compiled, model, names, args, kwargs)

    mode = "train" if train else "eval"
    return [
        _worst(f"outputs, {mode} mode", plain_outputs, outputs, OUTPUT_BOUND, floor=0.0),
        # A gradient that is 0 but for rounding (a key's bias) has no relative error: hence a floor.
        _worst(
            f"old gradients, {mode} mode", plain_gradients, gradients, GRADIENT_BOUND, floor=0.01
        ),
    ]


def _run(
    call: Callable[..., Any],
    model: nn.Module,
    names: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Float outputs of one call, and gradients of the parameters ``names``."""
    torch.manual_seed(_SEED)
    outputs = _float_outputs(call(*args, **kwargs))
    _loss(outputs).backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    gradients = {
        name: parameters[name].grad.detach().clone()
        for name in names
        if parameters[name].grad is not None
    }
    return {name: output.detach() for name, output in outputs.items()}, gradients


def _float_outputs(result: Any) -> dict[str, torch.Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(result)
    outputs = {
        f"output{pytree.keystr(path)}": leaf
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }
    if not outputs:
        raise VerificationError(
            f"the model returns {type(result).__name__} without a float tensor: nothing to compare"
        )
    return outputs


def _loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A fixed random projection of the outputs, so that no gradient cancels."""
    generator = torch.Generator().manual_seed(_SEED)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        if output.requires_grad:
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            total = total + (output.double() * weight).sum() / output.numel() ** 0.5
    return total


def _worst(
    name: str,
    expected: dict[str, torch.Tensor],
    actual: dict[str, torch.Tensor],
    bound: float,
    *,
    floor: float,
) -> Check:
    """Largest relative error: ``max |a - e| / max |e|`` of each tensor, with a floor below.

    Args:
        name: of the check.
        expected: the plain model's tensors.
        actual: the converted model's; has to hold the same names.
        bound: of the error.
        floor: smallest denominator, as a part of the largest value of any tensor.
    """
    if expected.keys() != actual.keys():
        missing = sorted(expected.keys() ^ actual.keys())
        return Check(
            name=name, value=float("inf"), bound=bound, detail=f"only one has {missing[0]}"
        )
    largest = max((float(e.abs().max()) for e in expected.values() if e.numel()), default=0.0)
    errors = {}
    for key, e in expected.items():
        if e.numel():
            scale = max(float(e.abs().max()), floor * largest) or 1.0
            errors[key] = float((actual[key].double() - e.double()).abs().max()) / scale
    worst = max(errors, key=lambda key: _nan_last(errors[key]))
    return Check(name=name, value=errors[worst], bound=bound, detail=worst)


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _disable_dropout(model: nn.Module) -> None:
    """Set every drop probability to 0, so that train mode computes one function.

    A probability is a float with "drop" in its name, on a module or on the configuration it reads.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if hasattr(holder, "__dict__") else ():
                if "drop" in name and type(value) is float:
                    setattr(holder, name, 0.0)


def _perturb(module: nn.Module, old: set[str]) -> None:
    """Move the new parameters away from their start, where many gradients are 0 by symmetry."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in old:
                # A projection adds up nC terms, so that its logits are of the biases' size.
                scale = 0.2 if parameter.ndim < 2 else parameter.shape[0] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))


def _check_stochastic(sites: tuple[SiteStability, ...], config: MHCConfig) -> list[Check]:
    if not constraint_named(config.constraint).doubly_stochastic:
        return []
    row = max(sites, key=lambda site: _nan_last(site.mixing.row_error))
    column = max(sites, key=lambda site: _nan_last(site.mixing.column_error))
    return [
        Check(
            name="row sums of H_res", value=row.mixing.row_error, bound=ROW_BOUND, detail=row.name
        ),
        Check(
            name="column sums of H_res",
            value=column.mixing.column_error,
            bound=COLUMN_BOUND,
            detail=column.name,
        ),
    ]


def _check_differences(
    module: fx.GraphModule, old: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Check]:
    """Directional derivatives of each kind of new parameter, against central differences."""
    module = _in_float64(module)
    args, kwargs = pytree.tree_map_only(torch.Tensor, _to_float64, (args, kwargs))
    new = {name: p for name, p in module.named_parameters() if name not in old}

    def loss() -> torch.Tensor:
        torch.manual_seed(_SEED)
        return _loss(_float_outputs(module(*args, **kwargs)))

    gradients = dict(zip(new, torch.autograd.grad(loss(), list(new.values())), strict=True))
    generator = torch.Generator().manual_seed(_SEED)
    checks = []
    for kind in sorted({name.rpartition(".")[2] for name in new}):
        members = {name: p for name, p in new.items() if name.rpartition(".")[2] == kind}
        worst = 0.0
        for _ in range(_DIRECTIONS):
            direction = {
                name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
                for name, p in members.items()
            }
            length = torch.stack([v.square().sum() for v in direction.values()]).sum().sqrt()
            slope = sum(
                float((gradients[name] * v).sum() / length) for name, v in direction.items()
            )
            values = []
            for sign in (1.0, -1.0):
                _shift(members, direction, sign * _STEP / float(length))
                with torch.no_grad():
                    values.append(float(loss()))
                _shift(members, direction, -sign * _STEP / float(length))
            measured = (values[0] - values[1]) / (2 * _STEP)
            error = abs(measured - slope) / (max(abs(measured), abs(slope)) or 1.0)
            worst = max(worst, _nan_last(error))
        name = f"finite differences of {kind}"
        detail = f"{sum(p.numel() for p in members.values())} parameters"
        checks.append(Check(name=name, value=worst, bound=DIFFERENCE_BOUND, detail=detail))
    return checks


def _shift(
    parameters: dict[str, nn.Parameter], direction: dict[str, torch.Tensor], step: float
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(direction[name], alpha=step)


def _to_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes in float64 throughout.

    The model's own casts to float32 (norms, softmax) are part of the graph and would hide all but
    six digits of a difference, so they become casts to float64.
    """
    module = copy.deepcopy(module).double()

    def widen(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for node in module.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
    module.recompile()
    return module
