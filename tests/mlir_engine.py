"""Run linalg modules with torch-mlir's execution engine: MLIR and LLVM compile them, not torch."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_LOWERING = (
    "linalg-generalize-named-ops",
    "one-shot-bufferize{bufferize-function-boundaries=1 "
    "function-boundary-type-conversion=identity-layout-map}",
    # without modify-public-functions the results would silently stay unwritten
    "buffer-results-to-out-params{modify-public-functions=1}",
    "convert-linalg-to-loops",
    "fold-memref-alias-ops",
    "expand-strided-metadata",
    "lower-affine",
    "convert-scf-to-cf",
    "arith-expand",
    "convert-math-to-llvm",
    "convert-math-to-libm",
    "convert-arith-to-llvm",
    "convert-index-to-llvm",
    "finalize-memref-to-llvm",
    "func.func(llvm-request-c-wrappers)",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "reconcile-unrealized-casts",
)


def run_linalg(
    module: Any, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The results of ``main`` of a linalg-on-tensors module, which is lowered in place.

    Args:
        module: from `mhc_compile.mlir.to_module`.
        inputs: its arguments.
        outputs: tensors of the shapes and dtypes of its results.
    """
    from torch_mlir.execution_engine import ExecutionEngine
    from torch_mlir.passmanager import PassManager
    from torch_mlir.runtime import (
        UnrankedMemRefDescriptor,
        get_ranked_memref_descriptor,
        unranked_memref_to_numpy,
    )

    unranked = ctypes.POINTER(UnrankedMemRefDescriptor)

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, unranked, unranked)
    def copy(size: int, source: Any, target: Any) -> None:
        dtype = np.dtype(f"i{size}")
        unranked_memref_to_numpy(target, dtype)[...] = unranked_memref_to_numpy(source, dtype)

    with module.context:
        PassManager.parse(f"builtin.module({','.join(_LOWERING)})").run(module.operation)
        engine = ExecutionEngine(module, opt_level=1)
    # MLIR's C runtime has it; the wheel comes without.
    engine.raw_register_runtime("memrefCopy", ctypes.cast(copy, ctypes.c_void_p))
    arrays = [np.ascontiguousarray(tensor.detach().numpy()) for tensor in inputs]
    results = [np.full(tensor.shape, np.nan, dtype=arrays[0].dtype) for tensor in outputs]
    descriptors = [get_ranked_memref_descriptor(array) for array in (*arrays, *results)]
    pointers = [ctypes.pointer(ctypes.pointer(descriptor)) for descriptor in descriptors]
    engine.invoke("main", *pointers)
    return [torch.from_numpy(array) for array in results]


def run_iree(module: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of ``main`` of a linalg-on-tensors module, compiled and run by IREE on the CPU.

    Args:
        module: from `mhc_compile.mlir.to_module`; it stays as it is.
        inputs: its arguments.
    """
    import iree.compiler
    import iree.runtime

    binary = iree.compiler.compile_str(
        str(module),
        target_backends=["llvm-cpu"],
        input_type="none",
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    loaded = iree.runtime.load_vm_flatbuffer(binary, driver="local-sync")
    results = loaded.main(*(tensor.detach().numpy() for tensor in inputs))
    return [torch.from_numpy(result.to_host()) for result in results]
