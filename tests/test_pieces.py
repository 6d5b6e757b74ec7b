"""Calls of converted modules that a graph break cuts: every site is rewritten, or it is said."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import UnsupportedGraphError
from mhc_compile.pieces import _calls
from tests.nets import WIDTH, Net, assert_same, compiled, converted, example, perturb_, run


class Cut(nn.Module):
    """Two sites; a graph break between them, or inside the branch of the second, or of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between, self.inside, self.hidden = False, False, False
        self.fails, self.scale = False, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.linear(self.norm(x)))
        if self.between:
            self.pause()
        h = torch.relu(self.linear(self.norm(x)))
        if self.inside:
            torch._dynamo.graph_break()
        return self.in_python(x, h) if self.hidden else x + self.scale * h

    @torch.compiler.disable
    def pause(self) -> None:
        if self.fails:
            raise ValueError("interrupted")

    @torch.compiler.disable
    def in_python(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return x + h


def net(**flags: bool) -> Net:
    """Three such blocks with these breaks."""
    torch.manual_seed(0)
    return set_(Net([Cut(), Cut(), Cut()]), **flags)


def set_(model: Net, **flags: bool) -> Net:
    """Change the breaks of a model, which then compiles anew."""
    for block in model.blocks:
        vars(block).update(flags)
    torch.compiler.reset()
    return model


@pytest.fixture(autouse=True)
def _balanced() -> Iterator[None]:
    _calls.open.clear()
    yield
    assert not _calls.open


@pytest.mark.parametrize(
    "flags", [{"between": True}, {"inside": True}, {"between": True, "inside": True}]
)
def test_a_block_in_pieces_keeps_outputs_and_gradients(flags: dict[str, bool]) -> None:
    model, x = net(**flags), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    assert [site.name for site in report.converted] == [
        f"blocks.{block}.add{add}" for block in range(3) for add in range(2)
    ]
    assert [len(trunk.sites) for trunk in report.trunks] == [6]
    assert_same(run(compiled(model), model, x), expected, output=2e-6, grad=1e-5)


def test_a_break_between_sites_that_appears_after_conversion_changes_nothing() -> None:
    x = example()
    model = converted(net(), x)
    expected = run(compiled(model), model, x)
    assert_same(run(compiled(set_(model, between=True)), model, x), expected)


@pytest.mark.parametrize("single_pass", [False, True])
def test_a_branch_that_a_break_cuts_reads_the_collapse_in_every_graph(single_pass: bool) -> None:
    model, x = net(inside=True), example()
    config = mhc_compile.MHCConfig(single_pass=single_pass)
    report = mhc_compile.convert_(model, x, config=config)
    second = [site for site in report.sites if site.key == "add1"]
    assert all("graph break" in site.traits and "mean" in site.choice for site in second)
    perturb_(model)
    expected = run(compiled(model), model, x)
    assert_same(run(compiled(set_(model, inside=False)), model, x), expected)
    assert_same(run(compiled(set_(model, between=True)), model, x), expected)


def test_a_branch_that_a_break_cuts_only_after_conversion_is_refused() -> None:
    x = example()
    model = set_(converted(net(), x), inside=True)
    with pytest.raises(
        UnsupportedGraphError, match=r"graph break lies in the branch .*test_pieces"
    ):
        compiled(model)(x)
    _calls.open.clear()


def test_a_site_that_is_left_to_python_is_refused_when_the_call_returns() -> None:
    x = example()
    model = set_(converted(net(), x), hidden=True)
    with pytest.raises(UnsupportedGraphError, match="add1 of Cut did not run as hyper-connections"):
        compiled(model)(x)
    _calls.open.clear()


def test_pieces_that_run_outside_of_a_call_are_refused() -> None:
    x = example()
    model = converted(net(between=True), x)
    block = model.blocks[0]
    forward = torch.compile(Cut.forward, backend="mhc", options={"inner": "eager"})
    with pytest.raises(UnsupportedGraphError, match="outside of a call"):
        forward(block, x)


def test_training_moves_every_parameter_but_the_reading_of_a_cut_branch() -> None:
    model, x = net(inside=True), example()
    converted(model, x)
    _, gradients = run(compiled(model), model, x)
    n = 4
    for name, gradient in gradients.items():
        if name.endswith("mhc.add1.bias"):
            assert not gradient[..., :n].any(), name
            assert gradient[..., n : 2 * n].all(), name


def test_without_gradients_a_branch_that_a_break_cuts_is_not_found_and_the_report_says_so() -> None:
    model, x = net(inside=True), example()
    with torch.no_grad():
        report = mhc_compile.explain(model, x)
    assert {site.key for site in report.sites} == {"add0"}
    assert any("torch.no_grad()" in note for note in report.notes)
    assert any("this side of a graph break" in add.reason for add in report.rejected)


def test_a_call_that_raised_is_forgotten_by_the_next_one() -> None:
    x = example()
    model = converted(net(between=True), x)
    call = compiled(model)
    expected = call(x)
    model.blocks[1].fails = True
    for _ in range(3):
        with pytest.raises(ValueError, match="interrupted"):
            call(x)
    assert len(_calls.open) == 1
    model.blocks[1].fails = False
    torch.testing.assert_close(call(x), expected)


class NoSelf(nn.Module):
    """Behind its break it does not use ``self`` any more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.linear(x))
        torch._dynamo.graph_break()
        return x + h


def test_a_site_whose_module_is_forgotten_behind_the_break_is_left_with_the_reason() -> None:
    model, x = Net([NoSelf()]), example()
    expected = run(model, model, x)
    report = mhc_compile.convert_(model, x)
    (site,) = report.left
    assert "does not use self any more" in site.reason
    assert_same(run(compiled(model), model, x), expected)


class Modes(nn.Module):
    """One graph in eval mode, several in train mode; there the break lies in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.limit = nn.Linear(WIDTH, WIDTH), 1e9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.linear(x))
        if self.training and h.abs().max() > self.limit:
            h = h.clamp(max=self.limit)
        return torch.relu(x + h * (self.limit > 0))


def test_a_model_in_eval_mode_is_converted_as_train_mode_needs_it() -> None:
    x = example()
    model = Net([Modes(), Modes()]).eval()
    report = mhc_compile.convert_(model, x)
    assert not any(module.training for module in model.modules())
    assert all("graph break" in site.traits for site in report.converted)
    perturb_(model)
    expected = run(compiled(model), model, x)
    torch.compiler.reset()
    assert_same(run(compiled(model.train()), model, x), expected)


def test_a_model_that_does_not_run_in_train_mode_is_converted_for_eval_mode() -> None:
    class Strict(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise ValueError("labels are needed")
            return super().forward(x)

    model = Strict(2).eval()
    assert len(mhc_compile.convert_(model, example()).converted) == 4
    assert not model.training
