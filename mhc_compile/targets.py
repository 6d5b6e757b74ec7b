"""What a command works on: a text such as ``hf:gpt2`` becomes a model with example inputs.

Three kinds of target:

* ``package.module:function`` or ``path/file.py:function``: a function of the user's that returns
  ``(model, args)`` or ``(model, args, kwargs)``; settings become its keyword arguments.
* ``hf:MODEL_TYPE``: a transformers architecture, small and with random weights; settings change its
  configuration.
* ``timm:NAME``: a timm architecture with random weights; settings go to ``timm.create_model``.

Nothing is downloaded, and every build of one target gives the same weights and inputs.
"""

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhc_compile.errors import ConfigError

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""Model, positional and keyword arguments of one call."""

SEED = 0
BATCH = 2


def build_target(text: str, settings: Mapping[str, Any] | None = None) -> Built:
    """Build the model and example inputs that ``text`` names.

    Args:
        text: ``hf:MODEL_TYPE``, ``timm:NAME`` or ``module:function``.
        settings: sizes and options for it; what they mean depends on the kind of target.

    Returns:
        The model and the arguments of one call, the same on every call of this function. Models of
        ``hf:`` and ``timm:`` are in eval mode; a function decides that itself.

    Raises:
        ConfigError: no such target, a setting it does not have, or a package that is missing.
    """
    kind, colon, name = text.rpartition(":")
    if not colon or not kind or not name:
        raise ConfigError(
            f"{text!r} is no target: use package.module:function, file.py:function, "
            "hf:MODEL_TYPE or timm:NAME"
        )
    options = dict(settings or {})
    torch.manual_seed(SEED)
    if kind == "hf":
        # transformers takes seconds to import and is optional.
        from mhc_compile.targets_hf import build_transformers

        return build_transformers(name, options)
    if kind == "timm":
        return _build_timm(name, options)
    return _call(text, _function(kind, name), options)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; a value is a Python literal, else a text.

    >>> parse_settings(["num_hidden_layers=4", "hidden_act=relu", "tie_word_embeddings=false"])
    {'num_hidden_layers': 4, 'hidden_act': 'relu', 'tie_word_embeddings': False}

    Raises:
        ConfigError: a text without ``=``.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} is not key=value")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = {"true": True, "false": False}.get(value, value)
    return settings


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``": did you mean a or b?"`` for the names close to ``name``; empty if none is."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""


def _function(module: str, name: str) -> Callable[..., Any]:
    loaded = _load_file(Path(module)) if module.endswith(".py") else _load_module(module)
    function = getattr(loaded, name, None)
    if not callable(function):
        known = [key for key, value in vars(loaded).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"{module} has no function {name!r}{did_you_mean(name, known)}")
    return function  # type: ignore[no-any-return]


def _load_module(module: str) -> Any:
    # A console script starts with its own folder on the path, unlike `python -m`.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the module that was asked for: one that it imports in turn is the user's traceback.
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise
        raise ConfigError(
            f"there is no module {error.name!r} on the path: run from the folder that holds it, or "
            "name the file (path/file.py:function)"
        ) from None


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:  # cannot be: the name ends in .py
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _call(text: str, function: Callable[..., Any], options: dict[str, Any]) -> Built:
    result = function(**options)
    match result:
        case (nn.Module() as model, tuple() | list() as args):
            return model, tuple(args), {}
        case (nn.Module() as model, tuple() | list() as args, dict() as kwargs):
            return model, tuple(args), kwargs
    raise ConfigError(
        f"{text} has to return (model, args) or (model, args, kwargs), with args a tuple and "
        f"kwargs a dict; it returned {_describe(result)}"
    )


def _describe(result: object) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(part).__name__ for part in result)})"
    return type(result).__name__


def _build_timm(name: str, options: dict[str, Any]) -> Built:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm:{name} needs the timm package: {error}") from error
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    options = {"num_classes": 10, **options}
    facts = timm.get_pretrained_cfg(name)
    fixed = facts is not None and facts.fixed_input_size
    channels, native = facts.input_size[:2] if facts is not None else (3, 224)
    # Networks of any size get a small image; the others take their size at construction.
    size = options.get("img_size", native if fixed else 64)
    if not fixed:
        options.pop("img_size", None)
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"timm:{name} with {options}: {error}") from error
    return model.eval(), (torch.randn(BATCH, channels, size, size),), {}
