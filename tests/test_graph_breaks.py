"""Trunks that run through several graphs: breaks between blocks, layers that share one graph."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import UnsupportedGraphError

EAGER = {"inner": "eager"}


class PreNorm(nn.Module):
    """Two sites; a trunk value enters and leaves as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.first(self.norm(x)))
        return x + torch.tanh(self.second(self.norm(x)))


class PostNorm(nn.Module):
    """One site; the block shows the norm of its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.linear(x)))


class Net(nn.Module):
    """Four blocks, with a graph break after each if asked to; block 0 may come again at the end."""

    def __init__(self, block: type[nn.Module], *, breaks: bool, again: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.breaks, self.again = breaks, again

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in [*self.blocks, *(self.blocks[:1] if self.again else ())]:
            x = block(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return self.head(x)


TOKENS = torch.arange(6).reshape(2, 3)


def _converted(block: type[nn.Module], *, breaks: bool, again: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(block, breaks=breaks, again=again)
    mhc_compile.convert_(model, TOKENS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(mhc_compile.mhc_parameters(model)):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _run(model: nn.Module, call: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = call(TOKENS)
    output.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_breaks_between_blocks_change_neither_outputs_nor_gradients(
    block: type[nn.Module], again: bool
) -> None:
    whole = _converted(block, breaks=False, again=again)
    expected = _run(whole, torch.compile(whole, backend="mhc", options=EAGER))
    torch.compiler.reset()
    broken = _converted(block, breaks=True, again=again)
    actual = _run(broken, torch.compile(broken, backend="mhc", options=EAGER))
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("block", [PreNorm, PostNorm])
def test_blocks_compiled_one_by_one_are_the_whole_graph(block: type[nn.Module]) -> None:
    model = _converted(block, breaks=False)
    expected = _run(model, torch.compile(model, backend="mhc", options=EAGER))
    torch.compiler.reset()
    for layer in model.blocks:
        layer.compile(backend="mhc", options=EAGER)
    actual = _run(model, model)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_graph_that_all_layers_share_is_seen_for_each_of_them() -> None:
    report = mhc_compile.explain(Net(PreNorm, breaks=True), TOKENS)
    assert [site.name for site in report.sites] == [
        f"blocks.{layer}.add{add}" for layer in range(4) for add in range(2)
    ]
    assert [len(trunk.sites) for trunk in report.trunks] == [8]


def test_first_middle_and_last_layers_get_graphs_of_their_own() -> None:
    model = _converted(PreNorm, breaks=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("mhc")
    torch.compile(model, backend=counter)(TOKENS)
    # first, middle (shared by layers 1 and 2), last; without the guard on what was compiled in,
    # every layer would run the first one's graph and start streams of its own
    assert counter.frame_count == 3


def test_exclude_applies_to_every_layer_of_a_shared_graph() -> None:
    model = Net(PreNorm, breaks=True)
    config = mhc_compile.MHCConfig(exclude=("blocks.2.*",))
    report = mhc_compile.convert_(model, TOKENS, config=config)
    assert [site.name for site in report.left] == ["blocks.2.add0", "blocks.2.add1"]
    plain = Net(PreNorm, breaks=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    output = torch.compile(model, backend="mhc", options=EAGER)(TOKENS)
    torch.testing.assert_close(output, plain(TOKENS), rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_lazy_conversion_block_by_block_is_refused_and_undone() -> None:
    model = Net(PreNorm, breaks=False)
    for layer in model.blocks:
        layer.compile(backend="mhc", options=EAGER)
    with pytest.raises(UnsupportedGraphError, match=r"convert_\(model"):
        model(TOKENS)
    assert not list(mhc_compile.mhc_parameters(model))
    assert all(type(layer) is PreNorm for layer in model.blocks)


def test_lazy_conversion_of_a_whole_model_warns_once_and_keeps_the_outputs() -> None:
    model = Net(PreNorm, breaks=False)
    expected = model(TOKENS)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    with pytest.warns(mhc_compile.MHCWarning, match="8 sites in 1 trunks"):
        output = compiled(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mhc_compile.MHCWarning)
        compiled(TOKENS[:, :2])
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def test_code_without_a_file_converts() -> None:
    scope: dict[str, type[nn.Module]] = {"nn": nn, "torch": torch}
    exec(  # as typed at a prompt: there is no line to show, and the two traces must still agree
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        return x + torch.tanh(self.linear(x))\n",
        scope,
    )
    model = scope["Typed"]()
    x = torch.randn(2, 8)
    expected = model(x)
    assert len(mhc_compile.convert_(model, x).converted) == 1
    output = torch.compile(model, backend="mhc", options=EAGER)(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


class _HooksItself(nn.Module):
    """Installs a hook on its first call, and remembers that in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.hooked = PreNorm(), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.hooked:
            self.block.register_forward_hook(lambda module, args, output: output)
            self.hooked = True
        return self.block(x)


def test_hooks_a_model_installs_while_it_is_traced_are_taken_off_again() -> None:
    model = _HooksItself()
    mhc_compile.explain(model, torch.randn(2, 3, 8))
    assert not model.hooked
    assert not model.block._forward_hooks


class _ReadOnly(OrderedDict[str, int]):
    def update(self, *args: object, **kwargs: object) -> None:
        raise TypeError("read only")


def test_a_dict_of_a_kind_that_cannot_be_written_is_left_alone() -> None:
    model = PreNorm()
    model.settings = _ReadOnly(width=8)  # type: ignore[assignment]
    assert len(mhc_compile.explain(model, torch.randn(2, 3, 8)).sites) == 2
    assert model.settings == {"width": 8}


class _Routed(nn.Module):
    """A site whose branch looks at values: a graph break lies in it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.linear = PreNorm(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        f = torch.tanh(self.linear(x))
        scale = f.sum().item()
        return x + f * scale


def test_a_report_says_where_a_graph_broke_and_what_dynamo_says_of_it() -> None:
    report = mhc_compile.explain(_Routed(), torch.randn(2, 3, 8))
    line = _Routed.forward.__code__.co_firstlineno + 3
    (note,) = (note for note in report.notes if "graph break at" in note)
    assert f"test_graph_breaks.py:{line}" in note
    assert "torch._dynamo.config.capture_scalar_outputs = True" in note
    assert [site.name for site in report.sites] == ["block.add0", "block.add1", "add0"]
    (cut,) = (site for site in report.sites if "graph break" in site.traits)
    assert cut.source.endswith(f":{line + 1}")


def test_the_setting_that_dynamo_proposes_mends_the_branch() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        report = mhc_compile.explain(_Routed(), torch.randn(2, 3, 8))
    assert [site.name for site in report.converted] == ["block.add0", "block.add1", "add0"]
    assert not any("graph break" in site.traits for site in report.sites)


def test_a_model_of_one_graph_has_no_note_of_breaks() -> None:
    assert mhc_compile.explain(PreNorm(), torch.randn(2, 3, 8)).notes == ()
