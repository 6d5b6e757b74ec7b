"""The only module that touches private or undocumented parts of torch.

`tests/test_torch_private.py` asserts each of them, so that a new torch fails one clear test.
"""

import contextlib
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource
from torch._dynamo.source import UnspecializedNNModuleSource as ModuleSource
from torch._dynamo.source import UnspecializedParamBufferSource as ParameterSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import Source
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_flatten

from mhc_compile.errors import UnsupportedGraphError
from mhc_compile.passes.stream_lowering import StreamTable

Compiled = Callable[..., Any]
_RESUME = "torch_dynamo_resume_in"


class Frame:
    """The Python frame Dynamo is compiling while it calls our backend."""

    def __init__(self, tx: Any, gm: GraphModule) -> None:
        self._tx = tx
        self._gm = gm
        self._sources: dict[int, Source] = {}
        self.modules: dict[int, nn.Module] = {}
        """Every module reachable from the frame's variables, by ``id``."""
        for source, value in self._named_modules():
            self._sources.setdefault(id(value), source)
            if id(value) not in self.modules:  # a part of one that is known brings nothing new
                for module in value.modules():
                    self.modules.setdefault(id(module), module)

    @classmethod
    def current(cls, gm: GraphModule) -> "Frame":
        """The frame ``gm`` was captured from.

        Raises:
            UnsupportedGraphError: the graph does not come straight from Dynamo, or DDP has cut it.
        """
        try:
            tx = InstructionTranslator.current_tx()
        except (AttributeError, RuntimeError):
            tx = None
        if tx is None:
            raise UnsupportedGraphError(
                'the "mhc" backend works inside torch.compile only: '
                'call torch.compile(model, backend="mhc")'
            )
        if gm.graph is not tx.output.graph:
            raise UnsupportedGraphError(
                "DistributedDataParallel cut the graph into pieces before the mhc backend saw it, "
                "so that no piece holds a whole trunk: set torch._dynamo.config.optimize_ddp = "
                "False (or 'python_reducer') before the first call"
            )
        return cls(tx, gm)

    @property
    def root(self) -> nn.Module | None:
        """The module whose forward the frame runs; None for a plain function."""
        code, scope = self._tx.f_code, self._tx.output.local_scope
        first = scope.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            return first
        # A resumed frame reorders its variables; torch wraps the forward of its own modules.
        found = scope.get("self", scope.get("fn"))
        return found if isinstance(found, nn.Module) else None

    @property
    def names(self) -> dict[int, str]:
        """Path of each module below the frame's own, by ``id``."""
        return {} if self.root is None else {id(m): name for name, m in self.root.named_modules()}

    @property
    def is_partial(self) -> bool:
        """Whether a graph break makes this graph only a part of its frame's function."""
        reason = getattr(self._gm, "compile_subgraph_reason", None)
        broken = bool(reason is not None and reason.graph_break)
        return broken or self._tx.f_code.co_name.startswith(_RESUME)

    @property
    def where(self) -> str:
        """``function (file:line)`` of the frame, for messages."""
        code, root = self._tx.f_code, self.root
        forward = getattr(type(root), "forward", None)
        if forward is not None and getattr(forward, "__code__", None) is code:
            # Of a converted module this is ours, see `mhc_compile.guard`: name the user's.
            code = getattr(inspect.unwrap(forward), "__code__", code)
        elif root is not None and code.co_name != "forward":  # a wrapper of torch's around it
            return f"the forward of {type(root).__name__}"
        return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"

    def lift(self, owner: nn.Module, path: Sequence[str], name: str) -> Node:
        """A placeholder of the captured graph for a parameter below ``owner``.

        Dynamo itself makes it, with its guards, as if the user's code had read the parameter; it
        then passes the parameter on every call. Lifting one twice gives the same placeholder.
        """
        source, module = self._source_of(owner), owner
        for key in path:
            source = ModuleSource(DictGetItemSource(AttrSource(source, "_modules"), key))
            module = module.get_submodule(key)
        source = DictGetItemSource(ParameterSource(source, "_parameters"), name)
        node = VariableBuilder(self._tx, source)(getattr(module, name)).as_proxy().node
        node._dynamo_source = node.meta["grapharg"].source
        assert isinstance(node, Node)
        return node

    def _named_modules(self) -> Iterator[tuple[Source, nn.Module]]:
        """Modules on the source chain of any input of the graph, and the frame's own variables."""
        seen: set[str] = set()
        for node in self._gm.graph.nodes:
            source = getattr(node, "_dynamo_source", None) if node.op == "placeholder" else None
            while source is not None:
                if source.name not in seen:  # a source and its wrapper share their name
                    seen.add(source.name)
                    value = self._evaluate(source)
                    if isinstance(value, nn.Module):
                        yield source, value
                source = getattr(source, "base", None)
        # A variable of an enclosing function is in the scope too, but is no local to load.
        for name in self._tx.f_code.co_varnames:
            value = self._tx.output.local_scope.get(name)
            if isinstance(value, nn.Module):
                yield ModuleSource(LocalSource(name, is_input=True)), value

    def _evaluate(self, source: Source) -> Any:
        try:
            return eval(
                source.name, {"L": self._tx.output.local_scope, "G": self._tx.output.global_scope}
            )
        except Exception:
            return None

    def _source_of(self, owner: nn.Module) -> Source:
        known = self._sources.get(id(owner))
        if known is not None:
            return known
        for ident, source in list(self._sources.items()):
            ancestor = self.modules[ident]
            for path, module in ancestor.named_modules():
                if module is owner:
                    for key in path.split("."):
                        source = ModuleSource(
                            DictGetItemSource(AttrSource(source, "_modules"), key)
                        )
                    self._sources[id(owner)] = source
                    return source
        raise UnsupportedGraphError(
            f"no variable of {self.where} leads to the {type(owner).__name__} that adds"
        )


def copy_captured(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of a captured graph to rewrite, and where each node went.

    Dynamo builds its calls from the given graph after the backend returned: that stays whole.
    """
    graph = Graph()
    where: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, where))
    for old, new in where.items():
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy, where


def copy_signature(source: Graph, target: Graph, *, inputs: bool, outputs: bool) -> None:
    """Give ``target`` the call of the exported graph ``source``: its arguments, its result or both.

    An exported graph takes and returns flat lists; what it shows to its caller is a tree.
    """
    info = getattr(source._codegen, "pytree_info", None)
    if info is None or not (inputs or outputs):
        return
    names = [node.name for node in target.nodes if node.op == "placeholder"]
    made = _PyTreeInfo(
        orig_args=info.orig_args if inputs else names,
        in_spec=info.in_spec if inputs else tree_flatten((tuple(names), {}))[1],
        out_spec=info.out_spec if outputs else None,
    )
    target.set_codegen(_PyTreeCodeGen(made))


def example_of(placeholder: Node) -> Any:
    """The real value Dynamo will pass for a placeholder of its graph."""
    return placeholder.meta["grapharg"].example


def fake_like(example: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """A fake input of ``shape`` for the compilation that is under way, otherwise like ``example``.

    Dynamo changes its fake mode between capture and backend; AOTAutograd wants the later one.
    """
    mode = torch._guards.detect_fake_mode() or example.fake_mode  # type: ignore[attr-defined]
    with mode:
        made = torch.empty(shape, dtype=example.dtype, device=example.device)
    return made.requires_grad_(example.requires_grad)


def is_pending(value: object) -> bool:
    """Whether ``value`` is a collective of eager DTensor code that nobody has waited for yet."""
    kind = sys.modules.get("torch.distributed._functional_collectives")  # not in every build
    return kind is not None and isinstance(value, kind.AsyncCollectiveTensor)


@dataclass(frozen=True, slots=True)
class Lowering:
    """Changes that graphs of AOTAutograd go through before they run, or Inductor compiles them."""

    run: Callable[[str, GraphModule], bool]
    """Changes a graph, of phase "fw" or "bw", in place; returns whether the order is to stay."""
    key: str
    """Settings that the result depends on; part of Inductor's cache key."""
    files: tuple[str, ...]
    """Source files that it depends on, likewise."""
    side_stream: bool = False
    """Whether it may put work on a second stream. Streams and events are numbers in the graph, and
    mean objects of this process: nothing that is made of it goes to a cache."""


def compile_inductor(
    gm: GraphModule, inputs: Sequence[Any], mode: str | None, lowering: Lowering | None = None
) -> Compiled:
    """Inductor's own entry point, with the settings of a ``torch.compile`` mode.

    Args:
        gm: the graph, which is consumed.
        inputs: its example inputs.
        mode: of ``torch.compile``.
        lowering: what happens to the graphs behind all graph passes of Inductor (and of the user).
            Not if Inductor finds a result in its cache: there it has been done.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    patches: dict[str, Any] = list_mode_options(mode) if mode else {}
    if lowering is not None:
        own = get_custom_graph_passes(config.post_grad_custom_post_pass)
        patches["post_grad_custom_post_pass"] = (*own, _last_pass(lowering))
        # What is patched returns to its value behind each graph, whatever a pass makes of it.
        patches.setdefault("reorder_for_peak_memory", config.reorder_for_peak_memory)
        if lowering.side_stream:
            # Inductor would reuse a buffer behind its last reader in the program, which may be
            # running still on the other stream; torch's allocator knows who holds a block.
            patches["allow_buffer_reuse"] = False
    return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]


def _last_pass(lowering: Lowering) -> Any:
    """``lowering`` in the place that Inductor has for graph passes of others."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class LastPass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            module = graph.owning_module
            assert module is not None
            if lowering.run(_phase(), module):
                config.reorder_for_peak_memory = False  # it might undo the order

        def uuid(self) -> Any:
            if lowering.side_stream:
                return None
            return get_hash_for_files(lowering.files, lowering.key)

    return LastPass()


def compile_aot_eager(
    gm: GraphModule, inputs: Sequence[Any], lowering: Lowering | None = None
) -> Compiled:
    """AOTAutograd with its partitioner, and graphs that run operation by operation.

    Args:
        gm: the graph.
        inputs: its example inputs.
        lowering: what happens to the forward and to the backward graph.
    """
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def compiler(traced: GraphModule, traced_inputs: Sequence[Any]) -> Any:
        if lowering is not None:
            lowering.run(_phase(), traced)
        return nop(traced, traced_inputs)

    return aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)(
        gm, inputs
    )


def _phase() -> str:
    """Which graph AOTAutograd has compiled right now: "fw" (with or without gradients) or "bw"."""
    from torch._functorch._aot_autograd.logging_utils import get_graph_being_compiled

    return "bw" if "backward" in get_graph_being_compiled() else "fw"


def schedules_collectives() -> bool:
    """Whether the user has Inductor itself move collectives and waits apart."""
    from torch._inductor import config

    return bool(
        config.aten_distributed_optimizations.enable_overlap_scheduling
        or config.reorder_for_compute_comm_overlap
    )


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


def trace_autograd(
    gm: GraphModule, inputs: Sequence[Any], see: Callable[[str, GraphModule], None]
) -> None:
    """Show what AOTAutograd makes of a graph: "joint", "fw" and "bw"; without gradients "fw"."""
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        see("joint", joint)  # the partitioner changes it
        forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)
        see("fw", forward)
        see("bw", backward)
        return forward, backward

    def inference(forward: GraphModule, example_inputs: Sequence[Any]) -> Any:
        see("fw", forward)
        return nop(forward, example_inputs)

    aot_autograd(fw_compiler=nop, inference_compiler=inference, partition_fn=partition)(gm, inputs)


def custom_op_bodies(namespace: str) -> dict[Any, Callable[..., Any]]:
    """Operator -> the Python function it was made from, for ``torch.library`` ops."""
    from torch._library.custom_ops import OPDEFS

    return {
        definition._opoverload: definition._init_fn
        for name, definition in OPDEFS.items()
        if name.startswith(f"{namespace}::")
    }


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``), where tlparse lists it."""
    torch._logging._internal.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload
    )


def memory_budget() -> float:
    """Share of the activations that AOTAutograd may keep, as the user has set it; 1 if not."""
    return float(torch._functorch.config.activation_memory_budget)


def passing_through(error: Exception) -> Exception:
    """``error`` as an exception that Dynamo hands to the user as it is.

    Others become a BackendCompilerFailed, which ``except UnsupportedGraphError`` does not catch.
    """
    kind = type(error)

    def init(self: Any, message: str) -> None:
        # A ValueError among the bases keeps the initialisers from calling each other.
        ShortenTraceback.__init__(self, message, first_useful_frame=None)

    cls = type(kind.__name__, (kind, ShortenTraceback), {
        "__module__": kind.__module__, "__init__": init,
    })  # fmt: skip
    return cls(str(error)).with_traceback(error.__traceback__)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class GraphBreak:
    """Where Dynamo could not go on, and what it says of it."""

    source: str
    """``file.py:123`` of the user's line."""
    reason: str
    """Its explanation, and the setting that it proposes where there is one."""


class _BreakHandler(logging.Handler):
    """Reads graph breaks off Dynamo's log: it keeps no list of those that give up a whole frame."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[GraphBreak] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = _BREAK.search(record.getMessage())
        if found is not None:
            path, line, text = found.groups()
            lines = [part.strip() for part in text.splitlines()]
            told = [part for part in lines if part.startswith("Explanation:")][:1] or lines[:1]
            told += [p for p in lines if p.startswith("Hint:") and "torch._dynamo.config" in p]
            reason = " ".join(told).removeprefix("Explanation: ")
            name = path.replace(chr(92), "/").rsplit("/", 1)[-1]
            self.breaks.append(GraphBreak(f"{name}:{line}", reason))


_BREAK = re.compile(r"in user code at (.+):(\d+)\nGraph Break Reason: (.*)", re.DOTALL)


@contextlib.contextmanager
def watch_breaks() -> Iterator[list[GraphBreak]]:
    """The graph breaks that happen inside, in their order; what the user logs stays the same."""
    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    was_on, level, propagate = logger.isEnabledFor(logging.DEBUG), logger.level, logger.propagate
    handler = _BreakHandler()
    logger.addHandler(handler)
    if not was_on:
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    try:
        yield handler.breaks
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def reset_dynamo() -> None:
    """Forget everything compiled so far."""
    torch._dynamo.reset()


def without_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as something Dynamo neither traces nor guards on."""
    return torch._dynamo.disable(function)  # type: ignore[no-untyped-call, no-any-return]
