"""Accelerate DeepSeek-V4, whose hyper-connections are written by hand: nothing is converted.

python examples/accelerate_deepseek.py --layers 2
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import mhc_compile

Gradients = dict[str, torch.Tensor]


def small_model(layers: int) -> nn.Module:
    """A DeepSeek-V4 of random weights, small enough for a CPU."""
    config = DeepseekV4Config(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4,
        num_hidden_layers=layers, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        max_position_embeddings=256,
    )  # fmt: skip
    return DeepseekV4ForCausalLM(config)


def step(call: Callable[..., object], model: nn.Module, ids: torch.Tensor) -> Gradients:
    """The loss of one training step (as "loss") and its gradients."""
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[attr-defined]
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def main(argv: list[str] | None = None) -> float:
    """Compare a step with and without; returns the relative difference of all gradients."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model = small_model(options.layers)
    ids = torch.randint(0, 256, (2, 64))
    report = mhc_compile.explain(model, input_ids=ids, labels=ids, use_cache=False)
    for piece in report.chains:
        before, after = piece.operations
        print(f"{piece.kind} at {piece.source}: {before} -> {after} operations {piece.reason}")

    expected = step(model, model, ids)
    compiled = torch.compile(model, backend="mhc", options={"inner": options.inner})
    start = time.perf_counter()
    found = step(compiled, model, ids)
    print(f"first step, compilation included: {time.perf_counter() - start:.1f} s")
    apart = sum(float((found[n] - value).double().square().sum()) for n, value in expected.items())
    size = sum(float(value.double().square().sum()) for value in expected.values())
    error = (apart / size) ** 0.5
    print(f"loss {float(found['loss']):.4f}, relative difference of the gradients {error:.1e}")
    return error


if __name__ == "__main__":
    main()
