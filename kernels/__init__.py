"""The mhc op set: specifications, constraints, references and the ops themselves."""

_ADVICE = (
    "the folder 'kernels' lies at the root of the checkout but installs inside mhc_compile: "
    "import mhc_compile.kernels"
)

if __name__ == "mhc_compile.kernels":
    from mhc_compile.kernels import (
        ops_apart,
        ops_ends,
        ops_mix,
        ops_post,
        ops_pre,
        ops_read,
        ops_replay,
        ops_seam,
        ops_seam_norm,
        ops_sinkhorn,
    )

    # Importing them registers torch.ops.mhc.*
    __all__ = [
        "ops_apart",
        "ops_ends",
        "ops_mix",
        "ops_post",
        "ops_pre",
        "ops_read",
        "ops_replay",
        "ops_seam",
        "ops_seam_norm",
        "ops_sinkhorn",
    ]
else:
    # transformers, for one, imports any package called "kernels" that it finds, and must survive
    # being run from a checkout: it is shown an empty namespace. Loading the ops twice would
    # register them twice, so nothing below this folder can be imported from here.
    __path__ = []
    __file__ = None  # type: ignore[assignment]

    def __getattr__(name: str) -> object:
        raise AttributeError(_ADVICE)
