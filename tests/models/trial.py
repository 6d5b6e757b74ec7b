"""One model taken through conversion and training, with everything measured on the way.

The converted model is held against the same model built again and left plain: outputs in eval and
in train mode, gradients of the parameters that both have. Dropout is 0, so that train mode
computes one function.
"""

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import mhc_compile
from mhc_compile.checks import disable_dropout, float_outputs
from tests.models.zoo import Inputs, build

STEPS = 5
_ZERO = 1e-5
"""A gradient this much smaller than the model's largest is 0 but for rounding."""

Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Trial:
    """What was measured; a stage that was not reached leaves its value empty."""

    report: mhc_compile.Report
    plain_parameters: int
    eval_error: float | None = None
    train_error: float | None = None
    buffer_error: float | None = None
    """Of the buffers after one call in train mode: the statistics of batch norms."""
    gradient_error: float | None = None
    worst_gradient: str = ""
    repeats: bool | None = None
    """Whether a second backward gives the same bits."""
    missing: list[str] = field(default_factory=list)
    """Keys that a plain state_dict lacks, other than ours."""
    unexpected: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Before each of the optimizer steps, and after the last."""
    reloads: bool | None = None
    """Whether the trained model, saved and loaded into a new one, computes the same bits."""


def convert(name: str) -> tuple[nn.Module, Inputs, mhc_compile.Report]:
    """A converted model of the zoo, in eval mode."""
    model, inputs = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own use of torch
        return model, inputs, mhc_compile.convert_(model, **inputs)


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model through our backend, without Inductor behind it."""
    return torch.compile(model, backend="mhc", options={"inner": "aot_eager"})


def run_trial(name: str, tell: Callable[[Trial], None] = lambda trial: None) -> Trial:
    """Convert, compare, train, save and load one model.

    Args:
        name: of the zoo.
        tell: gets the trial as soon as the model is converted, to look at should a stage raise.
    """
    model, inputs, report = convert(name)
    plain, _ = build(name)
    trial = Trial(report, sum(p.numel() for p in plain.parameters()))
    tell(trial)
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    trial.missing = [key for key in keys.missing_keys if ".mhc." not in f".{key}"]
    trial.unexpected = list(keys.unexpected_keys)
    call = compiled(model)
    for module in (plain, model):
        disable_dropout(module)

    trial.eval_error = output_error(evaluate(plain, inputs), evaluate(call, inputs))
    expected, gradients = _differentiate(plain.train(), plain, inputs)
    outputs, first = _differentiate(call, model.train(), inputs)
    trial.train_error = output_error(expected, outputs)
    trial.buffer_error = output_error(_buffers(plain), _buffers(model))
    trial.gradient_error, trial.worst_gradient = _gradient_error(gradients, first)
    _, second = _differentiate(call, model, inputs)
    trial.repeats = first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trial.losses = train(call, inputs, optimizer, STEPS)
    trial.reloads = _reloads(name, model, call, inputs)
    return trial


def evaluate(call: Callable[..., Any], inputs: Inputs) -> Tensors:
    """Float outputs without gradient, always of the same random state."""
    torch.manual_seed(0)
    with torch.no_grad():
        return float_outputs(call(**inputs))


def train(
    call: Callable[..., Any], inputs: Inputs, optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Fit random targets; the loss before each step and after the last."""
    losses = []
    for step in range(steps + 1):
        torch.manual_seed(0)
        outputs = [out for out in float_outputs(call(**inputs)).values() if out.requires_grad]
        torch.manual_seed(1)
        errors = [(out.double() - torch.randn(out.shape)).square().mean() for out in outputs]
        loss = torch.stack(errors).sum()
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def output_error(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> float:
    """Largest ``max |a - e| / max |e|`` of any tensor."""
    assert expected.keys() == actual.keys()
    errors = [
        (_distance(e, actual[key]) / (_size(e) or 1.0))
        for key, e in expected.items()
        if e.numel() and e.is_floating_point()
    ]
    return max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)


def _differentiate(
    call: Callable[..., Any], model: nn.Module, inputs: Inputs
) -> tuple[Tensors, Tensors]:
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
    return {name: out.detach() for name, out in outputs.items()}, gradients


def _gradient_error(expected: Tensors, actual: Tensors) -> tuple[float, str]:
    """(largest relative error of a gradient of the plain model, of which parameter)."""
    largest = max((_size(gradient) for gradient in expected.values()), default=0.0)
    worst = (0.0, "")
    for name, gradient in expected.items():
        size = _size(gradient)
        error = _distance(gradient, actual[name]) / (size if size > _ZERO * largest else largest)
        worst = max(worst, (error, name))
    return worst


def _reloads(name: str, model: nn.Module, call: Callable[..., Any], inputs: Inputs) -> bool:
    model.eval()
    expected = evaluate(call, inputs)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh, inputs, _ = convert(name)
    disable_dropout(fresh)
    fresh.load_state_dict(torch.load(buffer))
    actual = evaluate(compiled(fresh), inputs)
    return all(torch.equal(out, actual[key]) for key, out in expected.items())


def _buffers(model: nn.Module) -> Tensors:
    return {name: b.clone() for name, b in model.named_buffers() if ".mhc." not in f".{name}"}


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def _distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((actual.detach().double() - expected.detach().double()).abs().max())
