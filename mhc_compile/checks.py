"""The single measurements behind `mhc_compile.verify`: each gives a `Check`."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mhc_compile.errors import VerificationError
from mhc_compile.stability import SiteStability

OUTPUT_BOUND = 2e-6
GRADIENT_BOUND = 1e-5
DIFFERENCE_BOUND = 1e-6
ROW_BOUND = 1e-5
COLUMN_BOUND = 1e-3
"""Of 20 Sinkhorn steps on logits as `perturb` leaves them; wide logits need more steps."""

NOISE_FACTOR = 4.0
"""Two float32 computations of one function may each be off by its rounding noise, and unequally."""

SEED = 0
_STEPS = (1e-5, 1e-7)
"""A long step crosses kinks (ReLU), a short one drowns in rounding: the better one counts."""
_NO_SLOPE = 1e-8
"""A part of the loss; slopes below it are rounding, in float64 and at these steps."""
_DIRECTIONS = 2
_GRADIENT_FLOOR = 0.01


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


def float_outputs(result: Any) -> dict[str, torch.Tensor]:
    """All floating point tensors that a model returned, by their place in the result.

    Raises:
        VerificationError: there is none.
    """
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


def projected(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A fixed random projection of the outputs to one float64: a loss in which nothing cancels."""
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double() * weight).sum() / max(output.numel(), 1) ** 0.5
    return total


Tensors = Mapping[str, torch.Tensor]


def compare_outputs(
    name: str, expected: Tensors, actual: Tensors, exact: Tensors | None = None
) -> Check:
    """Largest ``max |a - e| / max |e|`` of any output.

    Args:
        name: of the check.
        expected: what the plain model gives.
        actual: what the converted one gives.
        exact: what the plain model gives in float64. Where float32 alone moves its results further
            than the bound (batch norm over few values), the bound is that times `NOISE_FACTOR`.
    """
    return _compare(name, expected, actual, exact, OUTPUT_BOUND, floor=0.0)


def compare_gradients(
    name: str, expected: Tensors, actual: Tensors, exact: Tensors | None = None
) -> Check:
    """The same for gradients; one far below all others is compared with a hundredth of the largest.

    A gradient that is 0 but for rounding, as that of a key's bias in attention, has no relative
    error of its own.
    """
    return _compare(name, expected, actual, exact, GRADIENT_BOUND, floor=_GRADIENT_FLOOR)


def _compare(
    name: str,
    expected: Tensors,
    actual: Tensors,
    exact: Tensors | None,
    bound: float,
    *,
    floor: float,
) -> Check:
    if expected.keys() != actual.keys():
        odd = min(expected.keys() ^ actual.keys())
        return Check(name=name, value=float("inf"), bound=bound, detail=f"only one has {odd}")
    value, detail = _largest_error(expected, actual, floor)
    if exact is not None:
        bound = max(bound, NOISE_FACTOR * _largest_error(exact, expected, floor)[0])
    return Check(name=name, value=value, bound=bound, detail=detail)


def _largest_error(expected: Tensors, actual: Tensors, floor: float) -> tuple[float, str]:
    sizes = {key: float(e.abs().max()) for key, e in expected.items() if e.numel()}
    errors = {
        key: float((actual[key].double() - expected[key].double()).abs().max())
        / (max(size, floor * max(sizes.values())) or 1.0)
        for key, size in sizes.items()
    }
    worst = max(errors, key=lambda key: _nan_is_worst(errors[key]))
    return errors[worst], worst


def check_stochastic(sites: Sequence[SiteStability]) -> list[Check]:
    """Rows and columns of every H_res sum to 1; the worst site of each."""
    row = max(sites, key=lambda site: _nan_is_worst(site.mixing.row_error))
    column = max(sites, key=lambda site: _nan_is_worst(site.mixing.column_error))
    return [
        Check(
            name="row sums of H_res",
            value=row.mixing.row_error,
            bound=ROW_BOUND,
            detail=row.name,
        ),
        Check(
            name="column sums of H_res",
            value=column.mixing.column_error,
            bound=COLUMN_BOUND,
            detail=column.name,
        ),
    ]


def check_differences(
    module: fx.GraphModule,
    new: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> list[Check]:
    """Directional derivatives of each kind of parameter, against central differences in float64.

    Args:
        module: a rewritten network; not changed.
        new: names of its parameters to differentiate by; a kind is a last part of a name.
        args: positional arguments of one call.
        kwargs: its keyword arguments.

    Returns:
        A check for each kind, in alphabetical order.
    """
    module = in_float64(module)
    args, kwargs = pytree.tree_map_only(torch.Tensor, to_float64, (args, dict(kwargs)))
    parameters = {name: module.get_parameter(name) for name in new}

    def loss() -> torch.Tensor:
        torch.manual_seed(SEED)
        return projected(float_outputs(module(*args, **kwargs)))

    gradients = dict(zip(new, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    checks = []
    for kind in sorted({name.rpartition(".")[2] for name in new}):
        members = [name for name in new if name.rpartition(".")[2] == kind]
        errors = []
        for direction in _directions({name: gradients[name] for name in members}):
            slope = sum(float((gradients[name] * direction[name]).sum()) for name in members)
            errors.append(
                min(_slope_error(loss, parameters, direction, step, slope=slope) for step in _STEPS)
            )
        size = sum(parameters[name].numel() for name in members)
        checks.append(
            Check(
                name=f"finite differences of {kind}",
                value=max(errors, key=_nan_is_worst),
                bound=DIFFERENCE_BOUND,
                detail=f"{size:,} parameters",
            )
        )
    return checks


def in_float64(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes in float64 throughout.

    The model's own casts to float32 (norms, softmax) are part of the graph and would hide all but
    six digits of a difference, so they become casts to float64.
    """
    module = copy.deepcopy(module).double()

    def widen(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for part in module.modules():  # bodies of higher-order ops are graphs of their own
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, widen)
                node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
            part.recompile()
    return module


def perturb(module: nn.Module, new: Collection[str]) -> None:
    """Move parameters away from a start at which derivatives vanish.

    New ones start where many gradients are 0 by symmetry. Old gains may be 0 (the last norm of a
    branch, in ResNets), and then the streams have nothing to mix.

    Args:
        module: a rewritten network.
        new: names of its new parameters; of the old ones, vectors move alone.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or name in new:
                # A projection adds up nC terms: its logits are to be of the size of the biases.
                scale = 0.2 if parameter.ndim < 2 else parameter.shape[0] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))


def disable_dropout(model: nn.Module) -> None:
    """Set every drop probability to 0, so that train mode computes one function.

    A probability is a float with "drop" in its name, on a module or on the configuration it reads.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if "drop" in name and type(value) is float:
                    setattr(holder, name, 0.0)


def _nan_is_worst(value: float) -> float:
    return float("inf") if value != value else value


def _directions(gradients: Tensors) -> Iterator[dict[str, torch.Tensor]]:
    """Directions of length 1: the gradient, randomly weighted, plus a random one.

    A random direction alone has a slope that is lost in rounding where parameters are many; it is
    there for entries in which the gradient is wrongly 0.
    """
    generator = torch.Generator().manual_seed(SEED)
    length = _length(gradients)
    for _ in range(_DIRECTIONS):
        noise = {
            name: torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
            for name, gradient in gradients.items()
        }
        size = _length(noise)
        direction = {
            name: gradient * noise[name].abs() / length + noise[name] / size
            for name, gradient in gradients.items()
        }
        size = _length(direction)
        yield {name: v / size for name, v in direction.items()}


def _length(tensors: Tensors) -> float:
    squares = sum(float(tensor.square().sum()) for tensor in tensors.values())
    return squares**0.5 or 1.0


def _slope_error(
    loss: Callable[[], torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, torch.Tensor],
    step: float,
    *,
    slope: float,
) -> float:
    """Relative distance of ``slope`` from the central difference of that step."""
    values = []
    for signed in (step, -step):
        with _moved(parameters, direction, signed), torch.no_grad():
            values.append(float(loss()))
    measured = (values[0] - values[1]) / (2 * step)
    scale = max(abs(measured), abs(slope), _NO_SLOPE * max(map(abs, values)))
    return _nan_is_worst(abs(measured - slope) / (scale or 1.0))


@contextmanager
def _moved(
    parameters: Mapping[str, nn.Parameter], direction: Mapping[str, torch.Tensor], step: float
) -> Iterator[None]:
    """Parameters moved by a step along a direction, while the context lasts."""
    start = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, v in direction.items():
            parameters[name].add_(v, alpha=step)
    yield
    with torch.no_grad():
        for name, value in start.items():
            parameters[name].copy_(value)


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A floating point tensor in float64; any other as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor
