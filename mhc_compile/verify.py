"""`mhc-compile verify`: does conversion keep a given model's function, and are gradients right?

Four properties, each measured against a bound: outputs and gradients of the old parameters are
those of the plain model; gradients of the new parameters are those of finite differences in
float64; ``H_res`` is doubly stochastic after its parameters have moved.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mhc_compile.backend import mhc
from mhc_compile.checks import (
    SEED,
    Check,
    Tensors,
    check_differences,
    check_stochastic,
    compare_gradients,
    compare_outputs,
    disable_dropout,
    float_outputs,
    perturb,
    projected,
    to_float64,
)
from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_, select_sites
from mhc_compile.errors import MHCError, UnsupportedGraphError, VerificationError
from mhc_compile.kernels.constraints import constraint_named
from mhc_compile.rewrite import rewrite
from mhc_compile.stability import SiteStability, measure
from mhc_compile.targets import Built


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of `verify`."""

    model: str
    checks: tuple[Check, ...]
    sites: tuple[SiteStability, ...]
    """Each site after its parameters have moved."""
    notes: tuple[str, ...] = ()
    """What could not be checked, and why."""

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
            texts = [f"{c.name}: {c.value:.1e} > {c.bound:.0e} ({c.detail})" for c in failed]
            raise VerificationError(f"{self.model}: {'; '.join(texts)}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        sites = [asdict(site) for site in self.sites]
        return {
            "model": self.model,
            "passed": self.passed,
            "checks": checks,
            "sites": sites,
            "notes": list(self.notes),
        }

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
    if config.has_predicate:
        model, args, kwargs = build()
        config = select_sites(config, model, args, kwargs)
    checks: list[Check] = []
    for train in (False, True):
        tell(f"plain against converted, {_mode(train)}")
        checks += _compare(build, config, train=train)
    tell("moving the new parameters")
    model, args, kwargs = build()
    old = {name for name, _ in model.named_parameters()}
    module = rewrite(model.eval(), *args, config=config, **kwargs)
    new = [name for name, _ in module.named_parameters() if name not in old]
    perturb(module, new)
    sites = measure(module, *args, **kwargs).sites
    if constraint_named(config.constraint).doubly_stochastic:
        checks += check_stochastic(sites)
    tell("finite differences")
    notes = []
    try:
        checks += check_differences(module, new, args, kwargs)
    except RuntimeError as error:
        if isinstance(error, MHCError):
            raise
        notes.append(
            f"no finite differences, as float64 is beyond this model: {_first_line(error)}"
        )
    name = type(model).__name__
    return VerifyReport(model=name, checks=tuple(checks), sites=sites, notes=tuple(notes))


def _compare(build: Callable[[], Built], config: MHCConfig, *, train: bool) -> list[Check]:
    """Outputs and gradients of the old parameters, converted against plain."""
    model, args, kwargs = build()
    disable_dropout(model.train(train))
    names = [name for name, _ in model.named_parameters()]
    expected = _run(model, model, names, args, kwargs)
    exact = _in_float64(build, names, train=train)

    model, args, kwargs = build()  # anew, as a call may change buffers or arguments
    disable_dropout(model.train(train))
    report = convert_(model, *args, config=config, **kwargs)
    if not report.converted:
        raise UnsupportedGraphError(f"{report.model} has no residual site that can be converted")
    options = {**_changed(config), "inner": "aot_eager"}
    compiled = torch.compile(model, backend=mhc, options=options)
    actual = _run(compiled, model, names, args, kwargs)
    return [
        compare_outputs(f"outputs, {_mode(train)}", expected[0], actual[0], exact[0]),
        compare_gradients(
            f"gradients of old parameters, {_mode(train)}", expected[1], actual[1], exact[1]
        ),
    ]


def _in_float64(
    build: Callable[[], Built], names: list[str], *, train: bool
) -> tuple[Tensors, Tensors] | tuple[None, None]:
    """What the plain model gives in float64, which shows the noise of its own float32.

    None for a model with operations that lack float64: the bounds then stay as they are.
    """
    model, args, kwargs = build()
    disable_dropout(model.train(train))
    args, kwargs = pytree.tree_map_only(torch.Tensor, to_float64, (args, kwargs))
    try:
        return _run(model.double(), model, names, args, kwargs)
    except RuntimeError:
        return None, None


def _run(
    call: Callable[..., Any],
    model: nn.Module,
    names: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Float outputs of one call, and the gradients of the parameters ``names`` that have one."""
    torch.manual_seed(SEED)
    outputs = float_outputs(call(*args, **kwargs))
    projected(outputs).backward()  # type: ignore[no-untyped-call]
    gradients = {name: model.get_parameter(name).grad for name in names}
    return (
        {name: output.detach() for name, output in outputs.items()},
        {name: gradient for name, gradient in gradients.items() if gradient is not None},
    )


def _changed(config: MHCConfig) -> dict[str, Any]:
    """The fields that differ from their default, as options of the backend."""
    default = MHCConfig()
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _mode(train: bool) -> str:
    return "train mode" if train else "eval mode"
