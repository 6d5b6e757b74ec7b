"""Vision, speech and two-tower models of transformers."""

import torch
from torch import nn

from tests.models.zoo_base import (
    BATCH,
    LM,
    SPEECH,
    TOKENS,
    VIT,
    VOCAB,
    Inputs,
    audio,
    hf,
    image,
    register,
    tokens,
    transformers,
)

# ---------------------------------------------------------------------- vision, speech, two towers
hf("vit", "ViTModel", "ViTConfig", image(32), **VIT)
hf(
    "swin_hf", "SwinModel", "SwinConfig", image(64),
    image_size=64, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4,
    drop_path_rate=0.1,
)  # fmt: skip
hf(
    "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", image(64),
    num_encoder_blocks=4, depths=[1, 2, 1, 1], hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 1, 2, 2], sr_ratios=[4, 2, 2, 1], decoder_hidden_size=32, num_labels=5,
)  # fmt: skip
hf("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", audio, **SPEECH)
hf(
    "conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", audio,
    conv_depthwise_kernel_size=5, **SPEECH,
)  # fmt: skip
hf(
    "clip", "CLIPModel", "CLIPConfig",
    lambda: {"input_ids": tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)},
    text_config={**LM, "max_position_embeddings": 32, "pad_token_id": 0, **TOKENS},
    vision_config={**VIT, "num_hidden_layers": 2}, projection_dim=32,
)  # fmt: skip


def _detr() -> tuple[nn.Module, Inputs]:
    library = transformers()
    backbone = library.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = library.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_queries=5,
    )
    return library.DetrForObjectDetection(config), image(64)()


register("detr", "transformers", _detr)

hf("dinov2", "Dinov2Model", "Dinov2Config", image(32), mlp_ratio=2, **VIT)
hf("deit", "DeiTModel", "DeiTConfig", image(32), **VIT)
hf("beit", "BeitModel", "BeitConfig", image(32), **VIT)
hf(
    "yolos",
    "YolosModel",
    "YolosConfig",
    image(32),
    num_detection_tokens=5,
    **{**VIT, "image_size": [32, 32]},
)
hf(
    "videomae", "VideoMAEModel", "VideoMAEConfig",
    lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32)}, num_frames=4, **VIT,
)  # fmt: skip
hf(
    "focalnet", "FocalNetModel", "FocalNetConfig", image(64),
    image_size=64, patch_size=4, embed_dim=16, depths=[2, 3], hidden_sizes=[16, 32],
    focal_levels=[2, 2], focal_windows=[3, 3],
)  # fmt: skip
hf(
    "mobilevit", "MobileViTModel", "MobileViTConfig", image(64),
    image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96],
    num_attention_heads=4, initializer_range=0.15,
)  # fmt: skip
hf(
    "siglip", "SiglipModel", "SiglipConfig",
    lambda: {"input_ids": tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)},
    text_config={**LM, "max_position_embeddings": 16, "projection_size": 64},
    vision_config={**VIT, "num_hidden_layers": 2},
)  # fmt: skip
hf(
    "blip", "BlipModel", "BlipConfig",
    lambda: {"input_ids": tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)},
    text_config={**LM, "encoder_hidden_size": 64, "pad_token_id": 0, **TOKENS},
    # Its own range, 1e-10, makes a norm of zeros: every step is huge, converted or not.
    vision_config={**VIT, "num_hidden_layers": 2, "initializer_range": 0.02}, projection_dim=32,
)  # fmt: skip
hf("hubert", "HubertModel", "HubertConfig", audio, **SPEECH)
hf("wavlm", "WavLMModel", "WavLMConfig", audio, num_buckets=8, max_bucket_distance=16, **SPEECH)
hf(
    "audio_spectrogram", "ASTModel", "ASTConfig",
    lambda: {"input_values": torch.randn(BATCH, 64, 32)},
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
    max_length=64, num_mel_bins=32,
)  # fmt: skip
hf(
    "whisper", "WhisperForConditionalGeneration", "WhisperConfig",
    lambda: {
        "input_features": torch.randn(BATCH, 20, 32),
        "decoder_input_ids": tokens(9),
        "use_cache": False,
    },
    vocab_size=VOCAB, num_mel_bins=20, d_model=64, encoder_layers=3, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
    max_source_positions=16, max_target_positions=16, pad_token_id=0, decoder_start_token_id=1,
    **TOKENS,
)  # fmt: skip
