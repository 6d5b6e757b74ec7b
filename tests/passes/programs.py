"""Random residual networks: a drawn list of steps, and the module that carries it out.

Each step takes the trunk to the next value; the module's outputs are the trunk's end, whatever was
read on the way, and the end of a second trunk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCH, LENGTH, WIDTH = 2, 3, 8


class Branch(nn.Module):
    """Norm, linear, tanh, linear: what a residual goes around."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class ConvBranch(nn.Module):
    """The same in the layout of a convolution: channels second."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Step(nn.Module):
    """One step, with parameters of its own (or those of an earlier step)."""

    def __init__(self, kind: str, shared: "Step | None") -> None:
        super().__init__()
        self.kind = kind
        source = shared or self
        if shared is None:
            self.f, self.g, self.h = Branch(), Branch(), Branch()
            self.conv, self.norm = ConvBranch(), nn.LayerNorm(WIDTH)
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        else:
            for name in ("f", "g", "h", "conv", "norm", "linear"):
                setattr(self, name, getattr(source, name))
            self.gamma = shared.gamma

    def forward(self, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
        return _KINDS[self.kind](self, x, y, read)


Kind = Callable[[Step, Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]]
_KINDS: dict[str, Kind] = {}


def _kind(function: Kind) -> Kind:
    _KINDS[function.__name__.removeprefix("_")] = function
    return function


def _on_trunk(*functions: Callable[[Step, Tensor], Tensor]) -> None:
    for function in functions:
        name = function.__name__.removeprefix("_")
        _KINDS[name] = lambda s, x, y, read, function=function: (function(s, x), y)


def _skip_first(s: Step, x: Tensor) -> Tensor:
    return x + s.f(x)


def _branch_first(s: Step, x: Tensor) -> Tensor:
    return s.f(x) + x


def _in_place(s: Step, x: Tensor) -> Tensor:
    f = s.f(x)
    f += x
    return f


def _in_place_method(s: Step, x: Tensor) -> Tensor:
    return F.relu(s.f(x).add_(x), True)


def _scaled_branch(s: Step, x: Tensor) -> Tensor:
    return torch.add(x, s.f(x), alpha=0.5)


def _two_branches(s: Step, x: Tensor) -> Tensor:
    return x + s.f(x) + s.g(x)


def _branches_first(s: Step, x: Tensor) -> Tensor:
    return s.f(x) + s.g(x) + x


def _three_branches(s: Step, x: Tensor) -> Tensor:
    return (s.f(x) + x) + (s.g(x) + s.h(x))


def _post_norm(s: Step, x: Tensor) -> Tensor:
    return s.norm(x + s.f(x))


def _post_rms_norm(s: Step, x: Tensor) -> Tensor:
    x = x + s.f(x)
    return s.gamma * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _relu(s: Step, x: Tensor) -> Tensor:
    return torch.relu(x + s.f(x))


def _scaled_skip(s: Step, x: Tensor) -> Tensor:
    return 0.5 * x + s.f(x)


def _learned_skip(s: Step, x: Tensor) -> Tensor:
    return s.gamma * x + s.f(x)


def _cast_skip(s: Step, x: Tensor) -> Tensor:
    return (x.double() + s.f(x)).float()


def _divided(s: Step, x: Tensor) -> Tensor:
    return (x + s.f(x)) / 1.5


def _dropped(s: Step, x: Tensor) -> Tensor:
    return F.dropout(x + F.dropout(s.f(x), 0.2, True), 0.2, True)


def _masked(s: Step, x: Tensor) -> Tensor:
    mask = torch.arange(LENGTH)[:, None] > 1
    return (x + s.f(x)).masked_fill(mask, 0.0)


def _gated(s: Step, x: Tensor) -> Tensor:
    x = x + s.f(x)
    return x * torch.sigmoid(x)


def _unbranched(s: Step, x: Tensor) -> Tensor:
    return s.linear(x)


def _checkpointed(s: Step, x: Tensor) -> Tensor:
    def body(x: Tensor) -> Tensor:
        return x + s.f(x)

    return checkpoint(body, x, use_reentrant=False)


def _per_channel(s: Step, x: Tensor) -> Tensor:
    return x + s.f(x).mean((0, 1))


def _per_token(s: Step, x: Tensor) -> Tensor:
    return x + s.f(x).mean(-1, keepdim=True)


def _flat(s: Step, x: Tensor) -> Tensor:
    rows = x.view(-1, WIDTH)
    return (rows + s.f(rows)).view(x.shape)


def _channels_second(s: Step, x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x + s.conv(x)).transpose(1, 2)


def _projected(s: Step, x: Tensor) -> Tensor:
    return s.linear(x) + s.f(x)


def _nested(s: Step, x: Tensor) -> Tensor:
    z = s.linear(x)
    z = z + s.f(z)
    z = z + s.g(z)
    return x + s.linear(z)


def _nested_at_the_origin(s: Step, x: Tensor) -> Tensor:
    return x + s.h(x + s.f(x))


def _around_a_trunk(s: Step, x: Tensor) -> Tensor:
    y = x + s.f(x)
    y = y + s.g(y)
    return x + s.h(y)


def _around_two_trunks(s: Step, x: Tensor) -> Tensor:
    y = x + s.f(x)
    y = x + s.linear(y + s.g(y))
    return x + s.h(y)


def _fork(s: Step, x: Tensor) -> Tensor:
    return (x + s.f(x)) * torch.sigmoid(x + s.g(x))


def _skip_is_a_trunk(s: Step, x: Tensor) -> Tensor:
    half = 0.5 * x
    return (half + s.f(x)) * torch.sigmoid(half + s.g(half))


def _half_of_the_channels(s: Step, x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    wide = torch.cat([a, a], -1)
    return torch.cat([(wide + s.f(wide))[..., : WIDTH // 2], b], -1)


_on_trunk(
    _skip_first, _branch_first, _in_place, _in_place_method, _scaled_branch, _two_branches,
    _branches_first, _three_branches, _post_norm, _post_rms_norm, _relu, _scaled_skip,
    _learned_skip, _cast_skip, _divided, _dropped, _masked, _gated, _unbranched, _checkpointed,
    _per_channel, _per_token, _flat, _channels_second, _projected, _nested, _nested_at_the_origin,
    _around_a_trunk, _around_two_trunks, _fork, _skip_is_a_trunk, _half_of_the_channels,
)  # fmt: skip


@_kind
def _reader(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    read.append(x)
    return x + s.f(x), y


@_kind
def _head(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = x + s.f(x)
    read.append(s.linear(x).sum(-1))
    return x, y


@_kind
def _old_view(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    view = x.view(-1)
    x = x + s.f(x)
    read.append(view[:3] * 2)
    return x, y


@_kind
def _observed_write(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    f = s.f(x)
    view = f.view(-1)
    f += x
    read.append(view[:3] * 2)
    return f, y


@_kind
def _long_skip(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    start = x
    x = x + s.f(x)
    x = s.linear(x)
    x = x + s.g(x)
    return start + s.linear(x), y


@_kind
def _second_trunk(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x + s.f(x), y + s.g(y)


@_kind
def _crossed(s: Step, x: Tensor, y: Tensor, read: list[Tensor]) -> tuple[Tensor, Tensor]:
    y = y + s.g(y)
    return x + s.f(x) * torch.sigmoid(y), y


class Net(nn.Module):
    """A program: (kind, index of the step whose parameters it shares or None)."""

    def __init__(self, program: list[tuple[str, int | None]], latent: bool = False) -> None:
        super().__init__()
        steps: list[Step] = []
        for kind, share in program:
            earlier = steps[share % len(steps)] if share is not None and steps else None
            steps.append(Step(kind, earlier))
        self.steps = nn.ModuleList(steps)
        self.latent = nn.Parameter(torch.randn(BATCH, LENGTH, WIDTH)) if latent else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.sin(x)
        if self.latent is not None:
            x = self.latent
        read: list[Tensor] = []
        for step in self.steps:
            x, y = step(x, y, read)
        return (x, y, *read)


KINDS = tuple(_KINDS)


def programs(longest: int) -> st.SearchStrategy[list[tuple[str, int | None]]]:
    """Programs of up to so many steps."""
    step = st.tuples(st.sampled_from(KINDS), st.none() | st.integers(0, 3))
    return st.lists(step, min_size=1, max_size=longest)


def example(program: list[tuple[str, int | None]], latent: bool = False) -> tuple[Net, Any]:
    """The network of a program and an input for it, the same every time."""
    torch.manual_seed(0)
    return Net(program, latent), torch.randn(BATCH, LENGTH, WIDTH)
