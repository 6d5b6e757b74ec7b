"""Manifold-constrained hyper-connections by compiler.

``convert_`` a model, then ``torch.compile(model, backend="mhc")``: its residual adds become n
streams, mixed by learned doubly stochastic matrices, with the outputs unchanged at conversion.
"""

from mhc_compile.config import MHCConfig
from mhc_compile.convert import convert_, explain, mhc_parameters, revert_
from mhc_compile.errors import (
    ConfigError,
    KernelError,
    MHCError,
    MHCWarning,
    NotCompiledError,
    UnsupportedGraphError,
    VerificationError,
)
from mhc_compile.report import RejectedAdd, Report, Site, Trunk
from mhc_compile.rewrite import rewrite
from mhc_compile.stability import StabilityReport, stability

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "KernelError",
    "MHCConfig",
    "MHCError",
    "MHCWarning",
    "NotCompiledError",
    "RejectedAdd",
    "Report",
    "Site",
    "StabilityReport",
    "Trunk",
    "UnsupportedGraphError",
    "VerificationError",
    "convert_",
    "explain",
    "mhc_parameters",
    "revert_",
    "rewrite",
    "stability",
]
