"""Pictures of a `StabilityReport`, with matplotlib (extra ``plots``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhc_compile.errors import ConfigError
from mhc_compile.stability import Mixing, SiteStability, StabilityReport

_MAPS = 16
"""Heat maps in one picture; of more sites, evenly spread ones are shown."""
_COLUMNS = 4
_INK, _FORWARD, _BACKWARD, _SPREAD = "#0f172a", "#d97706", "#2563eb", "#16a34a"
# Without these, an SVG holds a date and random identifiers.
_RC: dict[Any, Any] = {"svg.hashsalt": "mhc", "svg.fonttype": "none"}


def plot_stability(report: StabilityReport, directory: Path) -> list[Path]:
    """Draw heat maps of the mixings, and gains and spread over depth, for each trunk.

    Args:
        report: what `mhc_compile.stability` measured.
        directory: created if need be; gets ``trunk_0_mixings.png``, ``trunk_0_depth.svg`` ...

    Returns:
        The files written. The same report gives the same bytes.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"pictures need matplotlib: pip install 'mhc-compile[plots]' ({error})"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(_RC):
        for trunk in report.trunks:
            sites = [site for site in report.sites if site.trunk == trunk.index]
            for name, draw in (("mixings", _draw_mixings), ("depth", _draw_depth)):
                figure = Figure(layout="constrained")
                draw(figure, sites, trunk.composite)
                for suffix in ("png", "svg"):
                    path = directory / f"trunk_{trunk.index}_{name}.{suffix}"
                    dated = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(path, dpi=120, metadata=dated)
                    written.append(path)
    return written


def _draw_mixings(figure: Any, sites: Sequence[SiteStability], composite: Mixing) -> None:
    """The effective H_res of each site, and the product of all."""
    step = max(1, -(-len(sites) // (_MAPS - 1)))
    maps = [(site.name, site.mixing) for site in sites[::step]]
    maps.append((f"product of {len(sites)} sites", composite))
    rows = -(-len(maps) // _COLUMNS)
    figure.set_size_inches(3.0 * _COLUMNS, 2.7 * rows)
    largest = max(abs(x) for _, mixing in maps for row in mixing.matrix for x in row)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for ax in axes[len(maps) :]:
        ax.set_axis_off()
    for ax, (name, mixing) in zip(axes, maps, strict=False):
        image = ax.imshow(mixing.matrix, cmap="RdBu_r", vmin=-largest, vmax=largest)
        ax.set_title(name, fontsize=8, color=_INK)
        streams = range(len(mixing.matrix))
        ax.set_xticks(streams)
        ax.set_yticks(streams)
        if len(mixing.matrix) <= 6:
            for i in streams:
                for j in streams:
                    dark = abs(mixing.matrix[i][j]) > 0.6 * largest
                    ax.text(j, i, f"{mixing.matrix[i][j]:.2f}", ha="center", va="center",
                            fontsize=7, color="white" if dark else _INK)  # fmt: skip
    figure.colorbar(image, ax=list(axes), shrink=0.7)
    figure.supxlabel("from stream", fontsize=9)
    figure.supylabel("to stream", fontsize=9)


def _draw_depth(figure: Any, sites: Sequence[SiteStability], composite: Mixing) -> None:
    """Gains of each site and of all up to it, and how far the streams are apart."""
    del composite  # the last point of the middle curves
    figure.set_size_inches(7, 7)
    depth = range(1, len(sites) + 1)
    single, product, spread = figure.subplots(3, 1, sharex=True)
    for ax, title, mixings in (
        (single, "gain of one site", [site.mixing for site in sites]),
        (product, "gain of all sites up to here", [site.composite for site in sites]),
    ):
        ax.plot(depth, [m.forward_gain for m in mixings], "o-", ms=3, color=_FORWARD,
                label="forward: max |row sum|")  # fmt: skip
        ax.plot(depth, [m.backward_gain for m in mixings], "s--", ms=3, color=_BACKWARD,
                label="backward: max |column sum|")  # fmt: skip
        ax.axhline(1, color="#94a3b8", lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.legend(fontsize=8)
    if max(s.composite.forward_gain for s in sites) > 10:
        product.set_yscale("log")
    spread.plot(depth, [site.spread for site in sites], "o-", ms=3, color=_SPREAD)
    spread.set_title("spread of the streams that a site reads", fontsize=9)
    spread.set_xlabel("site")
