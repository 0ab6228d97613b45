"""Encoders: how a thing becomes a vector. `image`, `text`, `towers`, `sequence` build them; `heads` make what is contrasted."""

from counterpoint.encoders import heads
from counterpoint.encoders.experts import ExpertEncoder
from counterpoint.encoders.image import Concatenated, ConvNet, Features, ImageEncoder, TimmEncoder, image, integrated
from counterpoint.encoders.image_text import Towers, towers
from counterpoint.encoders.sequence import SASRecEncoder
from counterpoint.encoders.text import TextEncoder, text

__all__ = [
    "Concatenated",
    "ConvNet",
    "ExpertEncoder",
    "Features",
    "ImageEncoder",
    "SASRecEncoder",
    "TextEncoder",
    "TimmEncoder",
    "Towers",
    "heads",
    "image",
    "integrated",
    "text",
    "towers",
]
