"""Train one small GPT three times: plain residuals, hyper-connections, and mHC.

Byte-level, on the source of Python's own standard library, so that nothing is downloaded. All three
start from the same weights and see the same batches. The residual adds below are ordinary ones; the
models differ in the call of ``convert_`` alone.

    python examples/train_gpt.py --steps 200 --streams 4
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import mhc_compile

VOCABULARY = 256
CONTEXT = 128
BATCH = 16
CORPUS_BYTES = 2_000_000
CONSTRAINTS = {"plain": None, "hyper-connections": "none", "mHC": "sinkhorn"}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix ``x`` (batch, time, width) over time."""
        heads = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm layer: two residual sites."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply attention and MLP to ``x`` (batch, time, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A byte-level language model."""

    def __init__(self, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, time, vocabulary) of the byte after each of ``tokens`` (batch, time)."""
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def corpus() -> torch.Tensor:
    """The first bytes of the standard library's modules, in the order of their names."""
    text = bytearray()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_BYTES:
            break
    return torch.frombuffer(text[:CORPUS_BYTES], dtype=torch.uint8)


def batch_of(text: torch.Tensor, step: int) -> torch.Tensor:
    """The windows (batch, time + 1) of one step, the same for every model."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    return torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).long()


def train(
    name: str, text: torch.Tensor, options: argparse.Namespace, progress: Progress
) -> dict[str, float | str | int]:
    """Train one of the models and return its row of the result."""
    torch.manual_seed(0)
    model = GPT()
    example = batch_of(text, 0)[:, :-1]
    constraint = CONSTRAINTS[name]
    if constraint is None:
        step_model = torch.compile(model, backend=options.inner)
    else:
        config = mhc_compile.MHCConfig(
            streams=options.streams, constraint=constraint, inner=options.inner
        )
        mhc_compile.convert_(model, example, config=config)
        step_model = torch.compile(model, backend="mhc", options={"inner": options.inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)

    losses = []
    task = progress.add_task(name, total=options.steps, loss=float("nan"))
    for step in range(options.steps):
        window = batch_of(text, step)
        logits = step_model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        progress.update(task, advance=1, loss=losses[-1])

    last = losses[-10:]
    row: dict[str, float | str | int] = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
    }
    if constraint is not None:
        (trunk,) = mhc_compile.stability(model, example).trunks
        row["forward_gain"] = trunk.composite.forward_gain
        row["backward_gain"] = trunk.composite.backward_gain
        row["spread"] = trunk.spread
    return row


def show(rows: list[dict[str, float | str | int]], steps: int) -> None:
    """Print the results as a table."""
    table = Table(title=f"After {steps} steps", title_justify="left")
    table.add_column("model", no_wrap=True)
    titles = ("parameters", "first loss", "last loss", "forward gain", "backward gain", "spread")
    for title in titles:
        table.add_column(title.replace(" ", "\n"), justify="right")
    for row in rows:
        cells = [row.get(title.replace(" ", "_")) for title in titles]
        texts = [
            "-" if cell is None else f"{cell:,}" if isinstance(cell, int) else f"{cell:.4f}"
            for cell in cells
        ]
        table.add_row(str(row["model"]), *texts)
    console = Console()
    console.print(table)
    console.print(
        "Last loss: mean of the last 10 steps. Gains: of the product of all stream mixings, "
        "averaged over the tokens of one batch; 1 neither amplifies nor damps. Spread: how far "
        "the streams are apart at the end of the trunk."
    )


def main(argv: list[str] | None = None) -> None:
    """Train all three and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args(argv)

    text = corpus()
    columns = (
        TextColumn("{task.description:>17}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        rows = [train(name, text, options, progress) for name in CONSTRAINTS]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, options.steps)


if __name__ == "__main__":
    main()
