"""Models of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.zoo_base import BATCH, Inputs, diffusers, register


def diffusers_model(name: str, model: str, inputs: Callable[[], Inputs], **fields: Any) -> None:
    def builder() -> tuple[nn.Module, Inputs]:
        return getattr(diffusers(), model)(**fields), {**inputs(), "return_dict": False}

    register(name, "diffusers", builder)


diffusers_model(
    "unet2d_cond", "UNet2DConditionModel",
    lambda: {
        "sample": torch.randn(BATCH, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
    },
    sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
    attention_head_dim=4, cross_attention_dim=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
diffusers_model(
    "dit", "DiTTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    },
    num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
    sample_size=16, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=100,
)  # fmt: skip
diffusers_model(
    "flux", "FluxTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 16, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
        "pooled_projections": torch.randn(BATCH, 24),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    },
    patch_size=1, in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16,
    num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip
diffusers_model(
    "unet2d", "UNet2DModel",
    lambda: {"sample": torch.randn(BATCH, 3, 16, 16), "timestep": torch.tensor([3, 7])},
    sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
    attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
_CODEC = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}


def _picture() -> Inputs:
    return {"sample": torch.randn(BATCH, 3, 16, 16)}


diffusers_model("autoencoder_kl", "AutoencoderKL", _picture, **_CODEC)
diffusers_model("vq_model", "VQModel", _picture, num_vq_embeddings=16, **_CODEC)
diffusers_model(
    "sd3", "SD3Transformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
        "pooled_projections": torch.randn(BATCH, 24),
        "timestep": torch.tensor([3, 7]),
    },
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
    attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=64,
    pooled_projection_dim=24, pos_embed_max_size=8,
)  # fmt: skip
diffusers_model(
    "pixart", "PixArtTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
        "timestep": torch.tensor([3, 7]),
    },
    num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
    sample_size=8, patch_size=2, cross_attention_dim=64, caption_channels=32,
    use_additional_conditions=False,
)  # fmt: skip
diffusers_model(
    "sana", "SanaTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32),
        "timestep": torch.tensor([3, 7]),
    },
    in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=3,
    num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64,
    caption_channels=32, sample_size=8, patch_size=1,
)  # fmt: skip
