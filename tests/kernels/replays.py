"""Chains of sites, and what ``mhc::replay`` is given to make their states again."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from mhc_compile.kernels.spec import SiteSpec
from tests.kernels.cpp_runs import random_site

OPS = torch.ops.mhc


@dataclass(frozen=True)
class Chain:
    """Some sites behind one another."""

    spec: SiteSpec
    given: tuple[Any, ...]
    """Arguments of ``mhc::replay`` but the specification."""
    made: list[torch.Tensor]
    """What ``mhc::pre`` and ``mhc::seam`` made on the way."""

    def replayed(self, kernels: str) -> list[torch.Tensor]:
        """The same from what was kept."""
        found: list[torch.Tensor] = OPS.replay(
            *self.given, replace(self.spec, kernels=kernels).encode()
        )
        return found

    def without_the_first_read(self) -> "Chain":
        """The same chain, of which nobody reads the state before it."""
        *state, saved, bias, alpha = self.given
        return Chain(self.spec, (*state, saved[1:], bias[1:], alpha[1:]), self.made[1:])


def make_chain(
    constraint: str,
    n: int,
    shape: tuple[int, ...],
    sites: int,
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
    **fields: Any,
) -> Chain:
    """Random sites: the first is entered, ``sites`` are left."""
    spec, _ = random_site(constraint, n, shape, **fields)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    text = replace(spec, kernels=kernels).encode()
    states, branches, parameters = [], [], []
    for number in range(sites + 1):
        X, f, *own = random_site(constraint, n, shape, seed=number, **fields)[1][:5]
        states.append(X.to(dtype))
        branches.append(f.to(dtype))
        parameters.append(tuple(t.to(wide) for t in own))
    X = states[0]
    u, h_post, h_res, saved = OPS.pre(X, *parameters[0], text)
    made, posts, reads, state = [u], [], [saved], X
    for f, own in zip(branches[1:], parameters[1:], strict=True):
        posts.append((h_post, h_res))
        state, u, h_post, h_res, saved = OPS.seam(state, f, h_post, h_res, *own, text)
        made += [state, u]
        reads.append(saved)
    given = (
        *(X, branches[1:], [p for p, _ in posts], [r for _, r in posts]),
        *(reads, [own[1] for own in parameters], [own[2] for own in parameters]),
    )
    return Chain(spec, given, made)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))
