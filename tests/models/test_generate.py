"""Decoding with a KV cache: a freshly converted model says what the plain one says."""

from typing import Any

import pytest
import torch
import transformers

import mhc_compile

SMALL = {"vocab_size": 61, "max_position_embeddings": 64}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=60,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SMALL, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=60,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("build", [gpt2, llama])
def test_greedy_tokens_are_those_of_the_plain_model(build: Any) -> None:
    model = build().eval()
    tokens = torch.randint(1, 60, (2, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings)
    report = mhc_compile.convert_(model, tokens)
    assert len(report.converted) == 4
    model.forward = torch.compile(model.forward, backend="mhc", options={"inner": "eager"})
    assert torch.equal(model.generate(tokens, **settings), expected)
    cached = model(tokens, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 5
    assert cached.past_key_values.layers[0].keys.shape[-1] == 8  # nothing of n streams in it


@pytest.mark.slow
@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_trained_model_decodes_with_a_cache_as_it_does_without(build: Any) -> None:
    model = build().eval()
    tokens = torch.randint(1, 60, (2, 7))
    mhc_compile.convert_(model, tokens)
    with torch.no_grad():
        for _, parameter in mhc_compile.mhc_parameters(model):
            parameter += 0.3 * torch.randn_like(parameter)
    step = torch.compile(model, backend="mhc", options={"inner": "eager"})
    with torch.no_grad():
        whole = step(tokens, use_cache=False).logits
        first = step(tokens[:, :4], use_cache=True)
        cache = first.past_key_values
        torch.testing.assert_close(first.logits, whole[:, :4], rtol=0, atol=2e-6)
        for position in range(4, 7):
            out = step(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole[:, position], rtol=0, atol=2e-6)
