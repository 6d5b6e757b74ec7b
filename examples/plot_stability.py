"""Train a small GPT with hyper-connections and with mHC, and plot how their gains part.

    python examples/plot_stability.py --steps 200 --out stability

Writes a CSV of every measurement and, where matplotlib is installed, heat maps and depth curves.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from train_gpt import GPT, batch_of, corpus

import mhc_compile
from mhc_compile.config import MHCConfig
from mhc_compile.plots import plot_stability
from mhc_compile.render import show
from mhc_compile.stability import StabilityReport
from mhc_compile.stability_log import StabilityLog
from mhc_compile.tables import Table


def train(constraint: str, options: argparse.Namespace) -> list[tuple[int, StabilityReport]]:
    """Train one model; returns what was measured, by step."""
    torch.manual_seed(0)
    text, model = corpus(), GPT(layers=options.layers)
    example = batch_of(text, 0)[:, :-1]
    config = MHCConfig(constraint=constraint, inner=options.inner)
    mhc_compile.convert_(model, example, config=config)
    csv = options.out / f"{constraint}.csv"
    log = StabilityLog(model, example[:4], every=options.every, csv_path=csv)
    step_model = torch.compile(model, backend="mhc", options={"inner": options.inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    for step in range(options.steps + 1):
        log(step)
        window = batch_of(text, step)
        logits = step_model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return log.reports


def main(argv: list[str] | None = None) -> Table:
    """Train both, print the gains over time, and plot; returns the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    parser.add_argument("--out", type=Path, default=Path("mhc_dump/stability"))
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    options = parser.parse_args(argv)
    rows = []
    for name, constraint in (("hyper-connections", "none"), ("mHC", "sinkhorn")):
        reports = train(constraint, options)
        for step, report in reports:
            (trunk,) = report.trunks
            gains = (trunk.composite.forward_gain, trunk.composite.backward_gain, trunk.spread)
            rows.append((name, str(step), *(f"{gain:.4f}" for gain in gains)))
        if options.plots:
            plot_stability(reports[-1][1], options.out / constraint)
    table = Table(
        title="Gains of the whole trunk",
        columns=("model", "step", "forward gain", "backward gain", "spread"),
        rows=tuple(rows),
    )
    show("Product of all stream mixings, averaged over the tokens of one batch", [table])
    return table


if __name__ == "__main__":
    main()
