from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode"]


def __getattr__(name: str) -> type:
    """Any other transform: an empty class, which timm names or subclasses at import."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
