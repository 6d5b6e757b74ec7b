"""Pictures and diffusion, taken up after the rules of the finder stood."""

import torch

from tests.models.zoo_base import (
    BATCH,
    VIT,
    hf,
    image,
)
from tests.models.zoo_timm import timm_model

# ---------------------------------------------------------------------- vision
hf("dpt", "DPTModel", "DPTConfig", image(32), **{**VIT, "backbone_out_indices": [0, 1, 2]})
hf(
    "swinv2_hf",
    "Swinv2Model",
    "Swinv2Config",
    image(64),
    image_size=64,
    patch_size=4,
    embed_dim=16,
    depths=[2, 3],
    num_heads=[2, 4],
    window_size=4,
)
hf(
    "pvt",
    "PvtModel",
    "PvtConfig",
    image(64),
    image_size=64,
    num_encoder_blocks=4,
    depths=[2, 1, 2, 1],
    hidden_sizes=[16, 32, 32, 64],
    num_attention_heads=[1, 2, 2, 4],
    sequence_reduction_ratios=[8, 4, 2, 1],
    mlp_ratios=[2, 2, 2, 2],
)
hf(
    "pvt_v2_hf",
    "PvtV2Model",
    "PvtV2Config",
    image(64),
    image_size=64,
    num_encoder_blocks=4,
    depths=[2, 1, 2, 1],
    hidden_sizes=[16, 32, 32, 64],
    num_attention_heads=[1, 2, 2, 4],
    sr_ratios=[8, 4, 2, 1],
    mlp_ratios=[2, 2, 2, 2],
)
hf(
    "poolformer_hf",
    "PoolFormerModel",
    "PoolFormerConfig",
    image(64),
    num_encoder_blocks=4,
    depths=[2, 1, 2, 1],
    hidden_sizes=[16, 32, 32, 64],
)
hf(
    "cvt",
    "CvtModel",
    "CvtConfig",
    image(64),
    embed_dim=[16, 32, 64],
    num_heads=[1, 2, 4],
    depth=[1, 2, 3],
    patch_sizes=[7, 3, 3],
)
hf(
    "levit_hf",
    "LevitModel",
    "LevitConfig",
    image(128),  # of 64 pixels one token is left at the end, whose batch statistics are noise
    image_size=128,
    hidden_sizes=[32, 48, 64],
    num_attention_heads=[2, 3, 4],
    depths=[2, 2, 2],
    key_dim=[8, 8, 8],
    drop_path_rate=0,
)
hf(
    "mobilevitv2",
    "MobileViTV2Model",
    "MobileViTV2Config",
    image(64),
    image_size=64,
    width_multiplier=0.25,
    initializer_range=0.15,
)
hf(
    "convnext_hf",
    "ConvNextModel",
    "ConvNextConfig",
    image(64),
    num_stages=4,
    depths=[1, 2, 2, 1],
    hidden_sizes=[16, 32, 48, 64],
)
hf(
    "resnet_hf",
    "ResNetModel",
    "ResNetConfig",
    image(64),
    embedding_size=16,
    hidden_sizes=[16, 32, 48, 64],
    depths=[1, 2, 2, 1],
    layer_type="bottleneck",
)
hf(
    "vivit",
    "VivitModel",
    "VivitConfig",
    lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32)},
    **{**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
)
hf(
    "timesformer",
    "TimesformerModel",
    "TimesformerConfig",
    lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32)},
    **{**VIT, "num_frames": 4},
)
hf(
    "vit_mae",
    "ViTMAEForPreTraining",
    "ViTMAEConfig",
    image(32),
    decoder_num_attention_heads=4,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=2,
    decoder_intermediate_size=64,
    **VIT,
)
hf("vit_msn", "ViTMSNModel", "ViTMSNConfig", image(32), **VIT)
hf("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", image(32), **VIT)
hf("ijepa", "IJepaModel", "IJepaConfig", image(32), **VIT)
hf(
    "glpn",
    "GLPNForDepthEstimation",
    "GLPNConfig",
    image(64),
    num_encoder_blocks=4,
    depths=[1, 2, 1, 1],
    hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
)
hf(
    "hiera_hf",
    "HieraModel",
    "HieraConfig",
    image(64),
    image_size=[64, 64],
    patch_size=[7, 7],
    patch_stride=[4, 4],
    embed_dim=16,
    depths=[1, 2, 2, 1],
    num_heads=[1, 2, 2, 4],
    mlp_ratio=2.0,
)
hf(
    "seggpt",
    "SegGptModel",
    "SegGptConfig",
    lambda: {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_masks": torch.randn(1, 3, 32, 32),
    },
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    mlp_dim=96,
    image_size=[64, 32],
    patch_size=8,
    pretrain_image_size=32,
    merge_index=1,
    intermediate_hidden_state_indices=[1, 3],
    decoder_hidden_size=16,
)
hf(
    "swin2sr",
    "Swin2SRForImageSuperResolution",
    "Swin2SRConfig",
    image(32),
    image_size=32,
    embed_dim=32,
    depths=[2, 3],
    num_heads=[2, 2],
    window_size=4,
    upscale=2,
)
hf(
    "siglip2",
    "Siglip2VisionModel",
    "Siglip2VisionConfig",
    lambda: {
        "pixel_values": torch.randn(BATCH, 16, 192),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    patch_size=8,
    num_patches=16,
)

# ---------------------------------------------------------------------- timm
timm_model("efficientvit_b0", "efficientvit_b0")
timm_model("coat", "coat_lite_tiny", 64, img_size=64, serial_depths=(1, 2, 1, 1))
timm_model(
    "crossvit",
    "crossvit_tiny_240",
    240,
    img_size=240,
    depth=((1, 2, 0), (1, 2, 0)),
    embed_dim=(32, 64),
    num_heads=(2, 2),
)
timm_model(
    "davit",
    "davit_tiny",
    64,
    depths=(1, 1, 2, 1),
    embed_dims=(16, 32, 64, 64),
    num_heads=(1, 2, 4, 4),
)
timm_model("edgenext", "edgenext_xx_small", 64)
timm_model("nfnet", "nfnet_l0", 64)
timm_model(
    "twins_svt",
    "twins_svt_small",
    64,
    img_size=64,
    depths=(1, 1, 2, 1),
    embed_dims=(16, 32, 64, 64),
    num_heads=(1, 2, 4, 4),
)
timm_model(
    "twins_pcpvt",
    "twins_pcpvt_small",
    64,
    img_size=64,
    depths=(1, 1, 2, 1),
    embed_dims=(16, 32, 64, 64),
    num_heads=(1, 2, 4, 4),
)
timm_model("convit", "convit_tiny", 64, img_size=64, depth=3, embed_dim=16, local_up_to_layer=2)
timm_model("tnt", "tnt_s_patch16_224", 64, img_size=64, depth=2)
timm_model("xception", "xception41", 64)
timm_model("inception_resnet_v2", "inception_resnet_v2", 128)
timm_model("senet", "legacy_seresnet18", 64)
timm_model("cspresnet", "cspresnet50", 64)
timm_model("darknet53", "cspdarknet53", 64)
timm_model("gernet", "gernet_s", 64)
timm_model("botnet", "botnet26t_256", 128, img_size=128)
timm_model("lambda_resnet", "lambda_resnet26t", 128)
timm_model(
    "samvit",
    "samvit_base_patch16",
    64,
    img_size=64,
    depth=3,
    embed_dim=64,
    num_heads=4,
    global_attn_indexes=(1,),
)
timm_model("vit_relpos", "vit_relpos_small_patch16_224", 64, img_size=64, depth=3)
