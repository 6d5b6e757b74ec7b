"""The mhc op set: specifications, constraints, references and the ops themselves."""

if __name__ != "mhc_compile.kernels":
    raise ImportError(
        f"import it as mhc_compile.kernels, not {__name__!r}: the folder lies at the root of "
        "the checkout but installs inside mhc_compile"
    )

from mhc_compile.kernels import ops_ends, ops_post, ops_pre, ops_sinkhorn

# Importing them registers torch.ops.mhc.*
__all__ = ["ops_ends", "ops_post", "ops_pre", "ops_sinkhorn"]
