"""The step of "sinkhorn_exp" in numbers: what generated code adds where, for each place of eps."""

from dataclasses import dataclass

from mhc_compile.kernels.spec import SiteSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """``y = (x + added) / max(sum(x) + plus, floor)`` along each line of the matrix."""

    added: float
    """To every entry."""
    plus: float
    """To the sum of the entries before that."""
    floor: float
    """Where the sum is less than this, the divisor does not follow it; 0 is no floor."""


def step_of(spec: SiteSpec) -> Step:
    """The step of a site, the same for columns and rows."""
    eps, place = spec.sinkhorn_eps, spec.eps_at
    return Step(
        added=eps if place in ("entries", "both") else 0.0,
        plus={"entries": spec.streams * eps, "floor": 0.0}.get(place, eps),
        floor=eps if place == "floor" else 0.0,
    )
