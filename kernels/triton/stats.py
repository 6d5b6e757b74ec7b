"""What a kernel takes of a GPU that need not be there: compiled ahead of time, and read back.

Triton brings the assemblers and disassemblers of NVIDIA's targets and a compiler for AMD's; no
driver is needed. Only static facts come of it. How often an instruction runs is not among them: one
in a loop counts once, and a loop that was unrolled counts several times.
"""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mhc_compile.errors import KernelError
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.triton.emit import source
from mhc_compile.kernels.triton.load import load
from mhc_compile.kernels.triton.signatures import Variant, aot_variants
from mhc_compile.kernels.triton.targets import TARGETS

_BF16_ARITHMETIC = re.compile(
    r"(?:arith\.(?:add|sub|mul|div|rem|neg|maximum|minimum|maxnum|minnum)f|math\.\w+) .*"
    r": (?:tensor<[^>]*x)?bf16"
)
_SASS_ACCESS = re.compile(r"\b(LDG|STG|LDGSTS|UTMALDG|UTMASTG)\b((?:\.\w+)*)")
_SASS_BITS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_BITS = (("x4", 128), ("x3", 96), ("x2", 64), ("dword", 32), ("short", 16), ("byte", 8))


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelStats:
    """Static resources of one compiled kernel."""

    kernel: str
    target: str
    constants: Mapping[str, int | str]
    """Its width and tile."""
    warps: int
    registers: int
    """For each thread (VGPRs on AMD)."""
    spills: int
    """Bytes of each thread's registers that had to go to memory."""
    shared: int
    """Bytes of shared memory (LDS) of each program."""
    loads: Mapping[int, int]
    """Instructions that load from global memory, by their width in bits."""
    stores: Mapping[int, int]
    """Instructions that store to global memory, likewise."""
    bf16_arithmetic: int
    """Operations on bf16 operands, which round at every step; products of matrices apart."""
    seconds: float
    """Of compilation; a hit in Triton's cache makes it small."""


def site_stats(
    spec: SiteSpec, dtype: torch.dtype, channels: int, target: str
) -> Iterator[KernelStats]:
    """Compile every kernel of a site for a target, one after the other.

    Args:
        spec: the site.
        dtype: of the streams.
        channels: width C.
        target: one of `TARGETS`.

    Raises:
        KernelError: no such target; this process interprets instead of compiling; or a kernel does
            not compile.
    """
    if target not in TARGETS:
        raise KernelError(f"target={target!r} is not allowed: use one of {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("this process interprets kernels: start it without TRITON_INTERPRET")
    module = load(source(spec, dtype))
    for variant in aot_variants(spec, dtype, channels, target):
        yield kernel_stats(getattr(module, variant[0]), variant, target)


def kernel_stats(kernel: Any, variant: Variant, target: str) -> KernelStats:
    """Compile one ``@triton.jit`` kernel for a target, and read what it takes.

    Args:
        kernel: the kernel.
        variant: its name, argument types, constants and options; pointers are taken to be aligned
            to 16 bytes, as those of tensors are.
        target: one of `TARGETS`.

    Raises:
        KernelError: it does not compile.
    """
    name, _, constants, options = variant
    start = time.perf_counter()
    try:
        compiled = _compiled(kernel, variant, target)
    except Exception as error:  # Triton and its assemblers raise whatever they like
        raise KernelError(f"{name} does not compile for {target}: {error}") from error
    seconds = time.perf_counter() - start
    read = _read_nvidia if target.startswith("sm_") else _read_amd
    registers, spills, accesses = read(compiled)
    return KernelStats(
        kernel=name,
        target=target,
        constants=constants,
        warps=int(options["num_warps"]),
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        loads=_by_width(accesses, "load"),
        stores=_by_width(accesses, "store"),
        bf16_arithmetic=len(_BF16_ARITHMETIC.findall(compiled.asm["ttir"])),
        seconds=seconds,
    )


def _compiled(kernel: Any, variant: Variant, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, signature, constants, options = variant
    names = list(kernel.arg_names)
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), TARGETS[target].lanes)
    else:
        gpu = GPUTarget("hip", target, TARGETS[target].lanes)
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    made = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(made, target=gpu, options=dict(options))


def _read_nvidia(compiled: Any) -> tuple[int, int, list[tuple[str, int]]]:
    """Registers, spilled bytes, and every access to global memory with its width."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    accesses = []
    for name, suffixes in _SASS_ACCESS.findall(listing):
        widths = [_SASS_BITS[word] for word in suffixes.split(".") if word in _SASS_BITS]
        accesses.append(("store" if "ST" in name[:2] else "load", widths[0] if widths else 32))
    return int(found[1]), int(found[2]), accesses


def _read_amd(compiled: Any) -> tuple[int, int, list[tuple[str, int]]]:
    """As `_read_nvidia`."""
    text = compiled.asm["amdgcn"]
    found = [
        re.search(rf"\.{name}:\s+(\d+)", text)
        for name in ("vgpr_count", "private_segment_fixed_size")
    ]
    registers, spills = (int(match[1]) for match in found if match is not None)
    accesses = []
    for kind, name in _AMD_ACCESS.findall(text):
        accesses.append((kind, next(bits for word, bits in _AMD_BITS if word in name)))
    return registers, spills, accesses


def _by_width(accesses: list[tuple[str, int]], kind: str) -> dict[int, int]:
    counted = Counter(bits for found, bits in accesses if found == kind)
    return dict(sorted(counted.items(), reverse=True))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
