"""`kernel_report`: the generated kernels of a site, and what they take of a target.

Nothing runs: Triton kernels are compiled ahead of time, the C++ is built, and both are read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mhc_compile.errors import ConfigError
from mhc_compile.kernels.cpp import emit as cpp
from mhc_compile.kernels.cpp.build import library_of
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.traffic import least_rows
from mhc_compile.kernels.triton import emit as triton
from mhc_compile.kernels.triton.stats import KernelStats, site_stats
from mhc_compile.kernels.triton.targets import TARGETS as GPUS
from mhc_compile.kernels.triton.traffic import Form, forms
from mhc_compile.tables import Table

TARGETS = (*GPUS, "cpu")
"""What kernels can be generated for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelReport:
    """The kernels of one site on one target."""

    site: str
    """`SiteSpec.encode`."""
    width: int
    dtype: str
    target: str
    source: str
    """The generated text; in C++ that of `pre`, `post` and `seam`."""
    traffic: tuple[Form, ...]
    """Rows of stream per token, for each op and each way to run it."""
    kernels: tuple[KernelStats, ...] = ()
    """On a GPU: what each kernel takes."""
    build: tuple[str, ...] = ()
    """On a CPU: the compiler and its flags."""
    library_bytes: int = 0
    """On a CPU: size of the library that they made."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: C elements of a token."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.width * itemsize

    def to_json(self, *, source: bool = False) -> str:
        """The report as JSON text; with the generated source if asked."""
        data = asdict(self)
        for form in data["traffic"]:
            form["bytes"] = form["rows"] * self.row_bytes
            form["least_bytes"] = form["least"] * self.row_bytes
        if not source:
            del data["source"]
        return json.dumps(data, indent=2, sort_keys=True)


def kernel_report(
    spec: SiteSpec,
    dtype: str,
    width: int,
    target: str,
    tell: Callable[[str], None] = lambda step: None,
) -> KernelReport:
    """Generate, compile and read the kernels of a site.

    Args:
        spec: the site.
        dtype: name of the streams' dtype, such as "bfloat16".
        width: channels C.
        target: one of `TARGETS`.
        tell: is told what begins now.

    Raises:
        ConfigError: a dtype, width or target that there is no kernel for.
        KernelError: a kernel does not compile, or there is no compiler.
    """
    if target not in TARGETS:
        raise ConfigError(f"target={target!r} is not allowed: use one of {', '.join(TARGETS)}")
    allowed = cpp.STREAM_TYPES if target == "cpu" else triton.STREAM_TYPES
    types = {str(kind).removeprefix("torch."): kind for kind in allowed}
    if dtype not in types:
        raise ConfigError(
            f"dtype={dtype!r} is not allowed on {target}: use one of {', '.join(types)}"
        )
    if width < 1:
        raise ConfigError(f"width={width} is not allowed: use a positive number of channels")
    on_cpu = target == "cpu"
    report = KernelReport(
        site=spec.encode(),
        width=width,
        dtype=dtype,
        target=target,
        source=cpp.source(spec, types[dtype]) if on_cpu else triton.source(spec, types[dtype]),
        traffic=tuple(_cpu_forms(spec) if on_cpu else forms(spec)),
    )
    if on_cpu:
        tell("building the C++")
        library, command = library_of(report.source)
        return replace(report, build=command, library_bytes=library.stat().st_size)
    found = []
    for stats in site_stats(spec, types[dtype], width, target):
        tell(f"compiled {stats.kernel}")
        found.append(stats)
    return replace(report, kernels=tuple(found))


def kernel_summary(report: KernelReport) -> str:
    """What the report is about, in a line or two."""
    text = f"{report.site}: {report.width} channels of {report.dtype}, for {report.target}"
    if report.build:
        text += f"\n{' '.join(report.build)}\nlibrary of {report.library_bytes:,} bytes"
    return text


def kernel_tables(report: KernelReport) -> list[Table]:
    """What each kernel takes, and the bytes of each op."""
    rows = [
        (
            stats.kernel,
            " ".join(f"{name}={value}" for name, value in stats.constants.items()),
            str(stats.warps),
            str(stats.registers),
            str(stats.spills),
            f"{stats.shared:,}",
            _widths(stats.loads),
            _widths(stats.stores),
        )
        for stats in report.kernels
    ]
    columns = (
        "kernel", "tile", "warps", "registers", "spilled bytes", "shared bytes",
        "loads (count x bits)", "stores",
    )  # fmt: skip
    resources = Table(title="Resources of a thread or program", columns=columns, rows=tuple(rows))
    moved = [
        (
            form.op,
            " + ".join(form.kernels),
            str(form.rows),
            str(form.least),
            f"{form.rows / form.least:.2f}",
            f"{form.rows * report.row_bytes:,}",
        )
        for form in report.traffic
    ]
    traffic = Table(
        title="Streams moved per token (a row: the channels of one stream)",
        columns=("op", "kernels", "rows", "least", "ratio", "bytes"),
        rows=tuple(moved),
    )
    return [table for table in (resources, traffic) if table.rows]


def write_report(report: KernelReport, folder: Path) -> list[Path]:
    """Write the source and the report as JSON; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / ("kernels.cpp" if report.target == "cpu" else "kernels.py")
    data = folder / "report.json"
    source.write_text(report.source)
    data.write_text(report.to_json() + "\n")
    return [source, data]


def _cpu_forms(spec: SiteSpec) -> list[Form]:
    """The C++ keeps blocks of tokens in the caches between its passes: it moves the least."""
    least = least_rows(spec.streams)
    functions = {op: f"mhc_{op}" for op in least if f"mhc_{op}(" in cpp.source(spec, torch.float32)}
    return [
        Form(op=op, kernels=(name,), rows=least[op], least=least[op])
        for op, name in functions.items()
    ]


def _widths(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in counts.items())
