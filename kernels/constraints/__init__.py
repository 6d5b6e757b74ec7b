"""The constraints of H_res, by name."""

from functools import lru_cache

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints.base import Constraint
from mhc_compile.kernels.constraints.identity import Identity
from mhc_compile.kernels.constraints.kronecker import Kronecker
from mhc_compile.kernels.constraints.none import Unconstrained
from mhc_compile.kernels.constraints.orthogonal import Orthogonal
from mhc_compile.kernels.constraints.permutations import Permutations
from mhc_compile.kernels.constraints.sinkhorn import Sinkhorn
from mhc_compile.kernels.constraints.sinkhorn_exp import SinkhornExp
from mhc_compile.kernels.constraints.sinkhorn_softmax import SinkhornSoftmax
from mhc_compile.kernels.spec import SiteSpec

CONSTRAINTS: dict[str, Constraint] = {
    constraint.name: constraint
    for constraint in (
        Sinkhorn(),
        SinkhornSoftmax(),
        SinkhornExp(),
        Identity(),
        Unconstrained(),
        Permutations(),
        Kronecker(),
        Orthogonal(),
    )
}
"""Every constraint there is."""


def constraint_named(name: str) -> Constraint:
    """Look a constraint up.

    Raises:
        KernelError: there is none of that name; the message lists those there are.
    """
    if name not in CONSTRAINTS:
        raise KernelError(
            f"constraint={name!r} is not allowed: use one of {', '.join(CONSTRAINTS)}"
        )
    return CONSTRAINTS[name]


@lru_cache(maxsize=1024)
def constraint_of(spec: SiteSpec) -> Constraint:
    """The constraint of a site, checked against its number of streams.

    Raises:
        KernelError: there is none of that name, or not for that many streams, or not in one pass.
    """
    constraint = constraint_named(spec.constraint)
    constraint.check(spec.streams)
    if spec.single_pass and constraint.gate != "sigmoid":
        raise KernelError(
            f"single_pass=True is not defined for constraint={spec.constraint!r}, whose mappings "
            "have no sigmoid: use another constraint, or single_pass=False"
        )
    return constraint
