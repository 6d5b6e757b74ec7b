"""Stand-in under which timm's model definitions import. Nothing in it works."""

from torchvision import datasets, ops, transforms

__version__ = "0.0.0"
__all__ = ["datasets", "ops", "transforms"]
