"""Gains and spreads of rewritten graphs, against matrices worked out by hand."""

import json

import pytest
import torch
from torch.testing import assert_close

from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.stability import measure
from tests.mhc_graphs import WIDTH, rewritten_network

STATIC_HC = SiteSpec(streams=2, constraint="none", dynamic=False)


def _input() -> torch.Tensor:
    return torch.randn(2, 3, WIDTH)


def _set_h_res(module: torch.nn.Module, site: str, matrix: list[list[float]]) -> None:
    """Of a static unconstrained site, whose bias holds H_res as it is."""
    with torch.no_grad():
        bias = module.get_parameter(f"{site}.mhc.add0.bias")
        bias[-4:] = torch.tensor(matrix).flatten()


def test_at_the_start_streams_are_equal_and_signals_keep_their_size() -> None:
    report = measure(rewritten_network(SiteSpec(streams=4)), _input())
    assert [site.name for site in report.sites] == ["t0_s0.add0", "t0_s1.add0"]
    for site in report.sites:
        assert site.spread < 1e-6
        assert site.mixing.forward_gain == pytest.approx(1, abs=1e-6)
        assert site.mixing.row_error < 1e-6
        assert site.mixing.smallest > 0
    (trunk,) = report.trunks
    assert trunk.sites == 2
    assert trunk.spread < 1e-6
    assert trunk.composite.forward_gain == pytest.approx(1, abs=1e-6)
    assert trunk.composite.diagonal < report.sites[0].mixing.diagonal


def test_composite_applies_the_first_site_first() -> None:
    module = rewritten_network(STATIC_HC)
    first, second = [[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [-3.0, 1.0]]
    _set_h_res(module, "t0_s0", first)
    _set_h_res(module, "t0_s1", second)
    composite = measure(module, _input()).trunks[0].composite
    # second @ first = [[1, 2], [-3, -5]]; the other order has row sums -5 + 2 and -3 + 1.
    assert composite.forward_gain == pytest.approx(8)
    assert composite.backward_gain == pytest.approx(3)
    assert composite.forward_gain_abs == pytest.approx(8)
    assert composite.backward_gain_abs == pytest.approx(7)
    assert composite.smallest == pytest.approx(-5)
    assert composite.diagonal == pytest.approx(-2)


def test_rows_are_outputs_and_columns_are_inputs() -> None:
    module = rewritten_network(STATIC_HC, trunks=(1,))
    _set_h_res(module, "t0_s0", [[1.0, 0.5], [0.0, 1.0]])
    mixing = measure(module, _input()).sites[0].mixing
    assert mixing.row_error == pytest.approx(0.5)
    assert mixing.forward_gain == pytest.approx(1.5)
    assert mixing.column_error == pytest.approx(0.5)
    _set_h_res(module, "t0_s0", [[1.0, 0.5], [0.5, 0.5]])
    mixing = measure(module, _input()).sites[0].mixing
    assert (mixing.forward_gain, mixing.backward_gain) == (1.5, 1.5)
    _set_h_res(module, "t0_s0", [[0.25, 0.75], [0.25, 0.75]])
    mixing = measure(module, _input()).sites[0].mixing
    assert (mixing.forward_gain, mixing.backward_gain) == (1.0, 1.5)
    assert (mixing.row_error, mixing.column_error) == (0.0, 0.5)


def test_signed_maps_cancel_in_the_gain_and_not_in_its_absolute_form() -> None:
    module = rewritten_network(STATIC_HC, trunks=(1,))
    _set_h_res(module, "t0_s0", [[5.0, -5.0], [0.0, 1.0]])
    mixing = measure(module, _input()).sites[0].mixing
    assert mixing.forward_gain == pytest.approx(1)
    assert mixing.forward_gain_abs == pytest.approx(10)


def test_composite_is_the_mean_over_tokens_of_the_products() -> None:
    module = rewritten_network(SiteSpec(streams=3))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".mhc." in name:
                parameter.add_(torch.randn_like(parameter))
    x = _input()
    maps = _h_res_of(module, x)
    expected = (maps[1] @ maps[0]).double().mean(0)
    composite = measure(module, x).trunks[0].composite
    assert composite.backward_gain == pytest.approx(float(expected.sum(0).max()), rel=1e-5)
    assert composite.diagonal == pytest.approx(float(expected.diagonal().mean()), rel=1e-5)


def _h_res_of(module: torch.fx.GraphModule, x: torch.Tensor) -> list[torch.Tensor]:
    found = []

    class Spy(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            result = super().call_function(target, args, kwargs)
            if target is torch.ops.mhc.pre.default:
                found.append(result[2].detach().flatten(0, -3))
            return result

    Spy(module).run(x)
    return found


def test_each_trunk_has_its_own_composite() -> None:
    module = rewritten_network(STATIC_HC, trunks=(1, 3))
    _set_h_res(module, "t0_s0", [[3.0, 0.0], [0.0, 1.0]])
    report = measure(module, _input())
    assert [site.trunk for site in report.sites] == [0, 1, 1, 1]
    assert [trunk.sites for trunk in report.trunks] == [1, 3]
    assert report.trunks[0].composite.forward_gain == pytest.approx(3)
    assert report.trunks[1].composite.forward_gain == pytest.approx(1)


def test_spread_is_the_part_of_the_state_that_is_not_common() -> None:
    module = rewritten_network(STATIC_HC)
    _set_h_res(module, "t0_s0", [[2.0, 0.0], [0.0, 0.0]])
    with torch.no_grad():  # streams become 2x and 0: their mean is x, the rest has the same size
        module.get_parameter("t0_s0.mhc.add0.bias")[2:4] = 0.0
    first, second = measure(module, _input()).sites
    assert first.spread == 0
    assert second.spread == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(("dim", "shape"), [(-3, (2, WIDTH, 3, 4)), (-2, (2, WIDTH, 5))])
def test_channels_may_stand_on_another_axis(dim: int, shape: tuple[int, ...]) -> None:
    spec = SiteSpec(streams=4, dim=dim)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    state = graph.call_function(torch.ops.mhc.expand.default, (x, 4, dim))
    bias = graph.get_attr("bias")
    static = SiteSpec(streams=4, dim=dim, dynamic=False).encode()
    graph.call_function(torch.ops.mhc.pre.default, (state, None, bias, None, static))
    mode = {"mode": "mean", "spec": spec.encode()}
    graph.output(
        graph.call_function(torch.ops.mhc.collapse.default, (state, None, None, None), mode)
    )
    root = torch.nn.Module()
    root.bias = torch.nn.Parameter(torch.zeros(24))
    report = measure(torch.fx.GraphModule(root, graph), torch.randn(shape))
    assert report.sites[0].spread < 1e-6
    assert report.sites[0].mixing.uniform_distance < 1e-6


def test_measuring_changes_no_parameter_and_leaves_no_gradient() -> None:
    module = rewritten_network(SiteSpec(streams=2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    measure(module, _input())
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_report_is_json_with_sites_and_trunks() -> None:
    report = measure(rewritten_network(SiteSpec(streams=2)), _input())
    content = json.loads(report.to_json())
    assert content["sites"][0]["mixing"].keys() >= {"forward_gain", "row_error", "smallest"}
    assert content["trunks"][0]["sites"] == 2
