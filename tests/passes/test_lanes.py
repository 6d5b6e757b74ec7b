"""Every per-stream rule against its definition: ``lane(op)(X)[i] == op(X[i])``."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule

from mhc_compile.kernels.layout import widened_shape
from mhc_compile.passes.lanes import Lane, NotLiftable, emit_lane, plan_lane
from tests.passes.graphs import Builder

STREAMS = 3
aten = torch.ops.aten
# Shape and channel axis of the layouts: tokens, images, sequences of a convolution, video.
TOKENS, IMAGE, SEQUENCE = ((2, 4, 6), -1), ((2, 6, 4, 5), -3), ((2, 6, 4), -2)
VIDEO = ((2, 3, 6, 4, 5), -3)
LAYOUTS = {"tokens": TOKENS, "image": IMAGE, "sequence": SEQUENCE}


def random_like(value):
    if value.dtype == torch.bool:
        return torch.rand(value.shape) < 0.5
    return (torch.rand(value.shape) + 0.5).to(value.dtype)


def run_lane(layout, build, dtype=torch.float32):
    """Lift what ``build(b, x)`` adds; the result of each stream alone, the state, its axis."""
    shape, dim = layout
    b = Builder()
    x = b.input(*shape, dtype=dtype)
    result = build(b, x)
    graph = b.output(result)
    plain = GraphModule(torch.nn.Module(), Graph())
    plain.graph.output(plain.graph.graph_copy(graph, {}))
    plain.recompile()
    with graph.inserting_after(x):
        state = graph.placeholder("state")
    lanes = {x: Lane(state, dim, STREAMS)}
    for node in list(graph.nodes):
        if node.op.startswith("call") and any(arg in lanes for arg in node.all_input_nodes):
            planned = plan_lane(node, {value: lane.dim for value, lane in lanes.items()})
            assert not isinstance(planned, NotLiftable), planned
            lanes[node] = emit_lane(graph, node, lanes)
            assert lanes[node].dim == planned
    end = lanes[result]
    graph.output_node().args = ((end.node,),)
    for node in reversed(list(lanes)[1:]):
        graph.erase_node(node)
    graph.lint()
    widened = GraphModule(torch.nn.Module(), graph)
    X = (torch.rand(widened_shape(shape, STREAMS, dim)) * 2 - 0.5).to(dtype)
    rest = [n for n in graph.nodes if n.op == "placeholder" and n not in (x, state)]
    constants = [random_like(n.meta["example_value"]) for n in rest]

    def run(module, *inputs):
        torch.manual_seed(1)
        return module(*inputs, *constants)[0]

    alone = [run(plain, X.select(dim - 1, i)) for i in range(STREAMS)]
    return alone, run(widened, None, X), end.dim


def assert_lane(layout, build, dtype=torch.float32):
    alone, together, dim = run_lane(layout, build, dtype)
    assert together.shape == tuple(widened_shape(alone[0].shape, STREAMS, dim))
    for i, plain in enumerate(alone):
        torch.testing.assert_close(
            together.select(dim - 1, i), plain, rtol=1e-6, atol=1e-6, equal_nan=True
        )
    return alone[0], dim


def refusal(layout, build):
    shape, dim = layout
    b = Builder()
    x = b.input(*shape)
    result = build(b, x)
    b.output(result)
    planned = plan_lane(result, {x: dim})
    assert isinstance(planned, NotLiftable), planned
    return planned.reason


# ---------------------------------------------------------------------------------- pointwise

UNARY = {
    "relu": lambda b, x: b.call(F.relu, x),
    "relu by keyword": lambda b, x: b.call(F.relu, input=x),
    "method": lambda b, x: b.method("tanh", x),
    "gelu": lambda b, x: b.call(F.gelu, x, approximate="tanh"),
    "leaky relu": lambda b, x: b.call(F.leaky_relu, x, 0.2),
    "clamp": lambda b, x: b.call(torch.clamp, x, min=-0.1, max=0.2),
    "square": lambda b, x: b.call(torch.pow, x, 2),
    "aten square": lambda b, x: b.call(aten.pow.Tensor_Scalar, x, 2),
    "scale": lambda b, x: b.call(operator.mul, x, 0.5),
    "reversed scale": lambda b, x: b.call(operator.mul, 0.5, x),
    "aten scale": lambda b, x: b.call(aten.mul.Tensor, x, 0.5),
    "quotient": lambda b, x: b.call(operator.truediv, x, 1.5),
    "one minus": lambda b, x: b.call(torch.rsub, x, 1.0),
    "cast": lambda b, x: b.method("to", x, torch.float64),
    "aten cast": lambda b, x: b.call(aten._to_copy.default, x, dtype=torch.float64),
    "half and back": lambda b, x: b.method("float", b.method("half", x)),
    "contiguous": lambda b, x: b.method("contiguous", x),
    "clone": lambda b, x: b.call(torch.clone, x),
    "detach": lambda b, x: b.method("detach", x),
    "sum with itself": lambda b, x: b.call(operator.add, x, b.call(torch.sigmoid, x)),
    "scaled sum": lambda b, x: b.call(torch.add, x, b.call(torch.exp, x), alpha=2),
    "where": lambda b, x: b.call(torch.where, b.call(operator.gt, b.input(1), 1.0), x, 0.0),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("build", UNARY.values(), ids=UNARY)
def test_a_pointwise_operation_acts_on_each_stream(build, layout):
    assert_lane(layout, build)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("function", [operator.add, operator.mul, torch.maximum])
def test_constants_of_every_rank_are_broadcast_beside_the_streams(function, layout):
    shape = layout[0]
    for rank in range(len(shape) + 1):
        size = shape[len(shape) - rank :]
        assert_lane(layout, lambda b, x, size=size: b.call(function, x, b.input(*size)))
        assert_lane(layout, lambda b, x, rank=rank: b.call(function, b.input(*(1,) * rank), x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_masks_fill_each_stream_alike(layout):
    shape, dim = layout
    size = [s if axis != len(shape) + dim else 1 for axis, s in enumerate(shape)]
    mask = lambda b: b.input(*size, dtype=torch.bool)  # noqa: E731
    assert_lane(layout, lambda b, x: b.method("masked_fill", x, mask(b), 0.0))
    assert_lane(layout, lambda b, x: b.call(torch.where, mask(b), x, 0.0))
    assert_lane(layout, lambda b, x: b.call(aten.where.self, mask(b), x, b.input()))


def test_a_memory_format_is_not_asked_of_a_state():
    assert_lane(IMAGE, lambda b, x: b.method("contiguous", x, memory_format=torch.channels_last))
    assert_lane(IMAGE, lambda b, x: b.call(torch.clone, x, memory_format=torch.channels_last))


def test_a_scalar_tensor_is_no_operand_of_the_streams():
    assert_lane(TOKENS, lambda b, x: b.call(operator.mul, x, b.input()))


def test_a_broadcast_to_a_higher_rank_is_refused():
    reason = refusal(TOKENS, lambda b, x: b.call(operator.add, x, b.input(1, 2, 4, 6)))
    assert reason == "add broadcasts the trunk to another rank"


def test_an_operation_in_place_is_refused():
    assert refusal(TOKENS, lambda b, x: b.method("relu_", x)) == "relu writes in place"
    assert refusal(TOKENS, lambda b, x: b.call(F.relu, x, True)) == "relu writes in place"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_same_elements_of_every_stream(layout, dtype):
    def build(b, x):
        return b.call(F.dropout, x, 0.5, True)

    _shape, dim = layout
    alone, together, _ = run_lane(layout, build, dtype)
    zeros = together == 0
    assert 0.2 < zeros.float().mean() < 0.8
    for i, plain in enumerate(alone):
        assert torch.equal(zeros.select(dim - 1, i), plain == 0)
        assert torch.equal(together.select(dim - 1, i), plain)


def test_dropout_of_whole_channels_and_in_eval_mode():
    assert_lane(IMAGE, lambda b, x: b.call(F.dropout2d, x, 0.5, True))
    assert_lane(SEQUENCE, lambda b, x: b.call(F.dropout1d, x, 0.5, True))
    assert_lane(TOKENS, lambda b, x: b.call(F.dropout, input=x, p=0.5, training=False))
    assert_lane(TOKENS, lambda b, x: b.call(aten.dropout.default, x, 0.5, True))


# ----------------------------------------------------------------------- norms and reductions


@pytest.mark.parametrize(
    "build",
    [
        lambda b, x: b.call(F.layer_norm, x, (6,), b.parameter(6), b.parameter(6), 1e-5),
        lambda b, x: b.call(F.layer_norm, input=x, normalized_shape=(6,)),
        lambda b, x: b.call(F.rms_norm, x, (6,), b.parameter(6)),
        lambda b, x: b.call(aten.layer_norm.default, x, [6], b.parameter(6), b.parameter(6)),
        lambda b, x: b.call(F.softmax, x, dim=-1),
        lambda b, x: b.call(F.normalize, x, dim=-1),
    ],
)
def test_norms_of_the_last_axis_act_on_each_stream(build):
    assert_lane(TOKENS, build)


def test_norms_over_channels_and_places_act_on_each_stream():
    assert_lane(IMAGE, lambda b, x: b.call(F.layer_norm, x, (6, 4, 5)))
    assert_lane(IMAGE, lambda b, x: b.call(F.layer_norm, x, (5,)))


def test_the_value_of_a_norm_that_returns_statistics_is_followed():
    def build(b, x):
        norm = b.call(aten.native_layer_norm.default, x, [6], b.parameter(6), None, 1e-5)
        return b.call(operator.getitem, norm, 0)

    assert_lane(TOKENS, build)


def test_statistics_that_are_read_are_refused():
    b = Builder()
    x = b.input(2, 4, 6)
    norm = b.call(aten.native_layer_norm.default, x, [6], None, None, 1e-5)
    b.output(b.call(operator.getitem, norm, 0), b.call(operator.getitem, norm, 1))
    planned = plan_lane(norm, {x: -1})
    assert planned == NotLiftable("the statistics of native_layer_norm are read")


def test_a_norm_across_the_stream_axis_is_refused():
    reason = refusal(TOKENS, lambda b, x: b.call(F.layer_norm, x, (4, 6)))
    assert reason == "layer_norm normalises over axes on both sides of the stream axis"


@pytest.mark.parametrize("layout", [IMAGE, SEQUENCE])
def test_group_norm_takes_the_streams_as_samples(layout):
    weight = lambda b: b.parameter(6)  # noqa: E731
    assert_lane(layout, lambda b, x: b.call(F.group_norm, x, 2, weight(b), weight(b), 1e-5))
    assert_lane(layout, lambda b, x: b.call(F.group_norm, x, num_groups=3))


def test_group_norm_over_another_axis_is_refused():
    reason = refusal(TOKENS, lambda b, x: b.call(F.group_norm, x, 2))
    assert reason == "group_norm takes another axis for the channels"


def test_batch_norm_is_refused():
    reason = refusal(
        IMAGE, lambda b, x: b.call(F.batch_norm, x, b.input(6), b.input(6), training=True)
    )
    assert reason == "batch_norm has no per-stream form here"


REDUCTIONS = {
    "mean": lambda b, x, axis: b.method("mean", x, axis, keepdim=True),
    "mean as in numpy": lambda b, x, axis: b.method("mean", x, axis=axis, keepdim=True),
    "mean by keyword": lambda b, x, axis: b.call(torch.mean, x, dim=axis, keepdim=True),
    "all keywords": lambda b, x, axis: b.call(torch.mean, input=x, dim=(axis,), keepdim=True),
    "positional": lambda b, x, axis: b.method("sum", x, (axis,), True),
    "aten mean": lambda b, x, axis: b.call(aten.mean.dim, x, [axis], True),
    "amax": lambda b, x, axis: b.call(torch.amax, x, axis, True),
    "var": lambda b, x, axis: b.method("var", x, axis, False, True),
    "aten var": lambda b, x, axis: b.call(
        aten.var.correction, x, [axis], correction=0, keepdim=True
    ),
    "norm": lambda b, x, axis: b.method("norm", x, dim=axis, keepdim=True),
    "vector norm": lambda b, x, axis: b.call(aten.linalg_vector_norm.default, x, 2.0, [axis], True),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("build", REDUCTIONS.values(), ids=REDUCTIONS)
def test_reductions_that_keep_their_axis_act_on_each_stream(build, layout):
    rank = len(layout[0])
    for axis in range(-rank, rank):
        _, dim = assert_lane(layout, lambda b, x, axis=axis: build(b, x, axis))
        assert dim == layout[1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reductions_that_drop_an_axis_move_the_channels(layout):
    shape, dim = layout
    for axis in range(len(shape)):
        if axis != len(shape) + dim:
            build = lambda b, x, axis=axis: b.method("mean", x, axis)  # noqa: E731
            _, after = assert_lane(layout, build)
            assert after == dim + (axis > len(shape) + dim)


def test_reductions_of_the_channels_and_of_everything_are_refused():
    assert refusal(TOKENS, lambda b, x: b.method("mean", x, -1)) == "mean reduces the channels away"
    assert refusal(TOKENS, lambda b, x: b.method("mean", x)) == "mean reduces the whole trunk"
    assert refusal(TOKENS, lambda b, x: b.call(torch.var, x, True)) == "var reduces the whole trunk"


def test_a_written_out_norm_acts_on_each_stream():
    def build(b, x):
        mean = b.method("mean", b.call(torch.pow, x, 2), -1, keepdim=True)
        scale = b.call(torch.rsqrt, b.call(operator.add, mean, 1e-6))
        return b.call(operator.mul, b.parameter(6), b.call(operator.mul, x, scale))

    assert_lane(TOKENS, build)


def test_a_norm_of_channels_in_the_middle_acts_on_each_stream():
    def build(b, x):
        centred = b.call(operator.sub, x, b.method("mean", x, 1, keepdim=True))
        var = b.method("mean", b.call(torch.pow, centred, 2), 1, keepdim=True)
        normed = b.call(operator.truediv, centred, b.call(torch.sqrt, var))
        return b.call(operator.mul, b.call(torch.reshape, b.parameter(6), (6, 1, 1)), normed)

    assert_lane(IMAGE, build)


# ------------------------------------------------------------------------------------- views

RESHAPES = {
    "tokens in one row": (TOKENS, lambda b, x: b.method("view", x, -1, 6), -1),
    "torch.reshape": (TOKENS, lambda b, x: b.call(torch.reshape, x, (8, 6)), -1),
    "a tuple": (TOKENS, lambda b, x: b.method("reshape", x, (4, 2, 6)), -1),
    "channels inferred": (TOKENS, lambda b, x: b.method("view", x, 8, -1), -1),
    "aten view": (TOKENS, lambda b, x: b.call(aten.view.default, x, [8, 6]), -1),
    "an axis more": (TOKENS, lambda b, x: b.method("view", x, 2, 2, 2, 6), -1),
    "keyword": (TOKENS, lambda b, x: b.call(torch.reshape, input=x, shape=(8, 6)), -1),
    "flatten tokens": (TOKENS, lambda b, x: b.call(torch.flatten, x, 0, 1), -1),
    "flatten places": (IMAGE, lambda b, x: b.method("flatten", x, 2), -2),
    "view places": (IMAGE, lambda b, x: b.method("view", x, 2, 6, -1), -2),
    "split places": (SEQUENCE, lambda b, x: b.method("view", x, 2, 6, 2, 2), -3),
    "fold time into the batch": (VIDEO, lambda b, x: b.method("flatten", x, 0, 1), -3),
    "unflatten": (TOKENS, lambda b, x: b.method("unflatten", x, 1, (2, 2)), -1),
    "unsqueeze before": (TOKENS, lambda b, x: b.method("unsqueeze", x, 1), -1),
    "unsqueeze between": (TOKENS, lambda b, x: b.call(torch.unsqueeze, x, 2), -1),
    "unsqueeze behind": (TOKENS, lambda b, x: b.method("unsqueeze", x, -1), -2),
    "squeeze before": (((2, 1, 6), -1), lambda b, x: b.method("squeeze", x, 1), -1),
    "squeeze behind": (((2, 6, 1), -2), lambda b, x: b.method("squeeze", x, -1), -1),
    "squeeze everything": (((1, 2, 6, 1), -2), lambda b, x: b.method("squeeze", x), -1),
    "squeeze nothing": (TOKENS, lambda b, x: b.method("squeeze", x, 1), -1),
    "reshape as": (TOKENS, lambda b, x: b.method("reshape_as", x, b.input(8, 6)), -1),
}


@pytest.mark.parametrize(("layout", "build", "dim"), RESHAPES.values(), ids=RESHAPES)
def test_reshapes_that_keep_the_channels_act_on_each_stream(layout, build, dim):
    assert assert_lane(layout, build)[1] == dim


@pytest.mark.parametrize(
    ("layout", "build"),
    [
        (TOKENS, lambda b, x: b.method("view", x, 2, 4, 2, 3)),
        (TOKENS, lambda b, x: b.method("flatten", x)),
        (TOKENS, lambda b, x: b.method("flatten", x, 1)),
        (IMAGE, lambda b, x: b.method("flatten", x, 1)),
        (((6, 4, 6), -1), lambda b, x: b.method("view", x, 6, 24)),
    ],
)  # fmt: skip
def test_a_reshape_that_takes_the_channels_apart_is_refused(layout, build):
    assert refusal(layout, build).endswith("does not keep the channels as one axis")


def test_a_view_as_another_dtype_is_refused():
    reason = refusal(TOKENS, lambda b, x: b.method("view", x, torch.int32))
    assert reason == "view reads the numbers as another dtype"


PERMUTATIONS = {
    "images to tokens": (IMAGE, lambda b, x: b.method("permute", x, 0, 2, 3, 1), -1),
    "as a tuple": (IMAGE, lambda b, x: b.call(torch.permute, x, (0, 2, 3, 1)), -1),
    "negative axes": (IMAGE, lambda b, x: b.method("permute", x, 0, -2, -1, -3), -1),
    "tokens to images": (
        ((2, 4, 5, 6), -1),
        lambda b, x: b.call(aten.permute.default, x, [0, 3, 1, 2]),
        -3,
    ),
    "transpose": (TOKENS, lambda b, x: b.method("transpose", x, 1, 2), -2),
    "transpose by keyword": (TOKENS, lambda b, x: b.call(torch.transpose, x, dim0=0, dim1=1), -1),
    "swapaxes": (SEQUENCE, lambda b, x: b.method("swapaxes", x, -1, -2), -1),
    "movedim": (IMAGE, lambda b, x: b.call(torch.movedim, x, 1, -1), -1),
    "mT": (SEQUENCE, lambda b, x: b.call(getattr, x, "mT"), -1),
}


@pytest.mark.parametrize(("layout", "build", "dim"), PERMUTATIONS.values(), ids=PERMUTATIONS)
def test_permutations_act_on_each_stream(layout, build, dim):
    assert assert_lane(layout, build)[1] == dim


@pytest.mark.parametrize("size", [(6, 6, 6), (1, 6, 1)])
def test_equal_sizes_do_not_confuse_a_view(size):
    for dim in (-1, -2, -3):
        assert_lane((size, dim), lambda b, x: b.method("permute", x, 2, 0, 1))
    assert_lane((size, -1), lambda b, x: b.method("view", x, -1, size[-1]))


def test_a_chain_of_views_comes_back_to_where_it_started():
    def build(b, x):
        rows = b.method("flatten", b.method("permute", x, 0, 2, 3, 1), 1, 2)
        return b.method("view", b.method("transpose", rows, 1, 2), 2, 6, 4, 5)

    assert assert_lane(IMAGE, build)[1] == -3


def test_a_slice_of_the_trunk_is_refused():
    assert refusal(TOKENS, lambda b, x: b.call(operator.getitem, x, 0)) == (
        "it takes a part of the trunk"
    )


def test_values_with_their_channels_on_different_axes_are_not_joined():
    b = Builder()
    x, y = b.input(4, 4), b.input(4, 4)
    both = b.call(operator.add, x, y)
    b.output(both)
    assert plan_lane(both, {x: -1, y: -2}) == NotLiftable(
        "add joins values whose channel axes differ"
    )


def test_a_parameter_of_an_operation_cannot_have_streams():
    b = Builder()
    x, w = b.input(2, 6), b.input(6)
    norm = b.call(F.layer_norm, x, (6,), w)
    b.output(norm)
    assert plan_lane(norm, {w: -1}) == NotLiftable(
        "an argument of layer_norm is computed from the trunk"
    )


def test_new_nodes_keep_line_and_recompute_tags():
    b = Builder()
    x = b.input(2, 6)
    dropped = b.call(F.dropout, x, 0.5, True)
    dropped.meta.update(stack_trace="here", recompute="always", tensor_meta="old")
    graph = b.output(dropped)
    with graph.inserting_after(x):
        state = graph.placeholder("state")
    old = set(graph.nodes)
    emit_lane(graph, dropped, {x: Lane(state, -1, STREAMS)})
    new = [node for node in graph.nodes if node not in old]
    assert len(new) == 5
    assert all(node.meta == {"stack_trace": "here", "recompute": "always"} for node in new)


# ------------------------------------------------------------------------------------- slices

SLICES = {
    "getitem": lambda b, x: b.call(operator.getitem, x, slice(1, None)),
    "getitem of everything": lambda b, x: b.call(
        operator.getitem, x, (slice(None), slice(None, 9), slice(None, 9))
    ),
    "getitem from the end": lambda b, x: b.call(
        operator.getitem, x, (slice(0, 1), Ellipsis, slice(None))
    ),
    "aten slice": lambda b, x: b.call(aten.slice.Tensor, x, 0, 1, 2),
    "aten slice of everything": lambda b, x: b.call(aten.slice.Tensor, x, 2, 0, 99),
    "aten slice without bounds": lambda b, x: b.call(aten.slice.Tensor, x),
}


@pytest.mark.parametrize("layout", [TOKENS, SEQUENCE, IMAGE])
@pytest.mark.parametrize("build", SLICES.values(), ids=SLICES)
def test_slices_of_other_axes_than_the_channels_act_on_each_stream(build, layout):
    _, dim = assert_lane(layout, build)
    assert dim == layout[1]


def test_parts_of_the_channels_are_refused():
    part = (Ellipsis, slice(2, 4))
    reason = refusal(TOKENS, lambda b, x: b.call(operator.getitem, x, part))
    assert reason == "it takes a part of the channels"
    reason = refusal(TOKENS, lambda b, x: b.call(aten.slice.Tensor, x, -1, 0, 3))
    assert reason == "slice takes a part of the channels"
