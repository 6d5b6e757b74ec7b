from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from mhc_compile.config import MHCConfig
from mhc_compile.errors import ConfigError
from mhc_compile.kernels.constraints import CONSTRAINTS
from mhc_compile.kernels.spec import SiteSpec


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("streams", 0, ">= 1 and <= 16"),
        ("streams", 17, ">= 1 and <= 16"),
        ("streams", 4.0, "integer"),
        ("streams", "4", "integer"),
        ("constraint", "birkhoff", "sinkhorn, sinkhorn_softmax, sinkhorn_exp, identity, none"),
        ("sinkhorn_iters", 0, ">= 1"),
        ("sinkhorn_eps", -1.0, ">= 0"),
        ("pre_eps", float("nan"), "finite"),
        ("norm_eps", "small", "number"),
        ("dynamic", "yes", "True or False"),
        ("collapse", "max", "mean, sum, learned"),
        ("init", "zeros", "preserve, paper"),
        ("kernels", "cuda", "auto, triton, cpp, reference"),
        ("overlap", "on", "auto, off"),
        ("inner", "tvm", "inductor, aot_eager, eager"),
        ("on_eager", "explode", "raise, warn, ignore"),
        ("include", "layers.*", "tuple of shell patterns"),
        ("exclude", (1,), "tuple of shell patterns"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed) as refusal:
        MHCConfig(**{field: value})
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize(
    ("constraint", "streams", "reason"),
    [("permutations", 6, "1 to 5 streams"), ("kronecker", 3, "1, 2, 4, 8 or 16 streams")],
)
def test_streams_a_constraint_cannot_mix_are_refused(
    constraint: str, streams: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        MHCConfig(constraint=constraint, streams=streams)


def test_a_sum_cannot_preserve_the_outputs() -> None:
    with pytest.raises(ConfigError, match="collapse='mean', or init='paper'"):
        MHCConfig(collapse="sum")
    assert MHCConfig(collapse="sum", init="paper").collapse == "sum"


@pytest.mark.parametrize("constraint", list(CONSTRAINTS))
def test_every_constraint_makes_a_specification(constraint: str) -> None:
    config = MHCConfig(constraint=constraint)
    eps = CONSTRAINTS[constraint].default_eps
    assert eps == {"sinkhorn_softmax": 1e-6, "sinkhorn_exp": 1e-8}.get(constraint, 0.0)
    expected = SiteSpec(
        streams=4, constraint=constraint, sinkhorn_eps=eps, pre_eps=eps, norm_eps=1e-6, dim=-3
    )
    assert config.spec(dim=-3) == expected


def test_given_epsilons_replace_the_constraints_own_even_when_zero() -> None:
    config = MHCConfig(constraint="sinkhorn_softmax", sinkhorn_eps=0.0, pre_eps=1e-4)
    assert (config.spec().sinkhorn_eps, config.spec().pre_eps) == (0.0, 1e-4)


def test_a_configuration_is_frozen_and_keyword_only() -> None:
    positional: Any = MHCConfig
    with pytest.raises(TypeError):
        positional(4)
    config: Any = MHCConfig()
    with pytest.raises(FrozenInstanceError):
        config.streams = 2
    assert config == MHCConfig(streams=4)


def test_options_are_the_fields_and_unknown_ones_are_named() -> None:
    assert MHCConfig.from_options(None) == MHCConfig()
    assert MHCConfig.from_options({"streams": 2, "exclude": ["head*"]}) == MHCConfig(
        streams=2, exclude=("head*",)
    )
    with pytest.raises(ConfigError, match="unknown option stream: the mhc backend knows streams, "):
        MHCConfig.from_options({"stream": 2})
