"""The only place that touches private or undocumented parts of torch.

`tests/test_torch_private.py` asserts each of them, so that a new torch fails one clear test.
"""

from mhc_compile._torch_private.dynamo import (
    DYNAMO_ERRORS,
    GraphBreak,
    custom_op_bodies,
    passing_through,
    reset_dynamo,
    trace_artifact,
    watch_breaks,
    without_tracing,
)
from mhc_compile._torch_private.frames import (
    Frame,
    copy_captured,
    copy_signature,
    example_of,
    fake_like,
    is_dtensor,
    is_pending,
    note_source,
)
from mhc_compile._torch_private.history import OPAQUE, kinds_between
from mhc_compile._torch_private.lowering import (
    Compiled,
    Lowering,
    compile_aot_eager,
    compile_inductor,
    memory_budget,
    schedules_collectives,
    trace_autograd,
)
from mhc_compile._torch_private.streams import (
    name_object,
    named_object,
    torch_streams,
)

__all__ = [
    "DYNAMO_ERRORS",
    "OPAQUE",
    "Compiled",
    "Frame",
    "GraphBreak",
    "Lowering",
    "compile_aot_eager",
    "compile_inductor",
    "copy_captured",
    "copy_signature",
    "custom_op_bodies",
    "example_of",
    "fake_like",
    "is_dtensor",
    "is_pending",
    "kinds_between",
    "memory_budget",
    "name_object",
    "named_object",
    "note_source",
    "passing_through",
    "reset_dynamo",
    "schedules_collectives",
    "torch_streams",
    "trace_artifact",
    "trace_autograd",
    "watch_breaks",
    "without_tracing",
]
