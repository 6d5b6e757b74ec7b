"""What the parts of the zoo share: its registry, the libraries, inputs and small configurations."""

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.torchvision_stub import import_timm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Inputs = dict[str, Any]
BATCH, SEQ, VOCAB = 2, 16, 99
Builder = Callable[[], tuple[nn.Module, Inputs]]
BUILDERS: dict[str, Builder] = {}
LIBRARIES: dict[str, str] = {}
"""Library of each model."""


def register(name: str, library: str, builder: Builder) -> None:
    """Put a model into the zoo."""
    BUILDERS[name] = builder
    LIBRARIES[name] = library


def transformers() -> ModuleType:
    """The transformers library."""
    return importlib.import_module("transformers")


def timm() -> ModuleType:
    """The timm library."""
    return import_timm()


def diffusers() -> ModuleType:
    """The diffusers library."""
    return importlib.import_module("diffusers")


def tokens(length: int = SEQ) -> torch.Tensor:
    return torch.randint(3, VOCAB, (BATCH, length))


def causal(length: int = SEQ) -> Callable[[], Inputs]:
    return lambda: {"input_ids": tokens(length), "use_cache": False}


def encoder() -> Inputs:
    return {"input_ids": tokens()}


def seq2seq() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(9), "use_cache": False}


def image(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size)}


def audio() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1000)}


def hf(name: str, model: str, config: str, inputs: Callable[[], Inputs], **fields: Any) -> None:
    """Register ``model(config(**fields))`` of transformers."""

    def builder() -> tuple[nn.Module, Inputs]:
        library = transformers()
        return getattr(library, model)(getattr(library, config)(**fields)), inputs()

    register(name, "transformers", builder)


TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
LM = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GQA = {**LM, "num_key_value_heads": 2}
VIT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH = {
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
