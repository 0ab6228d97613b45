"""SimSiam: BYOL without the momentum copy; the stopped gradient is enough."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint import contrast, encoders
from counterpoint.encoders.heads import simsiam_predictor, simsiam_projector
from counterpoint.encoders.several import Heads, Several
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.train.optimise import decay_groups
from counterpoint.views import SIMSIAM, ImageViews, MultiCrop, by_size, crops
from counterpoint.views.multicrop import predicted


class SimSiam(Method):
    r"""Each view predicts the other view's projection, which is treated as a constant.

    .. math:: \ell = -\tfrac12 \cos(p_1, \mathrm{stop}(z_2)) - \tfrac12 \cos(p_2, \mathrm{stop}(z_1))

    When to use it: the leanest method in memory (no negatives, no copy, no queue), good with long trainings; watch
    the effective rank, since with small encoders and short budgets it can collapse.

    Defaults: projector of three layers 2048 wide with a last batch normalisation, predictor with a bottleneck of 512 whose
    learning rate is not decayed (appendix B of the paper: a constant rate; here the group skips the schedule).

    Source: Chen and He 2021 (arXiv 2011.10566), algorithm 1.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of the projector.
        layers: of the projector; the paper takes 2 on CIFAR-10.
        bottleneck: hidden width of the predictor.
        mixing: parts that make the pairs harder and need no negatives, by name ("hallucinator"); see
            `counterpoint.memory.mixing`.
        heads: several projection heads, by name ("several", "amcl"); see `counterpoint.encoders.several`.
        views: the random views.
        other_views: those of the second view; None: as `views`.
        small_views: further small views (multi-crop), by name ("multi-crop", "multi-crop-small") or as (count, size, crop);
            each predicts both large ones, and the loss is the mean over all predictions.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 2048),
        layers: int = 3,
        bottleneck: int = 512,
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        views: ImageViews = SIMSIAM,
        other_views: ImageViews | None = None,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.heads = Several(heads, projection[1], mixing=mixing)
        self.projector = self.heads.each(partial(simsiam_projector, self.encoder.dim, *projection, layers=layers))
        self.predictor = self.heads.each(partial(simsiam_predictor, projection[1], bottleneck), apart=True)
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views or views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)
        self.mixing = Mixed(mixing, projection[1], type(self).__name__, repels=False)

    def loss(self, batch: Batch) -> Tensor:
        views = crops(batch["image"], (self.views, self.other_views), self.small_views)
        # two views alone keep batch statistics of their own
        z = by_size(self.project, views) if self.small_views else [self.project(view) for view in views]
        p = by_size(self.predictor, z) if self.small_views else [self.predictor(row) for row in z]
        self.watch(p[0], z[1])
        return torch.stack([self.distance(p[i], z[j], p[j]) for i, j in predicted(len(p))]).mean()

    def distance(self, prediction: Tensor, target: Tensor, other: Tensor) -> Tensor:
        """Of a prediction from its target; `other` is the prediction from the other view."""
        pairs = contrast.Pairs(prediction, target, partner=other)
        return self.heads(self.mixing(pairs, self.current_epoch), contrast.negative_cosine)

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def parameter_groups(self) -> list[dict[str, Any]]:
        decay = self.optimisation.weight_decay
        fixed = [{**group, "schedule": "constant"} for group in decay_groups(self.predictor, decay)]
        rest = nn.ModuleList([self.encoder, self.projector, self.mixing, self.heads])
        return decay_groups(rest, decay) + fixed
