"""The memory plan against what is really saved for the backward."""

import json
import math
from typing import Any

import pytest
import torch

import mhc_compile
from mhc_compile import MHCConfig
from mhc_compile.inspection import lowered_graphs
from mhc_compile.memory import MemoryPlan, memory_plan
from mhc_compile.passes.opnames import op_name
from mhc_compile.tables import memory_tables, to_text
from tests.nets import Net, perturb_, saved_shapes

WIDTH, BLOCKS, STREAMS = 64, 12, 4
MAPPINGS = 2 * (STREAMS**2 + 2 * STREAMS)


def plan_of(config: MHCConfig | None = None) -> MemoryPlan:
    report = mhc_compile.explain(Net(BLOCKS, WIDTH), torch.randn(3, 5, WIDTH), config=config)
    return memory_plan(report)


def test_the_plan_follows_the_papers_table() -> None:
    (trunk,) = plan_of().trunks
    row = 3 * 5 * WIDTH * 4
    assert (trunk.sites, trunk.tokens, trunk.width) == (24, 15, WIDTH)
    assert (trunk.block, trunk.blocks) == (4, 6)
    assert trunk.states == row + 5 * STREAMS * row
    assert trunk.branches == 24 * row
    assert trunk.mappings == 24 * MAPPINGS * 15 * 4
    assert trunk.replay == (STREAMS + 2) * 4 * row
    assert trunk.without == 24 * ((STREAMS + 1) * row + MAPPINGS * 15 * 4)
    assert trunk.kept == trunk.states + trunk.branches + trunk.mappings
    assert trunk.peak == trunk.kept + trunk.replay


def test_without_recomputation_every_state_is_kept() -> None:
    (trunk,) = plan_of(MHCConfig(recompute="off")).trunks
    assert (trunk.block, trunk.blocks, trunk.replay, trunk.rows) == (0, 0, 0, 0)
    assert trunk.kept == trunk.without


def test_a_block_is_no_longer_than_its_trunk() -> None:
    (trunk,) = plan_of(MHCConfig(recompute=100)).trunks
    assert (trunk.block, trunk.blocks) == (24, 1)


@pytest.mark.parametrize("recompute", ["auto", 6])
def test_what_is_saved_is_what_the_plan_says(recompute: Any) -> None:
    torch.manual_seed(0)
    x, config = torch.randn(3, 5, WIDTH), MHCConfig(recompute=recompute)
    model = Net(BLOCKS, WIDTH)
    (trunk,) = memory_plan(mhc_compile.convert_(model, x, config=config)).trunks
    perturb_(model)
    options = {"recompute": recompute, "inner": "aot_eager"}
    compiled = torch.compile(model, backend="mhc", options=options)
    saved = saved_shapes(lambda: compiled(x))
    row = x.numel() * 4
    states = saved[3, 5, STREAMS, WIDTH]
    assert row + states * STREAMS * row == trunk.states
    mappings = (3, 5, STREAMS), (3, 5, STREAMS, STREAMS), (3, 5, MAPPINGS // 2 + 1)
    assert sum(saved[shape] * math.prod(shape) for shape in mappings) * 4 <= trunk.mappings
    # The branch output, also what its activation keeps; the entry and the end of the trunk.
    assert saved[3, 5, WIDTH] <= trunk.branches // row + 2
    # What its product keeps of its input.
    assert saved[15, WIDTH] <= trunk.sites + 2


@pytest.mark.parametrize("blocks", [12, pytest.param(28, marks=pytest.mark.slow)])
def test_24_and_56_sites_keep_what_the_papers_table_says(blocks: int) -> None:
    # n C a block, C a site, and at most 2 (n^2 + 2 n) float32 a site.
    x = torch.randn(3, 5, WIDTH)
    config = MHCConfig(inner="aot_eager")
    report, graphs = lowered_graphs(Net(blocks, WIDTH), x, config=config)
    (trunk,) = memory_plan(report).trunks
    (backward,) = (graph.gm for graph in graphs if graph.phase == "bw")
    kept = 0
    for node in backward.graph.find_nodes(op="placeholder"):
        reads_streams = any(op_name(user).startswith("mhc.") for user in node.users)
        if reads_streams and node.meta["val"].shape[:2] == x.shape[:2]:
            kept += node.meta["val"].numel() * 4
    assert kept == pytest.approx(trunk.kept, rel=0.05)
    row, sites = x.numel() * 4, 2 * blocks
    table = STREAMS * trunk.blocks * row + sites * row + sites * MAPPINGS * 15 * 4
    assert 0.9 * table <= kept <= table  # the first block starts from the plain input


def test_the_plan_is_data_and_a_table() -> None:
    plan = plan_of()
    (entry,) = json.loads(plan.to_json())["trunks"]
    assert math.isclose(entry["peak"], entry["kept"] + entry["replay"])
    (table,) = memory_tables(plan)
    assert "6 of 4" in to_text(table)
