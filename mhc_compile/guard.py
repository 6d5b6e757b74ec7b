"""A converted module that runs without the backend must say so.

The user's source still adds plainly. Run eagerly (or by another backend, or past Dynamo's recompile
limit) a converted model would be the plain network with unused parameters: plausible numbers from
the wrong model. Each owner of sites therefore gets a generated subclass whose ``forward`` checks
where it runs, and leaves two markers in every graph it is traced into: where the call begins and
where it returns. A graph break inside parts them, and the call runs in pieces
(`mhc_compile.pieces`).
"""

import types
import warnings
from typing import Any, Literal

import torch
from torch import nn

from mhc_compile.errors import MHCWarning, NotCompiledError, UnsupportedGraphError
from mhc_compile.pieces import close_call

Policy = Literal["raise", "warn", "ignore"]
_POLICIES: tuple[Policy, ...] = ("raise", "warn", "ignore")

_library = torch.library.Library("mhc_compile", "DEF")  # type: ignore[no-untyped-call]
_library.define("owner_call(Tensor anchor, int policy) -> ()")  # type: ignore[no-untyped-call]
_library.define("owner_return(Tensor anchor) -> ()")  # type: ignore[no-untyped-call]


def _run_marker(anchor: torch.Tensor, policy: int) -> None:
    """What the marker does in a graph that the mhc backend did not rewrite."""
    _report(_POLICIES[policy], "was compiled by another backend")


_library.impl(  # type: ignore[no-untyped-call]
    "owner_call", _run_marker, "CompositeExplicitAutograd"
)
_library.impl(  # type: ignore[no-untyped-call]
    "owner_return", lambda anchor: close_call(), "CompositeExplicitAutograd"
)
torch.library.register_fake("mhc_compile::owner_call", lambda anchor, policy: None, lib=_library)
torch.library.register_fake("mhc_compile::owner_return", lambda anchor: None, lib=_library)

CALL = torch.ops.mhc_compile.owner_call.default
RETURN = torch.ops.mhc_compile.owner_return.default
torch.fx.has_side_effect(CALL)
torch.fx.has_side_effect(RETURN)


def _report(policy: Policy, what: str) -> None:
    message = (
        f"a model converted to hyper-connections {what}, which computes the plain residual "
        'network. Call torch.compile(model, backend="mhc"), use mhc_compile.rewrite(model, ...), '
        "or take the parameters off with mhc_compile.revert_(model). If Dynamo gave up (graph "
        'break, recompile limit), TORCH_LOGS="recompiles,graph_breaks" shows why, and '
        "torch._dynamo.config.recompile_limit = 64 may be enough. "
        'MHCConfig(on_eager="warn") or "ignore" allows it'
    )
    if policy == "raise":
        raise NotCompiledError(message)
    if policy == "warn":
        warnings.warn(message, MHCWarning, stacklevel=3)


def _anchor(self: Any) -> torch.Tensor:
    """Some input for an operator that computes nothing."""
    return next(iter(self.mhc.values())).bias  # type: ignore[no-any-return]


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        torch.ops.mhc_compile.owner_call.default(_anchor(self), self._mhc_policy)
        result = super(type(self)._mhc_class, self).forward(*args, **kwargs)
        # This reads self again: after a graph break, Dynamo keeps no variable that is not read.
        torch.ops.mhc_compile.owner_return.default(_anchor(self))
        return result
    _report(_POLICIES[self._mhc_policy], "runs without the mhc backend")
    return super(type(self)._mhc_class, self).forward(*args, **kwargs)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    cls = type(self)._mhc_class
    return _rebuild, (cls.__base__, cls._mhc_signature), self.__getstate__()


def _rebuild(base: type[nn.Module], signature: str) -> nn.Module:
    """Importable by name: what pickle and deepcopy store instead of the generated class."""
    cls = checked_class(base, signature)
    return cls.__new__(cls)


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def checked_class(base: type[nn.Module], signature: str) -> type[nn.Module]:
    """The subclass of ``base`` that checks its calls; same name, same arguments.

    One for each base and ``MHCSites.signature``: Dynamo guards on the class of a module, so that
    one graph serves all layers of a signature and no other. The first layer of a trunk makes its
    streams; what is compiled for it would silently do so in every layer.
    """
    known = _classes.get((base, signature))
    if known is not None:
        return known
    # A function of its own per class: Dynamo keys its caches and limits by code object.
    forward = types.FunctionType(_forward.__code__.replace(co_name="forward"), globals(), "forward")
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]
    cls: Any = type(
        base.__name__,
        (base,),
        {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__,
         "__doc__": base.__doc__, "__reduce_ex__": _reduce},
    )  # fmt: skip
    cls._mhc_class, cls._mhc_signature = cls, signature
    _classes[base, signature] = cls
    return _classes[base, signature]


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot keep sites, or None."""
    cls = type(module)
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return f"{cls.__name__} iterates over its submodules and would run the parameters"
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule cannot change its class"
    if type(cls) is not type:
        return f"{cls.__name__} has a metaclass"
    if cls.__reduce_ex__ is not object.__reduce_ex__ and not is_checked(module):
        return f"{cls.__name__} pickles itself in its own way"
    if "forward" in vars(module):
        return f"this {cls.__name__} has its forward replaced on the instance"
    return None


def is_checked(module: nn.Module) -> bool:
    """Whether the module's class is a generated one, or made from one (FSDP2 does that)."""
    return hasattr(type(module), "_mhc_class")


def check_calls_(module: nn.Module, signature: str, policy: Policy) -> None:
    """Make ``module``, which is not checked yet, check its calls, in place."""
    module._mhc_policy = _POLICIES.index(policy)  # type: ignore[assignment]
    module.__class__ = checked_class(type(module), signature)


def refuse_wrapped(module: nn.Module) -> None:
    """Make sure that `uncheck_calls_` can give ``module`` its class back.

    Raises:
        UnsupportedGraphError: something made a class of its own from the generated one.
    """
    if is_checked(module) and "_mhc_class" not in vars(type(module)):
        raise UnsupportedGraphError(
            f"{type(module).__name__} changed its class after the conversion (fully_shard does "
            "that): take the parameters off before"
        )


def uncheck_calls_(module: nn.Module) -> None:
    """Undo `check_calls_`."""
    if is_checked(module):
        module.__class__ = type(module).__base__  # type: ignore[assignment]
    if "_mhc_policy" in vars(module):
        del module._mhc_policy
