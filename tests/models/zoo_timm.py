"""Models of timm."""

import importlib
from typing import Any

import torch
from torch import nn

from tests.models.zoo_base import BATCH, Inputs, register, timm


def timm_model(name: str, architecture: str, size: int = 64, **fields: Any) -> None:
    def builder() -> tuple[nn.Module, Inputs]:
        model = timm().create_model(architecture, pretrained=False, num_classes=10, **fields)
        return model, {"x": torch.randn(BATCH, 3, size, size)}

    register(name, "timm", builder)


timm_model("resnet18", "resnet18")
timm_model("resnetv2_50", "resnetv2_50")
timm_model("res2net", "res2net50_26w_4s")
timm_model("regnet", "regnety_002")
timm_model("dla34", "dla34")
timm_model("densenet", "densenet121")
timm_model("repvgg", "repvgg_a0")
timm_model("convnext", "convnext_atto", drop_path_rate=0.1)
timm_model("efficientnet", "efficientnet_b0", drop_path_rate=0.1)
timm_model("mixer", "mixer_s32_224", 224)
timm_model("coatnet", "coatnet_nano_rw_224", 224)
timm_model("caformer", "caformer_s18")
timm_model("xcit", "xcit_nano_12_p16_224")
timm_model("hiera", "hiera_tiny_224", 224)
timm_model("resnet50", "resnet50")
timm_model("skresnet18", "skresnet18")
timm_model("resnest14d", "resnest14d")
timm_model("nf_resnet26", "nf_resnet26")
timm_model("ghostnet", "ghostnet_100")
timm_model("rexnet", "rexnet_100")
timm_model("hrnet", "hrnet_w18_small")
timm_model("vgg11", "vgg11")
timm_model("efficientnetv2", "tf_efficientnetv2_b0", drop_path_rate=0.1)
timm_model("mobilenetv2", "mobilenetv2_100")
timm_model("mobilenetv3", "mobilenetv3_small_100")
timm_model("convnextv2", "convnextv2_atto", drop_path_rate=0.1)
timm_model("starnet", "starnet_s1")
timm_model("inception_next", "inception_next_atto")
timm_model("maxvit", "maxvit_nano_rw_256", 128, img_size=128)
_WINDOWS = {"img_size": 64, "embed_dim": 24, "num_heads": (2, 4), "window_size": 4}
timm_model("swin", "swin_tiny_patch4_window7_224", depths=(2, 3), **_WINDOWS)
timm_model("swinv2", "swinv2_tiny_window8_256", depths=(2, 2), **_WINDOWS)
timm_model("pvt_v2", "pvt_v2_b0")
timm_model("pit", "pit_ti_224", 224)
timm_model("levit", "levit_128s", 224)
timm_model("poolformer", "poolformer_s12")
timm_model("deit3", "deit3_small_patch16_224", img_size=64, depth=4)
timm_model("timm_beit", "beit_base_patch16_224", img_size=64, depth=3, embed_dim=64, num_heads=4)
timm_model("eva02", "eva02_tiny_patch14_224", 56, img_size=56, depth=3)
timm_model("cait", "cait_xxs24_224", img_size=64, depth=4)
timm_model("timm_vit_ls", "vit_tiny_patch16_224", img_size=64, depth=4, init_values=1e-5)


def _of_class(name: str, module: str, model: str, **fields: Any) -> None:
    """Register a class of timm's; a field that names a class of its module stands for that."""

    def builder() -> tuple[nn.Module, Inputs]:
        timm()
        parts = importlib.import_module(f"timm.models.{module}")
        named = {key: getattr(parts, str(value), value) for key, value in fields.items()}
        return getattr(parts, model)(num_classes=10, **named), {"x": torch.randn(BATCH, 3, 64, 64)}

    register(name, "timm", builder)


_VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4}
_MLP = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_blocks": 4}
for _name, _block in {
    "timm_vit_parallel_things": "ParallelThingsBlock",
    "timm_vit_parallel": "ParallelScalingBlock",
    "timm_vit_res_post": "ResPostBlock",
}.items():
    _of_class(_name, "vision_transformer", "VisionTransformer", block_fn=_block, **_VIT)
_of_class(
    "resmlp", "mlp_mixer", "MlpMixer",
    mlp_ratio=4, block_layer="ResBlock", norm_layer="Affine", **_MLP,
)  # fmt: skip
_of_class(
    "gmlp", "mlp_mixer", "MlpMixer",
    mlp_ratio=6, block_layer="SpatialGatingBlock", mlp_layer="GatedMlp", **_MLP,
)  # fmt: skip
_of_class("convmixer", "convmixer", "ConvMixer", dim=64, depth=4, patch_size=7)
