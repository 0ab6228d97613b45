"""Views: what counts as "the same thing". Batched, on the batch's device, seeded by an explicit generator."""

from counterpoint.views.image import (
    BYOL,
    BYOL_1,
    BYOL_2,
    CLOTHES,
    HANDWRITING,
    MOCO_V2,
    SIMCLR,
    SIMCLR_SMALL,
    SIMSIAM,
    ImageViews,
    image_views,
    montage,
    plain,
)

__all__ = [
    "BYOL",
    "BYOL_1",
    "BYOL_2",
    "CLOTHES",
    "HANDWRITING",
    "MOCO_V2",
    "NAMED",
    "SIMCLR",
    "SIMCLR_SMALL",
    "SIMSIAM",
    "ImageViews",
    "image_views",
    "montage",
    "plain",
]

NAMED = {
    "simclr": SIMCLR,
    "simclr-small": SIMCLR_SMALL,
    "moco-v2": MOCO_V2,
    "byol-1": BYOL_1,
    "byol-2": BYOL_2,
    "simsiam": SIMSIAM,
    "handwriting": HANDWRITING,
    "clothes": CLOTHES,
}
"""Argument sets by the names that recipes and the command line use."""
