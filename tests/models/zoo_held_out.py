"""Models whose true sites were judged from their source before the finder saw any of them."""

import torch

from tests.models.zoo_base import BATCH, LM, VOCAB, encoder, hf, image, tokens
from tests.models.zoo_diffusers import diffusers_model
from tests.models.zoo_timm import timm_model

hf(
    "nystromformer", "NystromformerForMaskedLM", "NystromformerConfig", encoder,
    # With fewer landmarks than tokens its mask does not fit, where Dynamo keeps one.
    num_landmarks=16, segment_means_seq_len=16, conv_kernel_size=5, **LM,
)  # fmt: skip
hf(
    "patchtst", "PatchTSTModel", "PatchTSTConfig",
    lambda: {"past_values": torch.randn(BATCH, 32, 3)},
    num_input_channels=3, context_length=32, patch_length=8, patch_stride=4, d_model=64,
    ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
)  # fmt: skip
hf(
    "swiftformer", "SwiftFormerModel", "SwiftFormerConfig", image(64),
    depths=[2, 1, 2, 1], embed_dims=[16, 24, 32, 48],
)  # fmt: skip
hf(
    "lxmert", "LxmertModel", "LxmertConfig",
    lambda: {
        "input_ids": tokens(),
        "visual_feats": torch.randn(BATCH, 5, 24),
        "visual_pos": torch.rand(BATCH, 5, 4),
    },
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_attention_heads=4, l_layers=2,
    x_layers=2, r_layers=1, visual_feat_dim=24, max_position_embeddings=64,
)  # fmt: skip
hf(
    "informer", "InformerModel", "InformerConfig",
    lambda: {
        "past_values": torch.randn(BATCH, 20),
        "past_time_features": torch.randn(BATCH, 20, 2),
        "past_observed_mask": torch.ones(BATCH, 20),
        "future_values": torch.randn(BATCH, 6),
        "future_time_features": torch.randn(BATCH, 6, 2),
        "use_cache": False,
    },
    prediction_length=6, context_length=13, lags_sequence=[1, 2, 3, 4, 5, 6, 7],
    num_time_features=2, d_model=64, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
)  # fmt: skip
hf(
    "encodec", "EncodecModel", "EncodecConfig",
    lambda: {"input_values": torch.randn(BATCH, 1, 320)},
    upsampling_ratios=[4, 2], num_filters=8, hidden_size=32, codebook_size=16,
    target_bandwidths=[24.0], num_lstm_layers=1,
)  # fmt: skip
timm_model("mvitv2", "mvitv2_tiny", 64, img_size=64)
timm_model("volo", "volo_d1_224", 64, img_size=64)
timm_model("dpn", "dpn68b", 64)
diffusers_model(
    "hunyuan_dit", "HunyuanDiT2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 16, 16),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
        "text_embedding_mask": torch.ones(BATCH, 7, dtype=torch.long),
        "encoder_hidden_states_t5": torch.randn(BATCH, 5, 24),
        "text_embedding_mask_t5": torch.ones(BATCH, 5, dtype=torch.long),
        "image_meta_size": torch.randint(1, 64, (BATCH, 6)),
        "style": torch.zeros(BATCH, dtype=torch.long),
    },
    num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=16,
    hidden_size=64, num_layers=4, cross_attention_dim=32, cross_attention_dim_t5=24,
    pooled_projection_dim=16, text_len=7, text_len_t5=5,
)  # fmt: skip
