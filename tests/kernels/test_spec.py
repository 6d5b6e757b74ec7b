from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.errors import KernelError
from mhc_compile.kernels.constraints import CONSTRAINTS, constraint_named, constraint_of
from mhc_compile.kernels.spec import SiteSpec

EPSILON = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


@settings(deadline=None, derandomize=True)
@given(
    st.builds(
        SiteSpec,
        streams=st.integers(1, 16),
        constraint=st.sampled_from(list(CONSTRAINTS)),
        iters=st.integers(1, 1000),
        sinkhorn_eps=EPSILON,
        pre_eps=EPSILON,
        norm_eps=EPSILON,
        dynamic=st.booleans(),
        dim=st.integers(-6, -1),
    )
)
def test_every_specification_survives_its_text_exactly(spec: SiteSpec) -> None:
    assert SiteSpec.decode(spec.encode()) == spec


def test_text_is_short_and_leaves_out_defaults() -> None:
    assert SiteSpec(streams=4).encode() == "n=4 constraint=sinkhorn"
    spec = SiteSpec(streams=2, constraint="none", norm_eps=1e-5, dynamic=False, dim=-3)
    assert spec.encode() == "n=2 constraint=none norm_eps=1e-05 dynamic=False dim=-3"


def test_integer_epsilons_become_floats_so_that_texts_are_canonical() -> None:
    zero: Any = 0
    assert SiteSpec(streams=4, norm_eps=zero).encode() == SiteSpec(streams=4, norm_eps=0.0).encode()


def test_decoding_one_text_twice_gives_one_object() -> None:
    assert SiteSpec.decode("n=4 constraint=sinkhorn") is SiteSpec.decode("n=4 constraint=sinkhorn")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("streams", 0, ">= 1 and <= 16"),
        ("streams", 17, ">= 1 and <= 16"),
        ("streams", True, "integer"),
        ("streams", 2.0, "integer"),
        ("iters", 0, ">= 1"),
        ("dim", 0, "<= -1"),
        ("dim", 1, "<= -1"),
        ("norm_eps", -1e-6, ">= 0"),
        ("sinkhorn_eps", float("nan"), "finite"),
        ("pre_eps", float("inf"), "finite"),
        ("pre_eps", "1e-6", "number"),
        ("dynamic", 1, "True or False"),
        ("constraint", "two words", "name"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    values: dict[str, Any] = {"streams": 4, field: value}
    with pytest.raises(KernelError, match=f"(?s){field}=.*{allowed}"):
        SiteSpec(**values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "constraint=sinkhorn",
        "n=four",
        "n=4 n=4",
        "n=4 colour=red",
        "n=4 dynamic=yes",
        "n=4 iters",
    ],
)
def test_texts_that_are_no_specification_are_refused(text: str) -> None:
    with pytest.raises(KernelError, match="specification"):
        SiteSpec.decode(text)


def test_unknown_constraint_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KernelError, match="'birkhoff' is not allowed: use one of sinkhorn, "):
        constraint_named("birkhoff")


@pytest.mark.parametrize(
    ("name", "streams", "reason"),
    [("permutations", 6, "720 permutations"), ("kronecker", 6, "1, 2, 4, 8 or 16 streams")],
)
def test_constraints_refuse_streams_they_cannot_mix(name: str, streams: int, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        constraint_of(SiteSpec(streams=streams, constraint=name))


def test_the_choice_of_kernels_travels_with_the_specification() -> None:
    spec = SiteSpec(streams=2, kernels="reference")
    assert spec.encode() == "n=2 constraint=sinkhorn kernels=reference"
    assert SiteSpec.decode(spec.encode()) == spec
    with pytest.raises(KernelError, match="auto, triton, cpp, reference"):
        SiteSpec.decode("n=2 kernels=cuda")
