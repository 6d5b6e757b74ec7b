"""The frames that Dynamo compiles, and the graphs it makes of them."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
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
        return _root(self._tx.f_code, self._tx.output.local_scope)

    def running_root(self) -> nn.Module | None:
        """The `root` of the call that is under way: one graph may serve many modules of a kind."""
        code = self._tx.f_code
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            running = frame.f_code
            if (running.co_name, running.co_filename) == (code.co_name, code.co_filename):
                return _root(running, frame.f_locals)
            frame = frame.f_back
        return None

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


def _root(code: CodeType, scope: Mapping[str, Any]) -> nn.Module | None:
    first = scope.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, nn.Module):
        return first
    # A resumed frame reorders its variables; torch wraps the forward of its own modules.
    found = scope.get("self", scope.get("fn"))
    return found if isinstance(found, nn.Module) else None


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


def note_source(placeholder: Node) -> Any:
    """Dynamo's source of a placeholder; AOTAutograd wants it on each, and Dynamo adds it late."""
    source = getattr(placeholder, "_dynamo_source", placeholder.meta["grapharg"].source)
    placeholder._dynamo_source = source
    return source


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


def fake_like(
    example: torch.Tensor, shape: Sequence[Any], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A fake input of ``shape`` for the compilation that is under way, otherwise like ``example``.

    Dynamo changes its fake mode between capture and backend; AOTAutograd wants the later one.
    """
    mode = torch._guards.detect_fake_mode() or example.fake_mode  # type: ignore[attr-defined]
    with mode:
        made = torch.empty(shape, dtype=dtype or example.dtype, device=example.device)
    return made.requires_grad_(example.requires_grad)


def is_pending(value: object) -> bool:
    """Whether ``value`` is a collective of eager DTensor code that nobody has waited for yet."""
    kind = sys.modules.get("torch.distributed._functional_collectives")  # not in every build
    return kind is not None and isinstance(value, kind.AsyncCollectiveTensor)


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, real or fake."""
    kind = sys.modules.get("torch.distributed.tensor")
    return kind is not None and isinstance(value, kind.DTensor)
