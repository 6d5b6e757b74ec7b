"""Language models of transformers."""

from tests.models.zoo_base import GQA, LM, TOKENS, VOCAB, causal, encoder, hf, seq2seq

# ---------------------------------------------------------------------- decoders
hf(
    "gpt2", "GPT2LMHeadModel", "GPT2Config", causal(),
    vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=64, **TOKENS,
)  # fmt: skip
hf("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", causal(), use_parallel_residual=True, **LM)
hf("llama", "LlamaForCausalLM", "LlamaConfig", causal(), **GQA)
hf(
    "mixtral", "MixtralForCausalLM", "MixtralConfig", causal(),
    num_local_experts=4, num_experts_per_tok=2, **GQA,
)  # fmt: skip
hf(
    "gemma2", "Gemma2ForCausalLM", "Gemma2Config", causal(),
    head_dim=16, sliding_window=8, **GQA,
)  # fmt: skip
hf(
    "falcon", "FalconForCausalLM", "FalconConfig", causal(),
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    parallel_attn=True, new_decoder_architecture=False, **TOKENS,
)  # fmt: skip
hf(
    "opt", "OPTForCausalLM", "OPTConfig", causal(),
    vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=64,
)  # fmt: skip
hf(
    "mpt", "MptForCausalLM", "MptConfig", causal(),
    vocab_size=VOCAB, d_model=64, n_layers=3, n_heads=4, expansion_ratio=2, max_seq_len=64,
)  # fmt: skip
hf("cohere", "CohereForCausalLM", "CohereConfig", causal(), **GQA)
hf(
    "granite", "GraniteForCausalLM", "GraniteConfig", causal(),
    residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.0156,
    logits_scaling=8.0, **GQA,
)  # fmt: skip
hf(
    "mamba", "MambaForCausalLM", "MambaConfig", causal(6),
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, state_size=4,
)  # fmt: skip
hf(
    "rwkv", "RwkvForCausalLM", "RwkvConfig", causal(6),
    vocab_size=VOCAB, hidden_size=64, attention_hidden_size=64, num_hidden_layers=3,
    intermediate_size=96, context_length=32,
)  # fmt: skip
hf(
    "deepseek_v4", "DeepseekV4ForCausalLM", "DeepseekV4Config", causal(),
    vocab_size=VOCAB, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    max_position_embeddings=64, hc_mult=4, hc_sinkhorn_iters=3,
)  # fmt: skip
hf(
    "gemma3n", "Gemma3nForCausalLM", "Gemma3nTextConfig", causal(),
    head_dim=16, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16,
    layer_types=["full_attention"] * 3, num_kv_shared_layers=0, laurel_rank=8,
    activation_sparsity_pattern=[0.0] * 3, altup_num_inputs=4, **GQA,
)  # fmt: skip

for _name, _model in {
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma": "Gemma",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "starcoder2": "Starcoder2",
    "glm4": "Glm4",
    "stablelm": "StableLm",
    "phi": "Phi",
}.items():
    hf(
        _name, f"{_model}ForCausalLM", f"{_model}Config", causal(),
        head_dim=16, pad_token_id=0, **TOKENS, **GQA,
    )  # fmt: skip
hf(
    "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", causal(),
    head_dim=16, sliding_window=8, **GQA,
)  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
hf(
    "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", causal(),
    head_dim=16, moe_intermediate_size=32, **_EXPERTS, **GQA,
)  # fmt: skip
hf(
    "qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", causal(),
    head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    layer_types=["linear_attention", "full_attention", "linear_attention"], **_EXPERTS, **GQA,
)  # fmt: skip
hf(
    "gpt_oss", "GptOssForCausalLM", "GptOssConfig", causal(),
    head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], **GQA,
)  # fmt: skip
hf(
    "deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", causal(),
    moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, **LM,
)  # fmt: skip
_GPT = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, **TOKENS}
hf("gptj", "GPTJForCausalLM", "GPTJConfig", causal(), rotary_dim=8, **_GPT)
hf("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", causal(), **_GPT)
hf("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", encoder, **_GPT)
hf(
    "bloom", "BloomForCausalLM", "BloomConfig", causal(),
    vocab_size=VOCAB, hidden_size=64, n_layer=3, n_head=4, **TOKENS,
)  # fmt: skip
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
hf(
    "mamba2", "Mamba2ForCausalLM", "Mamba2Config", causal(),
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, state_size=8, num_heads=8, head_dim=16,
    n_groups=1, chunk_size=8,
)  # fmt: skip
hf(
    "jamba", "JambaForCausalLM", "JambaConfig", causal(6),
    attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, mamba_d_state=4,
    mamba_dt_rank=4, use_mamba_kernels=False, **_EXPERTS, **GQA,
)  # fmt: skip
hf(
    "bamba", "BambaForCausalLM", "BambaConfig", causal(),
    attn_layer_indices=[1], mamba_chunk_size=8, **_SSM, **GQA,
)  # fmt: skip
hf(
    "falcon_h1", "FalconH1ForCausalLM", "FalconH1Config", causal(),
    mamba_d_ssm=128, mamba_chunk_size=8, **_SSM, **GQA,
)  # fmt: skip
hf(
    "recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", causal(6),
    lru_width=64, attention_window_size=8, block_types=["recurrent", "attention", "recurrent"],
    **GQA,
)  # fmt: skip
hf(
    "lfm2", "Lfm2ForCausalLM", "Lfm2Config", causal(),
    layer_types=["conv", "full_attention", "conv"], **GQA,
)  # fmt: skip

# ---------------------------------------------------------------------- encoders
hf("bert", "BertForMaskedLM", "BertConfig", encoder, **LM)
hf(
    "albert", "AlbertForMaskedLM", "AlbertConfig", encoder,
    embedding_size=32, num_hidden_groups=1, inner_group_num=1, **LM,
)  # fmt: skip
hf(
    "deberta_v2", "DebertaV2ForMaskedLM", "DebertaV2Config", encoder,
    relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    max_relative_positions=16, **LM,
)  # fmt: skip
hf(
    "fnet", "FNetForMaskedLM", "FNetConfig", encoder,
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    max_position_embeddings=64,
)  # fmt: skip
hf(
    "t5", "T5ForConditionalGeneration", "T5Config", seq2seq,
    vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2,
    num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
hf(
    "bart", "BartForConditionalGeneration", "BartConfig", seq2seq,
    vocab_size=VOCAB, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
    max_position_embeddings=64, **TOKENS,
)  # fmt: skip
for _name, _model in {
    "roberta": "Roberta",
    "deberta": "Deberta",
    "esm": "Esm",
    "megatron_bert": "MegatronBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "squeezebert": "SqueezeBert",
}.items():
    hf(
        _name,
        f"{_model}ForMaskedLM",
        f"{_model}Config",
        encoder,
        embedding_size=64,
        pad_token_id=0,
        **LM,
    )
hf(
    "distilbert", "DistilBertForMaskedLM", "DistilBertConfig", encoder,
    vocab_size=VOCAB, dim=64, hidden_dim=96, n_layers=3, n_heads=4, max_position_embeddings=64,
)  # fmt: skip
hf(
    "xlnet", "XLNetLMHeadModel", "XLNetConfig", encoder,
    vocab_size=VOCAB, d_model=64, n_layer=3, n_head=4, d_inner=96, **TOKENS,
)  # fmt: skip
hf("longformer", "LongformerForMaskedLM", "LongformerConfig", encoder, attention_window=8, **LM)
hf(
    "mobilebert", "MobileBertForMaskedLM", "MobileBertConfig", encoder,
    embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=4, **LM,
)  # fmt: skip
_STACKS = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    **TOKENS,
}
hf("mbart", "MBartForConditionalGeneration", "MBartConfig", seq2seq, **_STACKS)
hf("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", seq2seq, **_STACKS)
hf("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", seq2seq, **_STACKS)
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
hf("umt5", "UMT5ForConditionalGeneration", "UMT5Config", seq2seq, **_T5)
hf(
    "switch_transformers", "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig", seq2seq, num_experts=4, num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1, **_T5,
)  # fmt: skip
