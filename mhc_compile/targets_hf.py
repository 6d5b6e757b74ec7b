"""``hf:MODEL_TYPE``: a small transformers model with random weights, and inputs that fit it.

The architecture is transformers' own for the type; only sizes are reduced, wherever the
configuration has an attribute of that name. No weights or files are downloaded.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mhc_compile.errors import ConfigError
from mhc_compile.targets import BATCH, Built, did_you_mean

SEQUENCE = 16
VOCABULARY = 256
AUDIO_SAMPLES = 2000
AUDIO_FRAMES = 64

_SMALL: dict[str, int] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "mlp_dim"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    "num_experts_per_tok": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "max_source_positions": AUDIO_FRAMES // 2,  # Whisper: its stem halves the frames
    "max_target_positions": 128,
}
"""Attribute of a configuration -> small value. Lists (sizes per stage) are left as they are."""

# The first family that knows the configuration names the model class.
_FAMILIES = (
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_MAPPING",
)


def build_transformers(model_type: str, settings: Mapping[str, Any]) -> Built:
    """Build the transformers architecture ``model_type`` from its configuration.

    Args:
        model_type: a ``model_type`` that transformers knows, such as ``gpt2``.
        settings: attributes of the configuration; a dot reaches into a part
            (``vision_config.hidden_size``).

    Returns:
        The model in eval mode and its keyword arguments, made from its main input.

    Raises:
        ConfigError: transformers is missing, knows no such type, has no such attribute, or refuses
            the sizes.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"hf:{model_type} needs the transformers package: {error}") from error
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        close = did_you_mean(model_type, known.keys())
        raise ConfigError(f"transformers has no model type {model_type!r}{close}")
    config_class = known[model_type]
    default = config_class()
    for key in settings:
        _check_setting(model_type, default, key)
    options = {**_small(default), **_nested(default, settings)}
    try:
        config = config_class(**options)
        config.architectures = [_model_class(transformers, config).__name__]
        model = _model_class(transformers, config)(config).eval()
    except ConfigError:
        raise
    except Exception as error:  # each model checks its sizes in its own way
        raise ConfigError(
            f"hf:{model_type} with {options}: {type(error).__name__}: {error}. Change sizes with "
            "--set, or write a function that builds the model (module:function)"
        ) from error
    return model, (), _inputs(model_type, model, config)


def _check_setting(model_type: str, config: Any, key: str) -> None:
    part = config
    for name in key.split("."):
        if not hasattr(part, name):
            close = did_you_mean(name, [*part.to_dict(), *part.attribute_map])
            raise ConfigError(f"hf:{model_type} has no setting {key!r}{close}")
        part = getattr(part, name)


def _small(config: Any) -> dict[str, Any]:
    """The sizes of ``_SMALL`` that ``config`` has, its parts included."""
    if hasattr(config, "depths"):  # stages: their widths are lists that have to fit one another
        return {}
    options: dict[str, Any] = {}
    for name, value in _SMALL.items():
        derived = isinstance(getattr(type(config), name, None), property)
        if type(getattr(config, name, None)) is int and not derived:
            options[_own_name(config, name)] = value
    limit = options.get("vocab_size", VOCABULARY)
    special = [
        name
        for name, value in config.to_dict().items()
        if name.endswith("_token_id") and isinstance(value, int) and value >= limit
    ]
    options.update(zip(special, range(len(special)), strict=True))
    for part in config.sub_configs:
        sizes = _small(getattr(config, part)) if getattr(config, part, None) is not None else {}
        if sizes:
            options[part] = sizes
    return options


def _nested(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with dots resolved, on top of the small sizes of the parts they reach into."""
    options: dict[str, Any] = {}
    for key, value in settings.items():
        part, dot, name = key.partition(".")
        if dot:
            inner = getattr(config, part)
            options.setdefault(part, _small(inner))[_own_name(inner, name)] = value
        else:
            options[_own_name(config, key)] = value
    return options


def _own_name(config: Any, name: str) -> str:
    """The configuration's own word for ``name``: ``n_embd`` for GPT-2's ``hidden_size``."""
    return str(config.attribute_map.get(name, name))


def _model_class(transformers: Any, config: Any) -> Any:
    families: tuple[str, ...] = _FAMILIES
    if config.is_encoder_decoder:
        families = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", *_FAMILIES[2:])
    for family in families:
        mapping = getattr(transformers, family)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ConfigError(
        f"transformers has no stand-alone model for {config.model_type!r}: write a function that "
        "builds the model (module:function)"
    )


def _inputs(model_type: str, model: Any, config: Any) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config
    makers = {
        "input_ids": lambda: _tokens(text, SEQUENCE),
        "pixel_values": lambda: _image(vision),
        "input_values": lambda: torch.randn(BATCH, AUDIO_SAMPLES),
        "input_features": lambda: torch.randn(BATCH, config.num_mel_bins, AUDIO_FRAMES),
    }
    main = model.main_input_name
    if main not in makers:
        raise ConfigError(
            f"hf:{model_type} takes {main!r}, which has no example here: write a function that "
            "builds the model and its inputs (module:function)"
        )
    names = [main]
    if text is not config and vision is not config:  # two towers need both inputs
        names = [name for name in ("input_ids", "pixel_values") if name in accepted]
    inputs: dict[str, Any] = {name: makers[name]() for name in names}
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(config, SEQUENCE // 2)
    if "use_cache" in accepted:
        inputs["use_cache"] = False  # a cache in the outputs is no function of the weights alone
    return inputs


def _tokens(config: Any, length: int) -> torch.Tensor:
    return torch.randint(3, config.vocab_size, (BATCH, length))


def _image(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", 64)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(BATCH, getattr(config, "num_channels", 3), height, width)
