"""Counterpoint: contrastive representation learning in every modality, on one small set of shared parts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        ("info_nce", "nt_xent", "sup_con", "dcl", "dclw", "clip_loss", "sigmoid_loss", "alignment", "uniformity"),
        "counterpoint.contrast",
    ),
    "fit": "counterpoint.train",
    "resume": "counterpoint.train",
    "Run": "counterpoint.train",
    "Embedder": "counterpoint.embedder",
    "Index": "counterpoint.serve",
    "generate": "counterpoint.generation",
    "SimCLR": "counterpoint.methods.vision.simclr",
    "DCL": "counterpoint.methods.vision.dcl",
    "MoCo": "counterpoint.methods.vision.moco",
    "BYOL": "counterpoint.methods.vision.byol",
    "SimSiam": "counterpoint.methods.vision.simsiam",
    "CLIP": "counterpoint.methods.image_text.clip",
}

if TYPE_CHECKING:
    from counterpoint.contrast import (
        alignment,
        clip_loss,
        dcl,
        dclw,
        info_nce,
        nt_xent,
        sigmoid_loss,
        sup_con,
        uniformity,
    )
    from counterpoint.embedder import Embedder
    from counterpoint.generation import generate
    from counterpoint.methods.image_text.clip import CLIP
    from counterpoint.methods.vision.byol import BYOL
    from counterpoint.methods.vision.dcl import DCL
    from counterpoint.methods.vision.moco import MoCo
    from counterpoint.methods.vision.simclr import SimCLR
    from counterpoint.methods.vision.simsiam import SimSiam
    from counterpoint.serve import Index
    from counterpoint.train import Run, fit, resume


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'counterpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
