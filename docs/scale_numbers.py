"""Compute the tables of docs/scale.md: ``python -m docs.scale_numbers``.

Everything follows from the sizes of the paper's three models (arXiv 2512.24880, appendix), the
parameters that conversion makes, and equation (20). Nothing is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from mhc_compile.costs import parameter_count
from mhc_compile.kernels.spec import SiteSpec
from mhc_compile.kernels.traffic import least_rows
from mhc_compile.passes.recompute import block_length

PAGE = Path(__file__).parent / "scale.md"
BEGIN, END = "<!-- python -m docs.scale_numbers -->\n", "<!-- end -->\n"
N, TOKENS, BYTES = 4, 4096, 2  # streams; tokens of a sequence; bytes of a bfloat16
MIB = 2**20


@dataclass(frozen=True)
class Model:
    """One of the paper's models."""

    name: str
    layers: int
    width: int
    parameters: float
    active: float
    """Parameters that one token meets."""

    @property
    def sites(self) -> int:
        """Two in each layer: attention and feed-forward."""
        return 2 * self.layers


MODELS = (
    Model("3B", 12, 1280, 2.97e9, 612e6),
    Model("9B", 18, 1920, 9.18e9, 1.66e9),
    Model("27B", 30, 2560, 27.0e9, 4.14e9),
)


def parameters(model: Model) -> int:
    """New parameters."""
    return model.sites * parameter_count(SiteSpec(streams=N), model.width)


def kept(model: Model, sites: int, *, blocks: bool) -> int:
    """Bytes a token that ``sites`` sites keep for the backward.

    Without blocks every site keeps its state, u and f; with them one state a block and every f,
    and while one block is made again its states and branch inputs are there as well.
    """
    if not blocks:
        rows = (N + 2) * sites
    else:
        length = block_length(sites, N)
        rows = N * ceil(sites / length) + sites + (N + 1) * length
    return rows * model.width * BYTES


def moved(model: Model) -> int:
    """Bytes a token that a forward and a backward of all sites have to move, as seams."""
    rows = least_rows(N)
    return (rows["seam"] + rows["seam_backward"]) * model.sites * model.width * BYTES


def tables() -> Iterator[str]:
    """The lines of all tables."""
    yield (
        "| model | sites | new parameters | share | with gradients and AdamW's moments "
        "| their products, of all a token needs | moved a token |"
    )
    yield "|---|---|---|---|---|---|---|"
    for model in MODELS:
        new = parameters(model)
        yield (
            f"| {model.name}, width {model.width} | {model.sites} | {new / 1e6:.2f} M "
            f"| {100 * new / model.parameters:.3f} % | {16 * new / MIB:.0f} MiB "
            f"| {100 * new / model.active:.2f} % | {moved(model) / MIB:.2f} MiB |"
        )
    yield ""
    yield (
        "| 27B, stages | sites a stage | L_r | kept a sequence and stage, no blocks | in blocks "
        "| plain residual | an edge, streams | collapsed |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    model = MODELS[-1]
    for stages in (1, 2, 4, 6, 10):
        sites = model.sites // stages
        edge = TOKENS * model.width * BYTES
        streams, collapsed = ("-", "-") if stages == 1 else (_mib(N * edge), _mib(edge))
        yield (
            f"| {stages} | {sites} | {block_length(sites, N)} "
            f"| {_mib(TOKENS * kept(model, sites, blocks=False))} "
            f"| {_mib(TOKENS * kept(model, sites, blocks=True))} "
            f"| {_mib(edge * sites)} | {streams} | {collapsed} |"
        )


def _mib(count: float) -> str:
    return f"{count / MIB:.0f} MiB"


def page(text: str) -> str:
    """``text`` with its tables as they are computed now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join(tables()) + "\n\n" + END + after


def main() -> None:
    """Write them into the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
