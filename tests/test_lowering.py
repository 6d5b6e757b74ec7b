"""Passes on the graphs of AOTAutograd, through ``torch.compile``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor  # noqa: TID251 - settings of the user
from torch._inductor.utils import fresh_cache, run_and_get_code  # noqa: TID251 - what it made
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import GraphModule

from mhc_compile import _torch_private as private
from mhc_compile.dump import write_dump
from mhc_compile.passes.overlap import Window
from mhc_compile.recorder import Recorder
from tests.nets import Net, compiled, converted, distance, example, run
from tests.tensor_parallel import parallel_stack, recorded, same_bits

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("fake_ranks")


def model() -> nn.Module:
    return parallel_stack(init_device_mesh("cpu", (2,)), X)


def step(net: nn.Module, **options: Any) -> Recorder:
    """What is recorded of one training step."""
    call, recorder = recorded(net, **options)
    call(X).sum().backward()
    return recorder


def windows(recorder: Recorder) -> list[Window]:
    return [window for graph in recorder.graphs for o in graph.overlap for window in o.windows]


def test_a_tensor_parallel_step_is_the_same_bit_for_bit_and_fills_its_windows() -> None:
    net = model()
    expected = run(compiled(net, "aot_eager", overlap="off"), net, X)
    torch.compiler.reset()
    assert same_bits(run(compiled(net, "aot_eager"), net, X), expected)
    torch.compiler.reset()
    recorder = step(net, inner="aot_eager")
    assert sum(after - before for before, after in (w.nodes for w in windows(recorder))) > 3
    assert len(windows(recorder)) == 6  # one forward and one backward for each site


@pytest.mark.parametrize(
    "option", [{"overlap": "off"}, {"skip_passes": ("overlap_collectives_pass",)}]
)
def test_it_can_be_switched_off(option: dict[str, Any]) -> None:
    assert not windows(step(model(), inner="aot_eager", **option))


@pytest.mark.parametrize(
    "theirs",
    [
        {"aten_distributed_optimizations.enable_overlap_scheduling": True},
        {"reorder_for_compute_comm_overlap": True},
    ],
)
def test_it_is_left_to_inductor_where_the_user_wants_that(theirs: dict[str, bool]) -> None:
    with inductor.patch(theirs):
        assert not windows(step(model(), inner="aot_eager"))


def test_a_dump_shows_the_graph_before_and_after_where_work_moved(tmp_path: Path) -> None:
    recorder = step(model(), inner="aot_eager")
    write_dump(tmp_path, recorder, recorder.report)
    stages = sorted(path.name for path in (tmp_path / "graph_0" / "aot_bw").iterdir())
    assert stages == [
        "00_before.txt",
        "01_replay_sites_pass.txt",
        "02_accumulate_gradients_pass.txt",
        "03_overlap_collectives_pass.txt",
        "before_after.diff",
    ]
    assert '"transfer"' in (tmp_path / "report.json").read_text()


def test_a_graph_without_collectives_has_no_window() -> None:
    call, recorder = recorded(converted(Net(), example()), inner="aot_eager")
    call(example())
    phases = [stage.phase for stage in recorder.stages if stage.phase != "fw"]
    assert phases == ["aot_fw", "aot_fw"]  # before, and without copies of mappings
    assert not recorder.graphs[0].overlap


@pytest.mark.slow
def test_inductor_keeps_the_order_and_its_settings() -> None:
    x = torch.randn(2, 512, 64)  # large enough for a split to pay
    net = parallel_stack(init_device_mesh("cpu", (2,)), x, depth=2)
    expected = run(compiled(net, "aot_eager"), net, x)
    torch.compiler.reset()
    assert inductor.reorder_for_peak_memory
    with inductor.patch(force_disable_caches=True):
        found, code = run_and_get_code(lambda: run(compiled(net, "inductor"), net, x))
    assert inductor.reorder_for_peak_memory
    assert inductor.post_grad_custom_post_pass is None
    assert distance(found[0], expected[0]) < 1e-6
    backward = next(text for text in code if "post_backward" in text)
    forward = next(text for text in code if text is not backward)
    assert "torch.ops.mhc.pre.default(" in window(forward)  # the mappings of the first site
    assert window(backward).count("extern_kernels.mm(") >= 2  # gradients of weights
    assert "torch.ops.mhc.replay.default(" in window(backward)  # what the next block makes again


def window(code: str) -> str:
    """What stands between the first collective and its wait in Inductor's code."""
    body = code[code.index("def call(") :]
    first = body.index("all_reduce_.default")
    return body[first : body.index("wait_tensor.default", first)]


@pytest.mark.slow
def test_a_result_in_the_cache_of_inductor_is_of_the_same_passes(tmp_path: Path) -> None:
    runs: list[str] = []

    def compile_with(key: str) -> None:
        def backend(gm: GraphModule, _: Sequence[Any]) -> Any:
            copy, _ = private.copy_captured(gm)
            inputs = [private.example_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
            lowering = private.Lowering(
                lambda phase, lowered: bool(runs.append(f"{key} {phase}")), key, (__file__,)
            )
            return private.compile_inductor(copy, inputs, None, lowering)

        torch.compiler.reset()
        torch.compile(lambda x: torch.sin(x) * 2, backend=backend)(torch.randn(3))

    with fresh_cache(dir=str(tmp_path)):
        for key in ("one", "one", "two"):
            compile_with(key)
    assert runs == ["one joint", "one fw", "two joint", "two fw"]
