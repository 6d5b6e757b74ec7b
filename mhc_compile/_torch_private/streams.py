"""Streams and events of a device, as torch writes them into graphs."""

import functools
from typing import Any

import torch

from mhc_compile.passes.stream_lowering import StreamTable


def torch_streams() -> StreamTable:
    """Torch's operators for streams, and its table of the objects that graphs name by number."""
    from torch._dynamo.graph_bytecode_inputs import CURRENT_STREAM_INDEX
    from torch._dynamo.variables import streams  # registers the operators
    from torch._functorch._aot_autograd.streams import wrap_all_sync_nodes_with_control_deps

    assert streams is not None
    ops = torch.ops.streams
    return StreamTable(
        record=ops.record_event.default,
        wait=ops.wait_event.default,
        hold=ops.record_stream.default,
        current=CURRENT_STREAM_INDEX,
        side=lambda device: name_object(_side_stream(device)),
        event=lambda device: name_object(torch.Event(device)),
        fence=wrap_all_sync_nodes_with_control_deps,
    )


@functools.cache
def _side_stream(device: torch.device) -> torch.Stream:
    """One for all graphs: its memory is a pool of its own."""
    return torch.Stream(device, priority=-1)


_named: list[Any] = []


def named_object(number: int) -> Any:
    """What `name_object` was given; compiled code calls this."""
    return _named[number]


def name_object(value: Any) -> int:
    """A number by which operators of the graph that is being compiled find ``value``.

    Torch would make a new object for every call of the compiled code; this one stays.
    """
    from torch._dynamo.bytecode_transformation import create_call_function
    from torch._dynamo.graph_bytecode_inputs import register_graph_created_object

    number = len(_named)
    _named.append(value)

    def load(_index: int, codegen: Any) -> None:
        codegen.add_push_null(lambda: codegen.load_import_from(__name__, "named_object"))
        codegen.append_output(codegen.create_load_const(number))
        codegen.extend_output(create_call_function(1, False))

    return register_graph_created_object(value, load)
