"""One hyper-connected site, and the ways people write it: all small modules from state to state."""

import torch
import torch.nn.functional as F
from torch import nn

N, C = 4, 6
EPS, NORM_EPS = 1e-3, 1e-2  # different, and large enough for a mix-up to show
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Site(nn.Module):
    """Coefficients as in the paper; subclasses spell parts of it in their own way."""

    iters = 2

    def __init__(self, n: int = N, channels: int = C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n, self.c = n, channels
        self.fn = nn.Parameter(torch.randn(n * (n + 2), n * channels) * 0.3)
        self.base = nn.Parameter(torch.randn(n * (n + 2)))
        self.scale = nn.Parameter(torch.randn(3))
        self.branch = nn.Linear(channels, channels)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(-2)
        return F.linear(flat, self.fn) * torch.rsqrt(
            flat.square().mean(-1, keepdim=True) + NORM_EPS
        )

    def logits(self, x: torch.Tensor) -> Tensors:
        parts = self.hidden(x).split([self.n, self.n, self.n**2], -1)
        biases = self.base.split([self.n, self.n, self.n**2])
        pre, post, res = (h * s + b for h, s, b in zip(parts, self.scale, biases, strict=True))
        return pre, post, res.unflatten(-1, (self.n, self.n))

    def gates(self, pre: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pre.sigmoid(), 2 * post.sigmoid()

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        """[out, in]."""
        m = h.exp()
        for _ in range(self.iters):
            m = m / m.sum(-2, keepdim=True)
            m = m / m.sum(-1, keepdim=True)
        return m

    def read(self, h_pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (h_pre.unsqueeze(-1) * x).sum(-2)

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        return h_res @ x + h_post.unsqueeze(-1) * f.unsqueeze(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre, post, res = self.logits(x)
        h_pre, h_post = self.gates(pre, post)
        h_res = self.mixing(res)
        f = torch.tanh(self.branch(self.read(h_pre, x)))
        return self.write(x, f, h_post, h_res)


class DeepSeek(Site):
    """Softmax start, eps in every place, stored [in, out]."""

    def gates(self, pre: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pre.sigmoid() + EPS, 2 * post.sigmoid()

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.softmax(-1) + EPS
        m = m / (m.sum(-2, keepdim=True) + EPS)
        for _ in range(self.iters - 1):
            m = m / (m.sum(-1, keepdim=True) + EPS)
            m = m / (m.sum(-2, keepdim=True) + EPS)
        return m.transpose(-1, -2)


class LogDomain(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        for _ in range(self.iters):
            h = h - torch.logsumexp(h, dim=-2, keepdim=True)
            h = h - torch.logsumexp(h, dim=-1, keepdim=True)
        return h.exp()


class LogSoftmax(Site):
    """Stored [in, out], multiplied from the other side."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        for _ in range(self.iters):
            h = F.log_softmax(h, dim=-1)
            h = F.log_softmax(h, dim=-2)
        return h.exp()

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        return torch.einsum("...io,...ic->...oc", h_res, x) + torch.einsum(
            "...o,...c->...oc", h_post, f
        )


class Normalize(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = (h - h.amax(-2, keepdim=True).detach()).exp()
        for _ in range(self.iters):
            m = F.normalize(F.normalize(m, p=1, dim=-2), p=1, dim=-1)
        return m


class SeparateProjections(Site):
    """Three layers with biases of their own, a norm before them, reciprocals for divisions."""

    def __init__(self, n: int = N, channels: int = C) -> None:
        super().__init__(n, channels)
        self.layers = nn.ModuleList(nn.Linear(n * channels, k) for k in (n, n, n * n))
        self.norm = nn.RMSNorm(n * channels, eps=NORM_EPS)
        nn.init.normal_(self.norm.weight)

    def logits(self, x: torch.Tensor) -> Tensors:
        normed = self.norm(x.reshape(*x.shape[:-2], -1))
        pre, post, res = (layer(normed) for layer in self.layers)
        return pre, post, res.reshape(*x.shape[:-2], self.n, self.n)

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = torch.softmax(h, dim=-2)
        m = m * (1 / m.sum(-1, keepdim=True))
        for _ in range(self.iters - 1):
            m = m * m.sum(-2, keepdim=True).reciprocal()
            m = m * m.sum(-1, keepdim=True).pow(-1)
        return m


class Einsum(Site):
    def __init__(self, n: int = N, channels: int = C) -> None:
        super().__init__(n, channels)
        self.w = nn.Parameter(torch.randn(n, channels, n * (n + 2)) * 0.3)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        square = torch.einsum("...nc,...nc->...", x, x) / (self.n * self.c)
        z = torch.einsum("btnc,nck->btk", x, self.w)
        return z / torch.sqrt(square + NORM_EPS).unsqueeze(-1)

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            m = m / torch.einsum("...oi->...i", m)[..., None, :]
            m = m / torch.einsum("...oi->...o", m)[..., None]
        return m

    def read(self, h_pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bti,btic->btc", h_pre, x)

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        return torch.einsum("btoi,btic->btoc", h_res, x) + torch.einsum("bto,btc->btoc", h_post, f)


class RowsFirst(Site):
    """The other order: columns are exact."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = torch.exp(h)
        for _ in range(self.iters):
            m = m / m.sum(dim=-1, keepdim=True)
            m = m / m.sum(dim=-2, keepdim=True)
        return m


class Loops(Site):
    """Streams one by one, as nobody would write it for speed."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            columns = m[..., 0, :]
            for o in range(1, self.n):
                columns = columns + m[..., o, :]
            m = m / columns[..., None, :]
            rows = m[..., 0]
            for i in range(1, self.n):
                rows = rows + m[..., i]
            m = m / rows[..., None]
        return m

    def read(self, h_pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        u = h_pre[..., 0:1] * x[..., 0, :]
        for i in range(1, self.n):
            u = u + h_pre[..., i : i + 1] * x[..., i, :]
        return u

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        rows = []
        for o in range(self.n):
            row = h_post[..., o, None] * f
            for i in range(self.n):
                row = row + h_res[..., o, i, None] * x[..., i, :]
            rows.append(row)
        return torch.stack(rows, dim=-2)


class Broadcast(Site):
    """Products that are broadcast and summed, a projection by ``@``, chunks and cat."""

    def __init__(self, n: int = N, channels: int = C) -> None:
        super().__init__(n, channels)
        self.w = nn.Parameter(torch.randn(n * channels, n * (n + 2)) * 0.3)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(x.shape[0], x.shape[1], -1)
        normed = flat / (flat.pow(2).mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()
        return normed @ self.w

    def gates(self, pre: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.sigmoid(torch.cat((pre, post), -1))
        first, second = both.chunk(2, dim=-1)
        return first, second * 2.0

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        mixed = (h_res.unsqueeze(-1) * x.unsqueeze(-3)).sum(dim=-2)
        return torch.add(mixed, f[..., None, :] * h_post[..., None])


class ExpEps(Site):
    """eps in the first division too."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            m = m / (m.sum(-2, keepdim=True) + EPS)
            m = m / (m.sum(-1, keepdim=True) + EPS)
        return m


class EpsInEntries(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            for axis in (-2, -1):
                m = m + EPS
                m = m / m.sum(axis, keepdim=True)
        return m


class EpsInBoth(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            m = (m + EPS) / (m.sum(-2, keepdim=True) + EPS)
            m = (m + EPS) / (m.sum(-1, keepdim=True) + EPS)
        return m


class Floor(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for _ in range(self.iters):
            m = m / m.sum(-2, keepdim=True).clamp(min=EPS)
            m = m / m.sum(-1, keepdim=True).clamp_min(EPS)
        return m


class HalfIteration(Site):
    """A softmax, and then whole iterations: an odd number of steps."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.softmax(-1)
        for _ in range(self.iters):
            m = m / (m.sum(-2, keepdim=True) + EPS)
            m = m / (m.sum(-1, keepdim=True) + EPS)
        return m


class Identity(Site):
    """No mixing, gates of another size with an eps, a temperature."""

    def logits(self, x: torch.Tensor) -> Tensors:
        pre, post = (self.hidden(x)[..., : 2 * self.n] * self.scale[0]).chunk(2, -1)
        return (pre + self.base[: self.n]) / 0.7, post + self.base[self.n : 2 * self.n], x

    def gates(self, pre: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pre.sigmoid() + EPS, 1.5 * post.sigmoid() + EPS

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        return h_post.unsqueeze(-1) * f.unsqueeze(-2) + x


class FlatTokens(Site):
    """All tokens on one axis inside the site."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.view(-1, self.n, self.c)).view(x.shape)


SPELLINGS: dict[type[Site], str] = {
    Site: "sinkhorn",
    DeepSeek: "sinkhorn_softmax",
    LogDomain: "sinkhorn",
    LogSoftmax: "sinkhorn",
    Normalize: "sinkhorn",
    SeparateProjections: "sinkhorn",
    Einsum: "sinkhorn",
    RowsFirst: "sinkhorn",
    Loops: "sinkhorn",
    Broadcast: "sinkhorn",
    ExpEps: "sinkhorn_exp",
    EpsInEntries: "sinkhorn_exp",
    EpsInBoth: "sinkhorn_exp",
    Floor: "sinkhorn_exp",
    HalfIteration: "sinkhorn",
    Identity: "identity",
    FlatTokens: "sinkhorn",
}
"""Each way of writing, and the constraint it amounts to."""


class LacksAColumnStep(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        for k in range(3):
            if k != 1:
                m = m / m.sum(-2, keepdim=True)
            m = m / m.sum(-1, keepdim=True)
        return m


class MatrixUsedTwice(Site):
    def write(
        self, x: torch.Tensor, f: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor
    ) -> torch.Tensor:
        return super().write(x, f, h_post, h_res) + 0.1 * h_res.mean((-1, -2), keepdim=True)


class IterateUsedTwice(Site):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre, post, res = self.logits(x)
        h_pre, h_post = self.gates(pre, post)
        first = res.softmax(-2)
        first = first / first.sum(-1, keepdim=True)
        m = first / first.sum(-2, keepdim=True)
        f = torch.tanh(self.branch(self.read(h_pre, x)))
        out = self.write(x, f, h_post, m / m.sum(-1, keepdim=True))
        return out + first.mean((-1, -2), keepdim=True)


class WrongAxis(Site):
    """A sum over the tokens."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        m = m / m.sum(1, keepdim=True)
        return m / m.sum(-1, keepdim=True)


class OddEps(Site):
    """eps in the first step alone."""

    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        m = h.exp()
        m = m / (m.sum(-2, keepdim=True) + EPS)
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
        return m / m.sum(-1, keepdim=True)


class GateOfAnotherStream(Site):
    """Half of the gates are sigmoids, half are not."""

    def gates(self, pre: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.n // 2
        return torch.cat((pre[..., :half].sigmoid(), pre[..., half:].tanh()), -1), post.sigmoid()


class EpsOutsideTheRoot(Site):
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(-2)
        return F.linear(flat, self.fn) / (flat.square().mean(-1, keepdim=True).sqrt() + NORM_EPS)


class NotNormed(Site):
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(-2), self.fn)


class MatrixWithoutGradient(Site):
    def mixing(self, h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().mixing(h)


class Distilled(nn.Module):
    """A student that is held against itself without gradients."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.student(x)
        out = self.student(x)
        assert isinstance(out, torch.Tensor)
        return out * (out - target + 1.0)
