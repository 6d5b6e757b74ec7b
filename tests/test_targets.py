"""A text becomes a model and its inputs, or an error that says what to write instead."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mhc_compile.errors import ConfigError
from mhc_compile.targets import build_target, parse_settings
from tests.torchvision_stub import import_timm

USER_FILE = """
import torch

def build(width=8):
    return torch.nn.Linear(width, width), (torch.randn(2, width),)

def with_keywords():
    return torch.nn.Linear(4, 4), (), {"input": torch.randn(2, 4)}

def forgot_the_tuple():
    return torch.nn.Linear(4, 4), torch.randn(2, 4)

def forgot_the_inputs():
    return torch.nn.Linear(4, 4)
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_users_model.py"
    path.write_text(USER_FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return path


def test_function_in_a_file_gets_settings_as_keywords(user_file: Path) -> None:
    model, args, kwargs = build_target(f"{user_file}:build", {"width": 6})
    assert model(*args, **kwargs).shape == (2, 6)


def test_function_in_a_module_of_the_working_folder(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user_file.parent)
    model, args, kwargs = build_target("my_users_model:with_keywords")
    assert args == ()
    assert model(**kwargs).shape == (2, 4)


def test_two_builds_have_the_same_weights_and_inputs(user_file: Path) -> None:
    (first, (x,), _), (second, (y,), _) = (build_target(f"{user_file}:build") for _ in range(2))
    assert_close(x, y, rtol=0, atol=0)
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("forgot_the_tuple", r"it returned \(Linear, Tensor\)"),
        ("forgot_the_inputs", "it returned Linear"),
        ("biuld", "has no function 'biuld': did you mean build"),
    ],
)
def test_wrong_functions_say_what_is_expected(user_file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_target(f"{user_file}:{name}")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gpt2", "is no target"),
        (":build", "is no target"),
        ("no_such_module_here:build", "there is no module 'no_such_module_here'"),
        ("no/such/file.py:build", "there is no file"),
        ("hf:gpt22", "did you mean gpt2"),
        ("hf:llamma", "did you mean .*llama"),
    ],
)
def test_unknown_targets_are_refused_with_advice(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_target(target)


def test_an_import_error_inside_the_users_module_is_not_hidden(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user_file.parent / "broken_user_module.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(user_file.parent)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        build_target("broken_user_module:build")


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "llama", "qwen3", "bert", "vit", "t5", "bart", "whisper", "mamba", "gpt_neox"],
)
def test_transformers_architectures_build_small_and_run(model_type: str) -> None:
    model, args, kwargs = build_target(f"hf:{model_type}")
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        output = model(*args, **kwargs)
    assert all(torch.isfinite(leaf).all() for leaf in output.to_tuple() if torch.is_tensor(leaf))


def test_settings_change_the_configuration_by_either_name() -> None:
    model, _, _ = build_target("hf:gpt2", {"num_hidden_layers": 3, "n_embd": 32})
    assert len(model.transformer.h) == 3
    assert model.config.hidden_size == 32


def test_a_dot_reaches_into_a_part_of_the_configuration() -> None:
    model, _, _ = build_target("hf:clip", {"vision_config.num_hidden_layers": 3})
    assert model.config.vision_config.num_hidden_layers == 3
    assert model.config.vision_config.hidden_size == 64


def test_a_misspelt_setting_is_refused_with_close_names() -> None:
    with pytest.raises(ConfigError, match="no setting 'num_hiden_layers': did you mean num_hidden"):
        build_target("hf:llama", {"num_hiden_layers": 3})


def test_sizes_that_do_not_fit_are_reported_as_such() -> None:
    with pytest.raises(ConfigError, match=r"hf:gpt2 with .*'n_head': 5"):
        build_target("hf:gpt2", {"num_attention_heads": 5})


def test_timm_models_get_an_image_of_their_size() -> None:
    import_timm()
    model, (image,), _ = build_target("timm:resnet18")
    assert image.shape == (2, 3, 64, 64)
    model, (image,), _ = build_target("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 2})
    assert image.shape == (2, 3, 32, 32)
    assert len(model.blocks) == 2
    assert model(image).shape == (2, 10)


def test_unknown_timm_models_are_refused_with_close_names() -> None:
    import_timm()
    with pytest.raises(ConfigError, match=r"did you mean .*resnet18"):
        build_target("timm:resnet_18")


def test_settings_are_literals_or_texts() -> None:
    pairs = ["a=3", "b=1e-5", "c=relu", "d=true", "e=[1, 2]", "f=x=y", "g=None"]
    assert parse_settings(pairs) == {
        "a": 3,
        "b": 1e-5,
        "c": "relu",
        "d": True,
        "e": [1, 2],
        "f": "x=y",
        "g": None,
    }


@pytest.mark.parametrize("pair", ["layers", "=3"])
def test_a_setting_without_key_and_value_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="is not key=value"):
        parse_settings([pair])
