"""Look at a model of your own before and after the rewrite: sites, reasons, pictures.

python examples/inspect_model.py --out graphs
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from mhc_compile.dump import write_dump
from mhc_compile.inspection import trace_stages
from mhc_compile.stages import DumpOptions
from mhc_compile.tables import report_text


class Layer(nn.Module):
    """A convolutional layer: one of its adds is a residual site, the other one is a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to ``x`` (batch, channels, height, width)."""
        return x + torch.tanh(self.mix(self.norm(x)) + self.bias)


def main(argv: list[str] | None = None) -> list[Path]:
    """Write the dump; returns its files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("mhc_dump/inspect_model"))
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(16) for _ in range(6)))
    wanted = DumpOptions(formats=("txt", "svg", "html"))
    report, recorder = trace_stages(model, torch.randn(2, 16, 8, 8), options=wanted)
    files = write_dump(options.out, recorder, report)
    print(report_text(report))
    print(f"{len(files)} files; open {options.out / 'index.html'} in a browser")
    return files


if __name__ == "__main__":
    main()
