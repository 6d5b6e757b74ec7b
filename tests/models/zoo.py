"""Small random-weight builds of public model definitions, whose residual sites are known.

`truth.json` says how many sites each has and how they chain. Sizes differ from stack to stack, so
that a wrong count shows. Nothing is downloaded.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Inputs = dict[str, Any]
BATCH, SEQ, VOCAB = 2, 16, 99
BUILDERS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode and its keyword arguments, the same on every call."""
    torch.manual_seed(0)
    model, inputs = BUILDERS[name]()
    return model.eval(), inputs


def transformers() -> ModuleType:
    """The transformers library."""
    return importlib.import_module("transformers")


def timm() -> ModuleType:
    """The timm library, which needs torchvision only to be imported.

    Where it is absent a stand-in serves. It is taken away again: other libraries would use it.
    """
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    stubs = str(Path(__file__).resolve().parent / "stubs")
    sys.path.append(stubs)
    try:
        return importlib.import_module("timm")
    finally:
        sys.path.remove(stubs)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def diffusers() -> ModuleType:
    """The diffusers library."""
    return importlib.import_module("diffusers")


def _tokens(length: int = SEQ) -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, length))


def _causal(length: int = SEQ) -> Callable[[], Inputs]:
    return lambda: {"input_ids": _tokens(length), "use_cache": False}


def _encoder() -> Inputs:
    return {"input_ids": _tokens()}


def _seq2seq() -> Inputs:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(9), "use_cache": False}


def _image(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def _audio() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1000)}


def _hf(name: str, model: str, config: str, inputs: Callable[[], Inputs], **fields: Any) -> None:
    def builder() -> tuple[nn.Module, Inputs]:
        library = transformers()
        return getattr(library, model)(getattr(library, config)(**fields)), inputs()

    BUILDERS[name] = builder


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_LM = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_LM, "num_key_value_heads": 2}
_VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}

# ---------------------------------------------------------------------- decoders
_hf(
    "gpt2", "GPT2LMHeadModel", "GPT2Config", _causal(),
    vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=64, **_TOKENS,
)  # fmt: skip
_hf("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _causal(), use_parallel_residual=True, **_LM)
_hf("llama", "LlamaForCausalLM", "LlamaConfig", _causal(), **_GQA)
_hf("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _causal(), head_dim=16, **_GQA)
_hf(
    "mixtral", "MixtralForCausalLM", "MixtralConfig", _causal(),
    num_local_experts=4, num_experts_per_tok=2, **_GQA,
)  # fmt: skip
_hf(
    "gemma2", "Gemma2ForCausalLM", "Gemma2Config", _causal(),
    head_dim=16, sliding_window=8, **_GQA,
)  # fmt: skip
_hf(
    "falcon", "FalconForCausalLM", "FalconConfig", _causal(),
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    parallel_attn=True, new_decoder_architecture=False, **_TOKENS,
)  # fmt: skip
_hf(
    "opt", "OPTForCausalLM", "OPTConfig", _causal(),
    vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=64,
)  # fmt: skip
_hf(
    "mpt", "MptForCausalLM", "MptConfig", _causal(),
    vocab_size=VOCAB, d_model=64, n_layers=3, n_heads=4, expansion_ratio=2, max_seq_len=64,
)  # fmt: skip
_hf("cohere", "CohereForCausalLM", "CohereConfig", _causal(), **_GQA)
_hf(
    "granite", "GraniteForCausalLM", "GraniteConfig", _causal(),
    residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.0156,
    logits_scaling=8.0, **_GQA,
)  # fmt: skip
_hf(
    "mamba", "MambaForCausalLM", "MambaConfig", _causal(6),
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, state_size=4,
)  # fmt: skip
_hf(
    "rwkv", "RwkvForCausalLM", "RwkvConfig", _causal(6),
    vocab_size=VOCAB, hidden_size=64, attention_hidden_size=64, num_hidden_layers=3,
    intermediate_size=96, context_length=32,
)  # fmt: skip
_hf(
    "deepseek_v4", "DeepseekV4ForCausalLM", "DeepseekV4Config", _causal(),
    vocab_size=VOCAB, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
    max_position_embeddings=64, hc_mult=4, hc_sinkhorn_iters=3,
)  # fmt: skip
_hf(
    "gemma3n", "Gemma3nForCausalLM", "Gemma3nTextConfig", _causal(),
    head_dim=16, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16,
    layer_types=["full_attention"] * 3, num_kv_shared_layers=0, laurel_rank=8,
    activation_sparsity_pattern=[0.0] * 3, altup_num_inputs=4, **_GQA,
)  # fmt: skip

# ---------------------------------------------------------------------- encoders
_hf("bert", "BertForMaskedLM", "BertConfig", _encoder, **_LM)
_hf(
    "albert", "AlbertForMaskedLM", "AlbertConfig", _encoder,
    embedding_size=32, num_hidden_groups=1, inner_group_num=1, **_LM,
)  # fmt: skip
_hf(
    "deberta_v2", "DebertaV2ForMaskedLM", "DebertaV2Config", _encoder,
    relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
    max_relative_positions=16, **_LM,
)  # fmt: skip
_hf(
    "fnet", "FNetForMaskedLM", "FNetConfig", _encoder,
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    max_position_embeddings=64,
)  # fmt: skip
_hf(
    "t5", "T5ForConditionalGeneration", "T5Config", _seq2seq,
    vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2,
    num_heads=4, decoder_start_token_id=0,
)  # fmt: skip
_hf(
    "bart", "BartForConditionalGeneration", "BartConfig", _seq2seq,
    vocab_size=VOCAB, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
    max_position_embeddings=64, **_TOKENS,
)  # fmt: skip

# ---------------------------------------------------------------------- vision, speech, two towers
_hf("vit", "ViTModel", "ViTConfig", _image(32), **_VIT)
_hf(
    "swin_hf", "SwinModel", "SwinConfig", _image(64),
    image_size=64, patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4,
    drop_path_rate=0.1,
)  # fmt: skip
_hf(
    "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", _image(64),
    num_encoder_blocks=4, depths=[1, 2, 1, 1], hidden_sizes=[16, 16, 32, 32],
    num_attention_heads=[1, 1, 2, 2], sr_ratios=[4, 2, 2, 1], decoder_hidden_size=32, num_labels=5,
)  # fmt: skip
_hf("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", _audio, **_SPEECH)
_hf(
    "conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", _audio,
    conv_depthwise_kernel_size=5, **_SPEECH,
)  # fmt: skip
_hf(
    "clip", "CLIPModel", "CLIPConfig",
    lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(BATCH, 3, 32, 32)},
    text_config={**_LM, "max_position_embeddings": 32, "pad_token_id": 0, **_TOKENS},
    vision_config={**_VIT, "num_hidden_layers": 2}, projection_dim=32,
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
    return library.DetrForObjectDetection(config), _image(64)()


BUILDERS["detr"] = _detr


def _timm(name: str, architecture: str, size: int = 64, **fields: Any) -> None:
    def builder() -> tuple[nn.Module, Inputs]:
        model = timm().create_model(architecture, pretrained=False, num_classes=10, **fields)
        return model, {"x": torch.randn(BATCH, 3, size, size)}

    BUILDERS[name] = builder


_timm("resnet18", "resnet18")
_timm("resnetv2_50", "resnetv2_50")
_timm("res2net", "res2net50_26w_4s")
_timm("regnet", "regnety_002")
_timm("dla34", "dla34")
_timm("densenet", "densenet121")
_timm("repvgg", "repvgg_a0")
_timm("convnext", "convnext_atto", drop_path_rate=0.1)
_timm("efficientnet", "efficientnet_b0", drop_path_rate=0.1)
_timm("mixer", "mixer_s32_224", 224)
_timm("coatnet", "coatnet_nano_rw_224", 224)
_timm("caformer", "caformer_s18")
_timm("xcit", "xcit_nano_12_p16_224")
_timm("hiera", "hiera_tiny_224", 224)
_timm("timm_vit_ls", "vit_tiny_patch16_224", img_size=64, depth=4, init_values=1e-5)


def _vit_parallel() -> tuple[nn.Module, Inputs]:
    timm()
    parts = importlib.import_module("timm.models.vision_transformer")
    model = parts.VisionTransformer(
        img_size=64,
        patch_size=16,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        block_fn=parts.ParallelThingsBlock,
    )
    return model, {"x": torch.randn(BATCH, 3, 64, 64)}


BUILDERS["timm_vit_parallel_things"] = _vit_parallel


def _diffusers(name: str, model: str, inputs: Callable[[], Inputs], **fields: Any) -> None:
    def builder() -> tuple[nn.Module, Inputs]:
        return getattr(diffusers(), model)(**fields), {**inputs(), "return_dict": False}

    BUILDERS[name] = builder


_diffusers(
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
_diffusers(
    "dit", "DiTTransformer2DModel",
    lambda: {
        "hidden_states": torch.randn(BATCH, 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    },
    num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
    sample_size=16, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=100,
)  # fmt: skip
_diffusers(
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
