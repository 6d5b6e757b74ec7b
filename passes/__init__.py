"""Graph passes: analyses and rewrites of FX graphs, one concern a module."""

if __name__ != "mhc_compile.passes":
    raise ImportError(
        f"import it as mhc_compile.passes, not {__name__!r}: the folder lies at the root of the "
        "checkout but installs inside mhc_compile"
    )
