"""Convert a transformers ViT and check that its function is kept.

python examples/convert_vit.py --streams 2
"""

import argparse

import torch
from transformers import ViTConfig, ViTForImageClassification

import mhc_compile
from mhc_compile.config import MHCConfig


def main(argv: list[str] | None = None) -> float:
    """Convert and compare; returns the largest difference of the logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).logits

    report = mhc_compile.convert_(
        model, images, config=MHCConfig(streams=options.streams, inner=options.inner)
    )
    compiled = torch.compile(model, backend="mhc", options={"inner": options.inner})
    with torch.no_grad():
        difference = float((compiled(images).logits - expected).abs().max())
    print(f"{len(report.converted)} sites in {len(report.trunks)} trunk")
    print(f"largest difference of the logits: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
