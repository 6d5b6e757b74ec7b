"""Modes of use of a transformers model: gradient checkpointing, inference mode."""

from typing import Any

import torch
import transformers

import mhc_compile


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, max_position_embeddings=64, hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0,
        eos_token_id=60, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gradients(call: Any, model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_of_transformers_keeps_the_gradients() -> None:
    tokens = torch.randint(1, 60, (2, 5))
    expected = gradients(plain := llama().train(), plain, tokens)
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report = mhc_compile.convert_(model, tokens)
    assert len(report.converted) == 4
    assert len(report.trunks) == 1
    step = torch.compile(model, backend="mhc", options={"inner": "aot_eager"})
    found = gradients(step, model, tokens)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * largest, name


def test_a_converted_model_runs_in_inference_mode_and_trains_afterwards() -> None:
    tokens = torch.randint(1, 60, (2, 5))
    model = llama().eval()
    with torch.no_grad():
        expected = model(tokens).logits
    mhc_compile.convert_(model, tokens)
    step = torch.compile(model, backend="mhc", options={"inner": "aot_eager"})
    with torch.inference_mode():
        torch.testing.assert_close(step(tokens).logits, expected, rtol=0, atol=2e-6)
    new = [name for name, _ in mhc_compile.mhc_parameters(model)]
    assert set(new) <= gradients(step, model, tokens).keys()
