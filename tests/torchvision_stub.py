"""Let timm import without torchvision.

timm names torchvision's datasets and transforms when it is imported, and its model definitions use
none of them. torchvision has to match torch to the build, so the suite does without it.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


class _Anything(types.ModuleType):
    """A module in which every public name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class InterpolationMode(Enum):
    """The one value timm reads at import, as a default argument."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


@contextmanager
def _stand_in() -> Iterator[None]:
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.ops",
        "torchvision.ops.misc",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    modules = {name: _Anything(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        vars(modules[name])["InterpolationMode"] = InterpolationMode
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_timm() -> types.ModuleType:
    """Timm, imported beside a stand-in where torchvision does not work."""
    if "timm" not in sys.modules:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):  # absent, or built against another torch
            with _stand_in():
                import timm
    import timm

    return timm
