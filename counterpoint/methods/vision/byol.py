"""BYOL: predict what a slowly moving copy of yourself sees in the other view."""

from dataclasses import replace

import torch
from torch import Tensor

from counterpoint import contrast, encoders, memory
from counterpoint.encoders import heads
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.views import BYOL_1, BYOL_2, ImageViews, MultiCrop, by_size, crops
from counterpoint.views.multicrop import predicted


class BYOL(Method):
    r"""The online network predicts the target network's projection of the other view; there are no negatives.

    .. math:: \ell = \big(2 - 2\cos(p_1, \bar z_2)\big) + \big(2 - 2\cos(p_2, \bar z_1)\big)

    The target is a momentum copy, :math:`m(t)` rising from `momentum` to 1 along a cosine; the predictor and that
    copy keep the constant solution from being reached.

    When to use it: long trainings and small batches; it needs no negatives and is the strongest baseline per epoch on
    CIFAR-10, but with short budgets it starts slowly.

    Defaults: projector and predictor 4096-256, momentum 0.996 to 1, the paper's asymmetric views. The loss is the sum of both
    directions, as in the paper (an average is the same at half the learning rate).

    Source: Grill et al. 2020 (arXiv 2006.07733), section 3.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        projection: hidden and output width of projector and predictor.
        momentum: of the target at the start.
        mixing: parts that make the pairs harder and need no negatives, by name ("hallucinator"); see
            `counterpoint.memory.mixing`.
        views: the first random view.
        other_views: the second random view.
        small_views: further small views (multi-crop), by name ("multi-crop", "multi-crop-small") or as (count, size, crop);
            each predicts the targets of both large ones, and the loss is twice the mean over all predictions.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (4096, 256),
        momentum: float = 0.996,
        mixing: tuple[Mixing, ...] = (),
        views: ImageViews = BYOL_1,
        other_views: ImageViews = BYOL_2,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = heads.byol_projector(self.encoder.dim, *projection)
        self.predictor = heads.byol_predictor(projection[1], projection[0])
        self.target_encoder = memory.MomentumEncoder(self.encoder, momentum, final=1.0)
        self.target_projector = memory.MomentumEncoder(self.projector, momentum, final=1.0)
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)
        self.mixing = Mixed(mixing, projection[1], type(self).__name__, repels=False)

    def loss(self, batch: Batch) -> Tensor:
        views = crops(batch["image"], (self.views, self.other_views), self.small_views)
        # two views alone keep batch statistics of their own
        p = by_size(self.predict, views) if self.small_views else [self.predict(view) for view in views]
        z = [self.target(view) for view in views[:2]]
        self.watch(p[0], z[1])
        return 2 * torch.stack([self.distance(p[i], z[j], p[j]) for i, j in predicted(len(p))]).mean()

    def distance(self, prediction: Tensor, target: Tensor, other: Tensor) -> Tensor:
        """Of a prediction from its target; `other` is the prediction from the other view."""
        pairs = contrast.Pairs(prediction, target, partner=other)
        return 2 + 2 * self.mixing(pairs, self.current_epoch).loss(contrast.negative_cosine)

    def predict(self, view: Tensor) -> Tensor:
        return self.predictor(self.projector(self.encoder(view).pooled))

    def target(self, view: Tensor) -> Tensor:
        return self.target_projector(self.target_encoder(view).pooled)

    def after_step(self) -> None:
        self.target_encoder.update(self.encoder, self.progress)
        self.target_projector.update(self.projector, self.progress)
