"""A small transformer, its batches, and its training on one process: what the ranks are held to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from tests.nets import converted

WIDTH, HEADS, TOKENS, VOCABULARY, STEPS = 16, 4, 8, 32, 5
RATE = 0.2


class Attention(nn.Module):
    """Causal self-attention, its heads counted by its weights: a rank may hold some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two products with GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """One pre-norm layer: two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens and targets [size, TOKENS], the same on every rank."""
    window = torch.randint(
        VOCABULARY, (size, TOKENS + 1), generator=torch.Generator().manual_seed(step)
    )
    return window[:, :-1], window[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def fresh(layers: int = 2, **config: object) -> nn.Module:
    """The model every rank starts from, converted, its streams made to differ."""
    torch.manual_seed(1)
    return converted(Transformer(layers), batch(0)[0], **config)


@dataclass(slots=True)
class Trace:
    """What a training shows: the loss and every gradient of each step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, loss: float | None, named: Iterable[tuple[str, Tensor]]) -> None:
        """Note one step."""
        if loss is not None:
            self.losses.append(loss)
        self.gradients.append({name.replace("_orig_mod.", ""): g.clone() for name, g in named})

    def distance(self, expected: "Trace") -> dict[str, float]:
        """Largest difference of losses, and of gradients relative to the step's largest one.

        ``covered`` is the share of all parameters that this trace has gradients of; a rank that
        does not compute the loss has noted none.
        """
        worst = {"loss": 0.0, "gradient": 0.0}
        if self.losses:
            pairs = zip(self.losses, expected.losses, strict=True)
            worst["loss"] = max(abs(mine - other) for mine, other in pairs)
        for ours, theirs in zip(self.gradients, expected.gradients, strict=True):
            scale = max(float(g.abs().max()) for g in theirs.values())
            for name, gradient in ours.items():
                off = float((gradient - theirs[name]).abs().max()) / scale
                worst["gradient"] = max(worst["gradient"], off)
        return worst | {"covered": len(self.gradients[0]) / len(expected.gradients[0])}


def named_gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The gradient of every parameter; all must have one."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    return [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]


def train_alone(
    model: nn.Module, forward: Callable[[Tensor], Tensor], steps: int = STEPS, size: int = 4
) -> Trace:
    """Train on whole batches, on one process."""
    trace, optimizer = Trace(), torch.optim.SGD(model.parameters(), RATE)
    for step in range(steps):
        tokens, targets = batch(step, size)
        optimizer.zero_grad()
        loss = loss_of(forward(tokens), targets)
        loss.backward()
        trace.add(float(loss.detach()), named_gradients(model))
        optimizer.step()
    return trace
