import operator

import torch

from mhc_compile.passes.flow import SINGLE, FlowIndex
from mhc_compile.passes.vocabulary import BENDS, MIXES
from tests.passes.graphs import Builder


def test_integers_sizes_constructors_and_random_numbers_cut_the_flow():
    b = Builder()
    x = b.input(2, 4)
    index_of_max = b.call(torch.argmax, x, -1)
    zeros = b.call(torch.zeros_like, x)
    noise = b.call(torch.rand_like, x)
    gathered = b.call(operator.mul, zeros, noise)
    as_float = b.method("float", index_of_max)
    flow = FlowIndex(b.output(gathered, as_float))
    assert not flow.depends(gathered, x)
    assert not flow.depends(as_float, x)
    assert not flow.varies(gathered)
    assert flow.varies(as_float)


def test_flow_passes_tuples():
    b = Builder()
    x = b.input(2, 4)
    parts = b.method("chunk", x, 2, -1)
    first = b.call(operator.getitem, parts, 0)
    flow = FlowIndex(b.output(first))
    assert flow.depends(first, x)


def test_parameters_do_not_vary_and_what_reads_an_input_does():
    b = Builder()
    x, w = b.input(2, 4), b.parameter(4)
    doubled = b.call(operator.mul, w, 2)
    scaled = b.call(operator.mul, x, doubled)
    flow = FlowIndex(b.output(scaled))
    assert (flow.varies(x), flow.varies(w), flow.varies(doubled), flow.varies(scaled)) == (
        True,
        False,
        False,
        True,
    )
    assert flow.varying_inputs(scaled) == (x,)


def test_embedding_of_integer_inputs_varies_though_only_its_table_flows():
    b = Builder()
    ids, table = b.input(2, 3, dtype=torch.int64), b.parameter(5, 4)
    rows = b.call(torch.nn.functional.embedding, ids, table)
    flow = FlowIndex(b.output(rows))
    assert flow.varies(rows)
    assert flow.inputs(rows) == (table,)


def test_nearest_finds_the_latest_wanted_node_and_the_kind_of_the_way():
    b = Builder()
    x = b.input(2, 4)
    y = b.linear(x)
    z = b.call(torch.relu, y)
    both = b.call(operator.add, z, y)
    flow = FlowIndex(b.output(both, z))
    hit = flow.nearest([z], [x, y])
    assert hit is not None
    node, paths = hit
    assert node is y
    assert paths.any(BENDS)
    assert not paths.any(MIXES)
    assert not paths.any(SINGLE)
    hit = flow.nearest([z], [x])
    assert hit is not None
    assert hit[1].any(MIXES | BENDS)


def test_nearest_keeps_ways_apart():
    b = Builder()
    x = b.input(2, 4)
    mixed = b.linear(x)
    bent = b.call(torch.relu, x)
    total = b.call(operator.mul, mixed, bent)
    flow = FlowIndex(b.output(total))
    hit = flow.nearest([total], [x])
    assert hit is not None
    assert hit[1].any(MIXES)
    assert hit[1].any(BENDS)
    assert not hit[1].any(MIXES | BENDS)


def test_nearest_does_not_look_above_what_is_wanted():
    b = Builder()
    x = b.input(2, 4)
    y = b.linear(x)
    z = b.linear(x)
    flow = FlowIndex(b.output(y, z))
    assert flow.nearest([y], [z]) is None
    assert flow.nearest([z], [y]) is None


def test_between_holds_only_nodes_on_a_way():
    b = Builder()
    x, c = b.input(2, 4), b.input(2, 4)
    y = b.call(torch.relu, x)
    side = b.call(torch.sin, x)
    other = b.call(torch.relu, c)
    z = b.call(operator.mul, y, other)
    flow = FlowIndex(b.output(z, side))
    assert flow.between(x, [z]) == (y, z)
    assert flow.between(z, [x]) == ()


def test_writing_into_a_slice_reaches_later_readers():
    b = Builder()
    x, f = b.input(2, 4), b.input(2)
    buffer = b.call(torch.zeros_like, x)
    before = b.call(torch.relu, buffer)
    b.call(operator.setitem, buffer, (slice(None), 0), f)
    after = b.call(torch.relu, buffer)
    flow = FlowIndex(b.output(before, after))
    assert flow.depends(after, f)
    assert not flow.depends(before, f)


def test_writing_into_a_view_reaches_readers_of_its_base():
    b = Builder()
    x, f = b.input(2, 4), b.input(2)
    y = b.call(torch.relu, x)
    column = b.call(operator.getitem, y, (slice(None), 0))
    b.method("add_", column, f)
    after = b.call(torch.relu, y)
    flow = FlowIndex(b.output(after))
    assert flow.depends(after, f)
    assert flow.depends(after, y)
