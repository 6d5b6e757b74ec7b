"""One model taken through conversion and training, with everything measured on the way.

The converted model is held against the same model built again and left plain: outputs in eval and
in train mode, gradients of the parameters that both have. Dropout is 0, so that train mode
computes one function.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

import mhc_compile
from mhc_compile.checks import disable_dropout, float_outputs
from tests.models.zoo import Inputs, build

STEPS = 5
RATES = tuple(10.0**-k for k in range(5, 10))
"""Of AdamW, in this order: from random weights some networks, left plain, jump about at first."""
OUTPUT_BOUND = 5e-6
GRADIENT_BOUND = 1e-5
_ZERO = 1e-5
"""A tensor this much smaller than the largest of its kind is 0 but for rounding."""

Tensors = dict[str, torch.Tensor]
Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One forward and backward in train mode, plain against converted."""

    dtype: str
    outputs: float
    buffers: float
    """The statistics of batch norms, after the call."""
    gradients: float
    worst: str
    """The parameter whose gradient differs most."""
    repeats: bool
    """Whether a second backward gives the same bits."""

    @property
    def within_bounds(self) -> bool:
        """Whether all three stay below their bounds."""
        errors = max(self.outputs, self.buffers)
        return errors <= OUTPUT_BOUND and self.gradients <= GRADIENT_BOUND


@dataclass(slots=True)
class Trial:
    """What was measured; a stage that was not reached leaves its value empty."""

    model: nn.Module
    call: Call
    """The model, compiled."""
    inputs: Inputs
    report: mhc_compile.Report
    missing: list[str] = field(default_factory=list)
    """Keys that a plain state_dict lacks, other than ours."""
    unexpected: list[str] = field(default_factory=list)
    eval_error: float | None = None
    eval_dtype: str = "float32"
    """In float64 for a model that amplifies rounding beyond the bound."""
    comparison: Comparison | None = None
    """In float32, or in float64 for a model that amplifies rounding beyond the bounds."""
    rounding: tuple[float, float] | None = None
    """Where it casts to float32 by itself and amplifies rounding beyond the bounds: how far the
    float32 gradients of the plain and of the converted model are from exact ones."""
    rate: float = RATES[0]
    """Of the optimizer: the first of `RATES` at which the plain model's loss falls."""
    plain_losses: list[float] = field(default_factory=list)
    """Of the plain model: before each of the optimizer steps, and after the last."""
    losses: list[float] = field(default_factory=list)
    """The same of the converted model."""


def convert(name: str, *, double: bool = False) -> Trial:
    """A converted model of the zoo and its compiled form, without dropout."""
    model, inputs = _build(name, double=double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own use of torch
        report = mhc_compile.convert_(model, **inputs)
    call = torch.compile(model, backend="mhc", options={"inner": "eager"})
    return Trial(model, call, inputs, report)


def run_trial(name: str, tell: Callable[[Trial], None] = lambda trial: None) -> Trial:
    """Convert, compare and train one model.

    Args:
        name: of the zoo.
        tell: gets the trial as soon as the model is converted, to look at should a stage raise.
    """
    trial = convert(name)
    tell(trial)
    plain, inputs = _build(name)
    keys = trial.model.load_state_dict(plain.state_dict(), strict=False)
    trial.missing = [key for key in keys.missing_keys if ".mhc." not in f".{key}"]
    trial.unexpected = list(keys.unexpected_keys)
    expected, actual = evaluate(plain, inputs), evaluate(trial.call, trial.inputs)
    trial.eval_error, _ = _relative_error(expected, actual)
    if trial.eval_error > OUTPUT_BOUND:
        trial.eval_error, trial.eval_dtype = _eval_error_in_double(name), "float64"
    # Train mode compiles anew. Frames of each layer, in both modes, pass Dynamo's recompile limit.
    torch.compiler.reset()
    trial.comparison = _compare(name, trial)
    if not trial.comparison.within_bounds:
        # Some operations have no float64: then float32 has the last word.
        with contextlib.suppress(RuntimeError):
            trial.comparison = _compare(name, convert(name, double=True), double=True)
    if not trial.comparison.within_bounds:
        trial.rounding = _rounding(name, trial)
    trial.rate, trial.plain_losses = _fair_rate(name)
    optimizer = torch.optim.AdamW(trial.model.parameters(), lr=trial.rate)
    trial.losses = train(trial.call, trial.inputs, optimizer, STEPS)
    return trial


def _fair_rate(name: str) -> tuple[float, list[float]]:
    """The largest of `RATES` at which the plain model's loss falls, and these losses."""
    for rate in RATES:
        plain, inputs = _build(name, train=True)
        losses = train(plain, inputs, torch.optim.AdamW(plain.parameters(), lr=rate), STEPS)
        if losses[-1] < losses[0]:
            break
    return rate, losses


def reloads(name: str, trial: Trial) -> bool:
    """Whether a trained model, saved and loaded into a new one, computes the same bits."""
    expected = evaluate(_in_eval(trial), trial.inputs)
    buffer = io.BytesIO()
    torch.save(trial.model.state_dict(), buffer)
    buffer.seek(0)
    fresh = convert(name)
    fresh.model.load_state_dict(torch.load(buffer))
    actual = evaluate(_in_eval(fresh), fresh.inputs)
    return all(torch.equal(out, actual[key]) for key, out in expected.items())


def evaluate(call: Call, inputs: Inputs) -> Tensors:
    """Float outputs without gradient, always of the same random state."""
    torch.manual_seed(0)
    with torch.no_grad():
        return float_outputs(call(**inputs))


def train(call: Call, inputs: Inputs, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Fit random targets; the loss before each step and after the last.

    Targets are as large as the outputs were before the first step: none outweighs the others.
    """
    losses: list[float] = []
    sizes: list[float] = []
    for step in range(steps + 1):
        torch.manual_seed(0)
        outputs = [out for out in float_outputs(call(**inputs)).values() if out.requires_grad]
        sizes = sizes or [out.double().square().mean().sqrt().item() or 1.0 for out in outputs]
        torch.manual_seed(1)
        errors = [
            (out.double() / size - torch.randn(out.shape)).square().mean()
            for out, size in zip(outputs, sizes, strict=True)
        ]
        loss = torch.stack(errors).mean()
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def _build(name: str, *, train: bool = False, double: bool = False) -> tuple[nn.Module, Inputs]:
    model, inputs = build(name)
    disable_dropout(model.train(train))
    if double:
        model.double()
        if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # torch.grouped_mm has no float64
        inputs = pytree.tree_map_only(torch.Tensor, _to_double, inputs)
    return model, inputs


def _eval_error_in_double(name: str) -> float:
    plain, inputs = _build(name, double=True)
    converted = convert(name, double=True)
    expected, actual = evaluate(plain, inputs), evaluate(converted.call, converted.inputs)
    return _relative_error(expected, actual)[0]


def _compare(name: str, trial: Trial, *, double: bool = False) -> Comparison:
    plain, inputs = _build(name, train=True, double=double)
    model, call = trial.model.train(), trial.call
    expected, gradients = _differentiate(plain, plain, inputs)
    outputs, first = _differentiate(call, model, trial.inputs)
    buffer_error, _ = _relative_error(_buffers(plain), _buffers(model))
    _, second = _differentiate(call, model, trial.inputs)
    output_error, _ = _relative_error(expected, outputs)
    gradient_error, worst = _relative_error(gradients, first)
    return Comparison(
        dtype="float64" if double else "float32",
        outputs=output_error,
        buffers=buffer_error,
        gradients=gradient_error,
        worst=worst,
        repeats=all(torch.equal(gradient, second[key]) for key, gradient in first.items()),
    )


def _rounding(name: str, trial: Trial) -> tuple[float, float]:
    """Errors of the plain and of the converted model's gradients against all-float64 ones."""
    plain, inputs = _build(name, train=True)
    _, rounded = _differentiate(plain, plain, inputs)
    _, ours = _differentiate(trial.call, trial.model.train(), trial.inputs)
    with _all_in_double():
        model, inputs = _build(name, train=True, double=True)
        _, exact = _differentiate(model, model, inputs)
    return _relative_error(exact, rounded)[0], _relative_error(exact, ours)[0]


@contextlib.contextmanager
def _all_in_double() -> Iterator[None]:
    """Make casts to float32 casts to float64."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs = {key: wider(value) for key, value in kwargs.items()}
        return to(self, *map(wider, args), **kwargs)

    def wide_softmax(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(*args, dtype=wider(dtype), **kwargs)

    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "to", cast),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


def _differentiate(call: Call, model: nn.Module, inputs: Inputs) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of a random projection of them, in which nothing cancels."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = float_outputs(call(**inputs))
    torch.manual_seed(1)
    loss = sum(
        (out * torch.randn(out.shape)).sum() / out.numel() ** 0.5
        for out in outputs.values()
        if out.requires_grad
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs, gradients


def _relative_error(expected: Tensors, actual: Tensors) -> tuple[float, str]:
    """(largest ``max |a - e| / max |e|`` of any tensor, its name).

    A tensor that is 0 but for rounding has no size of its own: it is held against the largest.
    """
    largest = max((_size(tensor) for tensor in expected.values()), default=0.0)
    worst = (0.0, "")
    for name, tensor in expected.items():
        size = _size(tensor)
        scale = size if size > _ZERO * largest else largest
        worst = max(worst, (_nan_is_worst(_distance(tensor, actual[name]) / (scale or 1.0)), name))
    return worst


def _in_eval(trial: Trial) -> Call:
    torch.compiler.reset()
    trial.model.eval()
    return trial.call


def _buffers(model: nn.Module) -> Tensors:
    return {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def _to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return _size(actual.detach().double() - expected.detach().double())


def _nan_is_worst(value: float) -> float:
    return float("inf") if value != value else value
