"""What the projection head is for: the same training with a trained head, a fixed one, or none."""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from counterpoint import contrast, encoders
from counterpoint.contrast.spectral import spectral_contrastive
from counterpoint.encoders import heads
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.views import SIMCLR, ImageViews, without_overlay

Head = Literal["mlp", "none", "reweight", "symmetric_relu"]


class ProjectionHead(Method):
    r"""One encoder, one objective, and a choice of what stands between them while training.

    .. math:: z = \text{head}(h), \qquad \text{"reweight": } z_i = \kappa^{-i} h_i

    In linear nets, gradient descent shares the strength that the loss wants for a feature evenly among the layers: a feature
    with weight w after the head has :math:`\sqrt w` before it (`counterpoint.contrast.spectral.linear_strengths`). So h is a
    more even version of z, and serves better whenever the training undervalues what the task needs: because the
    augmentation disrupts it, because it is weak, or because labels do not ask for it. A fixed head that weighs columns
    unequally does the same without a weight to train.

    When to use it: to see what a head does on your own data (``counterpoint evaluate RUN --head`` measures before and after
    it, for every method with a projector), or to train without a head but with its benefit (``head=reweight``). For
    embeddings as such, take a baseline with its usual head.

    Defaults: hidden width 2048, temperature 0.5 and kappa 1.05 as in the code of the paper's co-author
    (jiayini1119/projection-head-experiments at a145e06), where heads map onto the encoder's width; ours ends at 128 for
    SimCLR. mu 1 as in jhaochenz96/spectral_contrastive_learning at ee431bd.

    Where codes differ: that code contrasts one view an image under "sup_con"; we take two. A class with one member in the
    batch, which stops it, is left out of the mean here. "reweight" is hard: at kappa 1.05 column 100 counts 1/130.

    Source: Xue et al. 2024, "Investigating the Benefits of Projection Head for Representation Learning" (ICLR;
    arXiv 2403.11391).

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey.
        head: "mlp" (SimCLR's), "none", "reweight" (fixed), or "symmetric_relu" (two linear layers around a soft threshold,
            the identity at the start).
        projection: hidden and output width of "mlp".
        kappa: of "reweight".
        objective: "nt_xent" (SimCLR), "sup_con" (labels), or "spectral" (the loss that the theory analyses; not cosine).
        temperature: of the softmax.
        mu: squared radius of the ball that "spectral" works in.
        target: "sup_con" contrasts the classes of this factor; None: the labels.
        drop_overlay: probability that a view loses what was painted over the image (composites such as cifar-fashion).
        views: the random views.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        head: Head = "mlp",
        projection: tuple[int, int] = (2048, 128),
        kappa: float = 1.05,
        objective: Literal["nt_xent", "sup_con", "spectral"] = "nt_xent",
        temperature: float = 0.5,
        mu: float = 1.0,
        target: str | None = None,
        drop_overlay: float = 0.0,
        views: ImageViews = SIMCLR,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.projector = projector(head, self.encoder.dim, projection, kappa)
        self.uses_labels, self.target, self.drop_overlay = objective == "sup_con", target, drop_overlay
        self.views = replace(views, size=image_size)
        self.objective = {
            "nt_xent": partial(contrast.nt_xent, temperature=temperature),
            "sup_con": partial(contrast.sup_con, temperature=temperature),
            "spectral": partial(spectral_contrastive, mu=mu),
        }[objective]

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def loss(self, batch: Batch) -> Tensor:
        z1, z2 = (self.project(self.views(without_overlay(batch, self.drop_overlay))) for _ in range(2))
        self.watch(z1, z2)
        if self.uses_labels:
            return self.objective(torch.stack([z1, z2], dim=1), self.classes_of(batch))
        return self.objective(z1, z2)

    def classes_of(self, batch: Batch) -> Tensor:
        name = self.target or "label"
        if name not in batch or batch[name].is_floating_point():
            raise InputError(f'the objective sup_con contrasts classes, and the data has none called "{name}"')
        return batch[name]


def projector(head: Head, dim: int, projection: tuple[int, int], kappa: float) -> nn.Module:
    """The head called `head`: ``[B, dim]`` to ``[B, dim]``, or to ``projection[1]`` for "mlp"."""
    match head:
        case "mlp":
            return heads.simclr_projector(dim, *projection)
        case "reweight":
            return heads.Reweight(kappa)
        case "symmetric_relu":
            return heads.identity_projector(dim)
        case "none":
            return nn.Identity()
    raise InputError(f'no head "{head}"; there are mlp, none, reweight, symmetric_relu')
