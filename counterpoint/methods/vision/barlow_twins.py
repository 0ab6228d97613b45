"""Barlow Twins: two views agree dimension by dimension, and no dimension repeats another."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from counterpoint import contrast, encoders
from counterpoint.encoders.heads import barlow_projector
from counterpoint.encoders.several import Heads, Several
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.views import BYOL_1, BYOL_2, ImageViews, MultiCrop, by_size, crops
from counterpoint.views.multicrop import compared


class BarlowTwins(Method):
    r"""The cross-correlation of the two views' projections over the batch is brought to the identity.

    .. math::
        \ell = \sum_l (1 - C_{ll})^2 + \lambda \sum_l \sum_{m \ne l} C_{lm}^2, \qquad
        C_{lm} = \frac1N \sum_i \hat z_{il}\, \hat z'_{im}

    where the hat brings a dimension to mean 0 and variance 1 over the batch. The first term makes views agree; the second
    makes dimensions say different things, so that nothing can collapse. There are no negatives, no copy and no predictor.

    When to use it: batches of medium size (the paper works down to 256) and an encoder whose vector is to be spread over
    many dimensions. It gains from very wide projectors, which cost memory quadratically.

    Defaults: projector 8192-8192-8192, lambda 0.0051 and the two views of BYOL, as in the paper. Its LARS, batch 2048 and
    1,000 epochs are a recipe, not a default; small data want a projector of some hundred dimensions.

    Where codes differ: the released loss is the sum; its optimiser scales it down. Over several processes they correlate each
    process's rows after its own or synchronised statistics; ours are the statistics of the whole batch, exactly.

    Source: Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (ICML; arXiv 2103.03230),
    section 2 and algorithm 1.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        redundancy: lambda, weight of the second term.
        mixing: parts that make the pairs harder and need no negatives, by name ("hallucinator"); see
            `counterpoint.memory.mixing`.
        heads: several projection heads, by name ("several", "amcl"); see `counterpoint.encoders.several`.
        views: the first random view.
        other_views: the second random view.
        small_views: further small views (multi-crop), by name ("multi-crop", "multi-crop-small") or as (count, size, crop);
            each is correlated with both large ones, and the loss is the mean over these pairs of views.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (8192, 8192),
        redundancy: float = 0.0051,
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        views: ImageViews = BYOL_1,
        other_views: ImageViews = BYOL_2,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels, self.redundancy = image_size, channels, redundancy
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.heads = Several(heads, projection[1], mixing=mixing)
        self.projector = self.heads.each(partial(barlow_projector, self.encoder.dim, *projection))
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)
        self.mixing = Mixed(mixing, projection[1], type(self).__name__, repels=False)

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def loss(self, batch: Batch) -> Tensor:
        views = crops(batch["image"], (self.views, self.other_views), self.small_views)
        # two views alone keep batch statistics of their own
        z = by_size(self.project, views) if self.small_views else [self.project(view) for view in views]
        self.watch(z[0], z[1])
        return torch.stack([self.twins(z[i], z[j]) for i, j in compared(len(z))]).mean()

    def twins(self, one: Tensor, other: Tensor) -> Tensor:
        """The loss of one pair of views."""
        pairs = self.mixing(contrast.Pairs(one, other), self.current_epoch)
        return self.heads(pairs, contrast.barlow_twins, weight=self.redundancy)
