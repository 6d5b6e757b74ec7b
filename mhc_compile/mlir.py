"""Graphs as MLIR, through torch-mlir (extra ``mlir``): to read, to lower, and to check by.

The graph is traced again with torch-mlir's decompositions, so that only operations are left that it
knows; sizes become static there. Parameters stay arguments: no weights are written.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mhc_compile._torch_private import custom_op_bodies
from mhc_compile.errors import ConfigError, UnsupportedGraphError
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.passes.values import value_of

_ELIDED = 16
"""Elements above which a constant is not printed."""
_TO_BACKEND = "torchdynamo-export-to-torch-backend-pipeline{extra-library=}"
_PIPELINES = {
    "linalg": "torch-backend-to-linalg-on-tensors-backend-pipeline",
    "stablehlo": "torch-backend-to-stablehlo-backend-pipeline",
    "tosa": "torch-backend-to-tosa-backend-pipeline",
}
_FAILED = re.compile(r"operation '([\w.]+)'")
# An end that is "as far as it goes" makes some lowerings unroll for minutes.
_SLICES = (torch.ops.aten.slice.Tensor, torch.ops.aten.slice_scatter.default)


def to_mlir(gm: GraphModule, *, dialect: str = "torch", custom: str = "opaque") -> str:
    """The text of ``gm`` in an MLIR dialect, large constants elided.

    Args:
        gm: a graph of ATen and mhc ops, as AOTAutograd makes it.
        dialect: ``"torch"``, ``"linalg"``, ``"stablehlo"`` or ``"tosa"``.
        custom: ``"opaque"`` leaves the mhc ops as operators, which only the torch dialect can say;
            ``"decompose"`` writes out what they consist of.

    Raises:
        ConfigError: torch-mlir is missing, or the dialect has no form of opaque operators.
        UnsupportedGraphError: torch-mlir cannot lower the graph; says which operation.
    """
    module = to_module(gm, dialect=dialect, custom=custom)
    text = module.operation.get_asm(large_elements_limit=_ELIDED, large_resource_limit=_ELIDED)
    return str(text)


def to_module(gm: GraphModule, *, dialect: str = "torch", custom: str = "opaque") -> Any:
    """`to_mlir` as a ``torch_mlir.ir.Module``, nothing elided."""
    check_mlir(dialect, custom)
    fx = _torch_mlir("torch_mlir.fx")
    passes = _torch_mlir("torch_mlir.passmanager")
    ir = _torch_mlir("torch_mlir.ir")
    module = fx.stateless_fx_import(_retraced(gm, decompose=custom == "decompose"))
    if dialect != "torch":
        steps = (
            f"torchdynamo-export-to-torch-backend-pipeline{{extra-library=}},{_PIPELINES[dialect]}"
        )
        try:
            with module.context:
                passes.PassManager.parse(f"builtin.module({steps})").run(module.operation)
        except ir.MLIRError as error:
            failed = sorted(set(_FAILED.findall(str(error)))) or str(error).splitlines()[:2]
            raise UnsupportedGraphError(
                f"torch-mlir cannot lower {' and '.join(failed)} to {dialect}: "
                "mlir_dialect='torch' takes every graph"
            ) from error
    return module


def check_mlir(dialect: str, custom: str) -> None:
    """Refuse what cannot work before any graph is captured.

    Raises:
        ConfigError: torch-mlir is missing, or the dialect has no form of opaque operators.
    """
    if custom == "opaque" and dialect != "torch":
        raise ConfigError(
            f"mlir_custom='opaque' is not allowed with mlir_dialect={dialect!r}: only the torch "
            "dialect has operators it knows nothing of; use mlir_custom='decompose'"
        )
    _torch_mlir("torch_mlir.fx")


@cache
def _torch_mlir(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"format mlir needs torch-mlir: pip install 'mhc-compile[mlir]' ({error})"
        ) from error


def _retraced(gm: GraphModule, *, decompose: bool) -> GraphModule:
    table = _torch_mlir("torch_mlir.extras.fx_decomp_util").get_decomposition_table()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [_example(node) for node in placeholders]
    interpreter = _Writer(gm) if decompose else Interpreter(gm)

    def run(*args: Any) -> list[torch.Tensor]:
        outputs = pytree.tree_leaves(interpreter.run(*args))
        # A backward graph says None for what needs no gradient.
        return [output for output in outputs if isinstance(output, torch.Tensor)]

    with torch.fx.traceback.preserve_node_meta(), mode, torch.no_grad():
        traced = make_fx(run, decomposition_table=table)(*inputs)
    for node in traced.graph.nodes:
        if node.target in _SLICES:
            _clamp_end(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _example(node: Node) -> Any:
    """A static value like that of an input, made in the fake mode that is active."""
    value = value_of(node)
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride = [int(s) for s in value.shape], [int(s) for s in value.stride()]
    return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


class _Writer(Interpreter):
    """Runs the bodies of mhc ops in place of the ops, as plain torch."""

    def call_function(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        body = custom_op_bodies("mhc").get(target)
        if body is None:
            return super().call_function(target, args, kwargs)
        return body(*_plain(args), **kwargs)


def _plain(args: Sequence[Any]) -> list[Any]:
    """The arguments with kernels switched off in the specification, which is a text among them."""
    return [_without_kernels(arg) if isinstance(arg, str) else arg for arg in args]


def _without_kernels(text: str) -> str:
    if not text.startswith("n="):  # "mean" and "sum" are texts as well
        return text
    words = [word for word in text.split() if not word.startswith("kernels=")]
    return SiteSpec.decode(" ".join([*words, "kernels=reference"])).encode()


def _clamp_end(node: Node) -> None:
    position = 3 if node.target is torch.ops.aten.slice.Tensor else 4
    if len(node.args) <= position:
        return
    source, end, axis = (
        value_of(node.all_input_nodes[0]),
        node.args[position],
        node.args[position - 2],
    )
    if isinstance(source, torch.Tensor) and isinstance(end, int) and isinstance(axis, int):
        end = min(end, int(source.shape[axis]))
        node.args = (*node.args[:position], end, *node.args[position + 1 :])
