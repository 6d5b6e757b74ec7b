"""Convert a transformers GPT-2, show its sites, and train it a few steps.

python examples/convert_gpt2.py --layers 4
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import mhc_compile
from mhc_compile.config import MHCConfig


def main(argv: list[str] | None = None) -> list[float]:
    """Convert, compile and train; returns the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    sizes = {"n_layer": options.layers, "n_embd": 64, "n_head": 4, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    tokens = torch.randint(256, (4, 32))

    report = mhc_compile.convert_(model, tokens, config=MHCConfig(inner=options.inner))
    for site in report.converted:
        print(f"{site.name:24} {site.source:24} {site.parameters:>8,} new parameters")

    # New parameters are few and act on everything: a group of their own, without weight decay.
    new = [parameter for _, parameter in mhc_compile.mhc_parameters(model)]
    old = [p for p in model.parameters() if all(p is not q for q in new)]
    optimizer = torch.optim.AdamW([{"params": old}, {"params": new, "weight_decay": 0.0}], lr=1e-3)
    step = torch.compile(model, backend="mhc", options={"inner": options.inner})
    losses = []
    for _ in range(options.steps):
        loss = step(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses:", "  ".join(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
