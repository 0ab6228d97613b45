"""SimCLR, the plainest contrast: two views of an image attract, all other images of the batch repel."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from counterpoint import contrast, encoders
from counterpoint.encoders.heads import simclr_projector
from counterpoint.encoders.several import Heads, Several
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.views import SIMCLR, ImageViews, MultiCrop, by_size, crops
from counterpoint.views.multicrop import compared


class SimCLR(Method):
    r"""Two views of an image attract each other, all other images in the batch repel.

    .. math:: \ell_i = -\frac{s_{i,i'}}{\tau} + \log \sum_{j \ne i} \exp(s_{ij}/\tau)

    with s the cosine similarity of projections; the projector is thrown away after training.

    When to use it: the first thing to try on images. It wants large batches (256 and more), since they are its only
    source of negatives; with small ones use DCL or MoCo.

    Defaults: projector 2048-128 and views of the paper's appendix A and B; temperature 0.2, between the paper's 0.1
    (ImageNet) and 0.5 (CIFAR-10). The paper's LARS, batch 4096 and 1000 epochs are a recipe, not a default.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations"
    (arXiv 2002.05709), section 2.

    Args:
        encoder: "convnet", "convnet-32", or any timm model.
        image_size: side of the views in pixels; up to 64 a ResNet gets the small-image stem.
        channels: 3 for colour, 1 for grey; other data is converted.
        projection: hidden and output width of the projector.
        temperature: of the softmax.
        objective: "nt_xent", or any other objective of two views by name ("dcl", "dclw", "info_nce", "sigmoid_loss").
        mixing: parts that make the pairs harder, by name ("mochi"); see `counterpoint.memory.mixing`.
        heads: several projection heads, by name ("several", "amcl"); see `counterpoint.encoders.several`.
        views: the random views.
        other_views: those of the second view; None: as `views`.
        small_views: further small views (multi-crop), by name ("multi-crop", "multi-crop-small") or as (count, size, crop);
            each is contrasted with both large ones, and the loss is the mean over these pairs of views.
        pretrained: start from timm's pretrained weights.
    """

    def __init__(
        self,
        encoder: str = "resnet18",
        image_size: int = 64,
        channels: int = 3,
        projection: tuple[int, int] = (2048, 128),
        temperature: float = 0.2,
        objective: str = "nt_xent",
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        views: ImageViews = SIMCLR,
        other_views: ImageViews | None = None,
        small_views: MultiCrop | None = None,
        pretrained: bool = False,
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.encoder = encoders.image(encoder, image_size=image_size, channels=channels, pretrained=pretrained)
        self.heads = Several(heads, projection[1], temperature, mixing)
        self.projector = self.heads.each(partial(simclr_projector, self.encoder.dim, *projection))
        self.views = replace(views, size=image_size)
        self.other_views = replace(other_views or views, size=image_size)
        self.small_views = small_views and small_views.check(self.encoder)
        self.objective, self.temperature = contrast.objective(objective), temperature
        self.mixing = Mixed(mixing, projection[1], type(self).__name__)

    def project(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images).pooled)

    def loss(self, batch: Batch) -> Tensor:
        views = crops(batch["image"], (self.views, self.other_views), self.small_views)
        # two views alone keep batch statistics of their own
        z = by_size(self.project, views) if self.small_views else [self.project(view) for view in views]
        one, other = zip(*compared(len(z)), strict=True)
        query, key = torch.cat([z[i] for i in one]), torch.cat([z[j] for j in other])
        pairs = self.mixing(contrast.Pairs.under(self.objective, query, key, groups=len(one)), self.current_epoch)
        self.watch(z[0], z[1], pairs)
        return self.heads(pairs, self.objective, temperature=self.temperature)
