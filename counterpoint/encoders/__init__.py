"""Encoders: how a thing becomes a vector (`encoders.image(name)`); heads: how that becomes what is contrasted."""

from counterpoint.encoders import heads
from counterpoint.encoders.image import ConvNet, Features, ImageEncoder, TimmEncoder, image

__all__ = ["ConvNet", "Features", "ImageEncoder", "TimmEncoder", "heads", "image"]
